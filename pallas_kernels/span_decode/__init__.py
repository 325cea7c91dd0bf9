"""Sparse decode attention: one query per sequence over the pool rows in its slots."""

from pallas_kernels.span_decode.api import (
    expected_bytes,
    span_decode_attention,
    unsupported_reason,
)
from pallas_kernels.span_decode.quantized import QuantizedPool, quantize_pool

__all__ = [
    "QuantizedPool",
    "expected_bytes",
    "quantize_pool",
    "span_decode_attention",
    "unsupported_reason",
]
