"""What attentions of their own share: the options that are for them, how a new token is written, and products that add up in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import norm_heads, rotate_and_write


def norms_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that normalise heads; the others are hints for the fused kernel."""
    return {name: options[name] for name in ("norms", "norm_eps") if name in options}


def write_token(qkv: Float[Array, "B 1 K G+2 H"], options: dict[str, Any], angles: Any, own: Int[Array, "B"], layer: Any) -> list[Array]:
    """Write a new token's keys and values of each sequence to slot `own` of a layer's pools. Returns: queries [B, N, H], and both pools."""
    return [*rotate_and_write(norm_heads(qkv[:, 0], **norms_of(options)), angles[0][:, 0], angles[1][:, 0], own, *layer[:2])]


def product(how: str, a: Array, b: Array, **options: Any) -> Array:
    """Compute an einsum, added up in float32."""
    wide = jnp.float32 if jax.default_backend() == "cpu" else a.dtype  # a CPU has no product of float16 that adds up in float32
    return jnp.einsum(how, a.astype(wide), b.astype(wide), preferred_element_type=jnp.float32, **options)
