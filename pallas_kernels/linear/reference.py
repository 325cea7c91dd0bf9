"""The product in plain JAX: in float32, and rounded where a model in the dtype of `x` rounds. Shapes as in `fused_linear`, `x` `[B, D]`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear.many_rows import is_fused, linear_of_many_rows
from pallas_kernels.linear.product import plain_product, product
from pallas_kernels.quantized import Quantized, Rows, values_of
from pallas_kernels.swiglu import silu_and_mul


class ScaledRows(NamedTuple):
    """Rows that a product made, with what the norm before the next product needs of them; see `fused_linear`."""

    rows: jax.Array  # [..., D]
    scaled: jax.Array  # [..., D], rows times the norm's scale
    squares: jax.Array  # float32 [T, B], sums of the squares of B rows over T groups of their columns


class SplitRows(NamedTuple):
    """Outputs of attention to S parts of what a sequence attends to, which the product after it combines; see `rotate_and_attend`."""

    parts: jax.Array  # [S, ..., D], each the attention to its part alone
    lse: jax.Array  # float32 [S, ..., N], of each part and head the log of the sum of exponentials, in units of log 2

    @property
    def rows(self) -> jax.ShapeDtypeStruct:
        """Describe the rows [..., D] that they are parts of."""
        return jax.ShapeDtypeStruct(self.parts.shape[1:], self.parts.dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """Return the dtype of the rows."""
        return self.parts.dtype

    def reshape(self, *shape: int) -> "SplitRows":
        """Give rows another shape; the last axis is heads times head size."""
        parts = self.parts.reshape(len(self.parts), *shape)
        return SplitRows(parts, self.lse.reshape(len(self.lse), *parts.shape[1:-1], self.lse.shape[-1]))


def plain_rows(x: jax.Array | ScaledRows | SplitRows) -> jax.Array:
    """Return the rows alone."""
    if isinstance(x, SplitRows):
        head_size = x.parts.shape[-1] // x.lse.shape[-1]
        return combine(list(x.parts), list(jnp.repeat(x.lse, head_size, axis=-1)))
    return x.rows if isinstance(x, ScaledRows) else x


def combine(parts: list[jax.Array], lse: list[jax.Array]) -> jax.Array:
    """Compute sum_i 2^(lse_i - m) parts_i / sum_i 2^(lse_i - m), m the largest of lse: parts without a weight are zero."""
    peak = functools.reduce(jnp.maximum, lse)
    weights = [jnp.where(each > -jnp.inf, jnp.exp2(each - peak), 0.0) for each in lse]
    total = functools.reduce(jnp.add, weights)
    rows = functools.reduce(jnp.add, [weight * part.astype(jnp.float32) for weight, part in zip(weights, parts, strict=True)])
    return (rows / jnp.where(total > 0, total, 1.0)).astype(parts[0].dtype)


def reference_linear(x, weight: Rows, norm, bias, residual, *, norm_eps: float, gated: bool, out_dtype: jnp.dtype) -> jax.Array:
    """Compute everything in float32 and round once at the end; independent of the kernel and of `xla_linear`."""
    wide = x.astype(jnp.float32)
    if norm is not None:
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + norm_eps)
        wide *= norm.astype(jnp.float32)[None, :]
    rows = values_of(weight).astype(jnp.float32)
    if isinstance(weight, Quantized):
        rows *= weight.scales[:, None]
    out = jnp.einsum("bd,md->bm", wide, rows, precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        out += bias.astype(jnp.float32)[None, :]
    if gated:
        gate, up = jnp.split(out, 2, axis=-1)
        out = jax.nn.silu(gate) * up
    if residual is not None:
        out += residual.astype(jnp.float32)
    return out.astype(out_dtype)


def rms_norm(x: jax.Array, norm: jax.Array, norm_eps: float) -> jax.Array:
    """Compute x / rms(x) * norm of rows `[..., D]`: in float32, rounded before the scale `[D]`, as Llama does (1910.07467, equation 4)."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + norm_eps)
    return wide.astype(x.dtype) * norm.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def xla_linear(x, weight: Rows, norm, bias, residual, *, norm_eps: float, gated: bool, out_dtype: jnp.dtype) -> jax.Array:
    """Compute what a Llama in the dtype of `x` computes, with gradients: the path of training and prefill.

    RMSNorm in float32, rounded before its scale; products summed in float32 and rounded to `out_dtype`; silu in float32,
    rounded; bias, gate and residual in `out_dtype`. Float32 products are float32 products, not TF32. Many rows with a gate or a
    residual go to a kernel on Hopper, which rounds once.
    """
    x = x if norm is None else rms_norm(x, norm, norm_eps)
    if not isinstance(weight, Quantized) and bias is None and out_dtype == x.dtype:
        rounded = weight.astype(x.dtype)
        if is_fused(x, rounded, gated=gated, added=residual is not None):
            return linear_of_many_rows(x, rounded, None if residual is None else residual.astype(out_dtype), gated)
    if isinstance(weight, Quantized) or out_dtype == x.dtype:
        out = plain_product(x, values_of(weight), jnp.float32 if isinstance(weight, Quantized) else out_dtype)
    else:
        out = product(x, weight, out_dtype)
    if isinstance(weight, Quantized):
        out = (out * weight.scales[None, :]).astype(out_dtype)
    if bias is not None:
        out += bias.astype(out_dtype)[None, :]
    if gated:
        out = silu_and_mul(out)
    if residual is not None:
        out += residual.astype(out_dtype)
    return out
