"""Time sparse decode attention against the read ceiling of the memory, and against other implementations.

    python -m benchmarks.span_decode --json docs/kernel_results.json      the table of docs/kernel.md
    python -m benchmarks.span_decode --tune --json FILE                   re-derive heuristics.py
    python -m benchmarks.span_decode --tune --shapes b192-gqa3-5k --batch-size 128,192,256,384 --tile-rows 16,64,128 --json FILE
    python -m benchmarks.span_decode --plot docs/kernel_density.svg --json docs/kernel_results.json

What is timed: chains of dependent calls inside one compiled program (the output of a call is the
query of the next), each call with other slots than the one before, so that the rows come from memory
and not from the cache. Microseconds are wall time per call, launches included, nothing subtracted.
Beside them stand the time less that of the same chain of empty calls ("net_microseconds"), and, for
`triton`, how long the kernels themselves ran by the profiler ("kernel_microseconds").
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from benchmarks import timing
from benchmarks.shapes import ATTENTION_SHAPES, AttentionShape
from benchmarks.timing import CACHE_BYTES, KernelReport, torch_ms
from data import commandline
from data.errors import check_range
from pallas_kernels import quantize_pool, span_decode_attention
from pallas_kernels.span_decode import expected_bytes, unsupported_reason
from pallas_kernels.span_decode.heuristics import TritonConfig, triton_config
from pallas_kernels.span_decode.triton import triton_attention
from selfspan_jax import files
from selfspan_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSITIES = (1.0, 0.1, 0.02)
PATTERNS = ("tokens", "spans", "blocks")
UNEQUAL = 0.4  # sigma of the logarithm of how many tokens each sequence has in use, where they are unequal
CASES = tuple((density, pattern) for density in DENSITIES for pattern in (PATTERNS if density < 1.0 else ("all",)))
TUNED = ((1.0, "all"), (0.1, "tokens"), (0.02, "tokens"), (0.04, "unequal"))  # what settings are chosen by
IMPLEMENTATIONS = ("triton", "triton+int8", "mosaic", "jax_triton")
KNOWN = tuple(name + pools for name in ("triton", "mosaic", "jax_triton", "xla", "reference") for pools in ("", "+int8"))
PEERS = ("jax", "torch")
BY_NAME = {shape.name: shape for shape in ATTENTION_SHAPES}
ROUNDS = 8  # through all slot lists of a chain


def draw_positions(rng: np.random.Generator, length: int, density: float, pattern: str) -> np.ndarray:
    """Draw ascending positions, `density` of a sequence: single tokens, spans of 8-30, or blocks of 64."""
    wanted = max(1, round(density * length))
    if pattern == "tokens" or density == 1.0:
        return np.sort(rng.choice(length, wanted, replace=False)) if density < 1.0 else np.arange(length)
    chosen = np.zeros(length, bool)
    while (missing := wanted - int(chosen.sum())) > 0:
        size = 64 if pattern == "blocks" else int(rng.integers(8, 31))
        start = int(rng.integers(max(1, length - size + 1)))
        start = start // 64 * 64 if pattern == "blocks" else start
        chosen[start : start + min(size, missing)] = True
    return np.flatnonzero(chosen)


def draw_slots(seed: int, shape: AttentionShape, density: float, pattern: str, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `slots [B, A]` and `counts [B]`; the pool holds the sequences one after the other from `first_row` on.

    Where they are "unequal", sequences have log-normal numbers of single tokens in use, `density` in the mean.
    """
    rng = np.random.default_rng(seed)
    slots = np.full((len(shape.lengths), shape.capacity), -1, np.int32)
    counts = np.zeros(len(shape.lengths), np.int32)
    for b, length in enumerate(shape.lengths):
        if pattern == "unequal":
            own = min(1.0, density * rng.lognormal(-(UNEQUAL**2) / 2, UNEQUAL))
            positions = draw_positions(rng, length, own, "tokens")
        else:
            positions = draw_positions(rng, length, density, pattern)
        counts[b] = len(positions)
        slots[b, : counts[b]] = first_row + positions
        first_row += length
    return slots, counts


@dataclasses.dataclass
class Workload:
    """Arrays on the device: one pool, and slots of several calls that together outgrow the cache."""

    shape: AttentionShape
    q: jax.Array
    k_pool: jax.Array
    v_pool: jax.Array
    num_copies: int  # how often the sequences stand in the pool

    @classmethod
    def make(cls, shape: AttentionShape, seed: int) -> "Workload":
        tokens = sum(shape.lengths)
        num_copies = max(1, math.ceil(3 * CACHE_BYTES / (tokens * shape.row_bytes)))
        keys = jax.random.split(jax.random.key(seed), 3)
        pool_shape = (tokens * num_copies, shape.num_kv_heads, shape.head_size)
        draw = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
        q_shape = (len(shape.lengths), shape.num_heads, shape.head_size)
        return cls(shape, draw(keys[0], q_shape), draw(keys[1], pool_shape), draw(keys[2], pool_shape), num_copies)

    def draw(self, seed: int, density: float, pattern: str) -> list[tuple[jax.Array, jax.Array]]:
        """Draw `slots` and `counts` of several calls, each with rows of its own."""
        tokens = sum(self.shape.lengths)
        min_bytes = max(1, int(min(DENSITIES) * tokens)) * self.shape.row_bytes
        number = min(64, max(8, math.ceil(3 * CACHE_BYTES / min_bytes)))  # the same for all, to compile once
        drawn = (draw_slots(seed + i, self.shape, density, pattern, i % self.num_copies * tokens) for i in range(number))
        return [(jnp.asarray(slots), jnp.asarray(counts)) for slots, counts in drawn]


@functools.partial(jax.jit, static_argnums=0, static_argnames="rounds")
def chain(attend, q, pools, inputs, rounds=ROUNDS):
    """Run some rounds through all inputs, the output of a call being the query of the next."""
    attend = jax.jit(attend)  # traced once for all inputs

    def body(_, q):
        for arrays in inputs:
            q = attend(q, *pools, *arrays)
        return q

    return jax.lax.fori_loop(0, rounds, body, q)


def chain_us(attend, q, pools, inputs, rounds=ROUNDS) -> tuple[float, float]:
    """Time a chain: median microseconds per call and the spread over five repetitions."""
    run = functools.partial(chain, attend, q, pools, inputs, rounds=rounds)
    run().block_until_ready()
    _, once = timing.timed(run)
    queued = max(2, math.ceil(0.01 / once))  # 10 ms queued at a time hide the host
    seconds = timing.run_seconds(run, queued=queued, warm_ups=3)
    return timing.median_and_spread([1e6 * each / (rounds * len(inputs)) for each in seconds])


def empty_call(q, *_):
    """Launch a kernel that writes 16 bytes of `q` back, and nothing else."""

    def kernel(q_ref, out_ref):
        out_ref[0, 0, pl.ds(0, 8)] = q_ref[0, 0, pl.ds(0, 8)]

    settings = {"input_output_aliases": {0: 0}, "compiler_params": plt.CompilerParams(num_warps=1, num_stages=1)}
    return pl.pallas_call(kernel, grid=(1,), out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype), **settings)(q)


# Other implementations. Each reads a contiguous cache of every sequence, so all sequences must be equally long.


def xla_dense(q, k_cache, v_cache):
    """Attend to the whole cache `[B, S, K, H]` by einsums."""
    batch, _, head_size = q.shape
    grouped = q.reshape(batch, k_cache.shape[2], -1, head_size)
    scores = jnp.einsum("bkgh,bskh->bkgs", grouped, k_cache, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * head_size**-0.5, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgs,bskh->bkgh", weights, v_cache).reshape(q.shape)


def cudnn_dense(q, k_cache, v_cache):
    """Attend to the whole cache `[B, S, K, H]` by cuDNN."""
    return jax.nn.dot_product_attention(q[:, None], k_cache, v_cache, implementation="cudnn")[:, 0]


JAX_PEERS = {"XLA einsum, dense": xla_dense, "cuDNN, dense": cudnn_dense}


def run_torch(workload: Workload, report: KernelReport, seed: int) -> None:
    """Time PyTorch's SDPA over the whole cache, and FlexAttention with block masks, which take longer to build than to use."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = workload.shape
    batch, length = len(shape.lengths), shape.capacity
    torch.manual_seed(seed)
    new = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    q = new(batch, shape.num_heads, 1, shape.head_size)
    copies = max(1, math.ceil(3 * CACHE_BYTES / (batch * length * shape.row_bytes)))
    kv_shape = (batch, shape.num_kv_heads, length, shape.head_size)
    caches = [(new(*kv_shape), new(*kv_shape)) for _ in range(copies)] * max(1, 16 // copies)

    def time_us(attend) -> float:
        attend(q, *caches[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for k, v in caches:
                attend(q, k, v)
        return statistics.median([1e3 * torch_ms(graph.replay) / len(caches) for _ in range(8)][3:])

    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    add_row(report, workload, "PyTorch SDPA, dense", CASES[0], time_us(sdpa), batch * length)

    attended = torch.zeros(batch, length, dtype=torch.bool, device="cuda")

    def keep(b, h, q_idx, kv_idx):
        return attended[b, kv_idx]

    def build():
        return create_block_mask(keep, batch, None, 1, length, device="cuda")

    flex = torch.compile(flex_attention, dynamic=False)
    for case in CASES:
        slots, counts = draw_slots(seed, shape, *case, 0)
        mask = np.zeros((batch, length), bool)
        for b in range(batch):
            mask[b, slots[b, : counts[b]] - b * length] = True
        attended.copy_(torch.from_numpy(mask))
        build()
        build_us = 1e3 * torch_ms(build)
        try:
            microseconds = time_us(functools.partial(flex, block_mask=build(), enable_gqa=True))
        except RuntimeError as error:
            return report.not_run(f"{shape.name:12} FlexAttention", error)
        name = "FlexAttention, block mask"
        add_row(report, workload, name, case, microseconds, int(counts.sum()), mask_building_microseconds=build_us)


def add_row(
    report: KernelReport, workload: Workload, name: str, case: tuple[float, str], microseconds: float, num_slots: int, **more: Any
) -> None:
    """Add the timing of an implementation; `more` is whatever else was measured."""
    shape, (density, pattern) = workload.shape, case
    label = f"{shape.name:12} {name:26} {100 * density:4.0f}% {pattern:7}"
    columns = {"shape": shape.name, "implementation": name, "density": density, "pattern": pattern}
    k_pool = jax.eval_shape(quantize_pool, workload.k_pool) if name.endswith("+int8") else workload.k_pool
    report.add(label, microseconds, expected_bytes(workload.q, k_pool, num_slots), columns, **more)


def run_implementations(workload: Workload, implementations: Sequence[str], report: KernelReport, seed: int) -> None:
    """Time ours in all cases; a name with `+int8` runs the implementation on int8 pools."""
    shape, q = workload.shape, workload.q
    inputs = {case: workload.draw(seed, *case) for case in CASES}
    empty_us, _ = chain_us(empty_call, q, (), inputs[0.1, "tokens"])
    print(f"{shape.name:12} {'an empty call':26} {empty_us:20.2f} us", flush=True)
    sample = inputs[0.1, "tokens"][0]
    expected = span_decode_attention(q, workload.k_pool, workload.v_pool, *sample, implementation="xla")
    for name in implementations:
        implementation, _, pool_type = name.partition("+")
        attend = functools.partial(span_decode_attention, implementation=implementation)
        quantize = quantize_pool if pool_type == "int8" else (lambda pool: pool)
        pools = (quantize(workload.k_pool), quantize(workload.v_pool))
        if reason := unsupported_reason(implementation, q, pools[0]):
            report.not_run(f"{shape.name:12} {name:26}", reason)
            continue
        error = timing.relative_error(attend(q, *pools, *sample), expected)
        print(f"{shape.name:12} {name:26} differs from implementation='xla' by {error:.2e} (RMS, relative)", flush=True)
        for case, arrays in inputs.items():
            microseconds, spread = chain_us(attend, q, pools, arrays)
            more = {"spread_microseconds": spread, "net_microseconds": microseconds - empty_us, "relative_error": error}
            if name == "triton" and case[1] in ("tokens", "all"):
                more["kernel_microseconds"] = timing.kernel_us(functools.partial(chain, attend, q, pools, arrays), "span_decode")
            add_row(report, workload, name, case, microseconds, int(arrays[0][1].sum()), **more)


def run_peers(workload: Workload, peers: Sequence[str], report: KernelReport, seed: int) -> None:
    """Time other implementations on the same shape."""
    shape = workload.shape
    cache_shape = (workload.num_copies, len(shape.lengths), shape.capacity, shape.num_kv_heads, shape.head_size)
    k_caches, v_caches = (list(pool.reshape(cache_shape)) for pool in (workload.k_pool, workload.v_pool))
    caches = list(zip(k_caches, v_caches, strict=True)) * max(1, 8 // workload.num_copies)
    for name, attend in JAX_PEERS.items() if "jax" in peers else ():
        try:
            microseconds, spread = chain_us(attend, workload.q, (), caches)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            report.not_run(f"{shape.name:12} {name:26}", error)
            continue
        add_row(report, workload, name, CASES[0], microseconds, sum(shape.lengths), spread_microseconds=spread)
    if "torch" in peers and importlib.util.find_spec("torch"):
        run_torch(workload, report, seed)


def settings(shape: AttentionShape, chosen: TritonConfig, tile_rows: Sequence[int]) -> list[TritonConfig]:
    """List settings of the Triton kernel worth a measurement: the chosen one, and with `tile_rows` only tiles of so many rows beside it."""
    if tile_rows:  # few enough for several batches
        return [chosen, *(TritonConfig(rows, max(1, rows // 32), 3, splits) for rows in tile_rows for splits in (0, 2))]
    tiles = ((64, 2, 3), (64, 4, 3), (64, 2, 4), (32, 2, 3), (32, 2, 4), (32, 1, 4), (16, 1, 4), (16, 2, 5))  # rows, warps, stages
    configs = [chosen, *(TritonConfig(*tile, chosen.splits) for tile in tiles), TritonConfig(32, 1, 4, 2 * chosen.splits)]
    if shape.num_kv_heads % 4 == 0:
        tiles_of_heads = (((16, 1, 4), 2), ((16, 2, 4), 2), ((32, 2, 3), 2), ((16, 2, 3), 4))
        configs += [TritonConfig(*tile, chosen.splits, kv_heads) for tile, kv_heads in tiles_of_heads]
    return [*configs, *(chosen._replace(splits=max(1, round(chosen.splits * factor))) for factor in (0.5, 2))]


def tune_shape(shape: AttentionShape, seed: int, report: KernelReport, tile_rows: Sequence[int] = ()) -> None:
    """Time settings of the Triton kernel on one shape, the measurements behind heuristics.py."""
    workload = Workload.make(shape, seed)
    chosen = triton_config(len(shape.lengths), shape.num_kv_heads, shape.head_size, 2, shape.capacity)
    inputs = {case: workload.draw(seed, *case) for case in TUNED}
    for config in dict.fromkeys(settings(shape, chosen, tile_rows)):
        attend = functools.partial(triton_attention, scale=shape.head_size**-0.5, config=config)
        try:
            times = [chain_us(attend, workload.q, (workload.k_pool, workload.v_pool), arrays)[0] for arrays in inputs.values()]
        except RuntimeError as error:  # a setting that asks for more shared memory than there is
            report.not_run(f"{shape.name:12} {config}", error)
            continue
        for (density, pattern), us in zip(inputs, times, strict=True):
            case = {"shape": shape.name, "batch_size": len(shape.lengths), "config": config._asdict()}
            report.content["cases"].append(case | {"density": density, "pattern": pattern, "microseconds": us})
        mark = "  <- heuristics.py" if config == chosen else ""
        print(f"{shape.name:12} {len(shape.lengths):4} {config} " + " ".join(f"{us:9.1f}" for us in times) + f" us{mark}", flush=True)


def plot(report: dict) -> Figure:
    """Plot microseconds against density, one panel per shape, with the time of the bf16 bytes at the read ceiling."""
    from matplotlib.figure import Figure

    shapes, implementations = (dict.fromkeys(row[key] for row in report["cases"]) for key in ("shape", "implementation"))
    columns = math.ceil(len(shapes) / 2)
    figure = Figure(figsize=(5 * columns, 8))
    labelled = {}
    for axis, name in zip(figure.subplots(2, columns, squeeze=False).flat, shapes, strict=False):
        rows = [row for row in report["cases"] if row["shape"] == name]
        for index, implementation in enumerate(implementations):
            own = [row for row in rows if row["implementation"] == implementation]
            flex = "Flex" in implementation
            if len(own) == 1:  # a dense one, which takes as long at any density
                labelled[implementation] = axis.axhline(own[0]["microseconds"], color=f"C{index}", linewidth=0.8, linestyle="--")
                continue
            for pattern, style in zip(PATTERNS if flex else PATTERNS[:1], (":", "-.", "--") if flex else "-", strict=True):
                line = sorted((100 * r["density"], r["microseconds"]) for r in own if r["pattern"] in (pattern, "all"))
                if line:  # ours take as long for every pattern, so that one stands for all
                    (labelled[f"{implementation}, {pattern}"],) = axis.plot(
                        *zip(*line, strict=True), style, color=f"C{index}", marker="o", markersize=3
                    )
        rooflines = sorted({(100 * r["density"], r["roofline_microseconds"]) for r in rows if "int8" not in r["implementation"]})
        (labelled["roofline: bf16 bytes / read ceiling"],) = axis.plot(*zip(*rooflines, strict=True), color="black", linewidth=2)
        axis.set(title=name, xscale="log", yscale="log", xlabel="rows attended to, %", ylabel="microseconds")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(labelled.values(), labelled.keys(), loc="lower center", ncols=6, fontsize=8)
    return figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanDecode(timing.KernelCommand):
    """Time sparse decode attention against the read ceiling of the memory, and against other implementations."""

    shapes: Annotated[tuple[str, ...], commandline.commas(*BY_NAME)] = (*BY_NAME,)
    """Problems."""
    implementations: Annotated[tuple[str, ...], commandline.commas(*KNOWN, "")] = IMPLEMENTATIONS
    """Of ours, +int8 for int8 pools; may be empty."""
    peers: Annotated[tuple[str, ...], commandline.commas(*PEERS, "")] = PEERS
    """Other implementations: of jax (XLA, cuDNN) and of torch; may be empty."""
    tune: bool = False
    """Time every setting of the Triton kernel instead."""
    tile_rows: Annotated[tuple[int, ...], commandline.commas(int)] = ()
    """With --tune: only tiles of so many rows, powers of 2 from 16, a warp for each 32, undivided and in two, and what is chosen."""
    batch_size: Annotated[tuple[int, ...], commandline.commas(int)] = ()
    """With --tune: sequences of each shape, all of its longest length, in place of its own."""
    plot: Path | None = None
    """Only draw the results in --json, of an earlier run, to this file."""

    def __post_init__(self):
        if self.plot and not (self.json and self.json.exists()):
            raise UserError("--plot needs --json FILE with the results of an earlier run")
        if (self.tile_rows or self.batch_size) and not self.tune:
            raise UserError("--tile-rows and --batch-size are for --tune")
        check_range(self, "batch_size", low=1)
        if wrong := [rows for rows in self.tile_rows if rows < 16 or rows & (rows - 1)]:
            raise UserError(f"tile_rows is {wrong[0]}; allowed: powers of 2 from 16")

    def run(self) -> None:
        if self.plot and self.json:
            with files.outputs(plot=self.plot):
                return files.write_picture(self.plot, plot(files.read_json(self.json)))
        shapes = [BY_NAME[name] for name in self.shapes]
        if self.batch_size:
            shapes = [dataclasses.replace(shape, lengths=(shape.capacity,) * number) for shape in shapes for number in self.batch_size]
        with self.report(shapes=list(map(dataclasses.asdict, shapes))) as report:
            for shape in shapes:
                if self.tune:
                    tune_shape(shape, self.seed, report, self.tile_rows)
                else:
                    workload = Workload.make(shape, self.seed)
                    run_implementations(workload, self.implementations, report, self.seed)
                    if self.peers and len(set(shape.lengths)) == 1:
                        run_peers(workload, self.peers, report, self.seed)
                report.save()


def main(arguments: list[str] | None = None) -> None:
    timing.run_command(SpanDecode, arguments)


if __name__ == "__main__":
    main()
