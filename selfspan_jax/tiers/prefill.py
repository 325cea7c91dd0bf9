"""Read prompts layer by layer: all tokens go through a layer before the next one begins, so that the device holds one layer's rows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from selfspan_jax.config import DecodeConfig, ModelConfig
from selfspan_jax.decoding.cache import LayerPools
from selfspan_jax.decoding.state import for_each_chunk
from selfspan_jax.model import Decoder, rotary_angles
from selfspan_jax.spans import SpanVocab

READ_TOKENS = 1 << 17  # of prompts that are read together: their hidden states and one layer's rows are on the device


def read_to_host(
    decoder: Decoder, token_ids: Int[Array, "b T"], lengths: Int[Array, "b"], config: DecodeConfig, responses: bool, free_rows: int
) -> tuple[tuple[LayerPools, ...], Float[Array, "b D"]]:
    """Read prompts, some at a time; return pools in host memory, with so many free rows behind the prompts', and the last hidden states.

    Args:
      responses: some of them go on after `<solve>`.
    """
    (batch, capacity), model_config = token_ids.shape, decoder.config
    group = max(number for number in range(1, batch + 1) if batch % number == 0 and (number == 1 or number * capacity <= READ_TOKENS))
    layers = [nnx.split(layer) for layer in decoder.layers]
    # One group that fills pools makes them; otherwise each writes its part.
    fills = group == batch and not free_rows
    pools: list[Any] = [None if fills else empty_host_pools(model_config, batch * capacity + free_rows) for _ in layers]
    last = []
    for start in range(0, batch, group):
        some, first = (token_ids[start : start + group], lengths[start : start + group]), jnp.int32(start * capacity)
        x = _embed(*nnx.split(decoder.embed_tokens), some[0], model_config)
        for index, (graph, params) in enumerate(layers):
            x, pools[index] = _read_layer(graph, params, x, pools[index], first, *some, decoder.vocab, model_config, config, responses)
        last.append(_last(*nnx.split(decoder.norm), x, some[1]))
    return tuple(pools), jnp.concatenate(last)


def read_layer(layer, x: Float[Array, "b T D"], token_ids, lengths, vocab: SpanVocab, model_config: ModelConfig, config, responses: bool):
    """Compute a layer of whole prompts, a chunk at a time; return what comes out of it, and its keys and values [b * T, K, H]."""

    def read(positions, attend, carry):
        x, rows = carry
        start = positions[0, 0]
        some = jax.lax.dynamic_slice_in_dim(x, start, positions.shape[1], axis=1)
        some, rows = layer(some, rotary_angles(positions, model_config), attend, rows, implementation="xla")
        return jax.lax.dynamic_update_slice_in_dim(x, some, start, axis=1), rows

    empty = jnp.zeros((token_ids.size, model_config.num_kv_heads, model_config.head_size), x.dtype)
    return for_each_chunk(read, (x, (empty, empty)), token_ids, lengths, vocab, model_config, config, responses)


@functools.partial(jax.jit, static_argnames=("config", "rows"))
def empty_host_pools(config: ModelConfig, rows: int) -> LayerPools:
    """Allocate keys and values of a layer in host memory."""
    pool = jnp.zeros((rows, config.num_kv_heads, config.head_size), jnp.dtype(config.compute_dtype))
    return jax.device_put((pool, pool), jax.memory.Space.Host)


@functools.partial(jax.jit, static_argnames=("graph", "config"))
def _embed(graph, params, token_ids, config):
    return nnx.merge(graph, params).look_up(token_ids, config.compute_dtype)


@functools.partial(jax.jit, static_argnames=("graph", "vocab", "model_config", "config", "responses"), donate_argnames=("x", "pools"))
def _read_layer(graph, params, x, pools, first, token_ids, lengths, vocab: SpanVocab, model_config: ModelConfig, config, responses):
    """Compute a layer of whole prompts and write its rows to the host's pools from row `first` on."""
    x, rows = read_layer(nnx.merge(graph, params), x, token_ids, lengths, vocab, model_config, config, responses)
    rows = jax.device_put(rows, jax.memory.Space.Host)
    if pools is None:
        return x, rows
    return x, tuple(jax.lax.dynamic_update_slice_in_dim(pool, some, first, axis=0) for pool, some in zip(pools, rows))


@functools.partial(jax.jit, static_argnames=("graph",))
def _last(graph, params, x: Float[Array, "b T D"], lengths: Int[Array, "b"]) -> Float[Array, "b D"]:
    """Normalize the hidden state of each prompt's last token."""
    return nnx.merge(graph, params)(jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0])
