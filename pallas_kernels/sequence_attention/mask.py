"""Masks as the kernels read them, with the lists of their tiles that are not empty: any mask in bits, packed causal rows by positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.common import require
from pallas_kernels.tiles import list_tiles

TILE = (64, 64)  # queries by keys: what one warp group (4 warps) multiplies at once, without spilled registers in any kernel
WORD_BITS = 32
MAX_ELEMENTS = 2**26  # of the boolean mask in memory at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileMask:
    """A mask of T queries and S keys, one bit a pair, with the tiles that kernels need not visit.

    Tiles are `block_q` queries by `block_k` keys; T' and S' are T and S rounded up to whole tiles, with nothing allowed in
    what was added. A mask is shared by all heads and layers; it is made once.
    """

    bits: jax.Array
    """int32 [B, S'/32, T']: bit i of word [b, w, t] says whether query t may attend to key 32 w + i."""
    key_tiles: jax.Array
    """int32 [B, T'/block_q, S'/block_k]: for each tile of queries the key tiles that it needs, those first where only
    some pairs are allowed, then those where all are. The rest is arbitrary."""
    key_counts: jax.Array
    """int32 [B, T'/block_q, 2]: how many are of the first kind, and how many of both."""
    query_tiles: jax.Array
    """int32 [B, S'/block_k, T'/block_q]: the same, for each tile of keys."""
    query_counts: jax.Array
    """int32 [B, S'/block_k, 2]"""
    num_queries: int = dataclasses.field(metadata={"static": True})
    num_keys: int = dataclasses.field(metadata={"static": True})

    @property
    def block_q(self) -> int:
        return self.bits.shape[2] // self.key_tiles.shape[1]

    @property
    def block_k(self) -> int:
        return self.bits.shape[1] * WORD_BITS // self.key_tiles.shape[2]

    @classmethod
    def of(cls, mask: jax.Array, tile: tuple[int, int] = TILE) -> TileMask:
        """Pack a bool `[B, T, S]`, True where attention is allowed; `tile` is (block_q, block_k), multiples of 32."""
        return cls.of_rows(lambda first, count: mask[:, first : first + count], *mask.shape, tile=tile, max_elements=mask.size)

    @classmethod
    def of_rows(
        cls,
        rows: Callable[[int | jax.Array, int], jax.Array],
        batch: int,
        num_queries: int,
        num_keys: int,
        *,
        tile: tuple[int, int] = TILE,
        max_elements: int = MAX_ELEMENTS,
    ) -> TileMask:
        """Pack a mask that a function makes some rows at a time, so that the whole is never in memory.

        Args:
          rows: first query and number of queries Q (static) -> bool `[B, Q, S]`.
          max_elements: of `rows` at a time; 128 queries are always allowed.
        """
        block_q, block_k = tile
        chunk = max(1, min(num_queries, max(max_elements // max(batch * num_keys, 1) // 128, 1) * 128))
        num_chunks, rest = divmod(num_queries, chunk)
        chunks = []
        if num_chunks == 1:
            chunks.append(_pack_bits(rows(0, chunk)))
        elif num_chunks:
            firsts = jnp.arange(num_chunks, dtype=jnp.int32) * chunk
            words = jax.lax.map(lambda first: _pack_bits(rows(first, chunk)), firsts)  # [chunks, B, W, Q]
            chunks.append(jnp.moveaxis(words, 0, 2).reshape(*words.shape[1:3], -1))
        if rest or not chunks:
            chunks.append(_pack_bits(rows(num_chunks * chunk, rest)))
        bits = jnp.concatenate(chunks, axis=2) if len(chunks) > 1 else chunks[0]
        padding = ((0, 0), (0, -bits.shape[1] % (block_k // WORD_BITS)), (0, -num_queries % block_q))
        bits = jnp.pad(bits, padding)

        _, words, queries = bits.shape
        tiled = bits.reshape(batch, words * WORD_BITS // block_k, block_k // WORD_BITS, queries // block_q, block_q)
        some = jnp.any(tiled != 0, axis=(2, 4))  # [B, S'/block_k, T'/block_q]
        every = jnp.all(tiled == -1, axis=(2, 4))
        return cls(bits, *list_tiles(some.swapaxes(1, 2), every.swapaxes(1, 2)), *list_tiles(some, every), num_queries, num_keys)

    def keys_of_queries(self) -> jax.Array:
        """Count the keys that each query attends to: int32 [B, T]."""
        return jnp.sum(jax.lax.population_count(self.bits), axis=1)[:, : self.num_queries]

    def unpacked(self) -> jax.Array:
        """Return the bool `[B, T, S]`."""
        shifts = jnp.arange(WORD_BITS, dtype=jnp.int32)[None, None, :, None]
        pairs = (self.bits[:, :, None, :] >> shifts) & 1  # [B, W, 32, T']
        return pairs.reshape(pairs.shape[0], -1, pairs.shape[3])[:, : self.num_keys, : self.num_queries].swapaxes(1, 2) == 1


def _pack_bits(mask: jax.Array) -> jax.Array:
    """Pack bool [B, Q, S] to int32 [B, ceil(S / 32), Q]."""
    batch, num_queries, num_keys = mask.shape
    num_words = -(-num_keys // WORD_BITS)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, -num_keys % WORD_BITS))).reshape(batch, num_queries, num_words, WORD_BITS)
    values = jnp.uint32(1) << jnp.arange(WORD_BITS, dtype=jnp.uint32)
    words = jnp.sum(jnp.where(mask, values[None, None, None, :], jnp.uint32(0)), axis=3, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32).swapaxes(1, 2)


PACKED_BLOCK = 128  # queries, and keys, of a tile of a packed mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMask:
    """A causal mask of rows of T tokens, sequences packed one after the other: query t attends to keys `first_keys[b, t]` to t.

    T is a multiple of 128. Tiles are 128 queries by 128 keys, listed as those of a `TileMask`.
    """

    first_keys: jax.Array
    """int32 [B, T]: where the sequence of each token begins."""
    key_tiles: jax.Array
    """int32 [B, T/128, T/128]"""
    key_counts: jax.Array
    """int32 [B, T/128, 2]"""
    query_tiles: jax.Array
    """int32 [B, T/128, T/128]"""
    query_counts: jax.Array
    """int32 [B, T/128, 2]"""

    @classmethod
    def of(cls, segment_ids: jax.Array) -> PackedMask:
        """Make the mask of int32 `[B, T]`, which changes where another sequence begins. Raises ValueError where T is no multiple of 128."""
        require(segment_ids.shape[1] % PACKED_BLOCK == 0, f"packed rows must be multiples of {PACKED_BLOCK} tokens", segment_ids)
        index = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
        begins = (index == 0) | (segment_ids != jnp.roll(segment_ids, 1, axis=1))
        first_keys = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
        first = jnp.arange(0, segment_ids.shape[1], PACKED_BLOCK, dtype=jnp.int32)
        query, key, last = first[None, :, None], first[None, None, :], PACKED_BLOCK - 1
        lowest, highest = first_keys[:, ::PACKED_BLOCK, None], first_keys[:, last::PACKED_BLOCK, None]  # they only grow
        some = (key <= query + last) & (key + last >= lowest)
        every = (key + last <= query) & (key >= highest)
        return cls(first_keys, *list_tiles(some, every), *list_tiles(some.swapaxes(1, 2), every.swapaxes(1, 2)))

    @property
    def num_queries(self) -> int:
        return self.first_keys.shape[1]

    num_keys = num_queries

    def unpacked(self) -> jax.Array:
        """Return the bool `[B, T, T]`."""
        token = jnp.arange(self.num_queries, dtype=jnp.int32)
        return (token[None, None, :] <= token[None, :, None]) & (token[None, None, :] >= self.first_keys[:, :, None])

    def keys_of_queries(self) -> jax.Array:
        """Count the keys that each query attends to: int32 [B, T]."""
        return jnp.arange(self.num_queries, dtype=jnp.int32)[None, :] - self.first_keys + 1
