"""Attention of whole sequences under any mask, with gradients: training and prefill."""

from pallas_kernels.sequence_attention.api import masked_attention, unsupported_reason
from pallas_kernels.sequence_attention.mask import TileMask

__all__ = ["TileMask", "masked_attention", "unsupported_reason"]
