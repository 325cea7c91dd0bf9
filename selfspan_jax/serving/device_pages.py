"""Pages in the device's memory: the cache of a running state. `host_pages` has that of one whose pages lie in host memory."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import copy_rows
from selfspan_jax.decoding.cache import KVCache, LayerPools
from selfspan_jax.model import Attend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache(KVCache):
    """A cache whose rows lie in pages. `slot_table` is of the chunk at hand, and arbitrary between two."""

    def begun(self, table: Int[Array, "B A"], *_: Any) -> Self:
        """Return the cache with which a chunk begins, given where the pages have the row of each token."""
        return dataclasses.replace(self, slot_table=table)

    def joined(self, pools: tuple[LayerPools, ...], *_: Any) -> Self:
        """Return the cache after a part of prompts was read, with these pools."""
        return dataclasses.replace(self, pools=pools)

    def host_rows_since(self, before: Self) -> Int[Array, "2"] | None:
        """Count rows copied from host memory, and rows read there, since another state of the cache; None where there are none."""
        return None

    def attend_prompts(self, earlier: Int[Array, "R S"], own: Int[Array, "R Q"], prompts: Any, attend: Attend) -> Attend:
        """Make the attention of prompts whose rows lie in pages from one of prompts whose rows lie next to each other.

        Args:
          earlier: the pool row of each token before `prompts.first`. One outside the pool reads as zeros: it is of no token yet.
          own: those of the Q tokens from there on. One outside writes nothing.
          prompts: the `running.Prompts`.
          attend: the attention over R * S rows, where token s of prompt r is row r * S + s.
        """
        (batch, num_keys), num_queries = earlier.shape, own.shape[1]
        rows = jnp.arange(batch * num_keys, dtype=jnp.int32).reshape(earlier.shape)
        before, new = jnp.broadcast_to(prompts.first, (batch,)), jnp.clip(prompts.lengths - prompts.first, 0, num_queries)

        def paged(qkv, norms, angles, pools):
            empty = tuple(jnp.zeros((batch * num_keys, *pool.shape[1:]), pool.dtype) for pool in pools)
            out, buffers = attend(qkv, norms, angles, copy_rows(pools, empty, earlier, rows, before))
            return out, copy_rows(buffers, pools, rows[:, :num_queries] + prompts.first, own, new)

        return paged
