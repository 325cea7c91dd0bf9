"""Run directories: whose they are, and how a run that stopped goes on.

A run's identity is what decides its result, as JSON: parts by name, most of them objects of settings. It is in
`run.json`, in the run directory and in an export of it alike.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def claim(run_dir: Path, identity: dict[str, Any], resume_from: Path | None = None) -> None:
    """Makes the run directory, or checks that it is one of this very run, and so is what is to be resumed.

    Raises: ValueError that names the differences; FileNotFoundError where there is nothing to resume from.
    """
    if resume_from:
        if not (resume_from / "run.json").exists():
            raise FileNotFoundError(f"{resume_from}: not an export of a run, run.json is missing")
        _check_same(resume_from, identity)
    file, partial = run_dir / "run.json", run_dir / ".run.json.partial"
    if file.exists():
        return _check_same(run_dir, identity)
    if run_dir.exists() and {path.name for path in run_dir.iterdir()} - {partial.name}:
        raise ValueError(f"{run_dir} is not empty and not a run directory (no run.json): choose another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(identity, indent=2) + "\n")
    os.replace(partial, file)


def _check_same(directory: Path, here: dict[str, Any]) -> None:
    file = directory / "run.json"
    try:
        there = json.loads(file.read_text())
        if there.keys() != here.keys():
            raise ValueError
    except (ValueError, AttributeError):
        raise ValueError(f"{file} was not written by this version of train.py: choose another --run-dir") from None
    settings = {name: value for name, value in here.items() if not isinstance(value, dict)}
    pairs = [(there, settings), *((there[name], value) for name, value in here.items() if isinstance(value, dict))]
    differences = [f"{key} is {old.get(key)!r} there, {new[key]!r} here" for old, new in pairs for key in new if old.get(key) != new[key]]
    if differences:
        raise ValueError(f"{directory} holds a run of another config: {'; '.join(differences)}")


def how_to_go_on(run_dir: Path) -> str:
    """For people: how a stopped run goes on, here and, where there is an export, elsewhere."""
    line, export = "the same command goes on", run_dir / "export"
    if export.exists():
        line += f"; elsewhere with --resume-from and the {len(list(export.iterdir()))} files of {export}"
    return line
