"""The benchmark's own parts that need no GPU: which slots it draws, and what it tells a user."""

import numpy as np
import pytest

from benchmarks import span_decode as bench
from benchmarks.shapes import AttentionShape

SHAPE = AttentionShape("tiny", "", (640, 64, 1), 4, 2, 32)


@pytest.mark.parametrize("density", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("pattern", bench.PATTERNS)
@pytest.mark.parametrize("length", [1, 65, 4096])
def test_positions_have_the_density_asked_for(length, density, pattern):
    positions = bench.draw_positions(np.random.default_rng(0), length, density, pattern)
    assert len(positions) == max(1, round(density * length))
    assert np.all(np.diff(positions) > 0) and 0 <= positions[0] and positions[-1] < length


def test_patterns_are_what_they_are_called():
    runs = {}
    for pattern in bench.PATTERNS:
        positions = bench.draw_positions(np.random.default_rng(0), 65536, 0.02, pattern)
        runs[pattern] = len(positions) / (1 + np.count_nonzero(np.diff(positions) > 1))
    assert runs["tokens"] < 1.1 and 8 <= runs["spans"] <= 30 and runs["blocks"] > 60


def test_sequences_have_slots_of_their_own():
    slots, counts = bench.draw_slots(0, SHAPE, 0.1, "tokens", first_row=1000)
    assert counts.tolist() == [64, 6, 1]
    for b, (first, last) in enumerate([(1000, 1640), (1640, 1704), (1704, 1705)]):
        used = slots[b, : counts[b]]
        assert np.all((used >= first) & (used < last)) and np.all(slots[b, counts[b] :] == -1)
