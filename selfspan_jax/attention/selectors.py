"""Sparse prefill: the selectors by name, and where they apply."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from jaxtyping import Array, Bool

from pallas_kernels import TileMask
from pallas_kernels.prompt_attention import BLOCK, BlockMeans, PromptMask, SampleAttention, Selector, WindowTiles, choose_tiles
from selfspan_jax.errors import UserError

__all__ = ["BLOCK", "SELECTORS", "BlockMeans", "Mask", "SampleAttention", "Selector", "WindowTiles", "get_selector", "prompt_mask"]

SELECTORS: dict[str, Selector | None] = {"dense": None, "sample": SampleAttention(), "blocks": BlockMeans()}
Mask = PromptMask | TileMask | Bool[Array, "B Q T"]


def get_selector(prefill: str | Hashable) -> Selector | None:
    """Look up a selector by name, None for "dense"; a selector is returned as it is. Raises UserError for anything else."""
    if isinstance(prefill, str) and prefill in SELECTORS:
        return SELECTORS[prefill]
    if not isinstance(prefill, Selector):
        raise UserError(f"prefill is {prefill!r}; allowed: {', '.join(SELECTORS)}, or a selector")
    return prefill


def prompt_mask(mask: Mask, prefill: str | Hashable, num_queries: int) -> Callable[[Array, Array, Array], Mask]:
    """Return the function from queries [B, Q, N, H] and pools [P, K, H] to the mask that the queries are read under.

    Read densely are masks that are no `PromptMask` (a policy's own, or of prompts that go on in a response), chunks of no multiple of 128
    queries, and rooms for fewer tokens than the selector's `dense_below_tokens`. Raises UserError for local masks, and such as `attend`.
    """
    selector = get_selector(prefill)
    if selector and hasattr(mask, "attend"):
        raise UserError(f"prefill is {prefill!r}; allowed with an attention that weighs all keys itself: dense")
    if selector is None or not isinstance(mask, PromptMask):
        return lambda *_: mask
    if mask.query_labels is not None:
        wrong = "is for prompts that read everything before; these read labels or a window: exact tiles by labels are already sparse"
        raise UserError(f"prefill={prefill!r} {wrong}")
    if num_queries % BLOCK or mask.num_keys % BLOCK or mask.num_keys < selector.dense_below_tokens:
        return lambda *_: mask
    return lambda q, k_pool, _: choose_tiles(selector, q, k_pool, mask)
