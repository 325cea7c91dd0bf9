"""The public function: validate, choose an implementation, launch."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES, PLAIN, choose_implementation, device_reason, head_size_reason, require
from pallas_kernels.copy_rows import Copies, copy_rows
from pallas_kernels.jax_triton import launch
from pallas_kernels.linear.reference import SplitRows
from pallas_kernels.quantized import Quantized, Rows, check_quantized, int8_reason, values_of
from pallas_kernels.rotary import norm_heads, rotate_and_write
from pallas_kernels.rotary.api import validate_heads, validate_pools
from pallas_kernels.span_decode import triton
from pallas_kernels.span_decode.heuristics import MAX_AHEAD_BYTES, mosaic_config, parts_config, triton_config
from pallas_kernels.span_decode.reference import reference_attention, xla_attention

IMPLEMENTATIONS = ("reference", "xla", "triton", "mosaic", "jax_triton")


class HostRows(NamedTuple):
    """Rows that lie in host memory: slot -1 - r is row r of these pools."""

    k_pool: jax.Array  # [P', K, H], put with `memory_kind="pinned_host"` on a GPU
    v_pool: jax.Array
    counts: jax.Array  # int32 [B]: how many of a sequence's slots in use are such; where it is 0, none is looked for


def span_decode_attention(
    q: jax.Array,
    k_pool: Rows,
    v_pool: Rows,
    slots: jax.Array,
    counts: jax.Array,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute attention of one query per sequence over exactly the KV rows in its slots; it has no gradient.

    Args:
      q: `[B, N, H]` queries, bfloat16, float16 or float32. Query head `n` reads kv head
        `n // (N // K)`.
      k_pool, v_pool: `[P, K, H]` rows in the dtype of `q`, or two `QuantizedPool`s.
      slots: int32 `[B, A]`, the pool rows that each sequence attends to, in any order. What stands
        beyond `counts[b]` is never used. A row listed twice counts twice. Slots outside `[0, P)` are
        clamped to it, so that none can read foreign memory. Or `[B, K, A]`, those that the queries
        of each kv head attend to.
      counts: int32 `[B]`, how many slots of each sequence are in use; clamped to `[0, A]`.
        Zero gives an output of zeros. `[B, K]` where each kv head has its own slots.
      scale: factor on the scores, `1 / sqrt(H)` unless given; a static number.
      implementation, interpret: as `pallas_kernels` says.

    Returns:
      `[B, N, H]` in the dtype of `q`.
    """
    if slots.ndim == 3:
        arrays = _one_kv_head(q, k_pool, v_pool, slots, counts)
        return span_decode_attention(*arrays, scale=scale, implementation=implementation, interpret=interpret).reshape(q.shape)
    _validate(q, k_pool, v_pool, slots, counts)
    chosen = choose_implementation(implementation, ("triton", "xla"), lambda name: unsupported_reason(name, q, k_pool, interpret=interpret))
    if q.size == 0 or slots.shape[1] == 0:
        return jnp.zeros(q.shape, q.dtype)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return _attend(chosen, scale, interpret, q, k_pool, v_pool, slots, counts)


def _one_kv_head(q, k_pool: Rows, v_pool: Rows, slots, counts) -> tuple[Any, ...]:
    """Return the same attention as one of B * K sequences with one kv head each: pools, read row by row, are [P * K, 1, H]."""
    _validate(q, k_pool, v_pool, slots[:, 0], counts[:, 0])
    (batch, _, head_size), (num_rows, num_kv_heads, _) = q.shape, values_of(k_pool).shape
    fits = slots.shape[1] == num_kv_heads and counts.shape == slots.shape[:2]
    require(fits, f"slots and counts of each kv head must be [B, K, A] and [B, K] with K = {num_kv_heads}", slots, counts)
    require(num_rows * num_kv_heads < 2**31, f"{num_rows} rows of {num_kv_heads} kv heads are more than slots of each head can number")
    k_pool, v_pool = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), (k_pool, v_pool))
    slots = jnp.clip(slots, 0, num_rows - 1) * num_kv_heads + jnp.arange(num_kv_heads, dtype=jnp.int32)[None, :, None]
    return q.reshape(batch * num_kv_heads, -1, head_size), k_pool, v_pool, slots.reshape(batch * num_kv_heads, -1), counts.reshape(-1)


def rotate_and_attend(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    own: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    slots: jax.Array,
    counts: jax.Array,
    *,
    norms: tuple[jax.Array, jax.Array] | None = None,
    norm_eps: float = 1e-5,
    split: bool = False,
    partial: bool = False,
    sparse: bool = False,
    ahead: Sequence[jax.Array] = (),
    host: HostRows | None = None,
    copies: Copies | None = None,
    early: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Any, ...]:
    """Compute a decode step's attention: rotate the heads of one new token per sequence, write its key and value, attend to its slots.

    `rotate_and_write` and `span_decode_attention`, as one kernel with "triton" and "jax_triton", one after the other with the others.

    Args:
      qkv, cos, sin, k_pool, v_pool: as in `rotate_and_write`.
      own: int32 `[B]`, the pool row of each token, which no other sequence reads. One outside `[0, P)` writes nothing.
      slots, counts: as in `span_decode_attention`; a sequence that is to read its new token lists its row.
      norms: scales `[H]` of RMSNorms of each query and each key before they are rotated (Qwen 3), in any float dtype.
      norm_eps: added to their mean squares, a static number.
      split: the output may come as `SplitRows`, where that gains, for `fused_linear` to combine.
      partial: it comes as `SplitRows` in any case, as where other devices attend to other rows; "mosaic" has no way to.
      sparse: few of the slots are expected to be in use, as where a model names what it reads; for the choice of settings alone.
      ahead: arrays that are read next; where that gains, multiprocessors that have nothing else to do fetch them into the L2 cache.
      host: where slots below 0 are rows in host memory, which are read over the link as they are met; "mosaic" has no way to, and
        "reference" and "xla" move the whole host pools to the device first.
      copies: what `copy_rows` is to copy, no pool of which has to do with this attention; the kernels copy meanwhile.
      early: what reads the output may be launched while this is computed, see `may_launch_early`; not where it is `partial`.
      implementation, interpret: as `pallas_kernels` says, of `span_decode_attention`.

    Returns:
      The attention's output `[B, K * G, H]` (of `SplitRows` the parts `[S, B, K * G * H]`), k_pool, v_pool; with `copies` also the
      pools that were copied to.
    """
    batch, num_kv_heads, fused, head_size = qkv.shape
    q: Any = jax.ShapeDtypeStruct((batch, num_kv_heads * (fused - 2), head_size), qkv.dtype)
    validate_heads(qkv, cos, sin)
    validate_pools(qkv, own, k_pool, v_pool)
    _validate(q, k_pool, v_pool, slots, counts)
    require(own.shape == (batch,), f"own must be int32 [B] = {[batch]}", own)
    if host is not None:
        fits = host.k_pool.shape == host.v_pool.shape and host.k_pool.shape[1:] == k_pool.shape[1:] and host.counts.shape == (batch,)
        fits &= host.k_pool.dtype == host.v_pool.dtype == k_pool.dtype and host.counts.dtype == jnp.int32
        require(fits, "expected host pools [P', K, H] like the device's, and their counts int32 [B]", *host)
        if implementation == "mosaic":
            raise NotImplementedError(f"implementation={implementation!r}: it reads no rows in host memory")
    if partial and implementation == "mosaic":
        raise NotImplementedError("implementation='mosaic': it has no partial results")
    for norm in norms or ():
        require(norm.shape == (head_size,) and norm.dtype in FLOAT_DTYPES, f"norms must be float [H] = {[head_size]}", norm)
    chosen = choose_implementation(implementation, ("triton", "xla"), lambda name: unsupported_reason(name, q, k_pool, interpret=interpret))
    if chosen in ("triton", "jax_triton") and q.size and slots.shape[1]:
        sizes = [x.size * x.dtype.itemsize for x in ahead]
        fits = sum(sizes) <= MAX_AHEAD_BYTES
        whole = [fits and jnp.issubdtype(x.dtype, jnp.floating) and size % triton.SECTOR_BYTES == 0 for x, size in zip(ahead, sizes)]
        fetched = tuple(x for x, is_whole in zip(ahead, whole) if is_whole)
        arrays = (qkv, cos, sin, own, k_pool, v_pool, slots, counts, norms, fetched, host, copies)
        early &= not interpret and not partial
        capacity = slots.shape[1]
        config = parts_config(batch, q.shape[1], num_kv_heads, head_size, capacity) if split else None
        config = config or triton_config(batch, num_kv_heads, head_size, k_pool.dtype.itemsize, capacity, sparse)
        return _rotate_and_attend(chosen, float(norm_eps), config, partial, interpret, early, *arrays)
    qkv = norm_heads(qkv, norms=norms, norm_eps=norm_eps)
    q, k_pool, v_pool = rotate_and_write(qkv, cos, sin, own, k_pool, v_pool)
    pools = k_pool, v_pool
    if host is not None:
        slots = jnp.where(slots < 0, k_pool.shape[0] - 1 - slots, slots)
        k_host, v_host = jax.device_put(host[:2], jax.memory.Space.Device)
        pools = jnp.concatenate([k_pool, k_host]), jnp.concatenate([v_pool, v_host])
    copied = () if copies is None else (copy_rows(*copies, interpret=interpret),)
    if partial:
        attention = reference_attention if chosen == "reference" else xla_attention
        out, lse = attention(q, *pools, slots, counts, scale=1.0 / math.sqrt(head_size))
        return SplitRows(out.reshape(1, batch, -1), lse[None]), k_pool, v_pool, *copied
    return span_decode_attention(q, *pools, slots, counts, implementation=chosen, interpret=interpret), k_pool, v_pool, *copied


def unsupported_reason(implementation: str, q: jax.Array, k_pool: Rows, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot compute this on the default device; None when it can."""
    reason = device_reason(implementation, IMPLEMENTATIONS, interpret, 90 if implementation == "mosaic" else 80)
    if reason or implementation in PLAIN:
        return reason
    if implementation == "mosaic":
        from pallas_kernels.span_decode import mosaic  # it takes a second to import

        return mosaic.unsupported_reason(q, k_pool, interpret)
    values = values_of(k_pool)
    if reason := head_size_reason(q.shape[2], (32, 64, 128, 256)):
        return reason
    if (group := q.shape[1] // values.shape[1]) > 64:
        return f"at most 64 query heads per kv head, got {group}"
    return int8_reason(values)


def expected_bytes(q: jax.Array, k_pool: Rows, num_slots: int) -> int:
    """Count the bytes that must move: the K and V rows attended to and their slots once, queries in, outputs out.

    `num_slots` is `counts.sum()`. Dense attention moves the same with every row of every sequence.
    """
    row_bytes = sum(a.size // a.shape[0] * a.dtype.itemsize for a in jax.tree.leaves(k_pool))
    return num_slots * (2 * row_bytes + 4) + 2 * q.size * q.dtype.itemsize


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _dispatch(implementation, scale, interpret, q, k_pool, v_pool, slots, counts):
    arrays = (q, k_pool, v_pool, slots, counts)
    if implementation in PLAIN:
        attention = reference_attention if implementation == "reference" else xla_attention
        return attention(*arrays, scale=scale)[0]
    batch, _, head_size = q.shape
    pool, capacity = values_of(k_pool), slots.shape[1]
    num_kv_heads = pool.shape[1]
    if implementation == "mosaic":
        from pallas_kernels.span_decode import mosaic

        settings = mosaic_config(batch, num_kv_heads, head_size, capacity)
        return mosaic.mosaic_attention(*arrays, scale=scale, config=settings, interpret=interpret)
    config = triton_config(batch, num_kv_heads, head_size, pool.dtype.itemsize, capacity)
    return launch(implementation, functools.partial(triton.triton_attention, scale=scale, config=config, interpret=interpret), *arrays)


@_dispatch.defjvp
def _no_gradient(*_):
    raise NotImplementedError(
        "span_decode_attention has no gradient: it is a decoding kernel; train with masked attention over whole sequences"
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _rotate_and_attend(implementation, norm_eps, config, partial, interpret, early, qkv, *others):
    options = {"norm_eps": norm_eps, "scale": 1.0 / math.sqrt(qkv.shape[-1]), "config": config}
    options |= {"partial": partial, "interpret": interpret, "early": early}
    return launch(implementation, functools.partial(triton.triton_rotate_and_attend, **options), qkv, *others)


_attend = jax.jit(_dispatch, static_argnums=(0, 1, 2))  # so that a model's layers trace it once


def _validate(q, k_pool, v_pool, slots, counts) -> None:
    quantized = isinstance(k_pool, Quantized)
    require(quantized == isinstance(v_pool, Quantized), "k_pool and v_pool must both be quantized, or neither")
    keys, values = values_of(k_pool), values_of(v_pool)
    for name, array, *letters in (("q", q, *"BNH"), ("k_pool", keys, *"PKH"), ("slots", slots, *"BA"), ("counts", counts, "B")):
        require(array.ndim == len(letters), f"{name} must be [{', '.join(letters)}]", array)
    batch, num_heads, head_size = q.shape
    num_rows, num_kv_heads, pool_head_size = keys.shape
    require(keys.shape == values.shape and keys.dtype == values.dtype, "k_pool and v_pool must agree", keys, values)
    require(q.dtype in FLOAT_DTYPES, "q must be bfloat16, float16 or float32", q)
    if quantized:
        check_quantized("k_pool", k_pool, "[P, K]")
        check_quantized("v_pool", v_pool, "[P, K]")
    else:
        require(keys.dtype == q.dtype, f"q is {q.dtype} but the pools are {keys.dtype}: cast one of them")
    require(pool_head_size == head_size, f"q has head size {head_size}, the pools have {pool_head_size}")
    whole_groups = num_kv_heads > 0 and num_heads % num_kv_heads == 0
    require(whole_groups, f"the {num_heads} query heads must be a multiple of the {num_kv_heads} kv heads")
    require(num_rows > 0, "the pools must have at least one row")
    require(slots.dtype == counts.dtype == jnp.int32, "slots and counts must be int32", slots, counts)
    sizes = f"{batch}, {slots.shape[0]} and {counts.shape[0]}"
    require(slots.shape[0] == counts.shape[0] == batch, f"q, slots and counts must share the batch size, got {sizes}")
