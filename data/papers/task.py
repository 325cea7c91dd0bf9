"""The task of papers: the body of a report in, its abstract out, scored by its words, numbers and sources."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from data import scoring
from data.alignment import Alignment
from data.documents import DocumentTask, Example
from data.errors import UserError
from data.papers import card, reports, source


@dataclasses.dataclass(frozen=True)
class ReportTask(DocumentTask):
    """Read prompts that are reports as their repository has them: title and headings are known, the abstract is left out."""

    about: ClassVar[str] = "TITLE"

    def cut(self, text: str) -> Sequence[str]:
        report = reports.parse(text)
        found = reports.pieces(report, report.body, self.piece_sentences).texts
        if report.abstract and not found:
            raise UserError('the report has an abstract, which is not read, and no body: text below a line "BODY:"')
        return found


@dataclasses.dataclass(frozen=True)
class PaperTask(ReportTask):
    """Turn reports of clinical trials into ids and responses into abstracts; see `DocumentTask`."""

    name: ClassVar[str] = "papers"
    unit: ClassVar[str] = "abstracts"
    score_kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "ROUGE": ("rouge1", "rouge2", "rougeL", "rougeL_once"),
        "numbers": ("numbers_in_body", "numbers_in_sources", "numbers_in_abstract", "abstract_numbers_stated"),
        "sources": ("aligned_precision", "aligned_recall", "gold_precision", "gold_recall", "evidence_named"),
    }
    WriteCommand: ClassVar[type[source.WriteCommand]] = source.WriteCommand
    Statistics: ClassVar[type[card.Statistics]] = card.Statistics

    def counts(self, example: Example, response: Iterable[int]) -> scoring.Counts:
        """Score an abstract: ROUGE, and ROUGE-L without sentences that repeat an earlier one; the share of the numbers stated that stand
        in the body, in the sources named and in the gold abstract, and of the gold abstract's that are stated; the sources of each
        sentence against those that alignment finds for it as it is written; all of them together against the gold ones; and the share
        of the doctors' evidence that is among them.
        """
        written, gold = self.steps(response), example.document
        tally = scoring.Shares(*self.score_kinds["numbers"], *self.score_kinds["sources"])
        named = {piece for step in written for piece in step.named if piece < len(gold.pieces)}
        wanted = {piece for step in gold.steps for piece in step.sources}
        body, abstract = (scoring.numbers(texts) for texts in (gold.pieces, [step.text for step in gold.steps]))
        stated = [scoring.numbers([step.text]) for step in written]
        aligned = Alignment().align(gold.pieces, [step.text for step in written])
        for step, numbers, sources in zip(written, stated, aligned, strict=True):
            inside = scoring.numbers(gold.pieces[piece] for piece in step.named if piece < len(gold.pieces))
            tally.add("numbers_in_body", numbers & body, numbers)
            tally.add("numbers_in_sources", numbers & inside, numbers)
            tally.add("numbers_in_abstract", numbers & abstract, numbers)
            tally.add("aligned_precision", step.named & {*sources}, step.named)
            tally.add("aligned_recall", step.named & {*sources}, sources)
        tally.add("abstract_numbers_stated", abstract & set().union(*stated), abstract)
        tally.add("gold_precision", named & wanted, named)
        tally.add("gold_recall", named & wanted, wanted)
        tally.add("evidence_named", [e for e in gold.evidence if named & {*e.pieces}], gold.evidence)
        texts, sentences = [step.text for step in gold.steps], [step.text for step in written]
        once = scoring.rouge_counts(texts, [*dict.fromkeys(sentences)])["rougeL"]
        return {**scoring.rouge_counts(texts, sentences), "rougeL_once": once, **tally.counts()}
