"""Statistics of a corpus of tools, for its card: services, turns, rows and calls, and how often words alone find the service."""

from collections.abc import Mapping
from typing import Any

from data import card
from data.documents import card as documents
from data.documents.corpus import Example
from data.retrieval import BM25
from data.tools.catalogue import SERVICE
from data.tools.source import KINDS, RESULT, read_call


class Statistics(documents.Statistics):
    """Count also the parts of prompts, parameters, calls by what of their service training sees, and how often BM25 finds the service."""

    step = "a call"

    def add(self, example: Example) -> None:
        super().add(example)
        document = example.document
        services = [piece for piece in document.pieces if piece.startswith(f"{SERVICE} ")]
        rows = sum(piece.startswith(RESULT) for piece in document.pieces)
        self.count(services=len(services), rows=rows, turns=len(document.pieces) - len(services) - rows)
        ranking = BM25(services)
        for step in document.steps:
            call = read_call(step.text)
            self.count(parameters=len(call.parameters) if call else 0)
            self._kinds[step.kind] += 1
            if services:
                self._found.update(asked=1, best=ranking.rank(document.pieces[max(step.sources)])[0] in step.sources)

    def to_json(self) -> dict[str, Any]:
        kinds = {kind: self._kinds[kind] for kind in (*KINDS, "") if self._kinds[kind]}
        return {**super().to_json(), "kinds": kinds, "bm25": self.share_found("best")}

    def sections(self, fields: Mapping[str, Any], statistics: Mapping[str, Any]) -> list[str]:
        return [
            *super().sections(fields, statistics),
            "Sources are the service, the turn that a call answers to, and those that its values stand in.",
            "## Calls",
            card.counts("service in training: with this wording, with others, not", statistics["kinds"]),
            f"BM25's best service for what was said last is the one called for {statistics['bm25']:.1%} of the calls.",
        ]
