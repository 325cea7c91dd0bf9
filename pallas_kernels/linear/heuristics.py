"""Which settings the kernel runs with, and when it is the fastest."""

from typing import NamedTuple

MULTIPROCESSORS = 132  # of an H100 or H200; another number costs a little balance, nothing else


MOST_NORM_ROWS = 8  # with more rows every program would spend too long on the norm; it gets a kernel of its own


class LinearConfig(NamedTuple):
    """Static settings of the kernel. The inputs that a program reads at once are `segments * segment_inputs`."""

    tile_outputs: int  # outputs (gated: pairs of gate and up) that a program computes
    segments: int  # that the inputs read at once are divided into, each a row of the matrix unit's operands
    segment_inputs: int
    num_warps: int
    num_stages: int  # of the software pipeline: reads in flight plus one
    programs: int  # at most; each walks over every so-many-th tile of outputs


def linear_config(batch: int, num_results: int, num_inputs: int, item_bytes: int, gated: bool) -> LinearConfig:
    """Settings for a static shape; `item_bytes` is what an element of the weight takes up."""
    rows = next_power_of_2(batch)
    segments = max(1, 8 // rows)  # the matrix unit computes 8 rows at least
    if 8 <= rows <= 32 and num_results < 8192:
        segments = 2  # too few outputs for as many programs as there are multiprocessors
    while num_inputs % (16 * segments):
        segments //= 2
    operand_rows = 64 if segments > 1 or num_results >= 64 else largest_power_of_2_below(num_results)
    tile = max(1, operand_rows // segments // (2 if gated else 1))
    tile = min(tile, largest_power_of_2_below(num_results))
    num_warps = max(1, min(4, tile * segments * (2 if gated else 1) // 16))
    step_bytes = 16384 if item_bytes < 4 else 8192
    segment_inputs = largest_power_of_2_in(num_inputs // segments, max(16, step_bytes // item_bytes // operand_rows))
    read_bytes = (operand_rows * item_bytes + max(8, rows * segments) * max(2, item_bytes)) * segment_inputs
    each = 2 if num_results // tile >= 2 * MULTIPROCESSORS else 1
    num_stages = max(2, min(8, 100_000 // each // read_bytes))
    return LinearConfig(tile, segments, segment_inputs, num_warps, num_stages, each * MULTIPROCESSORS)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def largest_power_of_2_in(number: int, most: int) -> int:
    """The largest power of two that divides `number`, up to `most`."""
    return min(number & -number, most)


def largest_power_of_2_below(number: int) -> int:
    """The largest power of two that is not more than `number`."""
    return 1 << (number.bit_length() - 1)
