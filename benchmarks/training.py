"""Measure training steps: milliseconds, tokens per second, MFU, memory, and the device's time by kind of operation.

    python -m benchmarks.training --shape arithmetic-base --tokens 512,4096,8192 --json FILE
    python -m benchmarks.training --shape llama3-8b --rank 16 --mesh fsdp=2 --tokens 4096 --step-tokens 32768 --remat --json FILE

The batches are on the device beforehand, so input costs nothing (a run logs `input_wait_fraction` instead). A time is the wall
time of many steps queued one after the other, compilation excluded. Times by kind are the profiler's, summed over streams.

`train.py --time-steps` measures a run as it is. The command measures a shape with random weights at several lengths, as many tokens in
each step: every row is one sequence of the whole length, which is the most that attention can have to do.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import statistics
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks.decoding import footprint
from benchmarks.shapes import Shape, ShapeName, named_shape
from benchmarks.timing import device_times, run_command, run_seconds, timed
from benchmarks.workloads import arithmetic_tokens, segment_tokens
from data import arithmetic, commandline
from data.errors import check_range
from data.packing import Batch
from selfspan_jax import files, training
from selfspan_jax.attention.sequences import SequenceImplementation, training_implementation
from selfspan_jax.config import LoraConfig, TrainConfig
from selfspan_jax.errors import UserError
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import distributed
from selfspan_jax.parallel.memory import DoesNotFit, catch_out_of_memory, check_fits
from selfspan_jax.parallel.mesh import training_mesh
from selfspan_jax.training.metrics import bf16_peak, mfu, step_flops
from selfspan_jax.weights import lora

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
      mesh: the devices to train on, by default one. Tokens and operations are those of all devices, MFU and memory are per device.

    Returns: device, sizes, the implementation that training takes by itself, and the figures of each, see `CompiledSteps.measure`.
    """
    (compiled,) = compile_steps([(model, config, batches)], mesh)
    return compiled.measure(steps)


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """A training step, compiled with each implementation of its attention, before any is taken."""

    model: Decoder
    config: TrainConfig
    mesh: Mesh | None
    batches: Sequence[training.DeviceBatch]
    tokens: float  # of a step, without padding
    fixed: training.Fixed
    state: training.TrainState
    programs: dict[SequenceImplementation, tuple[Any, float]]  # and the seconds of compilation

    def measure(self, steps: int) -> dict[str, Any]:
        """Take steps: milliseconds, tokens and model FLOPs per second, MFU, GB of arguments, results and temporaries
        of the compiled step, milliseconds by kind of device operation, the longest operations, and the longest passes over arrays."""
        device_kind = jax.local_devices()[0].device_kind
        return {
            "device": device_kind,
            "mesh": None if self.mesh is None else dict(self.mesh.shape),
            "bf16_peak_flops_per_second": bf16_peak(device_kind),
            "jax": jax.__version__,
            "parameters": self.model.num_parameters,
            "trained": training.num_trained(self.model),
            "batch_size": self.config.batch_size,
            "sequence_tokens": self.config.sequence_tokens,
            "remat": self.model.config.remat,
            "mask": self.model.config.mask,
            "training_takes": training_implementation(self.model.config, self.config.sequence_tokens) or [*self.programs][-1],
            "attention": {name: self._measure(*program, steps) for name, program in self.programs.items()},
        }

    def _measure(self, program: Any, compile_seconds: float, steps: int) -> dict[str, Any]:
        compiled = {"compile_seconds": compile_seconds, "memory_gb": footprint(program) / 1e9}
        state, feed = self.state, itertools.cycle(self.batches)

        def run(count: int) -> dict[str, jax.Array]:
            nonlocal state
            metrics: dict[str, jax.Array] = {}
            for _ in range(count):
                state, metrics = program(self.fixed, state, next(feed))
            return metrics

        try:
            with catch_out_of_memory():
                check_fits(footprint(program))
                state = jax.tree.map(jnp.copy, state)  # a step donates its state; the model keeps its own
                metrics, _ = timed(run, 3)
                seconds = [elapsed / steps for elapsed in run_seconds(lambda: run(steps), warm_ups=0, repetitions=REPETITIONS)]
                profile = device_times(lambda: run(TRACED_STEPS), TRACED_STEPS, program.as_text())
        except DoesNotFit as reason:
            return {"not_run": str(reason), **compiled}
        second = statistics.median(seconds)
        flops = step_flops(self.model, self.tokens, float(metrics["attended_pairs"]))
        return {
            "ms_per_step": 1e3 * second,
            "ms_of_repetitions": [1e3 * value for value in seconds],
            "tokens_per_second": self.tokens / second,
            "model_flops_per_step": flops,
            "model_flops_per_second": flops / second,
            "mfu": mfu(self.model, flops / second / (1 if self.mesh is None else self.mesh.size)),
            "attended_pairs": float(metrics["attended_pairs"]),
            **compiled,
            **profile,
        }


def compile_steps(
    runs: Iterable[tuple[Decoder, TrainConfig, Iterator[training.Batch]]],
    mesh: Mesh | None = None,
    attention: Sequence[SequenceImplementation] = (),
) -> list[CompiledSteps]:
    """Compile the steps of some runs: traced one after the other, compiled side by side because XLA leaves most processors idle on one.

    Args:
      attention: the implementations; by default what training takes, and beside it Triton's and cuDNN's on a GPU, XLA's elsewhere.
    """
    traced: list[tuple[dict[str, Any], dict[SequenceImplementation, Any]]] = []
    for model, config, batches in runs:
        taken = list(itertools.islice(batches, 2))
        if isinstance(batches, Generator):
            batches.close()
        tokens = statistics.mean(training.count_tokens(batch, config) for batch in taken)
        on_device = [training.DeviceBatch.of(batch, num_rows=config.batch_size, mesh=mesh) for batch in taken]
        fixed, state = training.initial_state(model, config, mesh)
        best = training_implementation(model.config, config.sequence_tokens) or "triton"
        usual: Iterable[SequenceImplementation] = dict.fromkeys((best, "triton", "cudnn")) if jax.default_backend() == "gpu" else ("xla",)
        names = attention or usual
        run = {"model": model, "config": config, "mesh": mesh, "batches": on_device, "tokens": tokens, "fixed": fixed, "state": state}
        traced.append((run, {name: training.train_step.lower(fixed, state, on_device[0], config, name) for name in names}))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = [(run, {name: pool.submit(timed, one.compile) for name, one in lowered.items()}) for run, lowered in traced]
        return [CompiledSteps(**run, programs={name: one.result() for name, one in own.items()}) for run, own in waiting]


def table(result: dict[str, Any]) -> str:
    """Format what `measure` returned."""
    lines = [
        f"{result['parameters']:,} parameters, {result['batch_size']} x {result['sequence_tokens']} tokens a step, "
        f"{result['mask']} mask, {result['device']}; training takes {result['training_takes']}",
        f"{'attention':12}{'ms/step':>10}{'tokens/s':>14}{'MFU, %':>11}{'GB':>8}",
    ]
    for name, figures in result["attention"].items():
        if "not_run" in figures:
            lines.append(f"{name:12}not run: {figures['not_run']}")
            continue
        fraction = figures["mfu"]
        percent = "-" if fraction is None else f"{100 * fraction:.1f}"
        speed = f"{figures['ms_per_step']:10.1f}{figures['tokens_per_second']:14,.0f}{percent:>11}"
        lines.append(f"{name:12}{speed}{figures['memory_gb']:8.1f}")
        lines += [f"  {kind:20}{ms:8.1f} ms" for kind, ms in figures["device_ms_by_kind"].items()]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Time training steps of a shape at several lengths."""

    shape: ShapeName = "arithmetic-base"
    mask: Literal["span", "dense"] | None = None
    """Of training; by default the shape's own."""
    tokens: Annotated[tuple[int, ...], commandline.commas(int)] = (512, 4096, 8192)
    """Lengths of the rows."""
    step_tokens: int = 65_536
    """Tokens of a step, a multiple of each length."""
    rank: int = 0
    """Train adapters of this rank and the rows of the span tokens, of a published shape with its own vocabulary; 0: all parameters."""
    mesh: str | None = None
    """Devices, as in data=2 or fsdp=2; by default one."""
    layers: int | None = None
    """Fewer layers than the shape has, for a try."""
    remat: bool = False
    """Compute each layer's activations again for its gradient, in place of keeping them."""
    attention: Annotated[tuple[SequenceImplementation, ...], commandline.commas(*get_args(SequenceImplementation))] = ()
    """Implementations of attention; by default what training takes, and beside it triton and cudnn on a GPU, xla elsewhere."""
    steps: int = 5
    """Of one repetition."""
    seed: int = 0
    """Of weights and sequences."""
    json: Path | None = None
    """Write the figures of each length into this file, as soon as they are there; - is standard output."""

    def __post_init__(self):
        check_range(self, "tokens", "step_tokens", "steps", low=1)
        check_range(self, "seed", "rank", low=0)
        if wrong := [tokens for tokens in self.tokens if self.step_tokens % tokens]:
            raise UserError(f"step_tokens is {self.step_tokens}; allowed: multiples of {wrong[0]}")

    def run(self) -> None:
        shape, mesh = named_shape(self.shape, arithmetic_vocab=not self.rank), training_mesh(self.mesh)
        changes: dict[str, Any] = {
            "mask": self.mask,
            "num_layers": self.layers,
            "remat": self.remat,
            "max_context_tokens": max(self.tokens),
        }
        config = dataclasses.replace(shape.config, **{name: value for name, value in changes.items() if value is not None})
        shape = dataclasses.replace(shape, config=config)
        if self.rank:  # drawn in the compute dtype: in float32 a model of 8 billion parameters would take 32 GB
            model = lora.adapt(shape.random(self.seed), LoraConfig(rank=self.rank))
        else:
            model = Decoder(config, vocab=shape.vocab, vocab_size=shape.vocab_size, rngs=nnx.Rngs(self.seed))
        report: dict[str, Any] = {"shape": self.shape, "step_tokens": self.step_tokens, "seed": self.seed, "rank": self.rank, "lengths": []}
        runs = []
        for tokens in self.tokens:
            rows = TrainConfig(steps=1_000, batch_size=self.step_tokens // tokens, sequence_tokens=tokens, seed=self.seed)
            runs.append((model, rows, itertools.repeat(self.sequences(rows, shape))))
        for compiled in compile_steps(runs, mesh, self.attention):
            figures = compiled.measure(self.steps)
            report["lengths"].append(figures)
            print(table(figures), flush=True)
            files.write_rows(self.json, report, complete=False)
        files.write_rows(self.json, report, complete=True)

    def sequences(self, rows: TrainConfig, shape: Shape) -> Batch:
        """Draw expressions with responses, or documents whose response reads a tenth of them; each token after the prompt is a target."""
        size = {"batch_size": rows.batch_size, "num_tokens": rows.sequence_tokens, "seed": self.seed}
        if self.rank:
            token_ids = segment_tokens(shape, steps=rows.sequence_tokens // 8, attended_fraction=0.1, **size)
        else:
            token_ids = arithmetic_tokens(arithmetic.ArithmeticTask(), steps=1, **size)
        index = np.broadcast_to(np.arange(rows.sequence_tokens, dtype=np.int32), token_ids.shape)
        is_response = np.cumsum(token_ids == shape.vocab.solve_id, axis=1) > 0
        return Batch(token_ids, np.ones_like(token_ids), index, is_response & (token_ids != shape.vocab.solve_id), next_example=0)


def main(argv: list[str] | None = None) -> None:
    run_command(Lengths, argv)


if __name__ == "__main__":
    main()
