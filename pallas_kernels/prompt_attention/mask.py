"""The mask of prompts by positions and labels, with the lists of tiles that kernels visit: no pair is ever stored."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.prompt_attention.heuristics import LOCAL_BLOCK
from pallas_kernels.tiles import list_tiles

MIN_BLOCK = 64  # what the numbers of queries and keys must be multiples of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptMask:
    """A causal mask of T queries of each sequence, at positions `first_query` on, and S keys, at positions 0 on.

    Query t at position p = first_query + t may attend to key s <= p; with labels only where one of these holds:

        p - s < window_tokens,    key_labels[b, s] == 0,    key_labels[b, s] == query_labels[b, t]

    With tile lists, kernels visit the tiles listed and no others; they may differ from head to head. T and S are multiples of 64.
    What a query at a position beyond its sequence's length gives is arbitrary.
    """

    first_query: jax.Array
    """int32 []"""
    lengths: jax.Array
    """int32 [B]"""
    query_labels: jax.Array | None
    """int32 [B, T]"""
    key_labels: jax.Array | None
    """int32 [B, S]"""
    key_tiles: jax.Array | None
    """int32 [B, N or 1, T/block_q, C]: for each tile of queries the key tiles that it needs, those first that the mask cuts."""
    key_counts: jax.Array | None
    """int32 [B, N or 1, T/block_q, 2]: how many the mask cuts, and how many are needed in all."""
    num_keys: int = dataclasses.field(metadata={"static": True})
    window_tokens: int = dataclasses.field(metadata={"static": True})
    blocks: tuple[int, int] | None = dataclasses.field(metadata={"static": True})
    """Queries and keys of a tile, `block_q` and `block_k`, where tiles are listed."""

    @classmethod
    def causal(cls, first_query, lengths, *, num_keys: int) -> PromptMask:
        """Make the mask of queries that attend to everything before them."""
        return cls(jnp.int32(first_query), lengths, None, None, None, None, num_keys, 0, None)

    @classmethod
    def local(
        cls,
        first_query,
        lengths,
        query_labels,
        key_labels,
        *,
        num_labels: int,
        window_tokens: int,
        blocks: tuple[int, int] = (LOCAL_BLOCK, LOCAL_BLOCK),
    ) -> PromptMask:
        """Make the mask of queries that attend to recent tokens, to their own label and to label 0, and list its tiles.

        Args:
          query_labels, key_labels: int32 [B, T] and [B, S] below `num_labels`; one below 0 is like no other.
          window_tokens: most recent tokens that every query attends to, itself included.
        """
        num_queries, num_keys = query_labels.shape[1], key_labels.shape[1]
        first_query, (block_q, block_k) = jnp.int32(first_query), blocks
        query_labels, key_labels = jnp.where(query_labels < 0, -1, query_labels), jnp.where(key_labels < 0, -2, key_labels)
        queries = label_sets(query_labels, num_labels, block_q).at[:, :, 0].set(jnp.bfloat16(1))  # all attend to label 0
        shared = jnp.einsum("btl,bsl->bts", queries, label_sets(key_labels, num_labels, block_k), preferred_element_type=jnp.float32)
        first = first_query + jnp.arange(num_queries // block_q, dtype=jnp.int32)[:, None] * block_q
        key = jnp.arange(num_keys // block_k, dtype=jnp.int32)[None, :] * block_k
        near = first - (key + block_k - 1) < window_tokens
        needed = ((shared > 0) | near[None]) & (key < first + block_q)[None] & (first[None] < lengths[:, None, None])
        tiles, counts = list_tiles(needed, jnp.zeros_like(needed))
        lists = tiles[:, None], counts[:, None]
        return cls(first_query, lengths, query_labels, key_labels, *lists, num_keys, window_tokens, blocks)

    @property
    def num_queries(self) -> int | None:
        """T, where the mask knows it."""
        if self.query_labels is not None:
            return self.query_labels.shape[1]
        return None if self.key_tiles is None or self.blocks is None else self.key_tiles.shape[2] * self.blocks[0]

    def kept_tiles(self) -> jax.Array:
        """Return the bool [B, N or 1, T/block_q, S/block_k] of tiles that are listed."""
        assert self.key_tiles is not None and self.key_counts is not None and self.blocks is not None
        listed = jax.lax.broadcasted_iota(jnp.int32, self.key_tiles.shape, 3) < self.key_counts[..., 1:]
        at = tuple(jax.lax.broadcasted_iota(jnp.int32, listed.shape, axis) for axis in range(3))
        none = jnp.zeros((*listed.shape[:3], self.num_keys // self.blocks[1]), bool)
        return none.at[*at, self.key_tiles].max(listed, mode="drop")

    def pairs(self, num_queries: int) -> jax.Array:
        """Return the bool [B, N or 1, T, S] of pairs that the mask allows: N where tiles are listed for each head."""
        position = self.first_query + jnp.arange(num_queries, dtype=jnp.int32)[:, None]
        key = jnp.arange(self.num_keys, dtype=jnp.int32)[None, :]
        mask = jnp.broadcast_to((key <= position)[None], (self.lengths.shape[0], num_queries, self.num_keys))
        if self.query_labels is not None and self.key_labels is not None:
            named = (self.key_labels == 0)[:, None, :] | (self.key_labels[:, None, :] == self.query_labels[:, :, None])
            mask &= named | (position - key < self.window_tokens)[None]
        if self.blocks is None:
            return mask[:, None]
        return mask[:, None] & jnp.repeat(jnp.repeat(self.kept_tiles(), self.blocks[0], axis=2), self.blocks[1], axis=3)


def prompt_rows(pool: jax.Array, batch: int, num_keys: int) -> jax.Array:
    """Return the first rows of a pool [P, K, H] as those of B prompts: [B, num_keys, K, H]."""
    return pool[: batch * num_keys].reshape(batch, num_keys, *pool.shape[1:])


def label_sets(labels: jax.Array, num_labels: int, block: int) -> jax.Array:
    """Mark the labels of each tile of `block` tokens: bfloat16 [B, T/block, num_labels] of zeros and ones."""
    tiles = labels.reshape(labels.shape[0], -1, block)
    batch, tile = (jax.lax.broadcasted_iota(jnp.int32, tiles.shape, axis) for axis in (0, 1))
    label = jnp.where(tiles < 0, num_labels, tiles)
    return jnp.zeros((*tiles.shape[:2], num_labels), jnp.bfloat16).at[batch, tile, label].set(jnp.bfloat16(1), mode="drop")
