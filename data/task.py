"""The base class of tasks, and the part of `python -m data TASK` that all share."""

import abc
import dataclasses
import shlex
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from data.card import Statistics
from data.errors import UserError, check_json, check_range
from data.streams import GeneratedCorpus
from data.vocab import TokenizerVocab, Vocab

T = TypeVar("T", bound="Task")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand:
    """Options of `python -m data TASK`; a task's own subclass says which corpus, and adds options where it needs them.

    Attributes:
      out: Directory to write; it must not exist, or be empty.
      num_examples: How many examples, at most.
      seed: The same seed gives the same bytes of every file.
      split: The splits share no prompt.
      workers: Processes that make examples; 0 makes them in the main process. The files are the same.
      corpus: What is drawn and how it is written.
    """

    out: Path
    num_examples: int | None = 1000
    seed: int = 0
    split: Any = "train"
    workers: int = 0
    corpus: GeneratedCorpus[Any]

    def __post_init__(self) -> None:
        if self.num_examples is not None and self.num_examples < 1:
            raise UserError(f"--num-examples is {self.num_examples}; allowed: 1 and above")
        check_range(self, "workers", "seed", low=0)

    def drawn(self) -> dict[str, Any]:
        """Return the options that say which examples are written, for the card."""
        return {"num_examples": self.num_examples, "seed": self.seed, "split": self.split}

    def settings(self) -> dict[str, Any]:
        """Return the options that say what examples are like, for the card."""
        return dataclasses.asdict(self.corpus)

    def make_task(self, kind: "type[Task]", vocab: Any) -> "Task":
        """Return the task of the corpus, of its own class and in the vocabulary that `make` returned."""
        return kind.of(self.corpus, vocab)

    def make(self) -> tuple[Any, Generator[Any, None, None], dict[str, Any]]:
        """Return the vocabulary, the examples, and what else the card says of them once they are written.

        Without a split the examples are (split, example) pairs, each of one of `data.streams.SPLITS`.
        """
        return self.corpus.vocab, self.corpus.stream(seed=self.seed, split=self.split, num_workers=self.workers), {}

    def words(self, *left_out: str) -> str:
        """Write the options that decide the result as on a command line, but some."""
        words = []
        for name, value in {**self.drawn(), **self.settings()}.items():
            if value is None or name in left_out:
                continue
            option = name.replace("_", "-")
            words.append(f"--{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"--{option} {shlex.quote(str(value))}")
        return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Turn text into ids and back for models, draw examples, and read and write the rows of corpus directories.

    A task is a frozen dataclass of the vocabulary and those settings of its corpus that say how text is written. A model
    directory and a corpus's card keep it as JSON. `selfspan_jax.task.Task` says what else it may have: a
    verifier or scores among others.
    """

    vocab: Vocab

    name: ClassVar[str]
    version: ClassVar[int]
    """Of its JSON."""
    Corpus: ClassVar[type[GeneratedCorpus[Any]]]
    WriteCommand: ClassVar[type[WriteCommand]]
    unit: ClassVar[str]
    """What an evaluation counts per second."""
    columns: ClassVar[Mapping[str, Any]]
    """The columns of a corpus directory, "token_ids" and "prompt_tokens" among them: "int32", "string", [item] or {name: column}."""

    @classmethod
    def of(cls: type[T], settings: Any, vocab: Any = None) -> T:
        """Return the task of a corpus, in the corpus's own vocabulary or the one given. What its settings do not say is the default."""
        _, *names = (field.name for field in dataclasses.fields(cls))
        known = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
        return cls(settings.vocab if vocab is None else vocab, **known)

    @property
    def step_ids(self) -> frozenset[int]:
        """The tokens at which rotary positions may jump in training: those at which a piece of the text begins."""
        return frozenset(range(self.vocab.seg_base, self.vocab.seg_base + self.vocab.num_labels))

    @abc.abstractmethod
    def encode_prompt(self, text: str) -> npt.NDArray[np.int32]:
        """Write the prompt of a text, int32 [n], labels from 1 on. UserError: the text is no prompt."""

    def warnings(self, text: str) -> list[str]:
        """Say what of a prompt's text is beyond what the corpus has, and what of it is not read, a line each; none by default."""
        return []

    def foreign(self) -> list[str]:
        """Say that a model was trained on other tasks' prompts, in a line; empty where it was not, or that is not known."""
        return []

    def decode(self, token_ids: Iterable[int]) -> str:
        """Write ids [n] as text, span tokens included."""
        return self.vocab.decode(token_ids)

    @property
    def tokens(self) -> tuple[str, ...] | None:
        """The text of each id, where texts are those of their tokens, one after the other; None where several may make a character."""
        return None if isinstance(self.vocab, TokenizerVocab) else self.vocab.tokens

    @abc.abstractmethod
    def answer(self, response_ids: Iterable[int]) -> str | None:
        """Read the answer of a response; None where there is none."""

    @abc.abstractmethod
    def held_out(self, num_examples: int, *, seed: int) -> dict[str, list[Any]]:
        """Draw examples of the test split, labels from 1 on, in sets by name."""

    @property
    def is_generated(self) -> bool:
        """Whether its corpus is drawn without end; otherwise it came from a file, and `held_out` can draw nothing like it."""
        return True

    @abc.abstractmethod
    def renumber(self, example: Any, uniform: float | None = None) -> Any:
        """Write an example again in this task's vocabulary; None where that has no room for it.

        Labels count from 1 on, as in `encode_prompt`, or from where `uniform`, in [0, 1), says (see `Vocab.first_label`).
        """

    def rewrite(self, example: Any, uniform: float, vocab: Vocab) -> Any:
        """Write an example of another vocabulary in this task's, as `renumber` does."""
        return self.renumber(example, uniform)

    def on(self, other: "Task") -> "Task":
        """Return the task that puts and scores another one's examples to a model of this task. UserError: they are not for it."""
        if other.name != self.name:
            raise UserError(f"is a corpus of {other.name}; allowed: {self.name}")
        return self

    def settings(self) -> dict[str, Any]:
        """Return the settings of its corpus that say how text is written."""
        _, *names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict for `from_json`."""
        return {"task": self.name, "version": self.version, **self.settings(), "vocab": self.vocab.to_json()}

    @classmethod
    def from_json(cls: type[T], fields: Any) -> T:
        """Read what `to_json` returned. UserError: unknown or missing keys, another task or version."""
        names = [field.name for field in dataclasses.fields(cls)]
        found = check_json(fields, "task", {"task": cls.name, "version": cls.version}, names)
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        return cls(**{**values, "vocab": Vocab.from_json(values["vocab"])})

    @abc.abstractmethod
    def to_row(self, example: Any) -> dict[str, Any]:
        """Return the columns of an example in a corpus directory, but "token_ids" and "prompt_tokens", which all have."""

    @abc.abstractmethod
    def from_row(self, row: Mapping[str, Any]) -> Any:
        """Read a row; its "token_ids" are int32 [n]."""

    @abc.abstractmethod
    def statistics(self) -> Statistics:
        """Return the empty statistics of a corpus."""
