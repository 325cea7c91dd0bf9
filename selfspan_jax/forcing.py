"""Decode with given headers: what a step reads is said from outside, what it writes is the model's."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.state import DecodeState
from selfspan_jax.spans import SpanVocab

Headers = Sequence[Sequence[int]]
"""The labels that each step of a response names, in the order of naming."""


def generate_under(
    engine: Engine, token_ids: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, "B"], config: DecodeConfig, headers: Sequence[Headers]
) -> DecodeState:
    """Decode greedily as `Engine.generate` does, but the n-th step that sequence b opens names `headers[b][n]` and nothing else.

    Which `<seg:k>` opens a step, and what it writes, is the model's; the steps beyond `headers[b]` name what it chooses. What comes
    next depends on what was written, so the host gives each token: for quality, not for speed.
    """
    state = engine.prefill(token_ids, lengths, config)
    vocab, (batch, room) = engine.vocab, state.new_tokens.shape
    tokens = np.full((batch, room), vocab.pad_id, np.int32)
    attended = np.zeros((batch, room), np.int32)
    pending: list[collections.deque[int]] = [collections.deque() for _ in range(batch)]
    begun, is_given, done = [0] * batch, np.zeros(batch, bool), np.asarray(state.done)
    for column in range(room):
        free, other = (np.asarray(found) for found in _most_likely(state.logits, vocab))
        chosen = np.where(is_given, other, free)
        for row in np.flatnonzero(~done).tolist():
            if pending[row]:
                chosen[row] = vocab.ref_base + pending[row].popleft()
            elif vocab.seg_base <= chosen[row] < vocab.seg_base + vocab.num_labels:
                is_given[row] = begun[row] < len(headers[row])
                pending[row].extend(headers[row][begun[row]] if is_given[row] else ())
                begun[row] += 1
        tokens[:, column] = np.where(done, vocab.pad_id, chosen)
        state = engine.step(state, tokens[:, column], config)
        attended[:, column] = np.where(done, 0, np.asarray(state.slots.counts))
        done = np.asarray(state.done)
        if done.all():
            break
    num_new = jnp.asarray((attended > 0).sum(axis=1), jnp.int32)
    return dataclasses.replace(state, num_new=num_new, new_tokens=jnp.asarray(tokens), num_attended=jnp.asarray(attended))


@functools.partial(jax.jit, static_argnames=("vocab",))
def _most_likely(logits: Float[Array, "B V"], vocab: SpanVocab) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Return the most likely token of all, and of all but `<ref:k>`."""
    ids = jnp.arange(logits.shape[-1])[None, :]
    is_ref = (ids >= vocab.ref_base) & (ids < vocab.ref_base + vocab.num_labels)
    first, second = (jnp.argmax(own, axis=-1) for own in (logits, jnp.where(is_ref, -jnp.inf, logits)))
    return first.astype(jnp.int32), second.astype(jnp.int32)
