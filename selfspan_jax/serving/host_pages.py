"""Pages in pinned host memory: the cache of a running state whose places have working sets on the device.

Pages, and who holds them, are as in `pages`. All rows of what is read lie in them. On the device each place has a working set, and a ring
of rows for its latest tokens, the end of its prompt that fills no page included. A page that they have filled is written to host memory
between two chunks (`write_pages`), and the ring is used again. Before a chunk, rows that it will overwrite are taken out of the tables;
those that an open step reads get rows of the working set (`begun`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from selfspan_jax.config import ModelConfig
from selfspan_jax.decoding.cache import LayerPools
from selfspan_jax.model import Attend
from selfspan_jax.serving.device_pages import rows_before
from selfspan_jax.spans import SpanState, SpanVocab
from selfspan_jax.tiers.prefill import empty_host_pools
from selfspan_jax.tiers.working_sets import WorkingSets, always_read

WRITTEN_AT_ONCE = 8  # pages, by one program


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedWorkingSets(WorkingSets):
    """Working sets of the places of a running state, and behind them a ring of `ring_rows` rows for each.

    The host's pools have one spare page, the last: what no page is to get is written there. Fields of working sets that are computed
    before each chunk are arbitrary between two.
    """

    first_new: Int[Array, "B"]  # tokens from this one on are in the ring, each in the row of its number
    page_tokens: int = dataclasses.field(metadata={"static": True})
    ring_rows: int = dataclasses.field(metadata={"static": True})  # a multiple of `page_tokens`

    @classmethod
    def allocated(cls, config: ModelConfig, num_pages: int, page_tokens: int, table: Int[Array, "B A"], width: int, ring_rows: int) -> Self:
        """Allocate it: in host memory `num_pages` pages, on the device `width` rows of a working set and a ring for each place."""
        host = [empty_host_pools(config, (num_pages + 1) * page_tokens) for _ in range(config.num_layers)]
        device, fields = _empty(config, *table.shape, width, ring_rows)
        pools = tuple((*own, *others) for own, others in zip(device, host))
        return cls(pools, table, **fields, page_tokens=page_tokens, ring_rows=ring_rows)

    def ring_row(self, place: Int[Array, "*B"], token: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """Compute the row of the device's pools that a token of a place has in the ring."""
        return self.owner.size + place * self.ring_rows + token % self.ring_rows

    def begun(self, host_rows: Int[Array, "B A"], span: SpanState, active: Bool[Array, "B"], num_steps: int) -> Self:
        """Return the cache with which a chunk of so many steps begins, given where the pages have the row of each token."""
        if num_steps + self.page_tokens > self.ring_rows:
            raise ValueError(
                f"{num_steps} steps of a chunk in a ring of {self.ring_rows} rows; allowed: {self.ring_rows - self.page_tokens}"
            )
        first_new = jnp.maximum(self.first_new, span.num_tokens + num_steps - self.ring_rows)
        (sequences, width), token = self.owner.shape, jax.lax.broadcasted_iota(jnp.int32, host_rows.shape, 1)
        place = jnp.arange(sequences, dtype=jnp.int32)[:, None]
        table = jnp.where(token < first_new[:, None], -1 - host_rows, self.ring_row(place, token))
        own = place * width + jax.lax.broadcasted_iota(jnp.int32, self.owner.shape, 1)
        table = table.at[place, jnp.where(self.owner < 0, table.shape[1], self.owner)].set(own, mode="drop")
        cache = dataclasses.replace(self, host_rows=host_rows, first_new=first_new, slot_table=table)
        return cache.placed(span, active & span.is_response).with_copies()

    def joined(self, pools: tuple[LayerPools, ...], host_rows: Int[Array, "R A"], span: SpanState, prompts: Any, vocab: SpanVocab) -> Self:
        """Give places to prompts that are read, and copy to their working sets what every step reads of the pages.

        Args:
          span: of the prompts.
          prompts: the `running.Prompts`.
        """
        sources, always = prompts.sources, always_read(span, prompts.token_ids[:, : host_rows.shape[1]], vocab)
        taken = sources >= 0

        def of_places(x):
            return jnp.take(x, jnp.maximum(sources, 0), axis=0)

        first_new = of_places(prompts.lengths // self.page_tokens * self.page_tokens)
        in_pages = jax.lax.broadcasted_iota(jnp.int32, self.slot_table.shape, 1) < first_new[:, None]
        cache = dataclasses.replace(
            self,
            pools=pools,
            host_rows=of_places(host_rows),
            first_new=jnp.where(taken, first_new, self.first_new),
            owner=jnp.where(taken[:, None], -1, self.owner),
            copied=jnp.where(taken, 0, self.copied),
            misses=jnp.where(taken, 0, self.misses),
        )
        return cache.pin(of_places(always) & in_pages & taken[:, None], taken).with_copies()

    def host_rows_since(self, before: Self) -> Int[Array, "2"]:
        """Count rows copied from host memory, and rows read there, since another state of the cache."""
        return jnp.stack([jnp.sum(self.copied - before.copied), jnp.sum(self.misses - before.misses)])

    def attend_prompts(self, earlier: Int[Array, "R S"], own: Int[Array, "R Q"], prompts: Any, attend: Attend) -> Attend:
        """Make the attention of prompts whose rows lie in pages, as `PagedCache`'s; write full pages, and the rest to the ring."""
        (batch, num_keys), (_, num_queries) = earlier.shape, own.shape
        positions = prompts.first + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
        first, lengths = prompts.first, prompts.lengths[:, None]
        takes = prompts.sources[None, :] == jnp.arange(batch, dtype=jnp.int32)[:, None]  # [R, B]
        place = jnp.argmax(takes, axis=1).astype(jnp.int32)[:, None]
        in_ring = jnp.any(takes, axis=1)[:, None] & (positions >= lengths // self.page_tokens * self.page_tokens) & (positions < lengths)
        ring = jnp.where(in_ring, self.ring_row(place, positions), self.pools[0][0].shape[0])

        def paged(qkv, norms, angles, layer):
            device, host = layer[:2], layer[2:]
            out, buffers = attend(qkv, norms, angles, rows_before(host, earlier, first, num_queries))
            new = [
                jax.lax.dynamic_slice_in_dim(buffer.reshape(batch, num_keys, *buffer.shape[1:]), first, num_queries, axis=1)
                for buffer in buffers
            ]
            device = tuple(pool.at[ring].set(rows, mode="drop") for pool, rows in zip(device, new))
            spare = host[0].shape[0] - self.page_tokens
            for row in range(batch):
                for begin in range(0, num_queries - self.page_tokens + 1, self.page_tokens):
                    end = begin + self.page_tokens
                    at = jnp.where(own[row, end - 1] < host[0].shape[0], own[row, begin], spare)  # only full pages have a last token
                    host = tuple(_written(pool, rows[row, begin:end], at) for pool, rows in zip(host, new))
            return out, (*device, *host)

        return paged


def _written(pool: Array, rows: Array, first: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(pool, jax.device_put(rows, jax.memory.Space.Host), first, axis=0)


@functools.partial(jax.jit, donate_argnames=("cache",))
def write_pages(cache: PagedWorkingSets, places: Int[Array, "n"], numbers: Int[Array, "n"], pages: Int[Array, "n"]) -> PagedWorkingSets:
    """Write pages that a place's tokens have filled, its `numbers[i]`-th each, from the ring to host memory."""
    size = cache.page_tokens

    def written(layer):
        device, host = layer[:2], layer[2:]
        for i in range(len(pages)):
            at = cache.ring_row(places[i], numbers[i] * size)
            rows = (jax.lax.dynamic_slice_in_dim(pool, at, size, axis=0) for pool in device)
            host = tuple(_written(pool, own, pages[i] * size) for pool, own in zip(host, rows))
        return *device, *host

    return dataclasses.replace(cache, pools=tuple(map(written, cache.pools)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty(config: ModelConfig, sequences: int, capacity: int, width: int, ring_rows: int):
    pool = jnp.zeros((sequences * (width + ring_rows), config.num_kv_heads, config.head_size), jnp.dtype(config.compute_dtype))
    fields = WorkingSets.nothing(sequences, width) | {"host_rows": jnp.zeros((sequences, capacity), jnp.int32)}
    return [(pool, pool)] * config.num_layers, fields | {"first_new": jnp.zeros(sequences, jnp.int32)}
