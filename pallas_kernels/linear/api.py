"""The public function: validate, choose an implementation, launch."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES, PLAIN, choose_implementation, device_reason, require
from pallas_kernels.copy_rows import Copies, copy_rows
from pallas_kernels.jax_triton import launch
from pallas_kernels.linear import triton, triton_tiled
from pallas_kernels.linear.heuristics import (
    MAX_EARLY_ROWS,
    MAX_NORM_ROWS,
    LinearConfig,
    TileConfig,
    is_fastest,
    is_tiled,
    linear_config,
    tile_config,
)
from pallas_kernels.linear.reference import ScaledRows, SplitRows, plain_rows, reference_linear, rms_norm, xla_linear
from pallas_kernels.quantized import Quantized, Rows, check_quantized, int8_reason, values_of

IMPLEMENTATIONS = ("reference", "xla", "triton", "jax_triton")


def fused_linear(
    x: jax.Array | ScaledRows | SplitRows,
    weight: Rows,
    *,
    norm: jax.Array | None = None,
    norm_eps: float = 1e-5,
    bias: jax.Array | None = None,
    residual: jax.Array | ScaledRows | None = None,
    gated: bool = False,
    next_norm: jax.Array | None = None,
    copies: Copies | None = None,
    out_dtype: jnp.dtype | None = None,
    early: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> Any:
    """Multiply rows, RMS-normalised or not, with a matrix `[M, D]`; then SwiGLU and a residual, where they are asked for.

    Args:
      x: `[..., D]` rows, bfloat16, float16 or float32; B is how many there are. Or `ScaledRows`, made with `next_norm` the `norm` of
        this call: the same result, without their norm being computed by every program anew. Or `SplitRows`, without a norm.
      weight: `[M, D]`, the D inputs of an output next to each other, in the dtype of `x` or in float32 (which is cast to
        it, by the implementations that train), or a `QuantizedWeight` of that shape.
      norm: `[D]`, the scale of an RMSNorm of `x` before the product (1910.07467, equation 4), in any float dtype.
      norm_eps: added to the mean square, a static number.
      bias: `[M]`, added to the product, in any float dtype.
      residual: `[..., M]` (`[..., F]` if gated), added last, in any float dtype.
      gated: SwiGLU (2002.05202, equation 6): `weight` is `[2 F, D]`, the first F outputs being the gate and the last F up.
      next_norm: `[M]` (`[F]`), the `norm` of a later call whose `x` the result is. Where that gains, the result is `ScaledRows`.
      copies: what `copy_rows` is to copy, no pool of which has to do with the product; the kernels copy while it multiplies large matrices.
      out_dtype: of the result, that of `x` unless given; float32 for logits.
      early: what reads the result may be launched while this is computed, see `may_launch_early`.
      implementation, interpret: as `pallas_kernels` says; None for the fastest that was measured. Kernels have no gradient.

    Returns:
      `[..., M]`, or `[..., F]` if gated. With `copies` a pair: this and the pools that were copied to.
    """
    plain = _rows(x)
    residual = None if residual is None else plain_rows(residual)
    _validate(plain, weight, norm, bias, residual, next_norm, gated, out_dtype)
    num_inputs = weight.shape[1]
    chosen = _choose(x, weight, norm, gated, implementation, interpret)
    num_results = _num_results(weight, gated)
    out_shape = (*plain.shape[:-1], num_results)
    is_empty = math.prod(out_shape) == 0
    if copies is not None and (is_empty or not _copies_beside(chosen, plain, weight, norm, gated)):
        options: dict[str, Any] = {"bias": bias, "residual": residual, "gated": gated, "next_norm": next_norm, "out_dtype": out_dtype}
        options |= {"norm": norm, "norm_eps": norm_eps, "implementation": implementation, "interpret": interpret}
        of_copies = "jax_triton" if implementation == "jax_triton" else None
        return fused_linear(x, weight, **options), copy_rows(*copies, implementation=of_copies, interpret=interpret)
    out_dtype = plain.dtype if out_dtype is None else jnp.dtype(out_dtype)
    if is_empty:
        return jnp.zeros(out_shape, out_dtype)
    residual = None if residual is None else residual.reshape(-1, num_results)
    norm_eps = float(norm_eps)
    if chosen in PLAIN:
        compute, rows = reference_linear if chosen == "reference" else xla_linear, plain_rows(x).reshape(-1, num_inputs)
        return compute(rows, weight, norm, bias, residual, norm_eps=norm_eps, gated=gated, out_dtype=out_dtype).reshape(out_shape)
    given: Any = x if isinstance(x, SplitRows) else plain
    given = given.reshape(-1, num_inputs)
    if isinstance(x, ScaledRows) and norm is not None:
        given = ScaledRows(given, x.scaled.reshape(-1, num_inputs), x.squares)
    scales = out_dtype == plain.dtype != jnp.float16 and _num_rows(plain) > MAX_NORM_ROWS  # float16 times a scale may overflow
    arrays = given, weight, norm, bias, residual, next_norm if scales else None, copies
    early &= not interpret
    out, pools = _kernel(chosen, norm_eps, gated, out_dtype, interpret, early, *arrays)
    if isinstance(out, ScaledRows):
        out = ScaledRows(out.rows.reshape(out_shape), out.scaled.reshape(out_shape), out.squares)
    else:
        out = out.reshape(out_shape)
    return out if copies is None else (out, pools)


def unsupported_reason(
    implementation: str, x: jax.Array, weight: Rows, *, norm: jax.Array | None = None, gated: bool = False, interpret: bool = False
) -> str | None:
    """Say why `implementation` cannot compute this on the default device; None when it can."""
    if (reason := device_reason(implementation, IMPLEMENTATIONS, interpret)) or implementation in PLAIN:
        return reason
    values, num_results = values_of(weight), _num_results(weight, gated)
    if values.shape[1] % 16:  # a step of the matrix unit
        return f"the number of inputs must be a multiple of 16, got {values.shape[1]}"
    if num_results < 16:  # the long side of the matrix unit's product
        return f"at least 16 outputs, got {num_results}"
    if values.dtype not in (x.dtype, jnp.int8):
        return f"{values.dtype} weights for {x.dtype} rows would be read at twice the bytes: cast them once"
    return int8_reason(values)


def copies_beside(
    x: Any, weight: Rows, *, norm: jax.Array | None = None, gated: bool = False, implementation: str | None = None, interpret: bool = False
) -> bool:
    """Tell whether `fused_linear` copies while it multiplies, and not before or after; arguments as there."""
    return _copies_beside(_choose(x, weight, norm, gated, implementation, interpret), _rows(x), weight, norm, gated)


def may_launch_early(x: jax.Array | ScaledRows, weights: Sequence[jax.Array], implementation: str | None = None) -> bool:
    """Tell whether a layer's maps of these rows, and its attention, should be `early`: up to 16 rows of bfloat16, small matrices, Hopper.

    What reads the result of one is then another kernel of this package, as `launch_next` wants it.

    Args:
      weights: of the maps that read what is computed early.
      implementation: of the maps.
    """
    rows = _rows(x)
    few = 0 < _num_rows(rows) <= MAX_EARLY_ROWS and rows.dtype == jnp.bfloat16 and implementation in (None, "triton", "jax_triton")
    if not few or device_reason("triton", IMPLEMENTATIONS, False, 90) is not None:
        return False
    tiled = all(isinstance(_settings(_num_rows(rows), weight, rows.dtype, None, False), TileConfig) for weight in weights)
    sizes = [(*weight.shape, weight.dtype.itemsize) for weight in weights]
    fastest = all(is_fastest(_num_rows(rows), outputs, inputs, item_bytes, False) for outputs, inputs, item_bytes in sizes)
    return tiled and fastest and not any(unsupported_reason("triton", rows, weight, gated=True) for weight in weights)


def expected_bytes(
    x: jax.Array,
    weight: Rows,
    *,
    norm: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
    out_dtype: jnp.dtype | None = None,
) -> int:
    """Count the bytes that must move: weights, scales, rows, norm, bias and residual in once, the result out once."""
    num_results = _num_rows(x) * _num_results(weight, gated)
    read = [x, *jax.tree.leaves((weight, norm, bias, residual))]
    return sum(a.size * a.dtype.itemsize for a in read) + num_results * jnp.dtype(out_dtype or x.dtype).itemsize


def _choose(x: Any, weight: Rows, norm: jax.Array | None, gated: bool, implementation: str | None, interpret: bool) -> str:
    plain = _rows(x)
    scaled, (num_outputs, num_inputs) = isinstance(x, ScaledRows) and norm is not None, weight.shape
    fastest = is_fastest(_num_rows(plain), num_outputs, num_inputs, values_of(weight).dtype.itemsize, gated, scaled)
    return choose_implementation(
        implementation,
        ("triton", "xla") if fastest else ("xla",),
        lambda name: unsupported_reason(name, plain, weight, norm=norm, gated=gated, interpret=interpret),
    )


def _copies_beside(chosen: str, x: jax.Array, weight: Rows, norm: jax.Array | None, gated: bool) -> bool:
    config = _settings(_num_rows(x), weight, x.dtype, norm, gated)
    return chosen not in PLAIN and isinstance(config, LinearConfig) and not config.alone


def _rows(x: Any) -> Any:
    """Return the rows of `x`, of `SplitRows` a shape alone: they are not combined for it."""
    return x.rows if isinstance(x, (ScaledRows, SplitRows)) else x


def _num_rows(x: jax.Array) -> int:
    return math.prod(x.shape[:-1])


def _num_results(weight: Rows, gated: bool) -> int:
    return weight.shape[0] // 2 if gated else weight.shape[0]


def _settings(batch: int, weight: Rows, dtype: jnp.dtype, norm: jax.Array | None, gated: bool) -> LinearConfig | TileConfig:
    """Choose the kernel of the Triton lowering, by its settings."""
    num_results, (_, num_inputs), item_bytes = _num_results(weight, gated), weight.shape, values_of(weight).dtype.itemsize
    # float16 rows times the norm's scale may overflow before they are normalised, which the tiled kernel does first.
    tiled = is_tiled(batch, num_results, num_inputs, gated) or (norm is not None and dtype == jnp.float16)
    return (tile_config if tiled else linear_config)(batch, num_results, num_inputs, item_bytes, gated)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3, 4, 5))
def _dispatch(implementation, norm_eps, gated, out_dtype, interpret, early, x, weight, norm, bias, residual, next_norm, copies):
    plain = _rows(x)
    norm = None if isinstance(x, ScaledRows) else norm
    config = _settings(plain.shape[0], weight, plain.dtype, norm, gated)
    options = {"norm_eps": norm_eps, "gated": gated, "out_dtype": out_dtype, "interpret": interpret}
    if isinstance(x, SplitRows) and (norm is not None or not isinstance(config, TileConfig) or config.on_matrix_unit):
        x = plain_rows(x)
    if isinstance(config, TileConfig):
        linear = functools.partial(triton_tiled.triton_tiled_linear, config=config, early=early, **options)
        return launch(implementation, linear, x, weight, norm, bias, residual, next_norm), None
    if norm is not None and plain.shape[0] > MAX_NORM_ROWS:
        x, norm = rms_norm(x, norm, norm_eps), None
    linear = functools.partial(triton.triton_linear, config=config, **options)
    out = launch(implementation, linear, x, weight, norm, bias, residual, next_norm, copies)
    return (out, None) if copies is None else out


@_dispatch.defjvp
def _no_gradient(*_):
    raise NotImplementedError("the kernels of fused_linear have no gradient: train with implementation='xla'")


_kernel = jax.jit(_dispatch, static_argnums=(0, 1, 2, 3, 4, 5))  # so that a model's layers trace it once


def _validate(x, weight, norm, bias, residual, next_norm, gated, out_dtype) -> None:
    require(len(x.shape) > 0 and x.dtype in FLOAT_DTYPES, "x must be [..., D] in bfloat16, float16 or float32", x)
    if out_dtype is not None:
        require(jnp.dtype(out_dtype) in FLOAT_DTYPES, "out_dtype must be bfloat16, float16 or float32", jnp.dtype(out_dtype).name)
    values = values_of(weight)
    fits = len(values.shape) == 2 and values.shape[1] == x.shape[-1]
    require(fits, f"weight must be [M, D] with the D = {x.shape[-1]} of x", list(values.shape))
    if isinstance(weight, Quantized):
        check_quantized("weight", weight, "[M]")
    else:
        require(values.dtype in (x.dtype, jnp.float32), f"weight must be {x.dtype} as x is, or float32", values)
    require(not (gated and values.shape[0] % 2), f"a gated weight has as many gate as up outputs, got an odd M = {values.shape[0]}")
    if norm is not None:
        fits = norm.shape == x.shape[-1:] and norm.dtype in FLOAT_DTYPES
        require(fits, f"norm must be a float [D] = {[x.shape[-1]]}", norm)
    if bias is not None:
        fits = bias.shape == values.shape[:1] and bias.dtype in FLOAT_DTYPES
        require(fits, f"bias must be a float [M] = {[values.shape[0]]}", bias)
    if next_norm is not None:
        fits = next_norm.shape == (_num_results(weight, gated),) and next_norm.dtype in FLOAT_DTYPES
        require(fits, f"next_norm must be a float [M] = {[_num_results(weight, gated)]}", next_norm)
    if residual is not None:
        shape = (*x.shape[:-1], _num_results(weight, gated))
        fits = residual.shape == shape and residual.dtype in FLOAT_DTYPES
        require(fits, f"residual must be a float {list(shape)}, as the result is", residual)
