"""Attention over whole sequences, for training and prefill, and the choice of its implementation."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import TileMask, masked_attention, rotate_heads
from pallas_kernels.sequence_attention import unsupported_reason
from selfspan_jax.attention.policies import get_policy
from selfspan_jax.config import ModelConfig
from selfspan_jax.model import Angles, Attend
from selfspan_jax.spans import SpanVocab

SequenceImplementation = Literal["xla", "cudnn", "triton"]


def default_implementation(q: Float[Array, "B T N H"]) -> Literal["xla", "cudnn"]:
    """For a boolean mask: cuDNN's fused kernel where it takes one (a GPU, half precision, even lengths), else XLA."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if jax.default_backend() == "gpu" and half and q.shape[1] % 2 == 0 and q.shape[3] % 8 == 0 else "xla"


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | TileMask,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v over the pairs that the mask keeps; query head n reads kv head n // G. For training and prefill.

    A `TileMask` is for the project's own kernels; `implementation` chooses among others for a boolean one.
    """
    if isinstance(mask, TileMask):
        return masked_attention(q, k, v, mask)
    with jax.numpy_dtype_promotion("standard"):  # the library promotes its own scores
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation or default_implementation(q))


def split_and_rotate(
    qkv: Float[Array, "B T K G+2 H"], angles: Angles
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries and keys, their pairs (i, i + H/2) turned by the angles in float32 (Llama's order), and values.

    Query head n is query n % G of kv head n // G.
    """
    batch, num_tokens, *heads = qkv.shape
    cos, sin = (angle.reshape(batch * num_tokens, -1) for angle in angles)
    parts = rotate_heads(qkv.reshape(batch * num_tokens, *heads), cos, sin)
    q, k, v = (part.reshape(batch, num_tokens, *part.shape[1:]) for part in parts)
    return q, k, v


def attend_under(mask: Bool[Array, "B T T"] | TileMask, implementation: Literal["xla", "cudnn"] | None = None) -> Attend:
    """The attention that a `Decoder` takes for whole sequences without a cache."""

    def attend(qkv, angles, cache):
        return dot_product_attention(*split_and_rotate(qkv, angles), mask, implementation), cache

    return attend


def attend_in_training(
    token_ids: Int[Array, "B T"],
    vocab: SpanVocab,
    config: ModelConfig,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: SequenceImplementation | None = None,
) -> tuple[Attend, Float[Array, ""]]:
    """The attention under the mask that a model is trained with, and how many pairs of tokens it allows, padding (segment 0) apart.

    Args:
      implementation: "triton", the project's kernels, which skip what no query sees and never hold the mask as booleans;
        "cudnn" or "xla", which take it as a bias of every pair; None for the first that can do it, float32 apart, which XLA does.

    Raises: ValueError for another implementation; NotImplementedError for "triton" where it cannot run.
    """
    if implementation is not None and implementation not in get_args(SequenceImplementation):
        raise ValueError(f"implementation is {implementation!r}; allowed: {', '.join(get_args(SequenceImplementation))}")
    reason = unsupported_reason("triton", config.head_size)
    if implementation == "triton" and reason:
        raise NotImplementedError(f"implementation='triton': {reason}")

    def rows(first_query, num_queries):
        some = {} if num_queries == token_ids.shape[1] else {"first_query": first_query, "num_queries": num_queries}
        return get_policy(config.mask).mask(token_ids, vocab, config, segment_ids=segment_ids, **some)

    half = config.compute_dtype != "float32"
    if implementation == "triton" or (implementation is None and half and not reason):
        batch, num_tokens = token_ids.shape
        tiles = TileMask.of_rows(rows, batch, num_tokens, num_tokens)
        keys = jnp.sum(jax.lax.population_count(tiles.bits), axis=1)[:, :num_tokens]  # of each query
        attend = attend_under(tiles)
    else:
        mask = rows(0, token_ids.shape[1])
        keys = jnp.sum(mask, axis=2, dtype=jnp.int32)
        attend = attend_under(mask, implementation)
    return attend, jnp.sum(keys if segment_ids is None else jnp.where(segment_ids > 0, keys, 0), dtype=jnp.float32)
