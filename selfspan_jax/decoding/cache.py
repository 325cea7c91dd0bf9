"""The KV cache: per layer a pool of rows, and for each sequence the list of the rows that its current query reads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import update_slots
from selfspan_jax.config import ModelConfig

LayerPools = tuple[Float[Array, "P K H"], Float[Array, "P K H"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of B sequences with room for A tokens each, and which rows are whose.

    `table[b, t]` is the pool row of token t of sequence b; nothing else says whose row a row is. Samples of one prompt
    have the prompt's rows in common, and rows of their own for what they write.
    """

    pools: tuple[LayerPools, ...]
    table: Int[Array, "B A"]

    @classmethod
    def empty(cls, config: ModelConfig, prompt_lengths: Int[Array, "b"], prompt_room: int, num_samples: int, new_room: int) -> KVCache:
        """Pools of b * prompt_room rows for the prompts, then b * num_samples * new_room for the tokens that follow them.

        Sequence b * num_samples + i is sample i of prompt b.
        """
        batch = prompt_lengths.shape[0]
        num_rows = batch * (prompt_room + num_samples * new_room)
        shape = (num_rows, config.num_kv_heads, config.head_size)
        dtype = jnp.dtype(config.compute_dtype)
        pools = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
        sequence = jnp.arange(batch * num_samples, dtype=jnp.int32)[:, None]
        token = jnp.arange(prompt_room + new_room, dtype=jnp.int32)[None, :]
        new_token = token - jnp.repeat(prompt_lengths, num_samples)[:, None]
        prompt_row = sequence // num_samples * prompt_room + token
        own_row = batch * prompt_room + sequence * new_room + jnp.minimum(new_token, new_room - 1)
        return cls(pools, jnp.where(new_token < 0, prompt_row, own_row))

    @property
    def size_bytes(self) -> int:
        """What the pools take up."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.pools))


def write_rows(pools: LayerPools, rows: Int[Array, "B T"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> LayerPools:
    """Puts keys and values into pool rows, none of which is named twice."""
    k_pool, v_pool = pools
    return k_pool.at[rows].set(k, unique_indices=True), v_pool.at[rows].set(v, unique_indices=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotList:
    """The pool rows that each sequence's query attends to: the first `counts[b]` of `rows[b]`, in any order, none twice."""

    rows: Int[Array, "B A"]
    counts: Int[Array, "B"]

    def updated(
        self,
        visible: Bool[Array, "B A"],
        table: Int[Array, "B A"],
        own: Int[Array, "B"],
        *,
        rebuild: Bool[Array, "B"],
        append: Bool[Array, "B"],
    ) -> SlotList:
        """The rows of the visible tokens where `rebuild`, one more row where `append`, elsewhere the same."""
        return SlotList(*update_slots(self.rows, self.counts, visible, table, own, rebuild, append))
