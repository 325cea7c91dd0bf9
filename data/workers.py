"""Compute data ahead in worker processes: chunks in several, in order, or a whole iterator in one.

The workers are fresh interpreters rather than `multiprocessing` ones: those would import the parent's main module
again, JAX included (spawn), or copy a process with JAX's threads in it (fork). Each worker owns a pipe that only the
parent reads. Writing blocks while the parent is busy, which bounds the look-ahead to about a chunk a worker, and fails
once the parent is gone, however it died, which ends the worker.
"""

import functools
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar

from data.errors import UserError

T = TypeVar("T")

_MAX_WORKERS = 256
_ROOT = str(Path(__file__).resolve().parent.parent)
_MAIN = "from data import workers; workers.main()"


def check_workers(num_workers: int) -> None:
    """Raise UserError for a number of workers out of range."""
    if not 0 <= num_workers <= _MAX_WORKERS:
        raise UserError(f"the number of workers is {num_workers}; allowed: 0 to {_MAX_WORKERS}")


def ordered(function: Callable[[int], T], start: int, num_workers: int, *, step: int = 1) -> Generator[T, None, None]:
    """Yield function(start), function(start + step), ... without end.

    Args:
      function: something that pickles (a partial of a module's function); its results pickle too.
      num_workers: processes that compute ahead; 0 computes here, when asked.

    Raises:
      UserError: a number of workers out of range; (on iterating) what the function raised.
      RuntimeError: (on iterating) a worker ended.
    """
    check_workers(num_workers)
    if num_workers == 0:
        return _counted(function, start, step)
    return remote(*(functools.partial(_counted, function, start + i * step, num_workers * step) for i in range(num_workers)))


def _counted(function: Callable[[int], T], start: int, step: int) -> Generator[T, None, None]:
    yield from map(function, itertools.count(start, step))


def remote(*iterables: Callable[[], Iterable[T]]) -> Generator[T, None, None]:
    """Yield one item of each `iterable()` in turn, each computed ahead by a process of its own, which may have workers in turn.

    They pickle (partials of a module's function) and do not end. Raises as `ordered` does.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, environment.get("PYTHONPATH"))))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for iterable in iterables:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN],  # -P: the current directory may hold anything
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                process_group=0,  # Ctrl-C is for the parent
            )
            processes.append(process)
            assert process.stdin
            with process.stdin as pipe:
                pickle.dump(iterable, pipe)
        for process in itertools.cycle(processes):
            assert process.stdout
            try:
                item = pickle.load(process.stdout)
            except (EOFError, pickle.UnpicklingError):
                raise RuntimeError(f"a data worker ended with exit status {process.wait()}") from None
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            with process:  # closes the pipes and waits
                pass


def end_with_parent() -> None:
    """Let this process, of a pool of `multiprocessing`, end when the one that started it has ended, however it did; for its initializer.

    Workers of a pool wait for ever otherwise: each holds the other end of the queue that it reads.
    """
    parent = multiprocessing.parent_process()
    assert parent

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Run a worker: read from stdin what to iterate over, and write the items to stdout."""
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to stderr, not between the items

    def send(item: Any) -> None:
        pickle.dump(item, pipe, protocol=pickle.HIGHEST_PROTOCOL)
        pipe.flush()

    try:
        try:
            for item in pickle.load(sys.stdin.buffer)():
                send(item)
        except UserError as error:
            send(UserError(str(error)))  # a subclass may not pickle
    except (BrokenPipeError, EOFError):
        os._exit(0)  # the parent is gone; a normal exit would flush the pipe once more
