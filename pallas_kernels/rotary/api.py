"""The public functions: validate, choose an implementation, call it; the gradient is by hand."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES, choose_implementation, device_reason, head_size_reason, require
from pallas_kernels.jax_triton import launch
from pallas_kernels.linear.reference import rms_norm
from pallas_kernels.rotary import reference, triton

IMPLEMENTATIONS = ("xla", "triton", "jax_triton")
RUN_TOKENS = triton.TILE_ROWS


def norm_heads(qkv: jax.Array, *, norms: tuple[jax.Array, jax.Array] | None = None, norm_eps: float = 1e-5) -> jax.Array:
    """Normalise each query and each key of `[..., G + 2, H]` by `norms`, the scales `[H]` of both, where a model has them (Qwen 3)."""
    if norms is None:
        return qkv
    queries, keys, values = jnp.split(qkv, (qkv.shape[-2] - 2, qkv.shape[-2] - 1), axis=-2)
    return jnp.concatenate([rms_norm(queries, norms[0], norm_eps), rms_norm(keys, norms[1], norm_eps), values], axis=-2)


def rotate_heads(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, *, implementation: str | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotate the queries and keys of all tokens of whole sequences, with gradients.

    Args:
      qkv: `[R, K, G + 2, H]` for R tokens, for each kv head its G query heads, its key, its value; bfloat16, float16 or
        float32.
      cos, sin: float32 `[R, H / 2]` of each token's position. They get no gradient.
      implementation, interpret: as `pallas_kernels` says; None computes float32 by XLA.

    Returns:
      Queries `[R, K * G, H]` (head `k * G + g`), keys `[R, K, H]` and values `[R, K, H]`.
    """
    validate_heads(qkv, cos, sin)
    chosen = choose_implementation(
        implementation,
        ("xla",) if qkv.dtype == jnp.float32 else ("triton", "xla"),
        lambda name: unsupported_reason(name, qkv, row_multiple=triton.TILE_ROWS, interpret=interpret),
    )
    return _rotate_heads(chosen, interpret, qkv, cos, sin)


def rotate_and_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slots: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotate the queries and keys of tokens and write their keys and values to their rows of the pools.

    Args:
      qkv: `[B, K, G + 2, H]`, for each kv head its G query heads, its key, its value; bfloat16, float16 or float32.
      cos, sin: float32 `[B, H / 2]` of each token's position.
      slots: int32 `[B]`, the pool row of each token. One outside `[0, P)` writes nothing. Of tokens with the same slot, one is
        written. Or int32 `[B / RUN_TOKENS]` for runs of tokens whose pool rows are consecutive too: those of their first
        tokens, with the whole run inside the pool.
      k_pool, v_pool: `[P, K, H]` in the dtype of `qkv`; they are consumed where the caller donates them.
      implementation, interpret: as `pallas_kernels` says.

    Returns:
      q `[B, K * G, H]` (head `k * G + g`), k_pool, v_pool.
    """
    validate_heads(qkv, cos, sin)
    validate_pools(qkv, slots, k_pool, v_pool)
    chosen = choose_implementation(implementation, ("triton", "xla"), lambda name: unsupported_reason(name, qkv, interpret=interpret))
    if chosen != "xla" and qkv.size:
        write = functools.partial(triton.triton_rotate_and_write, interpret=interpret)
        return launch(chosen, write, qkv, cos, sin, slots, k_pool, v_pool)
    if slots.shape[0] < qkv.shape[0]:
        slots = (slots[:, None] + jnp.arange(RUN_TOKENS, dtype=jnp.int32)[None, :]).reshape(-1)
    return reference.xla_rotate_and_write(qkv, cos, sin, slots, k_pool, v_pool)


def unsupported_reason(implementation: str, qkv: jax.Array, *, row_multiple: int = 1, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot rotate these heads on the default device; None when it can.

    `row_multiple` is what their number of rows must be a multiple of: `triton.TILE_ROWS` for `rotate_heads`.
    """
    num_rows, _, _, head_size = qkv.shape
    if (reason := device_reason(implementation, IMPLEMENTATIONS, interpret)) or implementation == "xla":
        return reason
    if num_rows % row_multiple:
        return f"the number of rows must be a multiple of {row_multiple}, got {num_rows}"
    return head_size_reason(head_size, (32, 64, 128, 256))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotate_heads(implementation, interpret, qkv, cos, sin):
    if implementation != "xla":
        return launch(implementation, functools.partial(triton.triton_rotate_heads, interpret=interpret), qkv, cos, sin)
    return reference.xla_rotate_heads(qkv, cos, sin)


def _forward(implementation, interpret, qkv, cos, sin):
    return _rotate_heads(implementation, interpret, qkv, cos, sin), (cos, sin)


def _backward(implementation, interpret, angles, grads):
    if implementation != "xla":
        gradient = functools.partial(triton.triton_rotate_heads_gradient, interpret=interpret)
        return launch(implementation, gradient, *grads, *angles), None, None
    return reference.xla_rotate_heads_gradient(*grads, *angles), None, None


_rotate_heads.defvjp(_forward, _backward)


def validate_heads(qkv, cos, sin) -> None:
    fits = qkv.ndim == 4 and qkv.shape[2] > 2 and qkv.shape[3] % 2 == 0 and qkv.dtype in FLOAT_DTYPES
    require(fits, "qkv must be a float [rows, K, G + 2, H] with an even H", qkv)
    wanted = [qkv.shape[0], qkv.shape[3] // 2]
    for name, angles in (("cos", cos), ("sin", sin)):
        fits = list(angles.shape) == wanted and angles.dtype == jnp.float32
        require(fits, f"{name} must be float32 [rows, H / 2] = {wanted}", angles)


def validate_pools(qkv, slots, k_pool, v_pool) -> None:
    batch, num_kv_heads, _, head_size = qkv.shape
    fits = slots.shape in ((batch,), (batch / RUN_TOKENS,)) and slots.dtype == jnp.int32
    require(fits, f"slots must be int32 [B] = {[batch]}, or [B / {RUN_TOKENS}]", slots)
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        fits = pool.ndim == 3 and pool.shape[1:] == (num_kv_heads, head_size) and pool.dtype == qkv.dtype
        require(fits, f"{name} must be {qkv.dtype} [P, K, H] with K, H = {num_kv_heads, head_size}", pool)
    require(k_pool.shape == v_pool.shape, "k_pool and v_pool must agree", k_pool, v_pool)
