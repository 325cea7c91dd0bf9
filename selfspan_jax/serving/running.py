"""The running state and its two compiled programs: one reads prompts into places of it, one decodes a chunk.

Places, lengths and pages are traced, so that nothing is compiled anew whatever comes and goes. Both programs donate the state; the
device runs them in the order in which the host gives them, so that the host may give pages away before the device is done with them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from selfspan_jax.attention.policies import get_policy, masks_of_prompts
from selfspan_jax.config import DecodeConfig, SamplingFields
from selfspan_jax.decoding.cache import KVCache, attend_prompts
from selfspan_jax.decoding.sampling import mark_occurring
from selfspan_jax.decoding.state import DecodeState, sample_step
from selfspan_jax.parallel import layout
from selfspan_jax.serving.device_pages import PagedCache, buffer_rows
from selfspan_jax.serving.host_pages import PagedWorkingSets
from selfspan_jax.spans import SpanState

HostArray = Array | np.ndarray  # NumPy's from the host, JAX's in a program
_STATE = DecodeState.partition_specs()
_STATE = dataclasses.replace(_STATE, cache=PagedCache(_STATE.cache.pools, _STATE.cache.slot_table))
# In place of tokens, which the host keeps, and of a cache. Not arrays of no elements: XLA (of JAX 0.11.2) makes those constants, and its
# partitioner for several GPUs then finds no shardings of a `shard_map`'s inputs, and ends with a segmentation fault where some input is
# not used.
_NONE: Any = None


class Prompts(NamedTuple):
    """A part of R prompts, which begins at the same token of each. A row of length 0 is no prompt."""

    token_ids: Int[HostArray, "R S"]  # from token 0 on; S is at least `first` + Q
    first: Int[HostArray, ""]  # the first of the Q tokens that are read now; those before are in the pages
    lengths: Int[HostArray, "R"]  # tokens of each prompt up to the end of this part
    pages: Int[HostArray, "R A/page"]  # -1 where there is none
    sources: Int[HostArray, "B"]  # the row that takes each place of the state, because its prompt ends here; -1 for none
    num_new: Int[HostArray, "R"]  # how many of the tokens were sampled: of sequences that are read again
    seeds: UInt[HostArray, "R 3"]  # a seed's upper and lower half, and the number of the sequence among those of the seed


class LogProbs(NamedTuple):
    """Log-probabilities of the model, before temperature and filters: of the token that was taken, and of the L most likely ones."""

    taken: Float[HostArray, "C B"]
    likeliest_ids: Int[HostArray, "C B L"]
    likeliest: Float[HostArray, "C B L"]


class Decoded(NamedTuple):
    """What a chunk of C steps gave."""

    token_ids: Int[Array, "B C"]
    num_attended: Int[Array, "B C"]  # 0 where a sequence took no token
    done: Bool[Array, "B"]
    logprobs: LogProbs | None = None
    host_rows: Int[Array, "2"] | None = None
    """Rows that were copied from host memory, and rows that were read there; None where all are on the device."""


@functools.partial(jax.jit, static_argnames=("graph", "config", "num_rows", "num_sequences", "capacity"))
def empty_state(graph, params, config: DecodeConfig, num_rows: int, num_sequences: int, capacity: int) -> DecodeState:
    """Allocate the state of B sequences with room for A tokens each, none of them running, and pools of `num_rows` rows."""

    def empty(model):
        none = jnp.zeros(num_sequences, jnp.int32)
        table = jnp.full((num_sequences, capacity), num_rows, jnp.int32)
        pools = KVCache.empty(model.config, jnp.zeros(1, jnp.int32), num_rows, num_samples=1, new_capacity=0).pools
        span = SpanState.of_prefix(jnp.zeros((num_sequences, 1), jnp.int32), none, model.vocab, capacity, model.config.header_view)
        return DecodeState(
            cache=PagedCache(pools, table),
            span=span,
            slots=get_policy(config.attention).initial_slots(table),
            hidden=jnp.zeros((num_sequences, model.config.hidden_size), model.config.compute_dtype),
            logits=jnp.zeros((num_sequences, model.vocab_size), jnp.float32),
            done=jnp.ones(num_sequences, bool),
            num_new=none,
            new_tokens=_NONE,
            num_attended=_NONE,
            keys=sequence_keys_of(jnp.zeros((num_sequences, 3), jnp.uint32)),
            occurred=jnp.zeros((num_sequences, model.vocab_size), bool),
        )

    return graph.shard_map(empty, out_specs=_STATE)(params)


@functools.partial(jax.jit, static_argnames=("graph", "config", "page_tokens", "num_queries", "responses"), donate_argnames=("state",))
def read_prompts(
    graph, params, state: DecodeState, prompts: Prompts, config: DecodeConfig, page_tokens: int, num_queries: int, responses: bool
) -> DecodeState:
    """Read Q = `num_queries` tokens of each of R prompts; those that end there take their places in the state.

    Keys and values of the tokens before are copied from the pages, so that a part needs nothing of the part before but these.

    Args:
      responses: some of them go on after `<solve>`.
    """

    def read(model, state, prompts):
        batch, num_keys = prompts.token_ids.shape
        cache = _cache_of(state)
        capacity, num_rows = state.cache.slot_table.shape[1], state.cache.pools[0][-1].shape[0]
        policy, first = get_policy(config.attention), prompts.first
        table = slot_table_of(prompts.pages, page_tokens, num_rows)
        slots = jnp.pad(table, ((0, 0), (0, num_keys)), constant_values=num_rows)[:, :num_keys]
        positions = jnp.broadcast_to(first + jnp.arange(num_queries, dtype=jnp.int32), (batch, num_queries))
        tokens, own = (jax.lax.dynamic_slice_in_dim(x, first, num_queries, axis=1) for x in (prompts.token_ids, slots))
        own = jnp.where(positions < prompts.lengths[:, None], own, num_rows)
        masks = masks_of_prompts(policy, prompts.token_ids, prompts.lengths, model.vocab, model.config, responses=responses)
        mask = masks(first, num_queries)
        buffer_slots = buffer_rows(batch, num_keys)[:, :num_queries] + first
        attend = cache.attend_prompts(slots, own, prompts, attend_prompts(buffer_slots, lambda *_: mask))
        hidden, pools = model(tokens, positions, attend, state.cache.pools)
        at = jnp.clip(prompts.lengths - 1 - first, 0, num_queries - 1)
        last = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
        token_ids = prompts.token_ids[:, :capacity]
        inside = jnp.arange(token_ids.shape[1], dtype=jnp.int32)[None, :] < prompts.lengths[:, None]
        newcomers = DecodeState(
            cache=_NONE,
            span=SpanState.of_prefix(token_ids, prompts.lengths, model.vocab, capacity, model.config.header_view),
            slots=policy.initial_slots(table),
            hidden=last,
            logits=model.logits(last),
            done=jnp.zeros(batch, bool),
            num_new=prompts.num_new,
            new_tokens=_NONE,
            num_attended=_NONE,
            keys=sequence_keys_of(prompts.seeds),
            occurred=mark_occurring(jnp.zeros((batch, model.vocab_size), bool), token_ids, inside, model.vocab),
        )

        def put(running, new):  # no scatter: those take long to compile
            taken = (prompts.sources >= 0).reshape(-1, *(1,) * (running.ndim - 1))
            return jnp.where(taken, jnp.take(new, jnp.maximum(prompts.sources, 0), axis=0), running)

        joined = jax.tree.map(put, dataclasses.replace(state, cache=_NONE), newcomers)
        return dataclasses.replace(joined, cache=cache.joined(pools, table, newcomers.span, prompts, model.vocab))

    return graph.shard_map(read, _STATE, layout.REPLICATED, out_specs=_STATE)(params, state, prompts)


@functools.partial(jax.jit, static_argnames=("graph", "config", "page_tokens", "num_steps", "num_logprobs"), donate_argnames=("state",))
def decode_chunk(
    graph,
    params,
    state: DecodeState,
    pages: Int[Array, "B A/page"],
    until: Int[Array, "B"],
    sampling: SamplingFields,
    config: DecodeConfig,
    page_tokens: int,
    num_steps: int,
    num_logprobs: int,
) -> tuple[DecodeState, Decoded]:
    """Decode `num_steps` tokens of every sequence that has not ended, up to `until` new tokens of each; 0 leaves one as it is.

    A loop of known length, which the host queues without waiting.

    Args:
      num_logprobs: L, how many likely tokens there is a log-probability of; 0: none, nor of the token itself.
    """

    def decode(model, state, pages, until, sampling):
        table = slot_table_of(pages, page_tokens, state.cache.pools[0][-1].shape[0])
        cache, slots = _cache_of(state).begun(table, state.span, state.is_active(until), num_steps), state.slots
        if slots.kept is None or not cache.is_resident:  # a copy of the table, which has grown; or rows that are used again
            slots = get_policy(config.attention).initial_slots(cache.slot_table)

        begun = dataclasses.replace(
            state,
            cache=slots.prepared(cache),
            slots=slots,
            occurred=None if sampling.repetition_penalty is None else state.occurred,
            new_tokens=jnp.full((len(until), num_steps), model.vocab.pad_id, jnp.int32),
            num_attended=jnp.zeros((len(until), num_steps), jnp.int32),
        )

        def step(before, number):
            state = sample_step(model, before, until, None, config, sampling=sampling, first=begun.num_new)
            return state, logprobs_of(before.logits, state.new_tokens[:, number], num_logprobs) if num_logprobs else None

        ended, logprobs = jax.lax.scan(step, begun, jnp.arange(num_steps, dtype=jnp.int32))
        host_rows = _cache_of(ended).host_rows_since(state.cache)
        decoded = Decoded(ended.new_tokens, ended.num_attended, ended.done, logprobs, host_rows)
        occurred = state.occurred if ended.occurred is None else ended.occurred
        pools = tuple(layer[: len(own)] for layer, own in zip(ended.cache.pools, state.cache.pools))  # without what slots had prepared
        ended = dataclasses.replace(ended, cache=dataclasses.replace(ended.cache, pools=pools))
        return dataclasses.replace(ended, occurred=occurred, new_tokens=state.new_tokens, num_attended=state.num_attended), decoded

    arrays = (layout.REPLICATED,) * 3
    return graph.shard_map(decode, _STATE, *arrays, out_specs=(_STATE, layout.REPLICATED))(params, state, pages, until, sampling)


def _cache_of(state: DecodeState) -> PagedCache | PagedWorkingSets:
    return cast("PagedCache | PagedWorkingSets", state.cache)


def slot_table_of(pages: Int[Array, "B A/page"], page_tokens: int, num_rows: int) -> Int[Array, "B A"]:
    """List the pool row of each token; `num_rows`, which is outside, where there is no page."""
    first = jnp.where(pages < 0, num_rows, pages * page_tokens)
    row = first[:, :, None] + jnp.arange(page_tokens, dtype=jnp.int32)[None, None, :]
    return jnp.minimum(row, num_rows).reshape(pages.shape[0], -1)


def sequence_keys_of(seeds: UInt[Array, "R 3"]) -> Array:
    """Make keys [R]: those that `sequence_keys` derives from the key of a seed of 64 bits."""
    high, low, number = seeds[:, 0], seeds[:, 1], seeds[:, 2]
    keys = jax.vmap(jax.random.key)(low)
    keys = jnp.where(high > 0, jax.vmap(jax.random.fold_in)(keys, high), keys)
    return jax.vmap(jax.random.fold_in)(keys, number)


def logprobs_of(logits: Float[Array, "B V"], token_ids: Int[Array, "B"], number: int) -> LogProbs:
    """Compute the log-probabilities of a step's tokens, and of the `number` most likely ones."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    likeliest, ids = jax.lax.top_k(logprobs, number)
    return LogProbs(jnp.take_along_axis(logprobs, token_ids[:, None], axis=1)[:, 0], ids, likeliest)
