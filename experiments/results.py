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
from typing import Any

import pandas as pd

from experiments.variants import Experiment
from selfspan_jax import files
from selfspan_jax.errors import UserError

# What is kept of a file: the `fields` of `pick`. Of an evaluation, the experiment says it.
_SIZES = ("steps", "batch_size", "sequence_tokens")
_RUN = {"training": dict.fromkeys(("*", "seed", *_SIZES)), "base": dict.fromkeys(("*", "name"))}  # other sections: anything
_STEP = dict.fromkeys(("step", "loss", "steps_per_second", "tokens_per_second", "input_wait_fraction", "mfu?"))
_CURVE = dict.fromkeys(("step", "loss", "seconds", "tokens_per_second", "input_wait_fraction", "mfu", "evaluation?"))
_CURVE_POINTS = 100


@dataclasses.dataclass(frozen=True, eq=False)
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
      fields: None for any value; an object of fields, in which "*" stands for all others and "name?" need not be there; or a
        list of one, for each element.

    Raises: UserError where a field is missing, or is no object where one is expected.
    """
    if fields is None:
        return values
    if isinstance(fields, list):
        return [pick(value, fields[0], where) for value in values]
    if not isinstance(values, dict):
        raise UserError(f"{where}: found {type(values).__name__} in place of an object; not written by this version")
    if missing := [key for key in fields if key not in values and key[-1] not in "*?"]:
        raise UserError(f"{where}: has no {missing[0]!r}; not written by this version")
    named = {key.removesuffix("?"): own for key, own in fields.items()}
    others = dict.fromkeys(values, fields["*"]) if "*" in fields else {}
    return {key: pick(values[key], own, where) for key, own in (others | named).items() if key in values}


# ------------------------------------------------------------------------------------------------------------ directories


def take(experiment: Experiment, source: Path, results: Path, commit: str) -> list[str]:
    """Add the reduced results of a directory, made at a commit: all of them or none. Returns their names.

    Raises: UserError where there are none, or where others are stored of the same variant and seed.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such directory")
    found = {}
    for file in sorted(source.iterdir()):
        if _match(experiment, file):
            *key, values = _reduced(experiment, file)
            found["{}-{}.{}.json".format(*key)] = values
    if not found:
        raise UserError(f"{source}: holds no results, such as span-0.run.json")
    for name, values in found.items():
        if (results / name).exists() and _reduced(experiment, results / name)[-1] | {"commit": commit} != values | {"commit": commit}:
            raise UserError(f"{source / name}: another run of the same variant and seed is in {results}; remove its files to replace it")
    results.mkdir(parents=True, exist_ok=True)
    for name, values in found.items():
        if not (results / name).exists():
            files.write_text(results / name, json.dumps({"commit": commit} | values) + "\n")
    return list(found)


def load(experiment: Experiment, results: Path) -> list[Run]:
    """Load the runs of a results directory, in the order of the variants; none where there is no directory.

    Raises: UserError naming a file that does not fit the others.
    """
    parts: dict[tuple[str, int], dict[str, dict[str, Any]]] = collections.defaultdict(dict)
    for file in sorted(results.glob("*.json")):
        variant, seed, part, values = _reduced(experiment, file)
        if "commit" not in values:
            raise UserError(f"{file}: has no 'commit'; results are added by --take")
        parts[variant, seed][part] = values
    runs: list[Run] = []
    order = list(experiment.variants)
    for variant, seed in sorted(parts, key=lambda key: (order.index(key[0]), key[1])):
        own, where = parts[variant, seed], f"{results}/{variant}-{seed}"
        if "run" not in own:
            raise UserError(f"{where}.run.json: missing, beside {', '.join(sorted(own))} of the same variant and seed")
        evaluations = {kind: own[kind] for kind in experiment.evaluations if kind in own}
        if len(sizes := {values["num_parameters"] for values in evaluations.values()}) > 1:
            raise UserError(f"{where}: evaluations of models of {' and '.join(map(str, sorted(sizes)))} parameters")
        runs.append(Run(variant, seed, own["run"], own.get("curve"), evaluations))
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
    """Read variant, seed and kind off a file's name; the kind of a metrics.jsonl is None."""
    kinds = "|".join(("run", "curve", *experiment.evaluations))
    return re.fullmatch(rf"(\w+)-(\d+)\.(?:({kinds})\.json|metrics\.jsonl)", file.name)


def _reduced(experiment: Experiment, file: Path) -> tuple[str, int, str, dict[str, Any]]:
    """Read a results file; return the variant, the seed, the part of the run, and what is stored of it. Stored files stay as they are.

    Raises: UserError for a file of another version, variant or seed.
    """
    match = _match(experiment, file)
    name, seed, kind = match.groups() if match else ("", "", None)
    if name not in experiment.variants:
        raise UserError(f"{file}: of an unknown variant; allowed: {', '.join(experiment.variants)}, as in span-0.run.json")
    variant, where = experiment.variants[name], str(file)
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if kind else [json.loads(line) for line in text.splitlines()]
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{file}: not JSON") from None
    if not kind:
        return name, int(seed), "curve", _reduced_metrics(values, where)
    schemas: dict[str, Any] = {"run": {section: _RUN.get(section, {"*": None}) for section in variant.defaults}, "curve": _CURVE}
    fields = schemas.get(kind, experiment.evaluation_fields | dict.fromkeys(("num_too_long?", "passes?")))
    kept = pick(values, fields | {"commit?": None}, where)
    if kind == "run":
        if kept["training"]["seed"] != int(seed):
            raise UserError(f"{where}: is of seed {kept['training']['seed']}")
        variant.check(kept, where)
    return name, int(seed), kind, kept


def _reduced_metrics(rows: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """Reduce a metrics.jsonl to a curve.

    Returns: the loss as means over neighbouring rows, the seconds of all steps with compilation, medians of the rates, and the
    run's own evaluation after its last step where there is one.
    """
    logged = pd.DataFrame([pick(row, _STEP, where) for row in rows if "loss" in row])
    if logged.empty:
        raise UserError(f"{where}: has no step")
    steps, last = logged["step"], logged["step"].iloc[-1]
    blocks = logged.groupby(logged.index // -(-len(logged) // _CURVE_POINTS))
    rates = logged.reindex(columns=["tokens_per_second", "input_wait_fraction", "mfu"]).median()
    own = {key.removeprefix("eval/"): value for row in rows if row["step"] == last for key, value in row.items() if "eval/" in key}
    return {
        "step": blocks["step"].last().tolist(),
        "loss": [float(f"{loss:.4g}") for loss in blocks["loss"].mean()],
        "seconds": sum(steps.diff().fillna(steps) / logged["steps_per_second"]),
        **{name: None if pd.isna(rate) else rate for name, rate in rates.items()},
        **({"evaluation": own} if own else {}),
    }
