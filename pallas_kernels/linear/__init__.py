"""Skinny GEMMs: few rows times a large matrix, fused with what stands before and after them in a Llama layer."""

from pallas_kernels.linear.api import copies_beside, expected_bytes, fused_linear, may_launch_early, unsupported_reason
from pallas_kernels.linear.lookup import look_up
from pallas_kernels.linear.reference import ScaledRows, SplitRows, rms_norm

__all__ = [
    "ScaledRows",
    "SplitRows",
    "copies_beside",
    "expected_bytes",
    "fused_linear",
    "look_up",
    "may_launch_early",
    "rms_norm",
    "unsupported_reason",
]
