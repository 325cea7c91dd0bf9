"""Two passes over activations whose gradients the compiler splits into several: rotation of heads, and SwiGLU.

Why they exist: XLA writes the gradient of a slice as a padded copy, so that the gradients of queries, keys and values went through
memory padded and added up, and those of gate and up were written, joined into a copy, and joined again inside a matrix
product. Here a program reads each number once and writes each result once, in the layout that the matrix product reads.

On a CUDA device these are Pallas kernels with the Triton lowering, for sizes that fill their tiles; elsewhere the
formulas that they are tested against. Arithmetic is float32, rounded where Llama in the dtype of the activations rounds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import device_reason

ROTATED_ROWS = 32  # tokens of a program
GATED_ROWS, GATED_COLUMNS = 8, 256


def _fits(x: jax.Array, rows: int, width: int, widths) -> bool:
    return x.dtype != jnp.float32 and x.shape[0] % rows == 0 and width in widths and device_reason(80) is None


# Rotation. R rows are tokens of all sequences; `qkv` is [R, K, G + 2, H]: of each kv head its G queries, its key, its value.


@jax.custom_vjp
def rotated_heads(qkv: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[R, K G, H]` and keys `[R, K, H]`, their pairs (i, i + H/2) turned by float32 angles `[R, H/2]`, and values.

    The angles have no gradient.
    """
    if _fits(qkv, ROTATED_ROWS, qkv.shape[3], (32, 64, 128, 256)):
        return rotate_kernel(qkv, cos, sin)
    rows, num_kv_heads, fused, head_size = qkv.shape
    turned = _turned(qkv[:, :, :-1], cos[:, None, None, :], sin[:, None, None, :])
    q = turned[:, :, :-1].reshape(rows, num_kv_heads * (fused - 2), head_size)
    return q, turned[:, :, -1], qkv[:, :, -1]


def _rotated_forward(qkv, cos, sin):
    return rotated_heads(qkv, cos, sin), (cos, sin)


def _rotated_backward(angles, grads):
    dq, dk, dv = grads
    cos, sin = angles
    if _fits(dq, ROTATED_ROWS, dq.shape[2], (32, 64, 128, 256)):
        return rotate_gradient_kernel(dq, dk, dv, cos, sin), None, None
    rows, num_kv_heads, head_size = dk.shape
    turned = jnp.concatenate([dq.reshape(rows, num_kv_heads, -1, head_size), dk[:, :, None]], axis=2)
    turned = _turned(turned, cos[:, None, None, :], -sin[:, None, None, :])
    return jnp.concatenate([turned, dv[:, :, None]], axis=2), None, None


rotated_heads.defvjp(_rotated_forward, _rotated_backward)


def _turned(x, cos, sin):
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotate_kernel(qkv: jax.Array, cos: jax.Array, sin: jax.Array, interpret: bool = False):
    """`rotated_heads` in one pass."""
    rows, num_kv_heads, fused, head_size = qkv.shape
    kv = jax.ShapeDtypeStruct((rows, num_kv_heads, head_size), qkv.dtype)
    q = jax.ShapeDtypeStruct((rows, num_kv_heads * (fused - 2), head_size), qkv.dtype)
    return _call(_rotate_kernel, (rows // ROTATED_ROWS, num_kv_heads), (q, kv, kv), interpret, "rotate_heads")(qkv, cos, sin)


def rotate_gradient_kernel(dq: jax.Array, dk: jax.Array, dv: jax.Array, cos: jax.Array, sin: jax.Array, interpret: bool = False):
    """The gradient of `rotated_heads`, `[R, K, G + 2, H]`, in one pass."""
    rows, num_kv_heads, head_size = dk.shape
    out = jax.ShapeDtypeStruct((rows, num_kv_heads, dq.shape[1] // num_kv_heads + 2, head_size), dq.dtype)
    grid = (rows // ROTATED_ROWS, num_kv_heads)
    return _call(_rotate_gradient_kernel, grid, out, interpret, "rotate_heads_gradient")(dq, dk, dv, cos, sin)


def _rotate_kernel(
    qkv_ref,  # [R, K, G + 2, H]
    cos_ref,  # float32 [R, H/2]
    sin_ref,  # float32 [R, H/2]
    q_ref,  # [R, K G, H]
    k_ref,  # [R, K, H]
    v_ref,  # [R, K, H]
):
    own, kv_head, group, low, high = _rotated_part(qkv_ref.shape[2] - 2, qkv_ref.shape[3])
    cos, sin = cos_ref[own, :], sin_ref[own, :]
    for member in range(group + 1):
        first, second = (qkv_ref[own, kv_head, member, half].astype(jnp.float32) for half in (low, high))
        target, head = (q_ref, kv_head * group + member) if member < group else (k_ref, kv_head)
        target[own, head, low] = (first * cos - second * sin).astype(target.dtype)
        target[own, head, high] = (second * cos + first * sin).astype(target.dtype)
    v_ref[own, kv_head, :] = qkv_ref[own, kv_head, group + 1, :]


def _rotate_gradient_kernel(
    dq_ref,  # [R, K G, H]
    dk_ref,  # [R, K, H]
    dv_ref,  # [R, K, H]
    cos_ref,  # float32 [R, H/2]
    sin_ref,  # float32 [R, H/2]
    out_ref,  # [R, K, G + 2, H]
):
    own, kv_head, group, low, high = _rotated_part(out_ref.shape[2] - 2, out_ref.shape[3])
    cos, sin = cos_ref[own, :], sin_ref[own, :]
    for member in range(group + 1):
        source, head = (dq_ref, kv_head * group + member) if member < group else (dk_ref, kv_head)
        first, second = (source[own, head, half].astype(jnp.float32) for half in (low, high))
        out_ref[own, kv_head, member, low] = (first * cos + second * sin).astype(out_ref.dtype)
        out_ref[own, kv_head, member, high] = (second * cos - first * sin).astype(out_ref.dtype)
    out_ref[own, kv_head, group + 1, :] = dv_ref[own, kv_head, :]


def _rotated_part(group: int, head_size: int):
    half = head_size // 2
    return pl.ds(pl.program_id(0) * ROTATED_ROWS, ROTATED_ROWS), pl.program_id(1), group, pl.ds(0, half), pl.ds(half, half)


# SwiGLU (2002.05202, equation 6). `gate_up` is [R, 2 F]: all gates, then all ups.


@jax.custom_vjp
def swiglu(gate_up: jax.Array) -> jax.Array:
    """`[R, 2 F]` -> silu(gate) * up, `[R, F]`; silu in float32, rounded before the product."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up


def _swiglu_backward(gate_up, grad):
    width = grad.shape[1]
    if _fits(grad, GATED_ROWS, width % GATED_COLUMNS, (0,)):
        return (swiglu_gradient_kernel(gate_up, grad),)
    return (jnp.concatenate(_swiglu_gradients(*jnp.split(gate_up, 2, axis=-1), grad), axis=-1),)


swiglu.defvjp(lambda gate_up: (swiglu(gate_up), gate_up), _swiglu_backward)


def _swiglu_gradients(gate, up, grad):
    wide = gate.astype(jnp.float32)
    slope = jax.nn.sigmoid(wide)
    through = (grad * up).astype(jnp.float32)
    dgate = through * (slope + wide * slope * (1.0 - slope))
    return dgate.astype(gate.dtype), (wide * slope).astype(gate.dtype) * grad


def swiglu_gradient_kernel(gate_up: jax.Array, grad: jax.Array, interpret: bool = False) -> jax.Array:
    """The gradient of `swiglu`, `[R, 2 F]`, in one pass."""
    rows, width = grad.shape
    grid = (rows // GATED_ROWS, width // GATED_COLUMNS)
    out = jax.ShapeDtypeStruct(gate_up.shape, gate_up.dtype)
    return _call(_swiglu_gradient_kernel, grid, out, interpret, "swiglu_gradient")(gate_up, grad)


def _swiglu_gradient_kernel(
    gate_up_ref,  # [R, 2 F]
    grad_ref,  # [R, F]
    out_ref,  # [R, 2 F]
):
    rows = pl.ds(pl.program_id(0) * GATED_ROWS, GATED_ROWS)
    first, width = pl.program_id(1) * GATED_COLUMNS, grad_ref.shape[1]
    gate, up = pl.ds(first, GATED_COLUMNS), pl.ds(width + first, GATED_COLUMNS)
    dgate, dup = _swiglu_gradients(gate_up_ref[rows, gate], gate_up_ref[rows, up], grad_ref[rows, gate])
    out_ref[rows, gate] = dgate
    out_ref[rows, up] = dup


def _call(kernel, grid, out_shape, interpret: bool, name: str):
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )
