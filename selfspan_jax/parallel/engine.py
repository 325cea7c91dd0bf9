"""Decoding with the rows of each sequence divided over several devices, the mesh axis `context`.

Each device runs the whole loop: automaton, products, sampling. Its pools have the rows of its own tokens (`parallel.context`), its slots
list those alone, and one all-gather a layer joins what each attended to. Prompts are read layer by layer, so that beside its share of the
rows a device has the rows of one layer for all tokens, and room for the hidden states of the prompts. Of each chunk it computes its part of
the tokens, where parts are whole tiles, and keys and values are gathered.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from selfspan_jax.attention.policies import get_policy
from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.cache import KVCache
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.state import DecodeState, prefill_chunk_tokens, start_state
from selfspan_jax.model import Decoder
from selfspan_jax.neighbours.memory_cache import prefill_memory
from selfspan_jax.neighbours.query_driven import check_keys
from selfspan_jax.parallel.collectives import psum_context
from selfspan_jax.parallel.context import context_size, part_of, take_own
from selfspan_jax.tiers.prefill import read_layer


def make_engine(model: Decoder, mesh: Mesh | None = None, **options: Any) -> Engine:
    """Make the engine of a model on a mesh; options as for `Engine`. Raises UserError for a mesh that does not divide the decoder."""
    if mesh is not None and mesh.shape["context"] > 1:
        options = {"prefill": prefill_own} | options
    elif model.config.mask == "memory":
        options = {"prefill": prefill_memory} | options
    return Engine(model, mesh, **options)


def check_context_policy(attention: Any, num_parts: int) -> None:
    """Raise UserError for a policy that looks at all keys, where so many devices have parts of them."""
    check_keys(get_policy(attention), "a mesh that divides context" if num_parts > 1 else None)


def prefill_own(model: Decoder, token_ids, lengths, keys, config: DecodeConfig, num_samples: int, responses: bool) -> DecodeState:
    """Read prompts layer by layer and keep this device's rows; arguments as for `prefill_state`."""
    check_context_policy(config.attention, context_size())
    batch, capacity = token_ids.shape
    cache = KVCache.empty(model.config, lengths, capacity, num_samples, config.max_new_tokens)
    x = model.embed_tokens.look_up(token_ids, model.config.compute_dtype)
    pools = []
    for layer, pools_of_layer in zip(model.layers, cache.pools, strict=True):
        x, rows = read_layer(layer, x, token_ids, lengths, model.vocab, model.config, config, responses)
        own = [take_own(some.reshape(batch, capacity, *some.shape[1:])) for some in rows]
        own = [some.reshape(-1, *some.shape[2:]) for some in own]
        pools.append(tuple(jax.lax.dynamic_update_slice_in_dim(pool, some, 0, axis=0) for pool, some in zip(pools_of_layer, own)))
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
    first, size = part_of(chunk := prefill_chunk_tokens(batch, capacity, config))
    if size < chunk:
        place = (lengths - 1) % chunk - first
        last = psum_context(jnp.where(((place >= 0) & (place < size))[:, None], last, jnp.zeros_like(last)))
    last = model.norm(last)
    cache = KVCache(tuple(pools), cache.slot_table)
    return start_state(model, cache, last, token_ids, lengths, keys, config, num_samples)
