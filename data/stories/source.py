"""Read stories, questions and answers as uci-soe/FairytaleQAData has them (Xu et al. 2022), and make documents of them.

`data-by-train-split/section-stories/{train,val,test}/NAME-story.csv` and `.../questions/{train,val,test}/NAME-questions.csv`.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from data import rows
from data.alignment import readable
from data.documents import corpus, own
from data.documents.corpus import QUESTION, Document, Step
from data.documents.own import Draft
from data.errors import UserError, check_range
from data.sources import ALIGNING, Made

_FOLDERS = {"train": "train", "validation": "val", "test": "test"}
_STORY_COLUMNS = ("section", "text")
_QUESTION_COLUMNS = ("question", "cor_section", "ex-or-im1", "answer1", "answer4")  # the two answers that the published metric takes


class Question(NamedTuple):
    """A question, the sections (from 0 on) that people marked, their answers, and whether these are "explicit" or "implicit" there."""

    text: str
    sections: tuple[int, ...]
    answers: tuple[str, ...]
    kind: str


class Tale(NamedTuple):
    """A record of the repository: a story in sections, and the questions about it."""

    name: str
    split: str
    sections: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def where(self) -> str:
        return self.name

    @property
    def texts(self) -> list[str]:
        """What a vocabulary is trained on."""
        return [*self.sections, *(text for question in self.questions for text in (question.text, *question.answers))]


def part(source: str, split: str) -> Path:
    """Return the directory of a split's stories."""
    return Path(source) / "data-by-train-split" / "section-stories" / _FOLDERS[split]


def read(source: str, split: str) -> Iterator[Tale]:
    """Yield the stories of a split, in the order of their names.

    Raises:
      FileNotFoundError: a story has no file of questions.
      UserError: a file is not what it should be; names the row.
    """
    ending = "-story.csv"
    files = [file for file in rows.entries(part(source, split)) if file.name.endswith(ending)]
    if not files:
        raise UserError(f"{part(source, split)}: expected files that end in {ending}")
    for file in files:
        name = file.name.removesuffix(ending)
        questions = file.parents[2] / "questions" / file.parent.name / f"{name}-questions.csv"
        sections = {number.strip(): _line(text) for number, text in rows.csv_rows(file, rows.named(file, *_STORY_COLUMNS))}
        if not sections:
            raise UserError(f"{file}: the story has no sections")
        places = {number: place for place, number in enumerate(sections)}
        yield Tale(name, split, tuple(sections.values()), tuple(_questions(questions, places)))


def _questions(file: Path, places: dict[str, int]) -> Iterator[Question]:
    for row, (text, told, kind, *answers) in enumerate(rows.csv_rows(file, rows.named(file, *_QUESTION_COLUMNS)), 1):
        numbers = [number.strip() for number in told.split(",")]
        if unknown := [number for number in numbers if number not in places]:
            raise UserError(f"{file}: row {row}: the story has no section {unknown[0]!r}, only {', '.join(places)}")
        yield Question(_line(text), tuple(sorted({places[n] for n in numbers})), tuple(filter(None, map(_line, answers))), kind.strip())


def _line(text: str) -> str:
    return " ".join(readable(text).split())


def drafts(orders: int, questions: int, seed: int, tale: Tale) -> Iterator[Draft | Made]:
    """Yield a document for each order of a story's questions and each part of it that has no more than `questions`.

    Stories to train on come in several orders, the others in one, so that each of their questions is scored once.
    """
    if not tale.questions:
        yield Made(tale.split, None, ("without a question",))
    for order in range(orders if tale.split == "train" else 1):
        shuffled = random.Random(f"stories/{seed}/{tale.name}/{order}").sample(tale.questions, len(tale.questions))
        parts = -(-len(shuffled) // questions) if questions else 1
        for i in range(parts):
            yield _draft(tale, shuffled[i::parts], f"{tale.name}/{order}/{i}")


def _draft(tale: Tale, questions: list[Question], number: str) -> Draft | Made:
    if unanswered := [question for question in questions if not question.answers]:
        return Made(tale.split, None, (f"with {len(unanswered)} questions without an answer",))
    count = len(tale.sections)
    steps = (Step(q.answers[0], (count + i, *q.sections), q.answers[1:], q.kind) for i, q in enumerate(questions))
    pieces = (*tale.sections, *(f"{QUESTION} {question.text}" for question in questions))
    return Draft(number, tale.split, Document("", pieces, tuple(steps)))


@dataclasses.dataclass(frozen=True)
class Corpus(corpus.Corpus):
    """How stories are written.

    Attributes:
      num_labels: Labels of the vocabulary; each section, question and answer of an example takes one.
      piece_sentences: Of documents of your own: sentences to a piece (label); 0: whole paragraphs.
      orders: Orders in which the questions of a story to train on are asked, each a shuffle of its own.
      questions: Most questions of an example; a story with more gives several. 0: all in one.
    """

    num_labels: int = 256
    piece_sentences: int = 0
    orders: int = 4
    questions: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "orders", low=1)
        check_range(self, "questions", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand(own.WriteCommand):
    """Write stories with people's questions, shuffled, and their answers with the sections these are in, as a datasets directory.

    Attributes:
      source: A clone of github.com/uci-soe/FairytaleQAData, or documents of your own: see python -m data documents --help.
      split: train, validation or test: that part alone; all: everything, undivided. Default: all parts that there are, beside each other.
    """

    corpus: Corpus = dataclasses.field(default_factory=Corpus)

    unit: ClassVar[str] = "examples"
    instruction: ClassVar[str] = "Answer the questions:"
    repository: ClassVar[str] = "uci-soe/FairytaleQAData"
    licence: ClassVar[str] = "Apache-2.0 (Xu et al. 2022)"
    of_repository: ClassVar[tuple[str, ...]] = ("orders", "questions")
    of_own: ClassVar[tuple[str, ...]] = ("piece_sentences", *ALIGNING)

    def part(self, split: str) -> Path:
        return part(self.source, split)

    def read_part(self, split: str) -> Iterator[Any]:
        return read(self.source, split)

    def drafts(self) -> Callable[[Any], Iterable[Draft | Made]]:
        return functools.partial(drafts, self.corpus.orders, self.corpus.questions, self.seed)
