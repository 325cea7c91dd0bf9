"""Statistics of a news corpus, for its card."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from data import card, spans
from data.alignment import Alignment
from data.news.corpus import SYNTHETIC_SETTINGS, Example
from data.vocab import Vocab

_MAX_GUESSED_SENTENCES = 6


class Statistics(card.Statistics):
    """Count lengths, sources, facts, what response tokens attend to, and how well alignment finds true sources."""

    def __init__(self, vocab: Vocab, *, header_view: spans.HeaderView) -> None:
        super().__init__(vocab)
        self._header_view: spans.HeaderView = header_view
        self._positions: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)  # by summary sentence
        self._attended = {"body": [0.0, 0], "header": [0.0, 0]}  # sum of fractions, tokens
        self._aligned: collections.Counter[str] = collections.Counter()  # sources that are right, found, true
        self._facts: collections.Counter[str] = collections.Counter()

    def add(self, example: Example) -> None:
        story = example.story
        self.count(article_sentences=len(story.article), summary_sentences=len(story.summary))
        if example.cut_sentences:
            self.count(cut_sentences=example.cut_sentences)
        super().add(example)
        for number, sources in enumerate(story.sources):
            self.count(sources_per_summary_sentence=len(sources))
            self._positions[number].update(sources)
        self._facts.update(fact.kind for fact in story.facts)
        self._attend(example)
        if story.facts:  # the true sources are known
            for found, true in zip(Alignment().align(story.article, story.summary), story.sources, strict=True):
                self._aligned.update(right=len({*found} & {*true}), found=len(found), true=len(true))

    def _attend(self, example: Example) -> None:
        """Add up what the response tokens attend to, as a share of their context."""
        ids, prompt_tokens = example.token_ids, example.prompt_tokens
        attended = spans.attended_tokens(ids, prompt_tokens, self._vocab, header_view=self._header_view)
        fractions = attended / np.arange(prompt_tokens + 1, len(ids) + 1)
        bases = (self._vocab.seg_base, self._vocab.ref_base)
        headers = np.logical_or(*(spans.is_label(example.response_ids, base, self._vocab) for base in bases))
        for part, chosen in (("header", headers), ("body", ~headers)):
            self._attended[part][0] += float(fractions[chosen].sum())
            self._attended[part][1] += int(chosen.sum())

    def guesser(self) -> dict[str, float]:
        """Score the best guess by position: the same article sentences for the n-th summary sentence of every article.

        For each n, the k most frequent positions, for the k of 1 to 6 with the highest F1; chosen on these very examples,
        so no guesser by position (from the start) does better than by chance.
        """
        true = sum(positions.total() for positions in self._positions.values())
        sentences = self._counts["sources_per_summary_sentence"].total()
        best = (0.0, 0.0, 0.0, 0)
        for k in range(1, _MAX_GUESSED_SENTENCES + 1):
            hits = sum(count for positions in self._positions.values() for _, count in positions.most_common(k))
            precision, recall = hits / (k * sentences), hits / true
            best = max(best, (2 * precision * recall / (precision + recall), precision, recall, k), key=lambda guess: guess[0])
        f1, precision, recall = (round(value, 4) for value in best[:3])
        return {"precision": precision, "recall": recall, "f1": f1, "sentences_named": best[3]}

    def to_json(self) -> dict[str, Any]:
        right, found, true = (self._aligned[name] for name in ("right", "found", "true"))
        values: dict[str, Any] = {name: card.quantiles(counter) for name, counter in self._counts.items() if counter}
        values["cut_articles"] = self._counts["cut_sentences"].total()
        values["sources_histogram"] = {str(n): count for n, count in sorted(self._counts["sources_per_summary_sentence"].items())}
        values["position_guesser"] = self.guesser()
        for part, (fractions, tokens) in self._attended.items():
            values[f"attended_fraction_{part}"] = round(fractions / max(tokens, 1), 6)
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
        lengths = [name for name, value in statistics.items() if isinstance(value, dict) and "median" in value]
        guess, aligned = statistics["position_guesser"], statistics["alignment_against_truth"]
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
            card.table(("", "mean", *card.QUANTILES), ((name, *statistics[name].values()) for name in lengths)),
            self._cut(fields, statistics),
            "## Sources",
            card.counts("sources of a summary sentence", statistics["sources_histogram"]),
            f"Attended fraction of response tokens: body {statistics['attended_fraction_body']:.4f}, span tokens "
            f'{statistics["attended_fraction_header"]:.4f} (`header_view="{self._header_view}"`, `prompt_view="causal"`).',
            f"Naming the {guess['sentences_named']} most frequent positions of each summary sentence's sources, whatever the article says: "
            f"precision {guess['precision']:.3f}, recall {guess['recall']:.3f}.",
        ]
        if aligned:
            parts.append(
                f"The sources are the true ones. Alignment by ROUGE, as other corpora get theirs, finds them with precision "
                f"{aligned['precision']:.3f} and recall {aligned['recall']:.3f} ({aligned['sources']:,} sources; min_gain "
                f"{Alignment().min_gain}, max_sources {Alignment().max_sources})."
            )
        return parts
