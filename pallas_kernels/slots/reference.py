"""The update in plain JAX."""

import jax
import jax.numpy as jnp


def xla_update(slots, counts, visible, slot_table, own, rebuild, append):
    """Append by a scatter; rebuild by a cumulative sum and a scatter of the whole table, only if any sequence needs it."""
    batch, capacity = slot_table.shape
    sequence = jnp.arange(batch, dtype=jnp.int32)
    target = jnp.where(append, jnp.minimum(counts, capacity), capacity)
    slots = slots.at[sequence, target].set(own)
    counts = counts + append.astype(jnp.int32)

    def compact():
        place = jnp.cumsum(visible, axis=1, dtype=jnp.int32) - 1
        target = jnp.where(visible & rebuild[:, None], place, capacity)
        return slots.at[sequence[:, None], target].set(slot_table), jnp.where(rebuild, place[:, -1] + 1, counts)

    return jax.lax.cond(jnp.any(rebuild), compact, lambda: (slots, counts))
