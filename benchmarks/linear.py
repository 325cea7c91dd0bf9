"""Time skinny GEMMs (few rows) against the read ceiling of the memory, and against XLA.

    python -m benchmarks.linear --json FILE           single matrices and layers, beside XLA (docs/linear.md)
    python -m benchmarks.linear --tune --json FILE    re-derive heuristics.py

What is timed: chains of dependent calls inside one compiled program, each with other weights than the one before, so that
the weights come from memory and not from the cache: single matrices (the result of a call is the residual of the next), and
whole layers without their attention. Microseconds are wall time per call (per layer), launches included, nothing subtracted.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from benchmarks.shapes import ShapeName, matrix_sizes, named_shape
from benchmarks.timing import (
    CACHE_BYTES,
    KernelCommand,
    KernelReport,
    compile_those_that_can,
    median_and_spread,
    relative_error,
    run_command,
    run_seconds,
)
from data import commandline
from pallas_kernels import fused_linear, quantize_weight, rotate_and_write
from pallas_kernels.common import MULTIPROCESSORS
from pallas_kernels.linear import expected_bytes
from pallas_kernels.linear.heuristics import MAX_NORM_ROWS, LinearConfig, TileConfig
from pallas_kernels.linear.reference import rms_norm
from pallas_kernels.linear.triton import triton_linear
from pallas_kernels.linear.triton_tiled import triton_tiled_linear


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix of a decode step and what is fused with it; `num_outputs` counts gate and up."""

    name: str
    num_outputs: int
    num_inputs: int
    norm: bool = False
    gated: bool = False
    out_dtype: Any = jnp.bfloat16

    @property
    def num_results(self) -> int:
        return self.num_outputs // 2 if self.gated else self.num_outputs


_FUSED: dict[str, dict[str, Any]] = {
    "qkv": {"norm": True},
    "o": {},
    "gate-up": {"norm": True, "gated": True},
    "down": {},
    "head": {"norm": True, "out_dtype": jnp.float32},
}


def _matrices(prefix: str, shape: ShapeName, *names: str) -> list[Matrix]:
    sizes = matrix_sizes(shape)
    return [Matrix(f"{prefix}-{name}", *sizes[name], **_FUSED[name]) for name in names]


MATRICES = (
    *_matrices("7b", "llama2-7b", "qkv", "o", "gate-up", "down", "head"),
    *_matrices("8b", "llama3-8b", "qkv", "gate-up", "down", "head"),
    *_matrices("768", "arithmetic-base", "qkv", "o", "gate-up", "down"),
    *_matrices("576", "smollm2-135m", "qkv", "o", "gate-up", "down", "head"),
    *_matrices("512", "arithmetic-small", "qkv", "o", "gate-up", "down"),
)
LAYERS: tuple[ShapeName, ...] = ("llama2-7b", "llama3-8b")
NUM_LAYERS = 4  # distinct ones in the chain
BATCHES = (1, 8, 32, 64)
IMPLEMENTATIONS = ("triton", "triton+int8", "xla", "xla+int8")
LAYER_IMPLEMENTATIONS = ("triton", "triton+int8", "xla")


def linear_function(kind: str) -> Callable:
    """Look up what to time by its name; `+int8` takes int8 weights."""
    return functools.partial(fused_linear, implementation=kind.partition("+")[0])


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def draw_weights(matrix: Matrix, seed: int) -> list[jax.Array]:
    """Draw several weights of unit gain, which together outgrow the cache (24 of the small ones, which come close)."""
    number = min(24, max(2, math.ceil(3 * CACHE_BYTES / (2 * matrix.num_outputs * matrix.num_inputs))))
    make = jax.jit(lambda seed: draw(seed, matrix.num_outputs, matrix.num_inputs) * matrix.num_inputs**-0.5)
    return [make(seed + i) for i in range(number)]


def stored_as(kind: str, weights: Iterable[jax.Array]) -> list:
    """Store weights as an implementation takes them."""
    return list(map(jax.jit(quantize_weight), weights) if kind.endswith("+int8") else weights)


def chain(linear, options, rounds, x, norm, residual, weights):
    """Run `rounds` times through all the weights, the result of a call being the residual of the next."""

    def body(_, residual):
        for weight in weights:
            # The rows wait for the call before, else XLA would normalise them once for all calls.
            rows, residual = jax.lax.optimization_barrier((x, residual))
            residual = linear(rows, weight, norm=norm, residual=residual, **options)
        return residual

    return jax.lax.fori_loop(0, rounds, body, residual)


class Program(NamedTuple):
    """A chain to time: the function and its arguments, how many calls it makes, and the bytes that one of them moves."""

    function: Callable
    arguments: tuple
    calls: int
    moved_bytes: int


def time_programs(name: str, programs: dict[tuple[int, str], Program], compare: Callable, report: KernelReport, runs: int = 5) -> None:
    """Compile programs by batch and variant on all processors, and add a row for each.

    Args:
      compare: batch, variant and the result of a program -> what the row says of its correctness.
    """
    compiled = compile_those_that_can((program.function, program.arguments) for program in programs.values())
    for ((batch, variant), program), run in zip(programs.items(), compiled, strict=True):
        label = f"{name:12} B{batch:<3} {variant:32}"
        if isinstance(run, Exception):
            report.not_run(label, run)
            continue
        more = compare(batch, variant, run(*program.arguments))
        seconds = run_seconds(functools.partial(run, *program.arguments), queued=2, repetitions=runs)  # one queued while the other runs
        microseconds, spread = median_and_spread([1e6 * each / program.calls for each in seconds])
        case = {"name": name, "batch": batch, "what": variant}
        report.add(label, microseconds, program.moved_bytes, case, spread_microseconds=spread, **more)
    report.save()


def run_matrix(matrix: Matrix, variants: dict, seed: int, report: KernelReport, runs: int, run_ms: float = 3.0) -> None:
    """Time `variants` (batch and name: function and how its weights are stored) of one matrix."""
    weights = draw_weights(matrix, seed)
    stored = {}
    for kind in dict.fromkeys(kind for _, kind in variants.values()):
        more = (-weight for weight in weights) if kind.endswith("int8") else ()  # half the bytes, so twice as many
        stored[kind] = stored_as(kind, itertools.chain(weights, more))
    norm = 1.0 + 0.1 * draw(seed + 1, matrix.num_inputs) if matrix.norm else None
    options = {"gated": matrix.gated, "out_dtype": matrix.out_dtype}
    inputs = {
        batch: (draw(seed + 2, batch, matrix.num_inputs), norm, draw(seed + 3, batch, matrix.num_results).astype(matrix.out_dtype))
        for batch in dict.fromkeys(batch for batch, _ in variants)
    }
    programs: dict[tuple[int, str], Program] = {}
    for (batch, name), (linear, kind) in variants.items():
        x, _, residual = inputs[batch]
        weight = stored[kind][0] if kind.endswith("int8") else weights[0]
        moved = expected_bytes(x, weight, norm=norm, residual=residual, **options)
        guess_ms = len(stored[kind]) * (3.0 + 1.5 * moved / report.ceiling_tbps / 1e6) * 1e-3
        rounds = max(1, round(run_ms / guess_ms))
        function = functools.partial(chain, linear, options, rounds)
        programs[batch, name] = Program(function, (*inputs[batch], stored[kind]), rounds * len(stored[kind]), moved)

    @functools.cache
    def expected(batch: int, rounds: int) -> jax.Array:
        # The residual adds up to the sum over all weights, times the rounds.
        return chain(linear_function("xla"), options, rounds, *inputs[batch], weights)

    def compare(batch: int, name: str, out: jax.Array) -> dict:
        if variants[batch, name][1].endswith("int8"):
            return {"relative_error": None}
        return {"relative_error": relative_error(out, expected(batch, programs[batch, name].calls // len(weights)))}

    time_programs(matrix.name, programs, compare, report, runs)


# Whole layers.


def layer_chain(linear, rotary, rounds, x, norm, angles, slots, layers, pools):
    """Run `rounds` times through all layers without attention: the queries stand in for its output."""

    def body(_, carry):
        x, pools = carry
        after = []
        for (qkv, o, gate_up, down), (k_pool, v_pool) in zip(layers, pools, strict=True):
            heads = linear(x, qkv, norm=norm)
            _, num_kv_heads, head_size = k_pool.shape
            heads = heads.reshape(x.shape[0], num_kv_heads, -1, head_size)
            q, k_pool, v_pool = rotate_and_write(heads, *angles, slots, k_pool, v_pool, implementation=rotary)
            x = linear(q.reshape(x.shape[0], -1), o, residual=x)
            x = linear(linear(x, gate_up, norm=norm, gated=True), down, residual=x)
            after.append((k_pool, v_pool))
        return x, after

    return jax.lax.fori_loop(0, rounds, body, (x, pools))


def run_layers(name: ShapeName, batches: Sequence[int], seed: int, report: KernelReport, rounds: int = 10) -> None:
    """Time whole layers of a model without their attention: what stands between two attentions of a decode step."""
    config = named_shape(name).config
    sizes = [size for matrix, size in matrix_sizes(name).items() if matrix != "head"]
    make = jax.jit(lambda seed, size: 0.5 * draw(seed, *size) * size[1] ** -0.5, static_argnums=1)
    layers = [[make(seed + len(sizes) * layer + i, size) for i, size in enumerate(sizes)] for layer in range(NUM_LAYERS)]
    stored = {kind: [stored_as(kind, layer) for layer in layers] for kind in LAYER_IMPLEMENTATIONS}
    norm = 1.0 + 0.1 * draw(seed + 1, config.hidden_size)
    weight_bytes = 2 * sum(m * d for m, d in sizes)
    programs: dict[tuple[int, str], Program] = {}
    for batch in batches:
        pool = jnp.zeros((batch, config.num_kv_heads, config.head_size), jnp.bfloat16)
        angles = tuple(draw(seed + i, batch, config.head_size // 2).astype(jnp.float32) for i in (5, 6))
        rest = (draw(seed + 4, batch, config.hidden_size), norm, angles, jnp.arange(batch, dtype=jnp.int32))
        for kind in LAYER_IMPLEMENTATIONS:
            function = functools.partial(layer_chain, linear_function(kind), kind.partition("+")[0], rounds)
            arguments = (*rest, stored[kind], [(pool, pool)] * NUM_LAYERS)
            programs[batch, kind] = Program(function, arguments, rounds * NUM_LAYERS, weight_bytes // (2 if "int8" in kind else 1))
    first: dict[int, jax.Array] = {}

    def compare(batch: int, variant: str, out: tuple) -> dict:
        return {"difference_from_first": relative_error(out[0], first.setdefault(batch, out[0]))}

    time_programs(name, programs, compare, report)


# Settings of the kernel.


def settings(matrix: Matrix, batch: int, int8: bool) -> list[LinearConfig]:
    """List settings worth a measurement: within the machine's shared memory, with enough bytes in flight."""
    found = []
    item_bytes, halves = 1 if int8 else 2, 2 if matrix.gated else 1
    rows = pl.next_power_of_2(batch)
    shapes = ((32, 2, 8192), (64, 4, 8192), (64, 4, 16384), (64, 4, 32768), (128, 4, 16384), (128, 8, 32768))
    for (tile_rows, warps, step_bytes), segments, programs in itertools.product(shapes, (1, 2, 4, 8), (1, 2, 3, 4)):
        columns = max(8, rows * segments)  # of the matrix unit's product
        if columns > max(8, 2 * rows) or (rows == 1 and segments < 8):
            continue
        inputs = min(step_bytes // item_bytes // tile_rows, (matrix.num_inputs // segments) & -(matrix.num_inputs // segments))
        tile = tile_rows // halves // segments
        if inputs < 32 or tile_rows < 16 * warps or matrix.num_results // tile < (60 if rows > 8 else 100) * programs:
            continue
        read_bytes = (tile_rows * item_bytes + columns * 2) * inputs
        for in_flight in (60_000, 120_000):  # per multiprocessor
            stages = round(in_flight / programs / read_bytes) + 1
            if 2 <= stages <= 12 and stages * read_bytes * programs <= 215_000:
                found.append(LinearConfig(tile, segments, inputs, warps, stages, programs * MULTIPROCESSORS))
    return list(dict.fromkeys(found))


def tile_settings(matrix: Matrix, batch: int) -> list[TileConfig]:
    """List settings of the tiled kernel worth a measurement: programs for a third of the machine at least, eight waves at most."""
    found = []
    rows, halves, inputs = pl.next_power_of_2(batch), 2 if matrix.gated else 1, matrix.num_inputs
    few = batch <= 16
    tiles = (1,) if batch == 1 else (8, 16) if few else (16, 32, 64, 128)
    outputs_of_tile = (2, 4, 8, 16) if batch == 1 else (8, 16, 32) if few else (16, 32, 64, 128)
    for tile_rows, outputs, chunk in itertools.product(tiles, outputs_of_tile, (inputs, 64, 128)):
        whole, read_bytes = chunk == inputs, 2 * (tile_rows + halves * outputs) * chunk
        programs = pl.cdiv(batch, tile_rows) * pl.cdiv(matrix.num_results, outputs)
        if (
            inputs % chunk
            or (whole and batch > 64)
            or not 40 <= programs <= 8 * MULTIPROCESSORS
            or tile_rows > max(16, rows)
            or (batch == 1 and not whole)
        ):
            continue
        for warps in (1, 2, 4) if few else (8,) if tile_rows * outputs * halves >= 128 * 64 else (4,):
            if (read_bytes > 400 * 32 * warps) if whole else 3 * read_bytes > 200_000:
                continue
            stages = 1 if whole else max(2, min(5, 200_000 // read_bytes, inputs // chunk))
            outputs_first = outputs >= 16 and (tile_rows < 16 or outputs >= 64 > tile_rows)  # of at least 16, of 64 on Hopper
            for rows_first in (*(() if 1 < tile_rows < 16 else (True,)), *((False,) if outputs_first and batch > 1 else ())):
                found.append(TileConfig(tile_rows, outputs, chunk, warps, stages, rows_first))
    return list(dict.fromkeys(found))


def configured_linear(config: LinearConfig | TileConfig, x, weight, *, norm, residual, gated, out_dtype):
    options = {"norm_eps": 1e-5, "gated": gated, "out_dtype": out_dtype}
    if isinstance(config, TileConfig):
        return triton_tiled_linear(x, weight, norm, None, residual, config=config, **options)
    if norm is not None and x.shape[0] > MAX_NORM_ROWS:
        x, norm = rms_norm(x, norm, 1e-5), None
    return triton_linear(x, weight, norm, None, residual, config=config, **options)


def variants_of(matrix: Matrix, batches: Sequence[int], implementations: Sequence[str], tune: bool) -> dict:
    """List what to time of a matrix: implementations or, to tune, settings; batch and name: function and how weights are stored."""
    variants: dict[tuple[int, str], tuple[Callable, str]] = {}
    for batch, kind in itertools.product(batches, implementations):
        if not tune:
            variants[batch, kind] = (linear_function(kind), kind)
        elif kind.startswith("triton"):
            for config in (*(settings(matrix, batch, "int8" in kind) if batch <= 64 else ()), *tile_settings(matrix, batch)):
                variants[batch, f"{kind} {'/'.join(map(str, config))}"] = (functools.partial(configured_linear, config), kind)
    return variants


BY_NAME = {matrix.name: matrix for matrix in MATRICES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(KernelCommand):
    """Time skinny GEMMs (few rows) against the read ceiling of the memory, and against XLA."""

    matrices: Annotated[tuple[str, ...], commandline.commas(*BY_NAME, "")] = (*BY_NAME,)
    """May be empty."""
    layers: Annotated[tuple[ShapeName, ...], commandline.commas(*LAYERS, "")] = LAYERS
    """Models whose layers are timed whole, without their attention; may be empty."""
    batch_size: Annotated[tuple[int, ...], commandline.commas(int)] = BATCHES
    """Rows."""
    implementations: Annotated[tuple[str, ...], commandline.commas(*IMPLEMENTATIONS)] = IMPLEMENTATIONS
    """Of the matrices."""
    tune: bool = False
    """Time every sensible setting of the Triton kernel on the matrices instead."""

    def run(self) -> None:
        with self.report() as report:
            for layer in () if self.tune else self.layers:
                run_layers(layer, self.batch_size, self.seed, report)
            for matrix in map(BY_NAME.__getitem__, self.matrices):
                variants = variants_of(matrix, self.batch_size, self.implementations, self.tune)
                run_matrix(matrix, variants, self.seed, report, runs=3 if self.tune else 5)


def main(arguments: list[str] | None = None) -> None:
    run_command(Linear, arguments)


if __name__ == "__main__":
    main()
