"""The public function: validate, choose an implementation, pad, launch, unpad; the gradient is by hand."""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES, check_known, choose_implementation, device_reason
from pallas_kernels.sequence_attention import triton
from pallas_kernels.sequence_attention.heuristics import triton_config
from pallas_kernels.sequence_attention.mask import TileMask
from pallas_kernels.sequence_attention.reference import reference_attention

IMPLEMENTATIONS = ("reference", "triton")


def masked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: TileMask,
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
        nothing gives zeros.
      scale: factor on the scores, `1 / sqrt(H)` unless given; a static number above 0.
      implementation: None for the best one that the default device supports, or one of `IMPLEMENTATIONS`.
      interpret: run a Pallas implementation in its interpreter (tests on machines without a GPU).

    Returns:
      `[B, T, N, H]` in the dtype of `q`.

    Raises:
      ValueError: the arguments do not fit together.
      NotImplementedError: the named implementation cannot do this.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    _validate(q, k, v, mask, scale)
    chosen = choose_implementation(
        implementation,
        IMPLEMENTATIONS,
        lambda name: unsupported_reason(name, q.shape[3], interpret=interpret),
        preferred=("triton", "reference"),
    )
    if q.size == 0 or k.size == 0:
        return jnp.zeros(q.shape, q.dtype)
    if chosen == "reference":
        return reference_attention(q, k, v, mask, scale=scale)
    missing_queries, missing_keys = -q.shape[1] % mask.block_q, -k.shape[1] % mask.block_k
    q = _pad(q, missing_queries)
    k, v = _pad(k, missing_keys), _pad(v, missing_keys)
    return _attend(scale, interpret, q, k, v, mask)[:, : mask.num_queries]


def unsupported_reason(implementation: str, head_size: int, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot compute heads of this size on the default device; None when it can."""
    check_known(implementation, IMPLEMENTATIONS)
    if implementation == "reference":
        return None
    if not interpret and (reason := device_reason(80)):
        return reason
    return triton.unsupported_reason(head_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(scale, interpret, q, k, v, mask):
    return _forward(scale, interpret, q, k, v, mask)[0]


def _forward(scale, interpret, q, k, v, mask):
    config = triton_config(q.shape[3], q.dtype.itemsize)
    out, lse = triton.forward(q, k, v, mask, scale=scale, config=config, interpret=interpret)
    return out, (q, k, v, mask, out, lse)


def _backward(scale, interpret, saved, grad):
    q, k, v, mask, out, lse = saved
    config = triton_config(q.shape[3], q.dtype.itemsize)
    grads = triton.backward(q, k, v, mask, out, lse, grad, scale=scale, config=config, interpret=interpret)
    return (*grads, None)


_differentiable.defvjp(_forward, _backward)
_attend = jax.jit(_differentiable, static_argnums=(0, 1))  # so that a model's layers trace it once


def _pad(x: jax.Array, missing: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def _validate(q, k, v, mask: TileMask, scale: float) -> None:
    for name, array, letters in (("q", q, "[B, T, N, H]"), ("k", k, "[B, S, K, H]"), ("v", v, "[B, S, K, H]")):
        if array.ndim != 4:
            raise ValueError(f"{name} must be {letters}, got shape {list(array.shape)}")
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    if k.shape != v.shape or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"k and v must agree and have the dtype {q.dtype} of q, got {k.dtype}{list(k.shape)}, {v.dtype}{list(v.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must share batch and head size")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"the {q.shape[2]} query heads must be a multiple of the {k.shape[2]} kv heads")
    expected = (q.shape[0], q.shape[1], k.shape[1])
    if (mask.bits.shape[0], mask.num_queries, mask.num_keys) != expected:
        found = [mask.bits.shape[0], mask.num_queries, mask.num_keys]
        raise ValueError(f"the mask must be [B, T, S] = {list(expected)}, got {found}")
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
