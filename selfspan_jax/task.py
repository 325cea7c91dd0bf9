"""Describe what a task offers a model: text to ids and back, and, where it has them, a verifier, scores and examples."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Int

from selfspan_jax.errors import UserError
from selfspan_jax.spans import SpanVocab


class Task(Protocol):
    """Turn text into ids and back. Packages offer their tasks under the entry point `selfspan.tasks`.

    What a task has beyond this, evaluations and command lines use:
      unit, what an evaluation counts per second, in JSON `{unit}_per_second`: "problems";
      held_out(num_examples, *, seed) -> dict[str, list[Example]], sets of examples that no training sees, by name, labels
        from 1 on, as `encode_prompt` writes them;
      warnings(prompt) -> list[str], what of a prompt is beyond what its models were trained on, and what of it they do not read;
      verify(prompt, response_ids) -> Verdict, which judges one response: then right answers per second are counted;
      scores(examples, responses) -> dict[str, float], the scores of a task that has no verifier;
      on(other) -> Task, another task as a model of this one reads it, or a ValueError: see `read_by`;
      counts(example, response_ids) -> {score: (sum, weight)}, what one example adds to the scores, each the ratio of the two over all;
      headers(example, sources) -> the labels that each step is to name in place of what the model names, by a name of where from;
      opens(example, sources) -> which labels the steps then open, as `forcing.Order`, where that follows from the prompt;
      beginnings(prompt) -> token ids with one of which the text of each step is to begin, where decoding is constrained to that;
      tool_prompt(messages, tools) -> str, the text of a prompt of a chat with functions, and tool_calls(prompt, response_ids, tools), the
        calls of a response: `name`, `arguments` as JSON, and the `pieces` that each names;
      score_kinds, a mapping that says which scores stand together in a table ({"ROUGE": ("rouge1", "rouge2")});
      group(prompt) -> str, what an evaluation tells apart, such as the number of operators, with `group_by`, which names
        the groups in JSON ("ops"), and `group_title`, which heads them in tables ("operators");
      view, how a response is laid out as text: "steps" (the default) or "sources".
      tokens, the text of each id, where the text of several is theirs, one after the other: then steps are read faster;
      stop_ids, ids that end a response beside the vocabulary's `<eos>`;
      encode_chat(said) -> ids, text as a user's message, or messages, under the tokenizer's chat template, the answer to follow.
    """

    def encode_prompt(self, text: str) -> Int[np.ndarray, "T"]:
        """Encode text up to and including `<solve>`. Raises an error (a ValueError) of one line for text that is no prompt."""

    def decode(self, token_ids: Iterable[int]) -> str: ...
    def answer(self, response_ids: Iterable[int]) -> str | None: ...
    def to_json(self) -> dict[str, Any]: ...
    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Task: ...


def end_ids(task: Task, vocab: SpanVocab) -> tuple[int, ...]:
    """Return the ids that end a response: `<eos>`, and the task's own ones."""
    return (vocab.eos_id, *getattr(task, "stop_ids", ()))


class Verdict(Protocol):
    """What a task's verifier finds in a response; `message` says it in one line."""

    answer_right: bool
    steps_right: bool
    spans_right: bool
    message: str


JUDGED = ("answer_right", "steps_right", "spans_right")


def judgement(verdict: Verdict, *, ended: bool = True) -> Literal["right", "flawed", "stopped", "wrong"]:
    """Sum up a verdict in a word; "flawed" is a right answer of wrong steps or spans, "stopped" none of a response without its end."""
    if not verdict.answer_right:
        return "wrong" if ended else "stopped"
    return "right" if all(getattr(verdict, name) for name in JUDGED) else "flawed"


class Example(Protocol):
    """A prompt, as its task's `encode_prompt` takes it, and the ids of its gold response."""

    @property
    def prompt(self) -> str: ...
    @property
    def response_ids(self) -> Int[np.ndarray, "R"]: ...


def installed_tasks() -> dict[str, type[Task]]:
    """Load the tasks of installed packages by name, this project's among them (`pip install -e .`).

    An entry point is the class of a task, under the task's name, or a mapping from names to classes. One that cannot be imported
    is left out with a warning.

    Raises: UserError where a file of the user's takes the name of a package that is installed beside this one, as `data` is.
    """
    tasks: dict[str, type[Task]] = {}
    for entry in metadata.entry_points(group="selfspan.tasks"):
        _check_name(entry.module.partition(".")[0])
        try:
            loaded = entry.load()
        except (ImportError, AttributeError) as error:  # of another package: the others work without it
            warnings.warn(f"entry point {entry.name} = {entry.value} of selfspan.tasks cannot be loaded: {error}", stacklevel=2)
            continue
        tasks |= loaded if isinstance(loaded, Mapping) else {entry.name: loaded}
    return tasks


def read_by(own: Any, name: str, tasks: Mapping[str, Any]) -> Task:
    """Return the task of this name as a model of another one reads its prompts. UserError: there is none, or none for such a model."""
    if name not in tasks or not hasattr(own, "on"):
        raise UserError(f"task is {name!r}; allowed: {', '.join(sorted(tasks))}")
    if (found := _read_by(own, tasks[name])) is None:
        others = [other for other in sorted(tasks) if _read_by(own, tasks[other])]
        raise UserError(f"task is {name!r}, but the model is of {own.name}; allowed: {', '.join(others)}")
    return found


def _read_by(own: Any, other: Any) -> Task | None:
    try:
        found: Task = own.on(other(vocab=own.vocab))
    except ValueError:  # not for such a model
        return None
    return found


def _check_name(package: str) -> None:
    """Raise UserError where Python would import, or has imported, something else by the name of a package beside this one."""
    home = Path(__file__).parents[1]
    own = home / package / "__init__.py"
    if not own.exists():
        return
    found = importlib.util.find_spec(package)
    if package not in sys.modules and (found is None or found.origin is None):  # a directory of files, not of modules
        sys.path.append(str(home))  # which an editable install leaves to a finder that comes after such directories
        found = importlib.util.find_spec(package)
    if found is None or found.origin is None or not own.samefile(found.origin):
        other = found.origin or next(iter(found.submodule_search_locations or ()), None) if found else None
        raise UserError(f"{other} takes the name of selfspan's package {package!r}: rename it, or keep its directory off Python's path")
