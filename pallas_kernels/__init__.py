"""Accelerator kernels of selfspan. Depends on JAX only; knows nothing of spans or models."""

from pallas_kernels.linear import QuantizedWeight, fused_linear, quantize_weight
from pallas_kernels.rotary import rotate_and_write
from pallas_kernels.sequence_attention import TileMask, masked_attention
from pallas_kernels.slots import update_row_lists
from pallas_kernels.span_decode import (
    QuantizedPool,
    expected_bytes,
    quantize_pool,
    span_decode_attention,
    unsupported_reason,
)

__all__ = [
    "QuantizedPool",
    "QuantizedWeight",
    "TileMask",
    "expected_bytes",
    "fused_linear",
    "masked_attention",
    "quantize_pool",
    "quantize_weight",
    "rotate_and_write",
    "span_decode_attention",
    "unsupported_reason",
    "update_row_lists",
]
