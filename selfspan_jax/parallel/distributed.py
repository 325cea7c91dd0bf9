"""Runs of several processes, on one host or many, by JAX's distributed runtime.

All processes run the same command. Each computes with its own devices and reads its own part of the data. The first one writes
metrics, cards and the console; checkpoints are written by all. When a process dies the others end too: at once if a collective
fails, at the latest when the runtime has missed its heartbeat. The run then resumes like one on a single device, by the same
commands.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import zlib
from collections.abc import Iterator

import jax

from selfspan_jax.errors import UserError
from selfspan_jax.parallel.collectives import process_max

HEARTBEAT_SECONDS = 30  # without a heartbeat after which a process counts as dead
INITIALIZATION_SECONDS = 120  # that processes wait for each other at the start
SHUTDOWN_SECONDS = 20  # that processes wait for each other at the end; then one that failed takes the others with it


def initialize(hosts: str | None, command: str = "") -> None:
    """Join the other processes of a run, before any other use of JAX; returns when all have joined.

    Args:
      hosts: None for a single process; "auto" in a cluster that JAX recognises (SLURM, Open MPI, Kubernetes); or `HOST:PORT,N,I`:
        the address of process 0, the number of processes, and the index of this one.
      command: a text that all processes must agree on.

    Raises: UserError for another text, for "auto" without a cluster, or, in every process, if they do not agree on the command.
    """
    if hosts is None:
        return
    found = re.fullmatch(r"(?P<address>[^,\s]+:\d+),(?P<number>\d+),(?P<own>\d+)", hosts)
    if hosts != "auto" and not (found and int(found["own"]) < int(found["number"])):
        raise UserError(f"hosts is {hosts!r}; allowed: auto, or HOST:PORT,N,I with I from 0 to N - 1, as in 10.0.0.1:9876,2,0")
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM
    # If one does not come the runtime ends this process with a message of its own, so ours is printed first.
    print(f"waiting for all processes ({hosts}), {INITIALIZATION_SECONDS} s at most", file=sys.stderr, flush=True)
    timeouts = {"initialization_timeout": INITIALIZATION_SECONDS, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    timeouts["shutdown_timeout_seconds"] = SHUTDOWN_SECONDS
    if found:
        own = {"coordinator_address": found["address"], "num_processes": int(found["number"]), "process_id": int(found["own"])}
        jax.distributed.initialize(**own, cluster_detection_method="deactivate", **timeouts)  # type: ignore[arg-type]
    else:
        try:
            jax.distributed.initialize(**timeouts)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError("hosts is 'auto', but JAX recognises no cluster here (such as SLURM); allowed: HOST:PORT,N,I") from error
    checksum = zlib.crc32(command.encode()) >> 1
    if process_max([checksum, -checksum]) != [checksum, -checksum]:
        raise UserError("hosts: the processes were started with different options; allowed to differ: --hosts and --workers")


def is_first_process() -> bool:
    """Return whether this process writes files and prints: the first one, or the only one."""
    return jax.process_index() == 0


def log_once(*lines: str | None) -> None:
    """Print lines in the first process, those that there are."""
    for line in filter(None, lines):
        if is_first_process():
            print(line, flush=True)


@contextlib.contextmanager
def exit_if_peer_lost() -> Iterator[None]:
    """Exit with status 1 and one line if a block fails by an error of the runtime that several processes share.

    The exit is immediate: the ordinary one would wait for the process that is gone.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # The runtime's errors begin with the name of a status; some arrive as ValueError.
        if jax.process_count() == 1 or not re.match(r"[A-Z_]{4,}: ", str(error)):
            raise
        reason = " ".join(str(error).splitlines()[0].split())[:200]
        print(
            f"error: another process of this run ended or cannot be reached ({reason}); "
            "start all of them again with the same commands to go on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


@contextlib.contextmanager
def barrier() -> Iterator[None]:
    """Run a block in all processes, as in `exit_if_peer_lost`; no process leaves before all have finished it."""
    with exit_if_peer_lost():
        yield
        if jax.process_count() > 1:
            process_max(0)
