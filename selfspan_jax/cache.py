"""The KV cache: per layer a pool of rows, and for each sequence the list of the rows that its current query reads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LayerPools = tuple[Float[Array, "P K H"], Float[Array, "P K H"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of B sequences with room for A tokens each.

    `table[b, t]` is the pool row of token t of sequence b; nothing else says whose row a row is.
    """

    pools: tuple[LayerPools, ...]
    table: Int[Array, "B A"]

    @classmethod
    def empty(cls, num_layers: int, batch: int, capacity: int, num_kv_heads: int, head_size: int, dtype) -> KVCache:
        num_rows = batch * capacity
        shape = (num_rows, num_kv_heads, head_size)
        pools = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(num_layers))
        return cls(pools, jnp.arange(num_rows, dtype=jnp.int32).reshape(batch, capacity))


def write_rows(pools: LayerPools, rows: Int[Array, "B T"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> LayerPools:
    """Puts keys and values into pool rows; a row number beyond the pool writes nothing."""
    k_pool, v_pool = pools
    return k_pool.at[rows].set(k, mode="drop"), v_pool.at[rows].set(v, mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotList:
    """The pool rows that each sequence's query attends to: the first `counts[b]` of `rows[b]`, in any order, none twice."""

    rows: Int[Array, "B A"]
    counts: Int[Array, "B"]

    @classmethod
    def of_mask(cls, visible: Bool[Array, "B A"], table: Int[Array, "B A"]) -> SlotList:
        """The rows of the visible tokens."""
        place = jnp.cumsum(visible, axis=1, dtype=jnp.int32) - 1
        sequence = jnp.broadcast_to(jnp.arange(table.shape[0], dtype=jnp.int32)[:, None], table.shape)
        target = jnp.where(visible, place, table.shape[1])
        rows = jnp.zeros_like(table).at[sequence, target].set(table, mode="drop")
        return cls(rows, place[:, -1] + 1)

    def append(self, rows: Int[Array, "B"], added: Bool[Array, "B"]) -> SlotList:
        """One more row for the sequences where `added`."""
        sequence = jnp.arange(rows.shape[0], dtype=jnp.int32)
        target = jnp.where(added, self.counts, self.rows.shape[1])
        return SlotList(self.rows.at[sequence, target].set(rows, mode="drop"), self.counts + added.astype(jnp.int32))
