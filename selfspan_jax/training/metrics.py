"""Metrics of a run: operations of a step, model FLOPs utilisation (MFU), speed between two lines of the log, the log itself."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array
from tensorboard.summary import Writer

from pallas_kernels.common import bf16_peak
from selfspan_jax.files import write_text
from selfspan_jax.model import Decoder, Frozen
from selfspan_jax.parallel import distributed

EVALUATION = "eval/"  # what the names of an evaluation's scores begin with, in the log


def step_flops(model: Decoder, num_tokens: float, num_pairs: float) -> float:
    """Count the floating-point operations of training on some tokens, forward and backward.

        6 x (parameters of matrix products) x tokens  +  12 x layers x N x H x (pairs of tokens that the mask allows)

    A product of n parameters with a token is 2 n operations, its two gradients 4 n; scores and values of a pair are 4 H for
    each query head, their gradients 8 H (PaLM, 2204.02311, appendix B, which counts every pair of the context; here only
    those that the mask allows, so that a sparse mask earns nothing by what it leaves out). The output layer counts for every
    token, the lookup of embeddings not at all. Frozen matrices have one gradient instead of two, and adapters add theirs.
    Recomputation, norms, rotations and the optimizer are not counted.

    Args:
      num_tokens: tokens without padding.
      num_pairs: attended pairs of tokens.
    """
    config = model.config
    head_sizes = (2 * config.num_kv_heads + 2 * config.num_heads) * config.head_size  # queries, keys, values and the output map
    layer = config.hidden_size * (head_sizes + 3 * config.intermediate_size)
    parameters = config.num_layers * layer + model.vocab_size * config.hidden_size
    flat = nnx.to_flat_state(nnx.state(model))
    looked_up = "" if model.lm_head is None else "embed_tokens"
    frozen = sum(leaf.size for path, leaf in flat if isinstance(leaf, Frozen) and leaf.ndim == 2 and path[0] != looked_up)
    adapters = sum(leaf.size for path, leaf in flat if path[-1] in ("lora_a", "lora_b"))
    products = (6.0 * (parameters + adapters) - 2.0 * frozen) * num_tokens
    return products + 12.0 * config.num_layers * config.num_heads * config.head_size * num_pairs


def mfu(model: Decoder, flops_per_second: float) -> float | None:
    """Return the model FLOPs utilisation of one device, 0 to 1; None for an unknown device or a model that computes in float32."""
    peak = bf16_peak(jax.devices()[0].device_kind)
    return flops_per_second / peak if peak is not None and model.config.compute_dtype == "bfloat16" else None


class StepTimer:
    """Measure the speed of the steps since the last line of the log."""

    def __init__(self, model: Decoder, num_devices: int) -> None:
        self._model, self._num_devices = model, num_devices
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far and start now."""
        self._start, self._tokens, self._waited, self._steps = time.perf_counter(), 0.0, 0.0, 0

    def add(self, num_tokens: float, waited_seconds: float) -> None:
        """Add a step that was dispatched: its tokens without padding, and the time that it waited for its batch."""
        self._tokens += num_tokens
        self._waited += waited_seconds
        self._steps += 1

    def finish(self, metrics: Mapping[str, Array]) -> dict[str, float]:
        """Return the metrics of the last step, for which it waits, with the speed of all; then restart."""
        values = {name: float(value) for name, value in metrics.items()}
        seconds = time.perf_counter() - self._start
        # The pairs are those of the last step: batches differ little in them, and they are a small part of the sum.
        flops = step_flops(self._model, self._tokens, self._steps * values["attended_pairs"])
        if (utilisation := mfu(self._model, flops / seconds / self._num_devices)) is not None:
            values["mfu"] = utilisation
        values |= {
            "model_flops_per_second": flops / seconds,
            "tokens_per_second": self._tokens / seconds,
            "steps_per_second": self._steps / seconds,
            "input_wait_fraction": self._waited / seconds,
        }
        self.restart()
        return values


class MetricsLog:
    """Write scalars of a run as JSON lines and TensorBoard events; with several processes, the first one writes.

    Lines after the step that a run resumes from are dropped, and the events written again from those that are left, so that
    no step is there twice.
    """

    def __init__(self, run_dir: Path, resumed_step: int):
        self._writes = distributed.is_first_process()
        kept = [line for line in read_metrics(run_dir) if line["step"] <= resumed_step]
        evaluated = (line["step"] for line in kept if any(name.startswith(EVALUATION) for name in line))
        self.evaluated_step: int = max(evaluated, default=0)
        """The last step that was evaluated before the run was resumed."""
        if not self._writes:
            return
        file, events = run_dir / "metrics.jsonl", run_dir / "tensorboard"
        write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
        shutil.rmtree(events, ignore_errors=True)
        self._lines = file.open("a", buffering=1, encoding="utf-8")
        self._events = Writer(str(events))
        for line in kept:
            self._add_events(line)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line of scalars."""
        if self._writes:
            line = {"step": step, **values, "unix_seconds": round(time.time(), 3)}
            self._lines.write(json.dumps(line) + "\n")
            self._add_events(line)

    def _add_events(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name not in ("step", "unix_seconds"):
                self._events.add_scalar(name, value, line["step"], wall_time=line.get("unix_seconds"))

    def close(self) -> None:
        """Flush and close the files."""
        if self._writes:
            self._lines.close()
            self._events.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's log, without those that a kill cut short."""
    lines, file = [], run_dir / "metrics.jsonl"
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def read_scores(run_dir: Path, step: int) -> dict[str, float]:
    """Read the scores of the evaluation after a step from a run's log; none if it was not evaluated."""
    lines = (line.items() for line in read_metrics(run_dir) if line["step"] == step)
    return {name.removeprefix(EVALUATION): value for line in lines for name, value in line if name.startswith(EVALUATION)}
