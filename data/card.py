"""The statistics of a corpus: counted example by example, and written as JSON and Markdown."""

import abc
import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from data import spans
from data.vocab import Vocab

_MAX_GUESSED_PIECES = 6
QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


class Statistics(abc.ABC):
    """Count the lengths of a corpus's examples; a task's own subclass counts more."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._counts: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)

    def add(self, example: Any) -> None:
        """Count one more example."""
        length = len(example.token_ids)
        self.count(prompt_tokens=example.prompt_tokens, response_tokens=length - example.prompt_tokens, example_tokens=length)

    def count(self, **values: int) -> None:
        """Count one more of each value, by what it is the value of."""
        for name, value in values.items():
            self._counts[name][value] += 1

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return a plain dict, for `card.json`."""

    def readme(self, fields: Mapping[str, Any]) -> str:
        """Write the card's JSON as Markdown."""
        title = f"# {fields['task']['task']} corpus, {fields['num_examples']} examples, split {fields['split']}"
        return "\n\n".join([title, *self.sections(fields, fields["statistics"])]) + "\n"

    @abc.abstractmethod
    def sections(self, fields: Mapping[str, Any], statistics: Mapping[str, Any]) -> list[str]:
        """Write what follows the title: headings, paragraphs and tables."""


class SourcesStatistics(Statistics):
    """Count the sources of steps as well, and what response tokens attend to."""

    sources_per: ClassVar[str] = "sources_per_step"
    """What the number of sources is of, in JSON."""

    def __init__(self, vocab: Vocab, *, header_view: spans.HeaderView) -> None:
        super().__init__(vocab)
        self._header_view: spans.HeaderView = header_view
        self._positions: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)  # by step
        self._attended = {"body": [0.0, 0], "header": [0.0, 0]}  # sum of fractions, tokens

    def add_sources(self, example: Any, steps: Iterable[Sequence[int]]) -> None:
        """Count an example as `add` does, and the pieces that each step rests on."""
        super().add(example)
        for number, sources in enumerate(steps):
            self.count(**{self.sources_per: len(sources)})
            self._positions[number].update(sources)
        self._attend(example)

    def _attend(self, example: Any) -> None:
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
        """Score the best guess by position: the same pieces for the n-th step of every example.

        For each n, the k most frequent positions, for the k of 1 to 6 with the highest F1; chosen on these very examples,
        so no guesser by position (from the start) does better than by chance.
        """
        true = sum(positions.total() for positions in self._positions.values())
        steps = self._counts[self.sources_per].total()
        best = (0.0, 0.0, 0.0, 0)
        for k in range(1, _MAX_GUESSED_PIECES + 1):
            hits = sum(count for positions in self._positions.values() for _, count in positions.most_common(k))
            precision, recall = hits / (k * steps), hits / true
            best = max(best, (2 * precision * recall / (precision + recall), precision, recall, k), key=lambda guess: guess[0])
        f1, precision, recall = (round(value, 4) for value in best[:3])
        return {"precision": precision, "recall": recall, "f1": f1, "pieces_named": best[3]}

    def sources_json(self) -> dict[str, Any]:
        """Return the quantiles of all that was counted, and what is known of sources, for `to_json`."""
        values: dict[str, Any] = {name: quantiles(counter) for name, counter in self._counts.items() if counter}
        values["sources_histogram"] = {str(n): count for n, count in sorted(self._counts[self.sources_per].items())}
        values["position_guesser"] = self.guesser()
        for part, (fractions, tokens) in self._attended.items():
            values[f"attended_fraction_{part}"] = round(fractions / max(tokens, 1), 6)
        return values

    def sources_sections(self, statistics: Mapping[str, Any], step: str) -> list[str]:
        """Write what is known of sources; `step` says what has them, as in "a sentence"."""
        guess = statistics["position_guesser"]
        return [
            "## Sources",
            counts(f"sources of {step}", statistics["sources_histogram"]),
            f"Attended fraction of response tokens: body {statistics['attended_fraction_body']:.4f}, span tokens "
            f'{statistics["attended_fraction_header"]:.4f} (`header_view="{self._header_view}"`, `prompt_view="causal"`).',
            f"Naming the {guess['pieces_named']} most frequent positions of the n-th one's sources, whatever the text says: "
            f"precision {guess['precision']:.3f}, recall {guess['recall']:.3f}.",
        ]


def lengths_table(statistics: Mapping[str, Any]) -> str:
    """Write the quantiles among the statistics as a Markdown table."""
    lengths = [name for name, value in statistics.items() if isinstance(value, dict) and "median" in value]
    return table(("", "mean", *QUANTILES), ((name, *statistics[name].values()) for name in lengths))


def quantiles(counts: Mapping[int, int]) -> dict[str, float]:
    """Return the mean and the quantiles of a number, from how often each of its values occurs."""
    values = sorted(counts)
    cumulative = np.cumsum([counts[value] for value in values])
    total = int(cumulative[-1])
    quantiles = {name: values[int(np.searchsorted(cumulative, q * total))] for name, q in QUANTILES.items()}
    return {"mean": round(sum(value * count for value, count in counts.items()) / total, 3), **quantiles}


def counts(what: str, counts: Mapping[str, int]) -> str:
    """Write counts and their shares as a Markdown table."""
    total = sum(counts.values())
    return table((what, "count", "share"), ((f"`{key}`", count, f"{count / total:.4f}") for key, count in counts.items()))


def listed(counts: Mapping[str, int]) -> str:
    """Write what became of articles in one line: "7 read, 4 written (1 cut), 3 dropped (2 without a summary, 1 ...)"."""
    also = {what.removeprefix("written, "): count for what, count in counts.items() if what.startswith("written, ")}
    dropped = {what: count for what, count in counts.items() if what != "read" and not what.startswith("written")}
    parts = [f"{counts['read']:,} read", f"{counts['written']:,} written{_reasons(also)}"]
    return ", ".join([*parts, f"{sum(dropped.values()):,} dropped{_reasons(dropped)}"] if dropped else parts)


def _reasons(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{counts[what]:,} {what}' for what in sorted(counts))})" if counts else ""


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Write a Markdown table."""
    lines = [list(map(str, row)) for row in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
