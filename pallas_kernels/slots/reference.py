"""The update in plain JAX."""

import jax
import jax.numpy as jnp


def xla_update(slots, counts, visible, slot_table, own, extend, append):
    """Append by a scatter; extend by a cumulative sum and a scatter of the whole table, only if any sequence needs it."""
    batch, capacity = slot_table.shape
    sequence = jnp.arange(batch, dtype=jnp.int32)
    target = jnp.where(append, jnp.minimum(counts, capacity), capacity)
    slots = slots.at[sequence, target].set(own)
    counts = counts + append.astype(jnp.int32)

    def compact():
        end = counts[:, None] + jnp.cumsum(visible, axis=1, dtype=jnp.int32)
        target = jnp.where(visible & extend[:, None], end - 1, capacity)
        return slots.at[sequence[:, None], target].set(slot_table), jnp.where(extend, end[:, -1], counts)

    return jax.lax.cond(jnp.any(extend), compact, lambda: (slots, counts))
