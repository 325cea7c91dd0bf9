"""The public function: validate, choose an implementation, pad, launch, unpad; the gradient is by hand."""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES, choose_implementation, device_reason, head_size_reason, require
from pallas_kernels.sequence_attention import triton
from pallas_kernels.sequence_attention.mask import PACKED_BLOCK, PackedMask, TileMask
from pallas_kernels.sequence_attention.reference import reference_attention

IMPLEMENTATIONS = ("reference", "triton", "mosaic")
# Attention of a step of SmolLM2's shape takes 23.8 ms in rows of 512 tokens, by Triton's kernels 23.5; 91.6 and 124.4 at 4,096 (one H200).
# A layer of rows of 4,096 with sequences of 200 to 1,800, some 1,000, takes 1.42 and 1.75 ms (one H100).
MIN_PACKED_TOKENS = 1024


def masked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: TileMask | PackedMask,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute softmax(scale q k^T) v over the pairs that the mask allows, with gradients.

    Args:
      q: `[B, T, N, H]` queries, bfloat16, float16 or float32. Query head `n` reads kv head `n // (N // K)`.
      k, v: `[B, S, K, H]` keys and values in the dtype of `q`.
      mask: which of the S keys each of the T queries may attend to, the same for all heads. A query that may attend to
        nothing gives zeros. "triton" reads a `TileMask`, "mosaic" a `PackedMask`, "reference" both.
      scale: factor on the scores, `1 / sqrt(H)` unless given; a static number above 0.
      implementation, interpret: as `pallas_kernels` says.

    Returns:
      `[B, T, N, H]` in the dtype of `q`.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    _validate(q, k, v, mask, scale)
    packed = isinstance(mask, PackedMask)

    def reason(name: str) -> str | None:
        found = unsupported_reason(name, q.shape[3], interpret=interpret)
        if name == "triton" and packed:
            return found or "masks of packed rows are only in mosaic"
        if name == "mosaic" and (q.dtype == jnp.float32 or not packed):
            return found or (f"the dtype must be bfloat16 or float16, got {q.dtype}" if packed else "masks in bits are only in triton")
        return found

    chosen = choose_implementation(implementation, ("mosaic" if packed else "triton", "reference"), reason)
    if q.size == 0 or k.size == 0:
        return jnp.zeros(q.shape, q.dtype)
    if chosen == "reference":
        return reference_attention(q, k, v, mask.unpacked(), scale=scale)
    if isinstance(mask, TileMask):
        q, k, v = _pad(q, mask.block_q), _pad(k, mask.block_k), _pad(v, mask.block_k)
    return _differentiable(scale, interpret, q, k, v, mask)[:, : mask.num_queries]


def packed_rows_pay(num_tokens: int) -> bool:
    """Tell whether "mosaic" is faster than "triton" for packed rows of so many tokens: not for 512 of one sequence, long before 4,096."""
    return num_tokens % PACKED_BLOCK == 0 and num_tokens >= MIN_PACKED_TOKENS


def unsupported_reason(implementation: str, head_size: int, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot compute heads of this size on the default device; None when it can."""
    capability = 90 if implementation == "mosaic" else 80
    if (reason := device_reason(implementation, IMPLEMENTATIONS, interpret, capability)) or implementation == "reference":
        return reason
    if implementation == "mosaic":
        return "it has no interpreter" if interpret else None if head_size == 64 else f"head size must be 64, got {head_size}"
    return head_size_reason(head_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(scale, interpret, q, k, v, mask):
    return _forward(scale, interpret, q, k, v, mask)[0]


def _kernels(mask: TileMask | PackedMask, interpret: bool):
    """Return the forward and the backward function of the kernels that read such a mask."""
    if isinstance(mask, PackedMask):
        from pallas_kernels.sequence_attention import mosaic  # it takes a second to import

        return mosaic.forward, mosaic.backward
    return functools.partial(triton.forward, interpret=interpret), functools.partial(triton.backward, interpret=interpret)


def _forward(scale, interpret, q, k, v, mask):
    out, lse = _kernels(mask, interpret)[0](q, k, v, mask, scale=scale)
    return out, (q, k, v, mask, out, lse)


def _backward(scale, interpret, saved, grad):
    return (*_kernels(saved[3], interpret)[1](*saved, grad, scale=scale), None)


_differentiable.defvjp(_forward, _backward)


def _pad(x: jax.Array, block: int) -> jax.Array:
    missing = -x.shape[1] % block
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def _validate(q, k, v, mask: TileMask | PackedMask, scale: float) -> None:
    for name, array, letters in (("q", q, "[B, T, N, H]"), ("k", k, "[B, S, K, H]"), ("v", v, "[B, S, K, H]")):
        require(array.ndim == 4, f"{name} must be {letters}", array)
    require(q.dtype in FLOAT_DTYPES, "q must be bfloat16, float16 or float32", q)
    fits = k.shape == v.shape and k.dtype == v.dtype == q.dtype
    require(fits, f"k and v must agree and have the dtype {q.dtype} of q", k, v)
    fits = k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3]
    require(fits, f"q {list(q.shape)} and k {list(k.shape)} must share batch and head size")
    fits = k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0
    require(fits, f"the {q.shape[2]} query heads must be a multiple of the {k.shape[2]} kv heads")
    num_rows = (mask.first_keys if isinstance(mask, PackedMask) else mask.bits).shape[0]
    wanted, found = [*q.shape[:2], k.shape[1]], [num_rows, mask.num_queries, mask.num_keys]
    require(wanted == found, f"the mask must be [B, T, S] = {wanted}", found)
    require(scale > 0, "scale must be above 0", scale)
