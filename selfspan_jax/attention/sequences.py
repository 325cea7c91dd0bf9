"""Attention over whole sequences for training and prefill, and which implementation computes it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import PackedMask, TileMask, masked_attention, norm_heads, rotate_heads
from pallas_kernels.sequence_attention import packed_rows_pay, unsupported_reason
from selfspan_jax.attention.policies import get_policy
from selfspan_jax.config import ModelConfig
from selfspan_jax.errors import UserError
from selfspan_jax.model import Angles, Attend
from selfspan_jax.neighbours.memory import with_memory
from selfspan_jax.spans import SpanVocab

SequenceImplementation = Literal["xla", "cudnn", "triton", "mosaic"]
AnyMask = Bool[Array, "B T S"] | Bool[Array, "B N T S"] | TileMask | PackedMask


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AnyMask,
    implementation: SequenceImplementation | None = None,
) -> Float[Array, "B T N H"]:
    """Compute softmax(q k^T / sqrt(H)) v over the pairs that the mask keeps; query head n reads kv head n // G.

    Args:
      mask: a `TileMask` or `PackedMask` for the project's own kernels, or with an `attend` of its own; a boolean one for
        `implementation`, by default cuDNN's fused kernel where it takes one (a GPU, half precision, even lengths), else XLA.
    """
    if not isinstance(mask, Array):
        return mask.attend(q, k, v) if hasattr(mask, "attend") else masked_attention(q, k, v, mask)
    if implementation is None:
        fused = jax.default_backend() == "gpu" and q.dtype.itemsize == 2 and q.shape[1] % 2 == 0 and q.shape[3] % 8 == 0
        implementation = "cudnn" if fused else "xla"
    dtype = q.dtype
    if dtype == jnp.float16 and jax.default_backend() == "cpu":  # which has no product of float16 that adds up in float32
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.numpy_dtype_promotion("standard"):  # the library promotes its own scores
        mask = mask if mask.ndim == 4 else mask[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation).astype(dtype)  # type: ignore[arg-type]


def split_and_rotate(
    qkv: Float[Array, "B T K G+2 H"], angles: Angles
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Split a fused projection into queries, keys and values, and rotate queries and keys.

    Rotary positions turn the pairs (i, i + H/2) in float32 (Llama's order). Query head n is query n % G of kv head n // G.
    """
    batch, num_tokens, *heads = qkv.shape
    cos, sin = (angle.reshape(batch * num_tokens, -1) for angle in angles)
    parts = rotate_heads(qkv.reshape(batch * num_tokens, *heads), cos, sin)
    q, k, v = (part.reshape(batch, num_tokens, *part.shape[1:]) for part in parts)
    return q, k, v


def attend_under(mask: AnyMask, implementation: SequenceImplementation | None = None) -> Attend:
    """Make the attention of a `Decoder` for whole sequences under a mask, without a cache."""

    def attend(qkv, norms, angles, cache):
        return dot_product_attention(*split_and_rotate(norm_heads(qkv, **norms), angles), mask, implementation), cache

    return attend


def training_implementation(config: ModelConfig, num_tokens: int) -> SequenceImplementation | None:
    """Return which of the project's kernels training such a model on such rows takes, in half precision; None where the device has none."""
    packed = config.mask == "dense" and packed_rows_pay(num_tokens)
    names: tuple[SequenceImplementation, ...] = () if config.compute_dtype == "float32" else ("mosaic", "triton") if packed else ("triton",)
    return next((name for name in names if not unsupported_reason(name, config.head_size)), None)


def attend_in_training(
    token_ids: Int[Array, "B T"],
    vocab: SpanVocab,
    config: ModelConfig,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: SequenceImplementation | None = None,
) -> tuple[Attend, Float[Array, ""]]:
    """Make the attention of a training step, under the mask that the model is trained with.

    Args:
      segment_ids: different numbers for sequences packed in one row; 0 is padding.
      implementation: "triton" or, of dense masks alone, "mosaic", the project's kernels, which skip tiles that no query attends to and
        never hold the mask as booleans; "cudnn" or "xla", which read it as a bias; None for the best that the device has.

    Returns: the attention, and the number of pairs of tokens that the mask keeps, padding excluded.
    Raises: UserError for an unknown implementation; NotImplementedError for the project's kernels where they cannot run.
    """
    if implementation is not None and implementation not in get_args(SequenceImplementation):
        raise UserError(f"implementation is {implementation!r}; allowed: {', '.join(get_args(SequenceImplementation))}")
    batch, num_tokens = token_ids.shape
    implementation = implementation or training_implementation(config, num_tokens)
    wrong = "the mask must be dense" if implementation == "mosaic" and config.mask != "dense" else None
    if implementation in ("triton", "mosaic") and (reason := unsupported_reason(implementation, config.head_size) or wrong):
        raise NotImplementedError(f"implementation={implementation!r}: {reason}")

    def rows(first, number):
        return get_policy(config.mask).mask(token_ids, vocab, config, segment_ids=segment_ids, first_query=first, num_queries=number)

    if implementation == "mosaic":
        mask: Any = PackedMask.of(jnp.zeros_like(token_ids) if segment_ids is None else segment_ids)
    else:
        mask = TileMask.of_rows(rows, batch, num_tokens, num_tokens) if implementation == "triton" else rows(0, num_tokens)
    keys = jnp.sum(mask, axis=2, dtype=jnp.int32) if isinstance(mask, Array) else mask.keys_of_queries()
    pairs = jnp.sum(keys, where=None if segment_ids is None else segment_ids > 0, dtype=jnp.float32)
    return with_memory(attend_under(mask, implementation), config, segment_ids), pairs
