"""Scores of tiles by mean keys: what block means choose by."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import LOG2_E, choose_implementation, dot
from pallas_kernels.prompt_attention.mass import BLOCK, MAX_SCORES, unsupported_reason

BLOCK_MEANS = 64  # that the kernel takes at once


@functools.partial(jax.jit, static_argnames=("implementation", "interpret"))
def tile_scores(q, means, first_query, lengths, *, implementation: str | None = None, interpret: bool = False) -> jax.Array:
    """Compute for each tile of 128 queries and each mean key the logarithm of the sum over the queries of exp(q . mean / sqrt(H)).

    The products of a tile are held in registers by "triton"; "xla" holds `MAX_SCORES` at once, writes and reads them several times.

    Args:
      q: `[B, T, N, H]`, queries at positions `first_query` (int32 scalar, may be traced) on; T is a multiple of 128.
      means: `[B, J, K, H]` of tiles of 128 keys, in the dtype of q; head n takes those of head `n // (N // K)`.
      lengths: int32 `[B]`; queries after the end of their prompt count nothing.
      implementation, interpret: as `pallas_kernels` says.

    Returns: float32 `[B, N, T/128, J]`, -inf for tiles without queries; arbitrary for means of tiles after the queries.
    """
    inside = first_query + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
    chosen = choose_implementation(implementation, ("triton", "xla"), lambda name: unsupported_reason(name, q, interpret))
    if chosen == "xla":
        return _xla_scores(q, means, inside)
    batch, num_queries, num_heads, _ = q.shape
    num_tiles, padding = means.shape[1], -means.shape[1] % BLOCK_MEANS
    means = jnp.pad(means, ((0, 0), (0, padding), (0, 0), (0, 0)))
    return pl.pallas_call(
        _kernel,
        grid=(num_queries // BLOCK, num_heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, num_heads, num_queries // BLOCK, means.shape[1]), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="tile_scores",
    )(q, means, inside.astype(jnp.int32), jnp.int32(first_query).reshape(1))[..., :num_tiles]


def _xla_scores(q, means, inside):
    batch, _, num_heads, head_size = q.shape
    num_tiles, num_kv_heads = means.shape[1:3]
    wide = jnp.float32 if jax.default_backend() == "cpu" else q.dtype  # a CPU has no product of float16 that adds up in float32

    def scores(of_tile):  # queries [B, 128, K, G, H] of a tile, and which are of prompts
        tile, real = of_tile
        products = jnp.einsum("btkgh,bjkh->bkgtj", tile.astype(wide), means.astype(wide), preferred_element_type=jnp.float32)
        products = jnp.where(real[:, None, None, :, None], products * head_size**-0.5, -jnp.inf)
        return jax.nn.logsumexp(products, axis=3).reshape(batch, num_heads, num_tiles)

    q = q.reshape(batch, -1, BLOCK, num_kv_heads, num_heads // num_kv_heads, head_size)
    tiles = jnp.moveaxis(q, 1, 0), jnp.moveaxis(inside.reshape(batch, -1, BLOCK), 1, 0)
    at_once = max(1, MAX_SCORES // (batch * num_heads * BLOCK * num_tiles))
    return jnp.moveaxis(jax.lax.map(scores, tiles, batch_size=min(at_once, q.shape[1])), 0, 2)


def _kernel(
    q_ref,  # [B, T, N, H]
    means_ref,  # [B, J', K, H]
    inside_ref,  # int32 [B, T]
    first_query_ref,  # int32 [1]
    scores_ref,  # float32 [B, N, T/128, J']
):
    tile, head, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    queries = pl.ds(tile * BLOCK, BLOCK)
    kv_head = head // (q_ref.shape[2] // means_ref.shape[2])
    q, inside = q_ref[b, queries, head, :], inside_ref[b, queries][None, :] != 0
    factor = LOG2_E * q_ref.shape[3] ** -0.5

    def step(index, _):
        own = pl.ds(index * BLOCK_MEANS, BLOCK_MEANS)
        scores = jnp.where(inside, dot(means_ref[b, own, kv_head, :], q, ((1,), (1,))) * factor, -jnp.inf)  # [means, queries]
        peak = jnp.max(scores, axis=1)
        base = jnp.where(peak > -jnp.inf, peak, 0.0)
        scores_ref[b, head, tile, own] = (base + jnp.log2(jnp.sum(jnp.exp2(scores - base[:, None]), axis=1))) * (1 / LOG2_E)

    last = jax.lax.div(first_query_ref[0] + tile * BLOCK + (BLOCK - 1), BLOCK)  # the tile of keys of the last query
    jax.lax.fori_loop(0, jnp.minimum(jax.lax.div(last, BLOCK_MEANS) + 1, means_ref.shape[1] // BLOCK_MEANS), step, None)
