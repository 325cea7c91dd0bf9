"""Matrix products of few rows, with what stands before and after them in a Llama layer."""

from pallas_kernels.linear.api import expected_bytes, fused_linear, unsupported_reason
from pallas_kernels.linear.weight import QuantizedWeight, quantize_weight

__all__ = [
    "QuantizedWeight",
    "expected_bytes",
    "fused_linear",
    "quantize_weight",
    "unsupported_reason",
]
