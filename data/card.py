"""The statistics of a corpus: counted example by example, and written as JSON and Markdown."""

import abc
import collections
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from data.vocab import Vocab

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
