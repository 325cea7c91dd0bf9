"""Attention of whole sequences under any mask, with gradients: training and prefill."""

from pallas_kernels.sequence_attention.api import masked_attention, packed_rows_pay, unsupported_reason
from pallas_kernels.sequence_attention.mask import PackedMask, TileMask

__all__ = ["PackedMask", "TileMask", "masked_attention", "packed_rows_pay", "unsupported_reason"]
