"""What a training step costs: milliseconds, tokens per second, the share of the device's peak, and where the time goes.

The batches lie on the device beforehand, so that the input costs nothing (a run logs `input_wait_fraction` instead). A time
is the wall time of many steps queued one after the other, compilation apart; the shares are from the profiler's events of the
device, summed over its streams.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.timing import device_times, run_seconds, timed
from selfspan_jax import training
from selfspan_jax.attention.sequences import SequenceImplementation
from selfspan_jax.config import TrainConfig
from selfspan_jax.model import Decoder
from selfspan_jax.training.metrics import bf16_peak, mfu, step_flops

REPETITIONS, TRACED_STEPS = 3, 3


def measure(
    model: Decoder,
    config: TrainConfig,
    batches: Iterator[training.Batch],
    *,
    steps: int,
    mesh: Mesh | None = None,
    attention: Sequence[SequenceImplementation] | None = None,
) -> dict[str, Any]:
    """The figures of a training step, for each implementation of its attention.

    Args:
      batches: its first two are what the steps are taken on, in turn.
      steps: of one repetition, 1 and above.
      mesh: the devices to train on, by default one. Tokens and operations are those of all, the share of the peak that of each.
      attention: implementations; by default the project's and cuDNN's on a GPU, XLA's elsewhere.

    Returns: device, shapes, and for each implementation ms, tokens and operations per second, share of the bf16 peak, GB of
    device memory at its peak so far, ms by kind of device operation, and the longest operations.
    """
    names: Sequence[SequenceImplementation] = ("triton", "cudnn") if jax.default_backend() == "gpu" else ("xla",)
    taken = list(itertools.islice(batches, 2))
    if isinstance(batches, Generator):
        batches.close()
    on_device = [training.device_batch(batch, config, mesh) for batch in taken]
    device = jax.local_devices()[0]
    result: dict[str, Any] = {
        "device": device.device_kind,
        "mesh": None if mesh is None else dict(mesh.shape),
        "bf16_peak_flops_per_second": bf16_peak(device.device_kind),
        "jax": jax.__version__,
        "parameters": model.num_parameters,
        "batch_size": config.batch_size,
        "sequence_tokens": config.sequence_tokens,
        "mask": model.config.mask,
        "attention": {},
    }
    tokens = statistics.mean(training.count_tokens(batch, config) for batch in taken)
    for name in names if attention is None else attention:
        fixed, state = training.initial_state(model, config, mesh)
        state = jax.tree.map(jnp.copy, state)  # the step takes its state's memory; the model keeps its own
        feed = itertools.cycle(on_device)

        def run(count: int) -> dict[str, jax.Array]:
            nonlocal state
            for _ in range(count):
                state, metrics = training.train_step(fixed, state, next(feed), config, name)  # noqa: B023
            return jax.block_until_ready(metrics)

        metrics, compile_seconds = timed(run, 1)
        run(2)
        seconds = [elapsed / steps for elapsed in run_seconds(lambda: run(steps), warm_ups=0, repetitions=REPETITIONS)]
        second = statistics.median(seconds)
        flops = step_flops(model, tokens, float(metrics["attended_pairs"]))
        memory = device.memory_stats() or {}
        result["attention"][name] = {
            "ms_per_step": 1e3 * second,
            "ms_of_repetitions": [1e3 * value for value in seconds],
            "tokens_per_second": tokens / second,
            "model_flops_per_step": flops,
            "model_flops_per_second": flops / second,
            "peak_fraction": mfu(model, flops / second / (1 if mesh is None else mesh.size)),
            "attended_pairs": float(metrics["attended_pairs"]),
            "first_step_seconds": compile_seconds,
            "peak_memory_gb": memory["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in memory else None,
            **device_times(lambda: run(TRACED_STEPS), TRACED_STEPS),
        }
        del state
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{result['parameters']:,} parameters, {result['batch_size']} x {result['sequence_tokens']} tokens a step, "
        f"{result['mask']} mask, {result['device']}",
        f"{'attention':12}{'ms/step':>10}{'tokens/s':>14}{'% of peak':>11}",
    ]
    for name, figures in result["attention"].items():
        share = figures["peak_fraction"]
        percent = "-" if share is None else f"{100 * share:.1f}"
        lines.append(f"{name:12}{figures['ms_per_step']:10.1f}{figures['tokens_per_second']:14,.0f}{percent:>11}")
        lines += [f"  {kind:20}{ms:8.1f} ms" for kind, ms in figures["device_ms_by_kind"].items()]
    return "\n".join(lines)
