"""Decode attention over named rows in plain JAX: the float32 reference and the XLA version.

For query head `n` of sequence `b`, with kv head `k = n // G` and named rows `r_i = slots[b, i]`:

    out[b, n] = sum_i softmax_i(scale * q[b, n] . K[r_i, k]) V[r_i, k],   i < counts[b]
    lse[b, n] = log2 sum_i e^(scale * q[b, n] . K[r_i, k])
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import LOG2_E
from pallas_kernels.quantized import Quantized, Rows, values_of


def reference_attention(q, k_pool: Rows, v_pool: Rows, slots, counts, *, scale: float) -> tuple[jax.Array, jax.Array]:
    """Compute both in float32, one sequence after the other: slow, small, independent of the kernels."""
    num_kv_heads = k_pool.shape[1]

    def gather(pool: Rows, rows: jax.Array, named: jax.Array) -> jax.Array:  # -> [A, K, H]
        gathered = values_of(pool)[rows].astype(jnp.float32)
        if isinstance(pool, Quantized):
            gathered *= pool.scales[rows][..., None]
        return jnp.where(named[:, None, None], gathered, 0.0)

    def one_sequence(args):
        query, rows, count = args  # [N, H], [A], []
        named = jnp.arange(rows.shape[0]) < count
        rows = jnp.where(named, rows, 0)
        keys, values = gather(k_pool, rows, named), gather(v_pool, rows, named)
        grouped = query.astype(jnp.float32).reshape(num_kv_heads, -1, query.shape[-1])
        with jax.default_matmul_precision("highest"):
            scores = jnp.einsum("kgh,akh->kga", grouped, keys) * scale
            scores = jnp.where(named[None, None, :], scores, -jnp.inf)
            peak = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - jnp.where(count > 0, peak, 0.0))
            total = jnp.where(count > 0, weights.sum(axis=-1, keepdims=True), 1.0)
            out = jnp.einsum("kga,akh->kgh", weights / total, values)
        lse = jnp.where(count > 0, (peak + jnp.log(total))[..., 0] * LOG2_E, -jnp.inf)
        return out.reshape(query.shape).astype(query.dtype), lse.reshape(-1)

    return jax.lax.map(one_sequence, (q, slots, counts))


def xla_attention(q, k_pool: Rows, v_pool: Rows, slots, counts, *, scale: float) -> tuple[jax.Array, jax.Array]:
    """Gather the rows and compute two einsums for the whole batch, in the dtype of `q` with float32 sums.

    It reads all A slots of every sequence and writes the gathered rows to memory, so its cost follows the capacity A
    and not `counts`.
    """
    batch, num_heads, head_size = q.shape
    capacity = slots.shape[1]
    # Positions beyond counts repeat the last named row: what they hold is never looked at, and
    # their weight is zero times a row that is attended to anyway.
    positions = jnp.minimum(jnp.arange(capacity, dtype=jnp.int32)[None, :], jnp.maximum(counts - 1, 0)[:, None])
    rows = jnp.take_along_axis(slots, positions, axis=1)
    named = (positions == jnp.arange(capacity, dtype=jnp.int32)[None, :]) & (counts > 0)[:, None]
    named = named[:, None, None, :]

    def gather(array: jax.Array) -> jax.Array:
        return array.at[rows].get(mode="clip")

    keys, values = gather(values_of(k_pool)).astype(q.dtype), gather(values_of(v_pool)).astype(q.dtype)
    key_scales, value_scales = jnp.float32(scale), jnp.float32(1.0)
    if isinstance(k_pool, Quantized) and isinstance(v_pool, Quantized):
        key_scales = gather(k_pool.scales).swapaxes(1, 2)[:, :, None, :] * scale  # [B, K, 1, A]
        value_scales = gather(v_pool.scales).swapaxes(1, 2)[:, :, None, :]

    einsum = functools.partial(
        jnp.einsum, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    )
    grouped = q.reshape(batch, keys.shape[2], -1, head_size)
    scores = einsum("bkgh,bakh->bkga", grouped, keys)
    scores = jnp.where(named, scores * key_scales, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(peak > -jnp.inf, peak, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    weights = (weights * value_scales).astype(q.dtype)
    out = einsum("bkga,bakh->bkgh", weights, values)
    out = jnp.where(counts[:, None, None, None] > 0, out / jnp.where(total > 0, total, 1.0), 0.0)
    lse = peak * LOG2_E + jnp.where(total > 0, jnp.log2(total), 0.0)
    return out.reshape(batch, num_heads, head_size).astype(q.dtype), lse.reshape(batch, num_heads)
