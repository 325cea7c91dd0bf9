"""Time products of few rows against the read ceiling of the memory, and against XLA.

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
import json
import math
import os
import pathlib
import sys

import jax
import jax.numpy as jnp

from benchmarks.timing import CACHE_BYTES, header_line, median_and_spread, report_header, run_seconds
from pallas_kernels import fused_linear, quantize_weight, rotate_and_write
from pallas_kernels.common import MULTIPROCESSORS
from pallas_kernels.linear import expected_bytes
from pallas_kernels.linear.heuristics import MAX_NORM_ROWS, LinearConfig
from pallas_kernels.linear.reference import rms_norm
from pallas_kernels.linear.triton import triton_linear


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A product of a decode step; `num_outputs` counts gate and up."""

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


MATRICES = (
    Matrix("7b-qkv", 12288, 4096, norm=True),
    Matrix("7b-o", 4096, 4096),
    Matrix("7b-gate-up", 22016, 4096, norm=True, gated=True),
    Matrix("7b-down", 4096, 11008),
    Matrix("7b-head", 32000, 4096, norm=True, float32=True),
    Matrix("8b-qkv", 6144, 4096, norm=True),
    Matrix("8b-gate-up", 28672, 4096, norm=True, gated=True),
    Matrix("8b-down", 4096, 14336),
    Matrix("8b-head", 128256, 4096, norm=True, float32=True),
    Matrix("768-qkv", 2304, 768, norm=True),
    Matrix("576-gate-up", 3072, 576, norm=True, gated=True),
    Matrix("576-head", 49152, 576, norm=True, float32=True),
)
BATCHES = (1, 8, 32, 64)
IMPLEMENTATIONS = ("triton", "triton+int8", "xla", "xla+int8", "xla [D, M]")


def transposed_linear(x, weight, *, norm=None, residual=None, gated=False, out_dtype=None):
    """What `implementation="xla"` does, with the weight stored `[D, M]`."""
    if norm is not None:
        x = rms_norm(x, norm, 1e-5)
    out = jnp.dot(x, weight, preferred_element_type=out_dtype)
    if gated:
        gate, up = jnp.split(out, 2, axis=-1)
        out = jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
    return out if residual is None else out + residual.astype(out.dtype)


def linear_function(implementation: str):
    """What to time, by name; `+int8` wants int8 weights, `[D, M]` the transposed ones."""
    if implementation == "xla [D, M]":
        return transposed_linear
    return functools.partial(fused_linear, implementation=implementation.partition("+")[0])


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def draw_weights(matrix: Matrix, seed: int) -> list[jax.Array]:
    """Several weights of unit gain, which together outgrow the cache (24 of the small ones, which come close)."""
    number = min(24, max(2, math.ceil(3 * CACHE_BYTES / (2 * matrix.num_outputs * matrix.num_inputs))))
    scale = matrix.num_inputs**-0.5
    shape = (matrix.num_outputs, matrix.num_inputs)
    make = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * scale)
    return [make(seed + i) for i in range(number)]


def stored_as(implementation: str, weights: list[jax.Array]) -> list:
    """The weights as the implementation wants them; int8 ones come in twice the number, where that fits."""
    if implementation.endswith("int8"):
        quantize = jax.jit(quantize_weight)
        return [quantize(w) for w in weights] + [quantize(-w) for w in weights]
    return [jax.jit(jnp.transpose)(w) for w in weights] if implementation == "xla [D, M]" else weights


def chain(linear, options, rounds, x, norm, residual, weights):
    """`rounds` times through all the weights."""

    def body(_, residual):
        for weight in weights:
            # The rows wait for the call before, else XLA would normalise them once for all calls.
            rows, residual = jax.lax.optimization_barrier((x, residual))
            residual = linear(rows, weight, norm=norm, residual=residual, **options)
        return residual

    return jax.lax.fori_loop(0, rounds, body, residual)


def compile_all(programs: dict) -> dict:
    """Compiled programs of `name: (function, arguments)`, on all processors; what does not compile is an exception."""

    def compile_one(item):
        function, arguments = item
        try:
            return jax.jit(function).lower(*arguments).compile()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(programs, pool.map(compile_one, programs.values()), strict=True))


def time_us(program, arguments, calls: int, runs: int) -> tuple[float, float]:
    """Median microseconds per call and the spread (largest minus smallest) of `runs` of a program of so many calls."""
    seconds = run_seconds(lambda: program(*arguments), queued=2, repetitions=runs)  # one queued while the other runs
    return median_and_spread([1e6 * each / calls for each in seconds])


class Report:
    """Rows that are printed as they come, and the JSON beside them."""

    def __init__(self, seed: int, path: pathlib.Path | None):
        header = report_header()
        self.ceiling_tbps = header["read_ceiling_terabytes_per_second"]
        self.path = path
        self.content = {**header, "seed": seed, "cases": []}
        print(header_line(header), flush=True)

    def add(self, name: str, batch: int, what: str, microseconds: float, moved_bytes: int, **more) -> None:
        floor_us = moved_bytes / self.ceiling_tbps / 1e6
        row = {"name": name, "batch": batch, "what": what, "microseconds": microseconds, "bytes": moved_bytes}
        row |= {"floor_microseconds": floor_us, "percent_of_ceiling": 100 * floor_us / microseconds, **more}
        self.content["cases"].append(row)
        print(
            f"{name:12} B{batch:<3} {what:32}{microseconds:9.2f} us {moved_bytes / microseconds / 1e6:6.2f} TB/s "
            f"{row['percent_of_ceiling']:4.0f}%",
            flush=True,
        )

    def save(self) -> None:
        if self.path:  # now and then, so that a run cut short leaves what it has
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.sqrt(jnp.mean((out - expected) ** 2) / jnp.mean(expected**2)))


def run_matrix(matrix: Matrix, variants: dict, seed: int, report: Report, runs: int, run_ms: float = 3.0) -> None:
    """Times `variants` (batch and name: function and how its weights are stored) of one matrix."""
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
            print(f"{matrix.name:12} B{batch:<3} {name:32} not run: {str(program).splitlines()[0][:200]}", flush=True)
            continue
        error = None
        if "int8" not in kind:
            # The residual adds up to the sum of all the weights' products, times the rounds.
            key = (batch, rounds[batch, name])
            if key not in once:
                once[key] = chain(linear_function("xla"), options, key[1], *inputs[batch], weights)
            error = relative_error(program(*arguments), once[key])
        microseconds, spread = time_us(program, arguments, len(stored[kind]) * rounds[batch, name], runs)
        moved = expected_bytes(arguments[0], as_stored(matrix, kind), norm=norm, residual=arguments[2], **options)
        report.add(matrix.name, batch, name, microseconds, moved, spread_microseconds=spread, relative_error=error)
    report.save()


def as_stored(matrix: Matrix, kind: str):
    """The weight as shapes."""
    shape = (matrix.num_outputs, matrix.num_inputs)
    if kind.endswith("int8"):
        return jax.eval_shape(quantize_weight, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


# Whole layers.


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A layer without its attention: what stands between two attentions of a decode step."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int = 128
    num_layers: int = 4  # distinct ones in the chain

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        width, wide = self.hidden_size, self.intermediate_size
        return ((heads, width), (width, self.num_heads * self.head_size), (2 * wide, width), (width, wide))


LAYERS = (LayerShape("llama2-7b", 4096, 11008, 32, 32), LayerShape("llama3-8b", 4096, 14336, 32, 8))


def layer_chain(linear, rotary, rounds, x, norm, angles, rows, layers, pools):
    """`rounds` times through all layers, the queries standing in for what attention makes of them."""

    def body(_, carry):
        x, pools = carry
        after = []
        for (qkv, o, gate_up, down), (k_pool, v_pool) in zip(layers, pools, strict=True):
            heads = linear(x, qkv, norm=norm)
            _, num_kv_heads, head_size = k_pool.shape
            heads = heads.reshape(x.shape[0], num_kv_heads, -1, head_size)
            q, k_pool, v_pool = rotate_and_write(heads, *angles, rows, k_pool, v_pool, implementation=rotary)
            x = linear(q.reshape(x.shape[0], -1), o, residual=x)
            x = linear(linear(x, gate_up, norm=norm, gated=True), down, residual=x)
            after.append((k_pool, v_pool))
        return x, after

    return jax.lax.fori_loop(0, rounds, body, (x, pools))


def run_layers(shape: LayerShape, batches: tuple[int, ...], seed: int, report: Report) -> None:
    make = jax.jit(lambda seed, size: 0.5 * jax.random.normal(jax.random.key(seed), size, jnp.bfloat16) * size[1] ** -0.5, static_argnums=1)
    seeds = itertools.count(seed)
    layers = [tuple(make(next(seeds), size) for size in shape.matrices) for _ in range(shape.num_layers)]
    norm = 1.0 + 0.1 * draw(seed + 1, shape.hidden_size)
    weight_bytes, rounds = 2 * sum(m * d for m, d in shape.matrices), 10
    variants = {
        "triton": ("triton", "triton"),
        "triton, rotary by xla": ("triton", "xla"),
        "triton+int8": ("triton+int8", "triton"),
        "xla": ("xla", "xla"),
        "xla, rotary by triton": ("xla", "triton"),
        "xla [D, M]": ("xla [D, M]", "xla"),
    }
    stored: dict[str, list] = {}
    for kind in dict.fromkeys(kind for kind, _ in variants.values()):
        stored[kind] = layers
        if kind == "triton+int8":
            stored[kind] = [tuple(quantize_weight(w) for w in layer) for layer in layers]
        elif kind == "xla [D, M]":
            stored[kind] = [tuple(w.T for w in layer) for layer in layers]
    programs: dict[tuple, tuple] = {}
    arguments: dict[tuple, tuple] = {}
    for batch in batches:
        pool = jnp.zeros((batch, shape.num_kv_heads, shape.head_size), jnp.bfloat16)
        angles = tuple(draw(seed + i, batch, shape.head_size // 2).astype(jnp.float32) for i in (5, 6))
        rest = (draw(seed + 4, batch, shape.hidden_size), norm, angles, jnp.arange(batch, dtype=jnp.int32))
        for name, (kind, rotary) in variants.items():
            arguments[batch, name] = (*rest, stored[kind], [(pool, pool)] * shape.num_layers)
            programs[batch, name] = (functools.partial(layer_chain, linear_function(kind), rotary, rounds), arguments[batch, name])
    expected: dict[int, jax.Array] = {}
    for (batch, name), program in compile_all(programs).items():
        if isinstance(program, Exception):
            print(f"{shape.name:12} B{batch:<3} {name:32} not run: {str(program).splitlines()[0][:200]}", flush=True)
            continue
        out = program(*arguments[batch, name])[0]
        expected.setdefault(batch, out)
        error = relative_error(out, expected[batch])
        microseconds, spread = time_us(program, arguments[batch, name], rounds * shape.num_layers, 5)
        moved = weight_bytes // 2 if "int8" in name else weight_bytes
        report.add(shape.name, batch, name, microseconds, moved, spread_microseconds=spread, difference_from_first=error)
    report.save()


def settings(matrix: Matrix, batch: int, int8: bool) -> list[LinearConfig]:
    """Settings worth a measurement: those within the machine's shared memory that keep enough bytes on their way."""
    found = []
    item_bytes, parts = 1 if int8 else 2, 2 if matrix.gated else 1
    rows = 1 << (batch - 1).bit_length()
    shapes = ((32, 2, 8192), (64, 4, 8192), (64, 4, 16384), (64, 4, 32768), (128, 4, 16384), (128, 8, 32768))
    for (tile_rows, warps, step_bytes), segments, programs in itertools.product(shapes, (1, 2, 4, 8), (1, 2, 3, 4)):
        columns = max(8, rows * segments)  # of the matrix unit's product
        if columns > max(8, 2 * rows) or (rows == 1 and segments < 8):
            continue
        inputs = min(step_bytes // item_bytes // tile_rows, (matrix.num_inputs // segments) & -(matrix.num_inputs // segments))
        tile = tile_rows // parts // segments
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
    parser.add_argument(
        "--layers", default=",".join(s.name for s in LAYERS), help="comma-separated, may be empty (default: all: %(default)s)"
    )
    parser.add_argument("--batch-size", default=",".join(map(str, BATCHES)), help="rows, comma-separated (default: %(default)s)")
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), help="of the matrices (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="time every sensible setting of the Triton kernel on the matrices instead")
    parser.add_argument("--seed", type=int, default=0, help="of the data (default: %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    args = parser.parse_args(arguments)
    matrices = _chosen(parser, "matrix", args.matrices, {matrix.name: matrix for matrix in MATRICES})
    layers = _chosen(parser, "layer", args.layers, {shape.name: shape for shape in LAYERS})
    implementations = _split(args.implementations)
    batches = tuple(int(batch) for batch in _split(args.batch_size))
    if jax.devices()[0].platform != "gpu":
        parser.exit(2, f"error: needs a GPU, the default device is a {jax.devices()[0].platform}\n")
    report = Report(args.seed, args.json)
    for shape in () if args.tune else layers:
        run_layers(shape, batches, args.seed, report)
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
    parts = text.replace("[D, M]", "[D; M]").split(",")
    return [part.strip().replace(";", ",") for part in parts if part.strip()]


def _chosen(parser, what: str, text: str, by_name: dict) -> list:
    names = _split(text)
    if unknown := [name for name in names if name not in by_name]:
        parser.exit(2, f"error: unknown {what} {unknown[0]!r}, choose from {', '.join(by_name)}\n")
    return [by_name[name] for name in names]


if __name__ == "__main__":
    sys.exit(main())
