"""Statistics of a corpus of documents, for its card."""

import collections
from collections.abc import Mapping
from typing import Any

from data import card
from data.documents.corpus import Example


class Statistics(card.SourcesStatistics):
    """Count lengths, pieces, steps and sources, and what response tokens attend to."""

    step = "a step"
    """What a step is, for the card."""

    def __init__(self, vocab: Any, **options: Any) -> None:
        super().__init__(vocab, **options)
        self._kinds: collections.Counter[str] = collections.Counter()  # of steps
        self._found: collections.Counter[str] = collections.Counter()  # by words alone, of how often they were "asked"

    def share_found(self, name: str) -> float:
        """Return how often words alone find what they are asked for."""
        return round(self._found[name] / max(self._found["asked"], 1), 4)

    def add(self, example: Example) -> None:
        document = example.document
        self.count(pieces=len(document.pieces), steps=len(document.steps))
        self.add_sources(example, [tuple(dict.fromkeys(step.sources)) for step in document.steps])

    def to_json(self) -> dict[str, Any]:
        return self.sources_json()

    def sections(self, fields: Mapping[str, Any], statistics: Mapping[str, Any]) -> list[str]:
        (what, counts), *_ = ((name, value) for name, value in fields.items() if isinstance(value, dict) and "read" in value)
        absent = fields.get("absent_splits")
        return [
            "Documents in pieces, and responses that name the pieces that they rest on. Read it with `datasets.load_from_disk`; the same "
            "numbers are in `card.json`.",
            f"    {fields['command']}",
            "## Settings",
            card.table(("setting", "value"), fields["distributions"].items()),
            f"## {what.capitalize()} read",
            "Of all splits together."
            + (f" The source has no {' and no '.join(absent)} part." if absent else "")
            + (f" The splits are {fields['splits']}." if "splits" in fields else "")
            + (f" Licence of {fields['licence']}." if "licence" in fields else ""),
            card.table(("", what), counts.items()),
            "## What was written",
            card.lengths_table(statistics),
            *self.sources_sections(statistics, self.step),
        ]
