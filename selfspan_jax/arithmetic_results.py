"""The stored results of the arithmetic experiments: the arms, what is kept of each run and evaluation, and how shares are pooled.

A results directory holds, for each arm and seed, ARM-SEED.run.json and .curve.json of the training and .range.json, .long.json and
.speed.json of its evaluations: what train.py and decode.py eval wrote, reduced to what `arithmetic_report` shows.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from selfspan_jax.config import PRESETS
from selfspan_jax.evaluation import wilson


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one model of the comparison is, and the command that trains it."""

    words: str
    preset: str = "arithmetic-small"
    options: str = ""


# A sixth of the preset's tokens: what four arms of this size could be given.
_BASE = "--batch-size 128 --steps 2000"
ARMS = {
    "span": Arm("span tokens and span mask"),
    "dense": Arm("the same text, dense mask", options="--mask dense"),
    "plain": Arm("text without span tokens, dense mask", options="--mask dense --labelling plain"),
    "untagged": Arm("untagged prompt, headers see all", options="--labelling none --header-view all"),
    "long": Arm(
        "as plain, trained on 2-200 operators",
        options="--mask dense --labelling plain --max-ops 200 --sequence-tokens 4096 --batch-size 16 --gap-scales 0",
    ),
    **{
        f"base{name}": Arm(f"{words}, 114M parameters", preset="arithmetic-base", options=f"{_BASE} {options}".strip())
        for name, words, options in (
            ("", "span tokens and span mask", ""),
            ("_dense", "the same text, dense mask", "--mask dense"),
            ("_plain", "text without span tokens, dense mask", "--mask dense --labelling plain"),
            ("_untagged", "untagged prompt, headers see all", "--labelling none --header-view all"),
        )
    },
}
EVALUATIONS = {
    "range": "accuracy inside the training range",
    "long": "length generalization",
    "speed": "right answers per second",
}
_NAME = re.compile(r"(\w+)-(\d+)\.(run\.json|curve\.json|metrics\.jsonl|range\.json|long\.json|speed\.json)")
_SCORES = ("num_examples", "answer_accuracy", "step_accuracy", "span_accuracy", "attended_tokens", "attended_fraction", "first_errors")
_CURVE_POINTS = 100


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
    speeds = ("batch_size", "problems_per_second", "decode_seconds")
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


def digest(results: Path) -> str:
    """Of all the results; every plot carries it as its description, so that one of older results is told."""
    return hashlib.sha256(b"\0".join(file.name.encode() + file.read_bytes() for file in sorted(results.glob("*.json")))).hexdigest()
