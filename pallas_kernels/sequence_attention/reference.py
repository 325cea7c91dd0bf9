"""Masked attention in plain JAX."""

import jax
import jax.numpy as jnp


def reference_attention(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, *, scale: float) -> jax.Array:
    """Compute all pairs in float32 and keep those of a bool [B, T, S] or [B, N, T, S], differentiable; independent of the kernels."""
    batch, num_queries, _, head_size = q.shape
    num_kv_heads = k.shape[2]
    of_heads = allowed[:, None] if allowed.ndim == 3 else allowed  # [B, N or 1, T, S]
    grouping = (1, 1) if of_heads.shape[1] == 1 else (num_kv_heads, -1)
    allowed = of_heads.reshape(batch, *grouping, *of_heads.shape[2:])
    grouped = q.astype(jnp.float32).reshape(batch, num_queries, num_kv_heads, -1, head_size)
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32)) * scale
        scores = jnp.where(allowed, scores, -jnp.inf)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        peak = jax.lax.stop_gradient(jnp.where(peak > -jnp.inf, peak, 0.0))
        weights = jnp.where(allowed, jnp.exp(scores - peak), 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights /= jnp.where(total > 0, total, 1.0)  # nothing allowed: zeros
        out = jnp.einsum("bkgts,bskh->btkgh", weights, v.astype(jnp.float32))
    return out.reshape(q.shape).astype(q.dtype)
