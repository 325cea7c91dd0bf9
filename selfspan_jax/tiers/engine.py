"""Prompts in host memory: an engine whose sequences have a working set of rows on the GPU, filled as the model names labels.

The rows of a prompt are written to pinned host memory, layer by layer as it is read, and stay there. On the GPU each sequence has W rows
for tokens that it reads, and the rows of its latest new tokens; those before are written to host memory too. What every step reads is put
there first: label 0, and where headers read it the table of contents. A header that opens or names a label says, before any token that
uses it and for all layers at once, what is to be read: tokens of that label without a row get one, taken from the least recently named
labels that are not in use, and the rows are copied within the step: those of a layer while the layer before computes. Body tokens read
the GPU alone.

What finds no place (a working set too small for what is named) and what is read only once (headers that see the whole prompt, other
policies) is read from host memory by the attention kernel itself. So what is computed never depends on what is where.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.span_decode import unsupported_reason
from selfspan_jax.attention.policies import get_policy
from selfspan_jax.config import WORKING_SET_TOKENS, DecodeConfig, ModelConfig
from selfspan_jax.decoding.cache import ROW_MULTIPLE
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.state import DecodeState, bucket, for_each_chunk, start_state
from selfspan_jax.errors import UserError
from selfspan_jax.model import Decoder, rotary_angles
from selfspan_jax.parallel import memory
from selfspan_jax.spans import SpanVocab
from selfspan_jax.tiers.working_sets import WorkingSets, always_read

NEW_TOKENS = 1024  # of a sequence that are on the device; when there are as many, they are written to the host
READ_TOKENS = 1 << 17  # of prompts that are read together: their hidden states and one layer's rows are on the GPU


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TieredCache(WorkingSets):
    """The working sets of an engine's sequences. Behind them each sequence has `new_rows` rows on the device for its latest new tokens.

    Samples of a prompt share its rows in host memory.
    """

    prompt_tokens: Int[Array, "B"]
    first_new: Int[Array, ""]  # how many new tokens of each sequence were written there
    new_rows: int = dataclasses.field(metadata={"static": True})
    prompt_rows: int = dataclasses.field(metadata={"static": True})  # of the host's pools; those of new tokens follow
    new_capacity: int = dataclasses.field(metadata={"static": True})  # new tokens of a sequence that the tables have columns for

    @classmethod
    def tables(cls, prompt_tokens: Int[Array, "B"], capacity: int, width: int, new_rows: int, prompt_rows: int) -> tuple[Array, Array]:
        """Compute [B, capacity] of the tokens of a sequence: of new ones their rows on the device, and in host memory."""
        sequence = jnp.arange(len(prompt_tokens), dtype=jnp.int32)[:, None]
        new_token = jnp.arange(capacity, dtype=jnp.int32)[None, :] - prompt_tokens[:, None]
        of_chunk = sequence * new_rows + new_token % new_rows
        return len(prompt_tokens) * width + of_chunk, prompt_rows + new_token // new_rows * len(prompt_tokens) * new_rows + of_chunk

    @property
    def free_rows(self) -> int:
        """Rows of the host's pools for new tokens, which are written there as soon as there are more than the device has room for."""
        return host_rows_of(self.new_capacity, self.new_rows, len(self.prompt_tokens))

    def extended(self, num_tokens, new_capacity):
        """Make room in the tables, as `KVCache.extended`."""
        (_, capacity), added = self.slot_table.shape, ((0, 0), (0, new_capacity))
        tables = self.tables(self.prompt_tokens, capacity + new_capacity, self.owner.shape[1], self.new_rows, self.prompt_rows)
        old = jnp.arange(capacity + new_capacity)[None, :] < capacity
        table, rows = (jnp.where(old, jnp.pad(x, added), new) for x, new in zip((self.slot_table, self.host_rows), tables))
        return dataclasses.replace(self, slot_table=table, host_rows=rows, new_capacity=self.new_capacity + new_capacity)


def host_rows_of(new_capacity: int, new_rows: int, sequences: int) -> int:
    """Count the rows in host memory for new tokens: whole chunks, or none where the device has room for all."""
    return 0 if new_capacity <= new_rows else -(-new_capacity // new_rows) * new_rows * sequences


def check_working_sets(sequences: int, rows: int, row_bytes: int, most_bytes: int) -> None:
    """Raise DoesNotFit where so many rows of each sequence exceed what the device has for them."""
    if (needed := sequences * rows * row_bytes) > most_bytes:
        raise memory.DoesNotFit(
            f"does not fit: {rows} rows on the device for each of {sequences} sequences take {needed / 2**30:.1f} GiB, it has "
            f"{max(0, most_bytes) / 2**30:.1f} for them: give a smaller working_set_tokens, or fewer sequences"
        )


class HostEngine(Engine):
    """An engine that keeps prompts in host memory; other methods and arguments as for `Engine`.

    Args:
      working_set_tokens: rows on the GPU for the prompt of each sequence. Half of them at most hold what every step reads.

    Raises: UserError for a working set of fewer than 2 rows, and for a decoder that the attention kernel cannot take.
    """

    def __init__(self, model: Decoder, *, working_set_tokens: int = WORKING_SET_TOKENS, steps_per_sync: int | None = None):
        super().__init__(model, steps_per_sync=steps_per_sync)
        if working_set_tokens < 2:
            raise UserError(f"working_set_tokens is {working_set_tokens}; allowed: 2 and above")
        self.working_set_tokens = working_set_tokens
        config = model.config
        if config.mask == "memory":
            raise UserError("kv_memory is 'host', but the model's layers have a memory, which lies on the device; allowed: 'device'")
        q, pool = (
            jax.ShapeDtypeStruct((1, heads, config.head_size), config.compute_dtype) for heads in (config.num_heads, config.num_kv_heads)
        )
        if jax.default_backend() == "gpu" and (reason := unsupported_reason("triton", q, pool)):  # type: ignore[arg-type]
            raise UserError(f"kv_memory is 'host', which needs the Triton kernel: {reason}")

    def generate(self, token_ids, lengths, config, key=None, *, limit_tokens=None, **samples):
        return super().generate(token_ids, lengths, self._sized(token_ids, config, limit_tokens), key, limit_tokens=limit_tokens, **samples)

    def stream(self, token_ids, lengths, config, key=None, *, limit_tokens=None, **options):
        return super().stream(token_ids, lengths, self._sized(token_ids, config, limit_tokens), key, limit_tokens=limit_tokens, **options)

    def _sized(self, token_ids, config: DecodeConfig, limit_tokens: int | None) -> DecodeConfig:
        """Take responses to be as long as prompts: room for so many takes host memory at once, and no rows on the device."""
        likely = max(bucket(token_ids.shape[1]), NEW_TOKENS)
        return dataclasses.replace(config, max_new_tokens=max(config.max_new_tokens, min(limit_tokens or 0, likely)))

    def room(self, num_steps, state):
        new_rows = cast(TieredCache, state.cache).new_rows
        return min(super().room(num_steps, state), (num_steps // new_rows + 1) * new_rows)

    def extend(self, state, config, limit_tokens):
        """Write the rows of new tokens to host memory, so that their place on the device is free; where there is none, take more of it."""
        if (num_steps := self._num_new(state)) == super().room(num_steps, state):
            kept, pools = dataclasses.replace(state, cache=dataclasses.replace(state.cache, pools=())), state.cache.pools
            state = super().extend(kept, config, limit_tokens)
            cache = cast(TieredCache, state.cache)
            rows = cache.prompt_rows + cache.free_rows
            memory.take_host_memory(rows * self.config.row_bytes, f"rows of {len(cache.prompt_tokens)} sequences")
            pools = tuple((*layer[:2], *(_grown(pool, rows) for pool in layer[2:])) for layer in pools)
            state = dataclasses.replace(state, cache=dataclasses.replace(cache, pools=pools))
        cache = cast(TieredCache, state.cache)
        return _write_out(state, config) if num_steps == int(cache.first_new) + cache.new_rows else state

    def _num_new(self, state: DecodeState) -> int:
        return int(jnp.max(state.span.num_tokens - cast(TieredCache, state.cache).prompt_tokens))

    def run(self, state, config, *, until=None, forced_tokens=None):
        most = super().room(0, state)
        until = most if until is None else min(until, most)
        while True:
            state, room = self._with_room(state, config, until)
            state = super().run(state, config, until=min(until, room), forced_tokens=forced_tokens)
            if room >= until or not jnp.any(state.is_active(jnp.int32(until))):
                return state

    def step(self, state, tokens, config):
        return super().step(self._with_room(state, config, super().room(0, state))[0], tokens, config)

    def _with_room(self, state: DecodeState, config: DecodeConfig, until: int) -> tuple[DecodeState, int]:
        """Return a state with rows for another token, and how many tokens there may then be."""
        cache = cast(TieredCache, state.cache)
        if until <= cache.new_rows:
            return state, until
        num_steps = self._num_new(state)
        if num_steps < until and num_steps == self.room(int(cache.first_new), state):
            state = self.extend(state, config, until)
        return state, self.room(num_steps, state)

    def _read_prompts(self, token_ids, lengths, keys, config, num_samples, responses):
        (batch, capacity), new_rows, row_bytes = token_ids.shape, min(config.max_new_tokens, NEW_TOKENS), self.config.row_bytes
        free_rows, width = host_rows_of(config.max_new_tokens, new_rows, num_samples * batch), min(self.working_set_tokens, capacity)
        if (most := memory.device_memory_bytes()) is not None:
            check_working_sets(num_samples * batch, width + new_rows, row_bytes, most - memory.bytes_of(self.params))
        memory.take_host_memory((batch * capacity + free_rows) * row_bytes, f"rows of {batch} prompts of up to {capacity} tokens")
        host, last = self._read(token_ids, lengths, config, responses, free_rows)
        return _start(self.graph, self.params, host, last, token_ids, lengths, keys, config, num_samples, width, new_rows)

    def _read(self, token_ids, lengths, config, responses, free_rows: int) -> tuple[tuple[tuple[Array, Array], ...], Array]:
        """Read prompts, some at a time, each group layer by layer; return the host's pools, with so many free rows, and the last states."""
        batch, capacity = token_ids.shape
        group = max(number for number in range(1, batch + 1) if batch % number == 0 and (number == 1 or number * capacity <= READ_TOKENS))
        decoder = self.graph.decoder(self.params)
        layers = [nnx.split(layer) for layer in decoder.layers]
        # One group that fills pools makes them; otherwise each writes its part.
        fills = group == batch and not free_rows
        pools: list[Any] = [None if fills else empty_host_pools(self.config, batch * capacity + free_rows) for _ in layers]
        last = []
        for start in range(0, batch, group):
            some, first = (token_ids[start : start + group], lengths[start : start + group]), jnp.int32(start * capacity)
            x = _embed(*nnx.split(decoder.embed_tokens), some[0], self.config)
            for index, (graph, params) in enumerate(layers):
                x, pools[index] = _read_layer(graph, params, x, pools[index], first, *some, self.vocab, self.config, config, responses)
            last.append(_last(*nnx.split(decoder.norm), x, some[1]))
        return tuple(pools), jnp.concatenate(last)

    def compile(self, batch_size, prompt_tokens, config):
        """Compile what `generate` runs, by running it once: memory is taken for it."""
        tokens = jnp.zeros((batch_size, prompt_tokens), jnp.int32)
        state = self.prefill(jax.device_get(tokens), jax.device_get(jnp.full(batch_size, prompt_tokens, jnp.int32)), config)
        jax.block_until_ready(self.run(state, config, until=0))


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
def empty_host_pools(config: ModelConfig, rows: int) -> tuple[Array, Array]:
    """Allocate keys and values of a layer in host memory."""
    pool = jnp.zeros((rows, config.num_kv_heads, config.head_size), jnp.dtype(config.compute_dtype))
    return jax.device_put((pool, pool), jax.memory.Space.Host)


@functools.partial(jax.jit, static_argnames=("rows",))
def _grown(pool: Array, rows: int) -> Array:
    """Copy a host pool into a larger one, by way of the device."""
    pool = jax.device_put(pool, jax.memory.Space.Device)
    return jax.device_put(jnp.pad(pool, ((0, rows - len(pool)), (0, 0), (0, 0))), jax.memory.Space.Host)


@functools.partial(jax.jit, static_argnames=("graph", "config"))
def _embed(graph, params, token_ids, config):
    return nnx.merge(graph, params)(token_ids).astype(config.compute_dtype)


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
    return nnx.merge(graph, params)(jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0])


@functools.partial(jax.jit, static_argnames=("graph", "config", "num_samples", "width", "new_rows"), donate_argnames=("host",))
def _start(
    graph, params, host, last, token_ids, lengths, keys, config: DecodeConfig, num_samples: int, width: int, new_rows: int
) -> DecodeState:
    """Make the state after prompts that are in the host's pools, with a working set of what every step reads."""
    model, (batch, capacity) = graph.decoder(params), token_ids.shape
    sequences, prompt_tokens = batch * num_samples, jnp.repeat(lengths, num_samples)
    sequence = jnp.arange(sequences, dtype=jnp.int32)[:, None]
    token = jnp.broadcast_to(jnp.arange(capacity + config.max_new_tokens, dtype=jnp.int32), (sequences, capacity + config.max_new_tokens))
    is_prompt, of_prompt = token < prompt_tokens[:, None], sequence // num_samples * capacity + token
    new_table, new_host = TieredCache.tables(prompt_tokens, token.shape[1], width, new_rows, batch * capacity)
    host_rows = jnp.where(is_prompt, of_prompt, new_host)
    table = jnp.where(is_prompt, -1 - of_prompt, new_table)
    rows = -(-sequences * (width + new_rows) // ROW_MULTIPLE) * ROW_MULTIPLE
    empty = jnp.zeros((rows, *host[0][0].shape[1:]), host[0][0].dtype)
    sizes = {"new_rows": new_rows, "prompt_rows": batch * capacity, "new_capacity": config.max_new_tokens}
    sets = {"host_rows": host_rows, "prompt_tokens": prompt_tokens, "first_new": jnp.int32(0), **TieredCache.nothing(sequences, width)}
    cache = TieredCache(tuple((empty, empty, *layer) for layer in host), table, **sets, **sizes)
    state = start_state(model, cache, last, token_ids, lengths, keys, config, num_samples)
    if state.slots.kept is None:
        return state
    repeated = jnp.repeat(token_ids, num_samples, axis=0)
    cache = cache.pin(always_read(state.span, repeated, model.vocab), jnp.ones(sequences, bool)).with_copies()
    # And what the open step of a prompt that ends within its response reads.
    cache = cache.placed(state.span, state.span.is_response).with_copies()
    return dataclasses.replace(state, cache=dataclasses.replace(cache, copied=jnp.zeros(sequences, jnp.int32)))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _write_out(state: DecodeState, config: DecodeConfig) -> DecodeState:
    """Write the rows of new tokens to the host's pools; what the open step reads of them comes back to the working set."""
    cache, span = cast(TieredCache, state.cache), state.span
    (sequences, capacity), number = cache.slot_table.shape, cache.new_rows
    new_token = jax.lax.broadcasted_iota(jnp.int32, (sequences, capacity), 1) - cache.prompt_tokens[:, None]
    written = (new_token >= cache.first_new) & (new_token < cache.first_new + number)
    first = cache.host_rows[0, cache.prompt_tokens[0] + cache.first_new]

    def write(layer):
        rows = tuple(jax.lax.slice_in_dim(pool, cache.owner.size, cache.owner.size + sequences * number) for pool in layer[:2])
        rows = jax.device_put(rows, jax.memory.Space.Host)
        return (*layer[:2], *(jax.lax.dynamic_update_slice_in_dim(pool, some, first, axis=0) for pool, some in zip(layer[2:], rows)))

    pools, table = tuple(map(write, cache.pools)), jnp.where(written, -1 - cache.host_rows, cache.slot_table)
    cache = dataclasses.replace(cache, pools=pools, slot_table=table, first_new=cache.first_new + number)
    slots = get_policy(config.attention).initial_slots(table)
    if slots.kept is not None:
        cache = cache.placed(span, span.is_response & ~state.done).with_copies()
    return dataclasses.replace(state, cache=cache, slots=slots)
