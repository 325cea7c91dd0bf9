"""SwiGLU of linear maps of many rows by the Mosaic kernel, where it was measured to be faster than XLA. Gradients are XLA's."""

import jax

from pallas_kernels.common import device_reason
from pallas_kernels.linear.heuristics import band_tiles, is_fastest_of_many_rows
from pallas_kernels.linear.product import plain_product
from pallas_kernels.swiglu import silu_and_mul

MIN_CAPABILITY = 90  # Hopper


def is_fused(x: jax.Array, weight: jax.Array) -> bool:
    """Tell whether `swiglu_linear` can run on rows `[B, D]` and `[2 F, D]` on the default device, and is faster than XLA there."""
    if not is_fastest_of_many_rows(*x.shape) or device_reason("mosaic", ("mosaic",), False, MIN_CAPABILITY):
        return False
    from pallas_kernels.linear import mosaic  # it takes a second to import

    return mosaic.unsupported_reason(x, weight) is None


@jax.custom_vjp
def swiglu_linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Compute silu(x W_gate^T) * (x W_up^T), rounded once; with gradients by XLA, which writes the products that those need."""
    from pallas_kernels.linear import mosaic

    return mosaic.mosaic_swiglu_linear(x, weight, band_tiles=band_tiles(weight.shape[0] // 2, weight.shape[1]))


def _forward(x, weight):
    return jax.vjp(lambda x, weight: silu_and_mul(plain_product(x, weight, x.dtype)), x, weight)


swiglu_linear.defvjp(_forward, lambda backward, grad: backward(grad))
