"""Rotary positions of queries and keys: for whole sequences, with gradients, and for one decode step, with its pool writes."""

from pallas_kernels.rotary.api import RUN_TOKENS, norm_heads, rotate_and_write, rotate_heads, unsupported_reason

__all__ = ["RUN_TOKENS", "norm_heads", "rotate_and_write", "rotate_heads", "unsupported_reason"]
