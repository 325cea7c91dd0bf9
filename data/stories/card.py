"""Statistics of a corpus of stories, for its card: kinds of questions, and how often words alone find the section."""

from collections.abc import Mapping
from typing import Any

from data import card
from data.documents import card as documents
from data.documents.corpus import QUESTION, Example
from data.retrieval import BM25


class Statistics(documents.Statistics):
    """Count also sections and questions, and how often BM25's best section for a question is one that people marked."""

    step = "an answer"

    def add(self, example: Example) -> None:
        document = example.document
        sections = [piece for piece in document.pieces if not piece.startswith(QUESTION)]
        self.count(sections=len(sections), questions=len(document.pieces) - len(sections))
        self.add_sources(example, [[i for i in step.sources if i < len(sections)] for step in document.steps])
        ranking = BM25(sections)
        for step in document.steps:
            asked = [document.pieces[i].removeprefix(QUESTION) for i in step.sources if i >= len(sections)]
            self._kinds[step.kind] += 1
            self._found.update(asked=1, best=ranking.rank(" ".join(asked))[0] in (step.sources))

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "kinds": dict(sorted(self._kinds.items())), "bm25": self.share_found("best")}

    def sections(self, fields: Mapping[str, Any], statistics: Mapping[str, Any]) -> list[str]:
        return [
            *super().sections(fields, statistics),
            "Sources are sections here; each answer names its question as well.",
            "## Questions",
            card.counts("kind", statistics["kinds"]),
            f"BM25's best section is one that people marked for {statistics['bm25']:.1%} of the questions.",
        ]
