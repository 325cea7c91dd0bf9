"""Quantiles and Markdown tables for the cards of all corpora."""

from collections.abc import Iterable, Mapping

import numpy as np

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


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


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Write a Markdown table."""
    lines = [list(map(str, row)) for row in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
