"""Experiments and the pages that report them: arms, what is kept of their runs, and the tables and plots that every page has.

An arm is one model of a comparison and the command that trains it; a trial is an arm with a seed. A results directory holds, of
each trial, ARM-SEED.run.json and .curve.json of its training and ARM-SEED.KIND.json of its evaluations: what train.py and
decode.py eval wrote, reduced to what the page beside the directory shows. Of that page what stands between `<!-- NAME -->` and
`<!-- end -->` is written anew. What was not run is not made up: the page says so.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from selfspan_jax.config import PRESETS, LoraConfig, fine_tuning
from selfspan_jax.evaluation import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVE = ("step", "loss", "seconds", "tokens_per_second", "input_wait_fraction", "bf16_peak_fraction")
_CURVE_POINTS = 100
_UNNAMED = {"label_jumps": 0, "jumps_at": "any"}  # what settings were in runs that are older than them
_LENGTHS = ("steps", "batch_size", "sequence_tokens")


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one model of the comparison is, and the command that trains it."""

    words: str
    preset: str
    """Of train.py: a model's name, or finetune-lora."""
    corpus: Mapping[str, Any]
    """All settings of the preset's corpus, as train.py has them."""
    options: str = ""
    """Of the command, in pairs of --name and value. A run of this arm has these settings."""

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        """The options by name."""
        words = self.options.split()
        return {option[2:].replace("-", "_"): value for option, value in zip(words[::2], words[1::2], strict=True)}

    @functools.cached_property
    def defaults(self) -> dict[str, Mapping[str, Any]]:
        """What a run of the preset is, by the parts of its run.json."""
        if self.preset in PRESETS:
            return {**dataclasses.asdict(PRESETS[self.preset]), "corpus": self.corpus}
        attention, training = fine_tuning(self.settings["corpus"], adapters=True)
        configs: dict[str, Any] = {"attention": attention, "lora": LoraConfig(), "training": training}
        return {"base": {}, **{name: dataclasses.asdict(config) for name, config in configs.items()}, "corpus": self.corpus}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One arm with one seed. Where a part was not run it is missing."""

    arm: str
    seed: int
    run: dict[str, Any]
    curve: dict[str, Any] | None
    evaluations: dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plot:
    """What a picture shows, for people, which trials have that, and what draws those of a panel: one at least."""

    words: str
    shows: Callable[[Trial], Any]
    draw: Callable[[Axes, Sequence[Trial]], None]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A comparison: its arms, the kinds of evaluation that a trial may have, and what is kept of them."""

    arms: Mapping[str, Arm]
    kinds: Mapping[str, str]
    """For people."""
    reduced_evaluation: Callable[[Any, str], dict[str, Any]]
    """Of what `decode.py eval --json` wrote, and of what it returned itself. ValueError, with the place given, for anything else."""
    evaluation_options: Callable[[dict[str, Any]], str]
    """The options of `decode.py eval` that a reduced evaluation was made with."""
    panels: Mapping[str, Sequence[str]]
    """The arms of each panel of a plot, by what they have in common."""

    # ------------------------------------------------------------------------------------------------------ stored results

    @functools.cached_property
    def _name(self) -> re.Pattern[str]:
        return re.compile(rf"(\w+)-(\d+)\.((?:run|curve|{'|'.join(self.kinds)})\.json|metrics\.jsonl)")

    def reduced(self, file: Path) -> tuple[str, dict[str, Any]]:
        """The name under which a results file is kept, and what is kept of it. What was reduced before stays as it is.

        Raises: ValueError with one line for what is of another version, arm or seed.
        """
        match = self._name.fullmatch(file.name)
        arm, seed, kind = match.groups() if match else ("", "", "")
        if arm not in self.arms:
            raise ValueError(f"{file}: of no arm that is known; allowed: {', '.join(self.arms)}, as in span-0.run.json")
        values, kind = _read(file), kind.partition(".")[0]
        if kind == "metrics":
            return f"{arm}-{seed}.curve.json", reduced_metrics(values, str(file))
        if kind == "run":
            kept = reduced_run(values, self.arms[arm], int(seed), str(file))
        else:
            kept = reduced_curve(values, str(file)) if kind == "curve" else self.reduced_evaluation(values, str(file))
        return file.name, kept | {key: values[key] for key in ("commit", "passes") if key in values}

    def take(self, source: Path, results: Path, commit: str) -> list[str]:
        """Adds reduced results of a commit, all of them or none; returns their names.

        Raises: ValueError for no results, or for ones that differ from those that are kept of the same arm and seed.
        """
        if not source.is_dir():
            raise ValueError(f"{source}: no such directory")
        found = dict(self.reduced(file) for file in sorted(source.iterdir()) if self._name.fullmatch(file.name))
        if not found:
            raise ValueError(f"{source}: holds no results, such as span-0.run.json")
        for name, values in found.items():
            kept = self.reduced(results / name)[1] if (results / name).exists() else None
            if kept is not None and {**kept, "commit": None} != {**values, "commit": None}:
                raise ValueError(
                    f"{source / name}: another run of the same arm and seed is kept in {results}; remove its files to replace it"
                )
        results.mkdir(parents=True, exist_ok=True)
        for name, values in found.items():
            if not (results / name).exists():
                (results / name).write_text(json.dumps({"commit": commit} | values) + "\n", encoding="utf-8")
        return list(found)

    def load(self, results: Path) -> list[Trial]:
        """All that a results directory holds, in the order of the arms; nothing where there is none.

        Raises: ValueError with one line for what does not fit together.
        """
        parts: dict[tuple[str, int], dict[str, dict[str, Any]]] = collections.defaultdict(dict)
        for file in sorted(results.glob("*.json")):
            name, values = self.reduced(file)
            head, part, _ = name.split(".")
            if "commit" not in values:
                raise ValueError(f"{file}: has no 'commit'; results are added by --take")
            arm, _, seed = head.rpartition("-")
            parts[arm, int(seed)][part] = values
        trials: list[Trial] = []
        order = list(self.arms)
        for (arm, number), own in sorted(parts.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
            if "run" not in own:
                others = ", ".join(sorted(own))
                raise ValueError(f"{results / f'{arm}-{number}.run.json'}: missing, beside {others} of the same arm and seed")
            evaluations = {kind: own[kind] for kind in self.kinds if kind in own}
            if len(sizes := {values["num_parameters"] for values in evaluations.values()}) > 1:
                raise ValueError(f"{results}/{arm}-{number}: evaluations of models of {' and '.join(map(str, sorted(sizes)))} parameters")
            trials.append(Trial(arm, number, own["run"], own.get("curve"), evaluations))
            _check_alike(next(trial for trial in trials if trial.arm == arm), trials[-1], str(results))
        return trials

    # -------------------------------------------------------------------------------------------------------------- tables

    def arms_table(self, trials: Sequence[Trial]) -> str:
        seeds = seeds_by_arm(trials)
        rows = [
            (f"`{arm}`", own.words, f"`{f'{own.preset} {own.options}'.strip()}`", seeds.get(arm, "not run"))
            for arm, own in self.arms.items()
        ]
        return table(("arm", "what it is", "`python train.py`", "seeds"), rows)

    def not_run(self, trials: Sequence[Trial]) -> str:
        trained = by_arm(trials)
        lines = [f"- `{arm}` ({own.words}): not trained" for arm, own in self.arms.items() if arm not in trained]
        for kind, words in self.kinds.items():
            missing = seeds_by_arm([trial for trial in trials if kind not in trial.evaluations])
            names = [f"`{arm}` with seed {seeds}" for arm, seeds in missing.items()]
            lines += [f"- {words}: {'; '.join(names)}"] if names else []
        return "\n".join(lines) or "Nothing: all arms were trained and evaluated."

    def commands(self, trials: Sequence[Trial]) -> str:
        lines = []
        for trial in trials:
            machine = next((f"one {e['device']}, JAX {e['jax']}" for e in trial.evaluations.values()), "machine not recorded")
            lines += [f"# {trial.arm}, seed {trial.seed}: {machine}, commit {trial.run['commit']}", self.command(trial)]
            for evaluation in trial.evaluations.values():
                other = "" if evaluation["commit"] == trial.run["commit"] else f"  # commit {evaluation['commit']}"
                options = self.evaluation_options(evaluation)
                options += f" --passes {passes}" if (passes := evaluation.get("passes", 1)) > 1 else ""
                lines.append(f"python decode.py eval runs/{trial.arm}-{trial.seed}/model --seed {evaluation['seed']} {options}{other}")
        return "\n".join(["```", *lines, "```"]) if lines else "Not run."

    def command(self, trial: Trial) -> str:
        """What trains it: the arm's options, and what else differs from the preset."""
        arm = self.arms[trial.arm]
        words = ["python train.py", arm.preset, f"--run-dir runs/{trial.arm}-{trial.seed}", *arm.options.split()]
        for section, defaults in arm.defaults.items():
            for key, value in trial.run[section].items():
                if key in defaults and key not in arm.settings and _written(value) != _written(defaults[key]):
                    option = key.replace("_", "-")
                    words += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", _written(value)]
        return " ".join(words)

    # --------------------------------------------------------------------------------------------------------------- plots

    def color(self, arm: str) -> Any:
        """Of an arm, in all plots."""
        import matplotlib

        return matplotlib.colormaps["tab10" if len(self.arms) <= 10 else "tab20"](list(self.arms).index(arm))

    def plot_loss(self, axes: Axes, trials: Sequence[Trial]) -> None:
        for arm, own in by_arm(trials).items():
            for number, curve in enumerate(trial.curve for trial in own if trial.curve):
                axes.plot(curve["step"], curve["loss"], color=self.color(arm), linewidth=1, label=None if number else arm)
        axes.set(xlabel="step", ylabel="loss of a response token, nats", yscale="log")

    def draw(self, plots: Mapping[str, Plot], trials: Sequence[Trial], results: Path) -> dict[str, str]:
        """Draws what there is into the results directory; returns the page's line for each plot, empty where there is nothing to draw.

        Every plot carries a digest of all the results as its description, so that one of older results is told.
        """
        from matplotlib.figure import Figure

        lines = {}
        for name, plot in plots.items():
            shown = [trial for trial in trials if plot.shows(trial)]
            panels = {title: own for title, arms in self.panels.items() if (own := [trial for trial in shown if trial.arm in arms])}
            file, lines[name] = results / f"{name}.png", ""
            if not panels:
                file.unlink(missing_ok=True)
                continue
            figure = Figure(figsize=(6.4 if len(panels) == 1 else 10, 3.6), layout="constrained")
            for number, (title, own) in enumerate(panels.items(), 1):
                axes = figure.add_subplot(1, len(panels), number)
                plot.draw(axes, own)
                axes.legend(fontsize=7)
                axes.grid(alpha=0.3)
                if len(panels) > 1:
                    axes.set_title(title, fontsize=9)
            _save(figure, file, digest(results))
            lines[name] = f"\n\n![{plot.words}]({results.name}/{name}.png)"
        return lines

    # ------------------------------------------------------------------------------------------------------------- command

    def main(
        self,
        module: str,
        description: str,
        plots: Mapping[str, Plot],
        sections: Callable[[Sequence[Trial], dict[str, str]], dict[str, str]],
        arguments: list[str] | None = None,
    ) -> int:
        """The command of a report.

        Args:
          plots: by name of their file, beside "loss", which every report has.
          sections: what stands between the page's markers, beside the sections that every report has; of the trials and the page's
            lines of the plots.
        """
        parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
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
                print("added: " + ", ".join(self.take(args.take, args.results, args.commit)))
            trials = self.load(args.results)
            loss = Plot("loss against steps", lambda trial: trial.curve, self.plot_loss)
            lines = self.draw({**plots, "loss": loss}, trials, args.results)
            texts = {"arms": self.arms_table(trials), **sections(trials, lines), "training": training_table(trials) + lines["loss"]}
            texts |= {"not run": self.not_run(trials), "commands": self.commands(trials)}
            page.write_text(filled(page.read_text(encoding="utf-8"), texts), encoding="utf-8")
        except (ValueError, OSError) as error:
            parser.exit(2, f"error: {error}\n")
        print(f"{page}: {len(trials)} runs of {len(by_arm(trials))} arms")
        return 0


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def picked(values: Any, keys: Iterable[str], where: str) -> dict[str, Any]:
    """Of an object from JSON only these. Raises ValueError where one is missing, and for anything else than an object."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: found {type(values).__name__} in place of an object; not written by this version")
    if missing := [key for key in keys if key not in values]:
        raise ValueError(f"{where}: has no {missing[0]!r}; not written by this version")
    return {key: values[key] for key in keys}


def reduced_run(values: Any, arm: Arm, seed: int, where: str) -> dict[str, Any]:
    """The settings of a run. Raises ValueError where they are not those of the arm and seed."""
    run = {name: picked(own, (), where) | own for name, own in picked(values, arm.defaults, where).items()}
    if picked(run["training"], ("seed", *_LENGTHS), where)["seed"] != seed:
        raise ValueError(f"{where}: is of seed {run['training']['seed']}")
    if unknown := sorted(run["corpus"].keys() - arm.corpus.keys()):
        raise ValueError(f"{where}: {unknown[0]} is no setting of the arm's corpus")
    run["corpus"] = {key: value for key, value in _UNNAMED.items() if key in arm.corpus} | run["corpus"]
    if not run["corpus"].get("label_jumps", True):
        del run["corpus"]["jumps_at"]  # which says nothing then
    settings = {key: value for section in run.values() for key, value in section.items()}
    if "base" in run:  # which corpus it is was told by its settings
        settings |= {"init": picked(run["base"], ("name",), where)["name"], "corpus": arm.settings["corpus"]}
    for key, expected in arm.settings.items():
        found = _written(settings.get(key, "missing"))
        if found != expected:
            raise ValueError(f"{where}: {key} is {found}, but {expected} in this arm")
    return run


def _check_alike(first: Trial, other: Trial, where: str) -> None:
    """Trials of one arm are pooled, so that only their seeds may differ, and what decides no result."""
    for section in first.run.keys() - {"commit"}:
        settings, others = first.run[section], other.run[section]
        for key in _LENGTHS if section == "training" else settings.keys() & others.keys():
            if settings[key] != others[key]:
                found = f"{settings[key]} with seed {first.seed}, but {others[key]} with seed {other.seed}"
                raise ValueError(f"{where}: in the arm {first.arm!r} {key} is {found}")


def reduced_metrics(rows: Sequence[dict[str, Any]], where: str) -> dict[str, Any]:
    """Of a metrics.jsonl: the loss, as means over neighbouring rows; the time of all steps, compilation included; medians of rates;
    and, where there is one, the run's own evaluation after its last step.
    """
    keys = ("step", "loss", "steps_per_second", "tokens_per_second", "input_wait_fraction")
    logged = [picked(row, keys, where) for row in rows if "loss" in row]
    if not logged:
        raise ValueError(f"{where}: has no step")
    size = -(-len(logged) // _CURVE_POINTS)
    blocks = [logged[start : start + size] for start in range(0, len(logged), size)]
    steps = [0, *(row["step"] for row in logged)]
    shares = [row["bf16_peak_fraction"] for row in rows if "bf16_peak_fraction" in row]
    last = {key.removeprefix("eval/"): value for row in rows if row["step"] == steps[-1] for key, value in row.items() if "eval/" in key}
    return {
        "step": [block[-1]["step"] for block in blocks],
        "loss": [float(f"{mean(row['loss'] for row in block):.4g}") for block in blocks],
        "seconds": sum((step - before) / row["steps_per_second"] for before, step, row in zip(steps, steps[1:], logged)),
        "tokens_per_second": median(row["tokens_per_second"] for row in logged),
        "input_wait_fraction": median(row["input_wait_fraction"] for row in logged),
        "bf16_peak_fraction": median(shares) if shares else None,
        **({"evaluation": last} if last else {}),
    }


def reduced_curve(values: Any, where: str) -> dict[str, Any]:
    """Of what `reduced_metrics` returned."""
    return picked(values, _CURVE, where) | ({"evaluation": values["evaluation"]} if "evaluation" in values else {})


def _read(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{file}: not JSON") from None


def _save(figure: Figure, file: Path, description: str) -> None:
    """In 256 colours: lines and letters need no more, and the file is a third of what it would be."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("Description", description)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=100)
        with Image.open(buffer) as picture:
            few = picture.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(file, pnginfo=info, optimize=True)


def digest(results: Path) -> str:
    """Of all the results."""
    return hashlib.sha256(b"\0".join(file.name.encode() + file.read_bytes() for file in sorted(results.glob("*.json")))).hexdigest()


@dataclasses.dataclass(frozen=True)
class Tally:
    """How many of so many examples were right, and of each seed."""

    right: int
    num_examples: int
    by_seed: tuple[float, ...]

    @classmethod
    def of(cls, counts: Sequence[tuple[int, int]]) -> Tally:
        """Of how many were right, and of how many, with each seed."""
        right, num_examples = (sum(column) for column in zip(*counts))
        return cls(right, num_examples, tuple(own / n for own, n in counts if n))

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


def by_arm(trials: Sequence[Trial], kind: str | None = None) -> dict[str, list[Trial]]:
    """The trials, or those that have an evaluation, by arm."""
    arms: dict[str, list[Trial]] = {}
    for trial in trials:
        if kind is None or kind in trial.evaluations:
            arms.setdefault(trial.arm, []).append(trial)
    return arms


def seeds_by_arm(trials: Sequence[Trial]) -> dict[str, str]:
    """For people."""
    return {arm: ", ".join(str(trial.seed) for trial in own) for arm, own in by_arm(trials).items()}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) if rows else "Not run."


def targets_table(targets: Iterable[tuple[str, tuple[bool, str] | None]]) -> str:
    """Of each target: in words, and whether it is reached, with what was found; None where that was not run."""
    rows = []
    for words, judged in targets:
        reached, found = judged or (False, "")
        rows.append((words, ("yes: " if reached else "**no**: ") + found if judged else "not run"))
    return table(("target", "reached"), rows)


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
    return table(("arm", "seed", "steps x rows x tokens", "seconds", "tokens/s", "of the bf16 peak", "input wait", "last loss"), rows)


def filled(page: str, sections: Mapping[str, str]) -> str:
    """The page with its sections written anew. Raises ValueError for a page that lacks one."""
    for name, text in sections.items():
        begin = f"<!-- {name} -->\n"
        before, _, rest = page.partition(begin)
        _, end, after = rest.partition("<!-- end -->")
        if not end or begin in rest:
            raise ValueError(f"the page has not just one `<!-- {name} -->` line with an `<!-- end -->` line after it")
        page = f"{before}{begin}\n{text}\n\n{end}{after}"
    return page
