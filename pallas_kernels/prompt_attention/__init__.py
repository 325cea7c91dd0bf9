"""Attention of prompts over the cache's pools, by positions and labels: prefill."""

from pallas_kernels.prompt_attention.api import prompt_attention, unsupported_reason
from pallas_kernels.prompt_attention.mask import PromptMask

__all__ = ["PromptMask", "prompt_attention", "unsupported_reason"]
