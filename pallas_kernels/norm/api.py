"""The public function: validate, choose an implementation, call it; the gradient is by hand."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES, choose_implementation, device_reason, require
from pallas_kernels.linear.reference import rms_norm
from pallas_kernels.norm import triton

IMPLEMENTATIONS = ("xla", "triton")


def fork_rms_norm(
    x: jax.Array, scale: jax.Array, *, eps: float = 1e-5, implementation: str | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return rows as they are, for the residual, and RMS-normalised (1910.07467, equation 4), so that one pass adds up both gradients.

    Args:
      x: `[..., D]`, bfloat16, float16 or float32.
      scale: `[D]`, in any float dtype.
      eps: added to the mean square, a static number.
      implementation, interpret: of the gradient, as `pallas_kernels` says (float32 by XLA); XLA computes the values.
    """
    fits = x.ndim > 0 and scale.shape == x.shape[-1:] and x.dtype in FLOAT_DTYPES
    require(fits, "x must be a float [..., D] and scale [D]", x, scale)
    preferred = ("xla",) if x.dtype == jnp.float32 else ("triton", "xla")
    chosen = choose_implementation(implementation, preferred, lambda name: unsupported_reason(name, x, interpret=interpret))
    return (x, rms_norm(x, scale, eps)) if chosen == "xla" else _fork(float(eps), interpret, x, scale)


def unsupported_reason(implementation: str, x: jax.Array, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot compute the gradient on the default device; None when it can."""
    if (reason := device_reason(implementation, IMPLEMENTATIONS, interpret)) or implementation == "xla":
        return reason
    return triton.unsupported_reason(x.size // x.shape[-1], x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fork(eps, interpret, x, scale):
    return x, rms_norm(x, scale, eps)


def _forward(eps, interpret, x, scale):
    return _fork(eps, interpret, x, scale), (x, scale)


def _backward(eps, interpret, saved, grads):
    x, scale = saved
    rows, passed, grad = (array.reshape(-1, x.shape[-1]) for array in (x, *grads))
    dx, dscale = triton.triton_gradient(rows, scale, grad, passed, eps, interpret=interpret)
    return dx.reshape(x.shape), dscale.astype(scale.dtype)


_fork.defvjp(_forward, _backward)
