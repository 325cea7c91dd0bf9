"""A decoded response: its text, answer and verdict, and how it is shown."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from selfspan_jax.task import Verdict
from selfspan_jax.viewing import html
from selfspan_jax.viewing.reading import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Output(Reading):
    """A response, what it says and what each of its tokens read."""

    prompt: str

    def __repr__(self) -> str:
        return f"Output(prompt={self.prompt!r}, text={self.text!r}, answer={self.answer!r})"

    @functools.cached_property
    def text(self) -> str:
        """The response as written, span tokens included."""
        return self.task.decode(self.response_ids)

    @functools.cached_property
    def answer(self) -> str | None:
        """What the task reads as the response's answer; None where it has none."""
        return self.task.answer(self.response_ids)

    @functools.cached_property
    def verdict(self) -> Verdict | None:
        """What the task's verifier finds in the response; None where the task has no verifier."""
        verify = getattr(self.task, "verify", None)
        return verify(self.prompt, self.response_ids) if verify else None

    def to_json(self) -> dict[str, Any]:
        """Convert to what JSON can hold."""
        step_keys = ("label", "refs", "text", "attended_tokens")
        return {
            "prompt": self.prompt,
            "text": self.text,
            "answer": self.answer,
            "steps": [{key: getattr(step, key) for key in step_keys} for step in self.steps],
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

        return plots.plot_reading(self)

    def to_html(self) -> str:
        """Write a page that shows what each step read and what named it; it needs no network and no other file."""
        return html.document(self, self.prompt, self.answer)

    def _repr_html_(self) -> str:
        return html.fragment(self, self.prompt, self.answer)
