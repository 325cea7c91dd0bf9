"""How many tokens may be read of one prompt at once."""

import numpy as np
import pytest

from selfspan_jax.serving.programs import sizes_of_readings


@pytest.mark.parametrize(
    "prefill_tokens, min_read_tokens, sizes",
    [
        (1024, 64, [1024, 512, 320, 256, 128, 64]),  # a server's: as many programs as shares, each of which is compiled
        (4096, 512, [4096, 3072, 2048, 1664, 1344, 1152, 1024, 640, 512]),
        (19_968, 4_096, [19_968, 14_976, 9_984, 8_320, 6_656, 5_824, 4_992]),
        (4096, 4096, [4096]),  # a large model's, which compiles for long
    ],
)
def test_sizes_are_shares_of_a_reading_and_means_of_large_ones(prefill_tokens, min_read_tokens, sizes):
    assert sizes_of_readings(prefill_tokens, min_read_tokens) == sizes


def test_means_leave_less_to_read_beyond_the_ends_of_prompts():
    lengths = np.random.default_rng(0).integers(1025, 4097, 1000)
    padded = {}
    for name, own in (("shares", [4096, 2048, 1344]), ("shares and means", sizes_of_readings(4096, 1024))):
        padded[name] = sum(min(size for size in own if size >= length) for length in lengths) / lengths.sum()
    assert padded["shares and means"] < padded["shares"] - 0.1
