"""What goes into a scheduler and comes out of it: requests, their tokens, what it refuses, and what it counts."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from selfspan_jax.config import MAX_SEED, Sampling
from selfspan_jax.errors import UserError, check_ids
from selfspan_jax.serving.running import LogProbs

Finished = Literal["stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to go on from."""

    prompt_ids: Int[np.ndarray, "T"]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    """Of what is drawn: 0 to 2**63 - 1."""
    sample: int = 0
    """Which of the seed's sequences this is: sample i of `Engine.generate` with `num_samples`."""
    logprobs: bool = False
    """Whether `Tokens` have log-probabilities."""
    expected_tokens: int | None = None
    """Length of the response, where it is known: the request begins when there is room for its pages, and all others', until they end."""

    def check(self, vocab_size: int, context_tokens: int, room: int) -> None:
        """Raise UserError for what can never run: `context_tokens` are those of a sequence, and there is cache for `room` tokens."""
        token_ids = np.asarray(self.prompt_ids)
        if token_ids.ndim != 1 or not token_ids.size or not np.issubdtype(token_ids.dtype, np.integer):
            raise UserError(f"prompt_ids are {token_ids.dtype} of shape {token_ids.shape}; expected whole numbers [T], at least one")
        check_ids(token_ids, vocab_size)
        for name, (least, most) in {"max_new_tokens": (1, context_tokens), "seed": (0, MAX_SEED), "sample": (0, 2**32 - 1)}.items():
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value <= most:
                raise UserError(f"{name} is {value!r}; allowed: whole numbers from {least} to {most}")
        if not isinstance(self.sampling, Sampling):
            raise UserError(f"sampling is {self.sampling!r}; expected a Sampling")
        if len(token_ids) + self.max_new_tokens > (room := min(context_tokens, room)):
            raise UserError(f"{len(token_ids)} prompt tokens and {self.max_new_tokens} new ones exceed the {room} that a sequence may have")


class Tokens(NamedTuple):
    """What a chunk gave one request. The last one of a request, and no other, says how it finished."""

    token_ids: Int[np.ndarray, "C"]
    num_attended: Int[np.ndarray, "C"]
    finished: Finished | None = None
    error: str | None = None
    logprobs: LogProbs | None = None
    """[C] and [C, L], where the request asks for them."""

    @classmethod
    def none(cls, finished: Finished | None = None, error: str | None = None) -> Tokens:
        """Give no token, but perhaps an end."""
        return cls(np.zeros(0, np.int32), np.zeros(0, np.int32), finished, error)


class QueueFull(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The scheduler takes no more requests."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts: what is there now, and what there has been since the start."""

    running: int = 0
    reading: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    pages_free: int = 0
    prompt_tokens: int = 0
    """Read, those of shared pages excluded and those of sequences that were read again included."""
    prefix_hit_tokens: int = 0
    """Of prompts, found in shared pages."""
    generated_tokens: int = 0
    attended_tokens: int = 0
    """Read by the generated tokens, each of them itself included."""
    context_tokens: int = 0
    """That a dense model would have read for the same tokens."""
    copied_rows: int = 0
    """Copied from pages in host memory to working sets, because steps named them; each once for all layers."""
    missed_rows: int = 0
    """Read in host memory by the attention itself, over the link."""
    preemptions: int = 0
    waited_seconds: float = 0.0
    """That the host had nothing to do but to wait for a chunk's tokens; where it does not rise, the device waits for the host."""
    finished: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Requests by how they ended."""

    def ended(self) -> Stats:
        """Return what is left of these counts when their scheduler has ended: what there has been."""
        return dataclasses.replace(self, running=0, reading=0, waiting=0, pages_used=0, pages_cached=0, pages_free=0)

    @classmethod
    def sum(cls, several: Sequence[Stats]) -> Stats:
        """Add up the counts of several schedulers."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "finished"]
        ended = sum((own.finished for own in several), collections.Counter[str]())
        return cls(**{name: sum(getattr(own, name) for own in several) for name in names}, finished=ended)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Join what a request was given."""
    token_ids, num_attended = (np.concatenate([tokens[i] for tokens in parts]) for i in range(2))
    scores = [tokens.logprobs for tokens in parts if tokens.logprobs is not None]
    return Tokens(token_ids, num_attended, *parts[-1][2:4], LogProbs(*map(np.concatenate, zip(*scores))) if scores else None)
