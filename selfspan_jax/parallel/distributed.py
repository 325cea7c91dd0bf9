"""Several processes, on one host or on many, that train as one: JAX's distributed runtime, and what is left to the first of them.

All run the same command. Each computes with its own devices and reads its own part of the data; what they tell each other
stands in `sharding`. The first one writes and speaks; checkpoints are written by all. When one of them dies the others end:
within moments where a sum between them fails, and at the latest when the runtime has missed its heartbeat. They do not go on
without it, so a run resumes as one on one device does: by the same commands.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import zlib
from collections.abc import Iterator

import jax

from selfspan_jax.parallel import layout as sharding

HEARTBEAT_SECONDS = 30  # without a sign of life after which a process counts as dead
JOIN_SECONDS = 120  # that processes wait for each other when they start
LEAVE_SECONDS = 20  # and when they end: then one that ended by an error of its own takes the others with it


def join(hosts: str | None, command: str = "") -> None:
    """Makes this process one of several, before anything else is asked of JAX; returns when all are there.

    Args:
      hosts: None for a process alone; "auto" where a cluster says who is who (SLURM, Open MPI, Kubernetes); or `HOST:PORT,N,I`:
        where process 0 is to be reached, how many there are, and which one this is.
      command: what all of them must agree on.

    Raises: ValueError for a text that is none of these, an environment that does not say who is who, or, in every process,
      where they do not agree.
    """
    if hosts is None:
        return
    found = re.fullmatch(r"(?P<address>[^,\s]+:\d+),(?P<number>\d+),(?P<own>\d+)", hosts)
    if hosts != "auto" and not (found and int(found["own"]) < int(found["number"])):
        raise ValueError(f"hosts is {hosts!r}; allowed: auto, or HOST:PORT,N,I with I from 0 to N - 1, as in 10.0.0.1:9876,2,0")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from its meaning
    # Where one does not come the runtime ends this process, in words of its own: so ours come before.
    print(f"waiting for all processes ({hosts}), {JOIN_SECONDS} s at most", file=sys.stderr, flush=True)
    waits = {"initialization_timeout": JOIN_SECONDS, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    waits["shutdown_timeout_seconds"] = LEAVE_SECONDS
    if found:
        who = {"coordinator_address": found["address"], "num_processes": int(found["number"]), "process_id": int(found["own"])}
        jax.distributed.initialize(**who, cluster_detection_method="deactivate", **waits)  # type: ignore[arg-type]
    else:
        _join_cluster(waits)
    number = zlib.crc32(command.encode()) >> 1
    if sharding.most_of_processes([number, -number]) != [number, -number]:
        raise ValueError("hosts: the processes were started with different options; allowed to differ: --hosts and --workers")


def _join_cluster(waits: dict[str, int]) -> None:
    try:
        jax.distributed.initialize(**waits)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError("hosts is 'auto', but nothing here says who is who, as SLURM does; allowed elsewhere: HOST:PORT,N,I") from error


def is_first() -> bool:
    """Whether this process writes and speaks; one that is alone does."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_first():
        print(text, flush=True)


def end_if_lost(error: Exception) -> None:
    """Ends this process with status 1 and one line if an error came from the runtime that several processes share.

    At once, without the end of the program: that would wait for the process that is gone.
    """
    # The runtime's errors begin with the name of a status; some arrive as ValueError.
    if jax.process_count() == 1 or not re.match(r"[A-Z_]{4,}: ", str(error)):
        return
    reason = " ".join(str(error).splitlines()[0].split())[:200]
    print(
        f"error: another process of this run ended or cannot be reached ({reason}); "
        "start all of them again with the same commands to go on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """For a whole run: `end_if_lost` for its errors, and no process ends before the first has written everything."""
    try:
        yield
        if jax.process_count() > 1:
            sharding.most_of_processes(0)
    except (RuntimeError, ValueError) as error:
        end_if_lost(error)
        raise
