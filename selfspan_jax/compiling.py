"""Compiling of several programs at once, because XLA leaves most processors idle on one."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
MAX_THREADS = max(1, (os.cpu_count() or 1) // 2)


def compile_all(programs: Sequence[Callable[[], Callable[[], T]]]) -> list[T]:
    """Compile programs, each while the next ones are made ready; return what each gave.

    A program is a function that makes it ready and returns what compiles it. The first is Python, which only one thread runs at a time;
    the second is the compiler, which is called in several.
    """
    with concurrent.futures.ThreadPoolExecutor(MAX_THREADS) as pool:
        compiling = [pool.submit(program()) for program in programs]
        return [compiled.result() for compiled in compiling]
