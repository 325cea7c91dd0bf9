"""The gradient of SwiGLU as a Pallas kernel with the Triton lowering (Ampere and newer).

With s = sigmoid(gate), from the gradient g of out = gate s * up:

    dgate = g up (s + gate s (1 - s))          dup = g gate s

Why it exists: XLA writes the gradients of gate and up, joins them into a copy, and joins that again inside a matrix product.
Here each number is read once and each result written once, in the layout `[R, 2 F]` that the matrix product reads.

How: a program owns a tile of rows and columns, of the gate and of up.

Numerics: float32, rounded where Llama in the dtype of the activations rounds (`gradients`, which XLA computes too).
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.swiglu.reference import gradients

TILE = (8, 256)  # rows by columns of a program


@functools.partial(jax.jit, static_argnames=("interpret",))
def triton_gradient(gate_up: jax.Array, grad: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Run the kernel of the gradient of `silu_and_mul`, `[R, 2 F]`, from that of its result, `[R, F]`."""
    num_rows, width = grad.shape
    return pl.pallas_call(
        _kernel,
        grid=(num_rows // TILE[0], width // TILE[1]),
        out_shape=jax.ShapeDtypeStruct(gate_up.shape, gate_up.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="swiglu_gradient",
    )(gate_up, grad)


def _kernel(
    gate_up_ref,  # [R, 2 F]
    grad_ref,  # [R, F]
    out_ref,  # [R, 2 F]
):
    rows = pl.ds(pl.program_id(0) * TILE[0], TILE[0])
    first, width = pl.program_id(1) * TILE[1], grad_ref.shape[1]
    gate, up = pl.ds(first, TILE[1]), pl.ds(width + first, TILE[1])
    dgate, dup = gradients(gate_up_ref[rows, gate], gate_up_ref[rows, up], grad_ref[rows, gate])
    out_ref[rows, gate] = dgate
    out_ref[rows, up] = dup
