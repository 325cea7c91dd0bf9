"""What a run trains on and is scored on: examples generated as they are needed, or those of a corpus directory."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data import packing
from data.errors import UserError
from data.streams import ANY_LIMITS, GeneratedCorpus
from data.task import Task

if TYPE_CHECKING:
    from data.dataset import StoredCorpus

_MANY_EPOCHS = 10


def open_stored(path: Path | None, tasks: Mapping[str, type[Task]]) -> StoredCorpus | None:
    """Open a corpus directory for training, see `data.dataset.load`; None for none."""
    if path is None:
        return None
    from data import dataset  # which takes a second to import

    return dataset.load(path, tasks)


@dataclasses.dataclass(frozen=True)
class TrainingExamples:
    """Examples of a task, in the vocabulary of the model; made by `of`.

    Attributes:
      task: in that vocabulary.
      corpus: the settings that examples are drawn and written with.
      stored: the corpus directory; None where they are generated.
      num_workers: processes that generate examples, or write them again, beside one that packs them; 0 for none.
    """

    task: Task
    corpus: GeneratedCorpus[Any]
    stored: StoredCorpus | None = None
    num_workers: int = 0

    @classmethod
    def of(
        cls, task: type[Task], corpus: GeneratedCorpus[Any], stored: StoredCorpus | None, vocab: Any = None, num_workers: int = 0
    ) -> TrainingExamples:
        """Generate examples, or take those of a directory, written again where `vocab` is another than theirs.

        Raises: UserError if the directory, which is of that task, is of other settings than `corpus`.
        """
        if stored is None:
            return cls(task.of(corpus, vocab), corpus, num_workers=num_workers)
        for name, value in vars(corpus).items():
            if value != (there := getattr(stored.corpus, name)):
                option = name.replace("_", "-")
                raise UserError(f"--{option} is {value}, but {there} in {stored.path}, whose examples stay as they are: leave it out")
        return cls(stored.task if vocab is None else dataclasses.replace(stored.task, vocab=vocab), stored.corpus, stored, num_workers)

    def identity(self) -> dict[str, Any]:
        """Return what identifies the examples, as JSON: the directory and its content, and the settings."""
        if self.stored is None:
            return {"data": None, "data_fingerprint": None, "corpus": dataclasses.asdict(self.corpus)}
        from data import dataset

        path, settings = self.stored.path, self.stored.card["distributions"]
        return {"data": str(path.absolute()), "data_fingerprint": dataset.fingerprint(path), "corpus": settings}

    def batches_from(
        self, *, seed: int, sequence_tokens: int, num_shards: int, shards: Collection[int], **options: Any
    ) -> Callable[[Any], Iterator[packing.Batch]]:
        """Return the function from a position in the examples to the endless batches from there on; see `packing.batches_from`.

        Raises: UserError where examples are longer than a row, and where the vocabulary has room for none.
        """
        longest = int(self.lengths.max()) if self.stored else self.corpus.likely_longest_tokens(self.task.vocab)
        if longest > sequence_tokens:
            raise UserError(f"{self.trained_on} take up to {longest} tokens, a row only {sequence_tokens}: raise --sequence-tokens")
        stream: Callable[..., Iterator[Any]]
        if self.stored is None:
            workers = -(-self.num_workers // len(shards))
            stream = functools.partial(self.corpus.stream, vocab=self.task.vocab, seed=seed, num_workers=workers)
        else:
            stream = functools.partial(self.stored.stream, seed=seed, task=self.task if self._is_rewritten else None)
        sizes: dict[str, Any] = {"sequence_tokens": sequence_tokens, "num_workers": self.num_workers, "num_shards": num_shards}
        gaps: dict[str, Any] = {"gap_ids": self.task.step_ids, "gap_seed": seed}
        return packing.batches_from(stream, self.task.vocab, shards=list(shards), **sizes, **gaps, **options)

    def held_out(self, num_examples: int, *, seed: int) -> tuple[Sequence[Any], str | None]:
        """Return examples that the training does not see, and a line on those that the vocabulary has no room for, None without any.

        Raises: UserError where there is none.
        """
        if self.stored is None:
            return list(itertools.islice(self.corpus.stream(vocab=self.task.vocab, seed=seed, split="test"), num_examples)), None
        try:
            found, num_without_room = dataclasses.replace(self.stored, task=self.task).held_out(num_examples, seed=seed)
            left_out = _left_out(len(found), num_without_room, self.stored)
        except UserError as error:
            raise UserError(f"{error}; --eval-examples 0 trains without an evaluation") from error
        return found, left_out and f"warning: of those held out for evaluations {left_out}"

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """The tokens of each example of a directory, as training reads it, but of those that the vocabulary has no room for.

        Raises: UserError where it has room for none.
        """
        assert self.stored is not None
        found = self.stored.lengths(self.task if self._is_rewritten else None, self.num_workers)
        fitting = found[found > 0]
        _left_out(len(fitting), len(found) - len(fitting), self.stored)
        return fitting

    @property
    def num_left_out(self) -> int:
        """How many training examples the vocabulary has no room for."""
        return len(self.stored) - len(self.lengths) if self.stored else 0

    @property
    def left_out(self) -> str | None:
        """A line on training examples that the vocabulary has no room for, None without any."""
        left_out = _left_out(len(self.lengths), self.num_left_out, self.stored) if self.stored else None
        return left_out and f"warning: of those to train on {left_out}"

    @property
    def trained_on(self) -> str:
        """The training examples in a few words, in the plural."""
        if self.stored is None:
            return self.corpus.description
        every = "" if not self.num_left_out else f"{len(self.lengths):,} of "
        return f"{every}the {len(self.stored):,} examples of {self.stored.path.absolute().name} (split {self.stored.split})"

    def texts(self) -> dict[str, str]:
        """Return what the card of a model says: what it was trained and scored on, in a few words, and what it does not know."""
        scored_on, limits = f"fresh {self.corpus.description}", self.corpus.limits
        if self.stored is not None and not self.task.is_generated:
            scored_on = f"examples that were held out (split validation of {self.stored.path.absolute().name})"
            limits = ANY_LIMITS + (f" Licence of {licence}." if (licence := self.stored.card.get("licence")) else "")
        limits = f"It was trained on {self.trained_on} and nothing else. {limits}"
        return {"trained_on": self.trained_on, "scored_on": scored_on, "limits": limits}

    def warning(self, num_tokens: int) -> str | None:
        """Say where examples will be seen too often in so many tokens of training; None where they are not."""
        if self.stored is None or (epochs := num_tokens / self.lengths.sum()) <= _MANY_EPOCHS:
            return None
        more = f"generate examples (leave --data out), write more of them (python -m data {self.task.name} --num-examples N)"
        other = more if self.task.is_generated else "give more of them"
        return (
            f"warning: each of the {len(self.lengths):,} examples of {self.stored.path} will be seen about {epochs:,.0f} times: expect "
            f"them to be learnt by heart; {other}, or train for fewer --steps"
        )

    @property
    def _is_rewritten(self) -> bool:
        return self.stored is not None and self.stored.task.vocab != self.task.vocab


def unread(corpus: Any, views: Any) -> Iterator[str]:
    """Say what a corpus asks of tokens that do not read enough for it, a line each.

    Args:
      views: what tokens of the model attend to: `mask`, `header_view`, `prompt_view`, `prompt_window_tokens`.
    """
    if views.mask != "span":
        return
    if not getattr(corpus, "closed_pieces", True):
        if views.header_view == "labels":
            yield "warning: pieces are open (--no-closed-pieces): --header-view labels knows nothing of their text, --header-view all does"
        elif views.header_view == "all" and type(corpus).closed_pieces:
            yield "pieces are open (--no-closed-pieces): span tokens see all of the prompt (--header-view all)"
    names = [name for name in ("solve_names", "late_instruction") if getattr(corpus, name, False)]
    if names and views.prompt_view == "local" and (window := views.prompt_window_tokens) < corpus.max_prompt_tokens:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in names)
        end = f"the end of a prompt sees the last {window} tokens alone (--prompt-view local)"
        yield f"warning: {end}, but has to have read all of it for {options}: --prompt-view causal, or write the corpus without"


def held_out(
    task: Any, num_examples: int, *, seed: int = 1, ops: Sequence[int] = (), min_ops: int | None = None, max_ops: int | None = None
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Draw fresh examples of a task that no training sees; return them as sets by name, and how they were drawn.

    Args:
      ops: of expressions: operators of each set.
      min_ops, max_ops: without `ops`, the bounds of one set; by default the task's own.

    Raises: UserError for a task that has no expressions.
    """
    ranges = inspect.signature(task.held_out).parameters.get("ops")
    if ranges is None:
        options = {"--ops": ops or None, "--min-ops": min_ops, "--max-ops": max_ops}
        if given := [name for name, value in options.items() if value is not None]:
            raise UserError(f"{' and '.join(given)} is for fresh expressions, not for {task.name}")
        return task.held_out(num_examples, seed=seed), {"seed": seed}
    ((low, high),) = ranges.default
    bounds = (low if min_ops is None else min_ops, high if max_ops is None else max_ops)
    sets = task.held_out(num_examples, seed=seed, ops=[(n, n) for n in ops] or [bounds])
    return sets, {"seed": seed, **({"ops": ops} if ops else dict(zip(("min_ops", "max_ops"), bounds)))}


def stored(
    directory: Path, task: Any, tasks: Mapping[str, type[Task]], num_examples: int, split: str | None = None
) -> tuple[Any, dict[str, list[Any]], dict[str, Any]]:
    """Take examples for a model of a task from a corpus directory, by default of its test split, of validation where it has none.

    Returns: the task that scores them, `Task.on` the corpus's, and the examples and how they were drawn, as `held_out`.
    Raises: UserError for a corpus of another task, and for one that the model has no room for.
    """
    from data import dataset  # which imports Hugging Face's datasets

    if split is None:
        there = dataset.splits(directory)
        split = next((unseen for unseen in ("test", "validation") if unseen in there), None)
    corpus = dataset.load(directory, tasks, split)
    try:
        scored_by = task.on(corpus.task)
    except UserError as error:
        raise UserError(f"{directory} {error}") from None
    name = directory.resolve().name
    found, num_without_room = dataset.with_room(corpus, scored_by, num_examples)
    warnings = [*corpus.warnings, *(f"{directory}: {line}" for line in scored_by.foreign())]
    drawn: dict[str, Any] = {"data": name, "split": corpus.split, "warnings": warnings}
    if left_out := _left_out(len(found), num_without_room, corpus):
        drawn |= {"num_without_room": num_without_room, "warnings": [*warnings, left_out]}
    return scored_by, {name: found}, drawn


def _left_out(num_found: int, num_without_room: int, corpus: StoredCorpus) -> str | None:
    """Say how many examples of a corpus a model has no room for, None without any. UserError: all of them."""
    if not num_without_room:
        return None
    of_all = f"{num_without_room} of {num_without_room + num_found} examples of {corpus.path}"
    message = f"{of_all}: as this model writes them they exceed its tokens or labels"
    if names := [name for name in ("max_prompt_tokens", "max_example_tokens") if hasattr(corpus.task, name)]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        message += f"; python -m data --tokenizer counts in its words, {options} and --num-labels say for how many there is room"
    if not num_found:
        raise UserError(f"no room for {message}")
    return f"left out, without room for them: {message}"
