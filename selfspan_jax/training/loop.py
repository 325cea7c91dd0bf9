"""The training loop: dispatch step n, look at the metrics of step n - 1, log, save, evaluate."""

from __future__ import annotations

import contextlib
import functools
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
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
from selfspan_jax.training.step import Batch, DeviceBatch, TrainState, count_tokens, device_batch, initial_state, train_step
from selfspan_jax.weights.checkpoints import TrainingCheckpoints


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
    began = time.perf_counter()
    graph, *_ = nnx.split(model, nnx.Param, Frozen)
    fixed, state = initial_state(model, config, mesh)
    checkpoints = TrainingCheckpoints(run_dir / "checkpoints", config.keep_checkpoints)
    state, next_example = _restore(checkpoints, state, mesh)
    first_step = int(state.step)
    batches = prefetch(batches_from(next_example), functools.partial(device_batch, config=config, mesh=mesh))
    log, bar = MetricsLog(run_dir, first_step), _progress_bar(first_step, config.steps)
    timer = StepTimer(model, 1 if mesh is None else mesh.size)
    metrics: dict[str, Array] = {}

    def trained() -> Decoder:
        return nnx.merge(graph, layout.gather_params(state.params, mesh), fixed.frozen)

    closing = contextlib.closing
    with closing(checkpoints), closing(log), closing(batches), bar, distributed.exit_on_peer_errors():
        for step in range(first_step + 1, config.steps + 1):
            waiting = time.perf_counter()
            batch, on_device = next(batches)
            timer.add(count_tokens(batch, config), time.perf_counter() - waiting)
            previous, (state, metrics) = metrics, train_step(fixed, state, on_device, config)
            _check_finite(step - 1, previous)  # fetched while this step runs
            bar.update()
            last = step == config.steps
            stops = not last and stop_after_seconds is not None and _any_process(time.perf_counter() - began >= stop_after_seconds)
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


def _restore(checkpoints: TrainingCheckpoints, state: TrainState, mesh: Mesh | None) -> tuple[TrainState, int | Sequence[int]]:
    if checkpoints.latest_step is None:
        return state, 0
    restored, next_example = checkpoints.restore(state)
    return layout.from_saved_order(restored, mesh), next_example


def _progress_bar(first_step: int, num_steps: int) -> tqdm:
    hidden = None if distributed.is_first_process() else True  # None hides it only where there is no terminal
    return tqdm(total=num_steps, initial=first_step, desc="train", unit="step", disable=hidden)


def _any_process(condition: bool) -> bool:
    return bool(collectives.process_max(condition))


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
    ready: queue.Queue[Any] = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for batch in batches:
                put((batch, place(batch)))
                if stopped.is_set():
                    return
            put(StopIteration())
        except BaseException as error:  # raised by the thread that waits for batches
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="batches")
    thread.start()
    try:
        while not isinstance(item := ready.get(), BaseException):
            yield item
        if not isinstance(item, StopIteration):
            raise item
    finally:
        stopped.set()
        thread.join()
        if isinstance(batches, Generator):
            batches.close()
