"""Endless streams of generated examples: made in chunks, each with a random state of its own, read from any number on."""

import contextlib
import functools
import zlib
from collections.abc import Callable, Generator, Sequence
from typing import Literal, TypeVar, get_args

from data import workers

T = TypeVar("T")
Split = Literal["train", "test"]
Part = tuple[int, int]  # (p, n): the p-th of n parts, from 0
ALL: Part = (0, 1)


def split_of(text: str) -> Split:
    """The split that an example of this text belongs to, by a hash: an eighth of all is "test"."""
    return "test" if zlib.crc32(text.encode()) % 8 == 0 else "train"


def stream(
    chunk: Callable[[int], list[T]], chunk_examples: int, *, split: Split, start: int = 0, num_workers: int = 0, part: Part = ALL
) -> Generator[T, None, None]:
    """The examples of chunks 0, 1, ... of `chunk_examples` each, from example `start` on. Closing it ends the processes.

    Args:
      chunk: something that pickles, see `workers.ordered`.
      split: what the chunks are of; checked here.
      part: of n parts the p-th has chunks p, p + n, p + 2n, ...; `start` counts its own examples.

    Raises:
      ValueError: a split, start or number of workers that there is not.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}: expected one of {', '.join(get_args(Split))}")
    if start < 0:
        raise ValueError(f"start is {start}: expected at least 0")
    first_chunk, skipped = divmod(start, chunk_examples)
    return _flatten(workers.ordered(functools.partial(_of_part, chunk, part), first_chunk, num_workers), skipped)


def _of_part(chunk: Callable[[int], list[T]], part: Part, number: int) -> list[T]:
    return chunk(part[0] + part[1] * number)


def _flatten(chunks: Generator[list[T], None, None], skipped: int) -> Generator[T, None, None]:
    with contextlib.closing(chunks):
        for chunk in chunks:
            yield from chunk[skipped:]
            skipped = 0


def likely_longest(lengths: Sequence[int]) -> int:
    """A length that hardly any example exceeds, from those of a sample of the largest ones.

    As far beyond the longest as that is beyond their mean: lengths are sums of many small parts, so this is some six
    standard deviations out.
    """
    return 2 * max(lengths) - sum(lengths) // len(lengths)
