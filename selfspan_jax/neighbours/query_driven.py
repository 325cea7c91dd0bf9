"""Attention policies that are driven by queries: each kv head of each layer chooses rows for itself, at every token.

They are what spans are compared with at equal counts of rows. Prompts are read densely; every layer is cut, the first ones too.
What a query reads is not known before the query is, so there is no mask to train under or to show.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import PromptMask, span_decode_attention
from selfspan_jax.errors import UserError
from selfspan_jax.neighbours.attending import product, write_token

Summaries = tuple[Array, ...]  # what is kept of a layer's keys beside its pools, to choose by


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CandidateSlots:
    """The pool rows of all tokens, of which each kv head reads `counts[b]`."""

    slots: Int[Array, "B A"]
    counts: Int[Array, "B"]
    num_tokens: Int[Array, "B"]  # so far, the newest included; 0 for sequences that take no token in this step
    policy: QueryDriven = dataclasses.field(metadata={"static": True})
    kept: ClassVar[None] = None

    def prepared(self, cache: Any) -> Any:
        """Return the cache with the policy's summaries in each layer. Raises UserError for prompts in host memory."""
        check_keys(self.policy, None if cache.is_resident else "kv_memory='host'")
        pools = tuple((*layer, *self.policy.summarize(layer[0], self.slots)) for layer in cache.pools)
        return dataclasses.replace(cache, pools=pools)

    def attend(self, own: Int[Array, "B"], implementation: Any) -> Any:
        """Make the attention of one new token per sequence: write it to slot `own`, unless that is outside the pool; choose and read."""

        def attend(qkv, options, angles, layer):
            q, k_pool, v_pool = write_token(qkv, options, angles, own, layer)
            summaries = self.policy.update(layer[2:], k_pool, self)
            tokens = self.policy.choose(q.reshape(len(own), k_pool.shape[1], -1, q.shape[2]), k_pool, summaries, self)
            slots = jnp.take_along_axis(self.slots[:, None], tokens, axis=2, mode="clip")
            counts = jnp.broadcast_to(self.counts[:, None], slots.shape[:2])
            out = span_decode_attention(q, k_pool, v_pool, slots, counts, implementation=implementation)
            return out.reshape(len(own), 1, -1), (k_pool, v_pool, *summaries)

        return attend

    def keys(self, k_pool: Float[Array, "P K H"], tokens: Int[Array, "B S"]) -> Float[Array, "B S K H"]:
        """Return the keys of tokens."""
        return k_pool.at[jnp.take_along_axis(self.slots, tokens, axis=1, mode="clip")].get(mode="clip")


def check_keys(policy: Any, elsewhere: str | None) -> None:
    """Raise UserError for a policy that says `looks_at_all_keys`, where some are elsewhere: in what, or None."""
    if elsewhere and getattr(policy, "looks_at_all_keys", False):
        raise UserError(f"attention is {policy.name!r}, which looks at all keys: {elsewhere} is not for it")


@dataclasses.dataclass(frozen=True)
class QueryDriven:
    """A policy that reads at most `tokens` rows for each kv head, which it chooses by the queries of that head."""

    tokens: int = 128
    """Rows that a kv head reads at most."""

    name: ClassVar[str]
    looks_at_all_keys: ClassVar[bool] = True

    def mask(self, *_: Any, **__: Any) -> Any:
        """Raise UserError: there is none."""
        raise UserError(f"attention is {self.name!r}, which chooses by query, layer and head: there is no mask of it")

    def prompt_masks(self, token_ids, lengths, vocab, views, *, responses):
        """Return the causal masks of prompts, for prefill."""
        return lambda first, _: PromptMask.causal(first, lengths, num_keys=token_ids.shape[1])

    def initial_slots(self, slot_table: Int[Array, "B A"]) -> CandidateSlots:
        """Return the slots of all tokens, none of them in use."""
        none = jnp.zeros(slot_table.shape[0], jnp.int32)
        return CandidateSlots(slot_table, none, none, self)

    def step_slots(self, slots: CandidateSlots, slot_table, *, span, active: Bool[Array, "B"], **_: Any) -> CandidateSlots:
        """Say how many rows are read, and of how many."""
        num_tokens = jnp.where(active, span.num_tokens, 0)
        return dataclasses.replace(slots, counts=self.count(num_tokens), num_tokens=num_tokens)

    def count(self, num_tokens: Int[Array, "B"]) -> Int[Array, "B"]:
        """Return how many rows a kv head reads of so many tokens."""
        return jnp.minimum(num_tokens, self.tokens)

    def summarize(self, k_pool: Float[Array, "P K H"], slot_table: Int[Array, "B A"]) -> Summaries:
        """Compute the summaries of the tokens so far; what they say of later ones is arbitrary."""
        return ()

    def update(self, summaries: Summaries, k_pool: Float[Array, "P K H"], slots: CandidateSlots) -> Summaries:
        """Compute the summaries with the newest token, whose key is in the pool."""
        return ()

    def choose(
        self, q: Float[Array, "B K G H"], k_pool: Float[Array, "P K H"], summaries: Summaries, slots: CandidateSlots
    ) -> Int[Array, "B K C"]:
        """List C tokens for each kv head, which reads the first `slots.counts` of them; a smaller `tokens` lists the beginning of these."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Oracle(QueryDriven):
    """Read the rows with the largest probability of dense attention, added up over the queries of a kv head.

    The upper bound of what a choice of rows can keep; it reads every key to choose.
    """

    name: ClassVar[str] = "oracle"
    description: ClassVar[str] = "what dense attention weighs most"

    def __post_init__(self):
        if self.tokens < 1:
            raise UserError(f"Oracle: tokens is {self.tokens}; allowed: from 1")

    def choose(self, q, k_pool, summaries, slots):
        """Choose the tokens of the largest probability."""
        token = jax.lax.broadcasted_iota(jnp.int32, slots.slots.shape, 1)
        is_there = (token < slots.num_tokens[:, None])[:, None]
        scores = _products(q, slots.keys(k_pool, token).swapaxes(1, 2)) / math.sqrt(q.shape[3])
        scores = jnp.where(is_there[:, None], scores, jnp.finfo(jnp.float32).min)
        mass = jnp.where(is_there, jnp.sum(jax.nn.softmax(scores, axis=3), axis=2), -1.0)
        return jax.lax.top_k(mass, min(self.tokens, token.shape[1]))[1].astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Quest(QueryDriven):
    """Read the pages whose keys may score highest (Quest, 2406.10774).

    Of each page of 16 tokens the least and the largest value of each channel of its keys are kept. No key of a page scores above the
    page's bound, sum_c max(q_c min_c, q_c max_c).

    Ours are that the page of the newest token is always read, so that a token reads itself, and that a kv head goes by the largest
    bound of its queries.
    """

    page_tokens: int = 16
    """Tokens of a page."""

    name: ClassVar[str] = "quest"
    description: ClassVar[str] = "pages whose keys may score highest"

    def __post_init__(self):
        if not 1 <= self.page_tokens <= self.tokens:
            raise UserError(f"Quest: tokens is {self.tokens}, page_tokens is {self.page_tokens}; allowed: from 1 to tokens")

    def count(self, num_tokens):
        """Return the tokens of the newest page, and of as many whole pages before it as may be read too."""
        before, own = jnp.divmod(jnp.maximum(num_tokens - 1, 0), self.page_tokens)
        others = jnp.minimum(before, (self.tokens - own - 1) // self.page_tokens)
        return jnp.where(num_tokens > 0, own + 1 + others * self.page_tokens, 0)

    def summarize(self, k_pool, slot_table):
        """Compute the bounds of all pages: least and largest keys, [B, K, J, 2, H]."""
        slots = jnp.pad(slot_table, ((0, 0), (0, -slot_table.shape[1] % self.page_tokens)), mode="edge")
        keys = k_pool.at[slots].get(mode="clip").reshape(slots.shape[0], -1, self.page_tokens, *k_pool.shape[1:])
        return (_least_and_largest(keys).swapaxes(1, 2),)

    def update(self, summaries, k_pool, slots):
        """Compute the bounds of the newest token's page again."""
        (bounds,) = summaries
        (batch, num_kv_heads, num_pages), last = bounds.shape[:3], slots.num_tokens - 1
        page = last // self.page_tokens
        tokens = page[:, None] * self.page_tokens + jnp.arange(self.page_tokens, dtype=jnp.int32)[None]
        tokens = jnp.clip(tokens, 0, last[:, None])  # the newest one again in place of those to come
        sequence, head = (jnp.arange(size, dtype=jnp.int32) for size in (batch, num_kv_heads))
        page = jnp.where(last >= 0, page, num_pages)[:, None]
        found = _least_and_largest(slots.keys(k_pool, tokens)[:, None])[:, 0]
        return (bounds.at[sequence[:, None], head[None], page].set(found, mode="drop"),)

    def choose(self, q, k_pool, summaries, slots):
        """Choose the newest page and those of the highest bounds; the tokens of the newest page come first."""
        (bounds,) = summaries
        score = _products(jnp.maximum(q, 0), bounds[:, :, :, 1]) + _products(jnp.minimum(q, 0), bounds[:, :, :, 0])
        newest, own = (x[:, None, None] for x in jnp.divmod(jnp.maximum(slots.num_tokens - 1, 0), self.page_tokens))
        page = jnp.arange(bounds.shape[2], dtype=jnp.int32)[None, None]
        score = jnp.where(page < newest, jnp.max(score, axis=2), jnp.where(page == newest, jnp.inf, -jnp.inf))
        pages = jax.lax.top_k(score, min(1 + (self.tokens - 1) // self.page_tokens, bounds.shape[2]))[1].astype(jnp.int32)
        place = jnp.arange(pages.shape[2] * self.page_tokens, dtype=jnp.int32)[None, None]
        after = place - (own + 1)  # place after the tokens of the newest page; below 0 for those
        rank = jnp.minimum(after // self.page_tokens + 1, pages.shape[2] - 1)
        chosen = jnp.take_along_axis(pages, jnp.broadcast_to(rank, (*pages.shape[:2], place.shape[2])), axis=2)
        return chosen * self.page_tokens + jnp.where(after < 0, place, after % self.page_tokens)


def _least_and_largest(keys: Float[Array, "B J S K H"]) -> Float[Array, "B J K 2 H"]:
    return jnp.stack([jnp.min(keys, axis=2), jnp.max(keys, axis=2)], axis=3)


def _products(q: Float[Array, "B K G H"], keys: Float[Array, "B K S H"]) -> Float[Array, "B K G S"]:
    return product("bkgh,bksh->bkgs", q, keys, precision=jax.lax.Precision.HIGHEST)
