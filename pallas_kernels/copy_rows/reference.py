"""Copies in plain JAX."""

import jax
import jax.numpy as jnp

SHARES = 1024  # parts of all copies, in which shares are said


def everything() -> jax.Array:
    """Return the share that is all copies."""
    return jnp.array([0, SHARES], jnp.int32)


def xla_copy_rows(source_pools, pools, sources, targets, counts, share):
    """Gather and scatter, after pools in host memory were moved to the device."""
    wanted = jnp.arange(sources.shape[1], dtype=jnp.int32)[None, :] < jnp.where(share[1] == SHARES, counts, 0)[:, None]

    def copy(source_pool, pool):
        valid = wanted & (sources >= 0) & (sources < source_pool.shape[0]) & (targets >= 0)
        if jax.typeof(source_pool).memory_space != jax.memory.Space.Device:  # else a program after this one would be compiled again
            source_pool = jax.device_put(source_pool, jax.memory.Space.Device)
        rows = source_pool.at[sources].get(mode="clip")
        return pool.at[jnp.where(valid, targets, pool.shape[0])].set(rows, mode="drop")

    return tuple(map(copy, source_pools, pools))
