"""The public function: validate, choose an implementation, call it; the gradient is by hand."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES, choose_implementation, device_reason, require
from pallas_kernels.swiglu import reference, triton

IMPLEMENTATIONS = ("xla", "triton")


def silu_and_mul(gate_up: jax.Array, *, implementation: str | None = None, interpret: bool = False) -> jax.Array:
    """Compute silu(gate) * up (SwiGLU, 2002.05202, equation 6): silu in float32, rounded before the product.

    Args:
      gate_up: `[R, 2 F]`, all gates, then all ups; bfloat16, float16 or float32.
      implementation, interpret: of the gradient, as `pallas_kernels` says (float32 by XLA); XLA computes the value in one pass.

    Returns:
      `[R, F]` in the dtype of `gate_up`.
    """
    fits = gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0 and gate_up.dtype in FLOAT_DTYPES
    require(fits, "gate_up must be a float [R, 2 F]", gate_up)
    return _differentiable(_choose(implementation, gate_up, interpret), interpret, gate_up)


def silu_and_mul_gradient(gate_up: jax.Array, grad: jax.Array) -> jax.Array:
    """Compute the gradient of `silu_and_mul`, `[R, 2 F]`, from that of its result, `[R, F]`, by the best implementation."""
    return _gradient(_choose(None, gate_up, False), False, gate_up, grad)


def _choose(implementation: str | None, gate_up: jax.Array, interpret: bool) -> str:
    """Choose what computes the gradient."""
    preferred = ("xla",) if gate_up.dtype == jnp.float32 else ("triton", "xla")
    return choose_implementation(implementation, preferred, lambda name: unsupported_reason(name, gate_up, interpret=interpret))


def unsupported_reason(implementation: str, gate_up: jax.Array, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot compute the gradient on the default device; None when it can."""
    if reason := device_reason(implementation, IMPLEMENTATIONS, interpret):
        return reason
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if implementation == "triton" and (num_rows % triton.TILE[0] or width % triton.TILE[1]):
        return f"rows and width must be multiples of {triton.TILE[0]} and {triton.TILE[1]}, got {num_rows} and {width}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(implementation, interpret, gate_up):
    return reference.xla_silu_and_mul(gate_up)


def _forward(implementation, interpret, gate_up):
    return _differentiable(implementation, interpret, gate_up), gate_up


def _gradient(implementation, interpret, gate_up, grad):
    if implementation == "triton":
        return triton.triton_gradient(gate_up, grad, interpret=interpret)
    return reference.xla_gradient(gate_up, grad)


def _backward(*args):
    return (_gradient(*args),)


_differentiable.defvjp(_forward, _backward)
