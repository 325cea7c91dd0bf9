"""Sparse decode attention: one query per sequence over the pool rows in its slots."""

from pallas_kernels.span_decode.api import HostRows, expected_bytes, rotate_and_attend, span_decode_attention, unsupported_reason

__all__ = ["HostRows", "expected_bytes", "rotate_and_attend", "span_decode_attention", "unsupported_reason"]
