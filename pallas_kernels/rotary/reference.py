"""Rotary positions in plain JAX (RoFormer, 2104.09864, section 3.2; pairs (i, i + H / 2), Llama's order)."""

import jax
import jax.numpy as jnp


def rotate_pairs(first: jax.Array, second: jax.Array, cos: jax.Array, sin: jax.Array, *, back: bool = False) -> tuple[jax.Array, jax.Array]:
    """Rotate the two halves of heads by float32 angles, or back."""
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    if back:
        return first * cos + second * sin, second * cos - first * sin
    return first * cos - second * sin, second * cos + first * sin


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, back: bool = False) -> jax.Array:
    """Rotate heads `[R, K, heads, H]` by the angles `[R, H / 2]` of their rows, or back, rounded once to the dtype of `x`."""
    cos, sin = cos[:, None, None, :], sin[:, None, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(rotate_pairs(first, second, cos, sin, back=back), axis=-1).astype(x.dtype)


def xla_rotate_heads(qkv: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotate whole sequences; shapes as in `rotate_heads`."""
    num_rows, num_kv_heads, fused, head_size = qkv.shape
    rotated = _rotate(qkv[:, :, :-1], cos, sin)
    q = rotated[:, :, :-1].reshape(num_rows, num_kv_heads * (fused - 2), head_size)
    return q, rotated[:, :, -1], qkv[:, :, -1]


def xla_rotate_heads_gradient(dq: jax.Array, dk: jax.Array, dv: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Compute the gradient of `rotate_heads`, `[R, K, G + 2, H]`: a rotation is orthogonal, so its transpose rotates back."""
    num_rows, num_kv_heads, head_size = dk.shape
    turned = jnp.concatenate([dq.reshape(num_rows, num_kv_heads, -1, head_size), dk[:, :, None]], axis=2)
    return jnp.concatenate([_rotate(turned, cos, sin, back=True), dv[:, :, None]], axis=2)


def xla_rotate_and_write(qkv, cos, sin, slots, k_pool, v_pool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotate and write by scatters; shapes as in `rotate_and_write`."""
    q, k, v = xla_rotate_heads(qkv, cos, sin)
    slots = jnp.where(slots < 0, k_pool.shape[0], slots)  # indices below zero would count from the end
    return q, k_pool.at[slots].set(k, mode="drop"), v_pool.at[slots].set(v, mode="drop")
