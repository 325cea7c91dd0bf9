"""GEMMs of a decode step in tiles, as a Pallas kernel with the Triton lowering (Ampere and newer): small matrices, or many rows.

    product[b, m] = scales[m] sum_d n[b, d] weight[m, d] + bias[m],  and what `triton.py` fuses before and after it

Why it exists: a decode step of a small model is as long as its launches and the latencies inside them. XLA takes up to four kernels
for a map with its norm, its gate and its residual. Here it is one, and no program walks over more than one tile.

How: a program owns a tile of rows and outputs. It reads all inputs of the tile at once, in pieces of a power of two each (a chain of
reads is one latency long), or walks over them in chunks where they are too many. One row is multiplied and summed up off the matrix unit.
Where the inputs are read at once, rows are normalised before the product; in chunks their factor is applied after the sum, as in
`triton.py`, but in float16, whose range x * scale may exceed: there they are read once more before, for their squares.
The last tile of outputs is moved back to end with the matrix, and rows beyond the batch are its last one: computed and stored
twice, to the same bits.

Numerics: as `triton.py`; where rows are normalised before the product they are rounded before the scale, as Llama does.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import dot
from pallas_kernels.linear.heuristics import TileConfig
from pallas_kernels.quantized import Quantized, Rows, values_of


def triton_tiled_linear(
    x,
    weight: Rows,
    norm,
    bias,
    residual,
    *,
    norm_eps: float,
    gated: bool,
    out_dtype: jnp.dtype,
    config: TileConfig,
    interpret: bool = False,
) -> jax.Array:
    """Run the kernel; arrays as in `fused_linear`, `x` `[B, D]`, already checked."""
    values = values_of(weight)
    num_results = values.shape[0] // 2 if gated else values.shape[0]
    optional = {
        "scales": weight.scales if isinstance(weight, Quantized) else None,
        "norm": None if norm is None else norm.astype(x.dtype),
        "bias": bias,
        "residual": residual,
    }
    optional = {name: array for name, array in optional.items() if array is not None}
    return pl.pallas_call(
        functools.partial(_kernel, optional=tuple(optional), norm_eps=norm_eps, gated=gated, config=config),
        grid=(pl.cdiv(num_results, config.tile_outputs), pl.cdiv(x.shape[0], config.tile_rows)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], num_results), out_dtype),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="fused_linear",
    )(x, values, *optional.values())


def pieces_of(num_inputs: int) -> list[pl.Slice]:
    """Cut the inputs into pieces of powers of two, the largest first."""
    sizes = [1 << bit for bit in reversed(range(num_inputs.bit_length())) if num_inputs >> bit & 1]
    return [pl.ds(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _kernel(
    x_ref,  # [B, D]
    weight_ref,  # [M, D], M = 2 F if gated
    *refs,  # those of scales [M], norm [D], bias [M] and residual [B, M or F] that `optional` names, then out_ref [B, M or F]
    optional: tuple[str, ...],
    norm_eps: float,
    gated: bool,
    config: TileConfig,
):
    *optional_refs, out_ref = refs
    ref_of = dict(zip(optional, optional_refs, strict=True))
    (batch, num_inputs), num_results = x_ref.shape, out_ref.shape[1]
    first = jnp.minimum(pl.program_id(0) * config.tile_outputs, num_results - config.tile_outputs)
    outputs = pl.ds(first, config.tile_outputs)
    matrix_rows = (outputs, pl.ds(num_results + first, config.tile_outputs)) if gated else (outputs,)
    rows = jnp.minimum(pl.program_id(1) * config.tile_rows + jnp.arange(config.tile_rows, dtype=jnp.int32), batch - 1)
    rounded = "norm" in ref_of and (config.tile_inputs >= num_inputs or x_ref.dtype == jnp.float16)  # before the product

    def read(inputs):
        return x_ref[rows, inputs], [weight_ref[own, inputs] for own in matrix_rows]

    def squares_of(x):
        return jnp.square(x.astype(jnp.float32))

    def factor_of(sum_of_squares):
        return jax.lax.rsqrt(sum_of_squares / num_inputs + norm_eps)[:, None]

    def scaled(x, inputs, factor=None):
        x = x if factor is None else (x.astype(jnp.float32) * factor).astype(x.dtype)
        return x * ref_of["norm"][inputs][None, :] if "norm" in ref_of else x

    def multiply(x, weight):
        if config.tile_rows == 1:
            return jnp.sum(weight.astype(jnp.float32) * x.astype(jnp.float32), axis=1)[None, :]
        weight = weight.astype(x.dtype)
        return dot(x, weight, ((1,), (1,))) if config.rows_first else dot(weight, x, ((1,), (1,)))

    factor = None
    if config.tile_inputs >= num_inputs:
        parts = [(inputs, *read(inputs)) for inputs in pieces_of(num_inputs)]
        if rounded:
            factor = factor_of(sum(jnp.sum(squares_of(x), axis=1) for _, x, _ in parts))
        products = [[multiply(scaled(x, inputs, factor), weight) for weight in weights] for inputs, x, weights in parts]
        sums = [functools.reduce(jnp.add, each) for each in zip(*products, strict=True)]
    else:
        steps = num_inputs // config.tile_inputs

        def chunk(k):
            return pl.ds(k * config.tile_inputs, config.tile_inputs)

        squares = jnp.zeros((config.tile_rows, config.tile_inputs), jnp.float32)
        if rounded:
            squares = jax.lax.fori_loop(0, steps, lambda k, squares: squares + squares_of(x_ref[rows, chunk(k)]), squares)
            factor = factor_of(jnp.sum(squares, axis=1))

        def step(k, carry):
            squares, sums = carry
            x, weights = read(chunk(k))
            if "norm" in ref_of and not rounded:
                squares += squares_of(x)
            x = scaled(x, chunk(k), factor)
            return squares, [total + multiply(x, weight) for total, weight in zip(sums, weights, strict=True)]

        shape = (config.tile_rows, config.tile_outputs)[:: 1 if config.rows_first or config.tile_rows == 1 else -1]
        squares, sums = jax.lax.fori_loop(0, steps, step, (squares, [jnp.zeros(shape, jnp.float32)] * len(matrix_rows)))

    if not config.rows_first and config.tile_rows > 1:
        sums = [total.T for total in sums]
    if "scales" in ref_of:
        sums = [total * ref_of["scales"][own][None, :] for total, own in zip(sums, matrix_rows, strict=True)]
    if "norm" in ref_of and not rounded:
        sums = [total * factor_of(jnp.sum(squares, axis=1)) for total in sums]
    if "bias" in ref_of:
        sums = [total + ref_of["bias"][own].astype(jnp.float32)[None, :] for total, own in zip(sums, matrix_rows, strict=True)]
    out = sums[0] / (1.0 + jnp.exp(-sums[0])) * sums[1] if gated else sums[0]
    if "residual" in ref_of:
        out += ref_of["residual"][rows, outputs].astype(jnp.float32)
    out_ref[rows, outputs] = out.astype(out_ref.dtype)
