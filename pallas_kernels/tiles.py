"""Attention tile by tile, as kernels share it: lists of the tiles that are needed, the loop over them, the running softmax."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import LOG2_E, dot


def list_tiles(some: jax.Array, every: jax.Array) -> tuple[jax.Array, jax.Array]:
    """List for each i of bool [..., I, J] the tiles j with some pairs but not every, then those with every; and both counts [..., I, 2]."""
    kinds = jnp.where(every, 1, jnp.where(some, 0, 2))
    partial, needed = jnp.sum(some & ~every, axis=-1, dtype=jnp.int32), jnp.sum(some, axis=-1, dtype=jnp.int32)
    return jnp.argsort(kinds, axis=-1, stable=True).astype(jnp.int32), jnp.stack([partial, needed], axis=-1)


def no_keys(q):
    """Return the running softmax of queries [block_q, H] before their first key: maxima, sums, weighted values."""
    zeros = jnp.zeros(q.shape[:1], jnp.float32)
    return zeros - jnp.inf, zeros, jnp.zeros(q.shape, jnp.float32)


def softmax_step(q, k, v, allowed, carry, scale: float):
    """Add a tile of keys to the running softmax of a tile of queries; `allowed` is None or bool [block_q, block_k]."""
    running_max, running_sum, acc = carry
    factor = scale * LOG2_E
    scores = dot(q, k, ((1,), (1,)))  # [block_q, block_k]
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    new_max = jnp.maximum(running_max, jnp.max(scores, axis=1))
    shift = jnp.where(new_max > -jnp.inf, new_max * factor, 0.0)
    weights = jnp.exp2(scores * factor - shift[:, None])
    decay = jnp.exp2(running_max * factor - shift)
    running_sum = running_sum * decay + jnp.sum(weights, axis=1)
    return new_max, running_sum, acc * decay[:, None] + dot(weights.astype(q.dtype), v, ((1,), (0,)))


def normalise(carry, scale: float):
    """Finish a running softmax: float32 [block_q, H], zeros for queries without keys, and L in units of log 2."""
    running_max, running_sum, acc = carry
    seen = running_sum > 0
    total = jnp.where(seen, running_sum, 1.0)
    return acc / total[:, None], jnp.where(seen, running_max * (scale * LOG2_E), 0.0) + jnp.log2(total)


class Tiles(NamedTuple):
    """The tiles that another tile needs: `at(0)` on, `partial` of them under a mask, `needed` in all."""

    at: Callable[[jax.Array], jax.Array]
    partial: jax.Array
    needed: jax.Array


def listed_tiles(tiles_ref, counts_ref, *at) -> Tiles:
    """Return the tiles that are listed for the tile at `at`."""
    last = tiles_ref.shape[-1] - 1
    return Tiles(lambda index: tiles_ref[*at, jnp.minimum(index, last)], counts_ref[*at, 0], counts_ref[*at, 1])


def causal_counts(first, block_q: int, block_k: int):
    """Count the tiles of keys that causal queries at positions `first` on need: those the diagonal cuts, and all, tile 0 among them."""
    needed = jax.lax.div(first + (block_q - 1), block_k) + 1
    return needed - jax.lax.div(first + 1, block_k), needed


def until_end(partial, needed, first, length):
    """Return counts of tiles as they are, zeros for queries that begin after the end of their prompt: nobody reads those."""
    needed = jnp.where(first < length, needed, 0)
    return jnp.minimum(partial, needed), needed


def over_tiles(body, init, tiles: Tiles, group: int = 1, ahead: Callable | None = None):
    """Fold `body(other tile, carry, masked, member)` over the tiles that are needed and, within each, the members of a group.

    With `ahead(other tile, member)`, numbers that are loaded for a tile, `body` gets them too; where the mask cuts nothing they are
    loaded one step ahead, so that nothing waits for them.
    """

    def at(index):
        return tiles.at(jax.lax.div(index, jnp.int32(group)))

    def member(index):
        return jax.lax.rem(index, jnp.int32(group))

    def loaded(other, index):
        return () if ahead is None else ahead(other, member(index))

    def step(index, carry, masked):
        # The number of a tile is loaded one step ahead, so that the loads of its rows do not wait for it.
        other, numbers, state = carry
        after = at(index + 1)
        numbers, later = (loaded(other, index), ()) if masked else (numbers, loaded(after, index + 1))
        return after, later, body(other, state, masked, member(index), *numbers)

    cut = tiles.partial * group
    other, _, state = jax.lax.fori_loop(0, cut, functools.partial(step, masked=True), (at(jnp.int32(0)), (), init))
    carry = other, loaded(other, cut), state
    return jax.lax.fori_loop(cut, tiles.needed * group, functools.partial(step, masked=False), carry)[2]
