"""Checkpoints of a training run (Orbax)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


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
