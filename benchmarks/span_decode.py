"""Time sparse decode attention against the read ceiling of the memory, and against its peers.

    python -m benchmarks.span_decode --json docs/kernel_results.json      the table of docs/kernel.md
    python -m benchmarks.span_decode --tune --json FILE                   re-derive heuristics.py
    python -m benchmarks.span_decode --plot docs/kernel_density.svg --json docs/kernel_results.json

What is timed: chains of dependent calls inside one compiled program (the output of a call is the
query of the next), each call with other rows than the one before, so that the rows come from memory
and not from the cache. Microseconds are wall time per call, launches included, nothing subtracted.
Beside them stand what is left without the same chain of calls that do nothing ("net_microseconds"),
and, for `triton`, how long the kernels themselves ran by the profiler ("kernel_microseconds").
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from benchmarks.timing import CACHE_BYTES, header_line, kernel_us, median_and_spread, report_header, run_seconds, timed, torch_ms
from pallas_kernels.span_decode import expected_bytes, quantize_pool, span_decode_attention, unsupported_reason
from pallas_kernels.span_decode.heuristics import TritonConfig, triton_config
from pallas_kernels.span_decode.triton import triton_attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decode problem; `lengths` are the tokens that each sequence holds."""

    name: str
    why: str
    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def capacity(self) -> int:
        return max(self.lengths)

    @property
    def row_bytes(self) -> int:
        return 2 * 2 * self.num_kv_heads * self.head_size


SHAPES = (
    Shape("b1-1k", "batch 1, short: nothing but latency", (1024,), 32, 4, 128),
    Shape("b1-16k", "batch 1, long: one sequence must fill the machine", (16384,), 32, 4, 128),
    Shape("b32-gqa4-8k", "Llama-3-8B heads, a full batch", (8192,) * 32, 32, 8, 128),
    Shape("b32-mha-2k", "Llama-2-7B heads: the most KV bytes per token", (2048,) * 32, 32, 32, 128),
    Shape("b128-mha-4k", "a small model at a large batch, head size 64", (4096,) * 128, 12, 12, 64),
    Shape("ragged", "one long sequence must not hold up 31 short ones", (32768, *(1024,) * 31), 32, 8, 128),
)
DENSITIES = (1.0, 0.1, 0.02)
PATTERNS = ("tokens", "spans", "blocks")


def draw_positions(rng: np.random.Generator, length: int, density: float, pattern: str) -> np.ndarray:
    """Ascending positions of a sequence, `density` of it: single tokens, spans of 8-30, or blocks of 64."""
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


def draw_slots(seed: int, shape: Shape, density: float, pattern: str, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """`slots [B, A]` and `counts [B]`; sequences lie one after the other from `first_row` on."""
    rng = np.random.default_rng(seed)
    slots = np.full((len(shape.lengths), shape.capacity), -1, np.int32)
    counts = np.zeros(len(shape.lengths), np.int32)
    for b, length in enumerate(shape.lengths):
        positions = draw_positions(rng, length, density, pattern)
        counts[b] = len(positions)
        slots[b, : counts[b]] = first_row + positions
        first_row += length
    return slots, counts


@dataclasses.dataclass
class Workload:
    """Arrays on the device: one pool, and several lists of rows that together outgrow the cache."""

    shape: Shape
    q: jax.Array
    k_pool: jax.Array
    v_pool: jax.Array
    num_copies: int  # how often the sequences stand in the pool

    @classmethod
    def make(cls, shape: Shape, seed: int) -> "Workload":
        tokens = sum(shape.lengths)
        num_copies = max(1, math.ceil(3 * CACHE_BYTES / (tokens * shape.row_bytes)))
        keys = jax.random.split(jax.random.key(seed), 3)
        pool_shape = (tokens * num_copies, shape.num_kv_heads, shape.head_size)
        draw = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
        q_shape = (len(shape.lengths), shape.num_heads, shape.head_size)
        return cls(shape, draw(keys[0], q_shape), draw(keys[1], pool_shape), draw(keys[2], pool_shape), num_copies)

    def lists(self, seed: int, density: float, pattern: str) -> list[tuple[jax.Array, jax.Array]]:
        """`slots` and `counts` of several calls, each naming rows of its own."""
        tokens = sum(self.shape.lengths)
        least_bytes = max(1, int(min(DENSITIES) * tokens)) * self.shape.row_bytes
        number = min(64, max(8, math.ceil(3 * CACHE_BYTES / least_bytes)))  # the same for all, to compile once
        lists = (draw_slots(seed + i, self.shape, density, pattern, i % self.num_copies * tokens) for i in range(number))
        return [(jnp.asarray(slots), jnp.asarray(counts)) for slots, counts in lists]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _chain(attend, rounds, q, pools, lists):
    attend = jax.jit(attend)  # traced once for all lists

    def body(_, q):
        for arrays in lists:
            q = attend(q, *pools, *arrays)
        return q

    return jax.lax.fori_loop(0, rounds, body, q)


def time_chain_us(attend, q, pools, lists, rounds: int = 8, runs: int = 5) -> tuple[float, float]:
    """Median microseconds per call and the spread (largest minus smallest) over `runs`."""
    chain = functools.partial(_chain, attend, rounds)
    calls = rounds * len(lists)
    chain(q, pools, lists).block_until_ready()
    _, once = timed(chain, q, pools, lists)
    queued = max(2, math.ceil(0.01 / once))  # 10 ms queued at a time hide the host
    seconds = run_seconds(lambda: chain(q, pools, lists), queued=queued, warm_ups=3, repetitions=runs)
    return median_and_spread([1e6 * each / calls for each in seconds])


def empty_call(q, *_):
    """A call that is nothing but a launch: it writes 16 bytes of `q` back."""

    def kernel(q_ref, out_ref):
        out_ref[0, 0, pl.ds(0, 8)] = q_ref[0, 0, pl.ds(0, 8)]

    settings = {"input_output_aliases": {0: 0}, "compiler_params": plt.CompilerParams(num_warps=1, num_stages=1)}
    return pl.pallas_call(kernel, grid=(1,), out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype), **settings)(q)


# Peers. Each reads a contiguous cache of every sequence, which all sequences being equally long allows.


def xla_dense(q, k_cache, v_cache):
    """Attention over the whole cache `[B, S, K, H]`, as einsums."""
    batch, _, head_size = q.shape
    grouped = q.reshape(batch, k_cache.shape[2], -1, head_size)
    scores = jnp.einsum("bkgh,bskh->bkgs", grouped, k_cache, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * head_size**-0.5, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgs,bskh->bkgh", weights, v_cache).reshape(q.shape)


def cudnn_dense(q, k_cache, v_cache):
    """Attention over the whole cache `[B, S, K, H]`, by cuDNN."""
    return jax.nn.dot_product_attention(q[:, None], k_cache, v_cache, implementation="cudnn")[:, 0]


JAX_PEERS = {"XLA einsum, dense": xla_dense, "cuDNN, dense": cudnn_dense}


def torch_rows(shape: Shape, seed: int) -> Iterator[dict]:
    """PyTorch's SDPA over the whole cache, and FlexAttention with the block mask of each pattern."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

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
    yield {"implementation": "PyTorch SDPA, dense", "density": 1.0, "pattern": "all", "microseconds": time_us(sdpa)}

    named = torch.zeros(batch, length, dtype=torch.bool, device="cuda")

    def keep(b, h, q_idx, kv_idx):
        return named[b, kv_idx]

    def build():
        return create_block_mask(keep, batch, None, 1, length, device="cuda")

    flex = torch.compile(flex_attention, dynamic=False)
    for density, pattern in cases():
        slots, counts = draw_slots(seed, shape, density, pattern, 0)
        mask = np.zeros((batch, length), bool)
        for b in range(batch):
            mask[b, slots[b, : counts[b]] - b * length] = True
        named.copy_(torch.from_numpy(mask))
        build()
        build_us = 1e3 * torch_ms(build)
        block_mask = build()
        try:
            microseconds = time_us(functools.partial(flex, block_mask=block_mask, enable_gqa=True))
        except RuntimeError as error:
            print(f"{shape.name:12} FlexAttention not run: {str(error).splitlines()[0]}", flush=True)
            return
        yield {
            "implementation": "FlexAttention, block mask",
            "density": density,
            "pattern": pattern,
            "microseconds": microseconds,
            "mask_building_microseconds": build_us,
        }


def cases() -> list[tuple[float, str]]:
    return [(density, pattern) for density in DENSITIES for pattern in (PATTERNS if density < 1.0 else ("all",))]


def implementation_functions(names: list[str]):
    """What to time, by name; `+int8` runs the implementation on int8 pools."""
    for name in names:
        implementation, _, pool_type = name.partition("+")
        quantize = quantize_pool if pool_type == "int8" else (lambda pool: pool)
        yield name, functools.partial(span_decode_attention, implementation=implementation), quantize


def run_shape(shape: Shape, implementations: list[str], peers: list[str], ceiling_tbps: float, seed: int) -> list[dict]:
    """All cases of one shape; prints each as it comes."""
    workload = Workload.make(shape, seed)
    q, results = workload.q, []

    def record(implementation, density, pattern, microseconds, moved_bytes, **more):
        floor_us = moved_bytes / ceiling_tbps / 1e6
        row = {
            "shape": shape.name,
            "implementation": implementation,
            "density": density,
            "pattern": pattern,
            "microseconds": microseconds,
            "bytes": moved_bytes,
            "floor_microseconds": floor_us,
            "terabytes_per_second": moved_bytes / microseconds / 1e6,
            "percent_of_ceiling": 100 * floor_us / microseconds,
            **more,
        }
        results.append(row)
        print(
            f"{shape.name:12} {implementation:26} {100 * density:4.0f}% {pattern:7}{microseconds:9.1f} us "
            f"{moved_bytes / 1e6:8.1f} MB {row['terabytes_per_second']:6.2f} TB/s {row['percent_of_ceiling']:5.0f}% of the ceiling"
            + "".join(f", {key.split('_')[0]} {more[key]:.1f} us" for key in ("net_microseconds", "kernel_microseconds") if key in more),
            flush=True,
        )

    lists_of = {case: workload.lists(seed, *case) for case in cases()}
    empty_us, _ = time_chain_us(empty_call, q, (), lists_of[0.1, "tokens"])
    print(f"{shape.name:12} {'a call that does nothing':26} {empty_us:20.2f} us", flush=True)
    sample = lists_of[0.1, "tokens"][0]
    expected = span_decode_attention(q, workload.k_pool, workload.v_pool, *sample, implementation="xla").astype(jnp.float32)
    for name, attend, quantize in implementation_functions(implementations):
        pools = (quantize(workload.k_pool), quantize(workload.v_pool))
        if reason := unsupported_reason(attend.keywords["implementation"], q, pools[0]):
            print(f"{shape.name:12} {name:26} not run: {reason}", flush=True)
            continue
        difference = attend(q, *pools, *sample).astype(jnp.float32) - expected
        error = float(jnp.sqrt(jnp.mean(difference**2) / jnp.mean(expected**2)))
        print(f"{shape.name:12} {name:26} differs from implementation='xla' by {error:.2e} (RMS, relative)", flush=True)
        for (density, pattern), lists in lists_of.items():
            microseconds, spread = time_chain_us(attend, q, pools, lists)
            moved = expected_bytes(q, pools[0], int(lists[0][1].sum()))
            more = {"spread_microseconds": spread, "net_microseconds": microseconds - empty_us, "relative_error": error}
            if name == "triton" and pattern in ("tokens", "all"):
                more["kernel_microseconds"] = kernel_us(functools.partial(_chain, attend, 8, q, pools, lists), "span_decode")
            record(name, density, pattern, microseconds, moved, **more)

    if peers and len(set(shape.lengths)) == 1:
        dense_bytes = expected_bytes(q, workload.k_pool, sum(shape.lengths))
        cache_shape = (workload.num_copies, len(shape.lengths), shape.capacity, shape.num_kv_heads, shape.head_size)
        k_caches, v_caches = (list(pool.reshape(cache_shape)) for pool in (workload.k_pool, workload.v_pool))
        caches = list(zip(k_caches, v_caches, strict=True)) * max(1, 8 // workload.num_copies)
        for name, attend in JAX_PEERS.items() if "jax" in peers else ():
            try:
                microseconds, spread = time_chain_us(attend, q, (), caches)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                print(f"{shape.name:12} {name:26} not run: {str(error).splitlines()[0]}", flush=True)
                continue
            record(name, 1.0, "all", microseconds, dense_bytes, spread_microseconds=spread)
        if "torch" in peers and importlib.util.find_spec("torch"):
            for row in torch_rows(shape, seed):
                _, counts = draw_slots(seed, shape, row["density"], row["pattern"], 0)
                record(**row, moved_bytes=expected_bytes(q, workload.k_pool, int(counts.sum())))
    return results


def tune_shape(shape: Shape, seed: int) -> list[dict]:
    """Every setting of the Triton kernel on one shape: the measurements behind heuristics.py."""
    workload, results = Workload.make(shape, seed), []
    chosen = triton_config(len(shape.lengths), shape.num_kv_heads, shape.head_size, 2, shape.capacity)
    tried = {chosen: None}
    others = ((64, 2, 3), (64, 4, 3), (64, 2, 4), (32, 2, 3), (32, 2, 4), (32, 1, 4), (16, 1, 4), (16, 2, 5))
    for tile_rows, num_warps, num_stages in others:
        tried[TritonConfig(tile_rows, num_warps, num_stages, chosen.splits)] = None
    tried[TritonConfig(32, 1, 4, 2 * chosen.splits)] = None
    if shape.num_kv_heads % 4 == 0:
        for tile_rows, num_warps, num_stages, kv_heads in ((16, 1, 4, 2), (16, 2, 4, 2), (32, 2, 3, 2), (16, 2, 3, 4)):
            tried[TritonConfig(tile_rows, num_warps, num_stages, chosen.splits, kv_heads)] = None
    tried |= {chosen._replace(splits=max(1, round(chosen.splits * factor))): None for factor in (0.5, 2)}
    lists = {case: workload.lists(seed, *case) for case in ((1.0, "all"), (0.1, "tokens"), (0.02, "tokens"))}
    for config in tried:
        attend = functools.partial(triton_attention, scale=shape.head_size**-0.5, config=TritonConfig(*config))
        try:
            times = {case: time_chain_us(attend, workload.q, (workload.k_pool, workload.v_pool), lists[case])[0] for case in lists}
        except RuntimeError as error:  # a setting that asks for more shared memory than there is
            print(f"{shape.name:12} {config} not run: {str(error).splitlines()[0]}", flush=True)
            continue
        results += [{"shape": shape.name, "config": config._asdict(), "density": case[0], "microseconds": us} for case, us in times.items()]
        mark = "  <- heuristics.py" if config == chosen else ""
        print(f"{shape.name:12} {config} " + " ".join(f"{us:9.1f}" for us in times.values()) + f" us{mark}", flush=True)
    return results


def plot(report: dict, path: pathlib.Path) -> None:
    """Microseconds against density, one panel per shape, with the floor of bf16 rows drawn in."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["shape"] for row in report["cases"]))
    implementations = list(dict.fromkeys(row["implementation"] for row in report["cases"]))
    figure, axes = plt.subplots(2, math.ceil(len(names) / 2), figsize=(5 * math.ceil(len(names) / 2), 8), squeeze=False)
    labelled = {}
    for axis, name in zip(axes.flat, names, strict=False):
        rows = [row for row in report["cases"] if row["shape"] == name]
        for index, implementation in enumerate(implementations):
            own = [row for row in rows if row["implementation"] == implementation]
            flex = "Flex" in implementation
            if len(own) == 1:  # a dense one, which takes as long whatever is named
                labelled[implementation] = axis.axhline(own[0]["microseconds"], color=f"C{index}", linewidth=0.8, linestyle="--")
                continue
            for pattern, style in zip(PATTERNS if flex else PATTERNS[:1], (":", "-.", "--") if flex else "-", strict=True):
                line = sorted((100 * r["density"], r["microseconds"]) for r in own if r["pattern"] in (pattern, "all"))
                if line:  # ours do not mind the pattern, so that one of theirs stands for all
                    label = f"{implementation}, {pattern}"
                    (labelled[label],) = axis.plot(*zip(*line, strict=True), style, color=f"C{index}", marker="o", markersize=3)
        floors = sorted({(100 * r["density"], r["floor_microseconds"]) for r in rows if "int8" not in r["implementation"]})
        (labelled["floor: bf16 bytes / read ceiling"],) = axis.plot(*zip(*floors, strict=True), color="black", linewidth=2)
        axis.set(title=name, xscale="log", yscale="log", xlabel="rows named, %", ylabel="microseconds")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(labelled.values(), labelled.keys(), loc="lower center", ncols=6, fontsize=8)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.span_decode", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default=",".join(s.name for s in SHAPES), help="comma-separated (default: all: %(default)s)")
    parser.add_argument(
        "--implementations",
        default="triton,triton+int8,mosaic,jax_triton",
        help="comma-separated, +int8 for int8 pools, may be empty (default: %(default)s)",
    )
    parser.add_argument("--peers", default="jax,torch", help="of jax (XLA, cuDNN) and torch, may be empty (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="time every setting of the Triton kernel instead")
    parser.add_argument("--seed", type=int, default=0, help="of the rows and the data (default: %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here (with --plot: read them)")
    parser.add_argument("--plot", type=pathlib.Path, help="only draw the results in --json to this file")
    args = parser.parse_args(arguments)
    if args.plot:
        if not args.json or not args.json.exists():
            parser.exit(2, "error: --plot needs --json FILE with the results of an earlier run\n")
        plot(json.loads(args.json.read_text()), args.plot)
        return 0
    by_name = {shape.name: shape for shape in SHAPES}
    if unknown := [name for name in args.shapes.split(",") if name not in by_name]:
        parser.exit(2, f"error: unknown shape {unknown[0]!r}, choose from {', '.join(by_name)}\n")
    if jax.devices()[0].platform != "gpu":
        parser.exit(2, f"error: needs a GPU, the default device is a {jax.devices()[0].platform}\n")

    header = report_header()
    print(header_line(header), flush=True)
    report = {
        **header,
        "seed": args.seed,
        "shapes": [dataclasses.asdict(by_name[name]) for name in args.shapes.split(",")],
        "cases": [],
    }
    for name in args.shapes.split(","):
        if args.tune:
            report["cases"] += tune_shape(by_name[name], args.seed)
        else:
            implementations, peers = ([x for x in text.split(",") if x] for text in (args.implementations, args.peers))
            report["cases"] += run_shape(by_name[name], implementations, peers, header["read_ceiling_terabytes_per_second"], args.seed)
        if args.json:  # after every shape, so that a run cut short leaves what it has
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
