"""Int8 arrays with a float32 scale per row: KV pools and weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import require


class Quantized(NamedTuple):
    """Int8 rows (the last axis) with a scale for each: row `i` is `values[i] * scales[i]`."""

    values: jax.Array  # int8, a pool's [P, K, H] or a weight's [M, D]
    scales: jax.Array  # float32, [P, K] or [M]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


QuantizedPool = Quantized
QuantizedWeight = Quantized
Rows = jax.Array | Quantized


def quantize(array: jax.Array) -> Quantized:
    """Round a float array to int8, symmetric, one float32 scale per row: a weight `[M, D]`, a pool `[P, K, H]` or new rows of it.

    The rounding error of an element is at most half its row's scale, max|row| / 254.
    """
    require(array.ndim > 0 and jnp.issubdtype(array.dtype, jnp.floating), "what is quantized must be a float [..., D]", array)
    rows = array.astype(jnp.float32)
    scales = jnp.max(jnp.abs(rows), axis=-1) / 127.0
    divisors = jnp.where(scales > 0, scales, 1.0)
    return Quantized(jnp.round(rows / divisors[..., None]).astype(jnp.int8), scales)


quantize_pool = quantize
quantize_weight = quantize


def values_of(rows: Rows) -> jax.Array:
    """Return the array that is read: that of floats, or the int8 one."""
    return rows.values if isinstance(rows, Quantized) else rows


def check_quantized(name: str, rows: Quantized, letters: str) -> None:
    """Raise ValueError unless the values are int8 and each row has a float32 scale; `letters` name the axes of the scales."""
    values, scales = rows.values, rows.scales
    dtypes_fit = values.dtype == jnp.int8 and scales.dtype == jnp.float32
    require(dtypes_fit, f"{name} must hold int8 values and float32 scales", values, scales)
    require(scales.shape == values.shape[:-1], f"{name}.scales must be {letters} = {list(values.shape[:-1])}", scales)


def int8_reason(values: jax.Array) -> str | None:
    """Say why Triton kernels cannot read an array of int8; None when they can.

    Pallas counts elements of arrays up to 4 GiB in 32 bits, which only int8 arrays overflow.
    """
    if values.dtype == jnp.int8 and 2**31 <= values.size <= 2**32:
        return f"int8 arrays between 2 and 4 GiB overflow 32-bit offsets, got {values.size} bytes"
    return None
