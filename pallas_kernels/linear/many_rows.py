"""Linear maps of many rows with SwiGLU or a residual by the Mosaic kernel, where it was measured to be faster than XLA."""

import functools

import jax

from pallas_kernels.common import device_reason
from pallas_kernels.linear.heuristics import is_fastest_of_many_rows, mosaic_config
from pallas_kernels.linear.product import plain_product
from pallas_kernels.swiglu import silu_and_mul_gradient

MIN_CAPABILITY = 90  # Hopper


def is_fused(x: jax.Array, weight: jax.Array, *, gated: bool, added: bool) -> bool:
    """Tell whether `linear_of_many_rows` can run on rows `[B, D]` and `[M, D]` on the default device, and is faster than XLA there."""
    if gated == added or not is_fastest_of_many_rows(x.shape[0], x.shape[1], gated):
        return False
    if device_reason("mosaic", ("mosaic",), False, MIN_CAPABILITY):
        return False
    from pallas_kernels.linear import mosaic  # it takes a second to import

    return mosaic.unsupported_reason(x, weight, gated) is None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_of_many_rows(x: jax.Array, weight: jax.Array, residual: jax.Array | None, gated: bool) -> jax.Array:
    """Compute silu(x W_gate^T) * (x W_up^T) if gated, else x W^T + residual, rounded once; all in one dtype."""
    return _run(x, weight, residual, gated)


def _run(x, weight, residual, gated, **options):
    from pallas_kernels.linear import mosaic

    num_results = weight.shape[0] // 2 if gated else weight.shape[0]
    config = mosaic_config(num_results, weight.shape[1], gated=gated, added=residual is not None)
    return mosaic.mosaic_linear(x, weight, residual, gated=gated, config=config, **options)


def _forward(x, weight, residual, gated):
    saved = x.value if weight.perturbed else None, weight.value if x.perturbed else None
    if not gated:
        return _run(x.value, weight.value, residual.value, gated), (*saved, None)
    out, products = _run(x.value, weight.value, None, gated, keep_products=True)
    return out, (*saved, products)


def _backward(gated, saved, grad):
    x, weight, products = saved
    of_products = silu_and_mul_gradient(products, grad) if gated else grad
    dx = None if weight is None else plain_product(of_products, weight.T, grad.dtype)
    dweight = None if x is None else plain_product(of_products.T, x.T, grad.dtype)
    return dx, dweight, None if gated else grad


linear_of_many_rows.defvjp(_forward, _backward, symbolic_zeros=True)
