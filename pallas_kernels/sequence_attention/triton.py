"""Attention under a mask as Pallas kernels with the Triton lowering (Ampere and newer), forward and backward.

For query head `n`, with kv head `k = n // G`:

    out[b, t, n] = sum_s P[t, s] v[b, s, k],   P[t, s] = exp(scale q[b, t, n] . k[b, s, k] - L[t]) where the mask allows it, else 0
    L[t]         = log sum_s exp(scale q . k)                       over the keys that the mask allows

and, from the gradient g of `out` (FlashAttention-2, 2307.08691, sections 3.1 and 3.2),

    D[t]  = sum_h g[t, h] out[t, h]
    dS    = P * (g v^T - D)          dq = scale dS k          dk = scale sum_n dS^T q          dv = sum_n P^T g

Why it exists: other fused kernels take a mask as a bias, 2 bytes a pair of one head (B T S of them, and as many again to
make it from booleans), read again for every head, and compute every pair. Here a pair is one bit, and tiles of pairs
that are all forbidden are neither read nor computed: the list of those left is part of the mask.

How: a program owns a tile of queries of one head and goes through the list of its key tiles with a running softmax in
float32; the gradient of the queries goes the same way. The gradient of keys and values owns a tile of keys of one kv
head and goes through its query tiles, all G query heads of each. Tiles in which every pair is allowed come last in the
lists and skip the mask.

Numerics: scores, softmax and sums in float32; weights and score gradients are rounded to the dtype of `q` before their
second product, as in attention written down in that dtype. float32 uses IEEE products. A query that may attend to
nothing gives zeros and takes no part in any gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import LOG2_E, dot
from pallas_kernels.sequence_attention.heuristics import TritonConfig
from pallas_kernels.sequence_attention.mask import WORD_BITS, TileMask
from pallas_kernels.sequence_attention.prompts import PromptMask


def forward(q, k, v, mask: TileMask, *, scale: float, interpret: bool = False) -> list[jax.Array]:
    """Run the forward kernel on q [B, T', N, H], k and v [B, S', K, H].

    Returns `out` [B, T', N, H] and `lse`, float32 [B, N, T'], L in units of log 2.
    """
    batch, num_queries, num_heads, _ = q.shape
    return _call(
        functools.partial(_forward_kernel, scale=scale),
        (num_queries // mask.block_q, num_heads, batch),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32)),
        "masked_attention",
        4,
        interpret,
    )(q, k, v, mask.bits, mask.key_tiles, mask.key_counts)


def backward(q, k, v, mask: TileMask, out, lse, grad, *, scale: float, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the backward kernels: gradients of q, k and v from that of `out`; shapes as in `forward`."""
    batch, num_queries, num_heads, head_size = q.shape
    _, num_keys, num_kv_heads, _ = k.shape
    dq, delta = _call(
        functools.partial(_queries_kernel, scale=scale),
        (num_queries // mask.block_q, num_heads, batch),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, lse.dtype)),
        "masked_attention_dq",
        4,
        interpret,
    )(q, k, v, mask.bits, mask.key_tiles, mask.key_counts, out, lse, grad)
    wide = head_size > 64 or k.dtype == jnp.float32  # two accumulators of 128 columns do not fit in the registers of 4 warps
    dk, dv = _call(
        functools.partial(_keys_kernel, scale=scale),
        (num_keys // mask.block_k, num_kv_heads, batch),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        "masked_attention_dkv",
        8 if wide else 4,
        interpret,
    )(q, k, v, mask.bits, mask.query_tiles, mask.query_counts, lse, delta, grad)
    return dq, dk, dv


def prompt_forward(q, k_pool, v_pool, mask: PromptMask, *, scale: float, config: TritonConfig, interpret: bool = False) -> jax.Array:
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
            blocks=(mask.block_q, mask.block_k),
            num_keys=mask.num_keys,
            window_tokens=mask.window_tokens,
            labelled=bool(labels),
            listed=bool(tiles),
        ),
        grid=(num_queries // mask.block_q, num_heads, batch),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="prompt_attention",
    )(q, k_pool, v_pool, mask.first_query.reshape(1), mask.lengths, *labels, *tiles)


def _call(kernel, grid, out_shape, name: str, num_warps: int, interpret: bool):
    num_stages = 1 if out_shape[0].dtype == jnp.float32 else 2  # of the software pipeline: tiles in flight plus one
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )


def _forward_kernel(
    q_ref,  # [B, T', N, H]
    k_ref,  # [B, S', K, H]
    v_ref,  # [B, S', K, H]
    bits_ref,  # int32 [B, S'/32, T']
    tiles_ref,  # int32 [B, query tiles, key tiles]
    counts_ref,  # int32 [B, query tiles, 2]
    out_ref,  # [B, T', N, H]
    lse_ref,  # float32 [B, N, T']
    *,
    scale: float,
):
    tile, head, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    kv_head = head // (q_ref.shape[2] // k_ref.shape[2])
    block_q, block_k = q_ref.shape[1] // tiles_ref.shape[1], k_ref.shape[1] // tiles_ref.shape[2]
    queries = pl.ds(tile * block_q, block_q)
    q = q_ref[b, queries, head, :]

    def attend(key_tile, carry, masked, _):
        keys = pl.ds(key_tile * block_k, block_k)
        allowed = _allowed(bits_ref, b, key_tile, queries, block_k, query_axis=0) if masked else None
        return _softmax_step(q, k_ref[b, keys, kv_head, :], v_ref[b, keys, kv_head, :], allowed, carry, scale)

    out, lse = _normalise(_over_tiles(attend, _no_keys(q), *_listed(tiles_ref, counts_ref, b, tile)), scale)
    out_ref[b, queries, head, :] = out.astype(out_ref.dtype)
    lse_ref[b, head, queries] = lse


def _queries_kernel(
    q_ref,  # [B, T', N, H]
    k_ref,  # [B, S', K, H]
    v_ref,  # [B, S', K, H]
    bits_ref,  # int32 [B, S'/32, T']
    tiles_ref,  # int32 [B, query tiles, key tiles]
    counts_ref,  # int32 [B, query tiles, 2]
    forward_ref,  # [B, T', N, H], what the forward kernel gave
    lse_ref,  # float32 [B, N, T']
    grad_ref,  # [B, T', N, H]
    dq_ref,  # [B, T', N, H]
    delta_ref,  # float32 [B, N, T'], D
    *,
    scale: float,
):
    tile, head, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    kv_head = head // (q_ref.shape[2] // k_ref.shape[2])
    block_q, block_k = q_ref.shape[1] // tiles_ref.shape[1], k_ref.shape[1] // tiles_ref.shape[2]
    queries = pl.ds(tile * block_q, block_q)
    q, grad = q_ref[b, queries, head, :], grad_ref[b, queries, head, :]
    delta = jnp.sum(grad.astype(jnp.float32) * forward_ref[b, queries, head, :].astype(jnp.float32), axis=1)
    delta_ref[b, head, queries] = delta
    lse = lse_ref[b, head, queries]

    def add(key_tile, dq, masked, _):
        keys = pl.ds(key_tile * block_k, block_k)
        k = k_ref[b, keys, kv_head, :]
        weights = jnp.exp2(dot(q, k, ((1,), (1,))) * (scale * LOG2_E) - lse[:, None])  # [block_q, block_k]
        if masked:
            weights = jnp.where(_allowed(bits_ref, b, key_tile, queries, block_k, query_axis=0), weights, 0.0)
        dscores = weights * (dot(grad, v_ref[b, keys, kv_head, :], ((1,), (1,))) - delta[:, None])
        return dq + dot(dscores.astype(q.dtype), k, ((1,), (0,)))

    dq = _over_tiles(add, jnp.zeros(q.shape, jnp.float32), *_listed(tiles_ref, counts_ref, b, tile))
    dq_ref[b, queries, head, :] = (dq * scale).astype(dq_ref.dtype)


def _keys_kernel(
    q_ref,  # [B, T', N, H]
    k_ref,  # [B, S', K, H]
    v_ref,  # [B, S', K, H]
    bits_ref,  # int32 [B, S'/32, T']
    tiles_ref,  # int32 [B, key tiles, query tiles]
    counts_ref,  # int32 [B, key tiles, 2]
    lse_ref,  # float32 [B, N, T']
    delta_ref,  # float32 [B, N, T']
    grad_ref,  # [B, T', N, H]
    dk_ref,  # [B, S', K, H]
    dv_ref,  # [B, S', K, H]
    *,
    scale: float,
):
    tile, kv_head, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    group = q_ref.shape[2] // k_ref.shape[2]
    block_q, block_k = q_ref.shape[1] // tiles_ref.shape[2], k_ref.shape[1] // tiles_ref.shape[1]
    keys = pl.ds(tile * block_k, block_k)
    k, v = k_ref[b, keys, kv_head, :], v_ref[b, keys, kv_head, :]

    def add(query_tile, carry, masked, member):
        dk, dv = carry
        head = kv_head * group + member
        queries = pl.ds(query_tile * block_q, block_q)
        q, grad = q_ref[b, queries, head, :], grad_ref[b, queries, head, :]
        lse, delta = lse_ref[b, head, queries], delta_ref[b, head, queries]
        weights = jnp.exp2(dot(k, q, ((1,), (1,))) * (scale * LOG2_E) - lse[None, :])  # [block_k, block_q]
        if masked:
            weights = jnp.where(_allowed(bits_ref, b, tile, queries, block_k, query_axis=1), weights, 0.0)
        dv += dot(weights.astype(grad.dtype), grad, ((1,), (0,)))
        dscores = weights * (dot(v, grad, ((1,), (1,))) - delta[None, :])
        return dk + dot(dscores.astype(q.dtype), q, ((1,), (0,))), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _over_tiles(add, (zeros, zeros), *_listed(tiles_ref, counts_ref, b, tile), group)
    dk_ref[b, keys, kv_head, :] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[b, keys, kv_head, :] = dv.astype(dv_ref.dtype)


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
        tile_at, partial, needed = _listed(tiles_ref, counts_ref, b, head if tiles_ref.shape[1] > 1 else 0, tile)
    else:
        end, full = jax.lax.div(first + block_q - 1, block_k) + 1, jax.lax.div(first + 1, block_k)
        tile_at, partial, needed = lambda index: jnp.maximum(end - 1 - index, 0), end - full, end

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
        return _softmax_step(q, k_ref[rows, kv_head, :], v_ref[rows, kv_head, :], allowed, carry, scale)

    needed = jnp.where(first < lengths_ref[b], needed, 0)  # nobody reads what comes after the end of a prompt
    out, _ = _normalise(_over_tiles(attend, _no_keys(q), tile_at, jnp.minimum(partial, needed), needed), scale)
    out_ref[b, queries, head, :] = out.astype(out_ref.dtype)


def _no_keys(q):
    """Return the running softmax of queries [block_q, H] before their first key: maxima, sums, weighted values."""
    zeros = jnp.zeros(q.shape[:1], jnp.float32)
    return zeros - jnp.inf, zeros, jnp.zeros(q.shape, jnp.float32)


def _softmax_step(q, k, v, allowed, carry, scale: float):
    """Add a tile of keys to the running softmax of a tile of queries; `allowed` is None or bool [block_q, block_k]."""
    running_max, running_sum, acc = carry
    factor = scale * LOG2_E
    scores = dot(q, k, ((1,), (1,)))  # [block_q, block_k]
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    new_max = jnp.maximum(running_max, jnp.max(scores, axis=1))
    shift = jnp.where(new_max > -jnp.inf, new_max * factor, 0.0)
    weights = jnp.exp2(scores * factor - shift[:, None])
    decay = jnp.exp2(running_max * factor - shift)
    running_sum = running_sum * decay + jnp.sum(weights, axis=1)
    return new_max, running_sum, acc * decay[:, None] + dot(weights.astype(q.dtype), v, ((1,), (0,)))


def _normalise(carry, scale: float):
    """Finish a running softmax: float32 [block_q, H], zeros for queries without keys, and L in units of log 2."""
    running_max, running_sum, acc = carry
    seen = running_sum > 0
    total = jnp.where(seen, running_sum, 1.0)
    return acc / total[:, None], jnp.where(seen, running_max * (scale * LOG2_E), 0.0) + jnp.log2(total)


def _listed(tiles_ref, counts_ref, *at):
    """Return what `_over_tiles` takes of the list of a tile at `at`."""
    last = tiles_ref.shape[-1] - 1
    return lambda index: tiles_ref[*at, jnp.minimum(index, last)], counts_ref[*at, 0], counts_ref[*at, 1]


def _over_tiles(body, init, tile_at, partial, needed, group=1):
    """Fold `body(other tile, carry, masked, member)` over the tiles `tile_at(0)` on and, within each, the members of a group.

    The first `partial` of the `needed` tiles are masked.
    """

    def at(index):
        return tile_at(jax.lax.div(index, jnp.int32(group)))

    def step(index, carry, masked):
        # The number of a tile is loaded one step ahead, so that the loads of its rows do not wait for it.
        other, state = carry
        return at(index + 1), body(other, state, masked, jax.lax.rem(index, jnp.int32(group)))

    carry = jax.lax.fori_loop(0, partial * group, functools.partial(step, masked=True), (at(jnp.int32(0)), init))
    _, state = jax.lax.fori_loop(partial * group, needed * group, functools.partial(step, masked=False), carry)
    return state


def _allowed(bits_ref, b, key_tile, queries, block_k: int, query_axis: int):
    """Unpack bool [block_q, block_k] of the mask, transposed where the queries are on axis 1."""
    shape = (queries.size, block_k) if query_axis == 0 else (block_k, queries.size)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    num_words = block_k // WORD_BITS
    words = [jnp.expand_dims(bits_ref[b, key_tile * num_words + w, queries], 1 - query_axis) for w in range(num_words)]
    own = jnp.broadcast_to(words[0], shape)
    for w in range(1, num_words):
        own = jnp.where((key >> 5) == w, jnp.broadcast_to(words[w], shape), own)
    return (own >> (key & 31)) & 1 == 1
