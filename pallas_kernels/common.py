"""Shared by all kernels: the choice of an implementation, the device's limits, constants, matrix products."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.jax_triton import missing_reason

FLOAT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
MULTIPROCESSORS = 132  # of an H100 or H200; another number costs a little balance, nothing else
PLAIN = ("reference", "xla")  # implementations in plain JAX, which run anywhere
LOG2_E = 1.4426950408889634

# Dense bfloat16 products with float32 sums, per second, by a part of the device's name: NVIDIA's data sheets, without sparsity.
_BF16_PEAKS = {
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def choose_implementation(implementation: str | None, preferred: Sequence[str], unsupported_reason: Callable[[str], str | None]) -> str:
    """Choose how to compute: `implementation` where it is named, else the first of `preferred` that can do it.

    Args:
      preferred: the best first; the last one can compute anything.
      unsupported_reason: says why one of them cannot compute this, None when it can; raises ValueError for one that the op
        does not have.

    Raises: NotImplementedError where the implementation that was named cannot compute this.
    """
    if implementation is None:
        return next((name for name in preferred[:-1] if unsupported_reason(name) is None), preferred[-1])
    if reason := unsupported_reason(implementation):
        raise NotImplementedError(f"implementation={implementation!r}: {reason}")
    return implementation


def device_reason(implementation: str, known: Sequence[str], interpret: bool, min_capability: int = 80) -> str | None:
    """Say why the default device cannot run an implementation; None when it can.

    Args:
      known: the implementations of the op.
      interpret: run it in the interpreter, which any device can.
      min_capability: the compute capability that the kernel needs (80: Ampere, 90: Hopper).

    Raises: ValueError for an implementation that the op does not have.
    """
    require(implementation in known, f"unknown implementation {implementation!r}, choose from {', '.join(known)}")
    if implementation == "jax_triton" and (reason := missing_reason(interpret)):
        return reason
    if interpret or implementation in PLAIN:
        return None
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "").replace(".", "")  # "90"; "gfx942" on AMD devices
    if device.platform != "gpu" or not capability.isdigit():
        return f"needs a CUDA device, the default device is a {device.device_kind} (interpret=True runs anywhere)"
    if int(capability) < min_capability:
        return f"needs compute capability {min_capability / 10}, {device.device_kind} has {int(capability) / 10}"
    return None


def bf16_peak(device_kind: str) -> float | None:
    """Return the bfloat16 FLOP/s of a device's matrix units; None for a device not in the list."""
    return next((peak for name, peak in _BF16_PEAKS.items() if name in device_kind), None)


def head_size_reason(head_size: int, allowed: Sequence[int] = (32, 64, 128)) -> str | None:
    """Say why a kernel whose tiles are whole heads cannot take heads of this size; None when it can."""
    return None if head_size in allowed else f"head size must be {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}, got {head_size}"


def require(fits: bool, wanted: str, *found: object) -> None:
    """Raise ValueError unless it fits: "WANTED, got FOUND", arrays by their dtypes and shapes."""
    if not fits:
        got = ", ".join(f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") and hasattr(x, "shape") else str(x) for x in found)
        raise ValueError(f"{wanted}, got {got}" if found else wanted)


def launch_next(program: jax.Array) -> jax.Array:
    """Return a program's index, having let the kernel that follows in a recorded graph be launched while this one runs.

    Programmatic dependent launch, on Hopper. XLA joins the kernels of a graph for it, and each that it compiles, from Triton or by itself,
    waits at its entry until those before it are done (`xla_gpu_enable_pdl`, on by default). But none says that the next may come, so that
    it comes when the last program has ended. What reads the results must be a kernel of this package: XLA's own may read inputs before
    they wait, by instructions for memory that does not change.
    """
    asm = "griddepcontrol.launch_dependents; mov.b32 $0, $1;"
    lanes = jax.ShapeDtypeStruct((32,), jnp.int32)  # a warp's: the result is used, without which the compiler would drop it
    told = plt.elementwise_inline_asm(
        asm, args=[jnp.broadcast_to(program, lanes.shape)], constraints="=r,r", pack=1, result_shape_dtypes=[lanes]
    )
    return jnp.max(told[0])


def dot(a: jax.Array, b: jax.Array, contracting: tuple[tuple[int], tuple[int]]) -> jax.Array:
    """Multiply two matrices inside a kernel: float32 sums, and IEEE products (not TF32) of float32 numbers."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32)
