"""Time skinny GEMMs (few rows) against the read ceiling of the memory, and against XLA.

    python -m benchmarks.linear --json FILE           single matrices and layers, beside XLA (docs/linear.md)
    python -m benchmarks.linear --tune --json FILE    re-derive heuristics.py

What is timed: chains of dependent calls inside one compiled program, each with other weights than the one before, so that
the weights come from memory and not from the cache: single matrices (the result of a call is the residual of the next), and
whole layers without their attention. Microseconds are wall time per call (per layer), launches included, nothing subtracted.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from benchmarks.shapes import ShapeName, matrix_sizes, named_shape
from benchmarks.timing import CACHE_BYTES, KernelReport, median_and_spread, run_seconds
from pallas_kernels import fused_linear, quantize_weight, rotate_and_write
from pallas_kernels.common import MULTIPROCESSORS
from pallas_kernels.linear import expected_bytes
from pallas_kernels.linear.heuristics import MAX_NORM_ROWS, LinearConfig
from pallas_kernels.linear.reference import rms_norm
from pallas_kernels.linear.triton import triton_linear


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix of a decode step and what is fused with it; `num_outputs` counts gate and up."""

    name: str
    num_outputs: int
    num_inputs: int
    norm: bool = False
    gated: bool = False
    float32: bool = False  # the result, as logits are

    @property
    def num_results(self) -> int:
        return self.num_outputs // 2 if self.gated else self.num_outputs

    def options(self) -> dict:
        return {"gated": self.gated, "out_dtype": jnp.float32 if self.float32 else jnp.bfloat16}


_FUSED: dict[str, dict[str, bool]] = {
    "qkv": {"norm": True},
    "o": {},
    "gate-up": {"norm": True, "gated": True},
    "down": {},
    "head": {"norm": True, "float32": True},
}


def _matrices(prefix: str, shape: ShapeName, *names: str) -> list[Matrix]:
    sizes = matrix_sizes(shape)
    return [Matrix(f"{prefix}-{name}", *sizes[name], **_FUSED[name]) for name in names]


MATRICES = (
    *_matrices("7b", "llama2-7b", "qkv", "o", "gate-up", "down", "head"),
    *_matrices("8b", "llama3-8b", "qkv", "gate-up", "down", "head"),
    *_matrices("768", "arithmetic-base", "qkv"),
    *_matrices("576", "smollm2-135m", "gate-up", "head"),
)
LAYERS: tuple[ShapeName, ...] = ("llama2-7b", "llama3-8b")
NUM_LAYERS = 4  # distinct ones in the chain
BATCHES = (1, 8, 32, 64)
IMPLEMENTATIONS = ("triton", "triton+int8", "xla", "xla+int8", "xla [D, M]")


def transposed_linear(x, weight, *, norm=None, residual=None, gated=False, out_dtype=None):
    """Compute what `implementation="xla"` does, with the weight stored `[D, M]`."""
    if norm is not None:
        x = rms_norm(x, norm, 1e-5)
    out = jnp.dot(x, weight, preferred_element_type=out_dtype)
    if gated:
        gate, up = jnp.split(out, 2, axis=-1)
        out = jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
    return out if residual is None else out + residual.astype(out.dtype)


def linear_function(implementation: str):
    """Look up what to time by its name; `+int8` takes int8 weights, `[D, M]` transposed ones."""
    if implementation == "xla [D, M]":
        return transposed_linear
    return functools.partial(fused_linear, implementation=implementation.partition("+")[0])


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def draw_weights(matrix: Matrix, seed: int) -> list[jax.Array]:
    """Draw several weights of unit gain, which together outgrow the cache (24 of the small ones, which come close)."""
    number = min(24, max(2, math.ceil(3 * CACHE_BYTES / (2 * matrix.num_outputs * matrix.num_inputs))))
    scale = matrix.num_inputs**-0.5
    shape = (matrix.num_outputs, matrix.num_inputs)
    make = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * scale)
    return [make(seed + i) for i in range(number)]


def stored_as(implementation: str, weights: list[jax.Array]) -> list:
    """Store the weights as the implementation takes them; int8 ones in twice the number."""
    if implementation.endswith("int8"):
        quantize = jax.jit(quantize_weight)
        return [quantize(w) for w in weights] + [quantize(-w) for w in weights]
    return [jax.jit(jnp.transpose)(w) for w in weights] if implementation == "xla [D, M]" else weights


def chain(linear, options, rounds, x, norm, residual, weights):
    """Run `rounds` times through all the weights, the result of a call being the residual of the next."""

    def body(_, residual):
        for weight in weights:
            # The rows wait for the call before, else XLA would normalise them once for all calls.
            rows, residual = jax.lax.optimization_barrier((x, residual))
            residual = linear(rows, weight, norm=norm, residual=residual, **options)
        return residual

    return jax.lax.fori_loop(0, rounds, body, residual)


def compile_all(programs: dict) -> dict:
    """Compile `name: (function, arguments)` on all processors; what does not compile is an exception."""

    def compile_one(item):
        function, arguments = item
        try:
            return jax.jit(function).lower(*arguments).compile()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(programs, pool.map(compile_one, programs.values()), strict=True))


def time_us(program, arguments, calls: int, runs: int) -> tuple[float, float]:
    """Time a program of so many calls: median microseconds per call and the spread over `runs` repetitions."""
    seconds = run_seconds(lambda: program(*arguments), queued=2, repetitions=runs)  # one queued while the other runs
    return median_and_spread([1e6 * each / calls for each in seconds])


def add_row(report: KernelReport, name: str, batch: int, what: str, microseconds: float, moved_bytes: int, **more) -> None:
    report.add(f"{name:12} B{batch:<3} {what:32}", microseconds, moved_bytes, {"name": name, "batch": batch, "what": what}, **more)


def not_run(name: str, batch: int, what: str, error: Exception) -> None:
    print(f"{name:12} B{batch:<3} {what:32} not run: {str(error).splitlines()[0][:200]}", flush=True)


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.sqrt(jnp.mean((out - expected) ** 2) / jnp.mean(expected**2)))


def run_matrix(matrix: Matrix, variants: dict, seed: int, report: KernelReport, runs: int, run_ms: float = 3.0) -> None:
    """Time `variants` (batch and name: function and how its weights are stored) of one matrix."""
    weights = draw_weights(matrix, seed)
    stored = {kind: stored_as(kind, weights) for kind in dict.fromkeys(kind for _, kind in variants.values())}
    norm = 1.0 + 0.1 * draw(seed + 1, matrix.num_inputs) if matrix.norm else None
    options = matrix.options()
    batches = dict.fromkeys(batch for batch, _ in variants)
    inputs = {
        b: (draw(seed + 2, b, matrix.num_inputs), norm, draw(seed + 3, b, matrix.num_results).astype(options["out_dtype"])) for b in batches
    }
    programs: dict[tuple, tuple] = {}
    rounds: dict[tuple, int] = {}
    for (batch, name), (linear, kind) in variants.items():
        moved = expected_bytes(inputs[batch][0], as_stored(matrix, kind), norm=norm, residual=inputs[batch][2], **options)
        guess_ms = len(stored[kind]) * (3.0 + 1.5 * moved / report.ceiling_tbps / 1e6) * 1e-3
        rounds[batch, name] = max(1, round(run_ms / guess_ms))
        programs[batch, name] = (functools.partial(chain, linear, options, rounds[batch, name]), (*inputs[batch], stored[kind]))
    once: dict[tuple, jax.Array] = {}
    for (batch, name), program in compile_all(programs).items():
        kind, arguments = variants[batch, name][1], programs[batch, name][1]
        if isinstance(program, Exception):
            not_run(matrix.name, batch, name, program)
            continue
        error = None
        if "int8" not in kind:
            # The residual adds up to the sum over all weights, times the rounds.
            key = (batch, rounds[batch, name])
            if key not in once:
                once[key] = chain(linear_function("xla"), options, key[1], *inputs[batch], weights)
            error = relative_error(program(*arguments), once[key])
        microseconds, spread = time_us(program, arguments, len(stored[kind]) * rounds[batch, name], runs)
        moved = expected_bytes(arguments[0], as_stored(matrix, kind), norm=norm, residual=arguments[2], **options)
        add_row(report, matrix.name, batch, name, microseconds, moved, spread_microseconds=spread, relative_error=error)
    report.save()


def as_stored(matrix: Matrix, kind: str):
    """Return the shapes of a weight as it is stored."""
    shape = (matrix.num_outputs, matrix.num_inputs)
    if kind.endswith("int8"):
        return jax.eval_shape(quantize_weight, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


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


LAYER_VARIANTS = {  # name: (linear and how its weights are stored, rotation)
    "triton": ("triton", "triton"),
    "triton, rotary by xla": ("triton", "xla"),
    "triton+int8": ("triton+int8", "triton"),
    "xla": ("xla", "xla"),
    "xla, rotary by triton": ("xla", "triton"),
    "xla [D, M]": ("xla [D, M]", "xla"),
}


def run_layers(name: ShapeName, batches: tuple[int, ...], seed: int, report: KernelReport) -> None:
    """Time whole layers of a model without their attention: what stands between two attentions of a decode step."""
    config = named_shape(name).config
    matrices = [size for matrix, size in matrix_sizes(name).items() if matrix != "head"]
    make = jax.jit(lambda seed, size: 0.5 * jax.random.normal(jax.random.key(seed), size, jnp.bfloat16) * size[1] ** -0.5, static_argnums=1)
    seeds = itertools.count(seed)
    layers = [tuple(make(next(seeds), size) for size in matrices) for _ in range(NUM_LAYERS)]
    store: dict[str, Callable] = {"triton+int8": quantize_weight, "xla [D, M]": jnp.transpose}
    stored = {kind: layers for kind, _ in LAYER_VARIANTS.values()}
    stored |= {kind: [tuple(change(w) for w in layer) for layer in layers] for kind, change in store.items()}
    norm = 1.0 + 0.1 * draw(seed + 1, config.hidden_size)
    weight_bytes, rounds = 2 * sum(m * d for m, d in matrices), 10
    programs: dict[tuple, tuple] = {}
    for batch in batches:
        pool = jnp.zeros((batch, config.num_kv_heads, config.head_size), jnp.bfloat16)
        angles = tuple(draw(seed + i, batch, config.head_size // 2).astype(jnp.float32) for i in (5, 6))
        rest = (draw(seed + 4, batch, config.hidden_size), norm, angles, jnp.arange(batch, dtype=jnp.int32))
        for variant, (kind, rotary) in LAYER_VARIANTS.items():
            function = functools.partial(layer_chain, linear_function(kind), rotary, rounds)
            programs[batch, variant] = (function, (*rest, stored[kind], [(pool, pool)] * NUM_LAYERS))
    expected: dict[int, jax.Array] = {}
    for (batch, variant), program in compile_all(programs).items():
        if isinstance(program, Exception):
            not_run(name, batch, variant, program)
            continue
        arguments = programs[batch, variant][1]
        out = program(*arguments)[0]
        error = relative_error(out, expected.setdefault(batch, out))
        microseconds, spread = time_us(program, arguments, rounds * NUM_LAYERS, 5)
        moved = weight_bytes // 2 if "int8" in variant else weight_bytes
        add_row(report, name, batch, variant, microseconds, moved, spread_microseconds=spread, difference_from_first=error)
    report.save()


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


def tune_variants(matrix: Matrix, batches: tuple[int, ...], kinds: list[str]) -> dict:
    variants = {}
    for batch, kind in itertools.product(batches, kinds):
        for config in settings(matrix, batch, "int8" in kind):
            linear = functools.partial(configured_linear, config)
            name = f"{kind} " + "/".join(str(value) for value in config)
            variants[batch, name] = (linear, kind)
    return variants


def configured_linear(config: LinearConfig, x, weight, *, norm, residual, gated, out_dtype):
    if norm is not None and x.shape[0] > MAX_NORM_ROWS:
        x, norm = rms_norm(x, norm, 1e-5), None
    return triton_linear(x, weight, norm, residual, norm_eps=1e-5, gated=gated, out_dtype=out_dtype, config=config)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__.split("\n")[0])
    names = ",".join(matrix.name for matrix in MATRICES)
    parser.add_argument("--matrices", default=names, help="comma-separated, may be empty (default: all: %(default)s)")
    parser.add_argument("--layers", default=",".join(LAYERS), help="comma-separated, may be empty (default: all: %(default)s)")
    parser.add_argument("--batch-size", default=",".join(map(str, BATCHES)), help="rows, comma-separated (default: %(default)s)")
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), help="of the matrices (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="time every sensible setting of the Triton kernel on the matrices instead")
    parser.add_argument("--seed", type=int, default=0, help="of the data (default: %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    args = parser.parse_args(arguments)
    matrices = _chosen(parser, "matrix", args.matrices, {matrix.name: matrix for matrix in MATRICES})
    layers = _chosen(parser, "layer", args.layers, {name: name for name in LAYERS})
    implementations = _split(args.implementations)
    batches = tuple(int(batch) for batch in _split(args.batch_size))
    if jax.devices()[0].platform != "gpu":
        parser.exit(2, f"error: needs a GPU, the default device is a {jax.devices()[0].platform}\n")
    report = KernelReport(args.json, seed=args.seed)
    for layer in () if args.tune else layers:
        run_layers(layer, batches, args.seed, report)
    for matrix in matrices:
        if args.tune:
            kinds = [name for name in implementations if name.startswith("triton")]
            variants = tune_variants(matrix, batches, kinds)
        else:
            variants = {pair: (linear_function(pair[1]), pair[1]) for pair in itertools.product(batches, implementations)}
        run_matrix(matrix, variants, args.seed, report, runs=3 if args.tune else 5)
    return 0


def _split(text: str) -> list[str]:
    # A comma inside brackets belongs to the name.
    names = text.replace("[D, M]", "[D; M]").split(",")
    return [name.strip().replace(";", ",") for name in names if name.strip()]


def _chosen(parser, what: str, text: str, by_name: dict) -> list:
    names = _split(text)
    if unknown := [name for name in names if name not in by_name]:
        parser.exit(2, f"error: unknown {what} {unknown[0]!r}, choose from {', '.join(by_name)}\n")
    return [by_name[name] for name in names]


if __name__ == "__main__":
    sys.exit(main())
