"""A decoded response: its text, answer and steps, and what each of its tokens read."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from selfspan_jax.task import Task, Verdict
from selfspan_jax.viewing import html
from selfspan_jax.viewing.reading import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a response: the label that it opens, the labels that it names, and the text that it writes."""

    label: int
    refs: tuple[int, ...]
    text: str
    attended_tokens: float
    """Tokens that the step's own tokens attended to, on average."""

    def __str__(self) -> str:
        return f"<seg:{self.label}>{''.join(f'<ref:{ref}>' for ref in self.refs)}{self.text}"


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """A response, what it says and what each of its tokens read."""

    prompt: str
    text: str
    """The response as written, span tokens included."""
    answer: str | None
    """What the task reads as the response's answer; None where it has none."""
    reading: Reading = dataclasses.field(repr=False)
    """The sequence as arrays: tokens, roles, mask, steps."""
    task: Task = dataclasses.field(repr=False)

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """The steps that the response opens."""
        reading, found = self.reading, []
        for step in reading.steps:
            if step.opened:
                body = step.indices[~reading.roles.is_header[step.indices] & (self.token_ids[step.indices] != reading.vocab.eos_id)]
                found.append(Step(step.label, step.refs, self.task.decode(self.token_ids[body]), reading.step_attended(step)[0]))
        return tuple(found)

    @property
    def token_ids(self) -> Int[np.ndarray, "T"]:
        """Prompt and response."""
        return self.reading.token_ids

    @property
    def prompt_tokens(self) -> int:
        return self.reading.prompt_tokens

    @property
    def response_ids(self) -> Int[np.ndarray, "R"]:
        return self.reading.response_ids

    @property
    def attention(self) -> str:
        """Name of the policy under which it was decoded."""
        return self.reading.policy.name

    @property
    def num_attended(self) -> Int[np.ndarray, "R"]:
        """For each response token, how many tokens it attended to, itself included."""
        return self.reading.num_attended

    @property
    def attended_fraction(self) -> float:
        """Mean over response tokens of |attended| / (t + 1); dense decoding has 1."""
        return self.reading.attended_fraction

    @property
    def finished(self) -> bool:
        """False where decoding stopped at the token limit instead of `<eos>`."""
        return self.reading.finished

    @property
    def unresolved_refs(self) -> int:
        """Count the `<ref:k>` tokens that name a label which no token carries."""
        return int(self.reading.unresolved.sum())

    @functools.cached_property
    def verdict(self) -> Verdict | None:
        """What the task's verifier finds in the response; None where the task has no verifier."""
        verify = getattr(self.task, "verify", None)
        return verify(self.prompt, self.response_ids) if verify else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the form of the response, one line each."""
        return self.reading.warnings

    def to_json(self) -> dict[str, Any]:
        """Convert to what JSON can hold."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "answer": self.answer,
            "steps": [dataclasses.asdict(step) for step in self.steps],
            "token_ids": self.token_ids.tolist(),
            "prompt_tokens": self.prompt_tokens,
            "num_attended": self.num_attended.tolist(),
            "attention": self.attention,
            "finished": self.finished,
            "unresolved_refs": self.unresolved_refs,
            "attended_fraction": self.attended_fraction,
        }

    def plot(self) -> Figure:
        """Draw the attention mask, tokens attended to by position, and KV rows read by each step, as a matplotlib figure."""
        from selfspan_jax.viewing import plots  # matplotlib takes half a second

        return plots.plot_reading(self.reading)

    def save_plot(self, file: Path) -> None:
        """Draw `plot` into a PNG, SVG or PDF file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self.plot().savefig(file, dpi=100)

    def to_html(self) -> str:
        """Write a page that shows what each step read and what named it; it needs no network and no other file."""
        return html.document(self.reading, self.prompt, self.answer)

    def _repr_html_(self) -> str:
        return html.fragment(self.reading, self.prompt, self.answer)
