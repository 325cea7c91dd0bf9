"""Reads, writes and updates in plain JAX."""

import jax
import jax.numpy as jnp

ELSEWHERE = -(2**31)  # in a slot table: the token's row is in no pool of this device


def xla_read(array, columns):
    """Read by a gather of one element per row; columns outside read the nearest one."""
    return jnp.take_along_axis(array, jnp.clip(columns, 0, array.shape[1] - 1)[:, None], axis=1)[:, 0]


def xla_write(arrays, columns, values):
    """Write by a scatter of one element per row; columns outside are dropped."""
    row = jnp.arange(columns[0].shape[0], dtype=jnp.int32)

    def write(array, column, value):
        return array.at[row, jnp.where(column < 0, array.shape[1], column)].set(value, mode="drop")

    return tuple(map(write, arrays, columns, values))


def selected(keys, marks, tokens, rule):
    """Tell which of `tokens` [B, X] with `keys` [B, X] a rule selects: bool [B, X]."""
    marked = jnp.take_along_axis(marks, jnp.maximum(keys, 0), axis=1) >= rule.since[:, None]
    near = (tokens < rule.below[:, None]) | (tokens >= rule.start[:, None])
    return (tokens < rule.end[:, None]) & ((keys == 0) | (keys == rule.key[:, None]) | marked | near)


def xla_update(slots, kept, slot_table, keys, marks, entries, rule):
    """Append by a scatter; extend by cumulative sums and scatters of whole tables, only if any sequence needs it."""
    batch, capacity = slot_table.shape
    row, newest = jnp.arange(batch, dtype=jnp.int32)[:, None], rule.end[:, None] - 1
    active = rule.first < rule.end
    own = jnp.take_along_axis(slot_table, jnp.maximum(newest, 0), axis=1)
    appended = active & (own[:, 0] != ELSEWHERE)
    slots = slots.at[row, jnp.where(appended, kept, capacity)[:, None]].set(own)
    total = kept + appended.astype(jnp.int32)

    def extend(slots, counts, chosen, rows):
        chosen &= rows != ELSEWHERE
        end = counts[:, None] + jnp.cumsum(chosen, axis=1, dtype=jnp.int32)
        return slots.at[row, jnp.where(chosen, end - 1, capacity)].set(rows), end[:, -1]

    def compact():
        tokens = jax.lax.broadcasted_iota(jnp.int32, keys.shape, 1)
        visible = selected(keys, marks, tokens, rule) | (tokens == newest)
        rows, span = extend(slots, kept, visible & (tokens >= rule.first[:, None]), slot_table)
        if entries is None:
            return rows, span, span
        beyond = ~jnp.take_along_axis(visible, entries, axis=1) & active[:, None]
        beyond &= jax.lax.broadcasted_iota(jnp.int32, entries.shape, 1) < rule.num_entries[:, None]
        return *extend(rows, span, beyond, jnp.take_along_axis(slot_table, entries, axis=1)), span

    slots, counts, span = jax.lax.cond(jnp.any(rule.first < rule.end - 1), compact, lambda: (slots, total, total))
    return slots, jnp.where(active, counts, 0), jnp.where(active, span * rule.keep, kept)
