"""Corpus directories: written once, whole or not at all, and read back as endless epochs of examples.

A directory holds what `datasets.load_from_disk` reads, `card.json` (how it was made, and its statistics) and
`README.md` (the same as text).
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data import streams
from data.errors import UserError, check_json
from data.task import Task

_FIXED = {"format": "selfspan corpus", "version": 1}
_READ_EXAMPLES = 256
_BLOCK_EXAMPLES = 4096  # what is held as Python objects at a time


def write(path: Path, examples: Iterable[Any], task: Task, description: Mapping[str, Any]) -> None:
    """Write the examples and their card to a new directory; the same input gives the same bytes.

    Args:
      description: goes into the card: at least "command", "split" and "distributions". Read when the examples have ended, so
        that what was counted meanwhile can be in it.

    Raises:
      FileExistsError, NotADirectoryError: `path` exists and is not an empty directory, or lies below a file.
    """
    features, statistics = _features(task), task.statistics()

    def rows() -> Iterator[dict[str, Any]]:
        for example in examples:
            statistics.add(example)
            yield {**task.to_row(example), "prompt_tokens": example.prompt_tokens, "token_ids": example.token_ids}

    with _new_directory(path) as directory, contextlib.ExitStack() as stack:
        left, blocks = rows(), []
        while block := list(itertools.islice(left, _BLOCK_EXAMPLES)):
            blocks.append(datasets.Dataset.from_list(block, features=features))
        dataset = datasets.concatenate_datasets(blocks)
        counted = {"num_examples": len(dataset), "statistics": statistics.to_json()}
        fields = {**_FIXED, "task": task.to_json(), **description, **counted}
        fingerprint = hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]
        if not datasets.are_progress_bars_disabled():  # it draws them even where there is no terminal
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        dataset.select_columns(list(features), new_fingerprint=fingerprint).save_to_disk(directory)
        (directory / "card.json").write_text(json.dumps(fields, indent=2) + "\n")
        (directory / "README.md").write_text(statistics.readme(fields))


def _features(task: Task | type[Task]) -> datasets.Features:
    """Return a task's columns as `datasets` has them: "int32", "string", [values of a list] or {name: value}."""

    def feature(column: Any) -> Any:
        match column:
            case str():
                return datasets.Value(column)
            case [item]:
                return datasets.List(feature(item))
        return {name: feature(value) for name, value in column.items()}

    return datasets.Features(feature(task.columns))


@contextlib.contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """Make a temporary directory beside `path` that takes its place when the body ends well, and vanishes when it does not."""
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


@dataclasses.dataclass(frozen=True)
class StoredCorpus:
    """A corpus directory open for reading; made by `load`. `card` is what its `card.json` says."""

    path: Path
    task: Task
    card: Mapping[str, Any]
    dataset: datasets.Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the examples in their order."""
        for number, row in enumerate(self.dataset):
            yield self._example(number, row)

    def stream(self, *, seed: int, start: int = 0, shard: streams.Shard = streams.WHOLE) -> Iterator[Any]:
        """Read examples without end, from number `start` on: epoch after epoch, each in an order of its own, drawn from the seed.

        Args:
          shard: (i, n) reads every n-th example of an epoch's order, from the i-th on; `start` counts these.

        Raises:
          UserError: a negative seed or start, more shards than examples; (on iterating) a row that is not an example of the task.
        """
        if seed < 0 or start < 0:
            raise UserError(f"seed is {seed} and start {start}: expected at least 0")
        if shard[1] > len(self):
            raise UserError(f"{self.path}: {len(self)} examples cannot be read in {shard[1]} shards")
        return self._epochs(seed, shard, *divmod(start, len(range(shard[0], len(self), shard[1]))))

    def _epochs(self, seed: int, shard: streams.Shard, epoch: int, skipped: int) -> Iterator[Any]:
        while True:
            order = np.random.default_rng((seed, epoch)).permutation(len(self))[shard[0] :: shard[1]]
            for block in range(skipped, len(order), _READ_EXAMPLES):
                numbers = order[block : block + _READ_EXAMPLES]
                columns = self.dataset[numbers]
                for i, number in enumerate(numbers):
                    yield self._example(int(number), {name: values[i] for name, values in columns.items()})
            epoch, skipped = epoch + 1, 0

    def _example(self, number: int, row: Mapping[str, Any]) -> Any:
        token_ids = np.array(row["token_ids"], np.int32)
        prompt_tokens = row["prompt_tokens"]
        if not 0 < prompt_tokens < len(token_ids) or token_ids[prompt_tokens - 1] != self.task.vocab.solve_id:
            raise UserError(f"{self.path}: example {number} has no <solve> at the end of its prompt_tokens, {prompt_tokens}")
        if token_ids.min() < 0 or token_ids.max() >= self.task.vocab.size:
            raise UserError(f"{self.path}: example {number} has ids outside its vocabulary of {self.task.vocab.size} tokens")
        return self.task.from_row({**row, "token_ids": token_ids})


def load(path: Path | str, tasks: Mapping[str, type[Task]]) -> StoredCorpus:
    """Open a corpus directory that `write` made.

    Args:
      tasks: by name, `data.tasks.TASKS` say; the directory names its own.

    Raises:
      FileNotFoundError, NotADirectoryError: there is no such directory.
      UserError: it is not a corpus directory of one of the tasks, of another version, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such directory; python -m data TASK --out {path} would write one")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: expected a directory that python -m data wrote")
    if not (path / "card.json").is_file():
        raise UserError(f"{path} is not a corpus directory: it has no card.json; python -m data writes one")
    try:
        fields = json.loads((path / "card.json").read_bytes())
        if not isinstance(fields, dict):
            raise UserError("expected a JSON object")
        check_json({key: fields.get(key) for key in _FIXED}, "card", _FIXED, ())
        name = fields["task"]["task"]
        if name not in tasks:
            raise UserError(f"its task is {name!r}: expected one of {', '.join(tasks)}")
        task = tasks[name].from_json(fields["task"])
        dataset = datasets.load_from_disk(str(path))
    except (ValueError, OSError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a corpus directory that this version reads, or it is damaged: {error}") from error
    features = _features(task)
    if not isinstance(dataset, datasets.Dataset) or dataset.features != features:
        raise UserError(f"{path} is not a corpus directory: expected one dataset with the columns {', '.join(features)}")
    if not len(dataset) or len(dataset) != fields.get("num_examples"):
        raise UserError(f"{path} is damaged: {len(dataset)} examples where its card says {fields.get('num_examples')}")
    return StoredCorpus(path, task, fields, dataset)
