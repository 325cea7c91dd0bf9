"""Dataset directories: written once, whole or not at all, and read back as endless epochs of examples.

A directory holds what `datasets.load_from_disk` reads, `card.json` (how it was made, and its statistics) and
`README.md` (the same for people).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data import arithmetic, card
from data.vocab import check_json

_FIXED = {"format": "selfspan corpus", "version": 1}
_READ_EXAMPLES = 256
_BLOCK_EXAMPLES = 4096  # what is held as Python objects at a time
_FEATURES = datasets.Features(
    {
        "expression": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "num_ops": datasets.Value("int32"),
        "first_label": datasets.Value("int32"),
        "prompt_tokens": datasets.Value("int32"),
        "token_ids": datasets.List(datasets.Value("int32")),
    }
)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place when the body ends well, and vanishes when it does not.

    Raises:
      FileExistsError, NotADirectoryError: `path` exists and is not an empty directory, or lies below a file.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory: choose another, or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f"{error.filename} is a file: expected a directory to write {path.name} in") from None
    temporary = path.absolute().with_name(f".{path.absolute().name}.{os.getpid()}.partial")
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)  # replaces an empty directory, refuses any other
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(path: Path, examples: Iterable[arithmetic.Example], task: arithmetic.ArithmeticTask, description: Mapping[str, Any]) -> None:
    """Writes the examples and their card to a new directory; the same input gives the same bytes.

    Args:
      description: goes into the card as it is: at least "command", "num_examples", "split" and "distributions".

    Raises:
      FileExistsError, NotADirectoryError: see `new_directory`.
    """
    with new_directory(path) as directory:
        statistics = card.Statistics(task.vocab)
        blocks: list[datasets.Dataset] = []
        columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
        for example in examples:
            statistics.add(example)
            for name, value in _row(example).items():
                columns[name].append(value)
            if len(columns["token_ids"]) == _BLOCK_EXAMPLES:
                blocks.append(datasets.Dataset.from_dict(columns, features=_FEATURES))
                columns = {name: [] for name in _FEATURES}
        blocks.append(datasets.Dataset.from_dict(columns, features=_FEATURES))
        fields = {**_FIXED, "task": task.to_json(), **description, "statistics": statistics.to_json()}
        dataset = datasets.concatenate_datasets(blocks)
        fingerprint = hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]
        with _no_progress_bar():
            dataset.select_columns(list(_FEATURES), new_fingerprint=fingerprint).save_to_disk(directory)
        (directory / "card.json").write_text(json.dumps(fields, indent=2) + "\n")
        (directory / "README.md").write_text(card.readme(fields))


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """`datasets` draws its bars even where there is no terminal."""
    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def _row(example: arithmetic.Example) -> dict[str, Any]:
    return {
        "expression": example.expression.text,
        "answer": str(example.expression.value),
        "num_ops": example.expression.num_ops,
        "first_label": example.first_label,
        "prompt_tokens": example.prompt_tokens,
        "token_ids": example.token_ids,
    }


@dataclasses.dataclass(frozen=True)
class StoredCorpus:
    """A dataset directory open for reading; made by `load`. `card` is what its `card.json` says."""

    path: Path
    task: arithmetic.ArithmeticTask
    card: Mapping[str, Any]
    dataset: datasets.Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def stream(self, *, seed: int, start: int = 0) -> Iterator[arithmetic.Example]:
        """Endless examples from number `start` on: epoch after epoch, each in an order of its own, drawn from the seed.

        Raises:
          ValueError: a negative seed or start; (on iterating) a row that is not an example of the task.
        """
        if seed < 0 or start < 0:
            raise ValueError(f"seed is {seed} and start {start}: expected at least 0")
        return self._epochs(seed, *divmod(start, len(self)))

    def _epochs(self, seed: int, epoch: int, skipped: int) -> Iterator[arithmetic.Example]:
        while True:
            order = np.random.default_rng((seed, epoch)).permutation(len(self))
            for block in range(skipped, len(self), _READ_EXAMPLES):
                numbers = order[block : block + _READ_EXAMPLES]
                columns = self.dataset[numbers]
                for i, number in enumerate(numbers):
                    yield self._example(int(number), {name: values[i] for name, values in columns.items()})
            epoch, skipped = epoch + 1, 0

    def _example(self, number: int, row: Mapping[str, Any]) -> arithmetic.Example:
        token_ids = np.array(row["token_ids"], np.int32)
        prompt_tokens = row["prompt_tokens"]
        if not 0 < prompt_tokens < len(token_ids) or token_ids[prompt_tokens - 1] != self.task.vocab.solve_id:
            raise ValueError(f"{self.path}: example {number} has no <solve> at the end of its prompt_tokens, {prompt_tokens}")
        if token_ids.min() < 0 or token_ids.max() >= self.task.vocab.size:
            raise ValueError(f"{self.path}: example {number} has ids outside its vocabulary of {self.task.vocab.size} tokens")
        expression = arithmetic.parse(row["expression"])
        return arithmetic.Example(expression, token_ids, prompt_tokens, row["first_label"], self.task.labelling)


def load(path: Path | str) -> StoredCorpus:
    """Opens a dataset directory that `write` made.

    Raises:
      FileNotFoundError, NotADirectoryError: there is no such directory.
      ValueError: it is not a corpus directory of ours, of another version, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such directory; python -m data arithmetic --out {path} would write one")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: expected a directory that python -m data wrote")
    if not (path / "card.json").is_file():
        raise ValueError(f"{path} is not a corpus directory: it has no card.json; python -m data writes one")
    try:
        fields = json.loads((path / "card.json").read_bytes())
        if not isinstance(fields, dict):
            raise ValueError("expected a JSON object")
        check_json({key: fields.get(key) for key in _FIXED}, "card", _FIXED, ())
        task = arithmetic.ArithmeticTask.from_json(fields.get("task"))
        dataset = datasets.load_from_disk(str(path))
    except (ValueError, OSError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a corpus directory that this version reads, or it is damaged: {error}") from error
    if not isinstance(dataset, datasets.Dataset) or dataset.features != _FEATURES:
        raise ValueError(f"{path} is not a corpus directory: expected one dataset with the columns {', '.join(_FEATURES)}")
    if not len(dataset) or len(dataset) != fields.get("num_examples"):
        raise ValueError(f"{path} is damaged: {len(dataset)} examples where its card says {fields.get('num_examples')}")
    return StoredCorpus(path, task, fields, dataset)
