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
          earlier: as in `rows_before`.
          own: the pool rows of the Q tokens from `prompts.first` on, none of them twice. One outside the pool is not written.
          prompts: the `running.Prompts`.
          attend: the attention over R * S rows, where token s of prompt r is row r * S + s.
        """
        num_queries = own.shape[1]
        new = buffer_rows(*earlier.shape)[:, :num_queries] + prompts.first

        def paged(qkv, norms, angles, pools):
            out, buffers = attend(qkv, norms, angles, rows_before(pools, earlier, prompts.first, num_queries))
            return out, copy_rows(buffers, pools, new, own, jnp.full(len(own), num_queries, jnp.int32))

        return paged


def buffer_rows(num_prompts: int, num_tokens: int) -> Int[Array, "R S"]:
    """Number the rows of a buffer that has those of prompts one after the other."""
    return jnp.arange(num_prompts * num_tokens, dtype=jnp.int32).reshape(num_prompts, num_tokens)


def rows_before(pools: LayerPools, earlier: Int[Array, "R S"], first: Int[Array, ""], num_queries: int) -> LayerPools:
    """Copy the rows of prompts before a part of them from pages to buffers `[R * S, K, H]`, with zeros for all other tokens.

    Args:
      pools: of the pages, on the device or in host memory.
      earlier: the pool row of each token before `first`; what stands from there on is arbitrary. One outside the pool is not read.
      first: of the tokens of the part.
      num_queries: of the part. Where S is no more, it is the first one.
    """
    empty = tuple(jnp.zeros((earlier.size, *pool.shape[1:]), pool.dtype) for pool in pools)
    if earlier.shape[1] == num_queries:
        return empty
    return copy_rows(pools, empty, earlier, buffer_rows(*earlier.shape), jnp.broadcast_to(first, earlier.shape[:1]))
