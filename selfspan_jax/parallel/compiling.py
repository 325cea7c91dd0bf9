"""Compiling of several programs at once, because XLA leaves most processors idle on one."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
MAX_THREADS = max(1, (os.cpu_count() or 1) // 2)


def compile_all(
    programs: Sequence[Callable[[], Callable[[], T]]], on_progress: Callable[[int, int], None] = lambda done, of: None
) -> list[T]:
    """Compile programs, each while the next ones are traced; return what their compiling gave, in order.

    Args:
      programs: functions that trace a program and return the function that compiles it. They are called here, one after
        the other, because tracing is Python, which one thread runs at a time; what they return is called in several threads.
      on_progress: called here now and then, with how many programs are compiled, and of how many.
    """
    compiling: list[concurrent.futures.Future[T]] = []
    with concurrent.futures.ThreadPoolExecutor(MAX_THREADS) as pool:
        for program in programs:
            compiling.append(pool.submit(program()))
            on_progress(sum(own.done() for own in compiling), len(programs))
        for _ in concurrent.futures.as_completed(compiling):
            on_progress(sum(own.done() for own in compiling), len(programs))
        return [own.result() for own in compiling]
