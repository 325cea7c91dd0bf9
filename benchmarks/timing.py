"""Time programs on a device: medians of repeated runs, the memory's read ceiling, the profiler's events, headers and rows of reports."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data import commandline
from selfspan_jax import files
from selfspan_jax.commands import running
from selfspan_jax.errors import UserError
from selfspan_jax.parallel.compiling import compile_all

TOP_OPERATIONS = 20
CACHE_BYTES = 64 * 2**20  # more than the L2 of any device meant here: chains read three times as much before they repeat
_PACKAGES = ("jax", "jaxlib", "flax", "torch", "triton")


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Call `function` and wait for its result; returns the result and the seconds."""
    began = time.perf_counter()
    out = jax.block_until_ready(function(*arguments))
    return out, time.perf_counter() - began


def run_seconds(function: Callable[[], Any], *, queued: int = 1, warm_ups: int = 2, repetitions: int = 5) -> list[float]:
    """Time repetitions of `queued` calls, dispatched one after the other and waited for once; returns seconds per call of each."""

    def repetition() -> Any:
        for _ in range(queued):
            out = function()
        return out

    seconds = [timed(repetition)[1] / queued for _ in range(warm_ups + repetitions)]
    return seconds[warm_ups:]


def compile_those_that_can(programs: Iterable[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """Compile functions for their arguments, several at once; an error takes the place of what this device cannot compile."""

    def compiled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        try:
            return jax.jit(function).lower(*arguments).compile()
        except (NotImplementedError, ValueError, RuntimeError) as error:
            return error

    return compile_all([functools.partial(functools.partial, compiled, *program) for program in programs])


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """Return the median, and the largest value minus the smallest."""
    return statistics.median(values), max(values) - min(values)


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    """Compute the RMS of the difference, relative to the RMS of what was expected."""
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.sqrt(jnp.mean((out - expected) ** 2) / jnp.mean(expected**2)))


def torch_ms(function: Callable[[], Any], device: str = "cuda") -> float:
    """Time a call of PyTorch in ms, by CUDA events; by the clock on a CPU."""
    if device == "cpu":
        began = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - began)
    import torch  # an extra of the benchmarks with peers

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@jax.jit
def _total(x: jax.Array) -> jax.Array:
    return jnp.sum(x, dtype=jnp.uint32)


@functools.cache  # of one process
def read_ceiling_tbps() -> float:
    """Measure how fast the memory can be read: a sum of 2 GiB (32 MiB on a CPU), the fastest of five repetitions, in TB/s."""
    size_bytes = 2**31 if jax.default_backend() == "gpu" else 2**25
    array = jax.random.bits(jax.random.key(0), (size_bytes // 4,), jnp.uint32)
    seconds = run_seconds(lambda: _total(array), queued=8, warm_ups=3, repetitions=5)
    return array.size * 4 / min(seconds) / 1e12


# By the name of a device's program: collectives of NCCL and the compiler; our and cuDNN's attention; our, cuBLAS' and its products.
# A collective's time has in it the waiting for the other devices.
_KINDS = {
    "communication": r"nccl|psum|(?i:all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective.?permute)",
    "attention": r"masked_attention|span_decode|prompt_attention|^(?!.*fused_linear).*mosaic_gpu|sdpa|fmha|flash",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|dot|fused_linear",
}


def kind_of(program: str) -> str:
    """Tell what a device's program does by its name."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, program)), "the rest")


class DeviceEvent(NamedTuple):
    """One run of a program on a device."""

    name: str
    operation: str  # of the compiled module; "" where the profiler does not say
    ms: float


def device_events(function: Callable[[], Any]) -> list[list[DeviceEvent]]:
    """Run `function` under the profiler and return what each GPU of this process ran; nothing on a CPU.

    Args:
      function: returns when the devices are done, or returns arrays to wait for.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(function())
        (file,) = Path(directory).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    devices = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    streams = ([line for line in plane.lines if line.name.startswith("Stream")] for plane in devices)
    return [
        [DeviceEvent(e.name, str(dict(e.stats).get("hlo_op", "")), e.duration_ns / 1e6) for line in lines for e in line.events]
        for lines in streams
    ]


def device_times(function: Callable[[], Any], steps: int, program: str = "") -> dict[str, Any]:
    """Profile `steps` steps: launches and ms per step by kind of operation, and the longest operations; the mean of this process's GPUs.

    Streams are summed up, so that what overlaps counts twice; copies between arrays are launches too. On a CPU there are no such events.

    Args:
      program: the text of the compiled program that is run. Then there is a list of the longest passes over arrays too ("the rest"):
        how often each runs in a step, its arrays and where it comes from in the program, as `arrays_of` says, and TB/s.
    """
    devices = device_events(function)
    times: dict[str, float] = collections.defaultdict(float)
    kinds: dict[str, float] = collections.defaultdict(float)
    passes: dict[str, list[float]] = collections.defaultdict(list)
    for event in (event for events in devices for event in events):
        per_step, kind = event.ms / (steps * len(devices)), kind_of(f"{event.operation} {event.name}")
        kinds[kind] += per_step
        times[f"{event.operation}: {event.name}"] += per_step
        if kind == "the rest":
            passes[event.name].append(per_step)
    longest = sorted(times.items(), key=lambda item: -item[1])[:TOP_OPERATIONS]
    launches = sum(map(len, devices)) / (steps * max(len(devices), 1))
    found: dict[str, Any] = {"launches_per_step": launches, "device_ms_by_kind": dict(kinds), "longest_operations_ms": dict(longest)}
    if program:
        known, found["longest_passes"] = arrays_of(program), []
        for name, each in sorted(passes.items(), key=lambda item: -sum(item[1]))[:TOP_OPERATIONS]:
            row = {"kernel": name, "ms": sum(each), "runs": len(each) / (steps * len(devices)), **known.get(name, {})}
            moved = row.get("bytes", 0) * row["runs"] / row["ms"] / 1e9
            found["longest_passes"].append(row | ({"terabytes_per_second": moved} if moved else {}))
    return found


_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) [\w-]+\((.*?)\)(?:, |$)", re.MULTILINE)


def arrays_of(program: str) -> dict[str, dict[str, Any]]:
    """Read the arrays that the kernels of a compiled program move off its text (HLO), by the kernels' names.

    Returns: "arrays", those that are read and written, "bytes" of them, each counted once and whole, and "source", the operation in the
      traced program. Instructions that do the same share the kernel of the first.
    """
    found = {match[1]: (match[2], match[3], match.end()) for match in _INSTRUCTION.finditer(program)}
    kernels = {}
    for name, (result, operands, end) in found.items():
        read = [found[operand][0] for operand in re.findall(r"%([\w.-]+)", operands) if operand in found]
        arrays = [re.findall(r"\w+\[[\d,]*\]", types) for types in (" ".join(read), result)]
        source = re.search(r'op_name="([^"]*)"', program[end : program.find("\n", end)])
        kernels[re.sub(r"[.-]", "_", name)] = {
            "arrays": " -> ".join(map(" ".join, arrays)),
            "bytes": sum(_num_bytes(array) for array in itertools.chain(*arrays)),
            "source": source[1] if source else "",
        }
    return kernels


def _num_bytes(array: str) -> int:
    """Count the bytes of an array as HLO writes it, bf16[16,32]."""
    dtype, sizes = array.rstrip("]").split("[")
    bits = re.search(r"\d+", dtype)
    return math.prod(int(size) for size in sizes.split(",") if size) * (int(bits[0]) if bits else 8) // 8


def kernel_us(function: Callable[[], Any], prefix: str) -> float:
    """Profile a program and add up the median microseconds of each kernel whose name begins with `prefix`.

    What the kernels wait for each other is not in it.
    """
    durations: dict[str, list[float]] = {}
    for event in (event for events in device_events(function) for event in events if event.name.startswith(prefix)):
        durations.setdefault(event.name, []).append(1e3 * event.ms)
    return sum(statistics.median(each) for each in durations.values())


def report_header() -> dict[str, Any]:
    """Make the header of a report: the device, versions of the installed packages, and the read ceiling, measured here."""
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES if importlib.util.find_spec(name.replace("-", "_"))},
        "read_ceiling_terabytes_per_second": read_ceiling_tbps(),
    }


def header_line(header: dict[str, Any], devices: str | None = None) -> str:
    """Write a header as one line; `devices` replaces the device's name where there are several."""
    ceiling = header["read_ceiling_terabytes_per_second"]
    return f"{devices or header['device']}, JAX {header['versions']['jax']}, read ceiling {ceiling:.2f} TB/s"


class KernelReport:
    """Rows of kernel timings: printed as they come, and written as JSON beside a header."""

    def __init__(self, path: Path | None, **settings: Any):
        """Measure the header and print it; `settings` are those of the run."""
        header = report_header()
        self.content: dict[str, Any] = {**header, **settings, "cases": []}
        self.ceiling_tbps: float = header["read_ceiling_terabytes_per_second"]
        self._path = path
        print(header_line(header), flush=True)

    def add(self, label: str, microseconds: float, moved_bytes: int, case: dict[str, Any], **more: Any) -> None:
        """Add a timing beside the time that its bytes take at the read ceiling.

        Args:
          label: of the printed line.
          case: what was timed, the first keys of the row; `more` are the last.
        """
        roofline_us = moved_bytes / self.ceiling_tbps / 1e6
        row = {
            **case,
            "microseconds": microseconds,
            "bytes": moved_bytes,
            "roofline_microseconds": roofline_us,
            "terabytes_per_second": moved_bytes / microseconds / 1e6,
            "percent_of_ceiling": 100 * roofline_us / microseconds,
            **more,
        }
        self.content["cases"].append(row)
        extras = (f", {key.split('_')[0]} {more[key]:.1f} us" for key in ("net_microseconds", "kernel_microseconds") if key in more)
        print(
            f"{label}{microseconds:9.2f} us {moved_bytes / 1e6:8.1f} MB {row['terabytes_per_second']:6.2f} TB/s "
            f"{row['percent_of_ceiling']:5.0f}% of the ceiling{''.join(extras)}",
            flush=True,
        )

    def not_run(self, label: str, reason: object) -> None:
        """Print why something was not timed: the first line of an error."""
        print(f"{label} not run: {str(reason).splitlines()[0][:200]}", flush=True)

    def save(self) -> None:
        """Write what there is, so that a run cut short leaves it."""
        files.write_rows(self._path, self.content, complete=False)

    def __enter__(self) -> KernelReport:
        return self

    def __exit__(self, *_: object) -> None:
        files.write_rows(self._path, self.content, complete=True)


run_command = functools.partial(commandline.run_command, user_error=UserError, within=running)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCommand:
    """What the benchmarks of kernels have: a seed, the file of results, and their report, on a GPU."""

    seed: int = 0
    """Of the data."""
    json: Path | None = None
    """Write the figures into this file, as soon as they are there; - is standard output."""

    def report(self, **settings: Any) -> KernelReport:
        """Open the report of a run, with its seed and settings. Raises UserError without a GPU."""
        if (platform := jax.devices()[0].platform) != "gpu":
            raise UserError(f"needs a GPU, the default device is a {platform}")
        return KernelReport(self.json, seed=self.seed, **settings)
