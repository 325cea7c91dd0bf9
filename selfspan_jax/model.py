"""The decoder: RMSNorm, rotary positions, grouped-query attention and SwiGLU, with Llama's names and numerics (Flax NNX).

One forward pass serves training, prefill and decoding: the caller passes the attention and the implementation of linear maps.
Parameters are one leaf per layer and map, float32 in training; activations and matrix products are `config.compute_dtype`;
norms, rotations, softmax and logits float32. Maps of the same input are fused into one (query, key and value; gate and up),
because in decoding every launch and every pass over the activations counts.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pallas_kernels import QuantizedWeight, fork_rms_norm, fused_linear, look_up, may_launch_early, quantize_weight, rms_norm
from selfspan_jax.config import LinearImplementation, LoraConfig, ModelConfig, Weights
from selfspan_jax.errors import UserError
from selfspan_jax.neighbours.memory import CompressiveMemory
from selfspan_jax.parallel.collectives import GATHERED, all_gather_params, copy_to_tensor_parallel, reduce_from_tensor_parallel
from selfspan_jax.spans import SpanVocab

Angles = tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]
Rows = Any  # [B, T, D]; in decoding, where the norm that follows is known, `pallas_kernels.ScaledRows` of it
# queries, keys and values [B, T, K, G + 2, H], neither normalised nor rotated; the options `norms` and `norm_eps` of queries and keys
# that are, in decoding `ahead`, the weights that are read next, and `early`; the angles; the layer's cache
# -> outputs [B, T, N, H], its cache afterwards
# Where it has an attribute `beside`, that applies each map of a layer to its rows, so that other work can be done meanwhile.
Attend = Callable[[Array, dict[str, Any], Angles, Any], tuple[Array, Any]]


def rotary_angles(positions: Int[Array, "B T"], config: ModelConfig) -> Angles:
    """Return cosines and sines, float32, of positions times theta^(-2i / H) (RoFormer, 2104.09864, section 3.2)."""
    frequencies = config.rope_theta ** (-jnp.arange(0, config.head_size, 2, dtype=jnp.float32) / config.head_size)
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_context_tokens * frequencies / (2 * math.pi)  # over the context of the first training
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = jnp.clip(kept, 0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / scaling.factor)
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


class Frozen(nnx.Variable):
    """A parameter that is not trained: no gradient of it is taken."""


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 and rounded before the scale, as Llama does (1910.07467, equation 4)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return rms_norm(x, self.scale[...], self.eps)

    def fork(self, x: Rows, implementation: LinearImplementation | None = "xla"):
        """Return x for the residual, what the next linear map takes, and the norm that it computes itself: with gradients, none."""
        if implementation != "xla":
            return x, x, self
        return *fork_rms_norm(x, self.scale[...], eps=self.eps), None


class Linear(nnx.Module):
    """A linear map with `weight[M, D]`, fused with the norm before it and the gate or residual after it.

    Initialised with N(0, 0.02^2); maps that write to the residual stream are scaled down by the root of their number (GPT-2).
    """

    def __init__(self, in_size: int, out_size: int, config: ModelConfig, rngs: nnx.Rngs, *, residual: bool = False, bias: bool = False):
        std = 0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02
        self.weight = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (out_size, in_size), jnp.float32))
        self.scales: nnx.Param | None = nnx.data(None)  # per output, float32, where the weight is int8
        self.bias = nnx.data(nnx.Param(jnp.zeros((out_size,), jnp.float32)) if bias else None)
        self.tensor_parallel: Literal["column", "row"] | None = None  # divided by outputs, or by inputs, over devices

    def __call__(self, x: Rows, *, norm: RMSNorm | None = None, next_norm: RMSNorm | None = None, **options: Any) -> Rows:
        """Apply the map to norm(x). Options are those of `pallas_kernels.fused_linear`: residual, gated, out_dtype, implementation."""
        weight = self.weight[...] if self.scales is None else QuantizedWeight(self.weight[...], self.scales[...])
        if norm is not None:
            options |= {"norm": norm.scale[...], "norm_eps": norm.eps}
        bias = None if self.bias is None else self.bias[...]
        if self.tensor_parallel != "row":
            options |= {} if next_norm is None else {"next_norm": next_norm.scale[...]}
            return fused_linear(copy_to_tensor_parallel(x) if self.tensor_parallel else x, weight, bias=bias, **options)
        residual = options.pop("residual") if bias is None else options.pop("residual") + bias.astype(x.dtype)[None, None, :]
        return reduce_from_tensor_parallel(fused_linear(x, weight, out_dtype=jnp.float32, **options)).astype(x.dtype) + residual

    def scores(self, hidden: Float[Array, "*batch D"], linear: LinearImplementation | None) -> Float[Array, "*batch M"]:
        """Compute logits, float32, as the output layer of a model."""
        return self(hidden, out_dtype=jnp.float32, implementation=linear)


class Attention(nnx.Module):
    """Grouped-query attention: projections of queries, keys and values, the caller's `attend`, the output projection."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.projections = config.num_heads // config.num_kv_heads + 2  # G + 2: of each kv head its G queries, its key and its value
        self.head_size = config.head_size
        query_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        # Outputs in the order [K, G + 2, H].
        self.qkv_proj = Linear(config.hidden_size, query_size + 2 * kv_size, config, rngs, bias=config.qkv_bias)
        self.o_proj = Linear(query_size, config.hidden_size, config, rngs, residual=True, bias=config.output_bias)
        self.q_norm, self.k_norm = (nnx.data(RMSNorm(config.head_size, config.rms_norm_eps) if config.qk_norm else None) for _ in "qk")
        self.memory = nnx.data(CompressiveMemory(config) if config.mask == "memory" else None)

    def __call__(self, x: Rows, norms: tuple[RMSNorm, RMSNorm], angles: Angles, attend: Attend, cache, ahead, early, beside, **linear: Any):
        x, rows, own_norm = norms[0].fork(x, **linear)
        qkv = beside(self.qkv_proj, rows, norm=own_norm, **linear)
        batch, num_tokens, _ = qkv.shape
        qkv = qkv.reshape(batch, num_tokens, -1, self.projections, self.head_size)
        options: dict[str, Any] = {"ahead": ahead, "early": early} if ahead else {}
        options |= {"memory": self.memory} if self.memory is not None else {}
        if self.q_norm is not None and self.k_norm is not None:
            options |= {"norms": (self.q_norm.scale[...], self.k_norm.scale[...]), "norm_eps": self.q_norm.eps}
        out, cache = attend(qkv, options, angles, cache)
        return beside(self.o_proj, out.reshape(batch, num_tokens, -1), residual=x, next_norm=norms[1], early=early, **linear), cache


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, 2002.05202, equation 6)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, config, rngs)  # all gates, then all ups
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config, rngs, residual=True)

    def __call__(self, x: Rows, norm: RMSNorm, next_norm: RMSNorm | None, beside: Callable, early: bool, **linear: Any) -> Rows:
        x, rows, own_norm = norm.fork(x, **linear)
        hidden = beside(self.gate_up_proj, rows, norm=own_norm, gated=True, early=early, **linear)
        return beside(self.down_proj, hidden, residual=x, next_norm=next_norm, early=early, **linear)


class Layer(nnx.Module):
    """One layer: attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Rows, angles: Angles, attend: Attend, cache: Any, following: Layer | None = None, **linear: Any):
        next_norm, ahead, early, beside = None, list[Array](), False, getattr(attend, "beside", operator.call)
        if following is not None:  # in decoding: what is read after the attention
            maps = self.self_attn.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj, following.self_attn.qkv_proj
            next_norm, ahead = following.input_layernorm, [linear_map.weight[...] for linear_map in maps]
            whole = all(isinstance(linear_map, Linear) and linear_map.tensor_parallel is None for linear_map in maps)
            early = whole and may_launch_early(x, ahead, **linear)
        norms = self.input_layernorm, self.post_attention_layernorm
        x, cache = self.self_attn(x, norms, angles, attend, cache, ahead, early, beside, **linear)
        return self.mlp(x, self.post_attention_layernorm, next_norm, beside, early, **linear), cache


class Embedding(nnx.Embed):
    """The embedding [V, D], which is also the output layer of a model with tied embeddings."""

    def look_up(self, token_ids: Int[Array, "*batch"], dtype: Any) -> Float[Array, "*batch D"]:
        return look_up(self.embedding[...], token_ids, jnp.dtype(dtype))

    def scores(self, hidden: Float[Array, "*batch D"], linear: LinearImplementation | None) -> Float[Array, "*batch V"]:
        """Compute logits, float32."""
        return fused_linear(hidden, self.embedding[...], out_dtype=jnp.float32, implementation=linear)


class Decoder(nnx.Module):
    """A decoder-only transformer over a vocabulary with the structural tokens of `vocab`."""

    def __init__(self, config: ModelConfig, *, vocab: SpanVocab, vocab_size: int, rngs: nnx.Rngs):
        if vocab_size < vocab.min_vocab_size:
            raise UserError(f"vocab_size is {vocab_size}, but the structural tokens need ids up to {vocab.min_vocab_size - 1}")
        self.config = config
        self.vocab = vocab
        self.vocab_size = vocab_size
        self.gather_layers = False  # over `fsdp`, layer by layer
        self.stop_ids: tuple[int, ...] = ()  # that end a text beside `vocab.eos_id`, as the files of a pretrained model name them
        self.adapters: LoraConfig | None = None  # of an adapted model, see `weights.lora`
        self.weights: Weights = "bf16"
        self.embed_tokens = Embedding(vocab_size, config.hidden_size, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.hidden_size, vocab_size, config, rngs)

    def __call__(
        self,
        token_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        caches: Sequence[Any] | None = None,
        linear: LinearImplementation | None = "xla",
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """Return the hidden states after the last norm, and each layer's cache as `attend` left it.

        Args:
          attend: the attention of every layer, see `Attend`.
          caches: one for each layer, passed to `attend`.
          linear: implementation of linear maps: "xla", which has gradients, or None for the fastest on few rows.
        """
        angles = rotary_angles(positions, self.config)
        x = self.embed_tokens.look_up(token_ids, self.config.compute_dtype)

        def run(layer: Layer, x, angles, cache, following):
            return layer(x, angles, attend, cache, following, implementation=linear)

        def run_checkpointed(layer: Layer, x, *others):
            graph, params = nnx.split(layer)  # `nnx.remat` writes parameters back, which a compiled loop does not allow
            gather = (lambda params: all_gather_params(params, self.config.compute_dtype)) if self.gather_layers else lambda params: params
            policy = None if self.config.remat else jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
            return jax.checkpoint(lambda params, x: run(nnx.merge(graph, gather(params)), x, *others), policy=policy)(params, x)

        run_layer = run_checkpointed if self.config.remat or self.gather_layers else run
        after = []
        following = [None if linear == "xla" or self.gather_layers else layer for layer in self.layers[1:]] + [None]
        for layer, cache, after_it in zip(self.layers, caches or (None,) * self.config.num_layers, following, strict=True):
            x, cache = run_layer(layer, x, angles, cache, after_it)
            after.append(cache)
        return self.norm(x), tuple(after)

    def logits(self, hidden: Float[Array, "*batch D"], linear: LinearImplementation | None = "xla") -> Float[Array, "*batch V"]:
        """Return the logits of the next token, float32."""
        return self.output_layer.scores(hidden, linear)

    @property
    def output_layer(self) -> Any:
        """The module that computes logits: the embedding, where both are tied."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    @property
    def num_parameters(self) -> int:
        """Number of all parameters, frozen ones included."""
        return sum(leaf.size for leaf in jax.tree.leaves((nnx.state(self, nnx.Param), nnx.state(self, Frozen))))

    def shard(self, mesh: Mesh) -> Decoder:
        """Return a copy that one device of a mesh runs on its part of the parameters: local sizes, and collectives.

        Its parameters are these, not yet divided: see `parallel.layout.shard_params`.
        """
        tensor = mesh.shape["tensor"]
        sizes = {name: getattr(self.config, name) // tensor for name in ("num_heads", "num_kv_heads", "intermediate_size")}
        shard = nnx.merge(*nnx.split(self))
        shard.config = dataclasses.replace(self.config, **sizes)
        shard.gather_layers = mesh.shape["fsdp"] > 1
        if tensor > 1:
            for layer in shard.layers:
                layer.self_attn.qkv_proj.tensor_parallel = layer.mlp.gate_up_proj.tensor_parallel = "column"
                layer.self_attn.o_proj.tensor_parallel = layer.mlp.down_proj.tensor_parallel = "row"
        return shard

    def check_plain(self) -> None:
        """Raise UserError for an adapted or int8 model."""
        if self.adapters is not None:
            raise UserError("the model has adapters: merge the adapters first (lora.merged)")
        if self.weights == "int8":
            raise UserError('the model\'s weights are int8: take the model that they were made from, weights="bf16"')

    def astype(self, dtype: Any) -> Decoder:
        """Return a copy with parameters in another dtype. Raises UserError for an int8 or adapted model."""
        self.check_plain()
        graph, params = nnx.split(self, nnx.Param)
        return nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), params))

    def for_decoding(self, *, weights: Weights = "bf16") -> Decoder:
        """Return a copy with parameters in the compute dtype, to which every product rounds them anyway.

        Args:
          weights: "int8" rounds the layers' weights to int8, symmetric per output channel, but not embedding and output layer.

        Raises: UserError for an adapted model, and for an int8 one that is not to stay so.
        """
        if weights == self.weights == "int8":
            return nnx.merge(*nnx.split(self))
        copy = self.astype(self.config.compute_dtype)
        copy.weights = weights
        if weights == "int8":
            for layer in copy.layers:
                for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
                    quantized = quantize_weight(linear.weight[...])
                    linear.weight, linear.scales = nnx.Param(quantized.values), nnx.Param(quantized.scales)
        return copy
