"""Pages in the device's memory: the cache of a running state. `host_pages` has that of one whose pages lie in host memory."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
from jaxtyping import Array, Int

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

        def paged(qkv, norms, angles, pools):
            buffers = tuple(pool.at[earlier.reshape(-1)].get(mode="fill", fill_value=0) for pool in pools)
            out, buffers = attend(qkv, norms, angles, buffers)

            def written(pool, buffer):
                buffer = buffer.reshape(*earlier.shape, *buffer.shape[1:])
                return pool.at[own].set(jax.lax.dynamic_slice_in_dim(buffer, prompts.first, own.shape[1], axis=1), mode="drop")

            return out, tuple(map(written, pools, buffers))

        return paged
