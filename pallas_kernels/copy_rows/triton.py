"""Copies from pinned host memory, or from the device, as a Pallas kernel with the Triton lowering (Ampere and newer), in place.

    pools[i][targets[b, j]] = source_pools[i][sources[b, j]],   j < counts[b]

Why it exists: which rows are wanted is known on the device only, inside of a compiled loop. XLA moves slices of host memory, whose number
and sizes a program fixes, or whole arrays. A kernel reads pinned host memory where it lies: over the link come the rows that are
wanted, and nothing where none is. Between pools of the device XLA gathers and scatters all rows of the lists, wanted or not: 76 us for
16,100 of 19,968 rows (12.4 MB) written to two pools and none read, where this kernel takes 28 (one H200, JAX 0.11.2).

How: a program takes tiles in turns, of all sequences one after the other. A tile is some rows of some heads; all pools' loads are
issued before the first store, so that many are on their way at once: the link's latency is that of microseconds. The programs stand
alone, or beside those of a matrix product (`fused_linear`) or of attention (`rotate_and_attend`), which wait for another memory.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.copy_rows.reference import SHARES, everything

TILE_BYTES = 1 << 13  # of each pool, that a program has on its way at once; the same in all kernels that copy shares of the same rows
NUM_WARPS = 4
MAX_PROGRAMS = 512
BESIDE_PROGRAMS = 32  # of another kernel, that copy a share meanwhile


def triton_copy_rows(source_pools, pools, sources, targets, counts, share, *, interpret: bool = False):
    """Run the kernel; arguments as in `copy_rows`, already checked."""
    operands = flat_operands((source_pools, pools, sources, targets, counts, share), interpret)
    number = len(pools)
    outs = pl.pallas_call(
        lambda *refs: copy_share(refs[: 2 * number + 4], refs[2 * number + 4 :], pl.program_id(0), pl.num_programs(0)),
        grid=(min(MAX_PROGRAMS, sources.size),),
        out_shape=tuple(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in operands[number : 2 * number]),
        input_output_aliases={number + i: i for i in range(number)},
        compiler_params=plt.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="copy_rows",
    )(*operands)
    return tuple(out.reshape(pool.shape) for out, pool in zip(outs, pools, strict=True))


def flat_operands(copies: Sequence[Any], interpret: bool) -> tuple[jax.Array, ...]:
    """Return what `copy_share` takes the refs of, of `Copies`: pools whose rows are flat, source pools first, then the lists."""
    source_pools, pools, *lists, share = copies
    if interpret:  # which knows no memory but the device's
        source_pools = jax.device_put(source_pools, jax.memory.Space.Device)
    # The heads that a tile has are the largest power of two that divides them: its sizes are powers of two.
    _, num_heads, head_size = pools[0].shape
    width = (num_heads & -num_heads) * head_size
    flat = (pool.reshape(pool.shape[0], -1, width) for pool in (*source_pools, *pools))
    return *flat, *lists, everything() if share is None else share


def copy_share(refs, out_refs, program, num_programs):
    """Copy what is one program's of a share.

    `refs`: source pools [P', S, C], pools [P, S, C], sources, targets int32 [B, F], counts int32 [B], share int32 [2]; `out_refs`: the
    pools as outputs.
    """
    number = len(out_refs)
    source_refs, (sources_ref, targets_ref, counts_ref, share_ref) = refs[:number], refs[2 * number :]
    batch, capacity = sources_ref.shape
    num_rows, parts, width = out_refs[0].shape
    tile_rows = max(1, min(TILE_BYTES // (width * out_refs[0].dtype.itemsize), pl.next_power_of_2(capacity)))
    columns = jnp.arange(width, dtype=jnp.int32)[None, :]
    sequence = jnp.arange(pl.next_power_of_2(batch), dtype=jnp.int32)
    counts = jnp.clip(counts_ref[jnp.minimum(sequence, batch - 1)], 0, capacity)
    tiles = jnp.where(sequence < batch, pl.cdiv(counts, tile_rows) * parts, 0)
    ends, total = jnp.cumsum(tiles), jnp.sum(tiles)
    first, last = (total * share_ref[i] // SHARES for i in range(2))

    def copy_tile(turn, _):
        tile = first + turn * num_programs + program
        b = jnp.minimum(jnp.sum((ends <= tile).astype(jnp.int32)), batch - 1)
        index = tile - jnp.max(jnp.where(ends <= tile, ends, 0))
        part = jax.lax.rem(index, parts)
        place = jax.lax.div(index, parts) * tile_rows + jnp.arange(tile_rows, dtype=jnp.int32)
        at = jnp.minimum(place, capacity - 1)
        source, target = sources_ref[b, at], targets_ref[b, at]
        valid = (place < counts_ref[b]) & (source >= 0) & (source < source_refs[0].shape[0]) & (target >= 0) & (target < num_rows)
        source, target = jnp.where(valid, source, 0), jnp.where(valid, target, num_rows)  # the interpreter drops the latter
        mask = jnp.broadcast_to(valid[:, None], (tile_rows, width))
        loaded = [plt.load(ref.at[source[:, None], part, columns], mask=mask, other=0) for ref in source_refs]
        for ref, rows in zip(out_refs, loaded, strict=True):
            plt.store(ref.at[target[:, None], part, columns], rows, mask=mask)

    jax.lax.fori_loop(0, jnp.maximum(pl.cdiv(last - first - program, num_programs), 0), copy_tile, None)
