"""Attention of prompts over the cache's pools, by positions and labels: prefill, whole or of the tiles that a selector chooses."""

from pallas_kernels.prompt_attention.api import prompt_attention, unsupported_reason
from pallas_kernels.prompt_attention.mask import PromptMask, prompt_rows
from pallas_kernels.prompt_attention.mass import BLOCK, Retained, retained_mass, tile_mass
from pallas_kernels.prompt_attention.selectors import BlockMeans, SampleAttention, Selector, WindowTiles, choose_tiles

__all__ = [
    "BLOCK",
    "BlockMeans",
    "PromptMask",
    "Retained",
    "SampleAttention",
    "Selector",
    "WindowTiles",
    "choose_tiles",
    "prompt_attention",
    "prompt_rows",
    "retained_mass",
    "tile_mass",
    "unsupported_reason",
]
