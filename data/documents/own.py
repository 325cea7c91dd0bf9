"""Documents of anybody's JSONL: `{"document": ..., "steps": [{"text": ..., "sources": [...]}]}` a line."""

import contextlib
import dataclasses
import itertools
import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from data import rows, sources
from data.alignment import Alignment, readable
from data.documents.corpus import (
    STYLE,
    UNKNOWN,
    Corpus,
    Document,
    Step,
    encode,
    overlapping,
    places,
    shared_characters,
    split_pieces,
    squeezed,
)
from data.errors import UserError
from data.pieces import style
from data.sources import Made, Unusable, written
from data.streams import SPLITS, divided_split_of
from data.vocab import TokenizerVocab

COLUMNS = ("document", "steps")
OPTIONAL = ("instruction",)
_STEP = {"text", "sources"}
_MIN_QUOTE = 3  # characters: fewer stand in many places


class Draft(NamedTuple):
    """A document before it is written, its number and its split, and where it stands, of one's own."""

    number: int | str
    split: str
    document: Document
    where: str = ""

    @property
    def texts(self) -> list[str]:
        """What a vocabulary is trained on."""
        return [*self.document.pieces, *(step.text for step in self.document.steps)]


def as_they_are(draft: Draft) -> list[Draft | Made]:
    """Return the drafts of a record that is one."""
    return [draft]


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes the examples of a record, or says why they are dropped; pickles.

    Attributes:
      drafts: the drafts of a record, and what of it is dropped before.
    """

    drafts: Callable[[Any], Iterable[Draft | Made]]
    name: str
    instruction: str
    vocab: TokenizerVocab
    corpus: Corpus
    alignment: Alignment
    seed: int

    def __call__(self, record: Any) -> Iterable[Made]:
        drafts = as_they_are(record) if isinstance(record, Draft) else self.drafts(record)
        return [found if isinstance(found, Made) else self._made(found) for found in drafts]

    def _made(self, draft: Draft) -> Made:
        uniform = random.Random(f"{self.name}/{self.seed}/labels/{draft.number}").random()
        options: dict[str, Any] = {"alignment": self.alignment, "uniform": uniform, "parts": self.corpus.parts}
        options |= style(self.corpus, "too_long", "max_example_tokens", *STYLE)
        before = draft.document
        try:
            example = encode(before, self.instruction, self.vocab, **options)
        except Unusable as error:
            return Made(draft.split, None, (error.kind,))
        after = example.document
        also = {
            "cut to max_prompt_tokens": len(after.pieces) < len(before.pieces),
            "with steps left out that have no source": len(after.steps) < len(before.steps),
        }
        return written(draft.split, example, **also)


def read(source: str, split: str | None, piece_sentences: int) -> Iterator[Draft]:
    """Yield the documents of a .jsonl file, or of a directory of some.

    A row has `document`, a text, which is cut into pieces, or a list of texts, which are the pieces, and `steps`. A step has
    `text` and may have `sources`: the indices of pieces of a list, from 0 on, or quotes, each of which stands in the document.
    `instruction` is what all steps see.

    Raises: UserError for rows that are something else, with their line.
    """
    for number, (own, (where, row)) in enumerate(rows.read_objects(source, split=split)):
        document = _document(where, row, piece_sentences)
        found = own or divided_split_of(squeezed("".join(document.pieces)))
        if split in (None, "all", found):
            yield Draft(number, found, document, where)


def _document(where: str, row: dict[str, Any], piece_sentences: int) -> Document:
    if absent := [name for name in COLUMNS if name not in row]:
        raise UserError(f"{where}: no {absent[0]}, only {', '.join(row) or 'an empty object'}; a row has {', '.join(COLUMNS)}")
    if unknown := [name for name in row if name not in COLUMNS + OPTIONAL]:
        raise UserError(f"{where}: unknown {unknown[0]}; a row has {', '.join(COLUMNS)}, and may have {', '.join(OPTIONAL)}")
    text, steps, instruction = row["document"], row["steps"], row.get("instruction")
    is_list = isinstance(text, list) and all(isinstance(piece, str) for piece in text)
    if not isinstance(text, str) and not is_list:
        raise UserError(f"{where}: document is neither a text nor a list of texts")
    if not isinstance(instruction, str | None):
        raise UserError(f"{where}: instruction is no text")
    if not isinstance(steps, list):
        raise UserError(f"{where}: steps is no list")
    pieces = [" ".join(readable(piece).split()) for piece in text] if is_list else split_pieces(text, piece_sentences)
    if not pieces:
        raise UserError(f"{where}: the document is empty")
    if is_list and not all(pieces):
        raise UserError(f"{where}: piece {pieces.index('')} of the document is empty")
    ranges = places("\n".join(pieces), [[piece] for piece in pieces])
    whole = squeezed("".join(pieces))

    def step(number: int, fields: Any) -> Step:
        here = f"{where}, step {number}"
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            raise UserError(f'{here}: expected {{"text": "...", "sources": [...]}}')
        if not readable(fields["text"]).strip():
            raise UserError(f"{here}: the text is empty")
        if unknown := sorted(fields.keys() - _STEP):
            raise UserError(f"{here}: unknown {unknown[0]}; a step has text and sources")
        told = fields.get("sources")
        if told is None:
            return Step(" ".join(readable(fields["text"]).split()), UNKNOWN)
        if not isinstance(told, list):
            raise UserError(f"{here}: sources is no list")
        named = tuple(i for source in told for i in _pieces(here, source, is_list, whole, ranges))
        return Step(" ".join(readable(fields["text"]).split()), named)

    found = tuple(step(i, fields) for i, fields in enumerate(steps, 1))
    return Document(" ".join(readable(instruction or "").split()), tuple(pieces), found)


def _pieces(where: str, source: Any, is_list: bool, whole: str, ranges: Sequence[tuple[int, int]]) -> Iterable[int]:
    """Return the pieces that a source means: an index of a list of pieces, or a quote, of which its first place in the document counts."""
    if isinstance(source, str) and (quote := squeezed(source)):
        if len(quote) < _MIN_QUOTE:
            raise UserError(f"{where}: the source {source!r} is too short; allowed: {_MIN_QUOTE} characters and more, without spaces")
        start = whole.find(quote)
        if start < 0:
            composed = (unicodedata.normalize("NFC", text) for text in (quote, whole))
            but = ", but does after Unicode normalisation (NFC): write both in one form" if next(composed) in next(composed) else ""
            raise UserError(f"{where}: the source {source[:40]!r} does not stand in the document{but}")
        end = start + len(quote)
        shared = shared_characters(ranges, start, end)
        return overlapping(ranges, start, end) or [i for i, own in enumerate(shared) if own == max(shared)]
    if type(source) is int and is_list and 0 <= source < len(ranges):
        return [source]
    allowed = f"a quote, or an index from 0 to {len(ranges) - 1}" if is_list else "a quote: indices are of a document that is a list"
    raise UserError(f"{where}: the source {source!r}; allowed: {allowed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand(sources.WriteCommand):
    """Write documents of your own, and what was written from them, as a datasets.load_from_disk directory.

    Attributes:
      source: A .jsonl file, or a directory of some: a "document" a line, and "steps" with a "text" each and, where known, "sources".
      split: train, validation or test: that part alone, by a hash of the document (80%, 10%, 10%) where no file is named after
        validation (val, valid, dev) or test; all: everything, undivided. Default: the three beside each other.
      alignment: Of steps without sources: which pieces they were written from.
    """

    source: str
    split: str | None = None
    corpus: Corpus = dataclasses.field(default_factory=Corpus)

    unit: ClassVar[str] = "documents"
    instruction: ClassVar[str] = ""
    """What all prompts begin with."""
    repository: ClassVar[str] = ""
    """Of a task that reads one: its name."""
    licence: ClassVar[str] = ""
    """Of what it has."""
    of_repository: ClassVar[tuple[str, ...]] = ()
    """Settings of what it has alone: documents of one's own have nothing of it."""
    of_own: ClassVar[tuple[str, ...]] = ()
    """Settings of documents of one's own alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (prompt := self.corpus.max_prompt_tokens) > (example := self.corpus.max_example_tokens):
            raise UserError(f"max_prompt_tokens is {prompt}; allowed: up to max_example_tokens, {example}, which count the response too")

    @property
    def is_own(self) -> bool:
        """Whether the source is JSONL rather than a repository that the task knows."""
        path = Path(self.source)
        files = rows.entries(path) if path.is_dir() else [path]
        return not self.repository or any(file.suffix == ".jsonl" for file in files)

    def unused(self) -> dict[str, str]:
        names, use = (self.of_repository, f"a clone of {self.repository}") if self.is_own else (self.of_own, "documents of your own")
        return super().unused() | dict.fromkeys(names, f"it is for {use}")

    def part(self, split: str) -> Path:
        """Return the file or directory without which a repository has no such split."""
        raise NotImplementedError

    def read_part(self, split: str) -> Iterator[Any]:
        """Yield the records of a split of a repository."""
        raise NotImplementedError

    def found(self) -> dict[str, Any]:
        if self.is_own:
            return self.division("document", (".jsonl",))
        absent = [split for split in SPLITS if not self.part(split).exists()]
        return {"absent_splits": absent, "licence": f"{self.repository}: {self.licence}"}

    def read(self, split: str | None) -> Iterator[Any]:
        if self.is_own:
            return read(self.source, split, self.corpus.piece_sentences)
        present = [own for own in SPLITS if self.part(own).exists()]
        if not present:
            absent = f"{self.part(SPLITS[0])}: there is no such file" if Path(self.source).exists() else f"{self.source}: no such directory"
            raise UserError(f"{absent}: expected a clone of {self.repository}, or a .jsonl file")
        if split in SPLITS and split not in present:
            raise UserError(f"{self.part(split)}: there is no such file, so no {split} part; there is {', '.join(present)}")
        return self._read_parts(present if split in (None, "all") else [split])

    def _read_parts(self, splits: Iterable[str]) -> Iterator[Any]:
        with self.complete():
            yield from itertools.chain.from_iterable(map(self.read_part, splits))

    @contextlib.contextmanager
    def complete(self) -> Iterator[None]:
        """Raise UserError, which names the repository, where one of its files is not there."""
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: there is no such file: this clone of {self.repository} is incomplete") from error

    def drafts(self) -> Callable[[Any], Iterable[Draft | Made]]:
        """Return the function, which pickles, from a record of a repository to drafts."""
        return as_they_are

    def texts(self, record: Any) -> Iterable[str]:
        return record.texts

    def maker(self, vocab: TokenizerVocab) -> sources.Make:
        return Maker(self.drafts(), self.unit, self.instruction, vocab, self.corpus, self.alignment, self.seed)
