"""Attention of whole sequences under any mask, with gradients: training and prefill."""

from pallas_kernels.sequence_attention.api import masked_attention, unsupported_reason
from pallas_kernels.sequence_attention.mask import PACKED_BLOCK, PackedMask, TileMask

__all__ = ["PACKED_BLOCK", "PackedMask", "TileMask", "masked_attention", "unsupported_reason"]
