"""SwiGLU, with a gradient in one pass."""

from pallas_kernels.swiglu.api import silu_and_mul, silu_and_mul_gradient, unsupported_reason

__all__ = ["silu_and_mul", "silu_and_mul_gradient", "unsupported_reason"]
