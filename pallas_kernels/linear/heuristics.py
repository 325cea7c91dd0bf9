"""Which settings the kernel runs with, and when it is the fastest."""

from typing import NamedTuple

MULTIPROCESSORS = 132  # of an H100 or H200; another number costs a little balance, nothing else


class LinearConfig(NamedTuple):
    """Static settings of the kernel. The inputs that a program reads at once are `segments * segment_inputs`."""

    tile_outputs: int  # outputs (gated: pairs of gate and up) that a program computes
    segments: int  # that the inputs read at once are divided into, each a row of the matrix unit's operands
    segment_inputs: int
    num_warps: int
    num_stages: int  # of the software pipeline: reads in flight plus one


def linear_config(batch: int, num_results: int, num_inputs: int, item_bytes: int, gated: bool) -> LinearConfig:
    """Settings for a static shape; `item_bytes` is what an element of the weight takes up."""
    segments = max(1, 8 // next_power_of_2(batch))
    while num_inputs % (segments * 16):
        segments //= 2
    segment_inputs = largest_power_of_2(num_inputs // segments, 64)
    tile = min(largest_at_most(num_results), 64 // segments, 16 if gated else 64)
    return LinearConfig(max(tile, 16 // segments), segments, segment_inputs, num_warps=4, num_stages=4)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def largest_power_of_2(number: int, most: int) -> int:
    """The largest power of two that divides `number`, up to `most`."""
    return min(number & -number, most)


def largest_at_most(number: int) -> int:
    """The largest power of two that is not more than `number`."""
    return 1 << (number.bit_length() - 1)
