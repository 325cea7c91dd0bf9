"""Read a decoded sequence back: its steps, what each token attended to, and averages of it.

The only place that cuts a response into steps and computes attended fractions: outputs, pages, plots, tables and evaluations
take both from here. Nothing needs the model's weights: masks follow from the token ids, the vocabulary and the model's config.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from selfspan_jax import spans
from selfspan_jax.attention.policies import Policy
from selfspan_jax.config import ModelConfig
from selfspan_jax.spans import SpanVocab, TokenRoles
from selfspan_jax.task import Task, end_ids
from selfspan_jax.viewing import detokenize

V = TypeVar("V", str, tuple, np.ndarray)


class Step(NamedTuple):
    """One step of a response: the label that it opens, the labels that it names in order, and the text that it writes."""

    label: int
    refs: tuple[int, ...]
    text: str
    attended_tokens: float
    """Tokens that the step's own tokens attended to, on average."""
    attended_fraction: float
    """Share of the context that they attended to, on average."""
    positions: range
    """Of the step's tokens in the sequence."""
    opened: bool = True
    """Whether a `<seg>` opens it; nothing opens the tokens before the first step."""

    @property
    def indices(self) -> Int[np.ndarray, "I"]:
        """Positions of the step's tokens in the sequence, as an array."""
        return np.arange(self.positions.start, self.positions.stop)

    def __str__(self) -> str:
        return f"<seg:{self.label}>{''.join(f'<ref:{ref}>' for ref in self.refs)}{self.text}"


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """A sequence of T tokens, the last R of them a response, and how it was decoded."""

    task: Task = dataclasses.field(repr=False)
    token_ids: Int[np.ndarray, "T"]
    """Prompt and response."""
    prompt_tokens: int
    num_attended: Int[np.ndarray, "R"]
    """For each response token, how many tokens it attended to, itself included."""
    policy: Policy
    config: ModelConfig
    vocab: SpanVocab

    @property
    def response_ids(self) -> Int[np.ndarray, "R"]:
        return self.token_ids[self.prompt_tokens :]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a response."""
        return end_ids(self.task, self.vocab)

    @property
    def attention(self) -> str:
        """Name of the policy under which it was decoded."""
        return self.policy.name

    @functools.cached_property
    def token_texts(self) -> tuple[str, ...]:
        """The written form of each token; of several tokens that make up a character, the last has it, the others are empty."""
        if self._written is None:
            return detokenize.token_texts(self.task.decode, self.token_ids)
        return tuple(self._written[0][self.token_ids].tolist())

    @functools.cached_property
    def _written(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The text of each id and its length, where the task says them and has all ids."""
        tokens, ids = getattr(self.task, "tokens", None), self.token_ids
        return None if tokens is None or ids.min(initial=0) < 0 or ids.max(initial=0) >= len(tokens) else _texts_and_lengths(tokens)

    def _text(self, ids: Int[np.ndarray, "I"]) -> str:
        return self.task.decode(ids) if self._written is None else "".join(self._written[0][ids].tolist())

    @functools.cached_property
    def roles(self) -> TokenRoles:
        """The automaton's view of each token, as numpy arrays [T]."""
        return spans.token_roles(self.token_ids, self.vocab)

    @functools.cached_property
    def mask(self) -> Bool[np.ndarray, "T T"]:
        """Which token attends to which."""
        return attention_mask(self.token_ids, self.vocab, self.config, self.policy)

    @functools.cached_property
    def parts(self) -> tuple[Step, ...]:
        """The steps of the response in order, after the tokens before the first of them; every response token is in one part."""
        if not len(self.response_ids):
            return ()
        roles = TokenRoles(*(role[self.prompt_tokens :] for role in self.roles))
        is_body = ~np.any([roles.is_header, *(self.response_ids == end_id for end_id in self.end_ids)], axis=0)
        starts = np.flatnonzero(np.diff(roles.step_index, prepend=-2))
        again = np.diff(roles.labels[starts], prepend=-1) == 0  # a step that only opens the label before once more closes that step
        starts = starts[~(again & (np.add.reduceat(is_body | (roles.names >= 0), starts) == 0))]
        opening = roles.step_index[starts]
        opened = (opening >= 0) & self.roles.is_header[opening]
        bounds, named = np.append(starts, len(roles.labels)), roles.names >= 0
        refs = _pieces(tuple(roles.names[named].tolist()), named, bounds)
        if self._written is None:  # the bytes of several tokens may make a character
            texts: Iterable[str] = map(self.task.decode, _pieces(self.response_ids[is_body], is_body, bounds))
        else:
            texts = _pieces(self._text(self.response_ids[is_body]), self._written[1][self.response_ids] * is_body, bounds)
        means = ((np.add.reduceat(x, starts) / np.diff(bounds)).tolist() for x in (self.num_attended, self.fractions))
        positions = itertools.starmap(range, itertools.pairwise((bounds + self.prompt_tokens).tolist()))
        return tuple(map(Step, roles.labels[starts].tolist(), refs, texts, *means, positions, opened.tolist()))

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that the response opens."""
        return tuple(part for part in self.parts if part.opened)

    @functools.cached_property
    def unresolved(self) -> Bool[np.ndarray, "T"]:
        """Mark the `<ref:k>` tokens that name a label which no token so far carries."""
        index, first = np.arange(len(self.token_ids)), np.full(self.vocab.num_labels, len(self.token_ids))
        np.minimum.at(first, self.roles.labels, index)  # token that carries each label
        return (self.roles.names >= 0) & (first[self.roles.names] > index)

    @property
    def unresolved_refs(self) -> int:
        """Count the `<ref:k>` tokens that name a label which no token carries."""
        return int(self.unresolved.sum())

    @property
    def finished(self) -> bool:
        """False where decoding stopped at the token limit instead of an end of text."""
        return self.ended

    @property
    def ended(self) -> bool:
        """Whether the response ends in an end of text."""
        return bool(len(self.response_ids) and self.response_ids[-1] in self.end_ids)

    @property
    def fractions(self) -> Float[np.ndarray, "R"]:
        """Share of its context, itself included, that each response token attended to."""
        return self.num_attended / np.arange(self.prompt_tokens + 1, len(self.token_ids) + 1)

    @property
    def attended_fraction(self) -> float:
        """Mean over response tokens of |attended| / (t + 1); dense decoding has 1. 0 where there are none."""
        return float(np.mean(self.fractions)) if len(self.response_ids) else 0.0

    @property
    def attended_tokens(self) -> float:
        """Mean over response tokens of |attended|; 0 where there are none."""
        return float(np.mean(self.num_attended)) if len(self.response_ids) else 0.0

    def _end_warnings(self) -> list[str]:
        """Say where the response repeats itself, and what stopped it."""
        written, loop, found = len(self.response_ids), None if self.finished else self._loop(), []
        if not self.finished and len(self.token_ids) >= self.config.max_context_tokens:
            found.append(f"The response was stopped before it had ended: with its {written} tokens the context of the model is full.")
        elif not self.finished:
            hint = "" if loop else " A higher limit gives more."
            found.append(f"The response was stopped before it had ended; tokens written: {written}.{hint}")
        if loop:
            text = clipped(" ".join(loop[0].split()), 60)
            told = f'"{text}" is written {loop[1]} times at its end' if text else "control tokens alone stand at its end"
            found.append(f"The response is a loop: {told}. More tokens would go on like that; a repetition penalty may help.")
        elif getattr(self.task, "view", "steps") == "sources":  # in other tasks two steps may well write the same
            begins = collections.Counter(" ".join(step.text.split()[:6]) for step in self.steps if step.text.strip())
            found += [f'The response repeats itself: {n} of its sentences begin with "{text}".' for text, n in begins.items() if n > 1]
        return found

    def _loop(self) -> tuple[str, int] | None:
        """Return the shortest text that the response has at least three times at its end, of 12 tokens in all or more, and how often.

        Which labels are opened and named does not count: a step that is written again has a label of its own.
        """
        is_header, size = self.roles.is_header[self.prompt_tokens :], len(self.response_ids)
        ids = np.where(is_header, -1, self.response_ids)[::-1]
        for period in range(1, size // 3 + 1):
            differs = np.flatnonzero(ids[period:] != ids[:-period])
            same = period + (int(differs[0]) if len(differs) else size - period)
            if same >= max(3 * period, 12):
                unit = np.arange(size - same, size - same + period)
                unit += np.argmax(is_header[unit])  # from where a step begins
                return self.task.decode(self.response_ids[unit[~is_header[unit]]]), same // period
        return None

    @property
    def warnings(self) -> list[str]:
        """What to know before one believes the response, a line each: how it was decoded, how it ended, what is wrong with its form."""
        vocab, config, written, found = self.vocab, self.config, len(self.response_ids), []
        if self.attention != config.mask and (self.roles.labels.any() or (self.fractions < 1).any()):
            found.append(attention_warning(self.attention, config.mask))
        found += self._end_warnings()
        if self.unresolved_refs:
            found.append(f"References to a label that no token carries, for which nothing was read: {self.unresolved_refs}.")
        if written and not self.steps and config.mask == "span" and vocab.solve_id in self.token_ids[: self.prompt_tokens]:
            found.append("The response opens no step.")
        elif self.steps and not self.parts[0].opened and (before := len(self.parts[0].indices) - len(self.parts[0].refs)):
            found.append(f"Tokens before the first step: {before}.")  # what `<solve>` names is no mistake
        if getattr(self.task, "view", "steps") == "sources":
            carried = {*self.roles.labels[: self.prompt_tokens].tolist()}
            if count := sum(step.label in carried for step in self.steps):
                found.append(f"Steps that open a label of the prompt in place of one of their own: {count}.")
        if count := int(np.isin(self.response_ids, (vocab.pad_id, vocab.bos_id, vocab.solve_id)).sum()):
            found.append(f"Tokens in the response that only prompts have (padding, beginning of text, <solve>): {count}.")
        return found


def attention_warning(attention: str, mask: str) -> str:
    """Say what to know of a response with another attention than the mask that its model was trained with."""
    return f"Decoded with {attention} attention, trained with {mask}: another computation than it learned."


def clipped(text: str, length: int) -> str:
    """Write the beginning of a text that is longer."""
    return text if len(text) <= length else text[: length - 1] + "…"


def attended_line(reading: Reading) -> str:
    """Say what the tokens of a response read on average, alike in a terminal and on a page; span tokens apart where they look wider."""
    line = f"attended: {reading.attended_tokens:.1f} tokens, {reading.attended_fraction:.1%} of the context"
    if reading.attention != "span" or reading.config.header_view == "span" or not len(reading.response_ids):
        return line
    by_kind = attended_by_kind([reading])
    kinds = {"text": by_kind["attended_fraction_body"], "span tokens": by_kind["attended_fraction_header"]}
    return f"{line} ({', '.join(f'{kind} {share:.1%}' for kind, share in kinds.items() if share is not None)})"


def attended(readings: Sequence[Reading]) -> dict[str, float]:
    """Average what the response tokens of several sequences attended to: `attended_fraction` and `attended_tokens`."""
    return {name: float(np.mean(values)) for name, values in _attended(readings)}


def attended_by_kind(readings: Sequence[Reading]) -> dict[str, float | None]:
    """Average the same over body tokens (`_body`) and header tokens, `<seg>` and `<ref>` (`_header`), apart.

    A kind without tokens has None. `header_share` is the share of header tokens.
    """
    header = np.concatenate([reading.roles.is_header[reading.prompt_tokens :] for reading in readings])
    means = {
        f"{name}_{kind}": float(np.mean(values[chosen])) if chosen.any() else None
        for name, values in _attended(readings)
        for kind, chosen in (("body", ~header), ("header", header))
    }
    return means | {"header_share": float(np.mean(header))}


def _attended(readings: Sequence[Reading]) -> Iterator[tuple[str, np.ndarray]]:
    yield "attended_fraction", np.concatenate([reading.fractions for reading in readings])
    yield "attended_tokens", np.concatenate([reading.num_attended for reading in readings])


def _pieces(values: V, sizes: Any, bounds: Int[np.ndarray, "S"]) -> list[V]:
    """Cut values, so many of each of R tokens, where the tokens are cut at `bounds`."""
    ends = np.append(0, np.cumsum(sizes))[bounds].tolist()
    return [values[start:end] for start, end in itertools.pairwise(ends)]


@functools.lru_cache(maxsize=8)
def _texts_and_lengths(tokens: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(tokens, object), np.array(list(map(len, tokens)))


def attention_mask(token_ids: Int[np.ndarray, "T"], vocab: SpanVocab, config: ModelConfig, policy: Policy) -> Bool[np.ndarray, "T T"]:
    """Compute which token attends to which under a policy and the model's views."""
    size = len(token_ids)
    return np.asarray(_policy_mask(policy, _rounded(token_ids, vocab), vocab, config)[0, :size, :size])


def _rounded(token_ids: Int[np.ndarray, "T"], vocab: SpanVocab) -> Int[Array, "1 R"]:
    """Pad to one of few lengths, so that few programs are compiled: what follows a token changes nothing about it."""
    padding = -len(token_ids) % 128
    return jnp.asarray(np.pad(token_ids, (0, padding), constant_values=vocab.pad_id))[None]


_policy_mask = jax.jit(lambda policy, *arguments: policy.mask(*arguments), static_argnums=(0, 2, 3))
