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
from pallas_kernels.sequence_attention.mask import WORD_BITS, TileMask
from pallas_kernels.tiles import listed_tiles, no_keys, normalise, over_tiles, softmax_step


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
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


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
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
        num_stages=2 if wide else 3,
    )(q, k, v, mask.bits, mask.query_tiles, mask.query_counts, lse, delta, grad)
    return dq, dk, dv


def _call(kernel, grid, out_shape, name: str, num_warps: int, interpret: bool, num_stages: int = 2):
    num_stages = 1 if out_shape[0].dtype == jnp.float32 else num_stages  # of the software pipeline: tiles in flight plus one
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
        return softmax_step(q, k_ref[b, keys, kv_head, :], v_ref[b, keys, kv_head, :], allowed, carry, scale)

    out, lse = normalise(over_tiles(attend, no_keys(q), listed_tiles(tiles_ref, counts_ref, b, tile)), scale)
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

    dq = over_tiles(add, jnp.zeros(q.shape, jnp.float32), listed_tiles(tiles_ref, counts_ref, b, tile))
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

    def sums(query_tile, member):
        at = b, kv_head * group + member, pl.ds(query_tile * block_q, block_q)
        return lse_ref[at], delta_ref[at]

    def add(query_tile, carry, masked, member, lse, delta):
        dk, dv = carry
        head = kv_head * group + member
        queries = pl.ds(query_tile * block_q, block_q)
        q, grad = q_ref[b, queries, head, :], grad_ref[b, queries, head, :]
        weights = jnp.exp2(dot(k, q, ((1,), (1,))) * (scale * LOG2_E) - lse[None, :])  # [block_k, block_q]
        if masked:
            weights = jnp.where(_allowed(bits_ref, b, tile, queries, block_k, query_axis=1), weights, 0.0)
        dv += dot(weights.astype(grad.dtype), grad, ((1,), (0,)))
        dscores = weights * (dot(v, grad, ((1,), (1,))) - delta[None, :])
        return dk + dot(dscores.astype(q.dtype), q, ((1,), (0,))), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = over_tiles(add, (zeros, zeros), listed_tiles(tiles_ref, counts_ref, b, tile), group=group, ahead=sums)
    dk_ref[b, keys, kv_head, :] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[b, keys, kv_head, :] = dv.astype(dv_ref.dtype)


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
