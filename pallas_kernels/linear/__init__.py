"""Skinny GEMMs: few rows times a large matrix, fused with what stands before and after them in a Llama layer."""

from pallas_kernels.linear.api import expected_bytes, fused_linear, unsupported_reason
from pallas_kernels.linear.quantized import QuantizedWeight, quantize_weight

__all__ = [
    "QuantizedWeight",
    "expected_bytes",
    "fused_linear",
    "quantize_weight",
    "unsupported_reason",
]
