"""Intervals of scores of examples, by resampling the examples (Efron, 1979)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
_CHUNK = 1_000  # resamples whose draws are in memory at once

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
    rng, size, found = np.random.default_rng(seed), len(ours), []
    for _ in range(RESAMPLES // _CHUNK):
        times = rng.multinomial(size, np.full(size, 1 / size), size=_CHUNK)  # how often each example was drawn
        with np.errstate(invalid="ignore", divide="ignore"):
            own, other = ((sums := times @ counts)[:, 0] / sums[:, 1] for counts in (ours, theirs))
        found.append(own - other)
    low, high = np.nanquantile(np.concatenate(found), (0.025, 0.975))
    return Interval(score(ours) - score(theirs), float(low), float(high))
