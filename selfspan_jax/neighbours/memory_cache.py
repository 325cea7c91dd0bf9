"""Decode models whose layers have a memory (Infini-attention): a state of constant size, however long the context is.

Of each sequence the cache has the rows of one segment, token t in row t % S, and of each layer the memory of the segments before.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from selfspan_jax.attention.policies import get_policy
from selfspan_jax.attention.sequences import dot_product_attention, split_and_rotate
from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.cache import ROW_MULTIPLE, KVCache
from selfspan_jax.decoding.state import DecodeState, start_state
from selfspan_jax.errors import UserError
from selfspan_jax.model import Attend, Decoder
from selfspan_jax.neighbours.memory import Kept, Memory, check_policy, split_heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryCache(KVCache):
    """A cache whose layers are keys and values of one segment of each sequence, and a `Kept`. `slot_table` [B, S] is of that segment."""

    def extended(self, num_tokens: Int[Array, "B"], new_capacity: int) -> KVCache:
        """Return the cache as it is: it has room for any number of tokens."""
        return self


def prefill_memory(model: Decoder, token_ids, lengths, keys, config: DecodeConfig, num_samples: int, responses: bool) -> DecodeState:
    """Read prompts, whole segments of each at a time; arguments as for `prefill_state`."""
    check_policy(get_policy(config.attention).name, model.config)
    if config.prefill != "dense":
        raise UserError(f"prefill is {config.prefill!r}, but segments are read whole; allowed: dense")
    (batch, capacity), sizes = token_ids.shape, model.config
    segment = sizes.memory_segment_tokens
    chunk = min(max(1, config.prefill_tokens // (batch * segment)), -(-capacity // segment)) * segment
    padded = jnp.pad(token_ids, ((0, 0), (0, -capacity % chunk)), constant_values=model.vocab.pad_id)
    rows = jnp.zeros((batch, segment, sizes.num_kv_heads, sizes.head_size), jnp.dtype(sizes.compute_dtype))
    empty = Memory.empty(batch, sizes.num_kv_heads, sizes.head_size)

    def read(index, carry):
        layers, last = carry
        start = index * chunk
        positions = jnp.broadcast_to(start + jnp.arange(chunk, dtype=jnp.int32), (batch, chunk))
        tokens = jax.lax.dynamic_slice_in_dim(padded, start, chunk, axis=1)
        hidden, layers = model(tokens, positions, attend_segments(lengths - start, segment), layers)
        return layers, _latest(hidden, lengths - 1 - start, last)

    last = jnp.zeros((batch, sizes.hidden_size), rows.dtype)
    carry: Any = (((rows, rows, Kept(empty, empty)),) * sizes.num_layers, last)
    layers, last = jax.lax.fori_loop(0, (jnp.max(lengths) + chunk - 1) // chunk, read, carry)

    def pool(rows):
        rows = rows.reshape(-1, *rows.shape[2:])
        return jnp.pad(rows, ((0, -len(rows) % ROW_MULTIPLE), (0, 0), (0, 0)))

    layers = jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=0), layers)
    table = jnp.arange(batch * num_samples * segment, dtype=jnp.int32).reshape(-1, segment)
    cache = MemoryCache(tuple((pool(k), pool(v), kept) for k, v, kept in layers), table)  # type: ignore[arg-type]
    return start_state(model, cache, last, token_ids, lengths, keys, config, num_samples)


def _latest(x: Array, index: Int[Array, "b"], before: Array) -> Array:
    """Return element `index[b]` of each sequence where there is one, elsewhere the one before."""
    shape = -1, *[1] * (x.ndim - 1)
    found = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1).reshape(shape), axis=1)[:, 0]
    return jnp.where(((index >= 0) & (index < x.shape[1])).reshape(shape[:-1]), found, before)


def attend_segments(lengths: Int[Array, "b"], segment_tokens: int) -> Attend:
    """Make the attention of whole segments of prompts, of which so many tokens are there; caches have the rows of the latest segment."""

    def attend(qkv, options, angles, layer):
        *rows, kept = layer
        heads, _, parts = split_heads(qkv, options)
        recalled, kept = options["memory"].scan(*parts, lengths=lengths, kept=kept)
        batch, num_tokens, *_ = qkv.shape
        q, *fresh = (x.reshape(-1, segment_tokens, *x.shape[2:]) for x in split_and_rotate(heads, angles))
        own = dot_product_attention(q, *fresh, jnp.tri(segment_tokens, dtype=bool)[None])
        last = (lengths - 1) // segment_tokens
        rows = [_latest(x.reshape(batch, -1, *x.shape[1:]), last, before) for x, before in zip(fresh, rows)]
        return options["memory"].mix(recalled, own.reshape(batch, num_tokens, *own.shape[2:])), (*rows, kept)

    return attend
