"""Compiling of several programs at once, because XLA leaves most processors idle on one."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
MAX_THREADS = max(1, (os.cpu_count() or 1) // 2)


def compile_all(programs: Sequence[Callable[[], Callable[[], T]]]) -> list[T]:
    """Compile programs, each while the next ones are traced; return what their compiling gave, in order.

    Args:
      programs: functions that trace a program and return the function that compiles it. They are called here, one after
        the other, because tracing is Python, which one thread runs at a time; what they return is called in several threads.
    """
    with concurrent.futures.ThreadPoolExecutor(MAX_THREADS) as pool:
        compiling = [pool.submit(program()) for program in programs]
        return [compiled.result() for compiled in compiling]
