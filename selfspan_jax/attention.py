"""The one place that picks an implementation of attention: for whole sequences here, for one query token in the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import span_decode_attention
from selfspan_jax import spans
from selfspan_jax.cache import SlotList
from selfspan_jax.config import Attention, DecodeConfig, Implementation, ModelConfig

SequenceImplementation = Literal["xla", "cudnn"]


def sequence_mask(
    token_ids: Int[Array, "B T"],
    vocab: spans.SpanVocab,
    config: ModelConfig,
    attention: Attention,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    sink_tokens: int = DecodeConfig.sink_tokens,
    window_tokens: int = DecodeConfig.window_tokens,
) -> Bool[Array, "B T T"]:
    """Which tokens attend to which under a policy; `segment_ids` keeps packed sequences apart."""
    if attention == "span":
        return spans.attention_mask(
            token_ids,
            vocab,
            header_view=config.header_view,
            prompt_view=config.prompt_view,
            prompt_window_tokens=config.prompt_window_tokens,
            segment_ids=segment_ids,
        )
    index = jnp.arange(token_ids.shape[1], dtype=jnp.int32)
    distance = index[:, None] - index[None, :]
    mask = distance >= 0
    if attention == "window":
        mask &= (distance < window_tokens) | (index[None, :] < sink_tokens)
    mask = jnp.broadcast_to(mask[None], (*token_ids.shape, token_ids.shape[1]))
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return mask


def default_implementation(q: Float[Array, "B T N H"]) -> SequenceImplementation:
    """cuDNN's fused kernel where it takes a mask (a GPU, half precision, even lengths), else XLA."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if jax.default_backend() == "gpu" and half and q.shape[1] % 2 == 0 and q.shape[3] % 8 == 0 else "xla"


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "B T T"],
    implementation: SequenceImplementation | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v over the pairs that the mask keeps; query head n reads kv head n // G. For training and prefill."""
    with jax.numpy_dtype_promotion("standard"):  # the library promotes its own scores
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation or default_implementation(q))


def attend_under(mask: Bool[Array, "B T T"]) -> Callable[[Array, Array, Array, Any], tuple[Array, Any]]:
    """The attention that a `Decoder` takes for whole sequences without a cache."""
    return lambda q, k, v, cache: (masked_attention(q, k, v, mask), cache)


def cached_attention(
    q: Float[Array, "B 1 N H"],
    k_pool: Float[Array, "P K H"],
    v_pool: Float[Array, "P K H"],
    slots: SlotList,
    implementation: Implementation | None,
) -> Float[Array, "B 1 N H"]:
    """One query per sequence over the pool rows that its slot list names."""
    return span_decode_attention(q[:, 0], k_pool, v_pool, slots.rows, slots.counts, implementation=implementation)[:, None]
