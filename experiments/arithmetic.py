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
from experiments.pages import Plot, Tally, markdown_table, targets_table
from experiments.results import Run
from experiments.variants import Experiment, Variant

_CONSECUTIVE = "--label-jumps 0"  # the labels of an example follow one another
_SMALL = functools.partial(Variant, preset="arithmetic-small")
_BASE = f"--batch-size 128 --steps 2000 {_CONSECUTIVE}"  # a sixth of the preset's tokens: the budget of four variants of this size
_TUNED = "--init SmolLM2-135M-Instruct.Q4_1.gguf --corpus arithmetic"
VARIANTS = {
    "leaf_jumps": _SMALL("the preset: labels jump before steps that name nothing"),
    "span": _SMALL("span tokens and span mask, consecutive labels", options=_CONSECUTIVE),
    "jumps": _SMALL("labels jump anywhere", options="--label-jumps 3 --jumps-at any"),
    "jumps_10k": _SMALL("the same, twice the steps", options="--label-jumps 3 --jumps-at any --steps 10000"),
    "dense": _SMALL("the text of span, dense mask", options=f"--mask dense {_CONSECUTIVE}"),
    "plain": _SMALL("text without span tokens, dense mask", options=f"--mask dense --labelling plain {_CONSECUTIVE}"),
    "untagged": _SMALL("untagged prompt, headers see all", options=f"--labelling none --header-view all {_CONSECUTIVE}"),
    "long": _SMALL(
        "as plain, trained on 2-200 operators",
        options=f"--mask dense --labelling plain --max-ops 200 --sequence-tokens 4096 --batch-size 16 --gap-scales 0 {_CONSECUTIVE}",
    ),
    **{
        f"base{name}": Variant(f"{words}, 114M parameters", "arithmetic-base", f"{_BASE} {options}".strip())
        for name, words, options in (
            ("", "as span", ""),
            ("_dense", "as dense", "--mask dense"),
            ("_plain", "as plain", "--mask dense --labelling plain"),
            ("_untagged", "as untagged", "--labelling none --header-view all"),
        )
    },
    "smollm2": Variant("SmolLM2-135M, LoRA, span mask", "finetune-lora", _TUNED),
    "smollm2_dense": Variant("SmolLM2-135M, LoRA, dense mask", "finetune-lora", f"{_TUNED} --mask dense"),
}
_ACCURACIES = {"answer_accuracy": "answers", "step_accuracy": "all steps", "span_accuracy": "all spans minimal"}
_SCORES = ("num_examples", *_ACCURACIES, "attended_tokens", "attended_fraction", "first_errors")
_SPEEDS = dict.fromkeys(("batch_size", "problems_per_second", "decode_seconds"))
EXPERIMENT = Experiment(
    variants=VARIANTS,
    evaluations={
        "range": "accuracy inside the training range",
        "long": "length generalization",
        "speed": "right answers per second",
    },
    evaluation_fields={
        **dict.fromkeys(("seed", "attention", "device", "jax", "num_parameters")),
        "by_ops": {"*": dict.fromkeys(_SCORES)},
        "sets": {"*": {"context_tokens": None, "by_batch_size": [_SPEEDS]}},
    },
    panels={
        "26M parameters": [name for name, own in VARIANTS.items() if own.preset == "arithmetic-small"],
        "114M parameters, SmolLM2-135M": [name for name, own in VARIANTS.items() if own.preset != "arithmetic-small"],
    },
)

# ----------------------------------------------------------------------------------------------------------------- frames


def scores(runs: Iterable[Run]) -> pd.DataFrame:
    """Collect the scores of all evaluations: a row for each run, kind of evaluation and number of operators."""
    rows = [
        {"variant": run.variant, "seed": run.seed, "kind": kind, "ops": int(ops), **row, **found["sets"].get(ops, {})}
        for run in runs
        for kind, found in run.evaluations.items()
        for ops, row in found["by_ops"].items()
    ]
    return pd.DataFrame(rows, columns=["variant", "seed", "kind", "ops", *_SCORES, "context_tokens", "by_batch_size"])


def _by_variant(frame: pd.DataFrame, kind: str) -> Iterator[tuple[str, pd.DataFrame, list[int]]]:
    """Yield each variant that has an evaluation, its rows, and the numbers of operators that all its seeds were evaluated at."""
    for variant, own in frame[frame["kind"] == kind].groupby("variant", sort=False):
        seeds = own.groupby("ops")["seed"].nunique()
        yield str(variant), own, sorted(seeds.index[seeds == own["seed"].nunique()])


def _at(frame: pd.DataFrame, ops: Sequence[int]) -> pd.DataFrame:
    return frame[frame["ops"].isin(ops)]


def _speeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Compute right answers and all answers per second, each seed at its best batch and then the mean over seeds.

    Returns: a row for each variant and number of operators, with the best batch of its first seed beside those tried.
    """
    rows = []
    for variant, own, lengths in _by_variant(frame, "speed"):
        for row in _at(own, lengths).itertuples():
            best = max(row.by_batch_size, key=lambda speed: speed["problems_per_second"])
            answers = row.num_examples / min(speed["decode_seconds"] for speed in row.by_batch_size)
            batch = f"{best['batch_size']} of {', '.join(str(speed['batch_size']) for speed in row.by_batch_size)}"
            rows.append((variant, row.ops, best["problems_per_second"], answers, row.context_tokens, batch))
    speeds = pd.DataFrame(rows, columns=["variant", "ops", "right", "answers", "context_tokens", "batch"])
    how = {"right": "mean", "answers": "mean", "context_tokens": "mean", "batch": "first"}
    return speeds.groupby(["variant", "ops"], sort=False).agg(how)


def _ratios(speeds: pd.DataFrame) -> dict[int, tuple[float, float]]:
    """Divide right answers per second of span by those of long, the control trained at these lengths, and by all answers of long.

    The second ratio is what is left where the control is slow, and not just wrong.
    """
    if not {"span", "long"} <= {*speeds.index.get_level_values("variant")}:
        return {}
    right, long = speeds.loc["span"]["right"], speeds.loc["long"]
    ratios = pd.concat([right / long["right"], right / long["answers"]], axis="columns").dropna()
    return {ops: (measured, if_all_right) for ops, measured, if_all_right in ratios.itertuples()}


# ----------------------------------------------------------------------------------------------------------------- tables


def range_table(frame: pd.DataFrame) -> str:
    rows = []
    for variant, own, lengths in _by_variant(frame, "range"):
        groups = [[n for n in lengths if low <= n <= high] for low, high in ((2, 8), (9, 15), (16, 22))]
        for ops in [*(group for group in groups if group and group != lengths), lengths]:
            part = _at(own, ops)
            tallies = [str(Tally.of(part, name)) for name in _ACCURACIES]
            tokens = part.groupby("seed")["attended_tokens"].mean().mean()
            rows.append((f"`{variant}`", f"{ops[0]}-{ops[-1]}", *tallies, f"{tokens:.1f}"))
    return markdown_table(("variant", "operators", *_ACCURACIES.values(), "tokens attended, mean over lengths"), rows)


def long_table(frame: pd.DataFrame) -> str:
    rows = []
    for variant, own, lengths in _by_variant(frame, "long"):
        for ops in lengths:
            part = _at(own, [ops])
            tallies = [str(Tally.of(part, name)) for name in _ACCURACIES]
            context, tokens, fraction = (part[key].mean() for key in ("context_tokens", "attended_tokens", "attended_fraction"))
            rows.append((f"`{variant}`", str(ops), f"{context:,.0f}", *tallies, f"{tokens:.1f} ({fraction:.1%})"))
    return markdown_table(("variant", "operators", "tokens of context", *_ACCURACIES.values(), "tokens attended"), rows)


def errors_table(frame: pd.DataFrame) -> str:
    """Count what went wrong first, over all seeds; variants and numbers of operators without an error are left out."""
    kinds = ("first label", "next label", "refs", "body", "eos")
    rows = []
    for kind in ("range", "long"):
        for variant, own, lengths in _by_variant(frame, kind):
            for ops in [lengths] if kind == "range" else [[n] for n in lengths]:
                part = _at(own, ops)
                errors: collections.Counter[str] = collections.Counter()
                for found in part["first_errors"]:
                    errors.update(found)
                if errors:
                    name = f"{ops[0]}-{ops[-1]}" if len(ops) > 1 else str(ops[0])
                    rows.append((f"`{variant}`", name, f"{part['num_examples'].sum():,}", *(str(errors[error]) for error in kinds)))
    if not rows and frame["kind"].isin(("range", "long")).any():
        return "No errors, in what was run."
    return markdown_table(("variant", "operators", "examples", *kinds), rows)


def speed_table(frame: pd.DataFrame) -> str:
    speeds, rows = _speeds(frame), []
    ratios = _ratios(speeds)
    for variant, own, lengths in _by_variant(frame, "speed"):
        for ops in lengths:
            speed, answers = speeds.loc[(variant, ops)], Tally.of(_at(own, [ops]), "answer_accuracy")
            ratio = "{:.2f}x ({:.2f}x)".format(*ratios[ops]) if variant == "span" and ops in ratios else "-"
            rates = (f"{speed['right']:,.1f}", f"{speed['answers']:,.1f}", speed["batch"], ratio)
            rows.append((f"`{variant}`", str(ops), f"{speed['context_tokens']:,.0f}", str(answers), *rates))
    head = ("variant", "operators", "tokens of context", "answers", "right answers/s", "answers/s", "best batch of those tried")
    return markdown_table((*head, "over `long` (were all its answers right)"), rows)


def targets(frame: pd.DataFrame) -> str:
    inside = {variant: Tally.of(own, "step_accuracy") for variant, own, _ in _by_variant(frame, "range")}
    at_200 = {name: Tally.of(_at(own, [200]), "step_accuracy") for name, own, lengths in _by_variant(frame, "long") if 200 in lengths}
    ratio = _ratios(_speeds(frame)).get(200)

    def reached(tallies: dict[str, Tally], name: str, share: float) -> tuple[bool, str] | None:
        return (tallies[name].share >= share, str(tallies[name])) if name in tallies else None

    def against(name: str, control: str) -> tuple[bool, str] | None:
        if not {name, control} <= inside.keys():
            return None
        span, dense = inside[name], inside[control]
        return span.share >= dense.share - max(span.spread, dense.spread), f"{span} against {dense}"

    def right(name: str) -> tuple[str, tuple[bool, str] | None]:
        return f"{name}, 2-22 operators: all steps right on 99.5%", reached(inside, name, 0.995)

    speed = None
    if ratio:
        speed = (ratio[0] >= 3, "{:.2f}x; {:.2f}x were all of the control's answers right".format(*ratio))
    return targets_table(
        [
            right("leaf_jumps"),
            right("span"),
            ("span not below its dense control by more than the seeds' spread", against("span", "dense")),
            right("base"),
            ("base not below its dense control", against("base", "base_dense")),
            *(
                (f"{name}, 200 operators, trained on 22 at most: 95% right", reached(at_200, name, 0.95))
                for name in ("leaf_jumps", "span", "jumps", "base")
            ),
            ("right answers per second at 200 operators: 3x the control trained there", speed),
        ]
    )


# ------------------------------------------------------------------------------------------------------------------ plots


def _plot_accuracy(axes: Axes, runs: Sequence[Run], kind: str) -> None:
    """Plot all steps right by number of operators, over all seeds: the 95% interval as a bar, and single seeds as points.

    Variants stand a little aside of each other, because many are right on everything.
    """
    variants = list(_by_variant(scores(runs), kind))
    for place, (variant, own, lengths) in enumerate(variants):
        shade, aside = pages.color(EXPERIMENT, variant), place - (len(variants) - 1) / 2
        x = [ops * 1.015**aside if kind == "long" else ops + 0.1 * aside for ops in lengths]
        tallies = [Tally.of(_at(own, [ops]), "step_accuracy") for ops in lengths]
        axes.plot(x, [100 * tally.share for tally in tallies], color=shade, marker=".", linewidth=1, label=variant)
        low, high = ([100 * tally.interval[side] for tally in tallies] for side in (0, 1))
        axes.vlines(x, low, high, color=shade, linewidth=1, alpha=0.5)
        points = [(at, 100 * share) for at, tally in zip(x, tallies) for share in tally.by_seed]
        axes.scatter([at for at, _ in points], [share for _, share in points], s=6, color=shade, alpha=0.5)
    axes.set(ylabel="all steps right, %")
    if kind == "long":
        axes.set(ylim=(-3, 103))
        _mark_lengths(axes, {ops for _, _, lengths in variants for ops in lengths})
    else:
        axes.set(xlabel="operators")
        axes.locator_params(axis="x", integer=True)


def _mark_lengths(axes: Axes, lengths: Iterable[int]) -> None:
    """Make the x axis logarithmic, marked at these numbers of operators."""
    axes.set(xlabel="operators", xscale="log")
    axes.set_xticks(sorted(lengths), [str(ops) for ops in sorted(lengths)])
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
    _mark_lengths(axes, set(speeds.index.get_level_values("ops")))


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


def main(arguments: Sequence[str] | None = None) -> int:
    return pages.main("experiments.arithmetic", EXPERIMENT, PLOTS, sections, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
