"""Statistics of a corpus of verdicts, for its card: how often each is given, and how often words alone find the evidence."""

from collections.abc import Mapping
from typing import Any

from data import card
from data.documents import card as documents
from data.documents.corpus import Example
from data.retrieval import BM25


class Statistics(documents.Statistics):
    """Count also the verdicts, and how often BM25 finds evidence by the question."""

    step = "a verdict"

    def add(self, example: Example) -> None:
        super().add(example)
        document = example.document
        self._kinds.update(step.kind for step in document.steps)
        marked = {piece for own in document.evidence for piece in own.pieces}
        self.count(evidence=len(document.evidence), pieces_of_evidence=len(marked))
        best = BM25(document.pieces).rank(document.about)
        self._found.update(asked=1, best=best[0] in marked, best_3=not marked.isdisjoint(best[:3]))

    def to_json(self) -> dict[str, Any]:
        bm25 = {name: self.share_found(name) for name in ("best", "best_3")}
        return {**super().to_json(), "verdicts": dict(sorted(self._kinds.items())), "bm25": bm25}

    def sections(self, fields: Mapping[str, Any], statistics: Mapping[str, Any]) -> list[str]:
        bm25 = statistics["bm25"]
        return [
            *super().sections(fields, statistics),
            "## Verdicts",
            card.counts("verdict", statistics["verdicts"]),
            f"BM25's best piece for the question holds evidence for {bm25['best']:.1%}, one of its best three for {bm25['best_3']:.1%}.",
        ]
