"""GEMMs of a decode step in tiles, as a Pallas kernel with the Triton lowering (Ampere and newer): small matrices, or many rows.

    product[b, m] = scales[m] sum_d n[b, d] weight[m, d] + bias[m],  and what `triton.py` fuses before and after it

Why it exists: a decode step of a small model is as long as its launches and the latencies inside them. XLA takes up to four kernels
for a map with its norm, its gate and its residual. Here it is one, and no program walks over more than one tile.

How: a program owns a tile of rows and outputs. It reads all inputs of the tile at once, in pieces of a power of two each (a chain of
reads is one latency long), or walks over them in chunks where they are too many. One row is multiplied and summed up off the matrix unit.
Where the inputs are read at once, rows are normalised before the product; in chunks their factor is applied after the sum, as in
`triton.py`. In float16, whose range x * scale may exceed, they are read once more before, for their squares.
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
from pallas_kernels.linear.triton import optional_operands
from pallas_kernels.quantized import Rows, values_of


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
    optional = optional_operands(x, weight, norm, bias, residual)
    return pl.pallas_call(
        functools.partial(_kernel, optional=tuple(optional), norm_eps=norm_eps, gated=gated, config=config),
        grid=(pl.cdiv(num_results, config.tile_outputs), pl.cdiv(x.shape[0], config.tile_rows)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], num_results), out_dtype),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="fused_linear",
    )(x, values, *optional.values())


def pieces_of(num_inputs: int) -> list:
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
    whole = config.tile_inputs >= num_inputs
    outputs_first = config.tile_rows > 1 and not config.rows_first
    before = "norm" in ref_of and (whole or x_ref.dtype == jnp.float16)

    # What stands after the product is read first, where it is little: at the end each read would be waited for.
    early = config.tile_rows * config.tile_outputs <= 16 * 32 * config.num_warps

    def read_rest():
        rest = {name: [ref_of[name][own] for own in matrix_rows] for name in ("scales", "bias") if name in ref_of}
        return rest | ({"residual": ref_of["residual"][rows, outputs]} if "residual" in ref_of else {})

    rest = read_rest() if early else {}

    def read(inputs):
        return x_ref[rows, inputs], [weight_ref[own, inputs] for own in matrix_rows]

    def norm_of(inputs):
        return ref_of["norm"][inputs][None, :] if "norm" in ref_of else None

    def squares_of(x):
        return jnp.square(x.astype(jnp.float32))

    def factor_of(sum_of_squares):
        return jax.lax.rsqrt(sum_of_squares / num_inputs + norm_eps)[:, None]

    def multiply(x, weights, norm, factor):
        if factor is not None:
            x = (x.astype(jnp.float32) * factor).astype(x.dtype)
        weights = [weight.astype(x.dtype) for weight in weights]
        x = x if norm is None else x * norm
        if config.tile_rows == 1:
            return [jnp.sum(weight.astype(jnp.float32) * x.astype(jnp.float32), axis=1)[None, :] for weight in weights]
        return [dot(weight, x, ((1,), (1,))) if outputs_first else dot(x, weight, ((1,), (1,))) for weight in weights]

    factor = None
    if whole:
        parts = [(*read(inputs), norm_of(inputs)) for inputs in pieces_of(num_inputs)]
        if before:
            factor = factor_of(sum(jnp.sum(squares_of(x), axis=1) for x, _, _ in parts))
        products = [multiply(x, weights, norm, factor) for x, weights, norm in parts]
        sums = [functools.reduce(jnp.add, each) for each in zip(*products, strict=True)]
    else:
        steps = num_inputs // config.tile_inputs

        def chunk(k):
            return pl.ds(k * config.tile_inputs, config.tile_inputs)

        squares = jnp.zeros((config.tile_rows, config.tile_inputs) if "norm" in ref_of else (1, 1), jnp.float32)
        if before:
            squares = jax.lax.fori_loop(0, steps, lambda k, squares: squares + squares_of(x_ref[rows, chunk(k)]), squares)
            factor = factor_of(jnp.sum(squares, axis=1))

        def step(k, carry):
            squares, sums, norm = carry
            next_norm = norm_of(chunk(jnp.minimum(k + 1, steps - 1)))  # a chunk ahead: it is too little to be copied asynchronously
            x, weights = read(chunk(k))
            if norm is not None and not before:
                squares += squares_of(x)
            products = multiply(x, weights, norm, factor)
            return squares, [total + product for total, product in zip(sums, products, strict=True)], next_norm

        shape = (config.tile_outputs, config.tile_rows) if outputs_first else (config.tile_rows, config.tile_outputs)
        carry = squares, [jnp.zeros(shape, jnp.float32)] * len(matrix_rows), norm_of(chunk(0))
        squares, sums, _ = jax.lax.fori_loop(0, steps, step, carry)

    rest = rest or read_rest()
    if outputs_first:
        sums = [total.T for total in sums]
    if "scales" in rest:
        sums = [total * scales[None, :] for total, scales in zip(sums, rest["scales"], strict=True)]
    if "norm" in ref_of and not before:
        sums = [total * factor_of(jnp.sum(squares, axis=1)) for total in sums]
    if "bias" in rest:
        sums = [total + bias.astype(jnp.float32)[None, :] for total, bias in zip(sums, rest["bias"], strict=True)]
    out = sums[0] / (1.0 + jnp.exp(-sums[0])) * sums[1] if gated else sums[0]
    if "residual" in rest:
        out += rest["residual"].astype(jnp.float32)
    out_ref[rows, outputs] = out.astype(out_ref.dtype)
