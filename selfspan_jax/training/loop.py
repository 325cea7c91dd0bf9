"""Training: the state, one pure step, and the loop around it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from tensorboard.summary import Writer
from tqdm import tqdm

from selfspan_jax.attention.sequences import SequenceImplementation, attend_in_training
from selfspan_jax.config import TrainConfig
from selfspan_jax.model import Decoder, Frozen
from selfspan_jax.parallel import collectives, distributed, layout
from selfspan_jax.parallel.mesh import check_batch, check_model
from selfspan_jax.training.metrics import peak_fraction, step_flops
from selfspan_jax.weights.checkpoints import TrainingCheckpoints, load_export, save_export


class Batch(Protocol):
    """What training needs of its data: rows of packed examples, as arrays [B, T], and where the data goes on after them.

    Of several processes each has the rows that its devices compute with.
    """

    @property
    def token_ids(self) -> Int[np.ndarray, "B T"]: ...
    @property
    def segment_ids(self) -> Int[np.ndarray, "B T"]:
        """Examples of a row, told apart by number; 0 is padding."""

    @property
    def positions(self) -> Int[np.ndarray, "B T"]:
        """Rotary positions."""

    @property
    def target_mask(self) -> Bool[np.ndarray, "B T"]:
        """True where the token is to be predicted."""

    @property
    def next_example(self) -> int | Sequence[int]:
        """Where data is packed in parts one number for each, 0 where another process packs it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """The arrays of a batch, on the device."""

    token_ids: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    target_mask: Bool[Array, "B T"]

    @classmethod
    def of(cls, batch: Batch) -> DeviceBatch:
        return cls(*(jnp.asarray(getattr(batch, field.name)) for field in dataclasses.fields(cls)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """What training leaves as it is: how the model is built, and the parameters that are frozen."""

    graph: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    frozen: nnx.State
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})
    """Where there is one, `graph` is of one device's share."""

    def model(self, params: nnx.State) -> Decoder:
        """The model with these trainable parameters."""
        return nnx.merge(self.graph, params, self.frozen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    params: nnx.State
    """Those that are trained."""
    opt_state: optax.OptState
    step: Int[Array, ""]


def learning_rate(config: TrainConfig) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, config.final_learning_rate_fraction * config.learning_rate
    )


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW (1711.05101) on clipped gradients; only the matrices of the layers decay."""

    def decays(params):
        return jax.tree.map_with_path(lambda path, _: any(getattr(key, "key", None) == "weight" for key in path), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate(config), config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decays),
    )


def initial_state(model: Decoder, config: TrainConfig) -> tuple[Fixed, TrainState]:
    """The model in two parts: what is trained, with its optimizer's moments, and the rest."""
    graph, *states = nnx.split(model, nnx.Param, Frozen)
    params, frozen = states
    return Fixed(graph, frozen), TrainState(params, optimizer(config).init(params), jnp.zeros((), jnp.int32))


def check_mesh(model: Decoder, config: TrainConfig, mesh: Mesh | None) -> None:
    """Raises ValueError for a mesh that does not divide the model or the batch, or for a model with frozen parameters."""
    if mesh is None:
        return
    check_model(model.config, mesh)
    check_batch(config.batch_size // config.accumulation_steps, mesh, "rows of an accumulation step")
    if jax.tree.leaves(nnx.state(model, Frozen)):
        raise ValueError("mesh: adapters are trained on one device")


def placed_state(model: Decoder, config: TrainConfig, mesh: Mesh) -> tuple[Fixed, TrainState]:
    """As `initial_state`, laid out on a mesh. Batches are for `placed_batch`.

    Raises: as `check_mesh`.
    """
    check_mesh(model, config, mesh)
    _, *states = nnx.split(model, nnx.Param, Frozen)
    params, frozen = states
    params, init = layout.shard_params(params, mesh), optimizer(config).init
    where = jax.tree.map(lambda shape: shape.sharding, layout.shard_params(jax.eval_shape(init, params), mesh))
    moments = jax.jit(init, out_shardings=where)(params)  # never whole on one device
    state = TrainState(params, moments, layout.device_put_global(jnp.zeros((), jnp.int32), mesh, layout.REPLICATED))
    return Fixed(nnx.split(model.shard(mesh))[0], frozen, mesh), state


def placed_batch(batch: Batch, config: TrainConfig, mesh: Mesh | None) -> DeviceBatch:
    """The rows of a batch on the devices that compute with them."""
    if mesh is None:
        return DeviceBatch.of(batch)
    names = [field.name for field in dataclasses.fields(DeviceBatch)]
    return DeviceBatch(*(layout.from_process_local(getattr(batch, name), config.batch_size, mesh) for name in names))


def num_trained(model: Decoder) -> int:
    """Parameters that are trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def loss_sums(
    model: Decoder, batch: DeviceBatch, attention: SequenceImplementation | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy of the targets, summed over them, with their number, how many are predicted right, and what was attended to."""
    attend, pairs = attend_in_training(batch.token_ids, model.vocab, model.config, segment_ids=batch.segment_ids, implementation=attention)
    hidden, _ = model(batch.token_ids, batch.positions, attend)
    logits = model.logits(hidden[:, :-1])
    targets, weights = batch.token_ids[:, 1:], batch.target_mask[:, 1:].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    loss = jnp.sum(losses * weights)
    return loss, {"loss": loss, "right": jnp.sum(right * weights), "targets": jnp.sum(weights), "pairs": pairs}


@functools.partial(jax.jit, static_argnames=("config", "attention"), donate_argnames=("state",))
def train_step(
    fixed: Fixed, state: TrainState, batch: DeviceBatch, config: TrainConfig, attention: SequenceImplementation | None = None
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on the mean loss over all targets of the batch, computed in `config.accumulation_steps` parts.

    Gradients are taken of `state.params` alone: nothing of the size of the frozen parameters is made. On a mesh each device
    takes those of its rows and its heads, kernels included; what the optimizer does is done to the shards where they lie.
    """
    mesh = fixed.mesh

    def loss(params, part):
        return loss_sums(fixed.model(params if mesh is None else collectives.all_gather_embeddings(params, mesh)), part, attention)

    def sums_of_gradients(params, batch):
        def gradients(part):
            return jax.grad(loss, has_aux=True)(params, part)

        if config.accumulation_steps == 1:
            grads, sums = gradients(batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(config.accumulation_steps, -1, *x.shape[1:]), batch)
            shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            add = functools.partial(jax.tree.map, jnp.add)
            (grads, sums), _ = jax.lax.scan(lambda total, part: (add(total, gradients(part)), None), zeros, parts)
        return collectives.psum_gradients(grads, mesh), collectives.psum_data(sums, mesh)

    where = layout.parameter_specs(state.params)
    rows = layout.spec("sequences")
    grads, sums = collectives.shard_map(sums_of_gradients, mesh, (where, rows), (where, layout.REPLICATED))(state.params, batch)
    targets = jnp.maximum(sums["targets"], 1.0)
    grads = jax.tree.map(lambda grad: grad / targets, grads)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes step counts and rates
        rate = learning_rate(config)(state.step)
        updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    metrics = {
        "loss": sums["loss"] / targets,
        "token_accuracy": sums["right"] / targets,
        "gradient_norm": optax.tree.norm(grads),
        "learning_rate": rate,
        "attended_pairs": sums["pairs"],
    }
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics


class TrainingDiverged(ValueError):
    """The loss or its gradient is no longer a number."""


class Stopped(Exception):
    """The time that a run was given is over; its state is on disk."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


class MetricsLog:
    """Scalars of a run as JSON lines and TensorBoard events. Lines after the step that a run resumes from are dropped.

    Of several processes the first writes.
    """

    def __init__(self, run_dir: Path, resumed_step: int):
        self._writes = distributed.is_first_process()
        if not self._writes:
            return
        self._file = run_dir / "metrics.jsonl"
        kept = []
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
                    if json.loads(line)["step"] <= resumed_step:
                        kept.append(line + "\n")
        partial = self._file.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self._file)
        self._lines = self._file.open("a", buffering=1)
        self._events = Writer(str(run_dir / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._writes:
            return
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writes:
            self._lines.close()
            self._events.close()


def prefetched(
    batches: Iterator[Batch], place: Callable[[Batch], DeviceBatch] = DeviceBatch.of, ahead: int = 4
) -> Generator[tuple[Batch, DeviceBatch], None, None]:
    """Batches with their device copies, made by a thread that stays a few batches ahead. Its errors are raised here."""
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
        except BaseException as error:  # handed to the thread that waits for batches
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


def train(
    model: Decoder,
    config: TrainConfig,
    *,
    batches_from: Callable[[Any], Iterator[Batch]],
    run_dir: Path,
    mesh: Mesh | None = None,
    evaluate: Callable[[Decoder], Mapping[str, float]] | None = None,
    resume_from: Path | None = None,
    stop_after_seconds: float | None = None,
) -> Decoder:
    """Trains a model, or goes on where `run_dir` has a checkpoint; the end is the same, bit for bit.

    What is on disk does not depend on the mesh, so a run may go on on another one; sums are then rounded in another order.
    Of several processes, which see the same `run_dir`, all call this; the first writes what is not a checkpoint.

    Args:
      batches_from: the endless batches from a position in the data on: 0, or what a batch has as `next_example`.
      mesh: the devices to train on, by default one.
      evaluate: scores of a model, logged every `config.eval_every_steps` and at the end. Every process computes them.
      resume_from: an export of this run, to go on from where `run_dir` has no checkpoint.
      stop_after_seconds: stop then; with exports, at the first step after it that writes one.

    Returns: the trained model, on one device.
    Raises: ValueError for a mesh that does not fit; TrainingDiverged with the step at which the loss or its gradient was not finite;
      Stopped when the time is over.
    """
    began = time.perf_counter()
    graph, *_ = nnx.split(model, nnx.Param, Frozen)
    fixed, state = initial_state(model, config) if mesh is None else placed_state(model, config, mesh)
    checkpoints = TrainingCheckpoints(run_dir / "checkpoints", config.keep_checkpoints)
    first = distributed.is_first_process()
    next_example: int | Sequence[int] = 0
    if checkpoints.latest_step is not None:
        restored, next_example = checkpoints.restore(state)
        state = layout.from_saved_order(restored, mesh)
    elif resume_from is not None:
        restored, next_example = load_export(resume_from, state)
        state = layout.from_saved_order(restored, mesh)
        if first and (log_there := resume_from / "metrics.jsonl").exists():
            (run_dir / "metrics.jsonl").write_bytes(log_there.read_bytes())
    first_step = int(state.step)
    log = MetricsLog(run_dir, first_step)
    batches = prefetched(batches_from(next_example), functools.partial(placed_batch, config=config, mesh=mesh))
    bar = tqdm(total=config.steps, initial=first_step, desc="train", unit="step", disable=None if first else True)
    window = _Window(model, 1 if mesh is None else mesh.size)

    def trained() -> Decoder:
        return nnx.merge(graph, layout.gather_params(state.params, mesh), fixed.frozen)

    try:
        for step in range(first_step + 1, config.steps + 1):
            waited = time.perf_counter()
            batch, on_device = next(batches)
            waited = time.perf_counter() - waited
            previous = window.latest
            state, metrics = train_step(fixed, state, on_device, config)
            # Of several processes each sees its rows alone, and takes the others for as full.
            num_tokens = np.count_nonzero(batch.segment_ids) * config.batch_size / len(batch.segment_ids)
            window.add(step, metrics, num_tokens, waited)
            if previous:  # fetched while this step runs
                _check_finite(*previous)
            bar.update()
            exports = config.export_every_steps > 0 and step % config.export_every_steps == 0
            stops = False
            if stop_after_seconds is not None and step < config.steps and (exports or not config.export_every_steps):
                stops = bool(collectives.process_max(time.perf_counter() - began >= stop_after_seconds))
            saves = step % config.checkpoint_every_steps == 0 or step == config.steps or stops
            evaluates = step % config.eval_every_steps == 0 or step == config.steps
            if saves or exports or step % config.log_every_steps == 0:
                _check_finite(step, metrics)
                values = window.close()
                log.write(step, values)
                share = f", {100 * values['bf16_peak_fraction']:.1f}% of bf16 peak" if "bf16_peak_fraction" in values else ""
                bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s{share}")
            if exports or saves:
                next_example = collectives.process_max(batch.next_example)
            if exports:
                beside = [file for name in ("run.json", "metrics.jsonl") if (file := run_dir / name).exists()]
                exported = save_export(run_dir / "export", layout.to_saved_order(state, mesh), step, next_example, beside)
                state = layout.from_saved_order(exported, mesh)
                window.restart()
            if saves:
                checkpoints.save(step, layout.to_saved_order(state, mesh), next_example)
            if evaluates and evaluate is not None:
                scores = evaluate(trained())
                log.write(step, {f"eval/{name}": value for name, value in scores.items()})
                if first:
                    bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
                window.restart()
            if stops:
                raise Stopped(step)
    except (RuntimeError, ValueError) as error:
        distributed.exit_if_peer_lost(error)  # before anything is waited for
        raise
    finally:
        bar.close()
        batches.close()
        log.close()
        checkpoints.close()
    return trained()


class _Window:
    """The steps since the last line of the log."""

    def __init__(self, model: Decoder, num_devices: int) -> None:
        self._model = model
        self._num_devices = num_devices
        self.latest: tuple[int, dict[str, Array]] | None = None
        self.restart()

    def restart(self) -> None:
        self._start, self._tokens, self._waited, self._steps = time.perf_counter(), 0.0, 0.0, 0

    def add(self, step: int, metrics: dict[str, Array], tokens: float, waited: float) -> None:
        self.latest = (step, metrics)
        self._tokens += tokens
        self._waited += waited
        self._steps += 1

    def close(self) -> dict[str, float]:
        """The latest metrics with the speed of the window; waits for the device, so that the speed is true."""
        assert self.latest is not None
        values = {name: float(value) for name, value in self.latest[1].items()}
        seconds = time.perf_counter() - self._start
        # The pairs are those of the latest step: batches differ little in them, and they are a small part of the sum.
        flops = step_flops(self._model, self._tokens, self._steps * values["attended_pairs"])
        if (share := peak_fraction(self._model, flops / seconds / self._num_devices)) is not None:
            values["bf16_peak_fraction"] = share
        values |= {
            "model_flops_per_second": flops / seconds,
            "tokens_per_second": self._tokens / seconds,
            "steps_per_second": self._steps / seconds,
            "input_wait_fraction": self._waited / seconds,
        }
        self.restart()
        return values


def _check_finite(step: int, metrics: dict[str, Array]) -> None:
    for name in ("loss", "gradient_norm"):  # a gradient that is no number has spoilt the parameters already
        if not math.isfinite(value := float(metrics[name])):
            raise TrainingDiverged(f"the {name} is {value} at step {step}; the run resumes from its last checkpoint")
