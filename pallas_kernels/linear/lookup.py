"""Rows of a table by their ids, with a gradient whose sums have one order."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import dot

MAX_ROWS = 4096  # of a table whose gradient is a product: of a larger one most of it would be with zeros


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Look rows up and round them: `[V, D]` and ids `[...]` to `[..., D]` of `dtype`.

    The gradient of a row is the sum of those of all of its ids, in float32. A scatter on a GPU adds them up in whatever order they
    come, so that the same step taken twice differs in its last digits. Of up to MAX_ROWS rows the sum is a product with one-hot
    rows, which has one order. XLA's own way to give a scatter an order sorts all elements of all rows.
    """
    return table[ids].astype(dtype)


def _forward(table, ids, dtype):
    return look_up(table, ids, dtype), (table, ids)


def _backward(dtype, saved, grad):
    table, ids = saved
    if table.shape[0] > MAX_ROWS:
        return jnp.zeros_like(table).at[ids].add(grad.astype(table.dtype)), None
    one_hot = jax.nn.one_hot(ids.reshape(-1), table.shape[0], dtype=grad.dtype)
    return dot(one_hot, grad.reshape(-1, grad.shape[-1]), ((0,), (0,))).astype(table.dtype), None


look_up.defvjp(_forward, _backward)
