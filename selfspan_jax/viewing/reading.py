"""Read a decoded sequence back: its steps, what each token attended to, and averages of it.

The only place that cuts a response into steps and computes attended fractions: outputs, pages, plots, tables and evaluations
take both from here. Nothing needs the model's weights: masks follow from the token ids, the vocabulary and the model's config.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from selfspan_jax import spans
from selfspan_jax.attention.policies import Policy
from selfspan_jax.config import ModelConfig
from selfspan_jax.spans import SpanVocab, TokenRoles


@dataclasses.dataclass(frozen=True, eq=False)
class ReadStep:
    """A step of a response, or the tokens before its first step."""

    indices: Int[np.ndarray, "I"]
    """Positions of the step's tokens in the sequence."""
    label: int
    opened: bool
    """Whether a `<seg>` opens it; nothing opens the tokens before the first step."""
    refs: tuple[int, ...]
    """Labels named, in order."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """A sequence of T tokens, the last R of them a response, and how it was decoded."""

    token_ids: Int[np.ndarray, "T"]
    prompt_tokens: int
    num_attended: Int[np.ndarray, "R"]
    """For each response token, how many tokens it attended to, itself included."""
    policy: Policy
    config: ModelConfig
    vocab: SpanVocab
    decode: Callable[[Iterable[int]], str] = dataclasses.field(repr=False)
    """Write token ids as text."""

    @property
    def response_ids(self) -> Int[np.ndarray, "R"]:
        return self.token_ids[self.prompt_tokens :]

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """The written form of each token."""
        return tuple(self.decode([int(token)]) for token in self.token_ids)

    @functools.cached_property
    def roles(self) -> TokenRoles:
        """The automaton's view of each token, as numpy arrays [T]."""
        roles = _token_roles(_rounded(self.token_ids, self.vocab), self.vocab)
        return jax.tree.map(lambda role: np.asarray(role)[0, : len(self.token_ids)], roles)

    @functools.cached_property
    def mask(self) -> Bool[np.ndarray, "T T"]:
        """Which token attends to which."""
        return attention_mask(self.token_ids, self.vocab, self.config, self.policy)

    @functools.cached_property
    def steps(self) -> tuple[ReadStep, ...]:
        """The steps of the response in order; every response token is in one of them."""
        roles, response = self.roles, np.arange(self.prompt_tokens, len(self.token_ids))
        steps = []
        for start in np.unique(roles.step_index[response]):
            indices = response[roles.step_index[response] == start]
            opened = bool(start >= 0 and roles.is_header[start])
            refs = tuple(int(name) for name in roles.names[indices] if name >= 0)
            steps.append(ReadStep(indices, int(roles.labels[indices[0]]), opened, refs))
        return tuple(steps)

    def reads(self, step: ReadStep) -> Bool[np.ndarray, "T"]:
        """Mark the tokens that at least one token of a step attended to."""
        return self.mask[step.indices].any(axis=0)

    @functools.cached_property
    def unresolved(self) -> Bool[np.ndarray, "T"]:
        """Mark the `<ref:k>` tokens that name a label which no token so far carries."""
        labels, names = self.roles.labels, self.roles.names
        unresolved = np.zeros(len(names), bool)
        for index in np.flatnonzero(names >= 0):
            unresolved[index] = names[index] not in labels[: index + 1]
        return unresolved

    @property
    def finished(self) -> bool:
        """Whether the response ends in `<eos>` instead of at a token limit."""
        return bool(len(self.response_ids) and self.response_ids[-1] == self.vocab.eos_id)

    @property
    def fractions(self) -> Float[np.ndarray, "R"]:
        """Share of its context, itself included, that each response token attended to."""
        return self.num_attended / np.arange(self.prompt_tokens + 1, len(self.token_ids) + 1)

    @property
    def attended_fraction(self) -> float:
        """Mean over response tokens of |attended| / (t + 1); dense decoding has 1."""
        return float(np.mean(self.fractions))

    @property
    def attended_tokens(self) -> float:
        """Mean over response tokens of |attended|."""
        return float(np.mean(self.num_attended))

    def step_attended(self, step: ReadStep) -> tuple[float, float]:
        """Average a step's tokens: (tokens attended to, share of the context)."""
        of_response = step.indices - self.prompt_tokens
        return float(np.mean(self.num_attended[of_response])), float(np.mean(self.fractions[of_response]))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the form of the response, one line each."""
        return tuple(self._warnings())

    def _warnings(self) -> Iterator[str]:
        vocab = self.vocab
        if not self.finished:
            yield f"The response was stopped before it had ended; tokens written: {len(self.response_ids)}."
        if count := int(self.unresolved.sum()):
            yield f"References to a label that no token carries, for which nothing was read: {count}."
        if len(self.response_ids) and not any(step.opened for step in self.steps):
            yield "The response opens no step."
        elif self.steps and not self.steps[0].opened:
            yield f"Tokens before the first step: {len(self.steps[0].indices)}."
        misplaced = np.isin(self.response_ids, (vocab.pad_id, vocab.bos_id, vocab.solve_id))
        if count := int(misplaced.sum()):
            yield f"Structural tokens of a prompt, which mean nothing in a response: {count}."


def attended(readings: Sequence[Reading]) -> dict[str, float]:
    """Average what the response tokens of several sequences attended to: `attended_fraction` and `attended_tokens`."""
    return {name: float(np.mean(values)) for name, values in _attended(readings).items()}


def attended_by_kind(readings: Sequence[Reading]) -> dict[str, float | None]:
    """Average the same over body tokens (`_body`) and header tokens, `<seg>` and `<ref>` (`_header`), apart.

    A kind without tokens has None. `header_share` is the share of header tokens.
    """
    header = np.concatenate([reading.roles.is_header[reading.prompt_tokens :] for reading in readings])
    means = {
        f"{name}_{kind}": float(np.mean(values[chosen])) if chosen.any() else None
        for name, values in _attended(readings).items()
        for kind, chosen in {"body": ~header, "header": header}.items()
    }
    return means | {"header_share": float(np.mean(header))}


def _attended(readings: Sequence[Reading]) -> dict[str, np.ndarray]:
    return {
        "attended_fraction": np.concatenate([reading.fractions for reading in readings]),
        "attended_tokens": np.concatenate([reading.num_attended for reading in readings]),
    }


def attention_mask(token_ids: Int[np.ndarray, "T"], vocab: SpanVocab, config: ModelConfig, policy: Policy) -> Bool[np.ndarray, "T T"]:
    """Compute which token attends to which under a policy and the model's views."""
    size = len(token_ids)
    return np.asarray(_policy_mask(policy, _rounded(token_ids, vocab), vocab, config)[0, :size, :size])


def _rounded(token_ids: Int[np.ndarray, "T"], vocab: SpanVocab) -> Int[Array, "1 R"]:
    """Pad to one of few lengths, so that few programs are compiled: what follows a token changes nothing about it."""
    padding = -len(token_ids) % 128
    return jnp.asarray(np.pad(token_ids, (0, padding), constant_values=vocab.pad_id))[None]


@functools.partial(jax.jit, static_argnames=("policy", "vocab", "config"))
def _policy_mask(policy: Policy, token_ids: Int[Array, "B T"], vocab: SpanVocab, config: ModelConfig) -> Bool[Array, "B T T"]:
    return policy.mask(token_ids, vocab, config)


_token_roles = jax.jit(spans.token_roles, static_argnames=("vocab",))
