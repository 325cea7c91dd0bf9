"""The training loop: dispatch step n, look at the metrics of step n - 1, log, save, evaluate."""

from __future__ import annotations

import collections
import functools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from selfspan_jax.config import TrainConfig
from selfspan_jax.errors import UserError
from selfspan_jax.model import Decoder, Frozen
from selfspan_jax.parallel import collectives, distributed, layout
from selfspan_jax.parallel.interrupts import Interrupts
from selfspan_jax.parallel.memory import catch_out_of_memory
from selfspan_jax.training.metrics import EVALUATION, MetricsLog, StepTimer
from selfspan_jax.training.step import Batch, DeviceBatch, count_tokens, initial_state, train_step
from selfspan_jax.weights.checkpoints import TrainingCheckpoints


class TrainingDiverged(UserError):
    """The loss or the gradient norm is not finite."""


class Stopped(Exception):
    """A run was stopped by a signal, whose number it has, or by its time limit (0); its state is saved."""

    def __init__(self, step: int, signal: int = 0):
        super().__init__(f"stopped after step {step}")
        self.step, self.signal = step, signal


_TIME_IS_UP = 1  # stands for the time limit beside numbers of signals


@catch_out_of_memory("; more --accumulation-steps, --remat or fewer --sequence-tokens need less")
def train(
    model: Decoder,
    config: TrainConfig,
    *,
    batches_from: Callable[[Any], Iterator[Batch]],
    run_dir: Path,
    mesh: Mesh | None = None,
    evaluate: Callable[[Decoder], Mapping[str, float]] | None = None,
    stop_after_seconds: float | None = None,
    interrupts: Interrupts | None = None,
    progress: bool = False,
) -> Decoder:
    """Train a model, or resume where `run_dir` has a checkpoint; the result is the same, bit for bit.

    Checkpoints do not depend on the mesh, so a run can resume on another one; float32 sums then round in another order. With
    several processes, all call this with the same `run_dir`; the first one writes everything but checkpoints. An evaluation that
    was interrupted is made again when the run goes on.

    Args:
      batches_from: returns endless batches from a position in the data: 0, or a batch's `next_example`.
      mesh: devices to train on; None is one device.
      evaluate: returns scores of a model; called by every process, every `config.eval_every_steps` and at the end.
      stop_after_seconds: save and stop after the first step that ends later than this.
      interrupts: save and stop after the step in which one of them gets a signal, in whichever process.
      progress: show a bar on a terminal, elsewhere print a line for each line of the log.

    Returns: the trained model, on one device.
    Raises: UserError for a mesh that does not divide the model or batch; DoesNotFit where memory does not suffice; TrainingDiverged
      naming the step with a loss or gradient that is not finite; Stopped at the time limit or a signal. A ValueError of the data.
    """
    deadline = math.inf if stop_after_seconds is None else time.perf_counter() + stop_after_seconds
    interrupts = interrupts or Interrupts()
    graph, *_ = nnx.split(model, nnx.Param, Frozen)
    fixed, state = initial_state(model, config, mesh)
    checkpoints = TrainingCheckpoints(run_dir, config.keep_checkpoints)
    next_example: int | Sequence[int] = 0
    if restored := checkpoints.restore(state):
        state, next_example = layout.from_saved_order(restored[0], mesh), restored[1]
    first_step = int(state.step)
    batches = prefetch(batches_from(next_example), functools.partial(DeviceBatch.of, num_rows=config.batch_size, mesh=mesh))
    log = MetricsLog(run_dir, first_step)
    progress = progress and distributed.is_first_process()
    if progress:
        resuming = f"resuming from step {first_step:,} of {config.steps:,}\n" if first_step else ""
        print(f"{resuming}compiling the training step", flush=True)
    # None hides the bar only where there is no terminal
    bar = tqdm(total=config.steps, initial=first_step, desc="train", unit="step", disable=None if progress else True)
    timer = StepTimer(model, 1 if mesh is None else mesh.size)
    metrics: dict[str, Array] = {}
    votes: Any = 0

    def trained() -> Decoder:
        return nnx.merge(graph, *(layout.gather_params(own, mesh) for own in (state.params, fixed.frozen)))

    def save(step: int, batch: Batch) -> None:
        checkpoints.save(step, layout.to_saved_order(state, mesh), collectives.process_max(batch.next_example))

    def is_due(step: int) -> bool:
        return evaluate is not None and step > 0 and (step == config.steps or step % config.eval_every_steps == 0)

    def score(step: int) -> int:
        """Evaluate; return the signal that a process got meanwhile, which ends its evaluation, or 0."""
        try:
            with interrupts.deferred(False):
                if evaluate is not None and not interrupts.signal:
                    scores = evaluate(trained())
                    log.write(step, {f"{EVALUATION}{name}": value for name, value in scores.items()})
                    if progress:
                        bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        except (KeyboardInterrupt, SystemExit):
            if not interrupts.signal:
                raise
        timer.restart()
        return collectives.process_max(interrupts.signal)

    with interrupts.deferred(), closing(checkpoints), closing(log), closing(batches), bar, distributed.exit_if_peer_lost():
        if is_due(first_step) and log.evaluated_step != first_step and (stop := score(first_step)):
            raise Stopped(first_step, stop)
        for step in range(first_step + 1, config.steps + 1):
            waiting = time.perf_counter()
            try:
                batch, on_device = next(batches)
            except ValueError:  # of the data, at which this run would end each time
                if step > first_step + 1 and jax.process_count() == 1:
                    _check_finite(step - 1, metrics)
                    save(step - 1, batch)
                    print(f"the data ends the run: step {step - 1} is saved, --steps {step - 1} makes a model of it", flush=True)
                raise
            timer.add(count_tokens(batch, config), time.perf_counter() - waiting)
            previous, (state, metrics) = metrics, train_step(fixed, state, on_device, config)
            if step == first_step + 1:
                began = time.perf_counter()  # compiled, and not waited for
            _check_finite(step - 1, previous)  # fetched while this step runs
            bar.update()
            wish = interrupts.signal or (_TIME_IS_UP if time.perf_counter() >= deadline else 0)
            asked, votes = votes, collectives.process_max_async(wish, mesh)  # of several processes, looked at a step later
            stop = 0 if step == config.steps else int(votes if jax.process_count() == 1 else asked)
            saves = bool(stop) or step == config.steps or step % config.checkpoint_every_steps == 0
            if saves or step % config.log_every_steps == 0:
                _check_finite(step, metrics)
                log.write(step, values := timer.finish(metrics))
                bar.set_postfix_str(_summary(values))
                if progress and bar.disable:
                    left = (config.steps - step) * (time.perf_counter() - began) / (step - first_step)
                    print(f"step {step:,} of {config.steps:,}: {_summary(values)}, {tqdm.format_interval(left)} left", flush=True)
            if saves:
                save(step, batch)
            if is_due(step) and not stop and (stop := score(step)) and not saves:
                save(step, batch)
            if stop:
                raise Stopped(step, 0 if stop == _TIME_IS_UP else stop)
    return trained()


def _check_finite(step: int, metrics: Mapping[str, Array]) -> None:
    for name in ("loss", "gradient_norm"):  # a gradient that is not finite has spoilt the parameters already
        if name in metrics and not math.isfinite(value := float(metrics[name])):
            raise TrainingDiverged(f"the {name} is {value} at step {step}; the run resumes from its last checkpoint")


def _summary(values: Mapping[str, float]) -> str:
    utilisation = f", {100 * values['mfu']:.1f}% MFU" if "mfu" in values else ""
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
