"""Intervals of scores of examples, by resampling the examples (Efron, 1979)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 2_000

Counts = npt.NDArray[np.float64]
"""[n, 2], of each example the sum and the weight that it adds; the score is the ratio of the two over all examples."""


class Interval(NamedTuple):
    """A value, and the bounds that hold 95% of its resamples."""

    value: float
    low: float
    high: float


def score(counts: Counts) -> float:
    """Compute a score; NaN of nothing."""
    total, weight = counts.sum(axis=0)
    return float(total / weight) if weight else float("nan")


def difference(ours: Counts, theirs: Counts, *, seed: int = 0) -> Interval:
    """Compute how much higher one score is than another of the same examples in the same order, with its 95% percentile interval.

    Each resample draws as many examples as there are, the same for both. Raises ValueError where they are not as many, or none.
    """
    if ours.shape != theirs.shape or ours.ndim != 2 or not len(ours):
        raise ValueError(f"counts of shapes {ours.shape} and {theirs.shape}; expected both [n, 2] of the same examples")
    times = _draws(len(ours), seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        own, other = ((sums := times @ counts)[:, 0] / sums[:, 1] for counts in (ours, theirs))
    low, high = np.nanquantile(own - other, (0.025, 0.975))
    return Interval(score(ours) - score(theirs), float(low), float(high))


@functools.lru_cache(maxsize=4)  # comparisons of the same examples draw them alike
def _draws(size: int, seed: int) -> npt.NDArray[np.float64]:
    """Draw how often each of so many examples is in a resample: [RESAMPLES, size]."""
    return np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=RESAMPLES).astype(np.float64)
