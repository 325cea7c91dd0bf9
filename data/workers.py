"""Chunks of data computed by worker processes, in order.

The workers are fresh interpreters rather than `multiprocessing` ones: those would import the parent's main module
again, JAX included (spawn), or copy a process with JAX's threads in it (fork). Each worker owns a pipe that only the
parent reads. Writing blocks while the parent is busy, which bounds the look-ahead to about a chunk a worker, and fails
once the parent is gone, however it died, which ends the worker.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_MAX_WORKERS = 256
_ROOT = str(Path(__file__).resolve().parent.parent)
_MAIN = "from data import workers; workers.main()"


def ordered(function: Callable[[int], T], start: int, num_workers: int) -> Generator[T, None, None]:
    """Yields function(start), function(start + 1), ... without end.

    Args:
      function: something that pickles (a partial of a module's function); its results pickle too.
      start: the first number.
      num_workers: processes that compute ahead; 0 computes here, when asked.

    Raises:
      ValueError: a number of workers that cannot be.
      RuntimeError: (on iterating) a worker ended.
    """
    if not 0 <= num_workers <= _MAX_WORKERS:
        raise ValueError(f"the number of workers is {num_workers}: expected 0 to {_MAX_WORKERS}")
    return _from_workers(function, start, num_workers) if num_workers else _here(function, start)


def _here(function: Callable[[int], T], number: int) -> Generator[T, None, None]:
    while True:
        yield function(number)
        number += 1


def _from_workers(function: Callable[[int], T], start: int, num_workers: int) -> Generator[T, None, None]:
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, environment.get("PYTHONPATH"))))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for i in range(num_workers):
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
                pickle.dump((function, start + i, num_workers), pipe)
        number = 0
        while True:
            process = processes[number % num_workers]
            assert process.stdout
            try:
                chunk = pickle.load(process.stdout)
            except (EOFError, pickle.UnpicklingError):
                raise RuntimeError(f"a data worker ended with exit status {process.wait()}") from None
            yield chunk
            number += 1
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            with process:  # closes the pipes and waits
                pass


def main() -> None:
    """The whole life of a worker: reads its work from stdin, writes every `stride`-th chunk to stdout."""
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to stderr, not between the chunks
    try:
        function, number, stride = pickle.load(sys.stdin.buffer)
        while True:
            pickle.dump(function(number), pipe, protocol=pickle.HIGHEST_PROTOCOL)
            pipe.flush()
            number += stride
    except (BrokenPipeError, EOFError):
        os._exit(0)  # the parent is gone; a normal exit would flush the pipe once more
