"""The decode state and its pure functions: `prefill_state` reads prompts, `decode_step` feeds a token, `sample_step` samples and feeds one.

They are written for one device; `Engine` compiles them, on a mesh for each device's shard.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pallas_kernels import per_sequence, read_elements, read_largest, write_elements
from pallas_kernels.prompt_attention import Retained
from selfspan_jax.attention.policies import AnySlots, get_policy, masks_of_prompts
from selfspan_jax.attention.selectors import prompt_mask
from selfspan_jax.config import AttentionViews, DecodeConfig, ModelConfig, SamplingFields
from selfspan_jax.decoding.cache import KVCache, attend_prompts
from selfspan_jax.decoding.sampling import mark_occurring, next_name, sample
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import collectives, context, layout
from selfspan_jax.spans import SpanState, SpanVocab

MIN_CAPACITY_TOKENS = 64  # of each prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that decoding B sequences carries from step to step: A tokens of room each, M of them new."""

    cache: KVCache
    span: SpanState  # the automaton after the tokens fed so far; span.num_tokens is the next rotary position
    slots: AnySlots  # what the latest token attended to
    hidden: Float[Array, "B D"]  # of the latest token, after the last norm
    logits: Float[Array, "B V"]  # of the next token
    done: Bool[Array, "B"]  # <eos> or a stop id was fed: the sequence no longer changes
    num_new: Int[Array, "B"]  # tokens sampled so far
    new_tokens: Int[Array, "B M"]  # these tokens, then padding
    num_attended: Int[Array, "B M"]  # how many tokens each of them attended to, itself included
    keys: PRNGKeyArray  # [B], one for each sequence
    occurred: Bool[Array, "B V"] | None = None  # where repetitions are penalized, the tokens of prompt and response

    def is_active(self, until: Int[Array, ""]) -> Bool[Array, "B"]:
        """Tell which sequences take tokens until they have so many."""
        return ~self.done & (self.num_new < until)

    def choices(self, views: AttentionViews, vocab: SpanVocab) -> tuple[Float[Array, "B V"], Int[Array, "B"] | None]:
        """Return the logits, without what the views rule out, and what is named in place of the likeliest tokens: see `next_name`."""
        span, latest, logits, ids = self.span, self.span.num_tokens[:, None] - 1, self.logits, jnp.arange(self.logits.shape[1])[None]
        if views.names_new:  # what <solve> named is still the first step's to name
            named = (span.step_index[:, None] == latest) & (span.last_named > span.solve_index[:, None] + 1)
            logits = jnp.where(jnp.pad(named, ((0, 0), (vocab.ref_base, ids.size - vocab.ref_base - vocab.num_labels))), -jnp.inf, logits)
        if views.max_step_tokens:  # then the step closes, another opens, or the response ends
            is_long = span.in_response[:, None] & (latest - span.step_index[:, None] >= views.max_step_tokens)
            logits = jnp.where(is_long & (ids != vocab.eos_id) & (vocab.label_of(ids, vocab.seg_base) < 0), -jnp.inf, logits)
        return logits, None if views.name_share >= 1 else next_name(logits, span.last_named == latest, views.name_share, vocab)

    @property
    def num_steps(self) -> Int[Array, ""]:
        """How many tokens the sequence has that has sampled most."""
        return jnp.max(self.num_new, initial=0)

    @classmethod
    def partition_specs(cls) -> DecodeState:
        """Return the PartitionSpec of every field."""
        rows = layout.spec("rows")  # of each device its own
        fields = dict.fromkeys((field.name for field in dataclasses.fields(cls)), layout.spec("sequences"))
        cache = KVCache(pools=layout.spec("rows", "heads"), slot_table=rows)  # type: ignore[arg-type]
        return cls(**fields | {"cache": cache, "slots": rows})  # type: ignore[arg-type]


def bucket(num_tokens: int) -> int:
    """Round a prompt's length up to one of few sizes (64 tokens and up, four to an octave), so that few programs are compiled."""
    step = max(MIN_CAPACITY_TOKENS, 1 << max(0, num_tokens.bit_length() - 3))
    return -(-num_tokens // step) * step


def prefill_chunk_tokens(batch_size: int, prompt_capacity: int, config: DecodeConfig) -> int:
    """Choose how many tokens of each prompt are read at once: the least equal part, of whole tiles, that is `prefill_tokens` in all."""
    tile = math.gcd(prompt_capacity, 128)  # of queries in the fastest kernels, and of what sparse prefill chooses
    parts = (prompt_capacity // n for n in range(prompt_capacity // tile, 0, -1) if prompt_capacity % (n * tile) == 0)
    return next((part for part in parts if part * batch_size >= config.prefill_tokens), prompt_capacity)


def for_each_chunk(
    read: Callable, carry: Any, token_ids, lengths, vocab: SpanVocab, model_config: ModelConfig, config: DecodeConfig, responses: bool
) -> Any:
    """Compute `carry = read(positions [b, C], attend, carry)` for C tokens of each prompt at a time; arguments as for `prefill_state`."""
    (batch, prompt_capacity), policy = token_ids.shape, get_policy(config.attention)
    first, size = context.part_of(chunk := prefill_chunk_tokens(batch, prompt_capacity, config))  # of a chunk what this device computes
    begins = jnp.arange(batch, dtype=jnp.int32)[:, None] * prompt_capacity
    arguments = token_ids, lengths, vocab, model_config
    masks_of = functools.partial(masks_of_prompts, policy, *arguments)

    def read_chunk(masks, prefill, index, carry):
        start = index * chunk + first
        positions = jnp.broadcast_to(start + jnp.arange(size, dtype=jnp.int32), (batch, size))
        return read(positions, attend_prompts(begins + positions, prompt_mask(masks(start, size), prefill, size), size == chunk), carry)

    num_chunks, begun = (jnp.max(lengths) + chunk - 1) // chunk, jnp.int32(0)
    if chunk < prompt_capacity and policy.prompt_masks(*arguments, responses=responses) is None:  # chunks before any response have tiles
        is_prompt = jnp.cumsum(token_ids == vocab.solve_id, axis=1) == 0
        begun = jnp.minimum(num_chunks, jnp.min(jnp.sum(is_prompt, axis=1, dtype=jnp.int32)) // chunk)
        carry = jax.lax.fori_loop(0, begun, functools.partial(read_chunk, masks_of(responses=False), "dense"), carry)
    return jax.lax.fori_loop(begun, num_chunks, functools.partial(read_chunk, masks_of(responses=responses), config.prefill), carry)


def prefill_state(
    model: Decoder,
    token_ids: Int[Array, "b T"],
    lengths: Int[Array, "b"],
    keys: PRNGKeyArray,
    config: DecodeConfig,
    num_samples: int,
    responses: bool,
    measured: tuple[Retained, ...] = (),
) -> DecodeState:
    """Read prompts, `lengths[b]` tokens of row b, and return the state of `num_samples` sequences of each.

    `responses` says whether some of them go on after `<solve>`; `measured`, a `Retained` of no queries, adds one to each layer's pools.
    """
    cache = KVCache.empty(model.config, lengths, token_ids.shape[1], num_samples, config.max_new_tokens)

    def read(positions, attend, carry):
        pools, last = carry
        hidden, pools = model(jnp.take_along_axis(token_ids, positions, axis=1), positions, attend, pools)
        at = lengths[:, None] - 1 - positions[:, :1]
        here = jnp.take_along_axis(hidden, jnp.clip(at, 0, positions.shape[1] - 1)[:, :, None], axis=1)[:, 0]
        return pools, jnp.where((at >= 0) & (at < positions.shape[1]), here, last)

    last = jnp.zeros((len(lengths), model.config.hidden_size), model.config.compute_dtype)
    carry = tuple((*layer, *measured) for layer in cache.pools), last
    pools, last = for_each_chunk(read, carry, token_ids, lengths, model.vocab, model.config, config, responses)
    return start_state(model, dataclasses.replace(cache, pools=pools), last, token_ids, lengths, keys, config, num_samples)


def start_state(model: Decoder, cache: KVCache, last: Float[Array, "b D"], token_ids, lengths, keys, config, num_samples) -> DecodeState:
    """Return the state after prompts that are in the cache; `last` is the hidden states of their last tokens."""
    batch, prompt_capacity = token_ids.shape

    def for_each_sample(x):
        return jnp.repeat(x, num_samples, axis=0)

    span = SpanState.of_prefix(token_ids, lengths, model.vocab, prompt_capacity + config.max_new_tokens, model.config.header_view)
    occurred = None
    if config.sampling.repetition_penalty != 1:
        inside = jnp.arange(prompt_capacity, dtype=jnp.int32)[None, :] < lengths[:, None]
        occurred = for_each_sample(mark_occurring(jnp.zeros((batch, model.vocab_size), bool), token_ids, inside, model.vocab))
    new_shape, slots = (batch * num_samples, config.max_new_tokens), get_policy(config.attention).initial_slots(cache.slot_table)
    return DecodeState(
        cache=slots.prepared(cache),
        span=jax.tree.map(for_each_sample, span),
        slots=slots,
        hidden=for_each_sample(last),
        logits=for_each_sample(model.logits(last)),
        done=jnp.zeros(new_shape[:1], bool),
        num_new=jnp.zeros(new_shape[:1], jnp.int32),
        new_tokens=jnp.full(new_shape, model.vocab.pad_id, jnp.int32),
        num_attended=jnp.zeros(new_shape, jnp.int32),
        keys=keys,
        occurred=occurred,
    )


def extend_state(model: Decoder, state: DecodeState, num_tokens: int, config: DecodeConfig) -> DecodeState:
    """Make room for so many more new tokens in every sequence; what was decoded stays as it is."""

    def padded(x, fill):
        return jnp.pad(x, ((0, 0), (0, num_tokens)), constant_values=fill)

    cache, toc = state.cache.extended(state.span.num_tokens, num_tokens), state.span.toc
    unused = get_policy(config.attention).initial_slots(cache.slot_table)
    kept = jnp.pad(state.slots.slots, ((0, 0), (0, unused.slots.shape[1] - state.slots.slots.shape[1])))
    used = jnp.arange(unused.slots.shape[1], dtype=jnp.int32)[None, :] < context.num_own(state.span.num_tokens)[:, None]
    return dataclasses.replace(
        state,
        cache=unused.prepared(cache),
        span=dataclasses.replace(state.span, token_labels=padded(state.span.token_labels, -1), toc=None if toc is None else padded(toc, 0)),
        slots=dataclasses.replace(state.slots, slots=jnp.where(used, kept, unused.slots)),
        new_tokens=padded(state.new_tokens, model.vocab.pad_id),
        num_attended=padded(state.num_attended, 0),
    )


def decode_step(
    model: Decoder, state: DecodeState, given, config: DecodeConfig, choose: Callable = lambda done, logs, given: given, log: Any = None
) -> DecodeState:
    """Feed one token of every active sequence through the automaton, in one launch, and the model; nothing changes for the others.

    Args:
      given: the tokens, and which sequences are active, [B] each; or what `choose(done, logs, given)` makes both of, in that launch.
      log: `log(logs, tokens, active, num_attended, given)` makes the logs afterwards (`num_new`, `new_tokens`, `num_attended`), too.
    """
    cache, num_rows, bookkeeping = state.cache, state.cache.pools[0][0].shape[0], config.bookkeeping
    logs, chosen = (state.num_new, state.new_tokens, state.num_attended), None
    step_slots = functools.partial(get_policy(config.attention).step_slots, views=model.config)
    at_once = state.slots.kept is not None and cache.is_resident
    counted = at_once and context.context_size() == 1  # else others count their rows
    if not cache.is_resident:  # what tokens name is fetched before they are fed
        _, chosen = per_sequence(lambda _, *now: (None, choose(*now)), None, state.done, logs, given, implementation=bookkeeping)
        cache, chosen = cache.fetched(state, *chosen, model.vocab, bookkeeping)  # type: ignore[attr-defined]

    def advance(before, table, given, chosen):
        span, slots, done, logs = before
        tokens, active = choose(done, logs, given) if chosen is None else chosen
        span = span.advance(tokens, model.vocab, active)
        position = jnp.maximum(span.num_tokens - 1, 0)
        own = read_elements(table, jax.lax.rem(position, cache.slot_table.shape[1]))
        slots = None if slots is None else step_slots(slots, table, own=own, span=span, active=active)
        logs = log(logs, tokens, active, slots.counts, given) if log and counted else logs
        ends = functools.reduce(jnp.logical_or, (tokens == end for end in (model.vocab.eos_id, *config.stop_ids)))
        return (span, slots, done | (active & ends), logs), (tokens, active, position, own, jnp.where(active, own, num_rows))

    arrays = (state.span, state.slots if at_once else None, state.done, logs), cache.slot_table, given, chosen
    (span, slots, done, logs), (tokens, active, position, own, written) = per_sequence(advance, *arrays, implementation=bookkeeping)
    if slots is None:
        cache, slots = cache.choose_slots(step_slots, state.slots, bookkeeping, own=own, span=span, active=active)
    if log and not counted:
        fed = tokens, active, collectives.psum_context(slots.counts), given
        logs, _ = per_sequence(lambda *now: (log(*now), None), logs, *fed, implementation=bookkeeping)
    wide = slots.kept is not None and model.config.header_view in ("prompt", "all")  # where span tokens read more than was named
    read = dataclasses.replace(slots, kept=None) if wide else slots  # attention is not to expect few rows then
    attend = cache.attend(written, read, config.implementation)
    hidden, pools = model(tokens[:, None], position[:, None], attend, cache.pools, linear=config.linear)
    hidden = jnp.where(active[:, None], hidden[:, 0], state.hidden)  # so that the logits, many more, need not be chosen from
    occurred = None if state.occurred is None else mark_occurring(state.occurred, tokens[:, None], active[:, None], model.vocab)
    after = {"span": span, "slots": slots, "done": done} | dict(zip(("num_new", "new_tokens", "num_attended"), logs, strict=True))
    after |= {"cache": dataclasses.replace(cache, pools=pools), "occurred": occurred}
    return dataclasses.replace(state, hidden=hidden, logits=model.logits(hidden, linear=config.linear), **after)


def sample_step(
    model: Decoder, state: DecodeState, until: Int[Array, "*B"], forced_tokens, config: DecodeConfig, *, sampling=None, first=None
) -> DecodeState:
    """Sample the next token of every sequence and feed it; nothing changes in sequences that have `until` tokens, or are done.

    Args:
      forced_tokens: [B, M], written in place of the sampled ones, -1 where the sample stands; or None.
      sampling: `SamplingFields` in place of the config's; `first` [B]: which new token is in the first column, by default the first.
    """
    logits, name = state.choices(model.config, model.vocab)
    sampling = SamplingFields.of(sampling or config.sampling)
    likeliest = logits is state.logits and name is None and all(field is None for field in sampling)  # nothing else is asked for

    def choose(done, logs, given):
        num_new, (sampled, until, forced, _) = logs[0], given
        active, sampled = ~done & (num_new < until), read_largest(sampled) if likeliest else sampled
        if forced is not None:
            token = read_elements(forced, num_new)
            sampled = jnp.where(token >= 0, token, sampled)
        return jnp.where(active, sampled, model.vocab.pad_id), active

    def log(logs, tokens, active, num_attended, given):
        num_new, first = logs[0] + active.astype(jnp.int32), given[-1]
        column = jnp.where(active, num_new - 1 - (0 if first is None else first), -1)
        return (num_new, *write_elements(logs[1:], (column, column), (tokens, num_attended)))

    drawn_by = jax.vmap(jax.random.fold_in)(state.keys, state.num_new), sampling, state.occurred, name
    given = logits if likeliest else sample(logits, *drawn_by), until, forced_tokens, first
    return decode_step(model, state, given, config, choose, log)
