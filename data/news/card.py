"""Statistics of a news corpus, for its card."""

import collections
from collections.abc import Mapping
from typing import Any

from data import card, spans
from data.alignment import Alignment
from data.news.corpus import SYNTHETIC_SETTINGS, Example
from data.vocab import Vocab


class Statistics(card.SourcesStatistics):
    """Count lengths, sources, facts, what response tokens attend to, and how well alignment finds true sources."""

    sources_per = "sources_per_summary_sentence"

    def __init__(self, vocab: Vocab, *, header_view: spans.HeaderView) -> None:
        super().__init__(vocab, header_view=header_view)
        self._aligned: collections.Counter[str] = collections.Counter()  # sources that are right, found, true
        self._facts: collections.Counter[str] = collections.Counter()

    def add(self, example: Example) -> None:
        story = example.story
        self.count(article_sentences=len(story.article), summary_sentences=len(story.summary))
        if example.cut_sentences:
            self.count(cut_sentences=example.cut_sentences)
        self.add_sources(example, story.sources)
        self._facts.update(fact.kind for fact in story.facts)
        if story.facts:  # the true sources are known
            for found, true in zip(Alignment().align(story.article, story.summary), story.sources, strict=True):
                self._aligned.update(right=len({*found} & {*true}), found=len(found), true=len(true))

    def to_json(self) -> dict[str, Any]:
        right, found, true = (self._aligned[name] for name in ("right", "found", "true"))
        values = self.sources_json()
        values["cut_articles"] = self._counts["cut_sentences"].total()
        values["facts"] = dict(sorted(self._facts.items()))
        values["alignment_against_truth"] = (
            {"precision": round(right / max(found, 1), 4), "recall": round(right / true, 4), "sources": true} if true else None
        )
        return values

    def _cut(self, fields: Mapping[str, Any], statistics: Mapping[str, Any]) -> str:
        """Say how many articles were cut, and where."""
        limit, cut = fields["task"]["max_prompt_tokens"], statistics["cut_articles"]
        if not cut:
            return f"No article was cut: none has more than {limit} tokens of prompt."
        left_out = statistics["cut_sentences"]
        return (
            f"{cut:,} of {fields['num_examples']:,} articles were cut: longer than {limit} tokens of prompt (max_prompt_tokens), they end "
            f"after the last sentence that fits. The median one lost {left_out['median']} sentences, none more than {left_out['max']}."
        )

    def sections(self, fields: Mapping[str, Any], statistics: Mapping[str, Any]) -> list[str]:
        aligned = statistics["alignment_against_truth"]
        is_synthetic = fields["source"] == "synthetic"
        settings = [item for item in fields["distributions"].items() if is_synthetic or item[0] not in SYNTHETIC_SETTINGS]
        parts = [
            "Articles and gold summaries of the span protocol. Read it with `datasets.load_from_disk`; the same numbers are in "
            "`card.json`.",
            f"    {fields['command']}",
            "## Settings",
            card.table(("setting", "value"), settings),
            "## Articles read",
            "The splits are told apart by a hash of the article: an eighth is test."
            if is_synthetic
            else "Of all splits together. Where the source has none of its own, articles are divided by a hash of their text: of ten, "
            "eight to train, one to validation and one to test. An article that occurs twice is in one of them.",
            card.table(("", "articles"), fields["articles"].items()),
            "## What was written",
            card.lengths_table(statistics),
            self._cut(fields, statistics),
            *self.sources_sections(statistics, "a summary sentence"),
        ]
        if aligned:
            parts.append(
                f"The sources are the true ones. Alignment by ROUGE, as other corpora get theirs, finds them with precision "
                f"{aligned['precision']:.3f} and recall {aligned['recall']:.3f} ({aligned['sources']:,} sources; min_gain "
                f"{Alignment().min_gain}, max_sources {Alignment().max_sources})."
            )
        return parts
