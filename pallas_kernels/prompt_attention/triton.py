"""Attention of prompts as a Pallas kernel with the Triton lowering (Ampere and newer).

For query head `n`, with kv head `k = n // G`, and the query at position p of prompt b:

    out[b, p, n] = sum_s P[p, s] v[b, s, k],   P[p, s] = exp(scale q[b, p, n] . k[b, s, k]) / sum over s of the same

over the keys s <= p that the mask allows (see `PromptMask`). Keys and values are read where the cache keeps them.

Why it exists: other fused kernels take a mask as a bias of 2 bytes a pair, read again for every head, compute every pair, and want
keys in an array of their own: prefill in chunks made the bias for each chunk, let it attend to the whole room, and copied the
cache. Here a mask is a number for each token and a list of tiles; what is not listed is neither read nor computed.

How: a program owns a tile of queries of one head and goes through its key tiles with a running softmax, those first that the
mask cuts. Without lists the tiles are those up to the diagonal. The last tiles of queries, which have the most keys, begin first.

Numerics: scores, softmax and sums in float32; weights are rounded to the dtype of `q` before their product with the values.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.prompt_attention.heuristics import TritonConfig
from pallas_kernels.prompt_attention.mask import PromptMask
from pallas_kernels.tiles import Tiles, causal_counts, listed_tiles, no_keys, normalise, over_tiles, softmax_step, until_end


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def triton_prompt_attention(
    q, k_pool, v_pool, mask: PromptMask, *, scale: float, config: TritonConfig, interpret: bool = False
) -> jax.Array:
    """Run the forward kernel on queries [B, T, N, H] of prompts and pools [P, K, H]; returns [B, T, N, H].

    Key s of sequence b is pool row b * num_keys + s.
    """
    batch, num_queries, num_heads, _ = q.shape
    labels = [] if mask.query_labels is None else [mask.query_labels, mask.key_labels]
    tiles = [] if mask.key_tiles is None else [mask.key_tiles, mask.key_counts]
    return pl.pallas_call(
        functools.partial(
            _prompt_kernel,
            scale=scale,
            blocks=(config.block_q, config.block_k),
            num_keys=mask.num_keys,
            window_tokens=mask.window_tokens,
            labelled=bool(labels),
            listed=bool(tiles),
        ),
        grid=(num_queries // config.block_q, num_heads, batch),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="prompt_attention",
    )(q, k_pool, v_pool, mask.first_query.reshape(1), mask.lengths, *labels, *tiles)


def _prompt_kernel(
    q_ref,  # [B, T, N, H]
    k_ref,  # [P, K, H]
    v_ref,  # [P, K, H]
    first_query_ref,  # int32 [1]
    lengths_ref,  # int32 [B]
    *refs,  # int32 labels [B, T] and [B, S]; int32 lists [B, N or 1, query tiles, C] and counts [B, N or 1, query tiles, 2]; the output
    scale: float,
    blocks: tuple[int, int],
    num_keys: int,
    window_tokens: int,
    labelled: bool,
    listed: bool,
):
    block_q, block_k = blocks
    head, b = pl.program_id(1), pl.program_id(2)
    tile = pl.num_programs(0) - 1 - pl.program_id(0)  # the last tiles have the most keys: they begin first
    kv_head = head // (q_ref.shape[2] // k_ref.shape[1])
    out_ref = refs[-1]
    queries = pl.ds(tile * block_q, block_q)
    first = first_query_ref[0] + tile * block_q  # position of the tile's first query
    position = first + jnp.arange(block_q, dtype=jnp.int32)[:, None]
    query_labels = refs[0][b, queries][:, None] if labelled else None

    if listed:
        tiles_ref, counts_ref = refs[-3:-1]
        tiles = listed_tiles(tiles_ref, counts_ref, b, head if tiles_ref.shape[1] > 1 else 0, tile)
    else:
        partial, end = causal_counts(first, block_q, block_k)
        tiles = Tiles(lambda index: jnp.maximum(end - 1 - index, 0), partial, end)

    q = q_ref[b, queries, head, :]

    def attend(key_tile, carry, masked, _):
        rows = pl.ds(b * num_keys + key_tile * block_k, block_k)
        allowed = None
        if masked:
            keys = key_tile * block_k + jnp.arange(block_k, dtype=jnp.int32)[None, :]
            allowed = keys <= position
            if labelled:
                key_labels = refs[1][b, pl.ds(key_tile * block_k, block_k)][None, :]
                allowed &= (position - keys < window_tokens) | (key_labels == 0) | (key_labels == query_labels)
        return softmax_step(q, k_ref[rows, kv_head, :], v_ref[rows, kv_head, :], allowed, carry, scale)

    tiles = Tiles(tiles.at, *until_end(tiles.partial, tiles.needed, first, lengths_ref[b]))
    out, _ = normalise(over_tiles(attend, no_keys(q), tiles), scale)
    out_ref[b, queries, head, :] = out.astype(out_ref.dtype)
