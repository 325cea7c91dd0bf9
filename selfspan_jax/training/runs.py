"""Run directories: the identity of a run, its checkpoints (Orbax), and the card of its model.

The identity is everything that decides the result of a run, as JSON: sections by name, most of them objects of settings. It is
in `run.json` of the run directory.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from selfspan_jax.config import TrainConfig
from selfspan_jax.errors import UserError
from selfspan_jax.files import read_json, write_json
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import distributed

_REMOVED = {"export_every_steps": 0}  # settings of older versions, with the value that this version still computes


def claim(run_dir: Path, identity: dict[str, Any]) -> None:
    """Create a run directory, or check that it belongs to this very run. With several processes, the first one creates it.

    Raises: UserError that names the differences, or for a directory that holds something else.
    """
    file = run_dir / "run.json"
    there = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    if file.name in there:
        return _check_same(file, identity)
    if any(not name.endswith(".partial") for name in there):  # what a killed process left is no matter
        raise UserError(f"{run_dir} is not empty and not a run directory (no run.json): choose another --run-dir")
    if distributed.is_first_process():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(file, identity)


def _check_same(file: Path, here: dict[str, Any]) -> None:
    try:
        there = read_json(file)
    except UserError:
        there = {}
    if there.keys() != here.keys() or any(isinstance(here[name], dict) and not isinstance(there[name], dict) for name in here):
        raise UserError(f"{file} was not written by this version of train.py: choose another --run-dir")
    old, new = _settings(there), _settings(here)
    changed = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    if differences := [f"{name[1]} is {old.get(name)!r} there, {new.get(name)!r} here" for name in changed]:
        raise UserError(f"{file.parent} holds a run of another config: {'; '.join(differences)}")


def _settings(identity: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """Return the settings by section and name, without those that are removed."""
    sections = {name: value if isinstance(value, dict) else {name: value} for name, value in identity.items()}
    settings = {(section, name): value for section, values in sections.items() for name, value in values.items()}
    return {name: value for name, value in settings.items() if (name[1], value) not in _REMOVED.items()}


class TrainingCheckpoints:
    """Keep the last `keep` states of a run, each written in the background and visible only when complete."""

    def __init__(self, directory: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    @property
    def latest_step(self) -> int | None:
        """Step of the latest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, next_example: int | Sequence[int]) -> None:
        """Start to write the state after `step` steps, with the position in the data; waits for the previous write only.

        With several processes all call this: each writes its shards.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"next_example": next_example}))
        self._manager.save(step, args=args)

    def restore(self, like: Any) -> tuple[Any, int | list[int]]:
        """Read the latest state, with the structure, shapes and sharding of `like`, and its position in the data."""
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(self._manager.latest_step(), args=args)
        return restored.state, restored.data["next_example"]

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def card(title: str, model: Decoder, config: TrainConfig, prompts: str, scores: Mapping[str, float], identity: Mapping[str, Any]) -> str:
    """Write the README of a finished model, with the command line of this process.

    Args:
      prompts: description of the prompts that the scores are on.
    """
    command = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]  # no directories of this machine
    lines = [f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in scores.items()]
    return (
        f"# {title}\n\nA span model of {model.num_parameters:,} parameters, trained by `train.py` of selfspan.\n\n"
        f"```\npython train.py {shlex.join(command)}\n```\n\n"
        f"{config.steps:,} steps of {config.batch_size} x {config.sequence_tokens} tokens, "
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}.\n\n"
        f"Scores on fresh {prompts}, decoded greedily by the model itself "
        f"(attention: {model.config.mask}):\n\n" + "\n".join(lines) + "\n\n"
        "`config.json` has the architecture, `vocab.json` the task.\n\n"
        f"```json\n{json.dumps(identity, indent=2)}\n```\n"
    )
