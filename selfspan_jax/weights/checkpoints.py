"""Checkpoints of a training run (Orbax): its latest states, with their positions in the data."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from selfspan_jax.errors import UserError
from selfspan_jax.parallel import collectives, distributed

_CHECKPOINTS = "checkpoints"
_ORBAX_LOG = logging.getLogger("absl")


def latest_step(run_dir: Path) -> int | None:
    """Return the step of the latest checkpoint that looks whole, None where there is none."""
    folders = (run_dir / _CHECKPOINTS).glob("[0-9]*")
    return max((int(path.name) for path in folders if path.name.isdecimal() and path.is_dir() and any(path.iterdir())), default=None)


class TrainingCheckpoints:
    """Keep the last `keep` states of a run, each written in the background and visible only when complete."""

    def __init__(self, run_dir: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._directory = (run_dir / _CHECKPOINTS).absolute()
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._noise = _ORBAX_LOG.level, sys.unraisablehook  # what fails is raised here, and said in one line
        _ORBAX_LOG.setLevel(logging.CRITICAL)
        sys.unraisablehook = self._hook

    def save(self, step: int, state: Any, next_example: int | Sequence[int]) -> None:
        """Start to write the state after `step` steps, with the position in the data; waits for the previous write only.

        With several processes all call this: each writes its shards.

        Raises: UserError if this one has no room, or the previous one could not be written.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"next_example": next_example}))
        with self._writing():
            self._manager.wait_until_finished()
            needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self._directory).free
            if free < needed:
                raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free")
            self._manager.save(step, args=args)

    def _hook(self, unraisable: Any) -> None:
        """Leave out what Orbax's library says of reads and writes that it gave up when another had failed."""
        if not str(unraisable.exc_value).startswith(("Event loop is closed", "Encountered error while reading array index")):
            self._noise[1](unraisable)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # Orbax passes those of its library on as ValueError
            reason = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
            raise UserError(
                f"a checkpoint cannot be written to {self._directory}: {reason}; the same command goes on from the last"
            ) from error

    def restore(self, like: Any) -> tuple[Any, int | list[int]] | None:
        """Read the latest state that can be read, with the structure, shapes and sharding of `like`, and its position in the data.

        A later one that cannot be read is said in a line, and renamed.

        Returns: None if there is no checkpoint.
        Raises: UserError if there are checkpoints, but none that can be read.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)), data=ocp.args.JsonRestore()
        )
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(step, args=args)
            except Exception as error:
                # Orbax raises these for files that are missing or not JSON, a bare Exception for arrays that are missing or cut short
                if type(error) is not Exception and not isinstance(error, KeyError | ValueError | OSError):
                    raise
                damaged.append(step)
                reason = " ".join(str(error.args[0] if error.args else error).split())[:160]
                distributed.log_once(
                    f"warning: the checkpoint of step {step} is damaged and left out: {self._directory / str(step)} ({reason})"
                )
                continue
            if damaged:
                for bad in damaged if distributed.is_first_process() else ():
                    os.rename(self._directory / str(bad), self._directory / f"{bad}.damaged")
                collectives.process_max(0)  # wait for it
                self._manager.reload()
            return restored.state, restored.data["next_example"]
        if damaged:
            raise UserError(f"{self._directory}: no checkpoint can be read; without this directory the run starts anew")
        return None

    def close(self) -> None:
        """Wait until everything is written. Raises: UserError if it could not be."""
        try:
            with self._writing():
                self._manager.wait_until_finished()
        finally:
            self._manager.close()
            _ORBAX_LOG.setLevel(self._noise[0])
            sys.unraisablehook = self._noise[1]
