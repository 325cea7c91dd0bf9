"""Rotary positions (RoFormer, 2104.09864, section 3.2) as Pallas kernels with the Triton lowering (Ampere and newer).

For each pair (i, i + H/2) of a head (Llama's order of pairs), in float32:

    out[i] = x[i] cos[i] - x[i + H/2] sin[i],    out[i + H/2] = x[i + H/2] cos[i] + x[i] sin[i]

Why they exist. `rotate_and_write`: XLA takes three or four kernels for a decode step (rotate q, rotate k, write k, write v), each
a launch of 2 to 3 us in every layer of every step, to move a few KB. The pools are updated in place: donate them, or
XLA copies them first. `rotate_heads`: XLA writes the gradient of a slice as a padded copy, so that the gradients of queries,
keys and values went through memory padded and added up. Here each number is read once and each result is written
once, in the layout that the matrix product reads.

How: a program owns a kv head, its G query heads, its key and its value, of one sequence; or some kv heads of a tile of rows.

Numerics: rotated in float32, rounded once to the dtype of the heads; values are copied as they are.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.rotary.reference import rotate_pairs

TILE_ROWS = 32  # tokens of a program of whole sequences, whose number of rows must be a multiple
MAX_KV_HEADS = 3  # of such a program: with three of twelve 272 us, with one 315 (65,536 tokens, G 1, H 64, one H100)


@functools.partial(jax.jit, static_argnames=("interpret",))
def triton_rotate_and_write(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, slots: jax.Array, k_pool: jax.Array, v_pool: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the kernel; shapes as in `rotate_and_write`, already checked. With fewer slots than rows they are those of runs."""
    batch, num_kv_heads, fused, head_size = qkv.shape
    one_by_one = slots.shape[0] == batch
    q = jax.ShapeDtypeStruct((batch, num_kv_heads * (fused - 2), head_size), qkv.dtype)
    pool = jax.ShapeDtypeStruct(k_pool.shape, k_pool.dtype)
    return pl.pallas_call(
        _write_kernel if one_by_one else _write_runs_kernel,
        grid=(slots.shape[0], num_kv_heads if one_by_one else num_kv_heads // heads_at_once(num_kv_heads)),
        out_shape=(q, pool, pool),
        input_output_aliases={4: 1, 5: 2},
        compiler_params=plt.CompilerParams(num_warps=1 if one_by_one else 4, num_stages=1),
        interpret=interpret,
        name="rotate_and_write",
    )(qkv, cos, sin, slots, k_pool, v_pool)


@functools.partial(jax.jit, static_argnames=("interpret",))
def triton_rotate_heads(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the kernel; shapes as in `rotate_heads`, already checked."""
    num_rows, num_kv_heads, fused, head_size = qkv.shape
    kv = jax.ShapeDtypeStruct((num_rows, num_kv_heads, head_size), qkv.dtype)
    q = jax.ShapeDtypeStruct((num_rows, num_kv_heads * (fused - 2), head_size), qkv.dtype)
    return _call(_heads_kernel, num_rows, num_kv_heads, (q, kv, kv), interpret, "rotate_heads")(qkv, cos, sin)


@functools.partial(jax.jit, static_argnames=("interpret",))
def triton_rotate_heads_gradient(
    dq: jax.Array, dk: jax.Array, dv: jax.Array, cos: jax.Array, sin: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Run the kernel of the gradient of `rotate_heads`, `[R, K, G + 2, H]`."""
    num_rows, num_kv_heads, head_size = dk.shape
    out = jax.ShapeDtypeStruct((num_rows, num_kv_heads, dq.shape[1] // num_kv_heads + 2, head_size), dq.dtype)
    return _call(_heads_gradient_kernel, num_rows, num_kv_heads, out, interpret, "rotate_heads_gradient")(dq, dk, dv, cos, sin)


def _call(kernel, num_rows: int, num_kv_heads: int, out_shape, interpret: bool, name: str):
    return pl.pallas_call(
        kernel,
        grid=(num_rows // TILE_ROWS, num_kv_heads // heads_at_once(num_kv_heads)),
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )


def heads_at_once(num_kv_heads: int) -> int:
    """Choose how many kv heads a program of whole sequences owns."""
    return next(heads for heads in range(MAX_KV_HEADS, 0, -1) if num_kv_heads % heads == 0)


def _own_heads(num_kv_heads: int):
    """Return the kv heads of this program."""
    heads = heads_at_once(num_kv_heads)
    return [pl.program_id(1) * heads + index for index in range(heads)]


def _halves(head_size: int):
    return pl.ds(0, head_size // 2), pl.ds(head_size // 2, head_size // 2)


def _write_kernel(
    qkv_ref,  # [B, K, G + 2, H]
    cos_ref,  # float32 [B, H / 2]
    sin_ref,  # float32 [B, H / 2]
    slots_ref,  # int32 [B]
    _k_pool_ref,  # the output k_ref
    _v_pool_ref,  # the output v_ref
    q_ref,  # [B, K G, H]
    k_ref,  # [P, K, H]
    v_ref,  # [P, K, H]
):
    b, kv_head = pl.program_id(0), pl.program_id(1)
    group = qkv_ref.shape[2] - 2
    low, high = _halves(qkv_ref.shape[3])
    slot = slots_ref[b]
    cos, sin = cos_ref[b, :], sin_ref[b, :]

    def rotate(heads, cos, sin):
        rotated = rotate_pairs(qkv_ref[b, kv_head, heads, low], qkv_ref[b, kv_head, heads, high], cos, sin)
        return (half.astype(q_ref.dtype) for half in rotated)

    # A power of two of them; those beyond the group do what its last head does, which saves masks.
    heads = jnp.minimum(jnp.arange(pl.next_power_of_2(group), dtype=jnp.int32), group - 1)
    q_first, q_second = rotate(heads, cos[None, :], sin[None, :])
    key_first, key_second = rotate(group, cos, sin)
    value = qkv_ref[b, kv_head, group + 1, :]
    q_ref[b, kv_head * group + heads, low] = q_first
    q_ref[b, kv_head * group + heads, high] = q_second

    @pl.when((slot >= 0) & (slot < k_ref.shape[0]))
    def write():
        k_ref[slot, kv_head, low] = key_first
        k_ref[slot, kv_head, high] = key_second
        v_ref[slot, kv_head, :] = value


def _heads_kernel(
    qkv_ref,  # [R, K, G + 2, H]
    cos_ref,  # float32 [R, H / 2]
    sin_ref,  # float32 [R, H / 2]
    q_ref,  # [R, K G, H]
    k_ref,  # [R, K, H]
    v_ref,  # [R, K, H]
):
    own = pl.ds(pl.program_id(0) * TILE_ROWS, TILE_ROWS)
    _rotate_tile(qkv_ref, cos_ref, sin_ref, q_ref, k_ref, v_ref, own, own)


def _write_runs_kernel(
    qkv_ref,  # [R, K, G + 2, H]
    cos_ref,  # float32 [R, H / 2]
    sin_ref,  # float32 [R, H / 2]
    slots_ref,  # int32 [R / 32]
    _k_pool_ref,  # the output k_ref
    _v_pool_ref,  # the output v_ref
    q_ref,  # [R, K G, H]
    k_ref,  # [P, K, H]
    v_ref,  # [P, K, H]
):
    run = pl.program_id(0)
    own, slots = pl.ds(run * TILE_ROWS, TILE_ROWS), pl.ds(slots_ref[run], TILE_ROWS)
    _rotate_tile(qkv_ref, cos_ref, sin_ref, q_ref, k_ref, v_ref, own, slots)


def _rotate_tile(qkv_ref, cos_ref, sin_ref, q_ref, k_ref, v_ref, own, slots):
    """Rotate the heads of the rows `own`; keys and values go to the rows `slots`."""
    group = qkv_ref.shape[2] - 2
    low, high = _halves(qkv_ref.shape[3])
    cos, sin = cos_ref[own, :], sin_ref[own, :]
    for kv_head in _own_heads(qkv_ref.shape[1]):
        for member in range(group + 1):
            target, rows, head = (q_ref, own, kv_head * group + member) if member < group else (k_ref, slots, kv_head)
            first, second = rotate_pairs(qkv_ref[own, kv_head, member, low], qkv_ref[own, kv_head, member, high], cos, sin)
            target[rows, head, low] = first.astype(target.dtype)
            target[rows, head, high] = second.astype(target.dtype)
        v_ref[slots, kv_head, :] = qkv_ref[own, kv_head, group + 1, :]


def _heads_gradient_kernel(
    dq_ref,  # [R, K G, H]
    dk_ref,  # [R, K, H]
    dv_ref,  # [R, K, H]
    cos_ref,  # float32 [R, H / 2]
    sin_ref,  # float32 [R, H / 2]
    out_ref,  # [R, K, G + 2, H]
):
    own, group = pl.ds(pl.program_id(0) * TILE_ROWS, TILE_ROWS), out_ref.shape[2] - 2
    low, high = _halves(out_ref.shape[3])
    cos, sin = cos_ref[own, :], sin_ref[own, :]
    for kv_head in _own_heads(out_ref.shape[1]):
        for member in range(group + 1):
            source, head = (dq_ref, kv_head * group + member) if member < group else (dk_ref, kv_head)
            first, second = rotate_pairs(source[own, head, low], source[own, head, high], cos, sin, back=True)
            out_ref[own, kv_head, member, low] = first.astype(out_ref.dtype)
            out_ref[own, kv_head, member, high] = second.astype(out_ref.dtype)
        out_ref[own, kv_head, group + 1, :] = dv_ref[own, kv_head, :]
