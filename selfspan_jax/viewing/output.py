"""A decoded response: its text, answer and verdict, and how it is shown."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from selfspan_jax.task import JUDGED, Task, Verdict, judgement
from selfspan_jax.viewing import html
from selfspan_jax.viewing.reading import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MANY_MISSES = 0.1  # of the rows that a response reads: some are always read while a working set fills


def prompt_warnings(task: Task, prompt: str) -> list[str]:
    """Return what a task says of a prompt that is beyond its models. Raises what `task.encode_prompt` raises."""
    return task.warnings(prompt) if hasattr(task, "warnings") else []


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Output(Reading):
    """A response, what it says and what each of its tokens read."""

    prompt: str
    stopped_by: str | None = None
    """The stop string before which the response ends."""
    surplus: int = 0
    """Characters of the last token that belong to the stop string."""
    misses: int | None = None
    """Rows that its tokens read in host memory, with `kv_memory="host"`; None where none lie there, and where they are not counted for each
    response: in a stream, with stop strings, and where a scheduler decodes many."""

    def __repr__(self) -> str:
        shown = f"prompt={self.prompt!r}, text={self.text!r}, answer={self.answer!r}"
        wrong = f", verdict={self.verdict.message!r}" if self.verdict and judgement(self.verdict) != "right" else ""
        return f"Output({shown}{wrong}{f', warnings={self.warnings}' if self.warnings else ''})"

    @functools.cached_property
    def text(self) -> str:
        """The response as written, span tokens included, without the stop string that ended it."""
        text = self._text(self.response_ids)
        return text[: len(text) - self.surplus]

    @property
    def finished(self) -> bool:
        """Whether `<eos>` or a stop string ended the response, and not the token limit."""
        return self.ended or self.stopped_by is not None

    @functools.cached_property
    def warnings(self) -> list[str]:  # type: ignore[override]  # computed once
        """What to know before one believes the response, a line each; first what of the prompt the model was not trained for."""
        found = [*prompt_warnings(self.task, self.prompt), *super().warnings]
        if self._is_cut_short and self.stopped_by is not None:
            found.append(f'The response was stopped before its answer, by the stop text "{self.stopped_by}".')
        if (self.misses or 0) > _MANY_MISSES * (read := int(self.num_attended.sum())):
            found.append(
                f"{self.misses} of {read} rows that the response read were in host memory and not in its working set, which is slow: "
                "give a larger working set (working_set_tokens, --working-set-tokens), or take an attention that reads less (one that "
                "reads everything, like dense, is for keys and values on the device)."
            )
        return found

    @functools.cached_property
    def answer(self) -> str | None:
        """What the task reads as the response's answer, without the stop string that ended it; None where it has none.

        Where a response was stopped, what its last step wrote is none, unless the task's verifier finds it right.
        """
        answer = None if self._is_cut_short else self.task.answer(self.response_ids)
        if not answer or not self.surplus:
            return answer
        assert self.stopped_by is not None
        return answer.removesuffix(self.stopped_by[: self.surplus])

    @functools.cached_property
    def verdict(self) -> Verdict | None:
        """What the task's verifier finds in the response; None where the task has no verifier."""
        verify = getattr(self.task, "verify", None)
        return verify(self.prompt, self.response_ids) if verify else None

    @property
    def _is_cut_short(self) -> bool:
        return self.verdict is not None and judgement(self.verdict, ended=self.ended) == "stopped"

    def to_json(self) -> dict[str, Any]:
        """Convert to what JSON can hold."""
        step_keys = ("label", "refs", "text", "attended_tokens", "attended_fraction")
        return {
            "prompt": self.prompt,
            "text": self.text,
            "answer": self.answer,
            "verdict": self.verdict and {name: getattr(self.verdict, name) for name in (*JUDGED, "message")},
            "warnings": self.warnings,
            "steps": [{key: getattr(step, key) for key in step_keys} for step in self.steps],
            "token_ids": self.token_ids.tolist(),
            "prompt_tokens": self.prompt_tokens,
            "num_attended": self.num_attended.tolist(),
            "attention": self.attention,
            "finished": self.finished,
            "stopped_by": self.stopped_by,
            "unresolved_refs": self.unresolved_refs,
            "attended_fraction": self.attended_fraction,
            **({} if self.misses is None else {"misses": self.misses}),
        }

    def plot(self) -> Figure:
        """Draw the attention mask, tokens attended to by position, and KV rows read by each step, as a matplotlib figure."""
        from selfspan_jax.viewing import plots  # matplotlib takes half a second

        return plots.plot_reading(self)

    def to_html(self) -> str:
        """Write a page that shows what each step read and what named it; it needs no network and no other file."""
        return html.document(self, self.prompt, self.answer, self.verdict)

    def _repr_html_(self) -> str:
        return html.fragment(self, self.prompt, self.answer, self.verdict)
