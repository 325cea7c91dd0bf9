"""GEMMs of a decode step in tiles, as a Pallas kernel with the Triton lowering (Ampere and newer): small matrices, or many rows.

    product[b, m] = scales[m] sum_d n[b, d] weight[m, d] + bias[m],  and what `triton.py` fuses before and after it

Why it exists: a decode step of a small model is as long as its launches and the latencies inside them. XLA takes up to four kernels
for a map with its norm, its gate and its residual. Here it is one, and no program walks over more than one tile.

How: a program owns a tile of rows and outputs. It reads all inputs of the tile at once, in pieces of a power of two each (a chain of
reads is one latency long), or walks over them in chunks where they are too many, the rest in pieces. One or two rows are multiplied one by
one, off the matrix unit; their parts, where attention left them (`SplitRows`), are combined by every program.
A norm's factor is applied after the sum, as in `triton.py`, or comes with `ScaledRows`; what adds up squares stands where no read waits
for it. In float16, whose range x * scale may exceed, rows are normalised first, for which chunks are read once more before.
The last tile of outputs is moved back to end with the matrix, and rows beyond the batch are its last one: computed and stored
twice, to the same bits.

Numerics: as `triton.py`; float16 rows are rounded before the norm's scale, as Llama does.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import dot, launch_next
from pallas_kernels.linear.heuristics import TileConfig
from pallas_kernels.linear.reference import ScaledRows, combine
from pallas_kernels.linear.triton import factor_of, operands, read_squares, result_shapes, write_tile
from pallas_kernels.quantized import Rows, values_of


def triton_tiled_linear(
    x,
    weight: Rows,
    norm,
    bias,
    residual,
    next_norm=None,
    *,
    norm_eps: float,
    gated: bool,
    out_dtype: jnp.dtype,
    config: TileConfig,
    early: bool = False,
    interpret: bool = False,
) -> jax.Array | ScaledRows:
    """Run the kernel; arrays as in `fused_linear`, `x` `[B, D]`, `ScaledRows` of it, or `SplitRows` of one row, already checked."""
    values = values_of(weight)
    num_results = values.shape[0] // 2 if gated else values.shape[0]
    x, optional = operands(x, weight, norm, bias, residual, next_norm)
    tiles = pl.cdiv(num_results, config.tile_outputs)
    batch = x.shape[-2]
    results = result_shapes(batch, num_results, out_dtype, tiles if next_norm is not None else 0)
    outs = pl.pallas_call(
        functools.partial(_kernel, names=(*optional, *results), norm_eps=norm_eps, gated=gated, config=config, early=early),
        grid=(tiles, pl.cdiv(batch, config.tile_rows)),
        out_shape=tuple(results.values()),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="fused_linear",
    )(x, values, *optional.values())
    return outs[0] if next_norm is None else ScaledRows(*outs)


def pieces_of(first: int, num_inputs: int) -> list:
    """Cut the inputs from `first` on into pieces of powers of two, the largest first."""
    rest = num_inputs - first
    sizes = [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
    return [pl.ds(first + sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def read_parts(parts_ref, lse_ref, rows, inputs):
    """Read some inputs of the parts of rows: S times [rows, inputs], and of each input the log-sum-exp."""
    num_parts, _, num_heads = lse_ref.shape
    head_size = parts_ref.shape[2] // num_heads
    head = inputs.start + jnp.arange(inputs.size, dtype=jnp.int32)
    head = jax.lax.div(head, jnp.full_like(head, head_size))
    row, head = (jnp.broadcast_to(index, (rows.size, inputs.size)) for index in (rows[:, None], head[None, :]))
    return [parts_ref[i, rows, inputs] for i in range(num_parts)], [lse_ref[i, row, head] for i in range(num_parts)]


def _kernel(
    x_ref,  # [B, D], or of `SplitRows` [S, 1, D] with lse [S, 1, N]
    weight_ref,  # [M, D], M = 2 F if gated
    *refs,  # as in `triton.py`, norm [D]
    names: tuple[str, ...],
    norm_eps: float,
    gated: bool,
    config: TileConfig,
    early: bool,
):
    ref_of = dict(zip(names, refs, strict=True))
    (batch, num_inputs), num_results = x_ref.shape[-2:], ref_of["out"].shape[1]
    column = launch_next(pl.program_id(0)) if early else pl.program_id(0)
    first = jnp.minimum(column * config.tile_outputs, num_results - config.tile_outputs)
    outputs = pl.ds(first, config.tile_outputs)
    matrix_rows = (outputs, pl.ds(num_results + first, config.tile_outputs)) if gated else (outputs,)
    steps = num_inputs // config.tile_inputs if config.tile_inputs < num_inputs else 0
    outputs_first = not config.rows_first
    before = "norm" in ref_of and x_ref.dtype == jnp.float16
    # Rows that are multiplied together, all of the tile or each by itself.
    size = config.tile_rows if config.on_matrix_unit else 1
    firsts = [pl.program_id(1) * config.tile_rows + row for row in range(0, config.tile_rows, size)]
    groups = [jnp.minimum(first_row + jnp.arange(size, dtype=jnp.int32), batch - 1) for first_row in firsts]

    # What stands after the product is read first, the residual where it is little: at the end each read would be waited for.
    early = config.tile_rows * config.tile_outputs <= 16 * 32 * config.num_warps

    after: dict[str, Any] = {name: [ref_of[name][own] for own in matrix_rows] for name in ("scales", "bias") if name in ref_of}
    if "squares" in ref_of:  # added up at the end: that takes a barrier
        after |= {"squares": [read_squares(ref_of["squares"], rows) for rows in groups]}
    after |= {"next_norm": ref_of["next_norm"][outputs]} if "next_norm" in ref_of else {}

    def read_residual():
        return [ref_of["residual"][rows, outputs] if "residual" in ref_of else None for rows in groups]

    residuals = read_residual() if early else None

    def read_weights(inputs):
        return [weight_ref[own, inputs] for own in matrix_rows]

    def read_rows(inputs):
        if "lse" in ref_of:
            return [combine(*read_parts(x_ref, ref_of["lse"], rows, inputs)) for rows in groups]
        return [x_ref[rows, inputs] for rows in groups]

    def norm_of(inputs):
        return ref_of["norm"][inputs][None, :] if "norm" in ref_of else None

    def squares_of(x):
        return jnp.square(x.astype(jnp.float32))

    def multiply(x, weights, norm, factor):
        if factor is not None:
            x = (x.astype(jnp.float32) * factor).astype(x.dtype)
        weights = [weight.astype(x.dtype) for weight in weights]
        x = x if norm is None else x * norm
        if not config.on_matrix_unit:
            return [jnp.sum(weight.astype(jnp.float32) * x.astype(jnp.float32), axis=1)[None, :] for weight in weights]
        return [dot(weight, x, ((1,), (1,))) if outputs_first else dot(x, weight, ((1,), (1,))) for weight in weights]

    # The inputs that no chunk holds, all of them where they are read at once, are on their way while the others are multiplied.
    pieces = pieces_of(steps * config.tile_inputs, num_inputs)
    rest = [(read_weights(inputs), norm_of(inputs)) for inputs in pieces]
    rest_rows = list(zip(*[read_rows(inputs) for inputs in pieces], strict=True)) or [()] * len(groups)  # of each group
    squares_of_rest = [sum(jnp.sum(squares_of(x), axis=1) for x in xs) for xs in rest_rows] if "norm" in ref_of else []

    def chunk(k):
        return pl.ds(k * config.tile_inputs, config.tile_inputs)

    def all_squares(squares, of_rest):
        return functools.reduce(jnp.add, [jnp.sum(squares, axis=1)] * (steps > 0) + [of_rest] * (len(pieces) > 0))

    no_squares = jnp.zeros((size, config.tile_inputs) if "norm" in ref_of and steps else (1, 1), jnp.float32)
    factors = [None] * len(groups)
    if before:
        for index, rows in enumerate(groups):
            squared = no_squares
            if steps:
                squared = jax.lax.fori_loop(0, steps, lambda k, squares: squares + squares_of(x_ref[rows, chunk(k)]), squared)  # noqa: B023
            factors[index] = factor_of(all_squares(squared, squares_of_rest[index]), num_inputs, norm_eps)[:, None]

    def step(k, carry):
        squares, sums, norm = carry
        next_norm = norm_of(chunk(jnp.minimum(k + 1, steps - 1)))  # a chunk ahead: it is too little to be copied asynchronously
        xs, weights = read_rows(chunk(k)), read_weights(chunk(k))
        if norm is not None and not before:
            squares = [each + squares_of(x) for each, x in zip(squares, xs, strict=True)]
        products = [multiply(x, weights, norm, factor) for x, factor in zip(xs, factors, strict=True)]
        return squares, jax.tree.map(jnp.add, sums, products), next_norm

    sums: list = [None] * len(groups)
    squares = [no_squares] * len(groups)
    if steps:
        shape = (config.tile_outputs, size) if outputs_first else (size, config.tile_outputs)
        zeros = [jnp.zeros(shape, jnp.float32)] * len(matrix_rows)
        squares, sums, _ = jax.lax.fori_loop(0, steps, step, (squares, [zeros] * len(groups), norm_of(chunk(0))))

    residuals = residuals or read_residual()
    for index, (rows, xs, factor, residual) in enumerate(zip(groups, rest_rows, factors, residuals, strict=True)):
        products = [multiply(x, weights, norm, factor) for x, (weights, norm) in zip(xs, rest, strict=True)]
        totals = [functools.reduce(jnp.add, each) for each in zip(*([sums[index]] if steps else []), *products, strict=True)]
        if outputs_first:
            totals = [total.T for total in totals]
        if "scales" in after:
            totals = [total * scales[None, :] for total, scales in zip(totals, after["scales"], strict=True)]
        if "norm" in ref_of and not before:
            factor = factor_of(all_squares(squares[index], squares_of_rest[index]), num_inputs, norm_eps)[:, None]
            totals = [total * factor for total in totals]
        if "squares" in after:
            factor = factor_of(jnp.sum(after["squares"][index], axis=0), num_inputs, norm_eps)[:, None]
            totals = [total * factor for total in totals]
        if "bias" in after:
            totals = [total + bias.astype(jnp.float32)[None, :] for total, bias in zip(totals, after["bias"], strict=True)]
        out = totals[0] / (1.0 + jnp.exp(-totals[0])) * totals[1] if gated else totals[0]
        if residual is not None:
            out += residual.astype(jnp.float32)
        write_tile(ref_of, out, rows, column, config.tile_outputs, after.get("next_norm"))
