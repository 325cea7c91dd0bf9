"""The choice in plain JAX."""

import jax
import jax.numpy as jnp

FREE, NEVER = -2, jnp.iinfo(jnp.int32).max  # ages of rows that nobody has, and of those that may not be taken


def share_out(counts, most, turn):
    """Divide `most` rows among sequences that want `counts`, by turns; None: each gets what it wants."""
    if most is None:
        return counts
    sequence = jnp.arange(len(counts), dtype=jnp.int32)
    later = (turn[:, None] > turn[None, :]) | ((turn[:, None] == turn[None, :]) & (sequence[:, None] > sequence[None, :]))
    return jnp.clip(most - jnp.sum(jnp.where(later, counts[None, :], 0), axis=1), 0, counts)


def xla_place_rows(slot_table, owner, keys, marks, place, end, key, named, since, pinned, host_rows, most, turn):
    """Sort the rows of each working set by age."""
    (batch, capacity), width = slot_table.shape, owner.shape[1]
    batch_index = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def in_use(keys):
        marked = jnp.take_along_axis(marks, jnp.maximum(keys, 0), axis=1)
        return (keys == 0) | (keys == key[:, None]) | (keys == named[:, None]) | (marked >= since[:, None]), marked

    def compact(chosen, values):  # the first columns of [B, W]
        at = jnp.where(chosen, jnp.cumsum(chosen, axis=1, dtype=jnp.int32) - 1, width)
        return jnp.zeros((batch, width), jnp.int32).at[batch_index, at].set(values, mode="drop")

    token = jax.lax.broadcasted_iota(jnp.int32, slot_table.shape, 1)
    missing = (token < end[:, None]) & (slot_table < 0) & in_use(keys)[0]
    row = jax.lax.broadcasted_iota(jnp.int32, owner.shape, 1)
    used, marked = in_use(jnp.take_along_axis(keys, jnp.maximum(owner, 0), axis=1))
    age = jnp.where(owner < 0, FREE, jnp.where(used, NEVER, marked))
    age = jnp.where(row < pinned[:, None], NEVER, age)
    wanted = jnp.minimum(jnp.sum(missing, axis=1, dtype=jnp.int32), jnp.sum(age < NEVER, axis=1, dtype=jnp.int32))
    wanted = jnp.where(place != 0, wanted, 0)
    counts = share_out(wanted, most, turn)
    rank = jnp.argsort(jnp.argsort(age, axis=1, stable=True), axis=1).astype(jnp.int32)
    tokens, rows = compact(missing, token), compact(rank < counts[:, None], row)
    chosen = row < counts[:, None]
    left = jnp.take_along_axis(owner, rows, axis=1)
    left = jnp.where(chosen & (left >= 0), left, capacity)
    sources, targets = jnp.take_along_axis(host_rows, tokens, axis=1), width * batch_index + rows
    given_up = jnp.take_along_axis(host_rows, jnp.minimum(left, capacity - 1), axis=1)
    slot_table = slot_table.at[batch_index, left].set(-1 - given_up, mode="drop")
    slot_table = slot_table.at[batch_index, jnp.where(chosen, tokens, capacity)].set(targets, mode="drop")
    owner = owner.at[batch_index, jnp.where(chosen, rows, width)].set(tokens, mode="drop")
    return slot_table, owner, sources, targets, counts, wanted - counts
