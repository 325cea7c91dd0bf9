"""Weights of either kind: an array `[M, D]`, or int8 rows with a float32 scale per output."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """An int8 matrix with a scale per output: row `m` is `values[m] * scales[m]`."""

    values: jax.Array  # int8 [M, D]
    scales: jax.Array  # float32 [M]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Weight = jax.Array | QuantizedWeight


def weight_values(weight: Weight) -> jax.Array:
    """Return the `[M, D]` array of a weight of either kind."""
    return weight.values if isinstance(weight, QuantizedWeight) else weight


def quantize_weight(weight: jax.Array) -> QuantizedWeight:
    """Round a float matrix `[M, D]` to int8, symmetric, one float32 scale per output (absmax / 127).

    The rounding error of an element is at most half its row's scale, max|row| / 254.
    """
    if weight.ndim != 2 or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"weight must be a float [M, D], got {weight.dtype}{list(weight.shape)}")
    rows = weight.astype(jnp.float32)
    scales = jnp.max(jnp.abs(rows), axis=1) / 127.0
    divisors = jnp.where(scales > 0, scales, 1.0)
    return QuantizedWeight(jnp.round(rows / divisors[:, None]).astype(jnp.int8), scales)
