"""Linear maps of few and of many rows, fused with what stands before and after them in a Llama layer."""

from pallas_kernels.linear.api import expected_bytes, fused_linear, unsupported_reason

__all__ = ["expected_bytes", "fused_linear", "unsupported_reason"]
