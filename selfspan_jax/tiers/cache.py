"""The cache of an engine's sequences: prompts in host memory, working sets and the latest new tokens on the device."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from selfspan_jax.decoding.cache import ROW_MULTIPLE, LayerPools
from selfspan_jax.tiers.working_sets import WorkingSets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TieredCache(WorkingSets):
    """The working sets of an engine's sequences. Behind them each sequence has `new_rows` rows on the device for its latest new tokens.

    Samples of a prompt share its rows in host memory.
    """

    prompt_tokens: Int[Array, "B"]
    first_new: Int[Array, ""]  # how many new tokens of each sequence were written to host memory
    new_rows: int = dataclasses.field(metadata={"static": True})
    prompt_rows: int = dataclasses.field(metadata={"static": True})  # of the host's pools; those of new tokens follow
    new_capacity: int = dataclasses.field(metadata={"static": True})  # new tokens of a sequence that the tables have columns for

    @classmethod
    def of_prompts(
        cls,
        host: tuple[LayerPools, ...],
        lengths: Int[Array, "b"],
        capacity: int,
        num_samples: int,
        width: int,
        new_rows: int,
        new_capacity: int,
    ) -> Self:
        """Allocate the device's rows for prompts that are in the host's pools, `capacity` rows each; working sets are empty."""
        prompt_tokens, prompt_rows = jnp.repeat(lengths, num_samples), len(lengths) * capacity
        sequences, columns = len(prompt_tokens), capacity + new_capacity
        sequence, token = (jax.lax.broadcasted_iota(jnp.int32, (sequences, columns), axis) for axis in range(2))
        is_prompt, of_prompt = token < prompt_tokens[:, None], sequence // num_samples * capacity + token
        new_table, new_host = cls.new_tables(prompt_tokens, columns, width, new_rows, prompt_rows)
        rows = -(-sequences * (width + new_rows) // ROW_MULTIPLE) * ROW_MULTIPLE
        empty = jnp.zeros((rows, *host[0][0].shape[1:]), host[0][0].dtype)
        return cls(
            pools=tuple((empty, empty, *layer) for layer in host),
            slot_table=jnp.where(is_prompt, -1 - of_prompt, new_table),
            host_rows=jnp.where(is_prompt, of_prompt, new_host),
            prompt_tokens=prompt_tokens,
            first_new=jnp.int32(0),
            new_rows=new_rows,
            prompt_rows=prompt_rows,
            new_capacity=new_capacity,
            **cls.nothing(sequences, width),
        )

    @staticmethod
    def new_tables(prompt_tokens: Int[Array, "B"], columns: int, width: int, new_rows: int, prompt_rows: int) -> tuple[Array, Array]:
        """Compute [B, columns] of the tokens of a sequence: of new ones their rows on the device, and in host memory."""
        sequence = jnp.arange(len(prompt_tokens), dtype=jnp.int32)[:, None]
        new_token = jnp.arange(columns, dtype=jnp.int32)[None, :] - prompt_tokens[:, None]
        of_chunk = sequence * new_rows + new_token % new_rows
        return len(prompt_tokens) * width + of_chunk, prompt_rows + new_token // new_rows * len(prompt_tokens) * new_rows + of_chunk

    @property
    def host_capacity(self) -> int:
        """Rows that the host's pools are to have."""
        return self.prompt_rows + new_host_rows(self.new_capacity, self.new_rows, len(self.prompt_tokens))

    def extended(self, num_tokens, new_capacity):
        """Make room in the tables, as `KVCache.extended`; the host's pools have it when they have `host_capacity` rows."""
        (_, capacity), added = self.slot_table.shape, ((0, 0), (0, new_capacity))
        tables = self.new_tables(self.prompt_tokens, capacity + new_capacity, self.owner.shape[1], self.new_rows, self.prompt_rows)
        old = jnp.arange(capacity + new_capacity)[None, :] < capacity
        table, rows = (jnp.where(old, jnp.pad(x, added), new) for x, new in zip((self.slot_table, self.host_rows), tables))
        return dataclasses.replace(self, slot_table=table, host_rows=rows, new_capacity=self.new_capacity + new_capacity)

    def written_out(self) -> Self:
        """Write the rows of new tokens to the host's pools, so that their place on the device is free."""
        (sequences, capacity), number = self.slot_table.shape, self.new_rows
        new_token = jax.lax.broadcasted_iota(jnp.int32, (sequences, capacity), 1) - self.prompt_tokens[:, None]
        written = (new_token >= self.first_new) & (new_token < self.first_new + number)
        first = self.host_rows[0, self.prompt_tokens[0] + self.first_new]

        def write(layer):
            rows = tuple(jax.lax.slice_in_dim(pool, self.owner.size, self.owner.size + sequences * number) for pool in layer[:2])
            rows = jax.device_put(rows, jax.memory.Space.Host)
            return (*layer[:2], *(jax.lax.dynamic_update_slice_in_dim(pool, some, first, axis=0) for pool, some in zip(layer[2:], rows)))

        pools, table = tuple(map(write, self.pools)), jnp.where(written, -1 - self.host_rows, self.slot_table)
        return dataclasses.replace(self, pools=pools, slot_table=table, first_new=self.first_new + number)


def new_host_rows(new_capacity: int, new_rows: int, sequences: int) -> int:
    """Count the rows in host memory for new tokens: whole chunks, or none where the device has room for all."""
    return 0 if new_capacity <= new_rows else -(-new_capacity // new_rows) * new_rows * sequences
