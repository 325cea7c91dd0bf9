"""Corpus directories as they are read back: endless epochs of examples. What writes them is `data.writing`.

A directory holds what `datasets.load_from_disk` reads, `card.json` (how it was made, and its statistics) and
`README.md` (the same as text). A file of articles, say, is divided: its directory holds `train/`, `validation/` and `test/`,
each such a directory, which `load_from_disk` reads as one DatasetDict.

    stored = dataset.load(DIR, TASKS)               # what to train on; load(DIR, TASKS, split="test") the held-out part
    stored.corpus                                   # the settings that it was drawn with, an instance of the task's Corpus
    stored.held_out(128, seed=0)                    # examples that no training on DIR sees, labels from 1 on, and how many were too long
    stored.epochs(num_tokens)                       # how often each example is seen in so many tokens of training
    stored.stream(seed=0, task=other)               # the same examples in another vocabulary, such as a pretrained model's
    dataset.splits(DIR)                             # ("train", "validation", "test"), or the one that there is
    dataset.fingerprint(DIR)                        # what identifies the content, whatever the path
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.compute
from tqdm import tqdm

from data import streams, workers
from data.errors import UserError, check_json
from data.sources import REPEATED, num_written
from data.streams import SPLITS
from data.task import Task
from data.vocab import translation
from data.writing import FIXED, features

_READ_EXAMPLES = 256


@dataclasses.dataclass(frozen=True)
class StoredCorpus:
    """A corpus directory open for reading; made by `load`.

    Attributes:
      path: as it was given to `load`, whichever of its splits this is.
      task: in the vocabulary that the corpus is written in.
      card: what its `card.json` says.
    """

    path: Path
    task: Task
    card: Mapping[str, Any]
    dataset: datasets.Dataset
    tasks: Mapping[str, type[Task]]

    @property
    def split(self) -> str:
        """The split that it is: "train", "validation", "test", or "all" of what was not divided."""
        return str(self.card["split"])

    @property
    def warnings(self) -> list[str]:
        """Say where a model may have been trained on these examples, so that scores on them say little; a line each."""
        if self.split in ("test", "validation"):
            repeated = num_written(self.card, REPEATED)
            return [f"{self.path}: {repeated:,} examples, of all splits, {REPEATED}: scores on them say little."] if repeated else []
        what = "is not divided" if self.split == "all" else f"is the {self.split} split"
        return [f"{self.path} {what}: the model may have been trained on these examples, and know them by heart."]

    @functools.cached_property
    def corpus(self) -> Any:
        """The settings that it was drawn and written with: an instance of its task's `Corpus`. UserError: of another version."""
        settings, names = self.task.settings() | self.card["distributions"], [field.name for field in dataclasses.fields(self.task.Corpus)]  # type: ignore[arg-type]
        if absent := [name for name in names if name not in settings]:
            raise UserError(f"{self.path}: its card does not say {', '.join(absent)}: written by an older version; write it anew")
        return self.task.Corpus(**{name: tuple(v) if isinstance(v := settings[name], list) else v for name in names})

    @functools.cached_property
    def _lengths(self) -> npt.NDArray[np.int32]:
        return pyarrow.compute.list_value_length(self.dataset.data.column("token_ids")).to_numpy()

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples together, prompts and responses."""
        return int(self._lengths.sum())

    def lengths(self, task: Task | None = None, num_workers: int = 0) -> npt.NDArray[np.int32]:
        """Count the tokens of each example, int32 [n]; of a task in another vocabulary, as `stream` writes them, 0 where it has no room.

        Where that writes text otherwise, or has fewer labels, all are written once, by `num_workers` processes if they are many.
        """
        own, other = self.task.vocab, self.task.vocab if task is None else task.vocab
        if task is None or (translation(own, other) is not None and other.num_labels >= own.num_labels):
            return self._lengths
        num_chunks = -(-len(self) // _READ_EXAMPLES)
        chunks = workers.ordered(functools.partial(self._rewritten_lengths, task), 0, num_workers if num_chunks > 2 else 0)
        with contextlib.closing(chunks), tqdm(total=len(self), desc="count tokens", unit="example", leave=False, disable=None) as bar:
            found: list[npt.NDArray[np.int32]] = []
            for lengths in itertools.islice(chunks, num_chunks):
                found.append(lengths)
                bar.update(len(lengths))
            return np.concatenate(found)

    def _rewritten_lengths(self, task: Task, chunk: int) -> npt.NDArray[np.int32]:
        numbers = range(chunk * _READ_EXAMPLES, min((chunk + 1) * _READ_EXAMPLES, len(self)))
        found = (task.rewrite(self._example(number, self.dataset[number]), 0.0, self.task.vocab) for number in numbers)
        return np.array([0 if own is None else len(own.token_ids) for own in found], np.int32)

    def epochs(self, num_tokens: int) -> float:
        """Return how often each example is seen in so many tokens of training (steps x rows x tokens of a row)."""
        return num_tokens / self.num_tokens

    def held_out(self, num_examples: int, *, seed: int, split: str = "validation") -> tuple[list[Any], int]:
        """Return examples that no training on this directory sees, labels from 1 on, and how many the vocabulary had no room for.

        They are the first of that split of the directory; where examples are generated and it has no such split, they are
        drawn with its settings from the task's test split.

        Raises:
          UserError: a corpus of a file without that split, or of nothing else, which is trained on then.
        """
        found = splits(self.path)
        if split in found and split != self.split:
            examples = iter(load(self.path, self.tasks, split=split))
        elif self.task.is_generated:
            examples = self.corpus.stream(seed=seed, split="test", vocab=self.task.vocab)
        else:
            what = f"has a {split} split alone, which is trained on" if split in found else f"has no {split} split, only {', '.join(found)}"
            raise UserError(f"{self.path} {what}: nothing is held out")
        return with_room(examples, self.task, num_examples)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the examples in their order."""
        for number, row in enumerate(self.dataset):
            yield self._example(number, row)

    def stream(
        self, *, seed: int, start: int = 0, shard: streams.Shard = streams.WHOLE, task: Task | None = None
    ) -> Generator[Any, None, None]:
        """Read examples without end, from number `start` on: epoch after epoch, each in an order of its own, drawn from the seed.

        Args:
          shard: (i, n) reads every n-th example of an epoch's order, from the i-th on; `start` counts these.
          task: the same task in another vocabulary, to write the examples in, labels from a place drawn anew each time. One that
            this vocabulary has no room for is left out: the next one of the order that has room stands in its place.

        Raises:
          UserError: a negative seed or start, more shards than examples; (on iterating) a row that is not an example of the task,
            or no example that the other vocabulary has room for.
        """
        if seed < 0 or start < 0:
            raise UserError(f"seed is {seed} and start {start}; allowed: 0 and above")
        if shard[1] > len(self):
            raise UserError(f"{self.path}: {len(self)} examples cannot be read in {shard[1]} shards")
        return self._epochs(seed, shard, task, *divmod(start, len(range(shard[0], len(self), shard[1]))))

    def _epochs(self, seed: int, shard: streams.Shard, task: Task | None, epoch: int, skipped: int) -> Generator[Any, None, None]:
        while True:
            order = np.random.default_rng((seed, epoch)).permutation(len(self))[shard[0] :: shard[1]]
            for block in range(skipped, len(order), _READ_EXAMPLES):
                numbers = order[block : block + _READ_EXAMPLES]
                columns = self.dataset[numbers]
                for i, number in enumerate(numbers):
                    example = self._example(int(number), {name: values[i] for name, values in columns.items()})
                    yield example if task is None else self._rewritten(example, task, order, block + i, (seed, epoch))
            epoch, skipped = epoch + 1, 0

    def _rewritten(self, example: Any, task: Task, order: npt.NDArray[np.int64], place: int, seeds: tuple[int, int]) -> Any:
        """Write the example at a place of an epoch's order in the vocabulary of a task, or the next one that it has room for."""
        for further in range(len(order)):
            number = int(order[(place + further) % len(order)])
            uniform = np.random.default_rng((*seeds, number)).random()
            chosen = self._example(number, self.dataset[number]) if further else example
            if (found := task.rewrite(chosen, uniform, self.task.vocab)) is not None:
                return found
        raise UserError(f"{self.path}: the vocabulary has room for none of its examples")

    def _example(self, number: int, row: Mapping[str, Any]) -> Any:
        token_ids = np.array(row["token_ids"], np.int32)
        prompt_tokens = row["prompt_tokens"]
        if not 0 < prompt_tokens < len(token_ids) or token_ids[prompt_tokens - 1] != self.task.vocab.solve_id:
            raise UserError(f"{self.path}: example {number} has no <solve> at the end of its prompt_tokens, {prompt_tokens}")
        if token_ids.min() < 0 or token_ids.max() >= self.task.vocab.size:
            raise UserError(f"{self.path}: example {number} has ids outside its vocabulary of {self.task.vocab.size} tokens")
        return self.task.from_row({**row, "token_ids": token_ids})


def with_room(examples: Iterable[Any], task: Task, num_examples: int) -> tuple[list[Any], int]:
    """Write examples again in a task's vocabulary, until there are so many; return them, and how many it had no room for."""
    found: list[Any] = []
    num_without_room = 0
    for example in map(task.renumber, examples):
        if example is None:
            num_without_room += 1
            continue
        found.append(example)
        if len(found) == num_examples:
            break
    return found, num_without_room


def splits(path: Path | str) -> tuple[str, ...]:
    """Name the splits of a corpus directory: those that it was divided into, or the one that it is. Raises as `load` does."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such directory; python -m data TASK --out {path} would write one")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: expected a directory that python -m data wrote")
    if (path / "card.json").is_file():
        return (str(_card(path).get("split")),)
    if not (found := tuple(split for split in SPLITS if (path / split / "card.json").is_file())):
        raise UserError(f"{path} is not a corpus directory: it has no card.json; python -m data writes one")
    return found


def _directory(path: Path, split: str) -> Path:
    """Return where a split of a corpus directory lies."""
    return path if (path / "card.json").is_file() else path / split


def fingerprint(path: Path | str) -> str:
    """Identify the content of a corpus directory: its tasks, vocabulary and examples in order, of all splits. Raises as `load` does.

    The files of examples are read, so that one that was exchanged under an old card is noticed.
    """
    path = Path(path)
    digest = hashlib.sha256()
    for split in splits(path):
        directory = _directory(path, split)
        digest.update(f"{split} {_card(directory)['fingerprint']}\n".encode())
        for file in sorted(directory.glob("*.arrow")):
            with file.open("rb") as examples:
                digest.update(hashlib.file_digest(examples, "sha256").digest())
    return digest.hexdigest()


def _card(directory: Path) -> dict[str, Any]:
    """Read a directory's card. UserError: it is none, or of another version."""
    try:
        fields = json.loads((directory / "card.json").read_bytes())
        if not isinstance(fields, dict):
            raise UserError("expected a JSON object")
        check_json({key: fields.get(key) for key in FIXED}, "card", FIXED, ())
        if "fingerprint" not in fields:
            raise UserError("it has no fingerprint")
    except (ValueError, OSError, RecursionError) as error:
        raise _damaged(directory, error) from error
    return fields


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a corpus directory that this version reads, or it is damaged: {error}")


def load(path: Path | str, tasks: Mapping[str, type[Task]], split: str | None = None) -> StoredCorpus:
    """Open a corpus directory that `write` made.

    Args:
      tasks: by name, `data.tasks.TASKS` say; the directory names its own.
      split: "train", "validation" or "test"; by default "train" of a directory that was divided, otherwise what there is.

    Raises:
      FileNotFoundError, NotADirectoryError: there is no such directory.
      UserError: it is not a corpus directory of one of the tasks, of another version, damaged, or lacks the split.
    """
    path, found = Path(path), splits(path)
    chosen = split or found[0]
    if chosen not in found:
        raise UserError(f"{path} has no {chosen} split: there is {', '.join(found)}")
    directory = _directory(path, chosen)
    fields = _card(directory)
    try:
        name = fields["task"]["task"]
        if name not in tasks:
            raise UserError(f"its task is {name!r}; allowed: {', '.join(tasks)}")
        task = tasks[name].from_json(fields["task"])
        dataset = datasets.load_from_disk(str(directory))
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise _damaged(directory, error) from error
    columns = features(task)
    if not isinstance(dataset, datasets.Dataset) or dataset.features != columns:
        raise UserError(f"{directory} is not a corpus directory: expected one dataset with the columns {', '.join(columns)}")
    if not len(dataset) or len(dataset) != fields.get("num_examples"):
        raise UserError(f"{directory} is damaged: {len(dataset)} examples where its card says {fields.get('num_examples')}")
    return StoredCorpus(path, task, fields, dataset, tasks)
