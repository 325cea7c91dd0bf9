"""Stored runs: what train.py and decode.py eval wrote, reduced to what the pages show.

A results directory holds, of each run, VARIANT-SEED.run.json and .curve.json of its training, and VARIANT-SEED.KIND.json of its
evaluations.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from experiments.migrations import migrate_corpus
from experiments.variants import Experiment, Variant
from selfspan_jax.errors import UserError

_CURVE = dict.fromkeys(("step", "loss", "seconds", "tokens_per_second", "input_wait_fraction", "bf16_peak_fraction"))
_CURVE_POINTS = 100
_SIZES = ("steps", "batch_size", "sequence_tokens")


@dataclasses.dataclass(frozen=True)
class Run:
    """A variant trained with one seed. A part that was not run is missing."""

    variant: str
    seed: int
    settings: dict[str, Any]
    """The sections of run.json, and the commit."""
    curve: dict[str, Any] | None
    evaluations: dict[str, dict[str, Any]]

    def part(self, name: str) -> dict[str, Any] | None:
        """Return an evaluation, the "curve", or the run's "own" evaluation after its last step; None where there is none."""
        parts = {"curve": self.curve, "own": (self.curve or {}).get("evaluation"), **self.evaluations}
        return parts.get(name)


def pick(values: Any, fields: Any, where: str) -> Any:
    """Reduce values from JSON to some fields.

    Args:
      fields: None for any value; an object of fields, in which "*" stands for all names; or a list of one, for each element.

    Raises: UserError where a field is missing, or is no object where one is expected.
    """
    if fields is None:
        return values
    if isinstance(fields, list):
        return [pick(value, fields[0], where) for value in values]
    if not isinstance(values, dict):
        raise UserError(f"{where}: found {type(values).__name__} in place of an object; not written by this version")
    if "*" in fields:
        return {key: pick(value, fields["*"], where) for key, value in values.items()}
    if missing := [key for key in fields if key not in values]:
        raise UserError(f"{where}: has no {missing[0]!r}; not written by this version")
    return {key: pick(values[key], own, where) for key, own in fields.items()}


# ------------------------------------------------------------------------------------------------------------ directories


def take(experiment: Experiment, source: Path, results: Path, commit: str) -> list[str]:
    """Add the reduced results of a directory, made at a commit: all of them or none. Returns their names.

    Raises: UserError where there are none, or where others are stored of the same variant and seed.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such directory")
    found = dict(_reduced(experiment, file) for file in sorted(source.iterdir()) if _match(experiment, file))
    if not found:
        raise UserError(f"{source}: holds no results, such as span-0.run.json")
    for name, values in found.items():
        stored = _reduced(experiment, results / name)[1] if (results / name).exists() else None
        if stored is not None and {**stored, "commit": None} != {**values, "commit": None}:
            raise UserError(f"{source / name}: another run of the same variant and seed is in {results}; remove its files to replace it")
    results.mkdir(parents=True, exist_ok=True)
    for name, values in found.items():
        if not (results / name).exists():
            (results / name).write_text(json.dumps({"commit": commit} | values) + "\n", encoding="utf-8")
    return list(found)


def load(experiment: Experiment, results: Path) -> list[Run]:
    """Load the runs of a results directory, in the order of the variants; none where there is no directory.

    Raises: UserError naming a file that does not fit the others.
    """
    parts: dict[tuple[str, int], dict[str, dict[str, Any]]] = collections.defaultdict(dict)
    for file in sorted(results.glob("*.json")):
        name, values = _reduced(experiment, file)
        if "commit" not in values:
            raise UserError(f"{file}: has no 'commit'; results are added by --take")
        head, part, _ = name.split(".")
        variant, _, seed = head.rpartition("-")
        parts[variant, int(seed)][part] = values
    runs: list[Run] = []
    order = list(experiment.variants)
    for (variant, number), own in sorted(parts.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        if "run" not in own:
            others = ", ".join(sorted(own))
            raise UserError(f"{results / f'{variant}-{number}.run.json'}: missing, beside {others} of the same variant and seed")
        evaluations = {kind: own[kind] for kind in experiment.evaluations if kind in own}
        if len(sizes := {values["num_parameters"] for values in evaluations.values()}) > 1:
            raise UserError(f"{results}/{variant}-{number}: evaluations of models of {' and '.join(map(str, sorted(sizes)))} parameters")
        runs.append(Run(variant, number, own["run"], own.get("curve"), evaluations))
        _check_alike(next(run for run in runs if run.variant == variant), runs[-1], str(results))
    return runs


def _check_alike(first: Run, other: Run, where: str) -> None:
    """Raise UserError where runs of one variant differ in more than their seeds and what decides no result: they are pooled."""
    for section in first.settings.keys() - {"commit"}:
        settings, others = first.settings[section], other.settings[section]
        for key in _SIZES if section == "training" else settings.keys() & others.keys():
            if settings[key] != others[key]:
                found = f"{settings[key]} with seed {first.seed}, but {others[key]} with seed {other.seed}"
                raise UserError(f"{where}: in the variant {first.variant!r} {key} is {found}")


def digest(results: Path) -> str:
    """Hash all results of a directory."""
    return hashlib.sha256(b"\0".join(file.name.encode() + file.read_bytes() for file in sorted(results.glob("*.json")))).hexdigest()


# ------------------------------------------------------------------------------------------------------------------ files


def _match(experiment: Experiment, file: Path) -> re.Match[str] | None:
    kinds = "|".join(("run", "curve", *experiment.evaluations))
    return re.fullmatch(rf"(\w+)-(\d+)\.((?:{kinds})\.json|metrics\.jsonl)", file.name)


def _reduced(experiment: Experiment, file: Path) -> tuple[str, dict[str, Any]]:
    """Read a results file; return the name under which it is stored and what is stored of it. Stored files stay as they are.

    Raises: UserError for a file of another version, variant or seed.
    """
    match = _match(experiment, file)
    name, seed, kind = match.groups() if match else ("", "", "")
    if name not in experiment.variants:
        raise UserError(f"{file}: of an unknown variant; allowed: {', '.join(experiment.variants)}, as in span-0.run.json")
    values, kind = _read(file), kind.partition(".")[0]
    if kind == "metrics":
        return f"{name}-{seed}.curve.json", _reduced_metrics(values, str(file))
    if kind == "run":
        kept = _reduced_run(values, experiment.variants[name], int(seed), str(file))
    elif kind == "curve":
        kept = pick(values, _CURVE, str(file)) | {key: values[key] for key in ("evaluation",) if key in values}
    else:
        kept = pick(values, experiment.evaluation_fields, str(file))
    return file.name, kept | {key: values[key] for key in ("commit", "passes") if key in values}


def _read(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{file}: not JSON") from None


def _reduced_run(values: Any, variant: Variant, seed: int, where: str) -> dict[str, Any]:
    """Reduce a run.json to the sections that its variant has. Raises UserError unless it is of the variant and seed."""
    run = pick(values, {section: {"*": None} for section in variant.defaults}, where)
    pick(run, {"training": dict.fromkeys(("seed", *_SIZES)), **({"base": {"name": None}} if "base" in run else {})}, where)
    if run["training"]["seed"] != seed:
        raise UserError(f"{where}: is of seed {run['training']['seed']}")
    run["corpus"] = migrate_corpus(run["corpus"], variant.defaults["corpus"])
    variant.check(run, where)
    return run


def _reduced_metrics(rows: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """Reduce a metrics.jsonl to a curve.

    Returns: the loss as means over neighbouring rows, the seconds of all steps with compilation, medians of the rates, and the
    run's own evaluation after its last step where there is one.
    """
    fields = dict.fromkeys(("step", "loss", "steps_per_second", "tokens_per_second", "input_wait_fraction"))
    logged = [pick(row, fields, where) for row in rows if "loss" in row]
    if not logged:
        raise UserError(f"{where}: has no step")
    size = -(-len(logged) // _CURVE_POINTS)
    blocks = [logged[start : start + size] for start in range(0, len(logged), size)]
    steps = [0, *(row["step"] for row in logged)]
    mfu = [row["bf16_peak_fraction"] for row in rows if "bf16_peak_fraction" in row]
    last = {key.removeprefix("eval/"): value for row in rows if row["step"] == steps[-1] for key, value in row.items() if "eval/" in key}
    return {
        "step": [block[-1]["step"] for block in blocks],
        "loss": [float(f"{mean(row['loss'] for row in block):.4g}") for block in blocks],
        "seconds": sum((step - before) / row["steps_per_second"] for before, step, row in zip(steps, steps[1:], logged)),
        "tokens_per_second": median(row["tokens_per_second"] for row in logged),
        "input_wait_fraction": median(row["input_wait_fraction"] for row in logged),
        "bf16_peak_fraction": median(mfu) if mfu else None,
        **({"evaluation": last} if last else {}),
    }
