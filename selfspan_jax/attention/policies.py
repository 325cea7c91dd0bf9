"""Attention policies: which earlier tokens a token attends to.

A policy says it twice, and both must agree for every token: `mask` for whole sequences (training, prefill, logits) and
`step_slots` for one new token per sequence (decoding). Kernels, cache and model know nothing of policies.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import PromptMask, TileMask, rotate_and_attend, update_slots
from pallas_kernels.sequence_attention import unsupported_reason
from selfspan_jax import spans
from selfspan_jax.config import AttentionViews, Implementation, ModelConfig
from selfspan_jax.errors import UserError
from selfspan_jax.model import Attend
from selfspan_jax.neighbours.memory import SegmentMemory, SegmentSlots
from selfspan_jax.neighbours.query_driven import CandidateSlots, Oracle, Quest
from selfspan_jax.parallel import collectives, context


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The pool rows that each sequence's query attends to: `slots[b, :counts[b]]`, in any order, none twice; the rest is arbitrary."""

    slots: Int[Array, "B A"]
    counts: Int[Array, "B"]
    kept: Int[Array, "B"] | None = None  # so many first ones are the next body token's too; None: a step needs those of none before

    def prepared(self, cache: Any) -> Any:
        """Return the cache with what rows are chosen by in each layer: nothing, unless by their contents."""
        return cache

    def attend(self, own: Int[Array, "B"], implementation: Implementation | None) -> Attend:
        """Make the attention of one new token per sequence: write it to slot `own`, unless that is outside the pool; read these slots."""

        def attend(qkv, options, angles, pools):
            arrays = (qkv[:, 0], angles[0][:, 0], angles[1][:, 0], own, *pools, self.slots, self.counts)
            options = options | {"split": True, "partial": context.context_size() > 1, "sparse": self.kept is not None}
            out, *pools = rotate_and_attend(*arrays, **options, implementation=implementation)
            return collectives.gather_attention(out).reshape(len(own), 1, -1), tuple(pools)

        return attend


AnySlots = Slots | CandidateSlots | SegmentSlots


@runtime_checkable
class Policy(Hashable, Protocol):
    """A frozen dataclass of a policy's settings: hashable, static under jit."""

    name: ClassVar[str]
    description: ClassVar[str]
    """What a query reads, in a few words, for the help of command lines."""

    def mask(
        self,
        token_ids: Int[Array, "B T"],
        vocab: spans.SpanVocab,
        views: AttentionViews,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        first_query: int | Int[Array, ""] = 0,
        num_queries: int | None = None,
    ) -> Bool[Array, "B Q T"]:
        """Compute the mask of whole sequences, True = may attend; or what has an `attend(q, k, v)` of its own, in its place.

        Args:
          views: `header_view`, `prompt_view` and `prompt_window_tokens` of the model.
          segment_ids: sequences packed in one row, told apart by number; none attends to another.
          first_query, num_queries: compute these Q rows of the mask only; all T by default.
        """

    def prompt_masks(
        self, token_ids: Int[Array, "B T"], lengths: Int[Array, "B"], vocab: spans.SpanVocab, views: AttentionViews, *, responses: bool
    ) -> Callable[[Int[Array, ""], int], PromptMask] | None:
        """Return the function from first query and number of queries (static) to their mask, for prefill; None where only `mask` says it.

        Args:
          lengths: tokens of each row; the rest of a row is ignored.
          responses: some row goes on after `<solve>`. Otherwise all tokens are of prompts.
        """

    def initial_slots(self, slot_table: Int[Array, "B A"]) -> AnySlots:
        """Allocate slots of the shape that the policy needs, none in use."""

    def step_slots(
        self,
        slots: Any,
        slot_table: Int[Array, "B A"],
        *,
        own: Int[Array, "B"],
        span: spans.SpanState,
        active: Bool[Array, "B"],
        views: AttentionViews,
    ) -> AnySlots:
        """Compute the slots that each sequence's newest token attends to. Traced in the decode loop; where slots are `kept`, in its kernel.

        Args:
          slots: those of the token before; `initial_slots` right after prefill.
          slot_table: the slot of each token.
          own: the slot of the newest token.
          span: the automaton after the newest token, whose index is `span.num_tokens - 1`.
          active: False for sequences that take no token in this step; slots that are counted for them are read for nothing.
        """


def _earlier(token_ids, *, segment_ids=None, first_query=0, num_queries=None) -> tuple[Bool[Array, "B Q T"], Int[Array, "Q T"]]:
    """Compute the causal mask, and the distance from query to key."""
    batch, num_tokens = token_ids.shape
    num_queries = num_tokens if num_queries is None else num_queries
    distance = (first_query + jnp.arange(num_queries, dtype=jnp.int32))[:, None] - jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
    mask = jnp.broadcast_to((distance >= 0)[None], (batch, num_queries, num_tokens))
    if segment_ids is not None:
        queries = jax.lax.dynamic_slice_in_dim(segment_ids, first_query, num_queries, axis=1)
        mask &= queries[:, :, None] == segment_ids[:, None, :]
    return mask, distance


def _local_prompts(lengths, query_labels, key_labels, **options) -> Callable[[Int[Array, ""], int], PromptMask]:
    def masks(first, num_queries):
        some = jax.lax.dynamic_slice_in_dim(query_labels, first, num_queries, axis=1)
        return PromptMask.local(first, lengths, some, key_labels, **options)

    return masks


@dataclasses.dataclass(frozen=True)
class Span:
    """Attend to what the model's own tokens name (`selfspan_jax.spans`)."""

    name: ClassVar[str] = "span"
    description: ClassVar[str] = "what the model names"

    def mask(self, token_ids, vocab, views, **rows):
        return spans.attention_mask(token_ids, vocab, **_views(views), **rows)

    def prompt_masks(self, token_ids, lengths, vocab, views, *, responses):
        if responses:
            return None
        if views.prompt_view == "causal":
            return Dense().prompt_masks(token_ids, lengths, vocab, views, responses=False)
        labels = spans.token_roles(token_ids, vocab).labels
        return _local_prompts(lengths, labels, labels, num_labels=vocab.num_labels, window_tokens=views.prompt_window_tokens)

    def initial_slots(self, slot_table):
        batch, capacity = slot_table.shape
        none = jnp.zeros(batch, jnp.int32)
        return Slots(jnp.zeros((batch, capacity + 1), jnp.int32), counts=none, kept=none)  # one spare, see `update_slots`

    def step_slots(self, slots, slot_table, *, span, active, views, **_):
        # A body token reads what is kept of the slots before, and itself: its slot is appended. Slots are made anew for headers, after
        # a header whose view is wider than its span, and after a prompt: nothing is kept of those.
        anew = active & ~(span.is_response & ~span.is_header & (slots.kept > 0))
        first = jnp.where(anew, 0, span.num_tokens - active.astype(jnp.int32))
        keep = span.is_response & ~(span.is_header & (views.header_view in ("prompt", "all")))
        kept, rule = jnp.where(anew, 0, slots.kept), span.rule(first, keep, **_views(views))
        return Slots(*update_slots(slots.slots, kept, slot_table, span.token_labels, span.last_named, span.toc, rule))


def _views(views: AttentionViews) -> dict[str, Any]:
    return {name: getattr(views, name) for name in ("header_view", "prompt_view", "prompt_window_tokens")}


@dataclasses.dataclass(frozen=True)
class Dense:
    """Attend to every token before."""

    name: ClassVar[str] = "dense"
    description: ClassVar[str] = "everything before"

    def mask(self, token_ids, vocab, views, **rows):
        return _earlier(token_ids, **rows)[0]

    def prompt_masks(self, token_ids, lengths, vocab, views, *, responses):
        return lambda first, _: PromptMask.causal(first, lengths, num_keys=token_ids.shape[1])

    def initial_slots(self, slot_table):
        return Slots(context.take_own(slot_table), jnp.zeros(slot_table.shape[0], jnp.int32))  # for good: only the counts grow

    def step_slots(self, slots, slot_table, *, span, active, **_):
        return Slots(slots.slots, jnp.where(active, context.num_own(span.num_tokens), 0))


@dataclasses.dataclass(frozen=True)
class Window:
    """Attend to the first tokens and the most recent ones (StreamingLLM, 2309.17453)."""

    sink_tokens: int = 4
    """First tokens that are always read."""
    window_tokens: int = 128
    """Most recent tokens that are read, the query's own included."""

    name: ClassVar[str] = "window"
    description: ClassVar[str] = "first and recent tokens"

    def __post_init__(self):
        if self.sink_tokens < 0 or self.window_tokens < 1:
            raise UserError(f"Window: sink_tokens is {self.sink_tokens}, window_tokens is {self.window_tokens}; allowed: from 0, from 1")

    def mask(self, token_ids, vocab, views, **rows):
        mask, distance = _earlier(token_ids, **rows)
        return mask & ((distance < self.window_tokens) | (jnp.arange(token_ids.shape[1])[None, :] < self.sink_tokens))[None]

    def prompt_masks(self, token_ids, lengths, vocab, views, *, responses):
        index = jax.lax.broadcasted_iota(jnp.int32, token_ids.shape, 1)
        sink = jnp.where(index < self.sink_tokens, 0, -1)  # label 0 is everybody's, and queries have no other
        return _local_prompts(lengths, jnp.full_like(index, -2), sink, num_labels=1, window_tokens=self.window_tokens)

    def initial_slots(self, slot_table):
        batch, capacity = slot_table.shape
        return Slots(jnp.zeros((batch, min(capacity, self.sink_tokens + self.window_tokens)), jnp.int32), jnp.zeros(batch, jnp.int32))

    def step_slots(self, slots, slot_table, *, span, active, **_):
        place = jnp.arange(slots.slots.shape[1], dtype=jnp.int32)[None, :]
        first_recent = jnp.maximum(span.num_tokens - self.window_tokens, self.sink_tokens)[:, None]
        token = jnp.where(place < self.sink_tokens, place, place - self.sink_tokens + first_recent)
        chosen = jnp.take_along_axis(slot_table, jnp.minimum(token, slot_table.shape[1] - 1), axis=1)
        return Slots(*context.list_own(chosen, jnp.where(active, jnp.minimum(span.num_tokens, self.sink_tokens + self.window_tokens), 0)))


POLICIES: dict[str, Policy] = {policy.name: policy for policy in (Span(), Dense(), Window(), Quest(), Oracle(), SegmentMemory())}


def masks_of_prompts(
    policy: Policy, token_ids: Int[Array, "B T"], lengths: Int[Array, "B"], vocab: spans.SpanVocab, config: ModelConfig, *, responses: bool
) -> Callable[[Int[Array, ""], int], PromptMask | TileMask | Bool[Array, "B Q T"]]:
    """Return the function from first query and number of queries (static) to their mask; bits or booleans where only `mask` says it."""
    if (masks := policy.prompt_masks(token_ids, lengths, vocab, config, responses=responses)) is not None:
        return masks
    rows, (batch, num_keys) = functools.partial(policy.mask, token_ids, vocab, config), token_ids.shape
    if unsupported_reason("triton", config.head_size):
        return lambda first, number: rows(first_query=first, num_queries=number)
    return lambda first, number: TileMask.of_rows(lambda at, some: rows(first_query=first + at, num_queries=some), batch, number, num_keys)


def policy_help() -> str:
    """Describe the policies in one line, for the help of command lines."""
    return "; ".join(f"{name}: {policy.description}" for name, policy in POLICIES.items())


def get_policy(attention: str | Hashable) -> Policy:
    """Look up a policy by name; a policy is returned as it is. Raises UserError for anything else."""
    policy = POLICIES.get(attention) if isinstance(attention, str) else attention
    if not isinstance(policy, Policy):
        raise UserError(f"attention is {attention!r}; allowed: {', '.join(POLICIES)}, or a policy")
    return policy
