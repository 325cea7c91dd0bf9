"""The report of the arithmetic experiments: JSON of training runs and evaluations in, tables of a page and plots out.

    python -m selfspan_jax.arithmetic_report docs/arithmetic

A results directory holds, for each arm and seed, ARM-SEED.run.json and .curve.json of the training and .range.json, .long.json and
.speed.json of its evaluations. Of the page beside it (docs/arithmetic.md) what stands between `<!-- NAME -->` and `<!-- end -->`
is written anew. `--take DIR` first adds, reduced to what is used here, what train.py and decode.py eval left under these names
in DIR (there metrics.jsonl is the curve). What was not run is not made up: the page says so.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from selfspan_jax.config import PRESETS
from selfspan_jax.evaluation import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one model of the comparison is, and the command that trains it."""

    words: str
    preset: str = "arithmetic-small"
    options: str = ""


ARMS = {
    "span": Arm("span tokens and span mask"),
    "dense": Arm("the same text, dense mask", options="--mask dense"),
    "plain": Arm("text without span tokens, dense mask", options="--mask dense --labelling plain"),
    "untagged": Arm("untagged prompt, headers see all", options="--labelling none --header-view all"),
    "long": Arm(
        "as plain, trained on 2-200 operators",
        options="--mask dense --labelling plain --max-ops 200 --sequence-tokens 4096 --batch-size 16 --gap-scales 0",
    ),
    "base": Arm("span tokens and span mask, 114M parameters", preset="arithmetic-base"),
}
EVALUATIONS = {
    "range": "accuracy inside the training range",
    "long": "length generalization",
    "speed": "right answers per second",
}
_NAME = re.compile(r"(\w+)-(\d+)\.(run\.json|curve\.json|metrics\.jsonl|range\.json|long\.json|speed\.json)")
_SCORES = ("num_examples", "answer_accuracy", "step_accuracy", "span_accuracy", "attended_tokens", "attended_fraction", "first_errors")
_CURVE_POINTS = 100
_GROUPS = ((2, 8), (9, 15), (16, 22))


@dataclasses.dataclass(frozen=True)
class Trial:
    """One arm with one seed. Where a part was not run it is missing."""

    arm: str
    seed: int
    run: dict[str, Any]
    curve: dict[str, Any] | None
    evaluations: dict[str, dict[str, Any]]

    @property
    def command(self) -> str:
        """What trains it: the arm's options, and what else differs from the preset."""
        options, preset = ARMS[self.arm].options.split(), dataclasses.asdict(PRESETS[ARMS[self.arm].preset])
        for section in ("model", "training"):
            for key, value in self.run[section].items():
                option = f"--{key.replace('_', '-')}"
                if key in preset[section] and _written(value) != _written(preset[section][key]) and option not in options:
                    options += [option, _written(value)]
        return " ".join(["python train.py", ARMS[self.arm].preset, f"--run-dir runs/{self.arm}-{self.seed}", *options])

    def evaluation_command(self, kind: str) -> str:
        evaluation = self.evaluations[kind]
        names = list(evaluation["sets"])
        total = sum(row["num_examples"] for row in evaluation["by_ops"].values())
        low, _, high = names[0].partition("-")
        which = f"--min-ops {low} --max-ops {high}" if high else f"--ops {','.join(names)}"
        batches = ",".join(str(speed["batch_size"]) for speed in evaluation["sets"][names[0]]["by_batch_size"])
        return (
            f"python decode.py eval runs/{self.arm}-{self.seed}/model --seed {evaluation['seed']} "
            f"--num-examples {total // len(names)} {which} --batch-size {batches}"
        )


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _picked(values: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    missing = [key for key in keys if not isinstance(values, dict) or key not in values]
    if missing:
        raise ValueError(f"{where}: has no {missing[0]!r}; not written by this version")
    return {key: values[key] for key in keys}


def reduced_run(values: Any, arm: str, seed: int, where: str) -> dict[str, Any]:
    """The settings of a run. Raises ValueError where they are not those of the arm and seed."""
    run = _picked(values, ("model", "training", "corpus"), where)
    if _picked(run["training"], ("seed", "steps", "batch_size", "sequence_tokens"), where)["seed"] != seed:
        raise ValueError(f"{where}: is of seed {run['training']['seed']}")
    options = ARMS[arm].options.split()
    for option, expected in zip(options[::2], options[1::2], strict=True):
        key = option[2:].replace("-", "_")
        found = next((_written(section[key]) for section in run.values() if key in section), "missing")
        if found != expected:
            raise ValueError(f"{where}: {key} is {found}, but {expected} in the arm {arm!r}")
    return run


def reduced_evaluation(values: Any, where: str) -> dict[str, Any]:
    """Of what `decode.py eval --json` wrote: the scores by number of operators, the speed at each batch size, and what decides them."""
    kept = _picked(values, ("seed", "attention", "device", "jax", "num_parameters", "by_ops", "sets"), where)
    speeds = ("batch_size", "problems_per_second", "answer_accuracy")
    sets = {name: _picked(own, ("context_tokens", "by_batch_size"), where) for name, own in kept["sets"].items()}
    for own in sets.values():
        own["by_batch_size"] = [_picked(speed, speeds, where) for speed in own["by_batch_size"]]
    return kept | {"by_ops": {name: _picked(row, _SCORES, where) for name, row in kept["by_ops"].items()}, "sets": sets}


def reduced_metrics(rows: Sequence[dict[str, Any]], where: str) -> dict[str, Any]:
    """Of a metrics.jsonl: the loss, as means over neighbouring rows; the time of all steps, compilation included; medians of rates."""
    keys = ("step", "loss", "steps_per_second", "tokens_per_second", "input_wait_fraction")
    logged = [_picked(row, keys, where) for row in rows if "loss" in row]
    if not logged:
        raise ValueError(f"{where}: has no step")
    size = -(-len(logged) // _CURVE_POINTS)
    blocks = [logged[start : start + size] for start in range(0, len(logged), size)]
    steps = [0, *(row["step"] for row in logged)]
    shares = [row["bf16_peak_fraction"] for row in rows if "bf16_peak_fraction" in row]
    return {
        "step": [block[-1]["step"] for block in blocks],
        "loss": [float(f"{mean(row['loss'] for row in block):.4g}") for block in blocks],
        "seconds": sum((step - before) / row["steps_per_second"] for before, step, row in zip(steps, steps[1:], logged)),
        "tokens_per_second": median(row["tokens_per_second"] for row in logged),
        "input_wait_fraction": median(row["input_wait_fraction"] for row in logged),
        "bf16_peak_fraction": median(shares) if shares else None,
    }


_CURVE = ("step", "loss", "seconds", "tokens_per_second", "input_wait_fraction", "bf16_peak_fraction")


def _read(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{file}: not JSON") from None


def reduced(file: Path) -> tuple[str, dict[str, Any]]:
    """The name under which a results file is kept, and what is kept of it. What was reduced before stays as it is.

    Raises: ValueError with one line for what is of another version, arm or seed.
    """
    match = _NAME.fullmatch(file.name)
    arm, seed, kind = match.groups() if match else ("", "", "")
    if arm not in ARMS:
        raise ValueError(f"{file}: of no arm that is known; allowed: {', '.join(ARMS)}, as in span-0.run.json")
    values, kind = _read(file), kind.partition(".")[0]
    if kind == "metrics":
        return f"{arm}-{seed}.curve.json", reduced_metrics(values, str(file))
    if kind == "run":
        kept = reduced_run(values, arm, int(seed), str(file))
    else:
        kept = _picked(values, _CURVE, str(file)) if kind == "curve" else reduced_evaluation(values, str(file))
    return file.name, kept | ({"commit": values["commit"]} if "commit" in values else {})


def take(source: Path, results: Path, commit: str) -> list[str]:
    """Adds reduced results of a commit, all of them or none; returns their names.

    Raises: ValueError for no results, or for ones that differ from those that are kept of the same arm and seed.
    """
    if not source.is_dir():
        raise ValueError(f"{source}: no such directory")
    found = dict(reduced(file) for file in sorted(source.iterdir()) if _NAME.fullmatch(file.name))
    if not found:
        raise ValueError(f"{source}: holds no results, such as span-0.run.json")
    for name, values in found.items():
        kept = _read(results / name) if (results / name).exists() else None
        if kept is not None and {**kept, "commit": None} != {**values, "commit": None}:
            raise ValueError(f"{source / name}: another run of the same arm and seed is kept in {results}; remove its files to replace it")
    results.mkdir(parents=True, exist_ok=True)
    for name, values in found.items():
        if not (results / name).exists():
            (results / name).write_text(json.dumps({"commit": commit} | values) + "\n", encoding="utf-8")
    return list(found)


def load(results: Path) -> list[Trial]:
    """All that a results directory holds, in the order of the arms. Raises ValueError with one line for what does not fit together."""
    if not results.is_dir():
        raise ValueError(f"{results}: no such directory")
    parts: dict[tuple[str, int], dict[str, dict[str, Any]]] = collections.defaultdict(dict)
    for file in sorted(results.glob("*.json")):
        name, values = reduced(file)
        head, part, _ = name.split(".")
        if "commit" not in values:
            raise ValueError(f"{file}: has no 'commit'; results are added by --take")
        arm, _, seed = head.rpartition("-")
        parts[arm, int(seed)][part] = values
    trials = []
    for (arm, number), own in sorted(parts.items(), key=lambda item: (list(ARMS).index(item[0][0]), item[0][1])):
        if "run" not in own:
            raise ValueError(f"{results / f'{arm}-{number}.run.json'}: missing, beside {', '.join(sorted(own))} of the same arm and seed")
        evaluations = {kind: own[kind] for kind in EVALUATIONS if kind in own}
        if len(sizes := {values["num_parameters"] for values in evaluations.values()}) > 1:
            raise ValueError(f"{results}/{arm}-{number}: evaluations of models of {' and '.join(map(str, sorted(sizes)))} parameters")
        trials.append(Trial(arm, number, own["run"], own.get("curve"), evaluations))
    if not trials:
        raise ValueError(f"{results}: holds no results, such as span-0.run.json")
    return trials


@dataclasses.dataclass(frozen=True)
class Tally:
    """How many of so many examples were right, and of each seed."""

    right: int
    num_examples: int
    by_seed: tuple[float, ...]

    @classmethod
    def of(cls, trials: Sequence[Trial], kind: str, accuracy: str, ops: Sequence[int] | None = None) -> Tally:
        """Of an evaluation of several seeds, of some numbers of operators or of all."""
        counts = []
        for trial in trials:
            rows = [row for name, row in trial.evaluations[kind]["by_ops"].items() if ops is None or int(name) in ops]
            counts.append((sum(round(row[accuracy] * row["num_examples"]) for row in rows), sum(row["num_examples"] for row in rows)))
        right, all_examples = (sum(column) for column in zip(*counts))
        return cls(right, all_examples, tuple(own / n for own, n in counts if n))

    @property
    def share(self) -> float:
        return self.right / self.num_examples

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.share, self.num_examples)

    @property
    def spread(self) -> float:
        return max(self.by_seed) - min(self.by_seed)

    def __str__(self) -> str:
        low, high = self.interval
        seeds = f"; seeds {min(self.by_seed):.1%} to {max(self.by_seed):.1%}" if len(self.by_seed) > 1 else ""
        return f"{self.right:,} of {self.num_examples:,} ({low:.1%} to {high:.1%}{seeds})"


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


def _ratios(trials: Sequence[Trial]) -> dict[int, float]:
    """Right answers per second of span over those of the control that was trained at these lengths, by number of operators."""
    arms = _with(trials, "speed")
    if not {"span", "long"} <= arms.keys():
        return {}
    lengths = _lengths([*arms["span"], *arms["long"]], "speed")
    return {ops: _best(arms["span"], ops)[0] / _best(arms["long"], ops)[0] for ops in lengths}


def speed_table(trials: Sequence[Trial]) -> str:
    arms, ratios, rows = _with(trials, "speed"), _ratios(trials), []
    for arm, own in arms.items():
        for ops in _lengths(own, "speed"):
            rate, batch = _best(own, ops)
            sets = [trial.evaluations["speed"]["sets"][str(ops)] for trial in own]
            tried = ", ".join(str(speed["batch_size"]) for speed in sets[0]["by_batch_size"])
            ratio = f"{ratios[ops]:.2f}x" if arm == "span" and ops in ratios else "-"
            cells = [
                f"{mean([one['context_tokens'] for one in sets]):,.0f}",
                str(Tally.of(own, "speed", "answer_accuracy", [ops])),
            ]
            rows.append((f"`{arm}`", str(ops), *cells, f"{rate:,.1f}", f"{batch} of {tried}", ratio))
    head = ("arm", "operators", "tokens of context", "answers", "right answers/s", "best batch of those tried", "over `long`")
    return _table(head, rows) if rows else "Not run."


def targets_table(trials: Sequence[Trial]) -> str:
    arms, long_arms = _with(trials, "range"), _with(trials, "long")

    def inside() -> tuple[bool, str]:
        tally = Tally.of(arms["span"], "range", "step_accuracy")
        return tally.share >= 0.995, str(tally)

    def against_dense() -> tuple[bool, str]:
        span, dense = (Tally.of(arms[arm], "range", "step_accuracy") for arm in ("span", "dense"))
        return span.share >= dense.share - max(span.spread, dense.spread), f"{span} against {dense}"

    def at_200() -> tuple[bool, str]:
        tally = Tally.of(long_arms["span"], "long", "step_accuracy", [200])
        return tally.share >= 0.95, str(tally)

    def speed() -> tuple[bool, str]:
        ratio = _ratios(trials)[200]
        return ratio >= 3, f"{ratio:.2f}x"

    has_200 = "span" in long_arms and 200 in _lengths(long_arms["span"], "long")
    targets: list[tuple[str, bool, Callable[[], tuple[bool, str]]]] = [
        ("span, 2-22 operators: all steps right on 99.5%", "span" in arms, inside),
        ("not below the dense control by more than the seeds' spread", {"span", "dense"} <= arms.keys(), against_dense),
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
    """Shares by number of operators, of all seeds; of all steps also the 95% interval as a bar, and single seeds as points."""
    arms = _with(trials, kind)
    wanted = {"step_accuracy": "-"} if kind == "long" else {"answer_accuracy": "--", "step_accuracy": "-", "span_accuracy": ":"}
    for arm, own in arms.items():
        lengths, color = _lengths(own, kind), f"C{list(ARMS).index(arm)}"
        for accuracy, style in wanted.items():
            tallies = [Tally.of(own, kind, accuracy, [ops]) for ops in lengths]
            label = f"{arm}, {accuracy.partition('_')[0]}s" if len(wanted) > 1 else arm
            axes.plot(lengths, [100 * tally.share for tally in tallies], color=color, linestyle=style, marker=".", linewidth=1, label=label)
            if accuracy == "step_accuracy":
                low, high = ([100 * tally.interval[side] for tally in tallies] for side in (0, 1))
                axes.vlines(lengths, low, high, color=color, linewidth=1, alpha=0.5)
                points = [(ops, 100 * share) for ops, tally in zip(lengths, tallies) for share in tally.by_seed]
                axes.scatter([x for x, _ in points], [y for _, y in points], s=6, color=color, alpha=0.5)
    axes.set(xlabel="operators", ylabel="right, %")
    if kind == "long" and arms:
        lengths = sorted({ops for own in arms.values() for ops in _lengths(own, kind)})
        axes.set(xscale="log", ylim=(-3, 103), title="all steps right, by length")
        axes.set_xticks(lengths, [str(ops) for ops in lengths])
        axes.minorticks_off()
    else:
        axes.locator_params(axis="x", integer=True)
    return bool(arms)


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
        lengths = _lengths(own, "speed")
        axes.plot(lengths, [_best(own, ops)[0] for ops in lengths], marker="o", label=arm)
    for ops, ratio in ratios.items():
        axes.annotate(f"{ratio:.1f}x", (ops, _best(arms["span"], ops)[0]), textcoords="offset points", xytext=(0, 6), ha="center")
    axes.set(xlabel="operators", ylabel="right answers per second, best batch", xscale="log", yscale="log")
    return bool(arms)


PLOTS: dict[str, tuple[str, Callable[[Axes, Sequence[Trial]], bool]]] = {
    "accuracy": ("accuracy by number of operators inside the training range", lambda axes, trials: _plot_accuracy(axes, trials, "range")),
    "length": ("all steps right against the number of operators", lambda axes, trials: _plot_accuracy(axes, trials, "long")),
    "speed": ("right answers per second against the number of operators", _plot_speed),
    "loss": ("loss against steps", _plot_loss),
}


def digest(results: Path) -> str:
    """Of all the results; every plot carries it as its description, so that one of older results is told."""
    return hashlib.sha256(b"\0".join(file.name.encode() + file.read_bytes() for file in sorted(results.glob("*.json")))).hexdigest()


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
