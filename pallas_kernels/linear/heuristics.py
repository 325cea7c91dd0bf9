"""Choose the kernel's settings, and tell when it is faster than XLA.

Measured on one H200 (JAX 0.11.2), bf16 unless said; docs/linear.md has the tables, `python -m benchmarks.linear --tune`
times the settings of single matrices.
"""

from typing import NamedTuple

from jax.experimental import pallas as pl

from pallas_kernels.common import MULTIPROCESSORS

# A layer of Llama-2-7B with the norms in the kernel or in one of their own: 114 against 116 us at one row, 128 against 121 at
# eight: each program normalises all rows anew. Two rows stand between these measurements.
MAX_NORM_ROWS = 2

# Where the kernel was measured to be faster than XLA: a layer of Llama-2-7B takes 113 against 127 us at one row, 119 against
# 128 at eight, 126 against 142 at 32. With int8 weights 73 and 85 us at one and eight rows; more rows wait for the conversion.
MAX_ROWS = 32
MAX_INT8_ROWS = 8
MIN_WEIGHTS = 2**24  # smaller matrices were not measured


class LinearConfig(NamedTuple):
    """Static settings of the kernel. The inputs that a program reads at once are `segments * segment_inputs`."""

    tile_outputs: int  # outputs (gated: pairs of gate and up) that a program computes
    segments: int  # that the inputs read at once are divided into, each a row of the matrix unit's operands
    segment_inputs: int
    num_warps: int
    num_stages: int  # of the software pipeline: reads in flight plus one
    programs: int  # at most; each walks over every so-many-th tile of outputs


class TileConfig(NamedTuple):
    """Static settings of the tiled kernel."""

    tile_rows: int  # rows of x that a program computes; 1 is multiplied off the matrix unit
    tile_outputs: int  # outputs (gated: pairs of gate and up) that it computes
    tile_inputs: int  # that it reads at once; with as many as there are, no loop
    num_warps: int
    num_stages: int  # of the software pipeline, where there is a loop
    rows_first: bool = True  # rows on the long side of the matrix unit's product, else outputs


def is_fastest(batch: int, num_outputs: int, num_inputs: int, item_bytes: int) -> bool:
    """Tell whether the kernel was measured to be faster than XLA on problems like this one."""
    max_rows = {1: MAX_INT8_ROWS, 2: MAX_ROWS}.get(item_bytes, 0)
    return batch <= max_rows and num_outputs * num_inputs >= MIN_WEIGHTS


def linear_config(batch: int, num_results: int, num_inputs: int, item_bytes: int, gated: bool) -> LinearConfig:
    """Choose settings for a static shape; `item_bytes` is what an element of the weight takes up.

    A program must read enough at once that the work between two reads (barriers, the norm) hides behind them, and with
    its neighbours keep some 64 KB or more per multiprocessor on their way. Microseconds per layer of Llama-2-7B:
        one row:   128 matrix rows (16 outputs, 8 segments) of 64 inputs, 4 stages   113
                    64 matrix rows ( 8 outputs, 8 segments) of 64 inputs, 4 stages   127
        8 rows:     64 matrix rows of 128 inputs, the norm apart; undivided          119, in two segments 121
       32 rows:     64 matrix rows of 128 inputs, 2 programs                         126
                   128 matrix rows of 128 inputs, 1 program                          128
    Few outputs (4096) are divided into two segments from 8 rows on, to have a program for every multiprocessor.
    Int8 values are widened by every warp for itself, so warps must not share matrix rows: 16 rows for each.
    """
    rows, halves = pl.next_power_of_2(batch), 2 if gated else 1
    few_outputs = halves * num_results < 8192
    if rows == 1:
        matrix_rows, segments, inputs = 128, 8, 128 // min(item_bytes, 2)
    elif rows < 8:
        matrix_rows, segments, inputs = 64, 8 // rows, 128
    elif item_bytes == 1:
        matrix_rows, segments, inputs = (32, 2, 128) if few_outputs and rows <= 32 else (32, 1, 256)
    else:
        matrix_rows, segments, inputs = 64, 2 if few_outputs and rows <= 32 else 1, 128
    if item_bytes == 4:  # off the matrix unit
        matrix_rows, inputs = 32, 32
    while segments > 1 and largest_power_of_2_in(num_inputs // segments, 64) < min(inputs, 64):
        segments //= 2
    inputs = largest_power_of_2_in(num_inputs // segments, inputs)

    min_tiles = 192 if rows < 8 else 100
    while matrix_rows > 16 and num_results * segments * halves < min_tiles * matrix_rows:
        matrix_rows //= 2
    tile = max(1, matrix_rows // segments // halves)
    each = 2 if num_results > tile * MULTIPROCESSORS else 1
    read_bytes = (matrix_rows * item_bytes + max(8, rows * segments) * max(2, item_bytes)) * inputs
    if rows < 8 or item_bytes == 1:
        budget_bytes, max_stages = 72_000 if rows < 8 else 60_000, 6
    else:
        budget_bytes, max_stages = (100_000, 4) if each == 2 else (170_000, 7)
    num_stages = max(2, min(max_stages, budget_bytes // read_bytes))
    return LinearConfig(tile, segments, inputs, min(4, matrix_rows // 16), num_stages, each * MULTIPROCESSORS)


def is_tiled(batch: int, num_results: int, num_inputs: int, item_bytes: int, gated: bool) -> bool:
    """Tell whether the tiled kernel computes this."""
    return batch > 64 or num_results * (2 if gated else 1) * num_inputs < MIN_WEIGHTS


def tile_config(batch: int, num_results: int, num_inputs: int, item_bytes: int, gated: bool) -> TileConfig:
    """Choose settings of the tiled kernel for a static shape."""
    chunk = largest_power_of_2_in(num_inputs, 64)
    if batch == 1 and num_inputs <= 2048:
        return TileConfig(1, min(4, num_results), num_inputs, 2, 1)
    if batch <= 8:
        return TileConfig(8, 16, num_inputs if num_inputs <= 1024 else chunk, 2, 3, False)
    return TileConfig(min(64, max(16, pl.next_power_of_2(batch))), min(32, largest_power_of_2_below(num_results)), chunk, 4, 4)


def largest_power_of_2_below(number: int) -> int:
    """Find the largest power of two up to `number`."""
    return 1 << number.bit_length() - 1


def largest_power_of_2_in(number: int, limit: int) -> int:
    """Find the largest power of two that divides `number`, up to `limit`."""
    return min(number & -number, limit)
