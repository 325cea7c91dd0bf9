"""Skinny GEMMs, few rows times a large matrix, as a Pallas kernel with the Triton lowering (Ampere and newer).

For row `b` and output `m`, with the normalised row `n[b] = x[b] rsqrt(mean(x[b]^2) + eps) * norm` (or `x[b]` without norm):

    product[b, m] = scales[m] sum_d n[b, d] weight[m, d] + bias[m]
    out[b, m]     = product[b, m] + residual[b, m]                                     plain
    out[b, f]     = silu(product[b, f]) product[b, F + f] + residual[b, f]             gated

and, where the norm of the next map is known (`ScaledRows`), out * next_norm and the sums of out^2 over each tile of outputs.

Why it exists: a decode step reads every weight once to multiply it with a few rows, so its time is that of the bytes
(`expected_bytes()`), and everything else is to be hidden behind them. XLA gives the norm, the gate and often the residual
kernels of their own, each a launch and a walk through memory in every layer, and starts the matrix when they are done.

How: a program owns a tile of outputs and walks over the inputs in chunks, several of which are on their way at any time.
The weights stand on the long side of the matrix unit's product and the rows of `x` on its short one (8 rows are enough).
The factor rsqrt(...) of a row does not depend on d, so it is applied after the sum: the squares are summed up
along the same walk, and no program waits for a norm. Of `ScaledRows` they are known, and no program scales its rows anew.
Programs that come first and compute nothing copy rows from host memory meanwhile, if that is asked for: the link waits for no matrix.
The last tile is moved back to end with the matrix; what it shares with the one before it is computed and stored twice, to the same bits.

Numerics: x * norm is rounded once to the dtype of `x` (Llama rounds the normalised row and then the product with the scale);
sums, norm, bias, gate and residual are float32, and the result is rounded once. float32 uses IEEE products. Int8 weights are
widened to the dtype of `x`, which is exact; their scales multiply the float32 sums.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import dot
from pallas_kernels.copy_rows import Copies
from pallas_kernels.copy_rows.triton import BESIDE_PROGRAMS, copy_share, flat_operands
from pallas_kernels.linear.heuristics import LinearConfig
from pallas_kernels.linear.reference import ScaledRows, SplitRows
from pallas_kernels.quantized import Quantized, Rows, values_of

MIN_ROWS = 8  # of the short side of the matrix unit's product
RESULTS = ("out", "scaled", "out_squares")


def triton_linear(
    x,
    weight: Rows,
    norm,
    bias,
    residual,
    next_norm=None,
    copies: Copies | None = None,
    *,
    norm_eps: float,
    gated: bool,
    out_dtype: jnp.dtype,
    config: LinearConfig,
    interpret: bool = False,
) -> Any:
    """Run the kernel; arrays as in `fused_linear`, `x` `[B, D]` or `ScaledRows` of it, already checked."""
    values = values_of(weight)
    num_results = values.shape[0] // 2 if gated else values.shape[0]
    tiles = pl.cdiv(num_results, config.tile_outputs)

    def split(array: jax.Array) -> jax.Array:
        return array.reshape(*array.shape[:-1], -1, config.segment_inputs)

    x, optional = operands(x, weight, norm, bias, residual, next_norm)
    if "norm" in optional:
        optional["norm"] = split(optional["norm"])
    results = result_shapes(x.shape[0], num_results, out_dtype, tiles if next_norm is not None else 0)
    given: list[jax.Array] = [split(x), split(values), *optional.values()]
    pools = () if copies is None else copies.pools
    first = len(given) + len(pools)  # the first of the pools that are written
    if copies is not None:
        given += flat_operands(copies, interpret)
    copied = tuple(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in given[first : first + len(pools)])
    kernel = functools.partial(_kernel, names=(*optional, *results), num_copied=len(pools), norm_eps=norm_eps, gated=gated, config=config)
    programs = pl.cdiv(tiles, pl.cdiv(tiles, config.programs))  # the fewest that take no longer than `config.programs`
    outs = pl.pallas_call(
        kernel,
        grid=(programs + (BESIDE_PROGRAMS if pools else 0),),
        out_shape=(*results.values(), *copied),
        input_output_aliases={first + i: len(results) + i for i in range(len(pools))},
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="fused_linear",
    )(*given)
    out = outs[0] if next_norm is None else ScaledRows(*outs[: len(results)])
    return out if copies is None else (out, tuple(flat.reshape(pool.shape) for flat, pool in zip(outs[len(results) :], pools)))


def operands(x, weight: Rows, norm, bias, residual, next_norm) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the rows to multiply, and by their names the arrays of a call that another call may lack."""
    lse = squares = None
    if isinstance(x, ScaledRows):
        x, squares, norm = x.scaled, x.squares, None
    elif isinstance(x, SplitRows):
        x, lse = x
    found = {
        "lse": lse,
        "scales": weight.scales if isinstance(weight, Quantized) else None,
        "norm": None if norm is None else norm.astype(x.dtype),
        "squares": squares,
        "bias": bias,
        "residual": residual,
        "next_norm": None if next_norm is None else next_norm.astype(x.dtype),
    }
    return x, {name: array for name, array in found.items() if array is not None}


def result_shapes(batch: int, num_results: int, dtype: jnp.dtype, squared_tiles: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Name the results of a call: one array, or where squares are summed up those of `ScaledRows`."""
    out = jax.ShapeDtypeStruct((batch, num_results), dtype)
    return {"out": out} | (
        {"scaled": out, "out_squares": jax.ShapeDtypeStruct((squared_tiles, batch), jnp.float32)} if squared_tiles else {}
    )


def read_squares(squares_ref, rows):
    """Read the sums of squares of `rows`, of each group of columns: float32 [T, rows], zeros up to a power of two; `squares_ref` [T, B]."""
    number = squares_ref.shape[0]
    tile, row = jnp.arange(pl.next_power_of_2(number), dtype=jnp.int32)[:, None], rows[None, :]
    shape = (tile.size, row.size)
    sums = squares_ref[jnp.broadcast_to(jnp.minimum(tile, number - 1), shape), jnp.broadcast_to(row, shape)]
    return jnp.where(tile < number, sums, 0.0)


def factor_of(squares, num_inputs: int, norm_eps: float):
    """Compute the norm's factor of rows from the sums of their squares."""
    return jax.lax.rsqrt(squares / num_inputs + norm_eps)


def write_tile(ref_of: dict, out, rows, index, tile: int, next_norm):
    """Write tile `index` of the outputs, float32 `[rows, tile]`, and what the next norm, where it is given, wants of them.

    The last tile ends with the matrix.
    """
    start = jnp.minimum(index * tile, ref_of["out"].shape[1] - tile)
    out = out.astype(ref_of["out"].dtype)
    ref_of["out"][rows, pl.ds(start, tile)] = out
    if next_norm is not None:
        ref_of["scaled"][rows, pl.ds(start, tile)] = out * next_norm[None, :]
        own = (start + jnp.arange(tile, dtype=jnp.int32) >= index * tile)[None, :]  # the others are counted by the tile before
        ref_of["out_squares"][index, rows] = jnp.sum(jnp.where(own, jnp.square(out.astype(jnp.float32)), 0.0), axis=1)


def padded_rows(batch: int, segments: int) -> int:
    """Count the rows that a program computes: with their segments, at least the matrix unit's short side."""
    return max(pl.next_power_of_2(batch), MIN_ROWS // segments, 1)


def _kernel(*refs, names: tuple[str, ...], num_copied: int, **options):  # `copy_share`'s refs stand before `_multiply`'s results
    program, num_programs = pl.program_id(0), pl.num_programs(0)
    if not num_copied:
        return _multiply(program, num_programs, *refs, names=names, **options)
    first = 2 + sum(name not in RESULTS for name in names)  # ref of the copies
    lists, outs = refs[first : first + 2 * num_copied + 4], refs[first + 2 * num_copied + 4 :]

    @pl.when(program < BESIDE_PROGRAMS)
    def copy():
        copy_share(lists, outs[-num_copied:], program, BESIDE_PROGRAMS)

    @pl.when(program >= BESIDE_PROGRAMS)
    def multiply():
        given = *refs[:first], *outs[:-num_copied]
        _multiply(program - BESIDE_PROGRAMS, num_programs - BESIDE_PROGRAMS, *given, names=names, **options)


def _multiply(
    program,
    num_programs,
    x_ref,  # [B, D / C, C], C the inputs of a segment
    weight_ref,  # [M, D / C, C], M = 2 F if gated
    *refs,  # those that `names` says of scales [M], norm [D / C, C], squares [T, B], bias [M], residual [B, M or F], next_norm [M or F],
    # then the outputs: out [B, M or F] and maybe scaled [B, M or F] and out_squares [tiles, B]
    names: tuple[str, ...],
    norm_eps: float,
    gated: bool,
    config: LinearConfig,
):
    ref_of = dict(zip(names, refs, strict=True))
    tile, segments = config.tile_outputs, config.segments
    batch, num_segments, segment_inputs = x_ref.shape
    num_results = ref_of["out"].shape[1]
    num_tiles = pl.cdiv(num_results, tile)
    steps, halves = num_segments // segments, 2 if gated else 1  # of a tile: its reads; its gate and its up outputs

    # The rows of the two operands: (half, output, segment) and (row of x, segment). Beyond the batch the last row is read
    # again, computed and stored like itself, which saves masks.
    padded = padded_rows(batch, segments)
    output, segment = _divide(jnp.arange(halves * tile * segments, dtype=jnp.int32), segments)
    output = _matrix_row(output, tile, num_results)
    row, row_segment = _divide(jnp.arange(padded * segments, dtype=jnp.int32), segments)
    row = jnp.minimum(row, batch - 1)
    own_rows = jnp.minimum(jnp.arange(padded, dtype=jnp.int32), batch - 1)
    factor = None
    if "squares" in ref_of:
        squares = jnp.sum(read_squares(ref_of["squares"], own_rows), axis=0)
        factor = factor_of(squares, num_segments * segment_inputs, norm_eps)

    def step(i, carry):
        squares, sums = carry
        tile_index, k = _divide(i, steps)
        start = jnp.minimum((program + tile_index * num_programs) * tile, num_results - tile)
        x = x_ref[row, k * segments + row_segment, :]  # [rows, inputs of a segment]
        if "norm" in ref_of:
            squares += jnp.square(x.astype(jnp.float32))
            x *= ref_of["norm"][k * segments + row_segment, :]
        sums += dot(weight_ref[start + output, k * segments + segment, :].astype(x.dtype), x, ((1,), (1,)))

        @pl.when(k == steps - 1)
        def _():
            finish(program + tile_index * num_programs, start, squares, sums)

        return jnp.where(k < steps - 1, squares, 0.0), jnp.where(k < steps - 1, sums, 0.0)

    def finish(index, start, squares, sums):
        if segments > 1:  # only the sums of two same segments belong to the product
            sums = jnp.where(segment[:, None] == row_segment[None, :], sums, 0.0)
            sums = jnp.sum(sums.reshape(halves * tile, segments, padded * segments), axis=1)
            sums = jnp.sum(sums.reshape(halves * tile, padded, segments), axis=2)
        matrix_rows = start + _matrix_row(jnp.arange(halves * tile, dtype=jnp.int32), tile, num_results)
        if "scales" in ref_of:
            sums *= ref_of["scales"][matrix_rows][:, None]
        if "norm" in ref_of:
            squares = jnp.sum(jnp.sum(squares, axis=1).reshape(padded, segments), axis=1)
            sums *= factor_of(squares, num_segments * segment_inputs, norm_eps)[None, :]
        if factor is not None:
            sums *= factor[None, :]
        if "bias" in ref_of:
            sums += ref_of["bias"][matrix_rows].astype(jnp.float32)[:, None]
        if gated:
            sums = sums.reshape(halves, tile, padded)
            is_gate = jnp.arange(halves, dtype=jnp.int32)[:, None, None] == 0
            gate, up = (jnp.sum(jnp.where(mine, sums, 0.0), axis=0) for mine in (is_gate, ~is_gate))
            sums = gate / (1.0 + jnp.exp(-gate)) * up
        out = sums.T  # [B, tile]
        if "residual" in ref_of:
            out += ref_of["residual"][own_rows, pl.ds(start, tile)].astype(jnp.float32)
        write_tile(ref_of, out, own_rows, index, tile, ref_of["next_norm"][pl.ds(start, tile)] if "next_norm" in ref_of else None)

    squares = jnp.zeros((padded * segments, segment_inputs) if "norm" in ref_of else (1, 1), jnp.float32)
    sums = jnp.zeros((halves * tile * segments, padded * segments), jnp.float32)
    own_tiles = pl.cdiv(num_tiles - program, num_programs)
    jax.lax.fori_loop(0, own_tiles * steps, step, (squares, sums))


def _matrix_row(output, tile: int, num_results: int):
    """Find the matrix rows of the first tile's outputs: those of the gate, then those of up."""
    half, output = _divide(output, tile)
    return half * num_results + output


def _divide(index, by: int):
    """Divide an index that is not negative: quotient and remainder."""
    return jax.lax.div(index, jnp.full_like(index, by)), jax.lax.rem(index, jnp.full_like(index, by))
