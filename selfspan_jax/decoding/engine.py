"""Decoding: one state, one pure step, two drivers.

`prefill` reads the prompts in chunks and makes a `DecodeState`; `feed` takes one token of every sequence through the
automaton and the model; a step chooses a token and feeds it. `run` takes steps in one compiled loop until all sequences have
ended; `generate` is `prefill` and `run`, `stream` runs the same loop in chunks. Nothing in a step depends on the host.

A model decodes with the parameters that it has: `Decoder.for_decoding` makes a copy in the compute dtype, or in int8.

On a mesh each device runs the same loop on its sequences and its kv heads. Row lists hold rows of its own pool. The devices
of one part of the batch add up two numbers a layer (`sharding`); those of different parts do not wait for each other.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from selfspan_jax.attention.sequences import attend_cached, masked_attention, rotated_heads, sequence_mask
from selfspan_jax.config import DecodeConfig, ModelConfig
from selfspan_jax.decoding.cache import KVCache, SlotList, write_rows
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import collectives, layout
from selfspan_jax.parallel.mesh import check_batch, check_decoding
from selfspan_jax.spans import SpanState, SpanVocab

_LEAST_CHUNK_TOKENS = 64  # of a prompt
_UNASKED_STEPS = 8  # that the loop takes on a GPU before it asks whether all sequences have ended


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
    keys: PRNGKeyArray  # [B]: what a sequence draws depends on no other

    @classmethod
    def places(cls) -> DecodeState:
        """Where a state lies on a mesh: specs in place of its parts."""
        each = layout.spec("sequences")
        same = dict.fromkeys((field.name for field in dataclasses.fields(cls)), each)
        cache = KVCache(pools=layout.spec("sequences", "heads"), table=each)  # type: ignore[arg-type]
        return cls(**same | {"cache": cache, "num_steps": layout.REPLICATED})  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames=("num_sequences",))
def sequence_keys(key: PRNGKeyArray | None, num_sequences: int) -> PRNGKeyArray:
    """A key for each sequence of a batch; of key 0 where none is given."""
    numbers = jnp.arange(num_sequences, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0) if key is None else key, numbers)


def bucket(num_tokens: int) -> int:
    """Room for a prompt: lengths are rounded up to few sizes (64 tokens and up, four to an octave), so that few are compiled."""
    step = max(_LEAST_CHUNK_TOKENS, 1 << max(0, num_tokens.bit_length() - 3))
    return -(-num_tokens // step) * step


def _chunk_tokens(batch: int, prompt_room: int, config: DecodeConfig) -> int:
    """Tokens of each prompt that go through the model at once: all of them, or a power of two that divides the room."""
    wanted = max(_LEAST_CHUNK_TOKENS, config.prefill_tokens // max(batch, 1))
    largest_divisor = prompt_room & -prompt_room
    return prompt_room if prompt_room <= wanted else min(largest_divisor, 1 << (wanted.bit_length() - 1))


def read_prompts(
    model: Decoder, token_ids: Int[Array, "b T"], lengths: Int[Array, "b"], keys: PRNGKeyArray, config: DecodeConfig, num_samples: int
) -> DecodeState:
    """Reads prompts, `lengths[b]` tokens of row b, and returns the state from which decoding goes on. Pure; for one device in jit."""
    batch, prompt_room = token_ids.shape
    capacity = prompt_room + config.max_new_tokens
    cache = KVCache.empty(model.config, lengths, prompt_room, num_samples, config.max_new_tokens)
    chunk = _chunk_tokens(batch, prompt_room, config)
    first_rows = jnp.arange(batch, dtype=jnp.int32)[:, None] * prompt_room

    def read_chunk(index, carry):
        pools, last = carry
        start = index * chunk
        positions = jnp.broadcast_to(start + jnp.arange(chunk, dtype=jnp.int32), (batch, chunk))
        mask = sequence_mask(
            token_ids,
            model.vocab,
            model.config,
            config.attention,
            sink_tokens=config.sink_tokens,
            window_tokens=config.window_tokens,
            first_query=start,
            num_queries=chunk,
        )

        def attend(qkv, angles, pools):
            q, k, v = rotated_heads(qkv, angles)
            pools = write_rows(pools, first_rows + positions, k, v)
            keys, values = (pool[: batch * prompt_room].reshape(batch, prompt_room, *pool.shape[1:]) for pool in pools)
            return masked_attention(q, keys, values, mask), pools

        tokens = jax.lax.dynamic_slice_in_dim(token_ids, start, chunk, axis=1)
        hidden, pools = model(tokens, positions, attend, pools)
        at = lengths - 1 - start
        here = jnp.take_along_axis(hidden, jnp.clip(at, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        return pools, jnp.where(((at >= 0) & (at < chunk))[:, None], here, last)

    carry = (cache.pools, jnp.zeros((batch, model.config.hidden_size), model.config.compute_dtype))
    pools, last = jax.lax.fori_loop(0, (jnp.max(lengths) + chunk - 1) // chunk, read_chunk, carry)

    def for_each_sample(x):
        return jnp.repeat(x, num_samples, axis=0)

    span = jax.tree.map(for_each_sample, SpanState.of_prefix(token_ids, lengths, model.vocab, capacity))
    none = jnp.zeros_like(span.ended)
    return DecodeState(
        cache=dataclasses.replace(cache, pools=pools),
        span=span,
        slots=_first_slots(cache.table, config),
        slots_extend=none,
        logits=for_each_sample(model.logits(last)),
        done=none,
        num_steps=jnp.zeros((), jnp.int32),
        new_tokens=jnp.full((none.size, config.max_new_tokens), model.vocab.pad_id, jnp.int32),
        num_attended=jnp.zeros((none.size, config.max_new_tokens), jnp.int32),
        keys=keys,
    )


def _first_slots(table: Int[Array, "B A"], config: DecodeConfig) -> SlotList:
    """Lists of the shape that the policy needs, no row of them in use."""
    counts = jnp.zeros(table.shape[0], jnp.int32)
    if config.attention == "dense":
        return SlotList(table, counts)  # for good: only the counts will grow
    window = min(table.shape[1], config.sink_tokens + config.window_tokens)
    width = window if config.attention == "window" else table.shape[1] + 1  # a column to spare, see `update_slots`
    return SlotList(jnp.zeros((table.shape[0], width), jnp.int32), counts)


def _slots(
    model: Decoder, state: DecodeState, span: SpanState, own: Int[Array, "B"], active: Bool[Array, "B"], config: DecodeConfig
) -> SlotList:
    """The rows that the token which made `span`, itself in row `own`, attends to."""
    table = state.cache.table
    if config.attention == "dense":
        return SlotList(state.slots.rows, span.num_tokens)
    if config.attention == "window":
        place = jnp.arange(state.slots.rows.shape[1], dtype=jnp.int32)[None, :]
        first_recent = jnp.maximum(span.num_tokens - config.window_tokens, config.sink_tokens)[:, None]
        token = jnp.where(place < config.sink_tokens, place, place - config.sink_tokens + first_recent)
        rows = jnp.take_along_axis(table, jnp.minimum(token, table.shape[1] - 1), axis=1)
        return SlotList(rows, jnp.minimum(span.num_tokens, config.sink_tokens + config.window_tokens))

    views = model.config
    visible = span.visible(header_view=views.header_view, prompt_view=views.prompt_view, prompt_window_tokens=views.prompt_window_tokens)
    extend = state.slots_extend & span.is_response & ~span.is_header
    return state.slots.updated(visible, table, own, rebuild=~extend & active, append=extend & active)


def _feed(model: Decoder, state: DecodeState, tokens: Int[Array, "B"], active: Bool[Array, "B"], config: DecodeConfig) -> DecodeState:
    """Takes one more token of every active sequence through the automaton and the model; the others change nothing."""
    advanced = state.span.advance(tokens, model.vocab)
    span = jax.tree.map(lambda old, new: jnp.where(_like(active, old), new, old), state.span, advanced)
    index = jnp.maximum(span.num_tokens - 1, 0)
    own = jnp.take_along_axis(state.cache.table, index[:, None], axis=1)[:, 0]
    slots = _slots(model, state, span, own, active, config)
    read = SlotList(slots.rows, jnp.where(active, slots.counts, 0))
    num_rows = state.cache.pools[0][0].shape[0]
    attend = attend_cached(jnp.where(active, own, num_rows), read, config.implementation)
    hidden, pools = model(tokens[:, None], index[:, None], attend, state.cache.pools, linear=config.linear)
    narrow_header = model.config.header_view == "span"
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, pools=pools),
        span=span,
        slots=slots,
        slots_extend=span.is_response & (~span.is_header | narrow_header),
        logits=jnp.where(active[:, None], model.logits(hidden[:, 0], linear=config.linear), state.logits),
        done=state.done | (active & (tokens == model.vocab.eos_id)),
    )


def _like(flags: Bool[Array, "B"], x: Array) -> Array:
    return flags.reshape(flags.shape + (1,) * (x.ndim - 1))


def choose(logits: Float[Array, "B V"], keys: PRNGKeyArray, config: DecodeConfig) -> Int[Array, "B"]:
    """The next tokens: the most likely ones, or each drawn with its key at a temperature from the nucleus of mass top_p (1904.09751)."""
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores = logits / config.temperature
    if config.top_p < 1:
        order = jnp.argsort(scores, axis=-1, descending=True)
        ranked = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1)
        mass_before = jnp.cumsum(ranked, axis=-1) - ranked
        kept = jnp.put_along_axis(jnp.zeros(scores.shape, bool), order, mass_before < config.top_p, axis=-1, inplace=False)
        scores = jnp.where(kept, scores, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def _step(model: Decoder, state: DecodeState, until: Int[Array, ""], forced: Int[Array, "B M"] | None, config: DecodeConfig) -> DecodeState:
    """Chooses the next token of every sequence and feeds it; changes nothing once `until` steps are done or all sequences are."""
    active = ~state.done & (state.num_steps < until)
    tokens = choose(state.logits, jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.num_steps), config)
    if forced is not None:
        given = jax.lax.dynamic_index_in_dim(forced, state.num_steps, axis=1, keepdims=False)
        tokens = jnp.where(given >= 0, given, tokens)
    tokens = jnp.where(active, tokens, model.vocab.pad_id)
    fed = _feed(model, state, tokens, active, config)
    return dataclasses.replace(
        fed,
        num_steps=state.num_steps + jnp.any(active).astype(jnp.int32),
        new_tokens=fed.new_tokens.at[:, state.num_steps].set(tokens, mode="drop"),
        num_attended=fed.num_attended.at[:, state.num_steps].set(jnp.where(active, fed.slots.counts, 0), mode="drop"),
    )


class _Structure:
    """A decoder without its parameters: what is static under jit. Hashed once, because the hash takes a millisecond.

    On a mesh it is one device's share of the decoder, and `places` says where the parameters lie.
    """

    def __init__(self, graph: nnx.GraphDef, tree: jax.tree_util.PyTreeDef, mesh: Mesh | None = None, places: tuple = ()):
        self._key = (graph, tree, mesh, places)
        self._hash = hash(self._key)
        self.mesh = mesh

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        return self is other or (isinstance(other, _Structure) and self._key == other._key)

    def decoder(self, params: Sequence[Array]) -> Decoder:
        graph, tree, *_ = self._key
        return nnx.merge(graph, jax.tree.unflatten(tree, params))

    def on_devices(self, compute: Callable, *inputs: Any, outputs: Any) -> Callable:
        """`compute(decoder, *arrays)` as a function of parameters and arrays; on a mesh on each device, of what it has of them."""
        places = self._key[3]
        return collectives.shard_map(lambda params, *arrays: compute(self.decoder(params), *arrays), self.mesh, (places, *inputs), outputs)


@dataclasses.dataclass(frozen=True)
class FrozenDecoder:
    """A decoder taken apart, so that each call of a compiled program need not do it again: some 10 ms for 32 layers."""

    config: ModelConfig
    vocab: SpanVocab
    vocab_size: int
    structure: _Structure
    params: tuple[Array, ...]

    @classmethod
    def of(cls, model: Decoder | FrozenDecoder, mesh: Mesh | None = None) -> FrozenDecoder:
        """The parameters as they are now, or shapes in their place; later changes to the model are not seen.

        Args:
          mesh: the devices to lay them out on.

        Raises: ValueError for a mesh that does not divide the decoder.
        """
        if isinstance(model, FrozenDecoder):
            return model
        graph, state = nnx.split(model)
        places: tuple = ()
        if mesh is not None:
            check_decoding(model.config, mesh)
            places = tuple(jax.tree.leaves(layout.parameter_specs(state)))
            state = layout.shard_params(state, mesh)
            graph, _ = nnx.split(model.shard(mesh))
        params, tree = jax.tree.flatten(state)
        return cls(model.config, model.vocab, model.vocab_size, _Structure(graph, tree, mesh, places), tuple(params))

    @property
    def mesh(self) -> Mesh | None:
        return self.structure.mesh

    @property
    def share(self) -> Decoder:
        """What one device has of it, as shapes: on a mesh its heads and features, else everything."""
        sizes = [jax.ShapeDtypeStruct(layout.shard_shape(leaf), leaf.dtype) for leaf in self.params]
        return self.structure.decoder(sizes)  # type: ignore[arg-type]


_EACH = layout.spec("sequences")


def prefill_on_devices(
    structure: _Structure, params: Any, token_ids: Int[Array, "b T"], lengths: Int[Array, "b"], keys: PRNGKeyArray, config: DecodeConfig,
    num_samples: int,
) -> DecodeState:  # fmt: skip
    """`read_prompts` of a decoder taken apart, on its mesh where it has one. Pure."""

    def read(model, *prompts):
        return read_prompts(model, *prompts, config, num_samples)

    return structure.on_devices(read, _EACH, _EACH, _EACH, outputs=DecodeState.places())(params, token_ids, lengths, keys)


_jit_prefill = jax.jit(prefill_on_devices, static_argnames=("structure", "config", "num_samples"))


@functools.partial(jax.jit, static_argnames=("structure", "config"), donate_argnames=("state",))
def _jit_feed(structure, params, state, tokens, config):
    def feed(model, state, tokens):
        return _feed(model, state, tokens, ~state.done, config)

    return structure.on_devices(feed, DecodeState.places(), _EACH, outputs=DecodeState.places())(params, state, tokens)


@functools.partial(jax.jit, static_argnames=("structure", "config", "unasked_steps"), donate_argnames=("state",))
def _jit_run(structure, params, state, until, forced, config, unasked_steps):
    """Steps until `num_steps == until` or all sequences are done.

    On a GPU each round of a while loop whose end is data waits for the host to read that data. So the loop asks every
    `unasked_steps` steps; between them it runs a loop of known length, which the host queues without waiting.
    """

    def steps(model, state, until, forced):
        def step(_, state):
            return _step(model, state, until, forced, config)

        state = jax.lax.while_loop(
            lambda state: (state.num_steps < until) & ~jnp.all(state.done),
            lambda state: step(None, state) if unasked_steps == 1 else jax.lax.fori_loop(0, unasked_steps, step, state),
            state,
        )
        return dataclasses.replace(state, num_steps=collectives.pmax_data(state.num_steps, structure.mesh))

    places = DecodeState.places()
    return structure.on_devices(steps, places, layout.REPLICATED, _EACH, outputs=places)(params, state, until, forced)


def _unasked_steps(num_steps: int) -> int:
    if jax.default_backend() != "gpu":
        return 1
    return max(divisor for divisor in range(1, _UNASKED_STEPS + 1) if num_steps % divisor == 0)


def check_ids(model: Decoder | FrozenDecoder, token_ids: Int[np.ndarray, "..."]) -> None:
    """Raises ValueError for ids outside the model's vocabulary."""
    if token_ids.size and not (0 <= token_ids.min() and token_ids.max() < model.vocab_size):
        raise ValueError(f"token ids from {token_ids.min()} to {token_ids.max()}; the model knows 0 to {model.vocab_size - 1}")


def check_prompts(
    model: Decoder | FrozenDecoder, token_ids: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, "B"], config: DecodeConfig
) -> None:
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
    model: Decoder | FrozenDecoder,
    token_ids: Int[np.ndarray, "b T"],
    lengths: Int[np.ndarray, "b"],
    config: DecodeConfig,
    key: PRNGKeyArray | None = None,
    *,
    num_samples: int = 1,
) -> DecodeState:
    """Reads prompts: the first `lengths[b]` tokens of each row, at least one; the rest of a row is ignored.

    Args:
      num_samples: sequences per prompt, next to each other in the state; they share the prompt's cache rows.

    Raises: ValueError for prompts that are empty, hold unknown ids, or leave no room for the new tokens.
    """
    check_prompts(model, token_ids, lengths, config)
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; allowed: 1 and above")
    room = bucket(token_ids.shape[1])
    token_ids = np.pad(token_ids, ((0, 0), (0, room - token_ids.shape[1])), constant_values=model.vocab.pad_id)
    frozen = FrozenDecoder.of(model)
    if frozen.mesh is not None:
        check_batch(len(lengths), frozen.mesh, "the number of prompts")
    prompts = jnp.asarray(token_ids, jnp.int32), jnp.asarray(lengths, jnp.int32)
    keys = sequence_keys(key, len(lengths) * num_samples)
    return _jit_prefill(frozen.structure, frozen.params, *prompts, keys, config, num_samples)


def feed(model: Decoder | FrozenDecoder, state: DecodeState, tokens: Int[np.ndarray, "B"], config: DecodeConfig) -> DecodeState:
    """The state after one given token in every sequence. The state handed in is donated."""
    frozen = FrozenDecoder.of(model)
    return _jit_feed(frozen.structure, frozen.params, state, jnp.asarray(tokens, jnp.int32), config)


def run(
    model: Decoder | FrozenDecoder,
    state: DecodeState,
    config: DecodeConfig,
    *,
    until: int | None = None,
    forced: Int[np.ndarray, "B M"] | None = None,
) -> DecodeState:
    """Decodes on until `until` tokens are chosen (default: all that there is room for) or every sequence has ended.

    One compiled loop. The state handed in is donated.

    Args:
      forced: tokens to write in place of the chosen ones, -1 where the choice stands; the work done is the same.
    """
    room = state.new_tokens.shape[1]
    until = room if until is None else min(until, room)
    given = None if forced is None else jnp.asarray(forced, jnp.int32)
    frozen = FrozenDecoder.of(model)
    return _jit_run(frozen.structure, frozen.params, state, jnp.int32(until), given, config, _unasked_steps(room))


def generate(
    model: Decoder | FrozenDecoder,
    token_ids: Int[np.ndarray, "b T"],
    lengths: Int[np.ndarray, "b"],
    config: DecodeConfig,
    key: PRNGKeyArray | None = None,
    *,
    num_samples: int = 1,
) -> DecodeState:
    """Decodes until every sequence has written `<eos>` or `config.max_new_tokens`, in one compiled loop."""
    model = FrozenDecoder.of(model)
    return run(model, prefill(model, token_ids, lengths, config, key, num_samples=num_samples), config)


def compile_generate(model: Decoder | FrozenDecoder, batch: int, prompt_tokens: int, config: DecodeConfig) -> None:
    """Compiles what `generate` runs for so many prompts of at most so many tokens, so that its next call can be timed.

    Nothing runs and no memory of the device is taken, so that several can be compiled at once.
    """
    frozen = FrozenDecoder.of(model)
    prompts = jax.ShapeDtypeStruct((batch, bucket(prompt_tokens)), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    lowered = _jit_prefill.lower(frozen.structure, frozen.params, *prompts, sequence_keys(None, batch), config, 1)
    places = lowered.compile().output_shardings

    def shape(x, place):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place if frozen.mesh else None)

    state = jax.tree.map(shape, lowered.out_info, places)
    until, steps = jnp.int32(config.max_new_tokens), _unasked_steps(config.max_new_tokens)
    _jit_run.lower(frozen.structure, frozen.params, state, until, None, config, steps).compile()


class Chunk(NamedTuple):
    """New tokens of every sequence, as they stream; padding after a sequence's end."""

    tokens: Int[np.ndarray, "B C"]
    num_attended: Int[np.ndarray, "B C"]  # 0 where padding


@functools.partial(jax.jit, static_argnames=("structure", "config", "size"), donate_argnames=("state",))
def _jit_chunk(structure, params, state, start, config, size):
    """`size` steps, and what a host needs to know of them.

    A loop of known length, even where all sequences end within it: the call returns as soon as the device has its orders.
    One whose end is data returns when the data is there, and the device then waits for the next call: 3 ms a chunk.
    """

    def steps(model, state, start):
        state = jax.lax.fori_loop(0, size, lambda _, state: _step(model, state, start + size, None, config), state)
        return dataclasses.replace(state, num_steps=collectives.pmax_data(state.num_steps, structure.mesh))

    places = DecodeState.places()
    state = structure.on_devices(steps, places, layout.REPLICATED, outputs=places)(params, state, start)
    tokens, attended = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (state.new_tokens, state.num_attended))
    return state, (tokens, attended, state.num_steps, jnp.all(state.done))


def stream(
    model: Decoder | FrozenDecoder,
    token_ids: Int[np.ndarray, "b T"],
    lengths: Int[np.ndarray, "b"],
    config: DecodeConfig,
    key: PRNGKeyArray | None = None,
    *,
    chunk_tokens: int = 8,
    num_samples: int = 1,
) -> Iterator[Chunk]:
    """The tokens that `generate` would give, `chunk_tokens` at a time as they are decoded.

    The device is always one chunk ahead, so that it does not wait while the host reads one.
    """
    model = FrozenDecoder.of(model)
    state = prefill(model, token_ids, lengths, config, key, num_samples=num_samples)
    waiting: collections.deque = collections.deque()
    for start in range(0, config.max_new_tokens, chunk_tokens):
        size = min(chunk_tokens, config.max_new_tokens - start)
        state, chunk = _jit_chunk(model.structure, model.params, state, jnp.int32(start), config, size)
        waiting.append((start, chunk))
        if len(waiting) > 1 and (yield from _emit(*waiting.popleft())):
            return
    for chunk in waiting:
        yield from _emit(*chunk)


def _emit(start: int, chunk) -> Generator[Chunk, None, bool]:
    """Yields what there is of a chunk; True when nothing follows it."""
    tokens, attended, num_steps, finished = map(np.asarray, chunk)
    if num_steps > start:
        yield Chunk(tokens[:, : num_steps - start], attended[:, : num_steps - start])
    return bool(finished)
