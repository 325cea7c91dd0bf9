"""Make documents of reports: body pieces, and the abstract's sentences as steps."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from data.documents import own
from data.documents.corpus import UNKNOWN, Document, Evidence, Step, overlapping
from data.documents.own import Draft
from data.papers import reports
from data.sources import Made


def drafts(piece_sentences: int, paper: reports.Paper) -> list[Draft | Made]:
    """Return the document of a paper; what doctors marked in body and abstract alike is its evidence."""
    report = reports.parse(paper.text)
    pieces = reports.pieces(report, report.body, piece_sentences)
    abstract = reports.pieces(report, report.abstract, 1, headings=False)
    if not abstract.texts:
        return [Made(paper.split, None, ("without an abstract",))]
    if not pieces.texts:
        return [Made(paper.split, None, ("without a body",))]
    steps = tuple(Step(sentence, UNKNOWN) for sentence in abstract.texts)
    document = Document(report.title, pieces.texts, steps, tuple(_evidence(report, paper.questions, pieces, abstract)))
    return [Draft(paper.number, paper.split, document)]


def _evidence(
    report: reports.Report, questions: Iterable[reports.Question], pieces: reports.Pieces, abstract: reports.Pieces
) -> Iterator[Evidence]:
    for question in questions:
        ranges = [reports.marked(report, annotation) for annotation in question.annotations if annotation.is_shown]
        body, steps = ({i for own in ranges for i in overlapping(part.ranges, *own)} for part in (pieces, abstract))
        if body:
            yield Evidence(tuple(sorted(body)), tuple(sorted(steps)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportCommand(own.WriteCommand):
    """Options of the tasks that read reports of clinical trials."""

    repository: ClassVar[str] = reports.REPOSITORY
    licence: ClassVar[str] = "MIT (Lehman et al. 2019, DeYoung et al. 2020); the papers are PubMed Central's"

    def part(self, split: str) -> Path:
        return reports.part(self.source, split)

    def read_part(self, split: str) -> Iterator[Any]:
        return reports.read(self.source, split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand(ReportCommand):
    """Write reports of clinical trials and their abstracts, with the sources of each sentence, as a datasets.load_from_disk directory.

    Attributes:
      source: A clone of github.com/jayded/evidence-inference, or documents of your own: see python -m data documents --help.
      split: train, validation or test: that part alone; all: everything, undivided. Default: all parts that there are, beside each other.
    """

    unit: ClassVar[str] = "papers"
    instruction: ClassVar[str] = "Write the abstract:"

    def drafts(self) -> Callable[[Any], Iterable[Draft | Made]]:
        return functools.partial(drafts, self.corpus.piece_sentences)
