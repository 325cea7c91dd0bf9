"""What a corpus is like: statistics of its examples, for `card.json` and for people."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from data.arithmetic import Example, Expression
from data.vocab import Vocab

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
_LENGTH_BIN_TOKENS = 32


def attended_tokens(example: Example, vocab: Vocab) -> npt.NDArray[np.int64]:
    """How many tokens each token of a gold response attends to, itself included, int64 [response tokens].

    The span protocol's automaton (sections 2 and 7) for header_view="span", prompt_view="causal". Between structural
    tokens the number grows by one a token, so only those are looked at one by one.
    """
    token_ids, seg_base, ref_base = example.token_ids, vocab.seg_base, vocab.ref_base
    structural = np.flatnonzero((token_ids == vocab.solve_id) | (token_ids >= seg_base))
    carried: dict[int, int] = collections.defaultdict(int)  # label -> tokens before `begin` that carry it
    named: set[int] = set()  # what the current step sees: the sink, its own label, and those it names
    label = begin = attended = 0
    offsets = []  # attended - position, from each structural token to the next
    for position, token in zip(structural.tolist(), token_ids[structural].tolist(), strict=True):
        carried[label] += position - begin
        attended += position - begin
        begin = position
        if token < ref_base:
            label = max(token - seg_base, 0)  # <solve> opens the sink
            named = {0, label}
            attended = 1 + carried[0] + (carried[label] if label else 0)
        elif token - ref_base not in named:
            named.add(token - ref_base)
            attended += carried[token - ref_base]
        offsets.append(attended - position)
    lengths = np.diff(structural, append=len(token_ids))
    counts = np.repeat(np.array(offsets), lengths) + np.arange(structural[0], len(token_ids))
    return counts[example.prompt_tokens - structural[0] :]


class Statistics:
    """Counts over the examples of a corpus, added one by one."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._prompt_tokens: collections.Counter[int] = collections.Counter()
        self._response_tokens: collections.Counter[int] = collections.Counter()
        self._example_tokens: collections.Counter[int] = collections.Counter()
        self._num_ops: collections.Counter[int] = collections.Counter()
        self._depth: collections.Counter[int] = collections.Counter()
        self._operators: collections.Counter[str] = collections.Counter()
        self._shapes: collections.Counter[str] = collections.Counter()
        self._attended_fractions = 0.0
        self._attended_tokens = 0
        self._most_attended_tokens = 0

    def add(self, example: Example) -> None:
        """Counts one more example."""
        length = len(example.token_ids)
        self._prompt_tokens[example.prompt_tokens] += 1
        self._response_tokens[length - example.prompt_tokens] += 1
        self._example_tokens[length] += 1
        self._num_ops[example.expression.num_ops] += 1
        self._operators.update(node for node in example.expression if isinstance(node, str))
        depth, is_left_comb = _shape(example.expression)
        self._depth[depth] += 1
        self._shapes["left comb"] += is_left_comb
        self._shapes["least depth"] += depth == example.expression.num_ops.bit_length()
        attended = attended_tokens(example, self._vocab)
        self._attended_fractions += float((attended / np.arange(example.prompt_tokens + 1, length + 1)).sum())
        self._attended_tokens += int(attended.sum())
        self._most_attended_tokens = max(self._most_attended_tokens, int(attended.max(initial=0)))

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        num_examples = sum(self._example_tokens.values())
        response_tokens = sum(length * count for length, count in self._response_tokens.items())
        bins: collections.Counter[int] = collections.Counter()
        for length, count in self._example_tokens.items():
            bins[length // _LENGTH_BIN_TOKENS * _LENGTH_BIN_TOKENS] += count
        return {
            "prompt_tokens": quantiles(self._prompt_tokens),
            "response_tokens": quantiles(self._response_tokens),
            "example_tokens": quantiles(self._example_tokens),
            "example_tokens_histogram": {f"{low}-{low + _LENGTH_BIN_TOKENS - 1}": bins[low] for low in sorted(bins)},
            "num_ops_histogram": {str(n): self._num_ops[n] for n in sorted(self._num_ops)},
            "operators": {symbol: self._operators[symbol] for symbol in sorted(self._operators)},
            "tree_depth": quantiles(self._depth),
            "tree_shape_share": {shape: round(self._shapes[shape] / num_examples, 6) for shape in ("left comb", "least depth")},
            "attended_fraction": round(self._attended_fractions / response_tokens, 6),
            "attended_tokens_mean": round(self._attended_tokens / response_tokens, 3),
            "attended_tokens_max": self._most_attended_tokens,
        }


def _shape(expression: Expression) -> tuple[int, bool]:
    """(operators on the longest way down, whether every right operand is a leaf)."""
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


def quantiles(counts: Mapping[int, int]) -> dict[str, float]:
    values = sorted(counts)
    cumulative = np.cumsum([counts[value] for value in values])
    total = int(cumulative[-1])
    quantiles = {name: values[int(np.searchsorted(cumulative, q * total))] for name, q in QUANTILES.items()}
    return {"mean": round(sum(value * count for value, count in counts.items()) / total, 3), **quantiles}


def readme(fields: Mapping[str, Any]) -> str:
    """The card's JSON as Markdown."""
    statistics = fields["statistics"]
    lengths = ("prompt_tokens", "response_tokens", "example_tokens", "tree_depth")
    parts = [
        f"# {fields['task']['task']} corpus, {fields['num_examples']} examples, split {fields['split']}",
        "Prompts and gold responses of the span protocol. Read it with `datasets.load_from_disk`; the same numbers are in `card.json`.",
        f"    {fields['command']}",
        "The same command gives the same bytes, whatever the number of workers. The splits share no expression.",
        "## Distributions that it was drawn from",
        table(("setting", "value"), fields["distributions"].items()),
        "## What was drawn",
        table(("", "mean", *QUANTILES), ((name, *statistics[name].values()) for name in lengths)),
        f"Attended fraction {statistics['attended_fraction']:.4f}: the mean, over response tokens, of the tokens attended to as a share of "
        f'those that dense attention reads (itself included; `header_view="span"`, `prompt_view="causal"`). A response token attends to '
        f"{statistics['attended_tokens_mean']} tokens on average, to {statistics['attended_tokens_max']} at most.",
        "## Operators",
        counts("operator", statistics["operators"]),
        "## Number of operators",
        counts("operators", statistics["num_ops_histogram"]),
        "## Tree shapes",
        "Share of the trees that are left combs (every right operand is a leaf) and that have the least depth possible (operators on the "
        "longest way down); small trees can be both, and uniform ones either.",
        table(("shape", "share"), statistics["tree_shape_share"].items()),
        "## Tokens per example",
        counts("tokens", statistics["example_tokens_histogram"]),
    ]
    return "\n\n".join(parts) + "\n"


def counts(what: str, counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return table((what, "count", "share"), ((f"`{key}`", count, f"{count / total:.4f}") for key, count in counts.items()))


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(map(str, row)) for row in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
