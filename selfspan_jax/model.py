"""The decoder: RMSNorm, rotary positions, grouped-query attention and SwiGLU, with Llama's names and numerics (Flax NNX).

One forward serves training, prefill and decoding: the caller hands in the attention. Parameters are float32, one leaf per
layer and projection; activations and matrix products are `config.compute_dtype`; norms, rotations, softmax and logits float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from selfspan_jax.config import ModelConfig
from selfspan_jax.spans import SpanVocab

# q [B, T, N, H], k and v [B, T, K, H], the layer's cache -> attention output [B, T, N, H], the layer's cache afterwards
Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]


def rotary_angles(positions: Int[Array, "B T"], head_size: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines, float32 [B, T, 1, H / 2], of positions times theta^(-2i / H) (RoFormer, 2104.09864, section 3.2)."""
    frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], angles: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Turns the pairs (i, i + H/2) of each head by the angles: Llama's order of pairs."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 and rounded before the scale, as Llama does (1910.07467, equation 4)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normalised = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        return normalised * self.scale[...].astype(x.dtype)[None, None, :]


def _linear(in_size: int, out_size: int, config: ModelConfig, rngs: nnx.Rngs, *, residual: bool = False) -> nnx.Linear:
    """A linear map without bias; those that write to the residual stream start smaller, by the number of them (GPT-2)."""
    std = 0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02
    init = nnx.initializers.normal(std)
    return nnx.Linear(in_size, out_size, use_bias=False, dtype=jnp.dtype(config.compute_dtype), kernel_init=init, rngs=rngs)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        query_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.q_proj = _linear(config.hidden_size, query_size, config, rngs)
        self.k_proj = _linear(config.hidden_size, kv_size, config, rngs)
        self.v_proj = _linear(config.hidden_size, kv_size, config, rngs)
        self.o_proj = _linear(query_size, config.hidden_size, config, rngs, residual=True)

    def __call__(self, x: Float[Array, "B T D"], angles: tuple[Array, Array], attend: Attend, cache: Any):
        batch, num_tokens, _ = x.shape
        heads = (batch, num_tokens, -1, self.config.head_size)
        q = rotate(self.q_proj(x).reshape(heads), angles)
        k = rotate(self.k_proj(x).reshape(heads), angles)
        v = self.v_proj(x).reshape(heads)
        out, cache = attend(q, k, v, cache)
        return self.o_proj(out.reshape(batch, num_tokens, -1)), cache


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, 2002.05202, equation 6)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, config, rngs)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, config, rngs)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, config, rngs, residual=True)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Float[Array, "B T D"], angles: tuple[Array, Array], attend: Attend, cache: Any):
        attended, cache = self.self_attn(self.input_layernorm(x), angles, attend, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Decoder(nnx.Module):
    """A decoder-only transformer over a vocabulary whose structural ids `vocab` names."""

    def __init__(self, config: ModelConfig, *, vocab: SpanVocab, vocab_size: int, rngs: nnx.Rngs):
        highest = max(vocab.seg_base, vocab.ref_base) + vocab.num_labels
        if vocab_size < highest or vocab_size <= max(vocab.pad_id, vocab.bos_id, vocab.eos_id, vocab.solve_id):
            raise ValueError(f"vocab_size is {vocab_size}, but the structural tokens need ids up to {highest - 1}")
        self.config = config
        self.vocab = vocab
        self.vocab_size = vocab_size
        self.embed_tokens = nnx.Embed(
            vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else _linear(config.hidden_size, vocab_size, config, rngs)

    def __call__(
        self,
        token_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        caches: Sequence[Any] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """Hidden states after the last norm, and each layer's cache as `attend` left it."""
        angles = rotary_angles(positions, self.config.head_size, self.config.rope_theta)
        # Rounded after the lookup: its gradient is a scatter with many hits per row, which GPUs add up in float32 only.
        x = self.embed_tokens(token_ids).astype(self.config.compute_dtype)

        def run(layer: Layer, x, angles, cache):
            return layer(x, angles, attend, cache)

        run = nnx.remat(run) if self.config.remat else run
        after = []
        for layer, cache in zip(self.layers, caches or (None,) * self.config.num_layers, strict=True):
            x, cache = run(layer, x, angles, cache)
            after.append(cache)
        return self.norm(x), tuple(after)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Scores of the next token, float32."""
        if self.lm_head is None:
            weights = self.embed_tokens.embedding[...]
            return jnp.einsum("...d,vd->...v", hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)
        weights = self.lm_head.kernel[...]
        return jnp.einsum("...d,dv->...v", hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))
