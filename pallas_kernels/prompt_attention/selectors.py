"""Choose for each head which tiles of keys causal prompts read: sparse prefill.

A selector is a frozen dataclass of its settings. `choose(q, k)` lists tiles of 128 queries x 128 keys as `PromptMask` has them. It
runs within a chunk of prefill: its queries are those of the chunk, its keys all up to there, so that a choice is made for each chunk
where the papers make one for the whole prompt. Padding and other prompts play no part. No selector holds a number for each pair:
the largest arrays are `MAX_SCORES` scores at once, and a few numbers for each tile and head.

What is always kept: the tiles that the diagonal cuts, so that every query reads itself, and all tiles of a prompt shorter than
`dense_below_tokens`, where there is little to gain.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.common import require
from pallas_kernels.prompt_attention.mask import PromptMask, prompt_rows
from pallas_kernels.prompt_attention.mass import BLOCK, tile_mass
from pallas_kernels.prompt_attention.means import tile_scores
from pallas_kernels.tiles import list_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selector:
    """A selector's settings: hashable, static under jit."""

    dense_below_tokens: int = 2048
    """Shorter prompts are read densely (ours)."""

    name: ClassVar[str]

    def __post_init__(self):
        _require_number(self, "dense_below_tokens", 0)

    def choose(self, q: jax.Array, k: jax.Array, *, first_query=0, lengths: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """List the tiles of keys that each tile of queries reads.

        Args:
          q: `[B, T, N, H]`, queries at positions `first_query` (an int32 scalar, may be traced) on; T is a multiple of 128.
          k: `[B, S, K, H]`, keys at positions 0 on; S is a multiple of 128. Query head n reads kv head `n // (N // K)`.
          lengths: int32 `[B]`, tokens of each prompt; what lies beyond is ignored. By default all.

        Returns: tiles int32 `[B, N, T/128, S/128]` and counts `[B, N, T/128, 2]`, see `PromptMask`.
        """
        fits = q.ndim == k.ndim == 4 and q.shape[1] % BLOCK == 0 and k.shape[1] % BLOCK == 0
        require(fits, f"q and k must be [B, T, N, H] and [B, S, K, H], T and S multiples of {BLOCK}", q, k)
        first_query = jnp.int32(first_query)
        lengths = jnp.full(q.shape[0], k.shape[1], jnp.int32) if lengths is None else lengths
        lengths = lengths[:, None, None, None]
        query = first_query + jnp.arange(q.shape[1] // BLOCK, dtype=jnp.int32)[None, None, :, None] * BLOCK  # the first of each tile
        key = jnp.arange(k.shape[1] // BLOCK, dtype=jnp.int32)[None, None, None, :] * BLOCK
        some, every = key < query + BLOCK, key + (BLOCK - 1) <= query
        kept = some & (self._keep(q, k, query, key, lengths) | ~every | (lengths < self.dense_below_tokens))
        kept = jnp.broadcast_to(kept, (q.shape[0], q.shape[2], *kept.shape[2:]))
        return list_tiles(kept, kept & every)

    def _keep(self, q, k, query, key, lengths):
        """Say which tiles to keep: bool [B, N, I, J], each axis maybe 1; what is not before a query is ignored.

        `query` [1, 1, I, 1] and `key` [1, 1, 1, J] are the first positions of tiles; `lengths` is [B, 1, 1, 1].
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleAttention(Selector):
    """Keep the tiles on which the softmax of some sampled queries lies (SampleAttention, 2406.15486), in either published version.

    1: sampled are queries at equal distances. Kept are the fewest columns whose share of the sampled probability reaches `share`, a
       window of recent tokens, and everything for the last queries of the prompt.
    2: sampled are a few queries at the end of each segment. Kept are the fewest columns that reach `share`, and the fewest diagonals
       that reach `diagonal_share`.

    The papers are known to us second hand. Ours are: columns and diagonals of whole tiles in both versions (the first has single
    columns); one sum over all sampled queries of a chunk; the numbers of last queries, of a segment and of its sampled queries.
    The work is `sampled_fraction` of that of all scores.
    """

    version: int = 2
    share: float = 0.95
    """Of the sampled probability, that the columns of a head reach."""
    diagonal_share: float = 0.95
    """The same of its diagonals, version 2."""
    sampled_fraction: float = 0.05
    """Of the queries."""
    segment_tokens: int = 1024
    """Queries of a segment, version 2 (ours)."""
    window_fraction: float = 0.08
    """Of the prompt's length: recent tokens that every query reads, version 1."""
    last_tokens: int = 128
    """Last queries of the prompt that read everything, version 1 (ours)."""

    name: ClassVar[str] = "sample"

    def __post_init__(self):
        super().__post_init__()
        require(self.version in (1, 2), "version must be 1 or 2", self.version)
        for field in ("share", "diagonal_share", "window_fraction"):
            _require_number(self, field, 0, 1)
        require(0 < self.sampled_fraction <= 1, "sampled_fraction must be above 0, up to 1", self.sampled_fraction)
        _require_number(self, "segment_tokens", 1)
        _require_number(self, "last_tokens", 0)

    def _keep(self, q, k, query, key, lengths):
        first, batch, num_queries = query[0, 0, 0, 0], q.shape[0], q.shape[1]
        inside = jnp.clip(lengths[:, :, 0, 0] - first, 0, num_queries)  # queries of each prompt in this chunk, [B, 1]
        if self.version == 1:
            stride = min(max(1, round(1 / self.sampled_fraction)), num_queries)
            rows = jnp.arange(stride - 1, num_queries, stride, dtype=jnp.int32)[None, :]
            sampled = rows < inside
        else:
            size = min(self.segment_tokens, num_queries)
            count = max(1, round(size * self.sampled_fraction))
            start = jnp.repeat(jnp.arange(0, num_queries, size, dtype=jnp.int32), count)[None, :]
            offset = jnp.tile(jnp.arange(count, dtype=jnp.int32), -(-num_queries // size))[None, :]
            rows = jnp.minimum(start + size, inside) - count + offset
            sampled = rows >= start
        rows = jnp.broadcast_to(jnp.clip(rows, 0, num_queries - 1), (batch, rows.shape[1]))
        mass = tile_mass(jnp.take_along_axis(q, rows[:, :, None, None], axis=1), k, first + rows)  # [B, N, R, J]
        mass = jnp.where(sampled[:, None, :, None], mass, 0.0)
        columns = fewest_reaching(jnp.sum(mass, axis=2), self.share)[:, :, None, :]
        if self.version == 1:
            window = jnp.ceil(lengths.astype(jnp.float32) * self.window_fraction).astype(jnp.int32)
            return columns | (query - (key + (BLOCK - 1)) < window) | (query + BLOCK > lengths - self.last_tokens)
        distance = jnp.arange(k.shape[1] // BLOCK, dtype=jnp.int32)[None, None, None, :]
        at = (first + rows)[:, None, :, None] // BLOCK - distance  # the tile at each distance before a sampled query's own
        along = jnp.where(at >= 0, jnp.take_along_axis(mass, jnp.maximum(at, 0), axis=3), 0.0)
        diagonals = fewest_reaching(jnp.sum(along, axis=2), self.diagonal_share)
        return columns | diagonals[:, :, jnp.maximum(query // BLOCK - key // BLOCK, 0)[0, 0]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowTiles(Selector):
    """Keep the first tiles and the nearest ones, whatever the prompt says: what a selector must beat at equal cost."""

    first_tiles: int = 1
    near_tiles: int = 8
    """A query's own tile and those before it."""

    name: ClassVar[str] = "window"

    def __post_init__(self):
        super().__post_init__()
        for field in ("first_tiles", "near_tiles"):
            _require_number(self, field, 0)

    def _keep(self, q, k, query, key, lengths):
        return (query // BLOCK - key // BLOCK < self.near_tiles) | (key < self.first_tiles * BLOCK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMeans(WindowTiles):
    """Keep the tiles whose mean key scores high (FlashPrefill, 2603.06199).

    The score of a tile is the sum over its queries of exp(q . mean key / sqrt(H)). Kept are the tiles that have at least
    `alpha` times the largest score of their row, the first tiles, the nearest ones, and all tiles of the last rows.

    Ours are the value of `alpha` and that the tile on the diagonal takes part with the mean of all its keys. The work is a 128th
    of that of all scores.
    """

    alpha: float = 0.01
    """Of the largest score in a row of tiles (ours)."""
    first_tiles: int = 2
    near_tiles: int = 4
    last_rows: int = 2
    """Of tiles, at the end of the prompt."""

    name: ClassVar[str] = "blocks"

    def __post_init__(self):
        super().__post_init__()
        _require_number(self, "alpha", 0, 1)
        _require_number(self, "last_rows", 0)

    def _keep(self, q, k, query, key, lengths):
        (batch, _, num_kv_heads, head_size), num_tiles = k.shape, key.shape[3]
        used = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :, None, None] < lengths
        total = jnp.where(used, k, 0).reshape(batch, num_tiles, BLOCK, num_kv_heads, head_size).sum(axis=2, dtype=jnp.float32)
        count = jnp.clip(lengths - key, 1, BLOCK).astype(jnp.float32)[:, 0, 0, :, None, None]
        means = (total / count).astype(q.dtype)
        found = tile_scores(q, means, query[0, 0, 0, 0], lengths[:, 0, 0, 0])
        found = jnp.where(key < query + BLOCK, found, -jnp.inf)
        high = found >= jnp.max(found, axis=3, keepdims=True) + jnp.log(jnp.float32(self.alpha))
        last = query >= ((lengths + (BLOCK - 1)) // BLOCK - self.last_rows) * BLOCK
        return high | last | super()._keep(q, k, query, key, lengths)


def choose_tiles(selector: Selector, q: jax.Array, k_pool: jax.Array, mask: PromptMask) -> PromptMask:
    """Return a causal mask of T queries `[B, T, N, H]` over pooled keys, with the tiles that a selector chooses."""
    k = prompt_rows(k_pool, q.shape[0], mask.num_keys)
    tiles, counts = selector.choose(q, k, first_query=mask.first_query, lengths=mask.lengths)
    return dataclasses.replace(mask, key_tiles=tiles, key_counts=counts, blocks=(BLOCK, BLOCK))


def fewest_reaching(mass: jax.Array, share: float) -> jax.Array:
    """Mark the fewest entries of the last axis whose sum reaches a share of the whole: bool; all of them for a share of 1."""
    if share >= 1:
        return jnp.ones(mass.shape, bool)
    order = jnp.argsort(-mass, axis=-1, stable=True)
    largest = jnp.take_along_axis(mass, order, axis=-1)
    before = jnp.cumsum(largest, axis=-1) - largest
    wanted = before < share * jnp.sum(mass, axis=-1, keepdims=True)
    return jnp.take_along_axis(wanted, jnp.argsort(order, axis=-1), axis=-1)


def _require_number(selector, field: str, low: float, high: float | None = None) -> None:
    value, whole = getattr(selector, field), type(getattr(type(selector), field)) is int
    bounds = f"from {low}" if high is None else f"{low} to {high}"
    require(low <= value and (high is None or value <= high), f"{field} must be {bounds}", value)
    require(not whole or type(value) is int, f"{field} must be a whole number", value)
