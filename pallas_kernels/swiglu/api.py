"""The public function: validate, choose an implementation, call it; the gradient is by hand."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES, check_known, choose_implementation, device_reason
from pallas_kernels.swiglu import triton
from pallas_kernels.swiglu.reference import xla_gradient, xla_silu_and_mul

IMPLEMENTATIONS = ("xla", "triton")


def silu_and_mul(gate_up: jax.Array, *, implementation: str | None = None, interpret: bool = False) -> jax.Array:
    """Compute silu(gate) * up (SwiGLU, 2002.05202, equation 6): silu in float32, rounded before the product.

    Args:
      gate_up: `[R, 2 F]`, all gates, then all ups; bfloat16, float16 or float32.
      implementation: of the gradient, since XLA computes the value in one pass. None for the best one that the default
        device supports (float32 by XLA), or one of `IMPLEMENTATIONS`.
      interpret: run the Pallas implementation in its interpreter (tests on machines without a GPU).

    Returns:
      `[R, F]` in the dtype of `gate_up`.

    Raises:
      ValueError: `gate_up` is no such array.
      NotImplementedError: the named implementation cannot do this.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or gate_up.dtype not in FLOAT_DTYPES:
        raise ValueError(f"gate_up must be a float [R, 2 F], got {gate_up.dtype}{list(gate_up.shape)}")
    chosen = choose_implementation(
        implementation,
        IMPLEMENTATIONS,
        lambda name: unsupported_reason(name, gate_up, interpret=interpret),
        preferred=("xla",) if gate_up.dtype == jnp.float32 else ("triton", "xla"),
    )
    return _differentiable(chosen, interpret, gate_up)


def unsupported_reason(implementation: str, gate_up: jax.Array, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot compute the gradient on the default device; None when it can."""
    check_known(implementation, IMPLEMENTATIONS)
    if implementation == "xla":
        return None
    if not interpret and (reason := device_reason(80)):
        return reason
    return triton.unsupported_reason(gate_up.shape[0], gate_up.shape[1] // 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(implementation, interpret, gate_up):
    return xla_silu_and_mul(gate_up)


def _forward(implementation, interpret, gate_up):
    return _differentiable(implementation, interpret, gate_up), gate_up


def _backward(implementation, interpret, gate_up, grad):
    if implementation == "triton":
        return (triton.triton_gradient(gate_up, grad, interpret=interpret),)
    return (xla_gradient(gate_up, grad),)


_differentiable.defvjp(_forward, _backward)
