"""SwiGLU, with a gradient in one pass."""

from pallas_kernels.swiglu.api import silu_and_mul, unsupported_reason

__all__ = ["silu_and_mul", "unsupported_reason"]
