"""Describe what a task offers a model: text to ids and back, and, where it has them, a verifier, scores and examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int


class Task(Protocol):
    """Turn text into ids and back. Packages offer their tasks under the entry point `selfspan.tasks`."""

    def encode_prompt(self, text: str) -> Int[np.ndarray, "T"]:
        """Encode text up to and including `<solve>`. Raises ValueError for text that is no prompt."""

    def decode(self, token_ids: Iterable[int]) -> str: ...

    def answer(self, response_ids: Iterable[int]) -> str | None: ...

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Task: ...


class Verdict(Protocol):
    """What a task's verifier finds in a response."""

    @property
    def answer_right(self) -> bool: ...
    @property
    def steps_right(self) -> bool: ...
    @property
    def spans_right(self) -> bool: ...
    @property
    def message(self) -> str: ...


class Example(Protocol):
    """A prompt, as its task's `encode_prompt` takes it, and the ids of its gold response."""

    @property
    def prompt(self) -> str: ...
    @property
    def response_ids(self) -> Int[np.ndarray, "R"]: ...


class ScoringTask(Task, Protocol):
    """A task that scores responses to its examples."""

    def scores(self, examples: Sequence[Any], responses: Sequence[Iterable[int]]) -> dict[str, float]: ...


def installed_tasks() -> dict[str, type[Task]]:
    """Load the tasks of installed packages by name, this project's among them (`pip install -e .`).

    An entry point is the class of a task, under the task's name, or a mapping from names to classes.
    """
    tasks: dict[str, type[Task]] = {}
    for entry in metadata.entry_points(group="selfspan.tasks"):
        loaded = entry.load()
        tasks |= loaded if isinstance(loaded, Mapping) else {entry.name: loaded}
    return tasks
