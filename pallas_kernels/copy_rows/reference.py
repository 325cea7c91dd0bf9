"""Copies in plain JAX."""

import jax
import jax.numpy as jnp

SHARES = 1024  # parts of all copies, in which shares are said


def everything() -> jax.Array:
    """Return the share that is all copies."""
    return jnp.array([0, SHARES], jnp.int32)


def xla_copy_rows(host_pools, pools, sources, targets, counts, share):
    """Gather and scatter, after the host pools were moved to the device."""
    wanted = jnp.arange(sources.shape[1], dtype=jnp.int32)[None, :] < jnp.where(share[1] == SHARES, counts, 0)[:, None]

    def copy(host, pool):
        valid = wanted & (sources >= 0) & (sources < host.shape[0]) & (targets >= 0)
        rows = jax.device_put(host, jax.memory.Space.Device).at[sources].get(mode="clip")
        return pool.at[jnp.where(valid, targets, pool.shape[0])].set(rows, mode="drop")

    return tuple(map(copy, host_pools, pools))
