"""Report the arithmetic experiments: stored results in, tables and plots of a page out.

    python -m experiments.arithmetic docs/arithmetic

`--take DIR` first adds, reduced, what train.py and decode.py eval left in DIR under the names of `experiments.results`
(metrics.jsonl becomes the curve).
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Iterator, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from experiments import pages
from experiments.pages import Plot, Tally, judge, markdown_table
from experiments.results import Run
from experiments.variants import Experiment

_ACCURACIES = {"answer_accuracy": "answers", "step_accuracy": "all steps", "span_accuracy": "all spans minimal"}
_SCORES = ("num_examples", *_ACCURACIES, "attended_tokens", "attended_fraction", "first_errors")
_SPEEDS = dict.fromkeys(("batch_size", "problems_per_second", "decode_seconds"))
EXPERIMENT = Experiment(
    "arithmetic",
    evaluations={"range": "accuracy inside the training range", "long": "length generalization", "speed": "right answers per second"},
    evaluation_fields={
        **dict.fromkeys(("seed", "attention", "device", "jax", "num_parameters")),
        "by_ops": {"*": dict.fromkeys(_SCORES)},
        "sets": {"*": {"context_tokens": None, "by_batch_size": [_SPEEDS]}},
    },
)

# ----------------------------------------------------------------------------------------------------------------- frames


def scores(runs: Iterable[Run]) -> pd.DataFrame:
    """Collect the scores of all evaluations: a row for each run, kind of evaluation and number of operators.

    Numbers of operators that not all seeds of a variant were evaluated at are left out.
    """
    rows = [
        {"variant": run.variant, "seed": run.seed, "kind": kind, "ops": int(ops), **row, **found["sets"].get(ops, {})}
        for run in runs
        for kind, found in run.evaluations.items()
        for ops, row in sorted(found["by_ops"].items(), key=lambda item: int(item[0]))
    ]
    frame = pd.DataFrame(rows, columns=["variant", "seed", "kind", "ops", *_SCORES, "context_tokens", "by_batch_size"])
    seeds, seeds_here = (frame.groupby(["variant", "kind", *more])["seed"].transform("nunique") for more in ([], ["ops"]))
    return frame[seeds_here == seeds]


def _by_variant(frame: pd.DataFrame, kind: str, *, each_length: bool = False) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each variant with its rows of a kind of evaluation, all together or those of each number of operators."""
    keys = ["variant", "ops"] if each_length else ["variant"]
    return ((str(key[0]), own) for key, own in frame[frame["kind"] == kind].groupby(keys, sort=False))


def _operators(frame: pd.DataFrame) -> str:
    """Write the number of operators of some rows, or their range."""
    low, high = frame["ops"].min(), frame["ops"].max()
    return str(low) if low == high else f"{low}-{high}"


def _speeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Compute right answers and all answers per second, each seed at its best batch and then the mean over seeds.

    Returns: a row for each variant and number of operators, with the best batch of its first seed.
    """
    rows = []
    for row in frame[frame["kind"] == "speed"].itertuples():
        best = max(row.by_batch_size, key=lambda speed: speed["problems_per_second"])
        answers = row.num_examples / min(speed["decode_seconds"] for speed in row.by_batch_size)
        rows.append((row.variant, row.ops, best["problems_per_second"], answers, row.context_tokens, best["batch_size"]))
    speeds = pd.DataFrame(rows, columns=["variant", "ops", "right", "answers", "context_tokens", "batch"])
    how = {"right": "mean", "answers": "mean", "context_tokens": "mean", "batch": "first"}
    return speeds.groupby(["variant", "ops"], sort=False).agg(how)


def _ratios(speeds: pd.DataFrame) -> dict[int, tuple[float, float]]:
    """Divide right answers per second of span by those of long, the control trained at these lengths, and by all answers of long.

    The second ratio is what is left where the control is slow, and not just wrong.
    """
    if not {"span", "long"} <= {*speeds.index.get_level_values("variant")}:
        return {}
    ratios = speeds.loc[["long"], ["right", "answers"]].droplevel("variant").rdiv(speeds.loc["span"]["right"], axis="index").dropna()
    return {ops: (measured, if_all_right) for ops, measured, if_all_right in ratios.itertuples()}


# ----------------------------------------------------------------------------------------------------------------- tables


_HEAD = ("examples", "answers", "all steps", *pages.BOUNDS, *pages.EXTREMES, "all spans minimal", "tokens attended")


def _accuracies(frame: pd.DataFrame) -> list[str]:
    """Write the cells below _HEAD up to the tokens; interval and seeds are those of all steps."""
    tallies = {name: Tally.of(frame, name) for name in _ACCURACIES}
    answers, steps, spans = (f"{tally.right:,}" for tally in tallies.values())
    found = tallies["step_accuracy"]
    return [f"{found.num_examples:,}", answers, steps, *found.bounds, *found.extremes, spans]


def range_table(frame: pd.DataFrame) -> str:
    """Write a row for each third of the range and all of it; tokens are means over lengths."""
    rows = []
    for variant, own in _by_variant(frame, "range"):
        thirds = [own[own["ops"].between(low, high)] for low, high in ((2, 8), (9, 15), (16, 22))]
        for part in [*(third for third in thirds if 0 < len(third) < len(own)), own]:
            tokens = part.groupby("seed")["attended_tokens"].mean().mean()
            rows.append((f"`{variant}`", _operators(part), *_accuracies(part), f"{tokens:.1f}"))
    return markdown_table(("variant", "operators", *_HEAD), rows)


def long_table(frame: pd.DataFrame) -> str:
    rows = []
    for variant, own in _by_variant(frame, "long", each_length=True):
        context, tokens, fraction = own[["context_tokens", "attended_tokens", "attended_fraction"]].mean()
        cells = (*_accuracies(own), f"{tokens:,.1f}", f"{100 * fraction:.1f}", f"{context:,.0f}")
        rows.append((f"`{variant}`", _operators(own), *cells))
    return markdown_table(("variant", "operators", *_HEAD, "of the context, %", "tokens of context"), rows)


def errors_table(frame: pd.DataFrame) -> str:
    """Count what went wrong first, over all seeds; variants and numbers of operators without an error are left out."""
    kinds = ("first label", "next label", "refs", "body", "eos")
    rows = []
    for kind in ("range", "long"):
        for variant, own in _by_variant(frame, kind, each_length=kind == "long"):
            errors = sum(map(collections.Counter, own["first_errors"]), collections.Counter[str]())
            if errors:
                rows.append((f"`{variant}`", _operators(own), f"{own['num_examples'].sum():,}", *(str(errors[error]) for error in kinds)))
    if not rows and frame["kind"].isin(("range", "long")).any():
        return "No errors, in what was run."
    return markdown_table(("variant", "operators", "examples", *kinds), rows)


def speed_table(frame: pd.DataFrame) -> str:
    speeds, rows = _speeds(frame), []
    ratios = _ratios(speeds)
    for variant, own in _by_variant(frame, "speed", each_length=True):
        ops = own["ops"].iloc[0]
        speed, answers = speeds.loc[(variant, ops)], Tally.of(own, "answer_accuracy")
        ratio = [f"{gain:.2f}" for gain in ratios[ops]] if variant == "span" and ops in ratios else ["-", "-"]
        counts = (f"{speed['context_tokens']:,.0f}", f"{answers.num_examples:,}", f"{answers.right:,}")
        rows.append(
            (f"`{variant}`", str(ops), *counts, f"{speed['right']:,.1f}", f"{speed['answers']:,.1f}", f"{speed['batch']:.0f}", *ratio)
        )
    head = ("variant", "operators", "tokens of context", "examples", "right", "right answers/s", "answers/s", "best batch")
    return markdown_table((*head, "over `long`", "over `long`, were all its answers right"), rows)


def targets(frame: pd.DataFrame) -> str:
    inside = {variant: Tally.of(own, "step_accuracy") for variant, own in _by_variant(frame, "range")}
    at_200 = {variant: Tally.of(own, "step_accuracy") for variant, own in _by_variant(frame[frame["ops"] == 200], "long")}
    ratio = _ratios(_speeds(frame)).get(200)

    def reach(tallies: dict[str, Tally], name: str, share: float, where: str) -> tuple[str, ...]:
        target, wanted = f"`{name}`, {where}: all steps right, %", f"{100 * share:.1f}"
        own = tallies.get(name)
        return judge(target, wanted) if own is None else judge(target, wanted, f"{100 * own.share:.2f}", reached=own.share >= share)

    def match(name: str, control: str) -> tuple[str, ...]:
        target = f"`{name}`, 2-22 operators: all steps right, %, not below `{control}` by more than the seeds' spread"
        if not {name, control} <= inside.keys():
            return judge(target)
        span, dense = inside[name], inside[control]
        wanted = dense.share - max(span.spread, dense.spread)
        return judge(target, f"{100 * wanted:.2f}", f"{100 * span.share:.2f}", reached=span.share >= wanted)

    inside_range, beyond = "2-22 operators", "200 operators, trained on 22 at most"
    faster = "right answers per second at 200 operators, over `long`"
    return markdown_table(
        pages.TARGETS,
        [
            *(reach(inside, name, 0.995, inside_range) for name in ("leaf_jumps", "span", "base")),
            match("span", "dense"),
            match("base", "base_dense"),
            *(reach(at_200, name, 0.95, beyond) for name in ("leaf_jumps", "span", "jumps", "base")),
            judge(faster, "3.00", f"{ratio[0]:.2f}", reached=ratio[0] >= 3) if ratio else judge(faster, "3.00"),
        ],
    )


# ------------------------------------------------------------------------------------------------------------------ plots


def _plot_accuracy(axes: Axes, runs: Sequence[Run], kind: str) -> None:
    """Plot all steps right by number of operators, over all seeds: the 95% interval as a bar, and single seeds as points.

    Variants stand a little aside of each other, because many are right on everything.
    """
    frame = scores(runs)
    variants = dict(_by_variant(frame, kind))
    for place, (variant, own) in enumerate(variants.items()):
        shade, aside = pages.color(EXPERIMENT, variant), place - (len(variants) - 1) / 2
        tallies = {ops: Tally.of(part, "step_accuracy") for ops, part in own.groupby("ops")}
        x = [ops * 1.015**aside if kind == "long" else ops + 0.1 * aside for ops in tallies]
        axes.plot(x, [100 * tally.share for tally in tallies.values()], color=shade, marker=".", linewidth=1, label=variant)
        low, high = ([100 * tally.interval[side] for tally in tallies.values()] for side in (0, 1))
        axes.vlines(x, low, high, color=shade, linewidth=1, alpha=0.5)
        at, share = zip(*((at, 100 * share) for at, tally in zip(x, tallies.values()) for share in tally.by_seed))
        axes.scatter(at, share, s=6, color=shade, alpha=0.5)
    axes.set(ylabel="all steps right, %")
    if kind == "long":
        axes.set(ylim=(-3, 103))
        _mark_lengths(axes, frame[frame["kind"] == kind]["ops"])
    else:
        axes.set(xlabel="operators")
        axes.locator_params(axis="x", integer=True)


def _mark_lengths(axes: Axes, lengths: Iterable[int]) -> None:
    """Make the x axis logarithmic, marked at these numbers of operators."""
    axes.set(xlabel="operators", xscale="log")
    axes.set_xticks(ticks := sorted(set(lengths)), [str(ops) for ops in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _plot_speed(axes: Axes, runs: Sequence[Run]) -> None:
    speeds = _speeds(scores(runs))
    for variant, own in speeds.groupby("variant", sort=False):
        lengths, shade = own.index.get_level_values("ops"), pages.color(EXPERIMENT, str(variant))
        axes.plot(lengths, own["right"], marker="o", color=shade, label=variant)
        axes.plot(lengths, own["answers"], linestyle=":", color=shade, label=f"{variant}, wrong answers too")
    for ops, (ratio, _) in _ratios(speeds).items():
        place = (ops, speeds.loc[("span", ops), "right"])
        axes.annotate(f"{ratio:.1f}x", place, textcoords="offset points", xytext=(0, 6), ha="center")
    axes.margins(y=0.12)
    axes.set(ylabel="answers per second, best batch", yscale="log")
    _mark_lengths(axes, speeds.index.get_level_values("ops"))


PLOTS = {
    "accuracy": Plot("all steps right inside the training range", "range", functools.partial(_plot_accuracy, kind="range")),
    "length": Plot("all steps right against the number of operators", "long", functools.partial(_plot_accuracy, kind="long")),
    "speed": Plot("right answers per second against the number of operators", "speed", _plot_speed),
}


def sections(runs: Sequence[Run], plots: dict[str, str]) -> dict[str, str]:
    """Write the sections of the page beside those that every report has."""
    frame = scores(runs)
    return {
        "targets": targets(frame),
        "range": range_table(frame) + plots["accuracy"],
        "long": long_table(frame) + plots["length"],
        "errors": errors_table(frame),
        "speed": speed_table(frame) + plots["speed"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    pages.run_command(pages.report(EXPERIMENT, PLOTS, sections), argv)


if __name__ == "__main__":
    main()
