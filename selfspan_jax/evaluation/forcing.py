"""Decode with given headers, or given beginnings: what a step reads, or what its text begins with, is said from outside."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.state import DecodeState
from selfspan_jax.parallel.mesh import sum_over_context
from selfspan_jax.spans import SpanVocab

Headers = Sequence[Sequence[int]]
"""The labels that each step of a response names, in the order of naming."""
Beginnings = Sequence[Sequence[int]]
"""Token ids: the text of each step of a response begins with one of these."""


class Order(NamedTuple):
    """Which labels the steps of a response open, where that follows from the prompt, so that nothing is chosen by it.

    Attributes:
      labels: of the steps, in order.
      closed: whether each step ends by opening its label once more.
      num_steps: steps that the response has before it may end.
    """

    labels: Sequence[int]
    closed: bool = False
    num_steps: int = 0


class _Text:
    """What the text of a step may go on with as long as it is no more than a beginning.

    `<solve>`, which the prompt ends with, and `<seg:k>` open one: text without span tokens is told apart by the former.
    """

    def __init__(self, vocab: SpanVocab, beginnings: Beginnings) -> None:
        self._beginnings = self._left = beginnings  # what of each is still to be written
        families = (range(base, base + vocab.num_labels) for base in (vocab.seg_base, vocab.ref_base))
        self._segs, self._refs = families
        self._solve, self._free = vocab.solve_id, {vocab.eos_id, *self._segs, *self._refs}
        self._is_empty = True

    def allowed(self) -> set[int] | None:
        """Return the ids that may come next, None for any. Where no text is written yet, span tokens and the end may come as well."""
        if not self._left:
            return None
        return {own[0] for own in self._left} | (self._free if self._is_empty else set())

    def write(self, token: int) -> None:
        """Go on by a token."""
        if token == self._solve or token in self._segs:
            self._left, self._is_empty = self._beginnings, True
        elif not (self._is_empty and token in self._refs):
            after = [own[1:] for own in self._left if own[0] == token]
            self._left, self._is_empty = after if all(after) else (), False


def generate_under(
    engine: Engine,
    token_ids: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, "B"],
    config: DecodeConfig,
    headers: Sequence[Headers],
    beginnings: Sequence[Beginnings] | None = None,
    orders: Sequence[Order] | None = None,
    names_more: bool = False,
) -> DecodeState:
    """Decode greedily as `Engine.generate` does, but the n-th step that sequence b opens names `headers[b][n]` and nothing else.

    In its text a step may name itself, and right after that one of these once more: so a value says what it stands in.

    What a step writes is the model's; the steps beyond `headers[b]` name what it chooses. What comes next depends on what was
    written, so the host gives each token: for quality, not for speed.

    Args:
      beginnings: the text of each step of sequence b begins with one of `beginnings[b]`, the most likely one token by token.
      orders: the labels of the steps of sequence b, where the model is not to choose them: it says when a step begins or ends, by all
        `<seg:k>` together.
      names_more: let a step name more than it is given.
    """
    state = engine.prefill(token_ids, lengths, config)
    vocab, (batch, room) = engine.vocab, state.new_tokens.shape
    tokens = np.full((batch, room), vocab.pad_id, np.int32)
    attended = np.zeros((batch, room), np.int32)
    pending: list[collections.deque[int]] = [collections.deque() for _ in range(batch)]
    begun, is_given, done = [0] * batch, np.zeros(batch, bool), np.asarray(state.done)
    texts = [_Text(vocab, own) for own in beginnings or [()] * batch]
    is_open = np.zeros(batch, bool)  # a step that is to be closed
    own, given = np.full((batch, 1), -1), np.zeros((batch, vocab.num_labels), bool)  # the label of each step, and what it is given
    for column in range(room):
        logits, name = state.choices(engine.config, vocab)
        if (allowed := _allowed(texts, ~done, logits.shape)) is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        if orders is not None:
            logits = _gathered(logits, np.array([count < own.num_steps for count, own in zip(begun, orders, strict=True)]), vocab)
        names = np.where(tokens[:, column - 1, None] == vocab.ref_base + own, given, own == np.arange(vocab.num_labels))
        free, other = (np.asarray(found) for found in _most_likely(logits, vocab, names))
        chosen = np.where(is_given, other, free if name is None else np.where(name >= 0, name, free))
        for row in np.flatnonzero(~done).tolist():
            if pending[row]:
                chosen[row] = vocab.ref_base + pending[row].popleft()
            elif vocab.seg_base <= chosen[row] < vocab.seg_base + vocab.num_labels:
                if orders is not None:
                    number, is_open[row] = begun[row] - is_open[row], orders[row].closed and not is_open[row]
                    chosen[row] = vocab.seg_base + orders[row].labels[min(number, len(orders[row].labels) - 1)]
                    if number < begun[row]:
                        continue
                is_given[row] = begun[row] < len(headers[row]) and not names_more
                labels = headers[row][begun[row]] if begun[row] < len(headers[row]) else ()
                pending[row].extend(labels)
                own[row], given[row] = chosen[row] - vocab.seg_base, np.isin(np.arange(vocab.num_labels), labels)
                begun[row] += 1
            texts[row].write(int(chosen[row]))
        tokens[:, column] = np.where(done, vocab.pad_id, chosen)
        state = engine.step(state, tokens[:, column], config)
        attended[:, column] = np.where(done, 0, sum_over_context(np.asarray(state.slots.counts), engine.mesh))
        done = np.asarray(state.done)
        if done.all():
            break
    num_new = jnp.asarray((attended > 0).sum(axis=1), jnp.int32)
    return dataclasses.replace(state, num_new=num_new, new_tokens=jnp.asarray(tokens), num_attended=jnp.asarray(attended))


def _allowed(texts: Sequence[_Text], rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return which tokens may come next in some rows, bool [B, V]; None where any may in all of them."""
    found = {row: ids for row in np.flatnonzero(rows).tolist() if (ids := texts[row].allowed()) is not None}
    if not found:
        return None
    allowed = np.ones(shape, bool)
    for row, ids in found.items():
        allowed[row] = False
        allowed[row, list(ids)] = True
    return allowed


@functools.partial(jax.jit, static_argnames=("vocab",))
def _gathered(logits: Float[Array, "B V"], goes_on: Bool[Array, "B"], vocab: SpanVocab) -> Float[Array, "B V"]:
    """Give all that `<seg:k>` tokens have to one of them; where a response goes on, what its end has as well."""
    ids = jnp.arange(logits.shape[-1])[None, :]
    moved = (ids >= vocab.seg_base) & (ids < vocab.seg_base + vocab.num_labels) | goes_on[:, None] & (ids == vocab.eos_id)
    total = jax.nn.logsumexp(jnp.where(moved, logits, -jnp.inf), axis=-1, keepdims=True)
    return jnp.where(ids == vocab.seg_base, total, jnp.where(moved, -jnp.inf, logits))


@functools.partial(jax.jit, static_argnames=("vocab",))
def _most_likely(logits: Float[Array, "B V"], vocab: SpanVocab, names: Bool[Array, "B L"]) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Return the most likely token of all, and of all but the `<ref:k>` that are not among `names`."""
    ruled_out = jnp.pad(~names, ((0, 0), (vocab.ref_base, logits.shape[-1] - vocab.ref_base - vocab.num_labels)))
    first, second = (jnp.argmax(own, axis=-1) for own in (logits, jnp.where(ruled_out, -jnp.inf, logits)))
    return first.astype(jnp.int32), second.astype(jnp.int32)
