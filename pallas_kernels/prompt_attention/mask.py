"""The mask of prompts by positions and labels, with the lists of tiles that kernels visit: no pair is ever stored."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import list_tiles

BLOCK_Q, BLOCK_K = 64, 64  # of a tile of queries and keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptMask:
    """A causal mask of T queries of each sequence, at positions `first_query` on, and S keys, at positions 0 on.

    Query t at position p = first_query + t may attend to key s <= p; with labels only where one of these holds:

        p - s < window_tokens,    key_labels[b, s] == 0,    key_labels[b, s] == query_labels[b, t]

    With tile lists, kernels visit the tiles listed and no others; they may differ from head to head. T is a multiple of
    `block_q`, S one of `block_k`. What a query at a position beyond its sequence's length gives is arbitrary.
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
    block_q: int = dataclasses.field(metadata={"static": True})
    block_k: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def causal(
        cls, first_query, lengths, *, num_queries: int, num_keys: int, block_q: int | None = None, block_k: int = BLOCK_K
    ) -> PromptMask:
        """Make the mask of queries that attend to everything before them."""
        block_q = (BLOCK_Q if num_queries % (2 * BLOCK_Q) else 2 * BLOCK_Q) if block_q is None else block_q
        return cls(jnp.int32(first_query), lengths, None, None, None, None, num_keys, 0, block_q, block_k)

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
        block_q: int = BLOCK_Q,
        block_k: int = BLOCK_K,
    ) -> PromptMask:
        """Make the mask of queries that attend to recent tokens, to their own label and to label 0, and list its tiles.

        Args:
          query_labels, key_labels: int32 [B, T] and [B, S] below `num_labels`; one below 0 is like no other.
          window_tokens: most recent tokens that every query attends to, itself included.
        """
        num_queries, num_keys = query_labels.shape[1], key_labels.shape[1]
        first_query = jnp.int32(first_query)
        query_labels, key_labels = jnp.where(query_labels < 0, -1, query_labels), jnp.where(key_labels < 0, -2, key_labels)
        queries = label_sets(query_labels, num_labels, block_q).at[:, :, 0].set(jnp.bfloat16(1))  # all attend to label 0
        shared = jnp.einsum("btl,bsl->bts", queries, label_sets(key_labels, num_labels, block_k), preferred_element_type=jnp.float32)
        first = first_query + jnp.arange(num_queries // block_q, dtype=jnp.int32)[:, None] * block_q
        key = jnp.arange(num_keys // block_k, dtype=jnp.int32)[None, :] * block_k
        near = first - (key + block_k - 1) < window_tokens
        needed = ((shared > 0) | near[None]) & (key < first + block_q)[None] & (first[None] < lengths[:, None, None])
        tiles, counts = list_tiles(needed, jnp.zeros_like(needed))
        lists = tiles[:, None], counts[:, None]
        return cls(first_query, lengths, query_labels, key_labels, *lists, num_keys, window_tokens, block_q, block_k)

    @property
    def num_queries(self) -> int | None:
        """T, where the mask knows it."""
        if self.query_labels is not None:
            return self.query_labels.shape[1]
        return None if self.key_tiles is None else self.key_tiles.shape[2] * self.block_q

    def pairs(self, num_queries: int) -> jax.Array:
        """Return the bool [B, T, S] of pairs that the mask allows, tile lists aside."""
        position = self.first_query + jnp.arange(num_queries, dtype=jnp.int32)[:, None]
        key = jnp.arange(self.num_keys, dtype=jnp.int32)[None, :]
        mask = jnp.broadcast_to((key <= position)[None], (self.lengths.shape[0], num_queries, self.num_keys))
        if self.query_labels is None or self.key_labels is None:
            return mask
        named = (self.key_labels == 0)[:, None, :] | (self.key_labels[:, None, :] == self.query_labels[:, :, None])
        return mask & (named | (position - key < self.window_tokens)[None])


def label_sets(labels: jax.Array, num_labels: int, block: int) -> jax.Array:
    """Mark the labels of each tile of `block` tokens: bfloat16 [B, T/block, num_labels] of zeros and ones."""
    tiles = labels.reshape(labels.shape[0], -1, block)
    batch, tile = (jax.lax.broadcasted_iota(jnp.int32, tiles.shape, axis) for axis in (0, 1))
    label = jnp.where(tiles < 0, num_labels, tiles)
    return jnp.zeros((*tiles.shape[:2], num_labels), jnp.bfloat16).at[batch, tile, label].set(jnp.bfloat16(1), mode="drop")
