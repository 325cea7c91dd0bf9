"""The report of the arithmetic experiments: stored results in, tables of a page and plots out.

    python -m experiments.arithmetic docs/arithmetic

`--take DIR` first adds, reduced to what is used here, what train.py and decode.py eval left in DIR under the names of
`experiments` (there metrics.jsonl is the curve).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from experiments.results import Arm, Experiment, Plot, Tally, Trial, by_arm, picked, table, targets_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CORPUS = {
    **{"min_ops": 2, "max_ops": 22, "uniform_weight": 0.6, "balanced_weight": 0.2, "left_comb_weight": 0.2},
    **{"max_digits": 2, "negative_fraction": 0.1, "max_value": 999},
    **{"labelling": "tree", "num_labels": 512, "label_jumps": 3, "jumps_at": "leaves", "names_first_step": True},
}
_TUNING_CORPUS = _CORPUS | {"num_labels": 64, "label_jumps": 0, "jumps_at": "any"}
_CONSECUTIVE = "--label-jumps 0"  # the labels of an example follow one another
_SMALL = functools.partial(Arm, preset="arithmetic-small", corpus=_CORPUS)
_BASE = f"--batch-size 128 --steps 2000 {_CONSECUTIVE}"  # a sixth of the preset's tokens: what four arms of this size could be given
_TUNED = "--init SmolLM2-135M-Instruct.Q4_1.gguf --corpus arithmetic"
ARMS = {
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
        f"base{name}": Arm(f"{words}, 114M parameters", "arithmetic-base", _CORPUS, f"{_BASE} {options}".strip())
        for name, words, options in (
            ("", "as span", ""),
            ("_dense", "as dense", "--mask dense"),
            ("_plain", "as plain", "--mask dense --labelling plain"),
            ("_untagged", "as untagged", "--labelling none --header-view all"),
        )
    },
    "smollm2": Arm("SmolLM2-135M, LoRA, span mask", "finetune-lora", _TUNING_CORPUS, _TUNED),
    "smollm2_dense": Arm("SmolLM2-135M, LoRA, dense mask", "finetune-lora", _TUNING_CORPUS, f"{_TUNED} --mask dense"),
}
_SCORES = ("num_examples", "answer_accuracy", "step_accuracy", "span_accuracy", "attended_tokens", "attended_fraction", "first_errors")


def reduced_evaluation(values: Any, where: str) -> dict[str, Any]:
    """Of what `decode.py eval --json` wrote: the scores by number of operators, the speed at each batch size, and what decides them."""
    kept = picked(values, ("seed", "attention", "device", "jax", "num_parameters", "by_ops", "sets"), where)
    speeds = ("batch_size", "problems_per_second", "decode_seconds")
    sets = {name: picked(own, ("context_tokens", "by_batch_size"), where) for name, own in kept["sets"].items()}
    for own in sets.values():
        own["by_batch_size"] = [picked(speed, speeds, where) for speed in own["by_batch_size"]]
    return kept | {"by_ops": {name: picked(row, _SCORES, where) for name, row in kept["by_ops"].items()}, "sets": sets}


def evaluation_options(evaluation: dict[str, Any]) -> str:
    names = list(evaluation["sets"])
    total = sum(row["num_examples"] for row in evaluation["by_ops"].values())
    low, _, high = names[0].partition("-")
    which = f"--min-ops {low} --max-ops {high}" if high else f"--ops {','.join(names)}"
    batches = ",".join(str(speed["batch_size"]) for speed in evaluation["sets"][names[0]]["by_batch_size"])
    return f"--num-examples {total // len(names)} {which} --batch-size {batches}"


EXPERIMENT = Experiment(
    arms=ARMS,
    kinds={
        "range": "accuracy inside the training range",
        "long": "length generalization",
        "speed": "right answers per second",
    },
    reduced_evaluation=reduced_evaluation,
    evaluation_options=evaluation_options,
    panels={
        "26M parameters": [arm for arm, own in ARMS.items() if own.preset == "arithmetic-small"],
        "114M parameters, SmolLM2-135M": [arm for arm, own in ARMS.items() if own.preset != "arithmetic-small"],
    },
)
_GROUPS = ((2, 8), (9, 15), (16, 22))


def _rows(evaluation: dict[str, Any], ops: Sequence[int] | None = None) -> list[dict[str, Any]]:
    return [row for name, row in evaluation["by_ops"].items() if ops is None or int(name) in ops]


def _lengths(trials: Sequence[Trial], kind: str) -> list[int]:
    """Numbers of operators that all of the trials were evaluated at."""
    return sorted(set.intersection(*({int(name) for name in trial.evaluations[kind]["by_ops"]} for trial in trials)))


def _tally(trials: Sequence[Trial], kind: str, accuracy: str, ops: Sequence[int] | None = None) -> Tally:
    """Of an evaluation of several seeds, of some numbers of operators or of all."""
    found = [_rows(trial.evaluations[kind], ops) for trial in trials]
    return Tally.of(
        [(sum(round(row[accuracy] * row["num_examples"]) for row in rows), sum(row["num_examples"] for row in rows)) for rows in found]
    )


def range_table(trials: Sequence[Trial]) -> str:
    rows = []
    for arm, own in by_arm(trials, "range").items():
        lengths = _lengths(own, "range")
        groups = [[n for n in lengths if low <= n <= high] for low, high in _GROUPS]
        for ops in [*(group for group in groups if group and group != lengths), lengths]:
            tallies = [str(_tally(own, "range", name, ops)) for name in ("answer_accuracy", "step_accuracy", "span_accuracy")]
            tokens = mean([mean([row["attended_tokens"] for row in _rows(trial.evaluations["range"], ops)]) for trial in own])
            rows.append((f"`{arm}`", f"{ops[0]}-{ops[-1]}", *tallies, f"{tokens:.1f}"))
    return table(("arm", "operators", "answers", "all steps", "all spans minimal", "tokens attended, mean over lengths"), rows)


def long_table(trials: Sequence[Trial]) -> str:
    rows = []
    for arm, own in by_arm(trials, "long").items():
        for ops in _lengths(own, "long"):
            tallies = [str(_tally(own, "long", name, [ops])) for name in ("answer_accuracy", "step_accuracy", "span_accuracy")]
            scores = [row for trial in own for row in _rows(trial.evaluations["long"], [ops])]
            context = mean([trial.evaluations["long"]["sets"][str(ops)]["context_tokens"] for trial in own])
            tokens, fraction = (mean([row[key] for row in scores]) for key in ("attended_tokens", "attended_fraction"))
            attended = f"{tokens:.1f} ({fraction:.1%})"
            rows.append((f"`{arm}`", str(ops), f"{context:,.0f}", *tallies, attended))
    head = ("arm", "operators", "tokens of context", "answers", "all steps", "all spans minimal", "tokens attended")
    return table(head, rows)


def errors_table(trials: Sequence[Trial]) -> str:
    """What went wrong first, by arm and number of operators, of all seeds; rows without an error are left out."""
    kinds = ("first label", "next label", "refs", "body", "eos")
    rows = []
    for kind in ("range", "long"):
        for arm, own in by_arm(trials, kind).items():
            lengths = _lengths(own, kind)
            for ops in [lengths] if kind == "range" else [[n] for n in lengths]:
                found = [row for trial in own for row in _rows(trial.evaluations[kind], ops)]
                errors: collections.Counter[str] = collections.Counter()
                for row in found:
                    errors.update(row["first_errors"])
                if errors:
                    name = f"{ops[0]}-{ops[-1]}" if len(ops) > 1 else str(ops[0])
                    total = f"{sum(row['num_examples'] for row in found):,}"
                    rows.append((f"`{arm}`", name, total, *(str(errors[error]) for error in kinds)))
    if not rows and any({"range", "long"} & trial.evaluations.keys() for trial in trials):
        return "No errors, in what was run."
    return table(("arm", "operators", "examples", *kinds), rows)


def _best(trials: Sequence[Trial], ops: int) -> tuple[float, int]:
    """Right answers per second at the batch that is best for it, the mean over seeds, and that batch of the first seed."""
    speeds = [max(t.evaluations["speed"]["sets"][str(ops)]["by_batch_size"], key=lambda s: s["problems_per_second"]) for t in trials]
    return mean([speed["problems_per_second"] for speed in speeds]), speeds[0]["batch_size"]


def _answers(trials: Sequence[Trial], ops: int) -> float:
    """Answers per second, right or wrong, at the batch that gives the most, the mean over seeds."""
    own = [trial.evaluations["speed"] for trial in trials]
    fewest = [min(speed["decode_seconds"] for speed in one["sets"][str(ops)]["by_batch_size"]) for one in own]
    return mean([one["by_ops"][str(ops)]["num_examples"] / seconds for one, seconds in zip(own, fewest)])


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Right answers per second of span over those of the control that was trained at these lengths."""

    measured: float
    were_all_right: float
    """Over all answers of the control, right or wrong: what is left where the control is slow, and not just wrong."""

    def __str__(self) -> str:
        return f"{self.measured:.2f}x ({self.were_all_right:.2f}x)"


def _ratios(trials: Sequence[Trial]) -> dict[int, Ratio]:
    """By number of operators."""
    arms = by_arm(trials, "speed")
    if not {"span", "long"} <= arms.keys():
        return {}
    ratios = {}
    for ops in _lengths([*arms["span"], *arms["long"]], "speed"):
        span, long = _best(arms["span"], ops)[0], _best(arms["long"], ops)[0]
        ratios[ops] = Ratio(span / long if long else math.inf, span / _answers(arms["long"], ops))
    return ratios


def speed_table(trials: Sequence[Trial]) -> str:
    arms, ratios, rows = by_arm(trials, "speed"), _ratios(trials), []
    for arm, own in arms.items():
        for ops in _lengths(own, "speed"):
            rate, batch = _best(own, ops)
            sets = [trial.evaluations["speed"]["sets"][str(ops)] for trial in own]
            tried = ", ".join(str(speed["batch_size"]) for speed in sets[0]["by_batch_size"])
            ratio = str(ratios[ops]) if arm == "span" and ops in ratios else "-"
            cells = [
                f"{mean([one['context_tokens'] for one in sets]):,.0f}",
                str(_tally(own, "speed", "answer_accuracy", [ops])),
            ]
            rows.append((f"`{arm}`", str(ops), *cells, f"{rate:,.1f}", f"{_answers(own, ops):,.1f}", f"{batch} of {tried}", ratio))
    head = ("arm", "operators", "tokens of context", "answers", "right answers/s", "answers/s", "best batch of those tried")
    return table((*head, "over `long` (were all its answers right)"), rows)


def targets(trials: Sequence[Trial]) -> str:
    arms, long_arms, ratios = by_arm(trials, "range"), by_arm(trials, "long"), _ratios(trials)

    def inside(arm: str) -> tuple[bool, str] | None:
        if arm not in arms:
            return None
        tally = _tally(arms[arm], "range", "step_accuracy")
        return tally.share >= 0.995, str(tally)

    def against(*pair: str) -> tuple[bool, str] | None:
        if not {*pair} <= arms.keys():
            return None
        span, dense = (_tally(arms[arm], "range", "step_accuracy") for arm in pair)
        return span.share >= dense.share - max(span.spread, dense.spread), f"{span} against {dense}"

    def at_200(arm: str) -> tuple[bool, str] | None:
        if arm not in long_arms or 200 not in _lengths(long_arms[arm], "long"):
            return None
        tally = _tally(long_arms[arm], "long", "step_accuracy", [200])
        return tally.share >= 0.95, str(tally)

    def speed() -> tuple[bool, str] | None:
        if 200 not in ratios:
            return None
        found = f"{ratios[200].measured:.2f}x; {ratios[200].were_all_right:.2f}x were all of the control's answers right"
        return ratios[200].measured >= 3, found

    return targets_table(
        [
            ("leaf_jumps, 2-22 operators: all steps right on 99.5%", inside("leaf_jumps")),
            ("span, 2-22 operators: all steps right on 99.5%", inside("span")),
            ("span not below its dense control by more than the seeds' spread", against("span", "dense")),
            ("base, 2-22 operators: all steps right on 99.5%", inside("base")),
            ("base not below its dense control", against("base", "base_dense")),
            *((f"{arm}, 200 operators, trained on 22 at most: 95% right", at_200(arm)) for arm in ("leaf_jumps", "span", "jumps", "base")),
            ("right answers per second at 200 operators: 3x the control trained there", speed()),
        ]
    )


def _plot_accuracy(axes: Axes, trials: Sequence[Trial], kind: str) -> None:
    """All steps right by number of operators, of all seeds: the 95% interval as a bar, and single seeds as points.

    Arms stand a little aside of each other, for many are right on everything.
    """
    arms = by_arm(trials, kind)
    for place, (arm, own) in enumerate(arms.items()):
        lengths, color, aside = _lengths(own, kind), EXPERIMENT.color(arm), place - (len(arms) - 1) / 2
        x = [ops * 1.015**aside if kind == "long" else ops + 0.1 * aside for ops in lengths]
        tallies = [_tally(own, kind, "step_accuracy", [ops]) for ops in lengths]
        axes.plot(x, [100 * tally.share for tally in tallies], color=color, marker=".", linewidth=1, label=arm)
        low, high = ([100 * tally.interval[side] for tally in tallies] for side in (0, 1))
        axes.vlines(x, low, high, color=color, linewidth=1, alpha=0.5)
        points = [(at, 100 * share) for at, tally in zip(x, tallies) for share in tally.by_seed]
        axes.scatter([at for at, _ in points], [share for _, share in points], s=6, color=color, alpha=0.5)
    axes.set(ylabel="all steps right, %")
    if kind == "long":
        axes.set(ylim=(-3, 103))
        _by_length(axes, arms, kind)
    else:
        axes.set(xlabel="operators")
        axes.locator_params(axis="x", integer=True)


def _by_length(axes: Axes, arms: dict[str, list[Trial]], kind: str) -> None:
    """A logarithmic axis of operators, marked at the lengths that there are."""
    from matplotlib.ticker import NullLocator

    lengths = sorted({ops for own in arms.values() for ops in _lengths(own, kind)})
    axes.set(xlabel="operators", xscale="log")
    axes.set_xticks(lengths, [str(ops) for ops in lengths])
    axes.xaxis.set_minor_locator(NullLocator())


def _plot_speed(axes: Axes, trials: Sequence[Trial]) -> None:
    arms, ratios = by_arm(trials, "speed"), _ratios(trials)
    for arm, own in arms.items():
        lengths, color = _lengths(own, "speed"), EXPERIMENT.color(arm)
        axes.plot(lengths, [_best(own, ops)[0] for ops in lengths], marker="o", color=color, label=arm)
        axes.plot(lengths, [_answers(own, ops) for ops in lengths], linestyle=":", color=color, label=f"{arm}, wrong answers too")
    for ops, ratio in ratios.items():
        axes.annotate(f"{ratio.measured:.1f}x", (ops, _best(arms["span"], ops)[0]), textcoords="offset points", xytext=(0, 6), ha="center")
    axes.margins(y=0.12)
    axes.set(ylabel="answers per second, best batch", yscale="log")
    _by_length(axes, arms, "speed")


def _of(kind: str, words: str, draw: Callable[..., None]) -> Plot:
    """A plot of the trials that have such an evaluation."""
    return Plot(words, lambda trial: kind in trial.evaluations, draw)


PLOTS = {
    "accuracy": _of("range", "all steps right inside the training range", functools.partial(_plot_accuracy, kind="range")),
    "length": _of("long", "all steps right against the number of operators", functools.partial(_plot_accuracy, kind="long")),
    "speed": _of("speed", "right answers per second against the number of operators", _plot_speed),
}


def sections(trials: Sequence[Trial], plots: dict[str, str]) -> dict[str, str]:
    """What stands between the page's markers, beside what every report has."""
    return {
        "targets": targets(trials),
        "range": range_table(trials) + plots["accuracy"],
        "long": long_table(trials) + plots["length"],
        "errors": errors_table(trials),
        "speed": speed_table(trials) + plots["speed"],
    }


def main(arguments: list[str] | None = None) -> int:
    return EXPERIMENT.main("experiments.arithmetic", (__doc__ or "").split("\n")[0], PLOTS, sections, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
