"""The public function: validate, choose an implementation, launch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import PLAIN, choose_implementation, device_reason, require
from pallas_kernels.copy_rows.reference import everything, xla_copy_rows
from pallas_kernels.copy_rows.triton import triton_copy_rows
from pallas_kernels.jax_triton import launch

IMPLEMENTATIONS = ("xla", "triton", "jax_triton")
Pools = tuple[jax.Array, ...]


class Copies(NamedTuple):
    """What `copy_rows` is to copy: its arguments."""

    source_pools: Pools
    pools: Pools
    sources: jax.Array
    targets: jax.Array
    counts: jax.Array
    share: jax.Array | None = None


def copy_rows(
    source_pools: Pools,
    pools: Pools,
    sources: jax.Array,
    targets: jax.Array,
    counts: jax.Array,
    share: jax.Array | None = None,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> Pools:
    """Copy rows of pools to rows of others, on the device: `pools[i][targets[b, j]] = source_pools[i][sources[b, j]]`.

    Args:
      source_pools: `[P', K, H]` each, none of them among `pools`, on the device or in host memory (put with
        `memory_kind="pinned_host"` on a GPU).
      pools: `[P, K, H]` each, in the same dtypes; the kernel writes them in place.
      sources, targets: int32 `[B, F]`. No target is named twice.
      counts: int32 `[B]`: the first `counts[b]` of each row are copied; what stands beyond is arbitrary. Rows outside a pool are left out.
      share: int32 `[2]`, where the part that this call copies begins and ends, in fractions of SHARES; by default it is everything.
        Calls whose parts follow each other, from 0 to SHARES, copy everything: the kernel its part in each, "xla" all in the last one.
      implementation, interpret: as `pallas_kernels` says. "xla" moves whole pools from host memory to the device first.

    Returns: the pools afterwards.
    """
    require(len(source_pools) == len(pools) > 0, "expected as many pools as source pools", len(source_pools), len(pools))
    for source, pool in zip(source_pools, pools):
        fits = source.ndim == pool.ndim == 3 and source.shape[1:] == pool.shape[1:] == pools[0].shape[1:]
        require(fits and source.dtype == pool.dtype, "expected pools [P, K, H] and source pools [P', K, H] of one dtype", source, pool)
    fits = sources.ndim == 2 and sources.shape == targets.shape and counts.shape == sources.shape[:1]
    fits &= sources.dtype == targets.dtype == counts.dtype == jnp.int32
    require(fits, "expected sources and targets int32 [B, F] and counts int32 [B]", sources, targets, counts)
    share = everything() if share is None else share
    require(share.shape == (2,) and share.dtype == jnp.int32, "expected a share int32 [2]", share)
    chosen = choose_implementation(implementation, ("triton", "xla"), lambda name: unsupported_reason(name, pools[0], interpret=interpret))
    if not sources.size:
        return pools
    if chosen == "xla":
        return xla_copy_rows(source_pools, pools, sources, targets, counts, share)
    return launch(chosen, functools.partial(triton_copy_rows, interpret=interpret), source_pools, pools, sources, targets, counts, share)


def unsupported_reason(implementation: str, pool: jax.Array, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot run on the default device; None when it can."""
    reason = device_reason(implementation, IMPLEMENTATIONS, interpret)
    if reason or implementation in PLAIN:
        return reason
    head_size = pool.shape[-1]
    return None if head_size & (head_size - 1) == 0 else f"the head size must be a power of two, got {head_size}"
