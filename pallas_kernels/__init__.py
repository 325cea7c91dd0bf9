"""Accelerator kernels of selfspan. Depends on JAX only; knows nothing of spans or models."""

from pallas_kernels.span_decode import (
    QuantizedPool,
    expected_bytes,
    quantize_pool,
    span_decode_attention,
    unsupported_reason,
)

__all__ = [
    "QuantizedPool",
    "expected_bytes",
    "quantize_pool",
    "span_decode_attention",
    "unsupported_reason",
]
