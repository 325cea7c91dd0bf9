"""The public function: validate, choose an implementation, launch."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES, check_known, choose_implementation, device_reason
from pallas_kernels.span_decode import triton
from pallas_kernels.span_decode.heuristics import mosaic_config, triton_config
from pallas_kernels.span_decode.quantized import Pool, QuantizedPool, pool_values
from pallas_kernels.span_decode.reference import reference_attention, xla_attention

IMPLEMENTATIONS = ("reference", "xla", "triton", "mosaic", "jax_triton")


def span_decode_attention(
    q: jax.Array,
    k_pool: Pool,
    v_pool: Pool,
    slots: jax.Array,
    counts: jax.Array,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute attention of one query per sequence over exactly the KV rows in its slots.

    Args:
      q: `[B, N, H]` queries, bfloat16, float16 or float32. Query head `n` reads kv head
        `n // (N // K)`.
      k_pool, v_pool: `[P, K, H]` rows in the dtype of `q`, or two `QuantizedPool`s.
      slots: int32 `[B, A]`, the pool rows that each sequence attends to, in any order. What stands
        beyond `counts[b]` is never used. A row listed twice counts twice. Slots outside `[0, P)` are
        clamped to it, so that none can read foreign memory.
      counts: int32 `[B]`, how many slots of each sequence are in use; clamped to `[0, A]`.
        Zero gives an output of zeros.
      scale: factor on the scores, `1 / sqrt(H)` unless given; a static number.
      implementation: None for the best one that the default device supports, or one of
        `IMPLEMENTATIONS`.
      interpret: run a Pallas implementation in its interpreter (tests on machines without a GPU).

    Returns:
      `[B, N, H]` in the dtype of `q`.

    Raises:
      ValueError: the arguments do not fit together.
      NotImplementedError: the named implementation cannot do this, or a gradient was asked for.
    """
    _validate(q, k_pool, v_pool, slots, counts)
    chosen = choose_implementation(
        implementation,
        IMPLEMENTATIONS,
        lambda name: unsupported_reason(name, q, k_pool, interpret=interpret),
        preferred=("triton", "xla"),
    )
    if q.size == 0 or slots.shape[1] == 0:
        return jnp.zeros(q.shape, q.dtype)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    return _attend(chosen, float(scale), interpret, q, k_pool, v_pool, slots, counts)


def unsupported_reason(implementation: str, q: jax.Array, k_pool: Pool, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot compute this on the default device; None when it can."""
    check_known(implementation, IMPLEMENTATIONS)
    if implementation in ("reference", "xla"):
        return None
    if implementation == "jax_triton":
        if interpret:
            return "it has no interpreter"
        if isinstance(k_pool, QuantizedPool):
            return "int8 pools are only in triton"
        if not importlib.util.find_spec("jax_triton"):
            return "needs the package jax-triton"
    if not interpret and (reason := device_reason(90 if implementation == "mosaic" else 80)):
        return reason
    if implementation == "mosaic":
        from pallas_kernels.span_decode import mosaic  # it takes a second to import

        return mosaic.unsupported_reason(q, k_pool, interpret)
    return triton.unsupported_reason(q, k_pool)


def expected_bytes(q: jax.Array, k_pool: Pool, num_slots: int) -> int:
    """Count the bytes that must move: the K and V rows attended to and their slots once, queries in, outputs out.

    `num_slots` is `counts.sum()`. Dense attention moves the same with every row of every sequence.
    """
    values = pool_values(k_pool)
    row_bytes = values.shape[1] * values.shape[2] * values.dtype.itemsize
    if isinstance(k_pool, QuantizedPool):
        row_bytes += values.shape[1] * k_pool.scales.dtype.itemsize
    return num_slots * (2 * row_bytes + 4) + 2 * q.size * q.dtype.itemsize


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _dispatch(implementation, scale, interpret, q, k_pool, v_pool, slots, counts):
    batch, head_size = q.shape[0], q.shape[2]
    num_kv_heads, item_bytes = pool_values(k_pool).shape[1], pool_values(k_pool).dtype.itemsize
    if implementation in ("triton", "jax_triton"):
        max_kv_heads = 2 if implementation == "triton" else 1
        config = triton_config(batch, num_kv_heads, head_size, item_bytes, slots.shape[1], max_kv_heads)
        if implementation == "triton":
            return triton.triton_attention(q, k_pool, v_pool, slots, counts, scale=scale, config=config, interpret=interpret)
        from pallas_kernels.span_decode import jax_triton  # needs the package jax-triton

        return jax_triton.jax_triton_attention(q, k_pool, v_pool, slots, counts, scale=scale, config=config)
    if implementation == "mosaic":
        from pallas_kernels.span_decode import mosaic

        config = mosaic_config(batch, num_kv_heads, head_size, slots.shape[1])
        return mosaic.mosaic_attention(q, k_pool, v_pool, slots, counts, scale=scale, config=config, interpret=interpret)
    if implementation == "reference":
        return reference_attention(q, k_pool, v_pool, slots, counts, scale=scale)
    return xla_attention(q, k_pool, v_pool, slots, counts, scale=scale)


@_dispatch.defjvp
def _no_gradient(*_):
    raise NotImplementedError(
        "span_decode_attention has no gradient: it is a decoding kernel; train with masked attention over whole sequences"
    )


_attend = jax.jit(_dispatch, static_argnums=(0, 1, 2))  # so that a model's layers trace it once


def _validate(q, k_pool, v_pool, slots, counts) -> None:
    quantized = isinstance(k_pool, QuantizedPool)
    if quantized != isinstance(v_pool, QuantizedPool):
        raise ValueError("k_pool and v_pool must both be quantized, or neither")
    keys, values = pool_values(k_pool), pool_values(v_pool)
    for name, array, rank, letters in (
        ("q", q, 3, "[B, N, H]"),
        ("k_pool", keys, 3, "[P, K, H]"),
        ("slots", slots, 2, "[B, A]"),
        ("counts", counts, 1, "[B]"),
    ):
        if array.ndim != rank:
            raise ValueError(f"{name} must be {letters}, got shape {array.shape}")
    batch, num_heads, head_size = q.shape
    num_rows, num_kv_heads, pool_head_size = keys.shape
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(f"k_pool and v_pool must agree, got {keys.dtype}{list(keys.shape)} and {values.dtype}{list(values.shape)}")
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    if quantized:
        for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
            if pool.values.dtype != jnp.int8 or pool.scales.dtype != jnp.float32:
                raise ValueError(f"{name} must hold int8 values and float32 scales, got {pool.values.dtype} and {pool.scales.dtype}")
            if pool.scales.shape != (num_rows, num_kv_heads):
                raise ValueError(f"{name}.scales must be [P, K] = {[num_rows, num_kv_heads]}, got {list(pool.scales.shape)}")
    elif keys.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype} but the pools are {keys.dtype}: cast one of them")
    if pool_head_size != head_size:
        raise ValueError(f"q has head size {head_size}, the pools have {pool_head_size}")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"the {num_heads} query heads must be a multiple of the {num_kv_heads} kv heads")
    if num_rows == 0:
        raise ValueError("the pools must have at least one row")
    if slots.dtype != jnp.int32 or counts.dtype != jnp.int32:
        raise ValueError(f"slots and counts must be int32, got {slots.dtype} and {counts.dtype}")
    if slots.shape[0] != batch or counts.shape[0] != batch:
        raise ValueError(f"q, slots and counts must share the batch size, got {batch}, {slots.shape[0]} and {counts.shape[0]}")
