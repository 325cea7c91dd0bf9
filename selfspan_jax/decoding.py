"""Decoding: one state, one pure step, two drivers.

`prefill` reads the prompts and makes a `DecodeState`; `feed` takes one token of every sequence through the model and the
automaton; `step` chooses a token and feeds it. `generate` runs steps in one `while_loop` until all sequences have ended;
`stream` runs the same loop in chunks. Nothing in the loop depends on the host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from selfspan_jax.attention import cached_attention, masked_attention, sequence_mask
from selfspan_jax.cache import KVCache, SlotList, write_rows
from selfspan_jax.config import DecodeConfig
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that decoding B sequences carries from step to step: A tokens of room each, M of them new."""

    cache: KVCache
    span: SpanState  # the automaton after the tokens fed so far; span.num_tokens is the next rotary position
    slots: SlotList  # the rows that the latest token attended to
    slots_extend: Bool[Array, "B"]  # a body token that follows attends to `slots` and itself, nothing else
    logits: Float[Array, "B V"]  # scores of the next token
    done: Bool[Array, "B"]  # <eos> was fed: the sequence no longer changes
    num_steps: Int[Array, ""]
    new_tokens: Int[Array, "B M"]  # tokens chosen so far, then padding
    num_attended: Int[Array, "B M"]  # how many tokens each of them attended to, itself included
    key: PRNGKeyArray


def _prefill(model: Decoder, token_ids: Int[Array, "B T"], lengths: Int[Array, "B"], key: PRNGKeyArray, config: DecodeConfig):
    """Reads prompts, `lengths[b]` tokens of row b, and returns the state from which decoding goes on."""
    batch, num_tokens = token_ids.shape
    capacity = num_tokens + config.max_new_tokens
    span = SpanState.of_prefix(token_ids, lengths, model.vocab, capacity)
    mask = sequence_mask(
        token_ids, model.vocab, model.config, config.attention, sink_tokens=config.sink_tokens, window_tokens=config.window_tokens
    )
    cache = KVCache.empty(
        model.config.num_layers,
        batch,
        capacity,
        model.config.num_kv_heads,
        model.config.head_size,
        jnp.dtype(model.config.compute_dtype),
    )
    rows = cache.table[:, :num_tokens]

    def attend(q, k, v, pools):
        return masked_attention(q, k, v, mask), write_rows(pools, rows, k, v)

    positions = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), token_ids.shape)
    hidden, pools = model(token_ids, positions, attend, cache.pools)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return DecodeState(
        cache=dataclasses.replace(cache, pools=pools),
        span=span,
        slots=SlotList(jnp.zeros_like(cache.table), jnp.zeros_like(lengths)),
        slots_extend=jnp.zeros_like(span.ended),
        logits=model.logits(last),
        done=jnp.zeros_like(span.ended),
        num_steps=jnp.zeros((), jnp.int32),
        new_tokens=jnp.full((batch, config.max_new_tokens), model.vocab.pad_id, jnp.int32),
        num_attended=jnp.zeros((batch, config.max_new_tokens), jnp.int32),
        key=key,
    )


def _slots(model: Decoder, state: DecodeState, span: SpanState, config: DecodeConfig) -> SlotList:
    """The rows that the token which made `span` attends to."""
    table, index = state.cache.table, span.num_tokens - 1
    if config.attention == "dense":
        return SlotList(table, span.num_tokens)
    if config.attention == "window":
        place = jnp.arange(table.shape[1], dtype=jnp.int32)[None, :]
        first_recent = jnp.maximum(span.num_tokens - config.window_tokens, config.sink_tokens)[:, None]
        token = jnp.where(place < config.sink_tokens, place, place - config.sink_tokens + first_recent)
        rows = jnp.take_along_axis(table, jnp.minimum(token, table.shape[1] - 1), axis=1)
        return SlotList(rows, jnp.minimum(span.num_tokens, config.sink_tokens + config.window_tokens))

    views = model.config
    extends = state.slots_extend & span.is_response & ~span.is_header & ~state.done

    def rebuild():
        visible = span.visible(
            header_view=views.header_view, prompt_view=views.prompt_view, prompt_window_tokens=views.prompt_window_tokens
        )
        return SlotList.of_mask(visible, table)

    def extend():
        own = jnp.take_along_axis(table, jnp.maximum(index, 0)[:, None], axis=1)[:, 0]
        return state.slots.append(own, extends)

    return jax.lax.cond(jnp.all(extends | state.done), extend, rebuild)


def _feed(model: Decoder, state: DecodeState, tokens: Int[Array, "B"], config: DecodeConfig) -> DecodeState:
    """Takes one more token of every sequence that is not done through the automaton and the model."""
    advanced = state.span.advance(tokens, model.vocab)
    span = jax.tree.map(lambda old, new: jnp.where(_like(state.done, old), old, new), state.span, advanced)
    slots = _slots(model, state, span, config)
    slots = SlotList(slots.rows, jnp.where(state.done, 0, slots.counts))  # a sequence that is done reads nothing
    index = jnp.maximum(span.num_tokens - 1, 0)
    num_rows = state.cache.table.size
    own = jnp.take_along_axis(state.cache.table, index[:, None], axis=1)
    own = jnp.where(state.done[:, None], num_rows, own)  # and writes nothing

    def attend(q, k, v, pools):
        pools = write_rows(pools, own, k, v)
        return cached_attention(q, *pools, slots, config.implementation), pools

    hidden, pools = model(tokens[:, None], index[:, None], attend, state.cache.pools)
    narrow_header = model.config.header_view == "span"
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, pools=pools),
        span=span,
        slots=slots,
        slots_extend=span.is_response & (~span.is_header | narrow_header),
        logits=model.logits(hidden[:, 0]),
        done=state.done | (tokens == model.vocab.eos_id),
    )


def _like(flags: Bool[Array, "B"], x: Array) -> Array:
    return flags.reshape(flags.shape + (1,) * (x.ndim - 1))


def choose(logits: Float[Array, "B V"], key: PRNGKeyArray, config: DecodeConfig) -> Int[Array, "B"]:
    """The next tokens: the most likely ones, or drawn at a temperature from the nucleus of mass top_p (1904.09751)."""
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores = logits / config.temperature
    if config.top_p < 1:
        order = jnp.argsort(scores, axis=-1, descending=True)
        ranked = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1)
        mass_before = jnp.cumsum(ranked, axis=-1) - ranked
        kept = jnp.put_along_axis(jnp.zeros(scores.shape, bool), order, mass_before < config.top_p, axis=-1, inplace=False)
        scores = jnp.where(kept, scores, -jnp.inf)
    return jax.random.categorical(key, scores, axis=-1).astype(jnp.int32)


def _step(model: Decoder, state: DecodeState, config: DecodeConfig) -> DecodeState:
    """Chooses the next token of every sequence and feeds it."""
    tokens = choose(state.logits, jax.random.fold_in(state.key, state.num_steps), config)
    tokens = jnp.where(state.done, model.vocab.pad_id, tokens)
    fed = _feed(model, state, tokens, config)
    return dataclasses.replace(
        fed,
        num_steps=state.num_steps + 1,
        new_tokens=fed.new_tokens.at[:, state.num_steps].set(tokens),
        num_attended=fed.num_attended.at[:, state.num_steps].set(fed.slots.counts),
    )


@functools.partial(jax.jit, static_argnames=("graph", "config"))
def _jit_prefill(graph, params, token_ids, lengths, key, config):
    return _prefill(nnx.merge(graph, params), token_ids, lengths, key, config)


@functools.partial(jax.jit, static_argnames=("graph", "config"), donate_argnames=("state",))
def _jit_feed(graph, params, state, tokens, config):
    return _feed(nnx.merge(graph, params), state, tokens, config)


@functools.partial(jax.jit, static_argnames=("graph", "config"), donate_argnames=("state",))
def _jit_run(graph, params, state, until, config):
    model = nnx.merge(graph, params)
    return jax.lax.while_loop(
        lambda state: (state.num_steps < until) & ~jnp.all(state.done),
        lambda state: _step(model, state, config),
        state,
    )


def check_ids(model: Decoder, token_ids: Int[np.ndarray, "..."]) -> None:
    """Raises ValueError for ids outside the model's vocabulary."""
    if token_ids.size and not (0 <= token_ids.min() and token_ids.max() < model.vocab_size):
        raise ValueError(f"token ids from {token_ids.min()} to {token_ids.max()}; the model knows 0 to {model.vocab_size - 1}")


def check_prompts(model: Decoder, token_ids: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, "B"], config: DecodeConfig) -> None:
    """Raises ValueError for prompts that the model cannot take."""
    if token_ids.ndim != 2 or lengths.shape != token_ids.shape[:1]:
        raise ValueError(f"prompts of shape {token_ids.shape} with lengths of shape {lengths.shape}; expected [B, T] and [B]")
    check_ids(model, token_ids)
    if lengths.size and not (1 <= lengths.min() and lengths.max() <= token_ids.shape[1]):
        raise ValueError(f"prompt lengths from {lengths.min()} to {lengths.max()} in rows of {token_ids.shape[1]}")
    longest = int(lengths.max(initial=0)) + config.max_new_tokens
    if longest > model.config.max_context_tokens:
        raise ValueError(
            f"{int(lengths.max())} prompt tokens and {config.max_new_tokens} new ones exceed "
            f"the model's context of {model.config.max_context_tokens} tokens"
        )


def prefill(
    model: Decoder, token_ids: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, "B"], config: DecodeConfig, key: PRNGKeyArray | None = None
) -> DecodeState:
    """Reads prompts: the first `lengths[b]` tokens of each row, at least one; the rest of a row is ignored.

    Raises: ValueError for prompts that are empty, hold unknown ids, or leave no room for the new tokens.
    """
    check_prompts(model, token_ids, lengths, config)
    graph, params = nnx.split(model)
    key = jax.random.key(0) if key is None else key
    return _jit_prefill(graph, params, jnp.asarray(token_ids, jnp.int32), jnp.asarray(lengths, jnp.int32), key, config)


def feed(model: Decoder, state: DecodeState, tokens: Int[np.ndarray, "B"], config: DecodeConfig) -> DecodeState:
    """The state after one given token in every sequence. The state handed in is donated."""
    return _jit_feed(*nnx.split(model), state, jnp.asarray(tokens, jnp.int32), config)


def generate(
    model: Decoder, token_ids: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, "B"], config: DecodeConfig, key: PRNGKeyArray | None = None
) -> DecodeState:
    """Decodes until every sequence has written `<eos>` or `config.max_new_tokens`, in one compiled loop."""
    state = prefill(model, token_ids, lengths, config, key)
    return _jit_run(*nnx.split(model), state, jnp.int32(config.max_new_tokens), config)


def compile_generate(model: Decoder, token_ids: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, "B"], config: DecodeConfig) -> None:
    """Compiles what `generate` runs for prompts of this shape, so that its next call can be timed."""
    jax.block_until_ready(_jit_run(*nnx.split(model), prefill(model, token_ids, lengths, config), jnp.int32(0), config))


class Chunk(NamedTuple):
    """New tokens of every sequence, as they stream; padding after a sequence's end."""

    tokens: np.ndarray  # int32 [B, C]
    num_attended: np.ndarray  # int32 [B, C], 0 where padding


def stream(
    model: Decoder,
    token_ids: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, "B"],
    config: DecodeConfig,
    key: PRNGKeyArray | None = None,
    *,
    chunk_tokens: int = 8,
) -> Iterator[Chunk]:
    """The tokens that `generate` would give, `chunk_tokens` at a time as they are decoded."""
    state = prefill(model, token_ids, lengths, config, key)
    graph, params = nnx.split(model)
    seen = 0
    while seen < config.max_new_tokens:
        state = _jit_run(graph, params, state, jnp.int32(min(seen + chunk_tokens, config.max_new_tokens)), config)
        steps, finished = int(state.num_steps), bool(jnp.all(state.done))
        if steps > seen:
            yield Chunk(np.asarray(state.new_tokens[:, seen:steps]), np.asarray(state.num_attended[:, seen:steps]))
        if finished:
            return
        seen = steps
