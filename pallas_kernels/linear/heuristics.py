"""Which settings the kernel runs with, and when it is the fastest."""

from typing import NamedTuple

MULTIPROCESSORS = 132  # of an H100 or H200; another number costs a little balance, nothing else


class LinearConfig(NamedTuple):
    """Static settings of the kernel."""

    tile_outputs: int  # outputs (gated: pairs of gate and up) that a program computes
    chunk_inputs: int  # inputs that it reads at once
    num_warps: int
    num_stages: int  # of the software pipeline: chunks in flight plus one


def linear_config(batch: int, num_results: int, num_inputs: int, item_bytes: int, gated: bool) -> LinearConfig:
    """Settings for a static shape; `item_bytes` is what an element of the weight takes up."""
    chunk = largest_power_of_2(num_inputs, 64 if item_bytes == 4 else 256)
    tile = min(largest_at_most(num_results), 16 if gated or item_bytes == 4 else 32)
    return LinearConfig(tile, chunk, num_warps=4, num_stages=4)


def largest_power_of_2(number: int, most: int) -> int:
    """The largest power of two that divides `number`, up to `most`."""
    return min(number & -number, most)


def largest_at_most(number: int) -> int:
    """The largest power of two that is not more than `number`."""
    return 1 << (number.bit_length() - 1)
