"""Run directories: who holds one, and the identity of a run.

The identity is everything that decides the result of a run, as JSON: sections by name, most of them objects of settings. It is
in `run.json` of the run directory, with what may change when the run goes on: `TrainConfig.CHANGEABLE`, and the path of a corpus,
which is known by its content ("data_fingerprint"). More keys say how the run went: "schedules", where its number of steps was changed,
are pairs (step, steps of the schedule from there on), "finished_steps" is the length of the run whose model is in `model`, and
"left_out_examples", where there are some, how many examples of the corpus the vocabulary had no room for.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from selfspan_jax.config import LoraConfig, TrainConfig
from selfspan_jax.errors import UserError
from selfspan_jax.files import read_json, write_json
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import collectives, distributed
from selfspan_jax.weights import lora, models
from selfspan_jax.weights.checkpoints import latest_step

_WORDS = {  # for settings that have no option of their name
    ("base", "name"): "--init",
    ("base", "sha256"): "the content of --init",
    ("data_fingerprint", "data_fingerprint"): "the content of --data",
}
_LOCK = "run.lock"


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold a run directory against other runs by a lock of the operating system, which ends with this process however that ends.

    With several processes the first one holds it for all. A directory that was made for the lock alone is removed again.

    Raises: UserError in all processes if another run holds the directory, or if it cannot be made or written to.
    """
    lock, made, error = filelock.FileLock(run_dir / _LOCK, timeout=0), False, None
    if distributed.is_first_process():
        try:
            made = not run_dir.exists()
            run_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except FileExistsError:
            error = "is a file: expected a directory"
        except filelock.Timeout:
            error = "is in use by another run: wait for its end, stop it, or choose another"
        except OSError as failure:
            error = f"cannot be written to: {failure.strerror}"
    if collectives.process_max(int(error is not None)):
        raise UserError(f"--run-dir {run_dir} {error or 'cannot be used: the first process says why'}")
    try:
        yield
    finally:
        if made and {path.name for path in run_dir.iterdir()} <= {_LOCK}:
            (run_dir / _LOCK).unlink(missing_ok=True)
            run_dir.rmdir()
        lock.release()


def check(run_dir: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Check that a directory is new, or belongs to this very run; writes nothing.

    Returns: the content of its `run.json`, of which some may have changed. Where that has "finished_steps", they are those of `model`.
    Raises: UserError that names the differences, for fewer steps than were taken, or for a directory that holds something else.
    """
    names = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    if "run.json" in names:
        return _continued(run_dir / "run.json", identity)
    if any(name != _LOCK and not name.endswith(".partial") for name in names):  # what a killed process left is no matter
        raise UserError(f"{run_dir} is not empty and not a run directory (no run.json): choose another --run-dir")
    return identity


def claim(run_dir: Path, identity: dict[str, Any]) -> None:
    """Write what `check` returned as `run.json`; with several processes the first one does."""
    if distributed.is_first_process():
        write_json(run_dir / "run.json", identity)


def finish(
    run_dir: Path, identity: Mapping[str, Any], model: Decoder, task: dict[str, Any], card: str, adapters: LoraConfig | None = None
) -> None:
    """Write the finished model, and its adapter, in place of those of a shorter run; with several processes the first one does.

    Args:
      identity: what `check` returned.
      task: see `models.save_model`.
      adapters: of an adapted model, whose adapter is written too.
    """
    if distributed.is_first_process():
        if adapters:
            lora.save_adapter(run_dir / "adapter", model, adapters, identity["base"]["name"], task, card, replace=True)
        models.save_model(run_dir / "model", lora.plain(model), task, card, replace=True)
        write_json(run_dir / "run.json", {**identity, "finished_steps": identity["training"]["steps"]})


def schedule_note(identity: Mapping[str, Any]) -> str | None:
    """Say what another number of steps does to the learning rate of the run that `check` returned; None if it was never changed."""
    if not (schedules := identity.get("schedules")):
        return None
    (_, before), (step, steps) = schedules[-2:]
    return f"--steps was {before:,} up to step {step:,}: from there on the learning rate follows the schedule of {steps:,} steps"


def _continued(file: Path, here: dict[str, Any]) -> dict[str, Any]:
    """Check what a run goes on with against its `run.json`, and return the new one."""
    there: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        there = read_json(file)
    history = {name: there.pop(name) for name in models.HISTORY if name in there}
    if there.get("data_fingerprint") is not None and there["data_fingerprint"] == here.get("data_fingerprint"):
        there["data"] = here["data"]
    if there.keys() != here.keys() or any(isinstance(here[name], dict) and not isinstance(there[name], dict) for name in here):
        raise UserError(f"{file} was not written by this version of train.py: choose another --run-dir")
    old, new = _settings(there), _settings(here)
    changed = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    words = {name: _WORDS.get(name, f"--{name[1].replace('_', '-')}") for name in changed}
    if differences := [f"{words[name]} is {_short(old.get(name))} there, {_short(new.get(name))} here" for name in changed]:
        raise UserError(f"{file.parent} holds a run of another config: {'; '.join(differences)}")
    before, steps, taken = there["training"]["steps"], here["training"]["steps"], latest_step(file.parent) or 0
    if steps < taken:
        raise UserError(f"--steps is {steps}, but {file.parent} has taken {taken}: allowed are {taken} and above")
    if (file.parent / "model").exists():
        history.setdefault("finished_steps", before)
    else:
        history.pop("finished_steps", None)
    schedules = [pair for pair in history.get("schedules", [[0, before]]) if pair[0] < taken]
    if taken and schedules[-1][1] != steps:
        history["schedules"] = [*schedules, [taken, steps]]
    return here | history


def _short(value: Any) -> str:
    """Write a setting, of a digest its beginning."""
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else repr(value)


def _settings(identity: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """Return the settings by section and name that decide the result."""
    sections = {name: value if isinstance(value, dict) else {name: value} for name, value in identity.items()}
    every = ((section, *item) for section, values in sections.items() for item in values.items())
    return {(section, name): value for section, name, value in every if section != "training" or name not in TrainConfig.CHANGEABLE}
