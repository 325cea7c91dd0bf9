"""Where a device's time goes: the profiler's events of its programs, by kind of operation."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

TOP_OPERATIONS = 20

# By the name of a device's program: NCCL's; ours and cuDNN's attention; matrix products of ours, of cuBLAS and of the compiler.
# A collective's time has in it the waiting for the other devices.
_KINDS = {
    "communication": r"nccl|(?i:all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective.?permute)",
    "attention": r"masked_attention|span_decode|sdpa|fmha|flash",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|dot|fused_linear",
}


def kind_of(program: str) -> str:
    """What a device's program does, by its name."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, program)), "the rest")


def device_times(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Milliseconds per step that a device spends, by kind of operation, and on what most: the mean of this process's devices.

    Streams are summed up, so that what overlaps counts twice. On a CPU there are no such events and both are empty.

    Args:
      run: does so many steps and returns when they are done.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (file,) = Path(directory).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    times: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    devices = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    for plane in devices:
        for line in plane.lines:
            for event in line.events if line.name.startswith("Stream") else ():
                operation = next((str(value) for name, value in event.stats if name == "hlo_op"), "")
                kinds[kind_of(f"{operation} {event.name}")] += event.duration_ns
                times[f"{operation}: {event.name}"] += event.duration_ns
    per_step = 1e6 * steps * max(1, len(devices))
    return {
        "device_ms_by_kind": {kind: total / per_step for kind, total in kinds.items()},
        "longest_operations_ms": {name: total / per_step for name, total in times.most_common(TOP_OPERATIONS)},
    }
