"""Corpus directories as they are written: whole or not at all. What reads them is `data.dataset`."""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data import card
from data.errors import UserError
from data.streams import SPLITS
from data.task import Task

FIXED = {"format": "selfspan corpus", "version": 1}  # what each card has
_BLOCK_EXAMPLES = 4096  # what is held as Python objects at a time


def write(path: Path, examples: Iterable[Any], task: Task, description: Mapping[str, Any]) -> dict[str, int]:
    """Write the examples and their card to a new directory; the same input gives the same bytes. Return their number by split.

    Args:
      examples: of one split, or (split, example) pairs where the description's "split" is None: then the directory has one of each.
      description: goes into the card: at least "command", "split" and "distributions". Read when the examples have ended, so
        that what was counted meanwhile can be in it.

    Raises:
      FileExistsError, NotADirectoryError: `path` exists and is not an empty directory, or lies below a file.
      UserError: it cannot be written, or of several splits none is "train".
    """
    only = description["split"]
    with new_directory(path) as directory:
        parts: dict[str, _Part] = {} if only is None else {only: _Part(task)}
        for split, example in examples if only is None else ((only, example) for example in examples):
            if split not in parts:
                parts[split] = _Part(task)
            parts[split].add(example)
        if only is not None:
            parts[only].save(directory, description)
        else:
            _save_splits(directory, parts, task, description)
    return {split: len(parts[split]) for split in (*SPLITS, only) if split in parts}


def _save_splits(directory: Path, parts: Mapping[str, "_Part"], task: Task, description: Mapping[str, Any]) -> None:
    if SPLITS[0] not in parts:
        there = " and ".join(f"{len(part):,} in {split}" for split, part in parts.items())
        counted = next((f" ({card.listed(own)})" for own in description.values() if isinstance(own, Mapping) and "read" in own), "")
        raise UserError(f"no example is in the train split, only {there}{counted}: give more, or write them undivided with --split all")
    found = [split for split in SPLITS if split in parts]
    for split in found:
        parts[split].save(directory / split, {**description, "split": split})
    _write_text(directory / "dataset_dict.json", json.dumps({"splits": found}))
    lines = (f"- [{split}]({split}/README.md): {len(parts[split]):,} examples" for split in found)
    _write_text(directory / "README.md", f"# {task.name} corpus\n\n    {description['command']}\n\n" + "\n".join(lines) + "\n")


class _Part:
    """Examples of one split, as rows, on their way to disk."""

    def __init__(self, task: Task) -> None:
        self._task, self._features, self._statistics = task, features(task), task.statistics()
        self._rows: list[dict[str, Any]] = []
        self._blocks: list[datasets.Dataset] = []
        self._digest = hashlib.sha256(json.dumps(task.to_json()).encode())

    def __len__(self) -> int:
        return sum(map(len, self._blocks)) + len(self._rows)

    def add(self, example: Any) -> None:
        self._statistics.add(example)
        self._rows.append({**self._task.to_row(example), "prompt_tokens": example.prompt_tokens, "token_ids": example.token_ids})
        sizes = [len(example.token_ids), example.prompt_tokens]
        self._digest.update(np.concatenate([sizes, example.token_ids]).astype("<i4").tobytes())
        if len(self._rows) == _BLOCK_EXAMPLES:
            self._end_block()

    def _end_block(self) -> None:
        self._blocks.append(datasets.Dataset.from_list(self._rows, features=self._features))
        self._rows = []

    def save(self, directory: Path, description: Mapping[str, Any]) -> None:
        try:
            self._save(directory, description)
        except OSError as error:
            raise UserError(f"{directory.parent}: the corpus cannot be written in it: {error.strerror or error}") from error

    def _save(self, directory: Path, description: Mapping[str, Any]) -> None:
        if self._rows or not self._blocks:
            self._end_block()
        dataset = datasets.concatenate_datasets(self._blocks)
        counted = {"num_examples": len(dataset), "fingerprint": self._digest.hexdigest(), "statistics": self._statistics.to_json()}
        fields = {**FIXED, "task": self._task.to_json(), **description, **counted}
        with contextlib.ExitStack() as stack:
            if not datasets.are_progress_bars_disabled():  # it draws them even where there is no terminal
                datasets.disable_progress_bars()
                stack.callback(datasets.enable_progress_bars)
            dataset.select_columns(list(self._features), new_fingerprint=self._digest.hexdigest()[:16]).save_to_disk(directory)
        _write_text(directory / "card.json", json.dumps(fields, indent=2) + "\n")
        _write_text(directory / "README.md", self._statistics.readme(fields))


def _write_text(file: Path, text: str) -> None:
    """Write UTF-8, whatever the locale. Bytes of a path that were not decoded (PEP 383) may be UTF-8 as well; others show as escapes."""
    undecoded = text.encode("utf-8", "surrogateescape")
    file.write_text(undecoded.decode("utf-8", "backslashreplace"), encoding="utf-8")


def check_new(path: Path) -> None:
    """Check that a corpus can be written to a path.

    Raises:
      FileExistsError, NotADirectoryError: it exists and is not an empty directory, or lies below a file.
      UserError: what it lies in cannot be written to.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory: choose another, or remove it first")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file: expected a directory to write {path.name} in")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"{parent}: {path.name} cannot be written in it: {error.strerror}") from None


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a temporary directory beside `path` that takes its place when the body ends well, and vanishes when it does not.

    A process that is killed leaves it as `.NAME.PID.partial`, and the next call for that path removes it. Raises as `check_new`.
    """
    check_new(path)
    absolute, is_written = path.absolute(), False
    missing = list(itertools.takewhile(lambda parent: not parent.exists(), absolute.parents))
    temporary = absolute.with_name(f".{absolute.name}.{os.getpid()}.partial")
    for left in absolute.parent.glob(f".{glob.escape(absolute.name)}.*.partial"):
        if not _is_running(left.suffixes[-2].removeprefix(".")):
            shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, absolute)  # replaces an empty directory, refuses any other
        is_written = True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in () if is_written else missing:
            with contextlib.suppress(OSError):  # there is something of others in it by now
                parent.rmdir()


def _is_running(pid: str) -> bool:
    """Tell whether there is a process of a number on this machine; True where it cannot be told."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, OSError):  # no number, or another user's
        return True
    return True


def features(task: Task | type[Task]) -> datasets.Features:
    """Return a task's columns as `datasets` has them: "int32", "string", [values of a list] or {name: value}."""

    def feature(column: Any) -> Any:
        match column:
            case str():
                return datasets.Value(column)
            case [item]:
                return datasets.List(feature(item))
        return {name: feature(value) for name, value in column.items()}

    return datasets.Features(feature(task.columns))
