"""Products of rows with matrices in plain JAX, and their gradients."""

import functools

import jax
import jax.numpy as jnp


def plain_product(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """Multiply rows `[B, D]` with `weight` `[M, D]` in the dtype of `x`, summed in float32; float32 products are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight.astype(x.dtype), axes, precision=precision, preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """Compute `plain_product`; the gradient of a result in another dtype is rounded to that of `x`, so that its products are no TF32."""
    return plain_product(x, weight, out_dtype)


def _product_forward(x, weight, out_dtype):
    saved = x.value if weight.perturbed else None, weight.value if x.perturbed else None
    return plain_product(x.value, weight.value, out_dtype), (saved, x.value[:0], weight.value[:0])


def _product_backward(out_dtype, saved, grad):
    (x, weight), like_x, like_weight = saved
    grad = grad.astype(like_x.dtype)
    dx = None if weight is None else plain_product(grad, weight.T, like_x.dtype)
    dweight = None if x is None else plain_product(grad.T, x.T, like_weight.dtype)
    return dx, dweight


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)
