"""Make documents of doctors' questions: body pieces, and one step that quotes the evidence and gives the verdict."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from data.alignment import readable
from data.documents import corpus
from data.documents.corpus import Document, Evidence, Step, overlapping
from data.documents.own import Draft
from data.papers import reports
from data.papers.source import ReportCommand
from data.sources import ALIGNING, Made

VERDICTS = {-1: "decreased", 0: "no difference", 1: "increased"}
VERDICT = "Verdict:"


def ask(question: reports.Question) -> str:
    """Write a question."""
    return f"{question.outcome}, with {question.intervention}, compared to {question.comparator}?"


def drafts(piece_sentences: int, abstract: bool, paper: reports.Paper) -> list[Draft | Made]:
    """Return a document for each question to a paper."""
    if not paper.questions:
        return []
    report = reports.parse(paper.text)
    pieces = reports.pieces(report, [*(report.abstract if abstract else ()), *report.body], piece_sentences)
    return [_draft(paper, pieces, report, question) for question in paper.questions]


def _draft(paper: reports.Paper, pieces: reports.Pieces, report: reports.Report, question: reports.Question) -> Draft | Made:
    codes = collections.Counter(annotation.code for annotation in question.annotations if annotation.is_right).most_common()
    if not codes:
        return Made(paper.split, None, ("whose answers were all found wrong",))
    if len(codes) > 1 and codes[0][1] == codes[1][1]:
        return Made(paper.split, None, ("on which doctors disagree",))
    verdict = VERDICTS[codes[0][0]]
    shown = [own for own in question.annotations if own.is_right and own.is_shown and own.code == codes[0][0]]
    found = [(own, overlapping(pieces.ranges, *reports.marked(report, own))) for own in shown]
    marked = [(own, places) for own, places in found if places]
    if not shown:
        return Made(paper.split, None, ("whose evidence was found wrong",))
    if not marked:
        return Made(paper.split, None, ("whose evidence is in no piece",))
    quoted, places = marked[0]
    quote = " ".join(readable(paper.text[quoted.start : quoted.end]).split())
    step = Step(f"{quote} {VERDICT} {verdict}", places, kind=verdict)
    evidence = tuple(Evidence(own) for own in dict.fromkeys(own for _, own in marked))
    return Draft(question.number, paper.split, Document(ask(question), pieces.texts, (step,), evidence))


@dataclasses.dataclass(frozen=True)
class Corpus(corpus.Corpus):
    """How doctors' questions are written.

    Attributes:
      abstract: The report's abstract is among its pieces, before the body.
    """

    abstract: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand(ReportCommand):
    """Write doctors' questions about reports of clinical trials, and their evidence, as a datasets.load_from_disk directory.

    Attributes:
      source: A clone of github.com/jayded/evidence-inference, or documents of your own: see python -m data documents --help.
      split: train, validation or test: that part alone; all: everything, undivided. Default: all parts that there are, beside each other.
    """

    corpus: Corpus = dataclasses.field(default_factory=Corpus)

    unit: ClassVar[str] = "questions"
    instruction: ClassVar[str] = "Which way did it go?"
    of_repository: ClassVar[tuple[str, ...]] = ("abstract",)
    of_own: ClassVar[tuple[str, ...]] = ALIGNING

    def drafts(self) -> Callable[[Any], Iterable[Draft | Made]]:
        return functools.partial(drafts, self.corpus.piece_sentences, self.corpus.abstract)
