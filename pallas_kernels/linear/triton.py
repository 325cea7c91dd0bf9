"""Skinny GEMMs, few rows times a large matrix, as a Pallas kernel with the Triton lowering (Ampere and newer).

For row `b` and output `m`, with the normalised row `n[b] = x[b] rsqrt(mean(x[b]^2) + eps) * norm` (or `x[b]` without norm):

    product[b, m] = scales[m] sum_d n[b, d] weight[m, d] + bias[m]
    out[b, m]     = product[b, m] + residual[b, m]                                     plain
    out[b, f]     = silu(product[b, f]) product[b, F + f] + residual[b, f]             gated

Why it exists: a decode step reads every weight once to multiply it with a few rows, so its time is that of the bytes
(`expected_bytes()`), and everything else is to be hidden behind them. XLA gives the norm, the gate and often the residual
kernels of their own, each a launch and a walk through memory in every layer, and starts the matrix when they are done.

How: a program owns a tile of outputs and walks over the inputs in chunks, several of which are on their way at any time.
The weights stand on the long side of the matrix unit's product and the rows of `x` on its short one (8 rows are enough).
The factor rsqrt(...) of a row does not depend on d, so it is applied after the sum: the squares are summed up
along the same walk, and no program waits for a norm. The last tile is moved back to end with the matrix; what it shares with the
one before it is computed and stored twice, to the same bits.

Numerics: x * norm is rounded once to the dtype of `x` (Llama rounds the normalised row and then the product with the scale);
sums, norm, bias, gate and residual are float32, and the result is rounded once. float32 uses IEEE products. Int8 weights are
widened to the dtype of `x`, which is exact; their scales multiply the float32 sums.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import dot
from pallas_kernels.linear.heuristics import LinearConfig
from pallas_kernels.quantized import Quantized, Rows, values_of

MIN_ROWS = 8  # of the short side of the matrix unit's product


def triton_linear(
    x,
    weight: Rows,
    norm,
    bias,
    residual,
    *,
    norm_eps: float,
    gated: bool,
    out_dtype: jnp.dtype,
    config: LinearConfig,
    interpret: bool = False,
) -> jax.Array:
    """Run the kernel; arrays as in `fused_linear`, `x` `[B, D]`, already checked."""
    values = values_of(weight)
    num_results = values.shape[0] // 2 if gated else values.shape[0]
    tiles = pl.cdiv(num_results, config.tile_outputs)

    def split(array: jax.Array) -> jax.Array:
        return array.reshape(*array.shape[:-1], -1, config.segment_inputs)

    optional = optional_operands(x, weight, norm, bias, residual)
    if "norm" in optional:
        optional["norm"] = split(optional["norm"])
    return pl.pallas_call(
        functools.partial(_kernel, optional=tuple(optional), norm_eps=norm_eps, gated=gated, config=config),
        grid=(pl.cdiv(tiles, pl.cdiv(tiles, config.programs)),),  # the fewest that take no longer than `config.programs`
        out_shape=jax.ShapeDtypeStruct((x.shape[0], num_results), out_dtype),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="fused_linear",
    )(split(x), split(values), *optional.values())


def optional_operands(x, weight: Rows, norm, bias, residual) -> dict[str, jax.Array]:
    """Name the arrays of a call that another call may lack, in the order in which kernels take them."""
    operands = {
        "scales": weight.scales if isinstance(weight, Quantized) else None,
        "norm": None if norm is None else norm.astype(x.dtype),
        "bias": bias,
        "residual": residual,
    }
    return {name: array for name, array in operands.items() if array is not None}


def padded_rows(batch: int, segments: int) -> int:
    """Count the rows that a program computes: with their segments, at least the matrix unit's short side."""
    return max(pl.next_power_of_2(batch), MIN_ROWS // segments, 1)


def _kernel(
    x_ref,  # [B, D / C, C], C the inputs of a segment
    weight_ref,  # [M, D / C, C], M = 2 F if gated
    *refs,  # those of scales [M], norm [D / C, C], bias [M] and residual [B, M or F] that `optional` names, then out_ref [B, M or F]
    optional: tuple[str, ...],
    norm_eps: float,
    gated: bool,
    config: LinearConfig,
):
    *optional_refs, out_ref = refs
    ref_of = dict(zip(optional, optional_refs, strict=True))
    tile, segments = config.tile_outputs, config.segments
    batch, num_segments, segment_inputs = x_ref.shape
    num_results = out_ref.shape[1]
    program, num_programs, num_tiles = pl.program_id(0), pl.num_programs(0), pl.cdiv(num_results, tile)
    steps, halves = num_segments // segments, 2 if gated else 1  # of a tile: its reads; its gate and its up outputs

    # The rows of the two operands: (half, output, segment) and (row of x, segment). Beyond the batch the last row is read
    # again, computed and stored like itself, which saves masks.
    padded = padded_rows(batch, segments)
    output, segment = _divide(jnp.arange(halves * tile * segments, dtype=jnp.int32), segments)
    output = _matrix_row(output, tile, num_results)
    row, row_segment = _divide(jnp.arange(padded * segments, dtype=jnp.int32), segments)
    row = jnp.minimum(row, batch - 1)

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
            finish(start, squares, sums)

        return jnp.where(k < steps - 1, squares, 0.0), jnp.where(k < steps - 1, sums, 0.0)

    def finish(start, squares, sums):
        if segments > 1:  # only the sums of two same segments belong to the product
            sums = jnp.where(segment[:, None] == row_segment[None, :], sums, 0.0)
            sums = jnp.sum(sums.reshape(halves * tile, segments, padded * segments), axis=1)
            sums = jnp.sum(sums.reshape(halves * tile, padded, segments), axis=2)
        matrix_rows = start + _matrix_row(jnp.arange(halves * tile, dtype=jnp.int32), tile, num_results)
        if "scales" in ref_of:
            sums *= ref_of["scales"][matrix_rows][:, None]
        if "norm" in ref_of:
            mean_squares = jnp.sum(jnp.sum(squares, axis=1).reshape(padded, segments), axis=1) / (num_segments * segment_inputs)
            sums *= jax.lax.rsqrt(mean_squares + norm_eps)[None, :]
        if "bias" in ref_of:
            sums += ref_of["bias"][matrix_rows].astype(jnp.float32)[:, None]
        if gated:
            sums = sums.reshape(halves, tile, padded)
            is_gate = jnp.arange(halves, dtype=jnp.int32)[:, None, None] == 0
            gate, up = (jnp.sum(jnp.where(mine, sums, 0.0), axis=0) for mine in (is_gate, ~is_gate))
            sums = gate / (1.0 + jnp.exp(-gate)) * up
        own = (jnp.minimum(jnp.arange(padded, dtype=jnp.int32), batch - 1), pl.ds(start, tile))
        out = sums.T  # [B, tile]
        if "residual" in ref_of:
            out += ref_of["residual"][own].astype(jnp.float32)
        out_ref[own] = out.astype(out_ref.dtype)

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
