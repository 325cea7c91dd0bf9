"""Measure training steps: milliseconds, tokens per second, MFU, and the device's time by kind of operation.

The batches are on the device beforehand, so input costs nothing (a run logs `input_wait_fraction` instead). A time is the wall
time of many steps queued one after the other, compilation excluded. Times by kind are the profiler's, summed over streams.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.timing import device_times, run_seconds, timed
from selfspan_jax import files, training
from selfspan_jax.attention.sequences import SequenceImplementation
from selfspan_jax.config import TrainConfig
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import distributed
from selfspan_jax.training.metrics import bf16_peak, mfu, step_flops

REPETITIONS, TRACED_STEPS = 3, 3


def run(model: Decoder, config: TrainConfig, batches: Iterator[training.Batch], file: Path, **options: Any) -> None:
    """Measure a training step, write the figures into a JSON file and print them; see `measure`. The first of several processes does."""
    figures = measure(model, config, batches, **options)
    if distributed.is_first_process():
        files.write_json(file, figures)
    distributed.log_once(table(figures))


def measure(
    model: Decoder, config: TrainConfig, batches: Iterator[training.Batch], *, steps: int, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Measure a training step with each implementation of its attention: the project's and cuDNN's on a GPU, XLA's elsewhere.

    Args:
      batches: the steps are taken on the first two, in turn.
      steps: of one repetition, 1 and above.
      mesh: the devices to train on, by default one. Tokens and operations are those of all devices, MFU is per device.

    Returns: device, sizes, and the figures of each implementation, see `_measure_steps`.
    """
    names: Sequence[SequenceImplementation] = ("triton", "cudnn") if jax.default_backend() == "gpu" else ("xla",)
    taken = list(itertools.islice(batches, 2))
    if isinstance(batches, Generator):
        batches.close()
    tokens = statistics.mean(training.count_tokens(batch, config) for batch in taken)
    on_device = [training.DeviceBatch.of(batch, num_rows=config.batch_size, mesh=mesh) for batch in taken]
    device_kind = jax.local_devices()[0].device_kind
    return {
        "device": device_kind,
        "mesh": None if mesh is None else dict(mesh.shape),
        "bf16_peak_flops_per_second": bf16_peak(device_kind),
        "jax": jax.__version__,
        "parameters": model.num_parameters,
        "batch_size": config.batch_size,
        "sequence_tokens": config.sequence_tokens,
        "mask": model.config.mask,
        "attention": {name: _measure_steps(model, config, on_device, tokens, steps, mesh, name) for name in names},
    }


def _measure_steps(
    model: Decoder,
    config: TrainConfig,
    batches: Sequence[training.DeviceBatch],
    tokens: float,
    steps: int,
    mesh: Mesh | None,
    attention: SequenceImplementation,
) -> dict[str, Any]:
    """Measure steps of `tokens` tokens.

    Returns: milliseconds, tokens and model FLOPs per second, MFU ("mfu"), the device memory's peak so far in GB,
    milliseconds by kind of device operation, and the longest operations.
    """
    fixed, state = training.initial_state(model, config, mesh)
    state = jax.tree.map(jnp.copy, state)  # a step donates its state; the model keeps its own
    feed = itertools.cycle(batches)

    def run(count: int) -> dict[str, jax.Array]:
        nonlocal state
        metrics: dict[str, jax.Array] = {}
        for _ in range(count):
            state, metrics = training.train_step(fixed, state, next(feed), config, attention)
        return metrics

    metrics, first_step_seconds = timed(run, 1)
    timed(run, 2)
    seconds = [elapsed / steps for elapsed in run_seconds(lambda: run(steps), warm_ups=0, repetitions=REPETITIONS)]
    second = statistics.median(seconds)
    flops = step_flops(model, tokens, float(metrics["attended_pairs"]))
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "ms_per_step": 1e3 * second,
        "ms_of_repetitions": [1e3 * value for value in seconds],
        "tokens_per_second": tokens / second,
        "model_flops_per_step": flops,
        "model_flops_per_second": flops / second,
        "mfu": mfu(model, flops / second / (1 if mesh is None else mesh.size)),
        "attended_pairs": float(metrics["attended_pairs"]),
        "first_step_seconds": first_step_seconds,
        "peak_memory_gb": memory["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in memory else None,
        **device_times(lambda: run(TRACED_STEPS), TRACED_STEPS),
    }


def table(result: dict[str, Any]) -> str:
    """Format what `measure` returned."""
    lines = [
        f"{result['parameters']:,} parameters, {result['batch_size']} x {result['sequence_tokens']} tokens a step, "
        f"{result['mask']} mask, {result['device']}",
        f"{'attention':12}{'ms/step':>10}{'tokens/s':>14}{'MFU, %':>11}",
    ]
    for name, figures in result["attention"].items():
        fraction = figures["mfu"]
        percent = "-" if fraction is None else f"{100 * fraction:.1f}"
        lines.append(f"{name:12}{figures['ms_per_step']:10.1f}{figures['tokens_per_second']:14,.0f}{percent:>11}")
        lines += [f"  {kind:20}{ms:8.1f} ms" for kind, ms in figures["device_ms_by_kind"].items()]
    return "\n".join(lines)
