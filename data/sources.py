"""Corpora of files and repositories: records are read, made into examples by workers, and counted by what became of them."""

import abc
import collections
import dataclasses
import functools
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from data import card, rows, task
from data.alignment import Alignment
from data.errors import UserError
from data.streams import SPLITS
from data.vocab import TokenizerVocab, read_vocab, train_vocab
from data.workers import check_workers, end_with_parent

_CHUNK_RECORDS = 64
_CHUNKS_AHEAD = 4  # of each worker
_VOCAB_CHARACTERS = 8_000_000
REPEATED = "of a text that stands in an earlier split too"
TWICE = "of a prompt that stands earlier in the same split"
PLACES = "places"
"""What a card calls the places of the first records of each kind that were dropped, or not written as they are."""
ALIGNING = tuple(field.name for field in dataclasses.fields(Alignment))  # settings


class Unusable(UserError):
    """A record that no example can be made of; `kind` says why, as cards count it."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Made(NamedTuple):
    """What became of a record, or of a part of it: an example of a split, or none; what a card counts of it; where the record stands."""

    split: str
    example: Any | None
    counted: tuple[str, ...]
    where: str = ""


def written(split: str, example: Any, **also: bool) -> Made:
    """Return an example as written, with what else is so of it: `written(split, example, **{"cut to max_prompt_tokens": True})`."""
    return Made(split, example, ("written", *(f"written, {name}" for name, is_so in also.items() if is_so)))


Make = Callable[[Any], Iterable[Made]]


def make_all(make: Make, records: Iterator[Any], num_workers: int) -> Iterator[Made]:
    """Yield what `make` makes of each record, in order; it pickles, and 0 workers call it in this process."""
    check_workers(num_workers)
    if num_workers == 0:
        for record in records:
            yield from make(record)
        return
    # Fresh interpreters: nothing of this process (threads of libraries) is copied.
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _begin_worker) as pool:
        try:
            while ahead := list(itertools.islice(records, num_workers * _CHUNKS_AHEAD * _CHUNK_RECORDS)):
                for made in pool.map(functools.partial(_listed, make), ahead, chunksize=_CHUNK_RECORDS):
                    yield from made
        except BrokenProcessPool:
            raise UserError(f"one of {num_workers} workers was ended from outside, for want of memory perhaps: try fewer") from None


def num_written(found: Mapping[str, Any], what: str) -> int:
    """Count the examples that are REPEATED, say, by what a command tells of its sources, or by a card, which has it."""
    return sum(own.get(f"written, {what}", 0) for own in found.values() if isinstance(own, Mapping))


def places_listed(places: Mapping[str, str]) -> list[str]:
    """Write PLACES, a line each."""
    return [f"{kind}: {where}" for kind, where in places.items()]


def _hash(text: str) -> int:
    return hash("".join(text.split()))


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent alone
    end_with_parent()


def _listed(make: Make, record: Any) -> list[Made]:
    return list(make(record))


def _placed(make: Make, record: Any) -> list[Made]:
    return [made._replace(where=record.where) for made in make(record)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand(task.WriteCommand, abc.ABC):
    """Options of `python -m data TASK` for a task whose examples are made of a source's records.

    Attributes:
      source: What is read.
      num_examples: How many examples, at most. Default: all.
      split: train, validation or test: that part alone; all: everything, undivided. Default: all parts, beside each other.
      tokenizer: Write and count in the words of this tokenizer: a tokenizer.json, a directory with one, or a model of this project.
        Default: of a byte-pair vocabulary trained on the train part.
      alignment: Where sources are not known: which they are.
    """

    source: str
    num_examples: int | None = None
    split: str | None = None
    tokenizer: Path | None = None
    alignment: Alignment = dataclasses.field(default_factory=Alignment)
    corpus: Any

    unit: ClassVar[str]
    """What is counted, in the plural."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "://" in self.source:
            raise UserError(f"{self.source} is an address, which is not read: download what it has, and name the file or directory")
        if self.is_divided_here and self.split not in (None, "all", *SPLITS):
            raise UserError(f"split is {self.split!r}; allowed: {', '.join(SPLITS)}, all")
        settings, usual = self.settings(), vars(type(self.corpus)()) | vars(Alignment())
        for name, why in self.unused().items():
            if (value := settings.get(name)) != usual.get(name):
                raise UserError(f"{name} is {value}, but {why}: leave it out")

    def unused(self) -> dict[str, str]:
        """Return the settings that change nothing here, and why."""
        return {} if self.tokenizer is None else {"vocab_tokens": "--tokenizer has a vocabulary"}

    @property
    def is_divided_here(self) -> bool:
        """Whether its splits are those of `data.streams.SPLITS`, and no others."""
        return True

    @abc.abstractmethod
    def read(self, split: str | None) -> Iterator[Any]:
        """Yield the records of a split; all of them for None and "all". UserError: the source is not what it should be."""

    @abc.abstractmethod
    def texts(self, record: Any) -> Iterable[str]:
        """Return the texts of a record, for a vocabulary to be trained on."""

    @abc.abstractmethod
    def maker(self, vocab: TokenizerVocab) -> Make:
        """Return the function, which pickles, from a record to what becomes of it."""

    def drawn(self) -> dict[str, Any]:
        return {"source": self.source, **super().drawn()}

    def settings(self) -> dict[str, Any]:
        named = {} if self.tokenizer is None else {"tokenizer": str(self.tokenizer)}
        return super().settings() | named | dataclasses.asdict(self.alignment)

    def words(self, *left_out: str) -> str:
        return super().words(*left_out, *self.unused())

    def make_task(self, kind: type[task.Task], vocab: Any) -> Any:
        made: Any = kind.of(self.corpus, vocab)
        path = Path(self.source)
        return dataclasses.replace(made, source=path.absolute().name if path.exists() else self.source)

    def make(self) -> tuple[TokenizerVocab, Generator[Any, None, None], dict[str, Any]]:
        found = self.found()
        there = [split for split in SPLITS if split not in found.get("absent_splits", ())]
        if self.split is None and there and SPLITS[0] not in there:
            why, other = (", as its name says", "; under another name it is divided") if Path(self.source).is_file() else ("", "")
            how = f"--split {there[0]} writes that alone, --split all everything undivided{other}"
            raise UserError(f"{self.source} has no train part, only {', '.join(there)}{why}: {how}")
        vocab, counts, places = self.vocabulary(), collections.Counter(read=0, written=0), dict[str, str]()
        return vocab, self._counted(self.made(vocab), counts, places), {self.unit: counts, PLACES: places, **found}

    def made(self, vocab: TokenizerVocab) -> Iterator[Made]:
        """Make the examples; a record has `where`, what people find it by."""
        return make_all(functools.partial(_placed, self.maker(vocab)), self.read(self.split), self.workers)

    def found(self) -> dict[str, Any]:
        """Return what else a card says of the source."""
        return {}

    def division(self, record: str, suffixes: Collection[str] | None = None) -> dict[str, Any]:
        """Return what a card says of how `rows` divides the source, for `found`."""
        if self.split not in (None, *SPLITS):
            return {}
        if own := rows.own_splits(self.source, suffixes):
            return {"absent_splits": [split for split in SPLITS if split not in own]}
        return {"splits": f"by a hash of each {record} (80%, 10%, 10%), as nothing in the source is named after validation or test"}

    def vocabulary(self) -> TokenizerVocab:
        """Return the vocabulary that the corpus is written in."""
        if self.tokenizer is not None:
            return read_vocab(self.tokenizer, self.corpus.num_labels)
        records = self.read(
            "train" if self.split in (None, *SPLITS) and "train" not in self.found().get("absent_splits", ()) else self.split
        )
        return train_vocab(self._sample(records), vocab_tokens=self.corpus.vocab_tokens, num_labels=self.corpus.num_labels)

    def _sample(self, records: Iterator[Any]) -> Iterator[str]:
        left = _VOCAB_CHARACTERS
        for text in itertools.chain.from_iterable(map(self.texts, records)):
            yield f" {text}"
            if (left := left - len(text)) < 0:
                return

    def _counted(self, made: Iterator[Made], counts: collections.Counter[str], places: dict[str, str]) -> Generator[Any, None, None]:
        """Yield the examples, with their splits where there are several; count what became of records. UserError where none comes."""
        first: dict[int, str] = {}  # the split that a text came in first
        asked: dict[tuple[str, int], str] = {}  # where a prompt of a split came first
        every: dict[str, list[str]] = collections.defaultdict(list)  # the records of each kind
        for split, example, counted, where in made:
            kinds = [*counted]
            if example is not None and not self.split and first.setdefault(_hash(example.text), split) != split:
                kinds.append(f"written, {REPEATED}")
            elif example is not None and where and asked.setdefault((split, _hash(example.prompt)), where) != where:
                kinds.append(f"written, {TWICE}")
            counts.update(["read", *kinds])
            for kind in kinds if where else ():
                if kind != "written" and where not in every[kind][-1:]:
                    every[kind].append(where)
                    places[kind.removeprefix("written, ")] = rows.first_places(every[kind])
            if example is not None:
                yield example if self.split else (split, example)
        if not counts["read"]:
            where = "" if self.split in (None, "all") else f" in the {self.split} split"
            raise UserError(f"{self.source}: there are no {self.unit}{where}")
        if not counts["written"]:
            why = "; ".join([card.listed(counts), *places_listed(places)])
            raise UserError(f"{self.source}: none of its {self.unit} can be used: {why}")
