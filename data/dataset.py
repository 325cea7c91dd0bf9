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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from data import arithmetic, card, news, streams
from data.news import card as news_card
from data.vocab import check_json

_FIXED = {"format": "selfspan corpus", "version": 1}
_READ_EXAMPLES = 256
_BLOCK_EXAMPLES = 4096  # what is held as Python objects at a time
_INT = datasets.Value("int32")
_TEXT = datasets.Value("string")
_ARITHMETIC = datasets.Features(
    {
        "expression": _TEXT,
        "answer": _TEXT,
        "num_ops": _INT,
        "first_label": _INT,
        "prompt_tokens": _INT,
        "token_ids": datasets.List(_INT),
    }
)
_NEWS = datasets.Features(
    {
        "article": datasets.List(_TEXT),
        "summary": datasets.List(_TEXT),
        "sources": datasets.List(datasets.List(_INT)),
        "facts": datasets.List({"sentence": _INT, "kind": _TEXT, "text": _TEXT}),
        "first_label": _INT,
        "prompt_tokens": _INT,
        "token_ids": datasets.List(_INT),
    }
)


class _Kind(NamedTuple):
    """How examples of a task become rows and rows examples, and what is said of them."""

    task: Any
    features: datasets.Features
    to_row: Callable[[Any], dict[str, Any]]
    from_row: Callable[[Any, Mapping[str, Any]], Any]
    statistics: Callable[[Any], Any]
    readme: Callable[[Mapping[str, Any]], str]


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


def write(path: Path, examples: Iterable[Any], task: Any, description: Mapping[str, Any]) -> None:
    """Writes the examples and their card to a new directory; the same input gives the same bytes.

    Args:
      description: goes into the card as it is: at least "command", "num_examples", "split" and "distributions". Read when
        the examples have ended, so that what was counted meanwhile can be in it.

    Raises:
      FileExistsError, NotADirectoryError: see `new_directory`.
    """
    kind = _KINDS[task.name]
    with new_directory(path) as directory:
        statistics = kind.statistics(task.vocab)
        blocks: list[datasets.Dataset] = []
        columns: dict[str, list[Any]] = {name: [] for name in kind.features}
        for example in examples:
            statistics.add(example)
            for name, value in kind.to_row(example).items():
                columns[name].append(value)
            if len(columns["token_ids"]) == _BLOCK_EXAMPLES:
                blocks.append(datasets.Dataset.from_dict(columns, features=kind.features))
                columns = {name: [] for name in kind.features}
        blocks.append(datasets.Dataset.from_dict(columns, features=kind.features))
        fields = {**_FIXED, "task": task.to_json(), **description, "statistics": statistics.to_json()}
        dataset = datasets.concatenate_datasets(blocks)
        fingerprint = hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]
        with _no_progress_bar():
            dataset.select_columns(list(kind.features), new_fingerprint=fingerprint).save_to_disk(directory)
        (directory / "card.json").write_text(json.dumps(fields, indent=2) + "\n")
        (directory / "README.md").write_text(kind.readme(fields))


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


def _arithmetic_example(task: arithmetic.ArithmeticTask, row: Mapping[str, Any]) -> arithmetic.Example:
    expression = arithmetic.parse(row["expression"])
    ids, prompt_tokens = np.array(row["token_ids"], np.int32), row["prompt_tokens"]
    jumps = arithmetic.jumps_of(ids, prompt_tokens, task.vocab)
    return arithmetic.Example(expression, ids, prompt_tokens, row["first_label"], task.labelling, jumps)


_KINDS = {
    "arithmetic": _Kind(arithmetic.ArithmeticTask, _ARITHMETIC, _row, _arithmetic_example, card.Statistics, card.readme),
    "news": _Kind(news.NewsTask, _NEWS, news.to_row, news.from_row, news_card.Statistics, news_card.readme),
}


@dataclasses.dataclass(frozen=True)
class StoredCorpus:
    """A dataset directory open for reading; made by `load`. `card` is what its `card.json` says."""

    path: Path
    task: Any
    card: Mapping[str, Any]
    dataset: datasets.Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def stream(self, *, seed: int, start: int = 0, part: streams.Part = streams.ALL) -> Iterator[Any]:
        """Endless examples from number `start` on: epoch after epoch, each in an order of its own, drawn from the seed.

        Args:
          part: (p, n): every n-th example of an epoch's order, from the p-th on; `start` counts these.

        Raises:
          ValueError: a negative seed or start, more parts than examples; (on iterating) a row that is not an example of the task.
        """
        if seed < 0 or start < 0:
            raise ValueError(f"seed is {seed} and start {start}: expected at least 0")
        if part[1] > len(self):
            raise ValueError(f"{self.path}: {len(self)} examples cannot be read in {part[1]} parts")
        return self._epochs(seed, part, *divmod(start, len(range(part[0], len(self), part[1]))))

    def _epochs(self, seed: int, part: streams.Part, epoch: int, skipped: int) -> Iterator[Any]:
        while True:
            order = np.random.default_rng((seed, epoch)).permutation(len(self))[part[0] :: part[1]]
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
            raise ValueError(f"{self.path}: example {number} has no <solve> at the end of its prompt_tokens, {prompt_tokens}")
        if token_ids.min() < 0 or token_ids.max() >= self.task.vocab.size:
            raise ValueError(f"{self.path}: example {number} has ids outside its vocabulary of {self.task.vocab.size} tokens")
        return _KINDS[self.task.name].from_row(self.task, row)


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
        named = fields["task"].get("task") if isinstance(fields.get("task"), dict) else None
        kind = _KINDS[named if named in _KINDS else "arithmetic"]  # whose from_json says what is wrong
        task = kind.task.from_json(fields.get("task"))
        dataset = datasets.load_from_disk(str(path))
    except (ValueError, OSError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a corpus directory that this version reads, or it is damaged: {error}") from error
    if not isinstance(dataset, datasets.Dataset) or dataset.features != kind.features:
        raise ValueError(f"{path} is not a corpus directory: expected one dataset with the columns {', '.join(kind.features)}")
    if not len(dataset) or len(dataset) != fields.get("num_examples"):
        raise ValueError(f"{path} is damaged: {len(dataset)} examples where its card says {fields.get('num_examples')}")
    return StoredCorpus(path, task, fields, dataset)
