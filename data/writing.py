"""The part of `python -m data TASK` that all tasks share."""

import collections
import dataclasses
import shlex
from collections.abc import Generator
from pathlib import Path
from typing import Any, ClassVar

from data import streams
from data.errors import UserError


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

    task_name: ClassVar[str]

    out: Path
    num_examples: int = 1000
    seed: int = 0
    split: Any = "train"
    workers: int = 0
    corpus: streams.GeneratedCorpus[Any]

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise UserError(f"--num-examples is {self.num_examples}: expected at least 1")
        if self.workers < 0:
            raise UserError(f"--workers is {self.workers}: expected at least 0")

    def drawn(self) -> dict[str, Any]:
        """Return the options that say which examples are written, for the card."""
        return {"num_examples": self.num_examples, "seed": self.seed, "split": self.split}

    def settings(self) -> dict[str, Any]:
        """Return the options that say what examples are like, for the card."""
        return dataclasses.asdict(self.corpus)

    def vocab_and_examples(self, counts: collections.Counter[str]) -> tuple[Any, Generator[Any, None, None]]:
        """Return the vocabulary and the examples; `counts` counts what the card says of where they come from."""
        return self.corpus.vocab, self.corpus.stream(seed=self.seed, split=self.split, num_workers=self.workers)

    def words(self) -> str:
        """Write the options that decide the result as on a command line."""
        return " ".join(_option(name.replace("_", "-"), value) for name, value in {**self.drawn(), **self.settings()}.items())


def _option(name: str, value: Any) -> str:
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {shlex.quote(str(value))}"
