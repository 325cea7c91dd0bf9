"""The report of the arithmetic experiments: stored results in, tables of a page and plots out.

    python -m selfspan_jax.arithmetic_report docs/arithmetic

Of the page beside the results directory (docs/arithmetic.md) what stands between `<!-- NAME -->` and `<!-- end -->` is written anew.
`--take DIR` first adds, reduced to what is used here, what train.py and decode.py eval left in DIR under the names of
`arithmetic_results` (there metrics.jsonl is the curve). What was not run is not made up: the page says so.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from selfspan_jax.arithmetic_results import ARMS, EVALUATIONS, Tally, Trial, digest, load, take

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GROUPS = ((2, 8), (9, 15), (16, 22))


def _with(trials: Sequence[Trial], kind: str) -> dict[str, list[Trial]]:
    """The trials that have an evaluation, by arm."""
    arms = {arm: [trial for trial in trials if trial.arm == arm and kind in trial.evaluations] for arm in ARMS}
    return {arm: own for arm, own in arms.items() if own}


def _rows(evaluation: dict[str, Any], ops: Sequence[int] | None = None) -> list[dict[str, Any]]:
    return [row for name, row in evaluation["by_ops"].items() if ops is None or int(name) in ops]


def _lengths(trials: Sequence[Trial], kind: str) -> list[int]:
    """Numbers of operators that all of the trials were evaluated at."""
    return sorted(set.intersection(*({int(name) for name in trial.evaluations[kind]["by_ops"]} for trial in trials)))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def arms_table(trials: Sequence[Trial]) -> str:
    seeds = {arm: ", ".join(str(trial.seed) for trial in trials if trial.arm == arm) or "not run" for arm in ARMS}
    rows = [(f"`{arm}`", own.words, f"`{f'{own.preset} {own.options}'.strip()}`", seeds[arm]) for arm, own in ARMS.items()]
    return _table(("arm", "what it is", "`python train.py`", "seeds"), rows)


def training_table(trials: Sequence[Trial]) -> str:
    rows = []
    for trial in trials:
        settings, curve = trial.run["training"], trial.curve
        done = f"{settings['steps']:,}"
        if curve and curve["step"][-1] != settings["steps"]:
            done = f"{curve['step'][-1]:,} of {done}"
        cells = ["-"] * 5
        if curve:
            share = curve["bf16_peak_fraction"]
            cells = [f"{curve['seconds']:,.0f}", f"{round(curve['tokens_per_second'], -3):,.0f}", "-" if share is None else f"{share:.1%}"]
            cells += [f"{curve['input_wait_fraction']:.1%}", f"{curve['loss'][-1]:.2g}"]
        rows.append((f"`{trial.arm}`", str(trial.seed), f"{done} x {settings['batch_size']} x {settings['sequence_tokens']}", *cells))
    return _table(("arm", "seed", "steps x rows x tokens", "seconds", "tokens/s", "of the bf16 peak", "input wait", "last loss"), rows)


def range_table(trials: Sequence[Trial]) -> str:
    rows = []
    for arm, own in _with(trials, "range").items():
        lengths = _lengths(own, "range")
        groups = [[n for n in lengths if low <= n <= high] for low, high in _GROUPS]
        for ops in [*(group for group in groups if group and group != lengths), lengths]:
            tallies = [str(Tally.of(own, "range", name, ops)) for name in ("answer_accuracy", "step_accuracy", "span_accuracy")]
            tokens = mean([mean([row["attended_tokens"] for row in _rows(trial.evaluations["range"], ops)]) for trial in own])
            rows.append((f"`{arm}`", f"{ops[0]}-{ops[-1]}", *tallies, f"{tokens:.1f}"))
    return (
        _table(("arm", "operators", "answers", "all steps", "all spans minimal", "tokens attended, mean over lengths"), rows)
        if rows
        else "Not run."
    )


def long_table(trials: Sequence[Trial]) -> str:
    rows = []
    for arm, own in _with(trials, "long").items():
        for ops in _lengths(own, "long"):
            tallies = [str(Tally.of(own, "long", name, [ops])) for name in ("answer_accuracy", "step_accuracy", "span_accuracy")]
            scores = [row for trial in own for row in _rows(trial.evaluations["long"], [ops])]
            context = mean([trial.evaluations["long"]["sets"][str(ops)]["context_tokens"] for trial in own])
            tokens, fraction = (mean([row[key] for row in scores]) for key in ("attended_tokens", "attended_fraction"))
            attended = f"{tokens:.1f} ({fraction:.1%})"
            rows.append((f"`{arm}`", str(ops), f"{context:,.0f}", *tallies, attended))
    head = ("arm", "operators", "tokens of context", "answers", "all steps", "all spans minimal", "tokens attended")
    return _table(head, rows) if rows else "Not run."


def errors_table(trials: Sequence[Trial]) -> str:
    """What went wrong first, by arm and number of operators, of all seeds; rows without an error are left out."""
    kinds = ("first label", "next label", "refs", "body", "eos")
    rows = []
    for kind in ("range", "long"):
        for arm, own in _with(trials, kind).items():
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
    return _table(("arm", "operators", "examples", *kinds), rows) if rows else "No errors, in what was run."


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
    arms = _with(trials, "speed")
    if not {"span", "long"} <= arms.keys():
        return {}
    ratios = {}
    for ops in _lengths([*arms["span"], *arms["long"]], "speed"):
        span, long = _best(arms["span"], ops)[0], _best(arms["long"], ops)[0]
        ratios[ops] = Ratio(span / long if long else math.inf, span / _answers(arms["long"], ops))
    return ratios


def speed_table(trials: Sequence[Trial]) -> str:
    arms, ratios, rows = _with(trials, "speed"), _ratios(trials), []
    for arm, own in arms.items():
        for ops in _lengths(own, "speed"):
            rate, batch = _best(own, ops)
            sets = [trial.evaluations["speed"]["sets"][str(ops)] for trial in own]
            tried = ", ".join(str(speed["batch_size"]) for speed in sets[0]["by_batch_size"])
            ratio = str(ratios[ops]) if arm == "span" and ops in ratios else "-"
            cells = [
                f"{mean([one['context_tokens'] for one in sets]):,.0f}",
                str(Tally.of(own, "speed", "answer_accuracy", [ops])),
            ]
            rows.append((f"`{arm}`", str(ops), *cells, f"{rate:,.1f}", f"{_answers(own, ops):,.1f}", f"{batch} of {tried}", ratio))
    head = ("arm", "operators", "tokens of context", "answers", "right answers/s", "answers/s", "best batch of those tried")
    return _table((*head, "over `long` (were all its answers right)"), rows) if rows else "Not run."


def targets_table(trials: Sequence[Trial]) -> str:
    arms, long_arms = _with(trials, "range"), _with(trials, "long")

    def inside(arm: str) -> tuple[bool, str]:
        tally = Tally.of(arms[arm], "range", "step_accuracy")
        return tally.share >= 0.995, str(tally)

    def against(*pair: str) -> tuple[bool, str]:
        span, dense = (Tally.of(arms[arm], "range", "step_accuracy") for arm in pair)
        return span.share >= dense.share - max(span.spread, dense.spread), f"{span} against {dense}"

    def at_200() -> tuple[bool, str]:
        tally = Tally.of(long_arms["span"], "long", "step_accuracy", [200])
        return tally.share >= 0.95, str(tally)

    def speed() -> tuple[bool, str]:
        ratio = _ratios(trials)[200]
        return ratio.measured >= 3, f"{ratio.measured:.2f}x; {ratio.were_all_right:.2f}x were all of the control's answers right"

    has_200 = "span" in long_arms and 200 in _lengths(long_arms["span"], "long")
    targets: list[tuple[str, bool, Callable[[], tuple[bool, str]]]] = [
        ("span, 2-22 operators: all steps right on 99.5%", "span" in arms, functools.partial(inside, "span")),
        (
            "not below the dense control by more than the seeds' spread",
            {"span", "dense"} <= arms.keys(),
            functools.partial(against, "span", "dense"),
        ),
        ("base, 2-22 operators: all steps right on 99.5%", "base" in arms, functools.partial(inside, "base")),
        ("base not below its dense control", {"base", "base_dense"} <= arms.keys(), functools.partial(against, "base", "base_dense")),
        ("span, 200 operators, trained on 22 at most: 95% right", has_200, at_200),
        ("right answers per second at 200 operators: 3x the control trained there", 200 in _ratios(trials), speed),
    ]
    rows = []
    for name, known, judge in targets:
        reached, found = judge() if known else (False, "")
        rows.append((name, ("yes: " if reached else "**no**: ") + found if known else "not run"))
    return _table(("target", "reached"), rows)


def not_run(trials: Sequence[Trial]) -> str:
    lines = [f"- `{arm}` ({own.words}): not trained" for arm, own in ARMS.items() if arm not in {trial.arm for trial in trials}]
    for trial in trials:
        missing = [EVALUATIONS[kind] for kind in EVALUATIONS if kind not in trial.evaluations]
        if missing:
            lines.append(f"- `{trial.arm}`, seed {trial.seed}: {', '.join(missing)}")
    return "\n".join(lines) or "Nothing: all arms were trained and evaluated."


def commands(trials: Sequence[Trial]) -> str:
    lines = []
    for trial in trials:
        machine = next((f"one {e['device']}, JAX {e['jax']}" for e in trial.evaluations.values()), "machine not recorded")
        lines += [f"# {trial.arm}, seed {trial.seed}: {machine}, commit {trial.run['commit']}", trial.command]
        for kind, evaluation in trial.evaluations.items():
            other = "" if evaluation["commit"] == trial.run["commit"] else f"  # commit {evaluation['commit']}"
            lines.append(trial.evaluation_command(kind) + other)
    return "\n".join(["```", *lines, "```"])


def _plot_accuracy(axes: Axes, trials: Sequence[Trial], kind: str) -> bool:
    """All steps right by number of operators, of all seeds: the 95% interval as a bar, and single seeds as points."""
    arms = _with(trials, kind)
    for arm, own in arms.items():
        lengths, color = _lengths(own, kind), f"C{list(ARMS).index(arm)}"
        tallies = [Tally.of(own, kind, "step_accuracy", [ops]) for ops in lengths]
        axes.plot(lengths, [100 * tally.share for tally in tallies], color=color, marker=".", linewidth=1, label=arm)
        low, high = ([100 * tally.interval[side] for tally in tallies] for side in (0, 1))
        axes.vlines(lengths, low, high, color=color, linewidth=1, alpha=0.5)
        points = [(ops, 100 * share) for ops, tally in zip(lengths, tallies) for share in tally.by_seed]
        axes.scatter([x for x, _ in points], [y for _, y in points], s=6, color=color, alpha=0.5)
    axes.set(ylabel="all steps right, %")
    if kind == "long" and arms:
        axes.set(ylim=(-3, 103))
        _by_length(axes, arms, kind)
    else:
        axes.set(xlabel="operators")
        axes.locator_params(axis="x", integer=True)
    return bool(arms)


def _by_length(axes: Axes, arms: dict[str, list[Trial]], kind: str) -> None:
    """A logarithmic axis of operators, marked at the lengths that there are."""
    from matplotlib.ticker import NullLocator

    lengths = sorted({ops for own in arms.values() for ops in _lengths(own, kind)})
    axes.set(xlabel="operators", xscale="log")
    axes.set_xticks(lengths, [str(ops) for ops in lengths])
    axes.xaxis.set_minor_locator(NullLocator())


def _plot_loss(axes: Axes, trials: Sequence[Trial]) -> bool:
    drawn = [trial for trial in trials if trial.curve]
    for trial in drawn:
        assert trial.curve
        color = f"C{list(ARMS).index(trial.arm)}"
        axes.plot(trial.curve["step"], trial.curve["loss"], color=color, linewidth=1, label=f"{trial.arm}, seed {trial.seed}")
    axes.set(xlabel="step", ylabel="loss of a response token, nats", yscale="log")
    return bool(drawn)


def _plot_speed(axes: Axes, trials: Sequence[Trial]) -> bool:
    arms, ratios = _with(trials, "speed"), _ratios(trials)
    for arm, own in arms.items():
        lengths, color = _lengths(own, "speed"), f"C{list(ARMS).index(arm)}"
        axes.plot(lengths, [_best(own, ops)[0] for ops in lengths], marker="o", color=color, label=arm)
        axes.plot(lengths, [_answers(own, ops) for ops in lengths], linestyle=":", color=color, label=f"{arm}, wrong answers too")
    for ops, ratio in ratios.items():
        axes.annotate(f"{ratio.measured:.1f}x", (ops, _best(arms["span"], ops)[0]), textcoords="offset points", xytext=(0, 6), ha="center")
    axes.margins(y=0.12)
    axes.set(ylabel="answers per second, best batch", yscale="log")
    if arms:
        _by_length(axes, arms, "speed")
    return bool(arms)


PLOTS: dict[str, tuple[str, Callable[[Axes, Sequence[Trial]], bool]]] = {
    "accuracy": (
        "all steps right inside the training range",
        lambda axes, trials: _plot_accuracy(axes, trials, "range"),
    ),
    "length": ("all steps right against the number of operators", lambda axes, trials: _plot_accuracy(axes, trials, "long")),
    "speed": ("right answers per second against the number of operators", _plot_speed),
    "loss": ("loss against steps", _plot_loss),
}


def draw(trials: Sequence[Trial], results: Path) -> dict[str, str]:
    """Draws what there is into the results directory; returns the page's line for each plot, empty where there is nothing to draw."""
    from matplotlib.figure import Figure

    lines = {}
    for name, (words, plot) in PLOTS.items():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        lines[name] = ""
        if plot(axes, trials):
            axes.legend(fontsize=7)
            axes.grid(alpha=0.3)
            figure.savefig(results / f"{name}.png", dpi=100, metadata={"Description": digest(results)})
            lines[name] = f"\n\n![{words}]({results.name}/{name}.png)"
        else:
            (results / f"{name}.png").unlink(missing_ok=True)
    return lines


def sections(trials: Sequence[Trial], plots: dict[str, str]) -> dict[str, str]:
    """What stands between the page's markers."""
    return {
        "arms": arms_table(trials),
        "targets": targets_table(trials),
        "range": range_table(trials) + plots["accuracy"],
        "long": long_table(trials) + plots["length"],
        "errors": errors_table(trials),
        "speed": speed_table(trials) + plots["speed"],
        "training": training_table(trials) + plots["loss"],
        "not run": not_run(trials),
        "commands": commands(trials),
    }


def filled(page: str, sections: dict[str, str]) -> str:
    """The page with its sections written anew. Raises ValueError for a page that lacks one."""
    for name, text in sections.items():
        begin = f"<!-- {name} -->\n"
        before, _, rest = page.partition(begin)
        _, end, after = rest.partition("<!-- end -->")
        if not end or begin in rest:
            raise ValueError(f"the page has not just one `<!-- {name} -->` line with an `<!-- end -->` line after it")
        page = f"{before}{begin}\n{text}\n\n{end}{after}"
    return page


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m selfspan_jax.arithmetic_report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, help="directory of results; the page is the .md file of the same name beside it")
    parser.add_argument("--take", type=Path, help="first add the results of this directory, reduced")
    parser.add_argument("--commit", help="with --take: the commit that made them")
    args = parser.parse_args(arguments)
    page = args.results.with_name(f"{args.results.name}.md")
    try:
        if bool(args.take) != bool(args.commit):
            raise ValueError("--take and --commit belong together")
        if not page.is_file():
            raise ValueError(f"{page}: no such page")
        if args.take:
            print("added: " + ", ".join(take(args.take, args.results, args.commit)))
        trials = load(args.results)
        page.write_text(filled(page.read_text(encoding="utf-8"), sections(trials, draw(trials, args.results))), encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{page}: {len(trials)} runs of {len({trial.arm for trial in trials})} arms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
