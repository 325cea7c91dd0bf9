"""The task of verdicts: a doctor's question and a report in; the evidence and the verdict out."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from data import scoring
from data.documents import Example
from data.papers.task import ReportTask
from data.verdicts import card, source

_VERDICT = re.compile(rf"{source.VERDICT}\s*({'|'.join(source.VERDICTS.values())})\s*")


@dataclasses.dataclass(frozen=True)
class VerdictTask(ReportTask):
    """Turn doctors' questions to reports into ids and responses into verdicts; see `DocumentTask`. A prompt begins with "QUESTION: ..."."""

    name: ClassVar[str] = "verdicts"
    unit: ClassVar[str] = "verdicts"
    about: ClassVar[str] = "QUESTION"
    score_kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "verdicts": ("verdict_accuracy", "verdicts_given"),
        "evidence": ("evidence_named", "evidence_precision", "evidence_recall", "quote_rougeL"),
    }
    Corpus: ClassVar[type[source.Corpus]] = source.Corpus
    WriteCommand: ClassVar[type[source.WriteCommand]] = source.WriteCommand
    Statistics: ClassVar[type[card.Statistics]] = card.Statistics
    abstract: bool = False

    def lacks(self, about: str, pieces: Sequence[str]) -> str | None:
        return None if about else f"{self.about}:"

    def verdict(self, response_ids: Iterable[int]) -> str | None:
        """Read the verdict of a response; None where it gives none."""
        found = _VERDICT.findall(self.answer(response_ids) or "")
        return found[-1] if found else None

    def counts(self, example: Example, response: Iterable[int]) -> scoring.Counts:
        """Score a verdict: whether it is right, and given at all; whether a piece of the evidence that any doctor marked is named;
        the pieces named against those of the evidence that the gold response quotes; and the quote against that evidence (ROUGE-L).
        """
        tally, ids = scoring.Shares(), list(response)
        (gold,) = example.document.steps
        verdict, steps = self.verdict(ids), self.steps(ids)
        named, sources = {piece for step in steps for piece in step.named}, {*gold.sources}
        marked = {piece for own in example.document.evidence for piece in own.pieces}
        tally.add("verdict_accuracy", [verdict] if verdict == gold.kind else [], [gold])
        tally.add("verdicts_given", [verdict] if verdict else [], [gold])
        tally.add("evidence_named", [gold] if named & marked else [], [gold])
        tally.add("evidence_precision", named & sources, named)
        tally.add("evidence_recall", named & sources, sources)
        quotes = (text.partition(source.VERDICT)[0].strip() for text in (gold.text, self.answer(ids) or ""))
        rouge = scoring.rouge_counts(*([quote] for quote in quotes))
        return {**tally.counts(), "quote_rougeL": rouge["rougeL"]}
