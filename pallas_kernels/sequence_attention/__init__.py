"""Attention of whole sequences under any mask, with gradients: training and prefill."""

from pallas_kernels.sequence_attention.api import masked_attention, prompt_attention, unsupported_reason
from pallas_kernels.sequence_attention.mask import TileMask
from pallas_kernels.sequence_attention.prompts import PromptMask

__all__ = ["PromptMask", "TileMask", "masked_attention", "prompt_attention", "unsupported_reason"]
