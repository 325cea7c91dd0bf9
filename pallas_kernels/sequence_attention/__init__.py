"""Attention of whole sequences under any mask, with gradients: training and prefill."""

from pallas_kernels.sequence_attention.api import attention_flops, masked_attention, unsupported_reason
from pallas_kernels.sequence_attention.mask import TileMask

__all__ = ["TileMask", "attention_flops", "masked_attention", "unsupported_reason"]
