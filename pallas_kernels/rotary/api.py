"""Rotary positions for the queries and keys of one decode step, whose keys and values go into the KV pools: one kernel.

For each pair (i, i + H/2) of every query and key head (Llama's order of pairs; RoFormer, 2104.09864, section 3.2), in float32:

    out[i] = x[i] cos[i] - x[i + H/2] sin[i],    out[i + H/2] = x[i + H/2] cos[i] + x[i] sin[i]

Why it exists: XLA takes three or four kernels for it (rotate q, rotate k, write k, write v), each a launch of 2 to 3 us in
every layer of every step, to move a few KB. The pools are updated in place: donate them, or XLA copies them first.

Numerics: rotated in float32, rounded once to the dtype of `qkv`; values are copied as they are.

Seen on JAX 0.10.2 and 0.11.2, Pallas with the Triton lowering (Ampere and newer).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import device_reason

IMPLEMENTATIONS = ("xla", "triton")
FLOAT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def rotate_and_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    rows: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates the queries and keys of one token per sequence and writes its keys and values to their row of the pools.

    Args:
      qkv: `[B, K, G + 2, H]`, for each kv head its G query heads, its key, its value; bfloat16, float16 or float32.
      cos, sin: float32 `[B, H / 2]` of each sequence's position.
      rows: int32 `[B]`, the pool row of each sequence's new token. A row outside `[0, P)` writes nothing. Of sequences with
        the same row, one is written.
      k_pool, v_pool: `[P, K, H]` in the dtype of `qkv`; they are consumed where the caller donates them.
      implementation: None for the best one that the default device supports, or one of `IMPLEMENTATIONS`.
      interpret: run the Pallas implementation in its interpreter (tests on machines without a GPU).

    Returns:
      q `[B, K * G, H]` (head `k * G + g`), k_pool, v_pool.

    Raises:
      ValueError: the arguments do not fit together.
      NotImplementedError: the named implementation cannot do this.
    """
    _validate(qkv, cos, sin, rows, k_pool, v_pool, implementation)
    if implementation is None:
        implementation = "xla" if unsupported_reason("triton", qkv) else "triton"
    elif reason := unsupported_reason(implementation, qkv, interpret=interpret):
        raise NotImplementedError(f"implementation={implementation!r}: {reason}")
    if implementation == "xla" or qkv.size == 0:
        return _rotate_and_write_xla(qkv, cos, sin, rows, k_pool, v_pool)
    return _rotate_and_write_triton(qkv, cos, sin, rows, k_pool, v_pool, interpret)


def unsupported_reason(implementation: str, qkv: jax.Array, *, interpret: bool = False) -> str | None:
    """Why `implementation` cannot compute this on the default device; None when it can."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}, choose from {IMPLEMENTATIONS}")
    if implementation == "xla":
        return None
    if not interpret and (reason := device_reason(80)):
        return reason
    if qkv.shape[3] not in (32, 64, 128, 256):
        return f"head size must be 32, 64, 128 or 256, got {qkv.shape[3]}"
    return None


def _rotate_and_write_xla(qkv, cos, sin, rows, k_pool, v_pool):
    batch, num_kv_heads, group_and_two, head_size = qkv.shape
    first, second = jnp.split(qkv[:, :, :-1].astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, None, :], sin[:, None, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(qkv.dtype)
    q = rotated[:, :, :-1].reshape(batch, num_kv_heads * (group_and_two - 2), head_size)
    rows = jnp.where(rows < 0, k_pool.shape[0], rows)  # indices below zero would count from the end
    k_pool = k_pool.at[rows].set(rotated[:, :, -1], mode="drop")
    return q, k_pool, v_pool.at[rows].set(qkv[:, :, -1], mode="drop")


def _rotate_and_write_triton(qkv, cos, sin, rows, k_pool, v_pool, interpret):
    batch, num_kv_heads, group_and_two, head_size = qkv.shape
    q_shape = (batch, num_kv_heads * (group_and_two - 2), head_size)
    return pl.pallas_call(
        _kernel,
        grid=(batch, num_kv_heads),
        out_shape=(
            jax.ShapeDtypeStruct(q_shape, qkv.dtype),
            jax.ShapeDtypeStruct(k_pool.shape, k_pool.dtype),
            jax.ShapeDtypeStruct(v_pool.shape, v_pool.dtype),
        ),
        input_output_aliases={4: 1, 5: 2},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="rotate_and_write",
    )(qkv, cos, sin, rows, k_pool, v_pool)


def _kernel(
    qkv_ref,  # [B, K, G + 2, H]
    cos_ref,  # float32 [B, H / 2]
    sin_ref,  # float32 [B, H / 2]
    rows_ref,  # int32 [B]
    _k_pool_ref,  # the outputs k_ref and v_ref
    _v_pool_ref,
    q_ref,  # [B, K G, H]
    k_ref,  # [P, K, H]
    v_ref,  # [P, K, H]
):
    b, kv_head = pl.program_id(0), pl.program_id(1)
    group, head_size = qkv_ref.shape[2] - 2, qkv_ref.shape[3]
    low, high = pl.ds(0, head_size // 2), pl.ds(head_size // 2, head_size // 2)
    row = rows_ref[b]
    cos, sin = cos_ref[b, :], sin_ref[b, :]

    def rotate(heads, cos, sin):
        first = qkv_ref[b, kv_head, heads, low].astype(jnp.float32)
        second = qkv_ref[b, kv_head, heads, high].astype(jnp.float32)
        return (first * cos - second * sin).astype(q_ref.dtype), (second * cos + first * sin).astype(q_ref.dtype)

    # A power of two of them; those beyond the group do what its last head does, which saves masks.
    heads = jnp.minimum(jnp.arange(pl.next_power_of_2(group), dtype=jnp.int32), group - 1)
    q_first, q_second = rotate(heads, cos[None, :], sin[None, :])
    key_first, key_second = rotate(group, cos, sin)
    value = qkv_ref[b, kv_head, group + 1, :]
    q_ref[b, kv_head * group + heads, low] = q_first
    q_ref[b, kv_head * group + heads, high] = q_second

    @pl.when((row >= 0) & (row < k_ref.shape[0]))
    def write():
        k_ref[row, kv_head, low] = key_first
        k_ref[row, kv_head, high] = key_second
        v_ref[row, kv_head, :] = value


def _validate(qkv, cos, sin, rows, k_pool, v_pool, implementation) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}, choose from {IMPLEMENTATIONS} or None")
    if qkv.ndim != 4 or qkv.shape[2] < 3 or qkv.shape[3] % 2 or qkv.dtype not in FLOAT_DTYPES:
        raise ValueError(f"qkv must be a float [B, K, G + 2, H] with an even H, got {qkv.dtype}{list(qkv.shape)}")
    batch, num_kv_heads, _, head_size = qkv.shape
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape != (batch, head_size // 2) or angles.dtype != jnp.float32:
            raise ValueError(f"{name} must be float32 [B, H / 2] = {[batch, head_size // 2]}, got {angles.dtype}{list(angles.shape)}")
    if rows.shape != (batch,) or rows.dtype != jnp.int32:
        raise ValueError(f"rows must be int32 [B] = {[batch]}, got {rows.dtype}{list(rows.shape)}")
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if pool.ndim != 3 or pool.shape[1:] != (num_kv_heads, head_size) or pool.dtype != qkv.dtype:
            wanted = f"{qkv.dtype} [P, K, H] with K, H = {num_kv_heads, head_size}"
            raise ValueError(f"{name} must be {wanted}, got {pool.dtype}{list(pool.shape)}")
    if k_pool.shape != v_pool.shape:
        raise ValueError(f"k_pool and v_pool must agree, got {list(k_pool.shape)} and {list(v_pool.shape)}")
