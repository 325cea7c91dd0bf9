"""Sampling: the next token of every sequence from its logits."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from selfspan_jax.config import Sampling, SamplingFields
from selfspan_jax.spans import SpanVocab


@functools.partial(jax.jit, static_argnames=("num_sequences",))
def sequence_keys(key: PRNGKeyArray | None, num_sequences: int, first: int | Int[Array, ""] = 0) -> PRNGKeyArray:
    """Derive a key for each sequence from number `first` on, so that what one draws depends on no other; from key 0 where none is given."""
    numbers = jnp.arange(num_sequences, dtype=jnp.uint32) + jnp.uint32(first)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0) if key is None else key, numbers)


def mark_occurring(occurred: Bool[Array, "B V"], token_ids: Int[Array, "B T"], inside: Bool[Array, "B T"], vocab: SpanVocab) -> Array:
    """Mark the tokens that occur where `inside`, span tokens (`<seg>`, `<ref>`) excepted: what `repetition_penalty` is for."""
    segs, refs = ((token_ids >= base) & (token_ids < base + vocab.num_labels) for base in (vocab.seg_base, vocab.ref_base))
    row = jnp.arange(token_ids.shape[0], dtype=jnp.int32)[:, None]
    return occurred.at[row, jnp.where(inside & ~segs & ~refs, token_ids, occurred.shape[1])].set(True, mode="drop")


def next_name(logits: Float[Array, "B V"], named: Bool[Array, "B L"], share: float, vocab: SpanVocab) -> Int[Array, "B"]:
    """Return the first `<ref:k>`, k above the one that is `named`, with at least `share` of the likeliest token's probability; -1 for none.

    Names ascend, so one that is passed over does not come back; and a source too many costs less than one too few.
    """
    refs, labels = logits[:, vocab.ref_base : vocab.ref_base + vocab.num_labels], jnp.arange(vocab.num_labels)[None, :]
    above = jnp.any(named, axis=1, keepdims=True) & (labels > jnp.argmax(named, axis=1)[:, None])
    near = above & (refs >= jnp.max(logits, axis=-1, keepdims=True) + math.log(share))
    return jnp.where(jnp.any(near, axis=1), vocab.ref_base + jnp.argmax(near, axis=1).astype(jnp.int32), -1)


def sample(
    logits: Float[Array, "B V"], keys: PRNGKeyArray, sampling: Sampling | SamplingFields, occurred=None, name=None
) -> Int[Array, "B"]:
    """Sample the next tokens: the most likely at temperature 0, else draws from what filters leave.

    Args:
      occurred: for a repetition penalty, see `mark_occurring`.
      name: tokens in place of the most likely ones, -1 for none: see `next_name`.
    """
    fields = SamplingFields.of(sampling).columns()
    if fields.repetition_penalty is not None and occurred is not None:
        logits = penalized(logits, occurred, fields.repetition_penalty)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    likeliest = likeliest if name is None else jnp.where(name >= 0, name, likeliest)
    if fields.temperature is None:
        return likeliest
    drawn = jax.vmap(jax.random.categorical)(keys, filtered_scores(logits, fields)).astype(jnp.int32)
    return jnp.where(fields.temperature[:, 0] == 0, likeliest, drawn)


def penalized(logits: Float[Array, "B V"], occurred: Bool[Array, "B V"], penalty: float | Float[Array, "B 1"]) -> Float[Array, "B V"]:
    """Make tokens that have occurred less likely, by a repetition penalty (1909.05858)."""
    limit = float(jnp.finfo(jnp.float32).max)
    return jnp.where(occurred, jnp.clip(jnp.where(logits < 0, logits * penalty, logits / penalty), -limit, limit), logits)


def filtered_scores(logits: Float[Array, "B V"], sampling: Sampling | SamplingFields) -> Float[Array, "B V"]:
    """Divide logits by the temperature, and set those of tokens that are not to be drawn to minus infinity; see `Sampling`.

    Top-k: 1805.04833. Top-p, the nucleus: 1904.09751. Min-p: 2407.01082. The most likely token is always left, also where the
    temperature is so small that its quotients are infinite: the largest logit is 0 before the division.
    """
    temperature, outside, top_k, min_p, _ = SamplingFields.of(sampling).columns()
    scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(temperature == 0, 1.0, temperature)
    if top_k is not None:
        least = jnp.take_along_axis(jnp.sort(scores, axis=-1), jnp.clip(scores.shape[-1] - top_k, 0, scores.shape[-1] - 1), axis=1)
        scores = jnp.where((top_k > 0) & (scores < least), -jnp.inf, scores)
    if outside is not None:
        scores = jnp.where(outside > 0, nucleus(scores, outside), scores)
    if min_p is not None:
        scores = jnp.where(jnp.exp(scores) < min_p, -jnp.inf, scores)  # the most likely one has exp(0)
    return scores


def nucleus(scores: Float[Array, "B V"], outside: float | Float[Array, "B 1"]) -> Float[Array, "B V"]:
    """Set the scores of the least likely tokens, whose probabilities add up to no more than `outside`, to minus infinity."""
    order = jnp.argsort(scores, axis=-1)  # ascending, so that small probabilities add up exactly
    mass = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1), axis=-1)
    kept = (mass > outside).at[:, -1].set(True)
    return jnp.where(jnp.put_along_axis(jnp.zeros(scores.shape, bool), order, kept, axis=-1, inplace=False), scores, -jnp.inf)
