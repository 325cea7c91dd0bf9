"""Gather-based sparse decode attention: one query per sequence over the rows that it names."""

from pallas_kernels.span_decode.api import (
    expected_bytes,
    span_decode_attention,
    unsupported_reason,
)
from pallas_kernels.span_decode.pool import QuantizedPool, quantize_pool

__all__ = [
    "QuantizedPool",
    "expected_bytes",
    "quantize_pool",
    "span_decode_attention",
    "unsupported_reason",
]
