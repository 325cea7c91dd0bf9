"""Statistics of an arithmetic corpus, for its card."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from data import card
from data.arithmetic.expressions import Expression
from data.arithmetic.oracle import Example
from data.spans import attended_tokens
from data.vocab import Vocab

_LENGTH_BIN_TOKENS = 32


class Statistics(card.Statistics):
    """Count lengths, trees, operators, and what response tokens attend to."""

    def __init__(self, vocab: Vocab) -> None:
        super().__init__(vocab)
        self._operators: collections.Counter[str] = collections.Counter()
        self._shapes: collections.Counter[str] = collections.Counter()
        self._attended_fractions = 0.0

    def add(self, example: Example) -> None:
        super().add(example)
        num_ops = example.expression.num_ops
        depth, is_left_comb = _shape(example.expression)
        self.count(num_ops=num_ops, tree_depth=depth)
        self._operators.update(node for node in example.expression if isinstance(node, str))
        self._shapes["left comb"] += is_left_comb
        self._shapes["least depth"] += depth == num_ops.bit_length()
        attended = attended_tokens(example.token_ids, example.prompt_tokens, self._vocab)
        self._attended_fractions += float((attended / np.arange(example.prompt_tokens + 1, len(example.token_ids) + 1)).sum())
        self._counts["attended_tokens"].update(attended.tolist())

    def to_json(self) -> dict[str, Any]:
        lengths, attended = self._counts["example_tokens"], self._counts["attended_tokens"]
        bins: collections.Counter[int] = collections.Counter()
        for length, count in lengths.items():
            bins[length // _LENGTH_BIN_TOKENS * _LENGTH_BIN_TOKENS] += count
        return {
            **{name: card.quantiles(self._counts[name]) for name in ("prompt_tokens", "response_tokens", "example_tokens")},
            "example_tokens_histogram": {f"{low}-{low + _LENGTH_BIN_TOKENS - 1}": bins[low] for low in sorted(bins)},
            "num_ops_histogram": {str(n): count for n, count in sorted(self._counts["num_ops"].items())},
            "operators": dict(sorted(self._operators.items())),
            "tree_depth": card.quantiles(self._counts["tree_depth"]),
            "tree_shape_share": {shape: round(self._shapes[shape] / lengths.total(), 6) for shape in ("left comb", "least depth")},
            "attended_fraction": round(self._attended_fractions / attended.total(), 6),
            "attended_tokens_mean": card.quantiles(attended)["mean"],
            "attended_tokens_max": max(attended),
        }

    def sections(self, fields: Mapping[str, Any], statistics: Mapping[str, Any]) -> list[str]:
        lengths = ("prompt_tokens", "response_tokens", "example_tokens", "tree_depth")
        return [
            "Prompts and gold responses of the span protocol. Read it with `datasets.load_from_disk`; the same numbers are in `card.json`.",
            f"    {fields['command']}",
            "The same command gives the same bytes, whatever the number of workers. The splits share no expression.",
            "## Distributions that it was drawn from",
            card.table(("setting", "value"), fields["distributions"].items()),
            "## What was drawn",
            card.table(("", "mean", *card.QUANTILES), ((name, *statistics[name].values()) for name in lengths)),
            f"Attended fraction {statistics['attended_fraction']:.4f}: the mean, over response tokens, of the tokens attended to as a "
            'share of those that dense attention reads (itself included; `header_view="span"`, `prompt_view="causal"`). A response token '
            f"attends to {statistics['attended_tokens_mean']} tokens on average, to {statistics['attended_tokens_max']} at most.",
            "## Operators",
            card.counts("operator", statistics["operators"]),
            "## Number of operators",
            card.counts("operators", statistics["num_ops_histogram"]),
            "## Tree shapes",
            "Share of the trees that are left combs (every right operand is a leaf) and that have the least depth possible (operators on "
            "the longest way down); small trees can be both, and uniform ones either.",
            card.table(("shape", "share"), statistics["tree_shape_share"].items()),
            "## Tokens per example",
            card.counts("tokens", statistics["example_tokens_histogram"]),
        ]


def _shape(expression: Expression) -> tuple[int, bool]:
    """Return (operators on the longest way down, whether every right operand is a leaf)."""
    depths: list[int] = []
    is_left_comb = True
    for node in expression:
        if isinstance(node, int):
            depths.append(0)
        else:
            right = depths.pop()
            is_left_comb &= right == 0
            depths[-1] = 1 + max(depths[-1], right)
    return depths[0], is_left_comb
