"""KV pools of either kind: a float array `[P, K, H]`, or int8 rows with float32 scales."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class QuantizedPool(NamedTuple):
    """An int8 KV pool: row `p` of head `k` is `values[p, k] * scales[p, k]`."""

    values: jax.Array  # int8 [P, K, H]
    scales: jax.Array  # float32 [P, K]


Pool = jax.Array | QuantizedPool


def pool_values(pool: Pool) -> jax.Array:
    """Return the `[P, K, H]` array of a pool of either kind."""
    return pool.values if isinstance(pool, QuantizedPool) else pool


def quantize_pool(pool: jax.Array) -> QuantizedPool:
    """Round a float pool `[P, K, H]` to int8, symmetric, one float32 scale per row and head.

    Also quantizes the rows of one decode step (`[B, K, H]`) before they are written to the pool.
    The rounding error of an element is at most half its row's scale, max|row| / 254.
    """
    rows = pool.astype(jnp.float32)
    scales = jnp.max(jnp.abs(rows), axis=-1) / 127.0
    divisors = jnp.where(scales > 0, scales, 1.0)
    values = jnp.round(rows / divisors[..., None]).astype(jnp.int8)
    return QuantizedPool(values, scales)
