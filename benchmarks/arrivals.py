"""Requests that arrive whether a system keeps up or not: when they come, what becomes of each, and what that says of the system."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass
class Sent:
    """What became of one request; times in seconds from the beginning."""

    arrival: float
    events: list[float] = dataclasses.field(default_factory=list)
    """When text came."""
    tokens: int = 0
    right: bool | None = None
    failed: str | None = None
    left: bool = False
    """Whether the client went away before the end."""


def arrivals(rate: float | None, number: int, seed: int) -> Float[np.ndarray, "R"]:
    """Draw the seconds at which requests arrive: a Poisson process of `rate` a second; None: all at once."""
    if rate is None:
        return np.zeros(number)
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, number))


def summary(rate: float | None, requests: list[Sent]) -> dict[str, Any]:
    """Sum up the requests of one rate: counts, rates over the time from the first arrival to the last event, latencies in ms.

    Those whose client went away are counted as that, and in nothing else.
    """
    done = [sent for sent in requests if sent.failed is None and sent.events and not sent.left]
    seconds = max((sent.events[-1] for sent in done), default=0.0) - min(sent.arrival for sent in requests)
    gaps = [later - earlier for sent in done for earlier, later in itertools.pairwise(sent.events)]
    each = [(sent.events[-1] - sent.events[0]) / (sent.tokens - 1) for sent in done if sent.tokens > 1 and len(sent.events) > 1]
    row: dict[str, Any] = {
        "requests_per_second": rate,
        "num_requests": len(requests),
        "num_failed": sum(sent.failed is not None for sent in requests),
        "num_left": sum(sent.left for sent in requests),
        "seconds": seconds,
        "tokens": sum(sent.tokens for sent in done),
        "tokens_per_second": sum(sent.tokens for sent in done) / seconds if done else 0.0,
        "right_answers_per_second": sum(bool(sent.right) for sent in done) / seconds
        if any(sent.right is not None for sent in done)
        else None,
        "failures": sorted({sent.failed for sent in requests if sent.failed}),
    }
    for name, values in (
        ("first_token", [sent.events[0] - sent.arrival for sent in done]),
        ("between_events", gaps),
        ("per_token", each),
        ("whole", [sent.events[-1] - sent.arrival for sent in done]),
    ):
        row |= {f"{name}_ms_p{q}": 1000 * float(np.percentile(values, q)) if values else None for q in (50, 99)}
    return row


LATENCIES = {"first token": "first_token", "between events": "between_events", "per token": "per_token", "whole": "whole"}
"""Heads of columns, and the latencies of a summary, each with a p50 and a p99."""


def table(rows: list[dict[str, Any]]) -> str:
    """Lay summaries out, latencies as p50 / p99 in ms; with a column for the system where rows name one."""
    lines = [[*(["system"] if "system" in rows[0] else []), "requests/s", "sent", "failed", "tokens/s", "right/s"]]
    lines[0] += [f"{title}, ms" for title in LATENCIES]
    for row in rows:
        right, rate = row["right_answers_per_second"], row["requests_per_second"]
        cells = [*([row["system"]] if "system" in row else []), "all at once" if rate is None else f"{rate:g}"]
        cells += [str(row["num_requests"]), str(row["num_failed"]), f"{row['tokens_per_second']:.1f}"]
        cells.append("-" if right is None else f"{right:.2f}")
        for name in LATENCIES.values():
            p50, p99 = (row[f"{name}_ms_p{q}"] for q in (50, 99))
            cells.append("-" if p50 is None else f"{p50:.1f} / {p99:.1f}")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)) for cells in lines)
