"""The public function: validate, choose an implementation, launch."""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES, check_known, choose_implementation, device_reason
from pallas_kernels.linear import triton
from pallas_kernels.linear.heuristics import MAX_NORM_ROWS, is_fastest, linear_config
from pallas_kernels.linear.quantized import QuantizedWeight, Weight, weight_values
from pallas_kernels.linear.reference import reference_linear, rms_norm, xla_linear

IMPLEMENTATIONS = ("reference", "xla", "triton")


def fused_linear(
    x: jax.Array,
    weight: Weight,
    *,
    norm: jax.Array | None = None,
    norm_eps: float = 1e-5,
    residual: jax.Array | None = None,
    gated: bool = False,
    out_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply rows, RMS-normalised or not, with a matrix `[M, D]`; then SwiGLU and a residual, where they are asked for.

    Args:
      x: `[..., D]` rows, bfloat16, float16 or float32; B is how many there are.
      weight: `[M, D]`, the D inputs of an output next to each other, in the dtype of `x` or in float32 (which is cast to
        it, by the implementations that train), or a `QuantizedWeight` of that shape.
      norm: `[D]`, the scale of an RMSNorm of `x` before the product (1910.07467, equation 4), in any float dtype.
      norm_eps: added to the mean square, a static number.
      residual: `[..., M]` (`[..., F]` if gated), added last, in any float dtype.
      gated: SwiGLU (2002.05202, equation 6): `weight` is `[2 F, D]`, the first F outputs being the gate and the last F up.
      out_dtype: of the result, that of `x` unless given; float32 for logits.
      implementation: None for the fastest that was measured and can do it, or one of `IMPLEMENTATIONS`.
      interpret: run a Pallas implementation in its interpreter (tests on machines without a GPU).

    Returns:
      `[..., M]`, or `[..., F]` if gated.

    Raises:
      ValueError: the arguments do not fit together.
      NotImplementedError: the named implementation cannot do this, or a gradient of a Pallas implementation was asked for.
    """
    _validate(x, weight, norm, residual, gated, out_dtype)
    chosen = choose_implementation(
        implementation,
        IMPLEMENTATIONS,
        lambda name: unsupported_reason(name, x, weight, norm=norm, gated=gated, interpret=interpret),
        preferred=("triton", "xla") if _is_fastest(x, weight) else ("xla",),
    )
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    num_inputs, num_outputs = x.shape[-1], _num_results(weight, gated)
    out_shape = (*x.shape[:-1], num_outputs)
    if math.prod(out_shape) == 0:
        return jnp.zeros(out_shape, out_dtype)
    rows = x.reshape(-1, num_inputs)
    residual = None if residual is None else residual.reshape(-1, num_outputs)
    if chosen == "triton":
        return _triton(float(norm_eps), gated, out_dtype, interpret, rows, weight, norm, residual).reshape(out_shape)
    compute = reference_linear if chosen == "reference" else xla_linear
    return compute(rows, weight, norm, residual, norm_eps=float(norm_eps), gated=gated, out_dtype=out_dtype).reshape(out_shape)


def unsupported_reason(
    implementation: str, x: jax.Array, weight: Weight, *, norm: jax.Array | None = None, gated: bool = False, interpret: bool = False
) -> str | None:
    """Say why `implementation` cannot compute this on the default device; None when it can."""
    check_known(implementation, IMPLEMENTATIONS)
    if implementation in ("reference", "xla"):
        return None
    if not interpret and (reason := device_reason(80)):
        return reason
    return triton.unsupported_reason(_num_rows(x), x.dtype, weight, norm, gated)


def expected_bytes(
    x: jax.Array,
    weight: Weight,
    *,
    norm: jax.Array | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
    out_dtype: jnp.dtype | None = None,
) -> int:
    """Count the bytes that must move: weights, scales, rows, norm and residual in once, the result out once."""
    num_results = _num_rows(x) * _num_results(weight, gated)
    read = [x, *jax.tree.leaves((weight, norm, residual))]
    return sum(a.size * a.dtype.itemsize for a in read) + num_results * jnp.dtype(out_dtype or x.dtype).itemsize


def _num_rows(x: jax.Array) -> int:
    return math.prod(x.shape[:-1])


def _num_results(weight: Weight, gated: bool) -> int:
    return weight.shape[0] // 2 if gated else weight.shape[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _dispatch(norm_eps, gated, out_dtype, interpret, x, weight, norm, residual):
    if norm is not None and x.shape[0] > MAX_NORM_ROWS:
        x, norm = rms_norm(x, norm, norm_eps), None
    num_inputs, item_bytes = x.shape[1], weight_values(weight).dtype.itemsize
    config = linear_config(x.shape[0], _num_results(weight, gated), num_inputs, item_bytes, gated)
    options = {"norm_eps": norm_eps, "gated": gated, "out_dtype": out_dtype, "config": config, "interpret": interpret}
    return triton.triton_linear(x, weight, norm, residual, **options)


@_dispatch.defjvp
def _no_gradient(*_):
    raise NotImplementedError("implementation='triton' of fused_linear has no gradient: train with implementation='xla'")


_triton = jax.jit(_dispatch, static_argnums=(0, 1, 2, 3))  # so that a model's layers trace it once


def _is_fastest(x: jax.Array, weight: Weight) -> bool:
    num_outputs, num_inputs = weight.shape
    return is_fastest(_num_rows(x), num_outputs, num_inputs, weight_values(weight).dtype.itemsize)


def _validate(x, weight, norm, residual, gated, out_dtype) -> None:
    if x.ndim == 0 or x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x must be [..., D] in bfloat16, float16 or float32, got {x.dtype}{list(x.shape)}")
    if out_dtype is not None and jnp.dtype(out_dtype) not in FLOAT_DTYPES:
        raise ValueError(f"out_dtype must be bfloat16, float16 or float32, got {jnp.dtype(out_dtype)}")
    values = weight_values(weight)
    if len(values.shape) != 2 or values.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be [M, D] with the D = {x.shape[-1]} of x, got {list(values.shape)}")
    if isinstance(weight, QuantizedWeight):
        if values.dtype != jnp.int8 or weight.scales.dtype != jnp.float32:
            raise ValueError(f"weight must hold int8 values and float32 scales, got {values.dtype} and {weight.scales.dtype}")
        if weight.scales.shape != values.shape[:1]:
            raise ValueError(f"weight.scales must be [M] = {[values.shape[0]]}, got {list(weight.scales.shape)}")
    elif values.dtype not in (x.dtype, jnp.float32):
        raise ValueError(f"weight must be {x.dtype} as x is, or float32, got {values.dtype}")
    if gated and values.shape[0] % 2:
        raise ValueError(f"a gated weight has as many gate as up outputs, got an odd M = {values.shape[0]}")
    if norm is not None and (norm.shape != x.shape[-1:] or norm.dtype not in FLOAT_DTYPES):
        raise ValueError(f"norm must be a float [D] = {[x.shape[-1]]}, got {norm.dtype}{list(norm.shape)}")
    if residual is not None:
        shape = (*x.shape[:-1], _num_results(weight, gated))
        if residual.shape != shape or residual.dtype not in FLOAT_DTYPES:
            raise ValueError(f"residual must be a float {list(shape)}, as the result is, got {residual.dtype}{list(residual.shape)}")
