"""Prompts in host memory: an engine whose sequences have a working set of rows on the GPU, filled as the model names labels.

The rows of a prompt are written to pinned host memory, layer by layer as it is read, and stay there. On the GPU each sequence has W rows
for tokens that it reads, and the rows of its latest new tokens; those before are written to host memory too. What every step reads is put
there first: label 0, and where headers read it the table of contents. A header that opens or names a label says, before any token that
uses it and for all layers at once, what is to be read: tokens of that label without a row get one, taken from the least recently named
labels that are not in use, and the rows are copied within the step: those of a layer while the layer before computes. Body tokens read
the GPU alone. A sequence that names more than the link brings within a step waits for the rest of its rows, and the others go on.

What finds no place (a working set too small for what is named) and what is read only once (headers that see the whole prompt, other
policies) is read from host memory by the attention kernel itself. So what is computed never depends on what is where.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.span_decode import unsupported_reason
from selfspan_jax.attention.policies import get_policy
from selfspan_jax.config import WORKING_SET_TOKENS, DecodeConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.state import DecodeState, bucket, start_state
from selfspan_jax.errors import UserError
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import memory
from selfspan_jax.tiers.cache import TieredCache, new_host_rows
from selfspan_jax.tiers.prefill import read_to_host
from selfspan_jax.tiers.working_sets import always_read

LINK_SHARE = 32  # a step copies rows of at most the weights' bytes by this, which the link brings in the time of a step, ...
MIN_LINK_BYTES = 1 << 24  # ... or of so many: a step of a small model takes longer than its weights do
NEW_TOKENS = 1024  # of a sequence that are on the device; when there are as many, they are written to the host


def check_working_sets(sequences: int, width: int, new_rows: int, row_bytes: int, most_bytes: int) -> None:
    """Raise DoesNotFit where working sets and the latest new tokens of the sequences exceed what the device has for them."""
    if (needed := sequences * (width + new_rows) * row_bytes) > most_bytes:
        raise memory.DoesNotFit(
            f"does not fit: on the device {width} tokens of a working set and {new_rows} of the latest for each of {sequences} sequences "
            f"take {needed / 2**30:.1f} GiB, it has {max(0, most_bytes) / 2**30:.1f} for them: give a smaller working_set_tokens, or "
            "fewer sequences (of a server: --slots)"
        )


class HostEngine(Engine):
    """An engine that keeps prompts in host memory; other methods and arguments as for `Engine`.

    Args:
      working_set_tokens: rows on the GPU for the prompt of each sequence. Half of them at most hold what every step reads.
      read: what reads prompts.

    Raises: UserError for a working set of fewer than 2 rows, and for a decoder that the attention kernel cannot take.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        working_set_tokens: int = WORKING_SET_TOKENS,
        steps_per_sync: int | None = None,
        read: Callable = read_to_host,
    ):
        super().__init__(model, steps_per_sync=steps_per_sync)
        if working_set_tokens < 2:
            raise UserError(f"working_set_tokens is {working_set_tokens}; allowed: 2 and above")
        self.working_set_tokens, self._read = working_set_tokens, read
        config = model.config
        self.rows_per_step = -(-max(memory.bytes_of(self.params) // LINK_SHARE, MIN_LINK_BYTES) // config.row_bytes)
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

    def _waiting(self, state: DecodeState) -> DecodeState:
        """Let sequences wait for rows beyond those that the link brings within a step."""
        cache = dataclasses.replace(cast(TieredCache, state.cache), most_rows=jnp.int32(self.rows_per_step))
        return dataclasses.replace(state, cache=cache)

    def extend(self, state, config, limit_tokens):
        """Write the rows of new tokens to host memory, so that their place on the device is free; where there is none, take more of it."""
        if (num_steps := self._num_new(state)) == super().room(num_steps, state):
            kept, pools = dataclasses.replace(state, cache=dataclasses.replace(state.cache, pools=())), state.cache.pools
            state = super().extend(kept, config, limit_tokens)
            cache = cast(TieredCache, state.cache)
            rows, sequences = cache.host_capacity, len(cache.prompt_tokens)
            both = rows + len(pools[0][2])  # the old pools are there until the new ones are filled
            memory.take_host_memory(both * self.config.row_bytes, f"rows of {sequences} sequences, which are moved to make room,")
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
            state = super().run(self._waiting(state), config, until=min(until, room), forced_tokens=forced_tokens)
            if room >= until or not jnp.any(state.is_active(jnp.int32(until))):
                return state

    def lower_run(self, state, config, *, forced_tokens=None):
        return super().lower_run(self._waiting(state), config, forced_tokens=forced_tokens)

    def step(self, state, tokens, config):
        state, _ = self._with_room(state, config, super().room(0, state))
        state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, most_rows=None))  # every sequence takes its token
        return super().step(state, tokens, config)

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
        (batch, capacity), sequences, row_bytes = token_ids.shape, num_samples * len(token_ids), self.config.row_bytes
        width, new_rows = min(self.working_set_tokens, capacity), min(config.max_new_tokens, NEW_TOKENS)
        free_rows = new_host_rows(config.max_new_tokens, new_rows, sequences)
        if (most := memory.device_memory_bytes()) is not None:
            check_working_sets(sequences, width, new_rows, row_bytes, most - memory.bytes_of(self.params))
        memory.take_host_memory((batch * capacity + free_rows) * row_bytes, f"rows of {batch} prompts of up to {capacity} tokens")
        host, last = self._read(self.graph.decoder(self.params), token_ids, lengths, config, responses, free_rows)
        return _start(self.graph, self.params, host, last, token_ids, lengths, keys, config, num_samples, width, new_rows)

    def compile(self, batch_size, prompt_tokens, config):
        """Compile what `generate` runs, by running it once: memory is taken for it."""
        tokens = jnp.zeros((batch_size, prompt_tokens), jnp.int32)
        state = self.prefill(jax.device_get(tokens), jax.device_get(jnp.full(batch_size, prompt_tokens, jnp.int32)), config)
        jax.block_until_ready(self.run(state, config, until=0))


@functools.partial(jax.jit, static_argnames=("rows",))
def _grown(pool: Array, rows: int) -> Array:
    """Copy a host pool into a larger one, by way of the device."""
    pool = jax.device_put(pool, jax.memory.Space.Device)
    return jax.device_put(jnp.pad(pool, ((0, rows - len(pool)), (0, 0), (0, 0))), jax.memory.Space.Host)


@functools.partial(jax.jit, static_argnames=("graph", "config", "num_samples", "width", "new_rows"), donate_argnames=("host",))
def _start(
    graph, params, host, last, token_ids, lengths, keys, config: DecodeConfig, num_samples: int, width: int, new_rows: int
) -> DecodeState:
    """Make the state after prompts that are in the host's pools, with a working set of what every step reads."""
    model, capacity = graph.decoder(params), token_ids.shape[1]
    cache = TieredCache.of_prompts(host, lengths, capacity, num_samples, width, new_rows, config.max_new_tokens)
    state = start_state(model, cache, last, token_ids, lengths, keys, config, num_samples)
    if state.slots.kept is None:
        return state
    always = always_read(state.span, jnp.repeat(token_ids, num_samples, axis=0), model.vocab)
    cache = cache.pin(always, jnp.ones(len(always), bool)).with_copies()
    # And what the open step of a prompt that ends within its response reads.
    cache = cache.placed(state.span, state.span.is_response).with_copies()
    return dataclasses.replace(state, cache=dataclasses.replace(cache, copied=jnp.zeros_like(cache.copied)))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _write_out(state: DecodeState, config: DecodeConfig) -> DecodeState:
    """Write the rows of new tokens to the host's pools; what the open step reads of them comes back to the working set."""
    cache, span = cast(TieredCache, state.cache).written_out(), state.span
    slots = get_policy(config.attention).initial_slots(cache.slot_table)
    if slots.kept is not None:
        cache = cache.placed(span, span.is_response & ~state.done).with_copies()
    return dataclasses.replace(state, cache=cache, slots=slots)
