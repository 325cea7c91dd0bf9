"""Attention of prompts in plain JAX."""

import jax

from pallas_kernels.prompt_attention.mask import PromptMask, prompt_rows
from pallas_kernels.sequence_attention.reference import reference_attention


def reference_prompt_attention(q: jax.Array, k_pool: jax.Array, v_pool: jax.Array, mask: PromptMask, *, scale: float) -> jax.Array:
    """Compute all pairs in float32 and keep those that the mask allows, in the tiles that it lists."""
    k, v = (prompt_rows(pool, q.shape[0], mask.num_keys) for pool in (k_pool, v_pool))
    return reference_attention(q, k, v, mask.pairs(q.shape[1]), scale=scale)
