"""Statistics of a corpus of papers, for its card: numbers, and alignment against what doctors marked."""

import collections
from collections.abc import Mapping
from typing import Any

from data import scoring
from data.documents import card
from data.documents.corpus import Document, Example
from data.retrieval import BM25


class Statistics(card.Statistics):
    """Count also the numbers of abstracts that stand in the body, and score alignment by the doctors' evidence."""

    step = "a sentence of the abstract"

    def __init__(self, vocab: Any, **options: Any) -> None:
        super().__init__(vocab, **options)
        self._numbers = scoring.Shares()
        self._hits: collections.Counter[str] = collections.Counter()
        self._by_chance = 0.0

    def add(self, example: Example) -> None:
        super().add(example)
        document = example.document
        stated, body = scoring.numbers(step.text for step in document.steps), scoring.numbers(document.pieces)
        self._numbers.add("numbers_in_body", stated & body, stated)
        self.count(evidence=len(document.evidence))
        if document.evidence:
            self._compare(document)

    def _compare(self, document: Document) -> None:
        """Compare sources with the evidence: all of them, and those of the very sentences that doctors marked as saying the same."""
        ranking = BM25(document.pieces)
        every = {piece for step in document.steps for piece in step.sources}
        for pieces, numbers in document.evidence:
            self.count(pieces_of_evidence=len(pieces))
            self._hits.update(marked=1, among_sources=not every.isdisjoint(pieces))
            if not numbers:
                continue
            steps = [(step.text, step.sources) for step in map(document.steps.__getitem__, numbers)]
            aligned = {piece for _, sources in steps for piece in sources}
            best = {piece for text, sources in steps for piece in ranking.rank(text)[: len(sources)]}
            self._hits.update(in_both=1, aligned=not aligned.isdisjoint(pieces), bm25=not best.isdisjoint(pieces))
            missed = 1.0  # by as many pieces, drawn at random
            for drawn in range(len(aligned)):
                left = len(document.pieces) - drawn
                missed *= max(left - len(pieces), 0) / left
            self._by_chance += 1 - missed

    def to_json(self) -> dict[str, Any]:
        marked, in_both = self._hits["marked"], self._hits["in_both"]
        compared = {
            "marked": marked,
            "among_sources": round(self._hits["among_sources"] / max(marked, 1), 4),
            "in_both": in_both,
            **{name: round(self._hits[name] / max(in_both, 1), 4) for name in ("aligned", "bm25")},
            "chance": round(self._by_chance / max(in_both, 1), 4),
        }
        shares = {name: round(share, 4) for name, share in self._numbers.shares().items()}
        return {**super().to_json(), **shares, "alignment_against_evidence": compared}

    def sections(self, fields: Mapping[str, Any], statistics: Mapping[str, Any]) -> list[str]:
        found = statistics["alignment_against_evidence"]
        parts = [
            *super().sections(fields, statistics),
            f"{statistics['numbers_in_body']:.1%} of the numbers in abstracts stand in the body.",
        ]
        if found["marked"]:
            parts += [
                "## Alignment against the doctors' evidence",
                f"Doctors marked evidence in the body for {found['marked']:,} questions; for {found['among_sources']:.1%} of them it is "
                "among the sources of the abstract's sentences.",
                f"For {found['in_both']:,} they marked evidence in the abstract too: a piece of the body's is among the sources of those "
                f"very sentences for {found['aligned']:.1%}; among as many of BM25's best pieces for {found['bm25']:.1%}; among as many "
                f"drawn at random for {found['chance']:.1%}.",
            ]
        return parts
