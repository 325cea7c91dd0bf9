"""Choose the kernel's settings, and tell when it is faster than XLA.

Measured on one H200 (JAX 0.11.2), bf16 unless said, small matrices on one H100; docs/linear.md has the tables,
`python -m benchmarks.linear --tune` times the settings of single matrices.
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
MIN_WEIGHTS = 2**24  # smaller matrices go to the tiled kernel, see `tile_config`
MAX_INPUTS = 2048  # of these; 512, 576 and 1,536 were measured
MAX_TILED_ROWS = 1024
MAX_FEW_ROWS = 8  # the matrix unit's short side
# A step of SmolLM2-135M with early launches, milliseconds (one H200; 15 of its 30 layers from 4 rows on): 0.401 instead of 0.427 at one
# row, 0.288 instead of 0.301 at 4, 0.296 instead of 0.303 at 8, 0.347 instead of 0.360 at 16. At 64 and 256 rows they lose.
MAX_EARLY_ROWS = 16
MAX_GATED_ROWS = 128  # where rows are to be normalised: at 64 rows as fast as XLA or faster, at 256 slower

MIN_MOSAIC_ROWS = 16_384  # fewer were not measured
# At 512, 576 and 768 inputs the kernel was faster than XLA with a gate, up to 3,072 with a residual; at 4,096 and more slower or no faster.
MAX_MOSAIC_INPUTS = 768
MAX_MOSAIC_RESIDUAL_INPUTS = 3_072
MAX_MOSAIC_STAGES = 12
MAX_SHARED_BYTES = 227 * 1024  # of a program on Hopper
SHARED_BYTES_FOR_TWO = 220_000  # of the buffers of two programs that are to be on a multiprocessor at once


class LinearConfig(NamedTuple):
    """Static settings of the kernel. The inputs that a program reads at once are `segments * segment_inputs`."""

    tile_outputs: int  # outputs (gated: pairs of gate and up) that a program computes
    segments: int  # that the inputs read at once are divided into, each a row of the matrix unit's operands
    segment_inputs: int
    num_warps: int
    num_stages: int  # of the software pipeline: reads in flight plus one
    programs: int  # at most; each walks over every so-many-th tile of outputs
    alone: bool = False  # a multiprocessor has room for one: programs that copied rows would hold up others


class TileConfig(NamedTuple):
    """Static settings of the tiled kernel."""

    tile_rows: int  # rows of x that a program computes
    tile_outputs: int  # outputs (gated: pairs of gate and up) that it computes
    tile_inputs: int  # of a chunk, a power of two, several of which are in flight; with as many as there are, no loop
    num_warps: int
    num_stages: int  # of the software pipeline, where there is a loop
    rows_first: bool = True  # rows on the long side of the matrix unit's product, else outputs

    @property
    def on_matrix_unit(self) -> bool:
        """Whether rows are multiplied together; fewer than the long side of the matrix unit's product are multiplied one by one, off it."""
        return self.tile_rows >= 16 or not self.rows_first


def is_fastest(batch: int, num_outputs: int, num_inputs: int, item_bytes: int, gated: bool, scaled: bool = False) -> bool:
    """Tell whether a kernel of the Triton lowering was measured to be faster than XLA on problems like this one; `scaled`: `ScaledRows`."""
    if num_outputs * num_inputs >= MIN_WEIGHTS:
        return batch <= {1: MAX_INT8_ROWS, 2: MAX_ROWS}.get(item_bytes, 0)
    return item_bytes == 2 and num_inputs <= MAX_INPUTS and batch <= (MAX_GATED_ROWS if gated and not scaled else MAX_TILED_ROWS)


def is_fastest_of_many_rows(batch: int, num_inputs: int, gated: bool) -> bool:
    """Tell whether the Mosaic kernel was measured to be faster than XLA on a map like this one, with a gate or else a residual."""
    return batch >= MIN_MOSAIC_ROWS and num_inputs <= (MAX_MOSAIC_INPUTS if gated else MAX_MOSAIC_RESIDUAL_INPUTS)


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
    alone = 2 * num_stages * read_bytes > SHARED_BYTES_FOR_TWO
    return LinearConfig(tile, segments, inputs, min(4, matrix_rows // 16), num_stages, each * MULTIPROCESSORS, alone)


def is_tiled(batch: int, num_results: int, num_inputs: int, gated: bool) -> bool:
    """Tell whether the tiled kernel computes what the kernels of the Triton lowering compute: small matrices, or many rows."""
    return batch > 64 or num_results * (2 if gated else 1) * num_inputs < MIN_WEIGHTS


def tile_config(batch: int, num_results: int, num_inputs: int, item_bytes: int, gated: bool) -> TileConfig:
    """Choose settings of the tiled kernel for a static shape, as `linear_config`.

    Microseconds on an H100 of maps of 512 inputs (arithmetic-small) / of 576 (SmolLM2-135M), of 1,536 for down:
                                                                      QKV          o         gate-up        down
           1 row:  4 outputs, down 2; as many warps, norm first     - /  2.1    - / 1.8     - /  3.2     - /  2.2
                   XLA                                              - /  4.0    - / 2.6     - /  5.2     - /  2.9
         64 rows:  16 rows, 32 outputs, all in flight             3.7 /  4.1  3.3 / 3.4   7.4 /  8.3   4.9 /  4.9
                   16 rows, 64 outputs first, 5 stages            4.9 /  5.2    -         6.6 /  7.1     -
                   XLA in both runs                          4.8, 5.3 /  5.9  3.3 / 4.5   7.6 / 10.6   4.0 /  4.6
        256 rows:  32 rows, 64 outputs first                      6.7 /  7.2  3.3 / 3.5  19.0 / 20.8   5.8 /  5.7
                   64 rows, 64 outputs                            6.9 /  7.1  3.9 / 4.3   9.4 / 10.4   7.4 /  7.2
                   XLA                                            7.2 /  8.5  4.1 / 6.0   8.4 /  9.6   7.1 /  7.4
      1,024 rows:  64 rows, 128 outputs                           8.7 /  9.9  5.0 / 5.5  25.0 / 26.5   9.8 /  9.9
                   64 rows, 64 outputs                           10.7 / 11.1  4.2 / 6.2  26.2 / 28.4   7.7 / 10.9
                   128 rows, 128 outputs, 8 warps                13.2 / 13.9  6.6 / 7.2  18.5 / 20.1  11.8 / 12.4
                   XLA                                            8.9 /  9.6  5.6 / 6.8  14.1 / 15.1  12.3 / 10.9
    Of `ScaledRows`, another run, no norm in the loop (gate-up of 512 inputs in chunks of 128):
         64 rows:  16 rows, 32 outputs                            3.5 /  -
                   in whole steps on an H200: chunks of 64        - / 3.6        - / 3.5     - / 4.5        - / 5.2
                   chunks of 128 and a rest of 64                 - / 3.5        - / 3.3     - / 4.9        - / 5.0
                   64 rows, 16 pairs                                                         4.3 /  -
                   64 rows, 32 pairs                                                         5.1 /  -
        256 rows:  32 rows, 64 outputs first                      3.7 /  3.8
                   64 rows, 64 pairs                                                         7.5 /  7.8
                   128 rows, 32 pairs                                                        7.1 /  7.5
      1,024 rows:  64 rows, 128 outputs                           5.7 /  -
                   128 rows, 128 pairs, 8 warps                                             13.1 /  -
    (those at 256 rows less the 1.3 us of another launch in that chain). A map that makes `ScaledRows` takes 0.4 to 0.6 us more.
    Few rows, `ScaledRows` of 576 inputs, the kernel alone by the profiler on an H100, weights in memory / in the cache:
          8 rows:  8 rows, 16 outputs first, all at once,
                   4 warps (gate-up 2; down in chunks of 128)    2.7 /  2.4  2.7 / 2.3    4.3 /  3.1   4.1 /  3.7
                   the same, the norm in the map                 3.5 /  3.0  2.5 / 2.2    4.8 /  3.9   3.9 /  3.5
                   16 rows, 16 outputs, 2 warps, chunks of 128   2.9 /  2.7  3.1 / 2.9    5.2 /  4.7   4.4 /  4.3
                   16 rows, 32 outputs, 4 warps (gate-up 16)     3.3 /  3.3  3.2 / 3.0    4.8 /  4.2   4.8 /  4.6
                   row by row, off the matrix unit               4.5 /  4.2  4.0 / 3.6    8.8 /  8.0   4.6 /  4.2
        256 rows:  down of 512 outputs: 64 rows, 16 outputs                                            5.1 /  4.7
                   32 rows, 64 outputs first                                                           6.2 /  6.1
    Whole steps on an H200 (SmolLM2-135M, ms; attention as it was): 8 rows 0.634, before with tiles of 16 rows and 32 outputs 0.727.
    2 rows are multiplied as one is, each by itself: 0.537 where tiles of 8 rows take 0.571. 16 rows: tiles of 16 outputs take 0.667,
    with outputs first 0.672. 32 rows: as 64. arithmetic-small, 256 rows: 0.222 with the tiles of down above, six stages; 0.234 before.
    In whole steps on an H200, the kernel alone by the profiler, weights in memory, 576 inputs (512); down in chunks of 64 unless said:
        256 rows:  64 rows, 32 outputs; 64 pairs             4.0 (4.1)      3.7 (3.1)      6.2 (5.8)      6.3 (6.3)
                   32 rows, 64 outputs first; 128, 32 pairs  4.3 (4.1)      3.7 (3.1)      6.6 (6.3)         -
                   64 rows, 16 outputs, chunks of 128, 6 stages                                           8.8 (5.0)
                   the same, 5 stages                                                                     6.9 /  -
                   128 rows, 32 outputs; 64 pairs, 8 warps   5.5 /  -       4.0 /  -       7.6 /  -       8.5 /  -
        512 rows:  64 rows, 32 outputs; 64 pairs             5.1 (4.3)      5.0 (4.0)      8.4 (7.8)      8.0 (6.5)
                   32 rows, 64 outputs first; 128, 32 pairs  5.6 (4.2)      5.1 (4.3)     11.2 (10.7)        -
                   64 rows, 16 outputs, chunks of 128, 6 stages                                          12.9 (9.1)
                   the same, 5 stages                                                                    10.9 /  -
                   128 rows, 32 outputs; 64 pairs, 8 warps   5.5 /  -       4.1 /  -       7.8 /  -       8.0 /  -
    Steps of arithmetic-small with 512 rows 0.280 ms, 0.321 before. Six stages of those narrow tiles leave room for one program on a
    multiprocessor, so that they are chosen where all run at once. Pairs were 64 by 64 with fewer stages on the H100 above.
    """
    most = largest_power_of_2_below(num_results)
    if batch <= MAX_NORM_ROWS and num_inputs <= MAX_INPUTS:
        outputs = 4 if num_inputs <= 1024 else 2
        return TileConfig(batch, min(outputs, most), num_inputs, outputs, 1)
    if batch <= MAX_FEW_ROWS and item_bytes == 2 and num_inputs <= MAX_INPUTS:  # narrow tiles: many programs, with much in flight
        if num_inputs <= 1024:
            return TileConfig(MAX_FEW_ROWS, 16, num_inputs, num_warps=2 if gated else 4, num_stages=1, rows_first=False)
        return TileConfig(MAX_FEW_ROWS, 16, 128, num_warps=2, num_stages=8, rows_first=False)
    if batch <= 16 and item_bytes == 2 and not gated:
        return TileConfig(16, 16, min(128, largest_power_of_2_below(num_inputs)), num_warps=2, num_stages=5)
    few = batch <= 128 and item_bytes < 4
    chunk = largest_power_of_2_in(num_inputs, 32 if item_bytes == 4 else 128 if few else 64)
    if few and not gated:
        chunk = max(chunk, min(128, largest_power_of_2_below(num_inputs)))  # the rest beside the loop
    if few or item_bytes == 4:  # float32 is off the matrix unit
        wide = max(16, min(64, pl.next_power_of_2(batch)))
        rows, outputs, warps, stages = (wide, 16, 4, 640 // chunk) if few and gated else (16, 32, 4, min(10, 640 // chunk))
        rows_first = True
    elif batch <= 512:
        rows, outputs, warps, stages, rows_first = (64, 64, 4, 4, True) if gated else (64, 32, 4, 5, True)
        if num_inputs > 1024 and not gated and pl.cdiv(batch, rows) * pl.cdiv(num_results, 16) <= MULTIPROCESSORS:  # at once
            outputs, stages, chunk = 16, 6, largest_power_of_2_in(num_inputs, 128)
    elif gated:
        rows, outputs, warps, stages, rows_first = 128, 128, 8, 4, True
    else:
        rows, outputs, warps, stages, rows_first = 64, 128 if num_results > 512 else 64, 4, 5, True
    return TileConfig(rows, min(outputs, most), chunk, warps, max(2, min(stages, num_inputs // chunk + 1)), rows_first)


def largest_power_of_2_below(number: int) -> int:
    """Find the largest power of two up to `number`."""
    return 1 << number.bit_length() - 1


def largest_power_of_2_in(number: int, limit: int) -> int:
    """Find the largest power of two that divides `number`, up to `limit`."""
    return min(number & -number, limit)


def band_tiles(num_results: int, num_inputs: int) -> int:
    """Choose how many tiles of rows the Mosaic kernel computes for some results before the next results, for a static shape.

    Weights that fill the cache are read again for each band of rows, so bands are wide where they are large. Microseconds on one H100
    (JAX 0.11.2, bf16), outputs x inputs, while other programs were being compiled:
                              65,536 rows    16,384 rows                       8,192 rows
                              3072 x 512     3072 x 576     6144 x 768         28672 x 4096
        bands of 1 tile            373            104            317                3736
        bands of 8 tiles           605            107            241                2692
        bands of 16 tiles          633            111            238                2660
        XLA, with its SwiGLU       499            160            385                2610
    """
    return 8 if 2 * num_results * num_inputs > 2**22 else 1


class MosaicConfig(NamedTuple):
    """Static settings of the Mosaic kernel, whose tiles have 128 rows."""

    outputs: int  # matrix rows of a tile's product, gates and ups counted
    num_stages: int  # of the ring of inputs
    band_tiles: int  # see `band_tiles`


def mosaic_config(num_results: int, num_inputs: int, *, gated: bool, added: bool) -> MosaicConfig:
    """Choose settings of the Mosaic kernel for a static shape, in half precision."""
    width = next(width for width in (256, 192, 128, 64) if num_results % width == 0 and not (gated and width > 128))
    bands = band_tiles(num_results, num_inputs) if gated else 1
    config = MosaicConfig(2 * width if gated else width, MAX_MOSAIC_STAGES, bands)
    while mosaic_shared_bytes(config, added) > MAX_SHARED_BYTES:
        config = config._replace(num_stages=config.num_stages - 1)
    return config


def mosaic_slots(config: MosaicConfig, added: bool) -> int:
    """Count the buffers of 64 results that a warpgroup of the Mosaic kernel has: all of a tile where a residual comes into them."""
    return config.outputs // 64 if added else min(2, config.outputs // 64)


def mosaic_shared_bytes(config: MosaicConfig, added: bool) -> int:
    """Count the bytes of shared memory that a program of the Mosaic kernel takes, barriers included (at most 1 KiB)."""
    return (128 + config.outputs) * 128 * config.num_stages + 2 * mosaic_slots(config, added) * 64 * 128 + 1024
