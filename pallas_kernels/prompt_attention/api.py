"""The public function: validate, choose an implementation, call it."""

import math

import jax

from pallas_kernels.common import FLOAT_DTYPES, choose_implementation, device_reason, head_size_reason, require
from pallas_kernels.prompt_attention import triton
from pallas_kernels.prompt_attention.heuristics import mosaic_config, triton_config
from pallas_kernels.prompt_attention.mask import MIN_BLOCK, PromptMask
from pallas_kernels.prompt_attention.reference import reference_prompt_attention

IMPLEMENTATIONS = ("reference", "triton", "mosaic")


def prompt_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    mask: PromptMask,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute the attention of prompts over pooled keys and values; no gradients.

    Args:
      q: `[B, T, N, H]` queries of some tokens of each prompt, bfloat16, float16 or float32. Query head `n` reads kv head
        `n // (N // K)`.
      k_pool, v_pool: `[P, K, H]` in the dtype of `q`; key s of sequence b is row `b * mask.num_keys + s`.
      mask: which keys each query may attend to.
      scale: factor on the scores, `1 / sqrt(H)` unless given; a static number above 0.
      implementation, interpret: as `pallas_kernels` says.

    Returns:
      `[B, T, N, H]` in the dtype of `q`; arbitrary for queries after the end of their prompt.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    _validate(q, k_pool, v_pool, mask, scale)
    chosen = choose_implementation(
        implementation, ("mosaic", "triton", "reference"), lambda name: unsupported_reason(name, q, k_pool, mask, interpret=interpret)
    )
    if chosen == "reference":
        return reference_prompt_attention(q, k_pool, v_pool, mask, scale=scale)
    if chosen == "mosaic":
        from pallas_kernels.prompt_attention import mosaic  # it takes a second to import

        return mosaic.mosaic_prompt_attention(q, k_pool, v_pool, mask, scale=scale, config=mosaic_config(mask.num_keys, mask.blocks))
    config = triton_config(q.shape[1], q.shape[3], q.dtype.itemsize, mask.blocks)
    return triton.triton_prompt_attention(q, k_pool, v_pool, mask, scale=scale, config=config, interpret=interpret)


def unsupported_reason(implementation: str, q: jax.Array, k_pool: jax.Array, mask: PromptMask, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot compute this on the default device; None when it can."""
    capability = 90 if implementation == "mosaic" else 80
    if (reason := device_reason(implementation, IMPLEMENTATIONS, interpret, capability)) or implementation == "reference":
        return reason
    if implementation == "mosaic":
        from pallas_kernels.prompt_attention import mosaic

        return "it has no interpreter" if interpret else mosaic.unsupported_reason(q, k_pool, mask)
    return head_size_reason(q.shape[3])


def _validate(q, k_pool, v_pool, mask: PromptMask, scale: float) -> None:
    require(q.ndim == 4 and q.dtype in FLOAT_DTYPES, "q must be bfloat16, float16 or float32 [B, T, N, H]", q)
    batch, num_queries, num_heads, head_size = q.shape
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        fits = pool.ndim == 3 and pool.shape[2] == head_size and pool.dtype == q.dtype and pool.shape == k_pool.shape
        require(fits, f"{name} must be {q.dtype} [P, K, {head_size}], both alike", pool)
    fits = k_pool.shape[1] > 0 and num_heads % k_pool.shape[1] == 0
    require(fits, f"the {num_heads} query heads must be a multiple of the {k_pool.shape[1]} kv heads")
    require(k_pool.shape[0] >= batch * mask.num_keys, f"the pools must have {batch} times {mask.num_keys} rows", k_pool)
    fits = mask.lengths.shape == (batch,) and mask.num_queries in (None, num_queries)
    require(fits, f"the mask must be of {batch} sequences with {num_queries} queries", mask.lengths, mask.num_queries)
    fits = num_queries % MIN_BLOCK == 0 and mask.num_keys % MIN_BLOCK == 0
    require(fits, f"the numbers of queries and keys must be multiples of {MIN_BLOCK}", num_queries, mask.num_keys)
    require(scale > 0, "scale must be above 0", scale)
