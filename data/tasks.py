"""The registry of tasks: what `python -m data`, train.py, decode.py and `SpanLM.load` know by name."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from data.arithmetic import ArithmeticTask
from data.news import NewsTask
from data.streams import GeneratedCorpus
from data.writing import WriteCommand


class Statistics(Protocol):
    """Statistics of a corpus, for its card."""

    def add(self, example: Any) -> None:
        """Count one more example."""

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict, for `card.json`."""

    def readme(self, fields: Mapping[str, Any]) -> str:
        """Write the card's JSON as Markdown."""


class Task(Protocol):
    """What a task's class offers: text to ids and back for models, examples, and rows of corpus directories.

    `selfspan_jax.task.Task` says what else it may have: a verifier or scores among others.
    """

    name: ClassVar[str]
    Corpus: ClassVar[type[GeneratedCorpus[Any]]]
    WriteCommand: ClassVar[type[WriteCommand]]
    unit: ClassVar[str]
    """What an evaluation counts per second."""
    columns: ClassVar[Mapping[str, Any]]
    """The columns of a corpus directory, "token_ids" and "prompt_tokens" among them: "int32", "string", [item] or {name: column}."""

    @property
    def vocab(self) -> Any: ...
    @property
    def step_ids(self) -> frozenset[int]:
        """The tokens at which rotary positions may jump in training: those at which a piece of the text begins."""

    @classmethod
    def of(cls, settings: Any, vocab: Any = None) -> "Task":
        """Return the task of a corpus, in the corpus's own vocabulary or the one given."""

    def encode_prompt(self, text: str) -> npt.NDArray[np.int32]: ...
    def decode(self, token_ids: Iterable[int]) -> str: ...
    def answer(self, response_ids: Iterable[int]) -> str | None: ...
    def held_out(self, num_examples: int, *, seed: int) -> dict[str, list[Any]]:
        """Draw examples of the test split, labels from 1 on, in sets by name."""

    def renumber(self, example: Any) -> Any:
        """Write an example again, labels from 1 on, as `encode_prompt` does; None where that cannot be."""

    def to_json(self) -> dict[str, Any]: ...
    @classmethod
    def from_json(cls, fields: Any) -> "Task": ...
    def to_row(self, example: Any) -> dict[str, Any]: ...
    def from_row(self, row: Mapping[str, Any]) -> Any: ...
    def statistics(self) -> Statistics: ...


TASKS: dict[str, type[Task]] = {
    "arithmetic": ArithmeticTask,
    "news": NewsTask,
}
