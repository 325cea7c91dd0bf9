"""The gradient of RMSNorm on a residual stream as a Pallas kernel with the Triton lowering (Ampere and newer).

With r = rsqrt(mean(x^2) + eps), n = x r, the gradient g of n * scale and the gradient p of x as it goes on:

    dx = p + r (g scale - n mean(g scale n))          dscale = sum over rows of g n

Why it exists: XLA sums over a row in one pass over x and g, and computes the gradient in another that reads both again. Here each
number is read once.

How: a program goes through every so-many-th tile of whole rows, in columns of powers of two (576 is 512 and 64), and sums up its part
of the scale's gradient, which is added up outside.

Numerics: float32, rounded once at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import MULTIPROCESSORS

TILE_SIZE = 4096  # numbers of an array that a program holds: 4 rows of 768, by 2 warps, were the fastest of 1 to 8 by 2 to 8
PROGRAMS = 8 * MULTIPROCESSORS
MAX_PIECES = 4
MAX_COLUMNS = 4 * TILE_SIZE


def unsupported_reason(num_rows: int, num_columns: int) -> str | None:
    """Say why the kernel cannot compute this; None when it can."""
    if num_columns > MAX_COLUMNS or num_columns % 16 or len(pieces(num_columns)) > MAX_PIECES:
        return f"columns must be a multiple of 16 up to {MAX_COLUMNS}, a sum of at most {MAX_PIECES} powers of two, got {num_columns}"
    rows = tile_rows(num_columns)
    return f"the number of rows must be a multiple of {rows}, got {num_rows}" if num_rows % rows or not num_rows else None


def tile_rows(num_columns: int) -> int:
    """Choose how many rows a program holds at once."""
    return max(1, TILE_SIZE // pl.next_power_of_2(num_columns))


def pieces(num_columns: int) -> list[tuple[int, int]]:
    """Divide columns into parts of powers of two, the largest first: the first column and the size of each."""
    sizes = [1 << bit for bit in range(num_columns.bit_length() - 1, -1, -1) if num_columns >> bit & 1]
    return [(sum(sizes[:index]), size) for index, size in enumerate(sizes)]


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def triton_gradient(x, scale, grad, passed, eps: float, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Run the kernel on rows x [R, D], scale [D], and the gradients [R, D] of the normalised rows and of those that go on.

    Returns dx [R, D] in the dtype of x, and dscale, float32 [D].
    """
    num_rows, num_columns = x.shape
    rows = tile_rows(num_columns)
    programs = min(PROGRAMS, num_rows // rows)
    dx, parts = pl.pallas_call(
        functools.partial(_kernel, eps=eps, tile_rows=rows, pieces=pieces(num_columns)),
        grid=(programs,),
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((programs, num_columns), jnp.float32)),
        compiler_params=plt.CompilerParams(num_warps=max(2, pl.next_power_of_2(num_columns) // 1024), num_stages=1),
        interpret=interpret,
        name="rms_norm_gradient",
    )(x, scale, grad, passed)
    return dx, jnp.sum(parts, axis=0)


def _kernel(
    x_ref,  # [R, D]
    scale_ref,  # [D]
    grad_ref,  # [R, D]
    passed_ref,  # [R, D]
    dx_ref,  # [R, D]
    parts_ref,  # float32 [programs, D]
    *,
    eps: float,
    tile_rows: int,
    pieces: list[tuple[int, int]],
):
    program, programs = pl.program_id(0), parts_ref.shape[0]
    columns = [pl.ds(*piece) for piece in pieces]
    num_tiles, width = x_ref.shape[0] // tile_rows, x_ref.shape[1]
    scales = [scale_ref[own].astype(jnp.float32)[None, :] for own in columns]

    def add_tile(index, parts):
        rows = pl.ds((program + index * programs) * tile_rows, tile_rows)
        x = [x_ref[rows, own].astype(jnp.float32) for own in columns]
        grad = [grad_ref[rows, own].astype(jnp.float32) for own in columns]
        passed = [passed_ref[rows, own].astype(jnp.float32) for own in columns]
        inverse = jax.lax.rsqrt(sum(jnp.sum(part * part, axis=1) for part in x) / width + eps)[:, None]
        normal = [part * inverse for part in x]
        scaled = [part * scale for part, scale in zip(grad, scales)]
        along = (sum(jnp.sum(part * n, axis=1) for part, n in zip(scaled, normal)) / width)[:, None]
        for own, part, n, on in zip(columns, scaled, normal, passed):
            dx_ref[rows, own] = (on + inverse * (part - n * along)).astype(dx_ref.dtype)
        return tuple(part + jnp.sum(g * n, axis=0) for part, g, n in zip(parts, grad, normal))

    own_tiles = jax.lax.div(num_tiles - program + (programs - 1), programs)
    parts = jax.lax.fori_loop(0, own_tiles, add_tile, tuple(jnp.zeros((size,), jnp.float32) for _, size in pieces))
    for own, part in zip(columns, parts):
        parts_ref[program, own] = part
