"""The training loop: dispatch step n, look at the metrics of step n - 1, log, save, evaluate."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from selfspan_jax.config import TrainConfig
from selfspan_jax.errors import UserError
from selfspan_jax.model import Decoder, Frozen
from selfspan_jax.parallel import collectives, distributed, layout
from selfspan_jax.training.metrics import MetricsLog, StepTimer
from selfspan_jax.training.runs import TrainingCheckpoints
from selfspan_jax.training.step import Batch, DeviceBatch, count_tokens, initial_state, train_step


class TrainingDiverged(UserError):
    """The loss or the gradient norm is not finite."""


class Stopped(Exception):
    """A run reached its time limit; its state is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


def train(
    model: Decoder,
    config: TrainConfig,
    *,
    batches_from: Callable[[Any], Iterator[Batch]],
    run_dir: Path,
    mesh: Mesh | None = None,
    evaluate: Callable[[Decoder], Mapping[str, float]] | None = None,
    stop_after_seconds: float | None = None,
) -> Decoder:
    """Train a model, or resume where `run_dir` has a checkpoint; the result is the same, bit for bit.

    Checkpoints do not depend on the mesh, so a run can resume on another one; float32 sums then round in another order. With
    several processes, all call this with the same `run_dir`; the first one writes everything but checkpoints.

    Args:
      batches_from: returns endless batches from a position in the data: 0, or a batch's `next_example`.
      mesh: devices to train on; None is one device.
      evaluate: returns scores of a model; called by every process, every `config.eval_every_steps` and at the end.
      stop_after_seconds: save and stop after the first step that ends later than this.

    Returns: the trained model, on one device.
    Raises: UserError for a mesh that does not divide the model or batch; TrainingDiverged naming the step with a loss or gradient
      that is not finite; Stopped at the time limit.
    """
    deadline = math.inf if stop_after_seconds is None else time.perf_counter() + stop_after_seconds
    graph, *_ = nnx.split(model, nnx.Param, Frozen)
    fixed, state = initial_state(model, config, mesh)
    checkpoints = TrainingCheckpoints(run_dir / "checkpoints", config.keep_checkpoints)
    next_example: int | Sequence[int] = 0
    if checkpoints.latest_step is not None:
        state, next_example = checkpoints.restore(state)
        state = layout.from_saved_order(state, mesh)
    first_step = int(state.step)
    batches = prefetch(batches_from(next_example), functools.partial(DeviceBatch.of, num_rows=config.batch_size, mesh=mesh))
    log = MetricsLog(run_dir, first_step)
    hidden = None if distributed.is_first_process() else True  # None hides it only where there is no terminal
    bar = tqdm(total=config.steps, initial=first_step, desc="train", unit="step", disable=hidden)
    timer = StepTimer(model, 1 if mesh is None else mesh.size)
    metrics: dict[str, Array] = {}

    def trained() -> Decoder:
        return nnx.merge(graph, layout.gather_params(state.params, mesh), fixed.frozen)

    closing = contextlib.closing
    with closing(checkpoints), closing(log), closing(batches), bar, distributed.exit_if_peer_lost():
        for step in range(first_step + 1, config.steps + 1):
            waiting = time.perf_counter()
            batch, on_device = next(batches)
            timer.add(count_tokens(batch, config), time.perf_counter() - waiting)
            previous, (state, metrics) = metrics, train_step(fixed, state, on_device, config)
            _check_finite(step - 1, previous)  # fetched while this step runs
            bar.update()
            last = step == config.steps
            stops = not last and deadline < math.inf and bool(collectives.process_max(time.perf_counter() >= deadline))
            saves = last or stops or step % config.checkpoint_every_steps == 0
            if saves or step % config.log_every_steps == 0:
                _check_finite(step, metrics)
                log.write(step, values := timer.finish(metrics))
                bar.set_postfix_str(_summary(values))
            if saves:
                checkpoints.save(step, layout.to_saved_order(state, mesh), collectives.process_max(batch.next_example))
            if evaluate is not None and (last or step % config.eval_every_steps == 0):
                scores = evaluate(trained())
                log.write(step, {f"eval/{name}": value for name, value in scores.items()})
                if distributed.is_first_process():
                    bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
                timer.restart()
            if stops:
                raise Stopped(step)
    return trained()


def _check_finite(step: int, metrics: Mapping[str, Array]) -> None:
    for name in ("loss", "gradient_norm"):  # a gradient that is not finite has spoilt the parameters already
        if name in metrics and not math.isfinite(value := float(metrics[name])):
            raise TrainingDiverged(f"the {name} is {value} at step {step}; the run resumes from its last checkpoint")


def _summary(values: Mapping[str, float]) -> str:
    utilisation = f", {100 * values['bf16_peak_fraction']:.1f}% MFU" if "bf16_peak_fraction" in values else ""
    return f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s{utilisation}"


def prefetch(
    batches: Iterator[Batch], place: Callable[[Batch], DeviceBatch] = DeviceBatch.of, ahead: int = 4
) -> Generator[tuple[Batch, DeviceBatch], None, None]:
    """Yield batches with their device copies, which a thread makes a few batches ahead. Its errors are raised here."""

    def take() -> tuple[Batch, DeviceBatch] | None:
        return None if (batch := next(batches, None)) is None else (batch, place(batch))

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        taken = collections.deque(thread.submit(take) for _ in range(ahead))
        try:
            while (item := taken.popleft().result()) is not None:
                taken.append(thread.submit(take))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)
            if isinstance(batches, Generator):
                batches.close()
