"""What a training step computes, and the most that its device could have computed meanwhile."""

from __future__ import annotations

import jax
from flax import nnx

from selfspan_jax.model import Decoder, Frozen

# Dense bfloat16 products with float32 sums, per second, by a part of the device's name: NVIDIA's data sheets, without sparsity.
_BF16_PEAKS = {
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def bf16_peak(device_kind: str) -> float | None:
    """Floating-point operations per second of a device's matrix units in bfloat16; None for a device not in the list."""
    return next((peak for name, peak in _BF16_PEAKS.items() if name in device_kind), None)


def step_flops(model: Decoder, num_tokens: float, num_pairs: float) -> float:
    """Floating-point operations that training on so many tokens needs, forward and backward.

        6 x (parameters of matrix products) x tokens  +  12 x layers x N x H x (pairs of tokens that the mask allows)

    A product of n parameters with a token is 2 n operations, its two gradients 4 n; scores and values of a pair are 4 H for
    each query head, their gradients 8 H (PaLM, 2204.02311, appendix B, which counts every pair of the context where this
    counts those that the mask allows, so that a sparse mask earns nothing by what it leaves out). The output layer counts
    for every token, the lookup of embeddings not at all; frozen matrices have one gradient instead of two, and adapters add
    theirs; padding is for the caller to leave out. What is computed twice, norms, rotations and the optimizer are not counted.
    """
    config = model.config
    head_sizes = (2 * config.num_kv_heads + 2 * config.num_heads) * config.head_size  # queries, keys, values and the output map
    layer = config.hidden_size * (head_sizes + 3 * config.intermediate_size)
    parameters = config.num_layers * layer + model.vocab_size * config.hidden_size
    flat = nnx.to_flat_state(nnx.state(model))
    looked_up = "" if model.lm_head is None else "embed_tokens"
    frozen = sum(leaf.size for path, leaf in flat if isinstance(leaf, Frozen) and leaf.ndim == 2 and path[0] != looked_up)
    adapters = sum(leaf.size for path, leaf in flat if path[-1] in ("lora_a", "lora_b"))
    products = (6.0 * (parameters + adapters) - 2.0 * frozen) * num_tokens
    return products + 12.0 * config.num_layers * config.num_heads * config.head_size * num_pairs


def peak_fraction(model: Decoder, flops_per_second: float) -> float | None:
    """Of the default device's bfloat16 peak; None for devices not in the list and for models that compute in float32."""
    peak = bf16_peak(jax.devices()[0].device_kind)
    return flops_per_second / peak if peak is not None and model.config.compute_dtype == "bfloat16" else None
