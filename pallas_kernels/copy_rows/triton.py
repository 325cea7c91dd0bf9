"""Copies from pinned host memory as a Pallas kernel with the Triton lowering (Ampere and newer), in place.

    pools[i][targets[b, j]] = host_pools[i][sources[b, j]],   j < counts[b]

Why it exists: which rows are wanted is known on the device only, inside of a compiled loop. XLA moves slices of host memory, whose number
and sizes a program fixes, or whole arrays. A kernel reads pinned host memory where it lies: over the link come the rows that are
wanted, and nothing where none is.

How: a sequence has a fixed number of programs, which take its tiles in turns. A tile is some rows of some heads; all pools' loads are
issued before the first store, so that many are on their way at once: the link's latency is that of microseconds.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

TILE_BYTES = 1 << 14  # of each pool, that a program has on its way at once
NUM_WARPS = 4
MAX_PROGRAMS = 16  # of a sequence


def triton_copy_rows(host_pools, pools, sources, targets, counts, *, interpret: bool = False):
    """Run the kernel; arguments as in `copy_rows`, already checked."""
    if interpret:  # which knows no memory but the device's
        host_pools = jax.device_put(host_pools, jax.memory.Space.Device)
    batch, capacity = sources.shape
    _, num_heads, head_size = pools[0].shape
    heads = num_heads & -num_heads  # the largest power of two that divides them: a tile's sizes are powers of two
    width = heads * head_size
    tile_rows = max(1, min(TILE_BYTES // (width * pools[0].dtype.itemsize), pl.next_power_of_2(capacity)))
    number, flat = len(pools), [pool.reshape(pool.shape[0], -1) for pool in (*host_pools, *pools)]
    outs = pl.pallas_call(
        functools.partial(_kernel, number=number, width=width, tile_rows=tile_rows),
        grid=(batch, min(MAX_PROGRAMS, pl.cdiv(capacity, tile_rows)), num_heads // heads),
        out_shape=tuple(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in flat[number:]),
        input_output_aliases={number + i: i for i in range(number)},
        compiler_params=plt.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="copy_rows",
    )(*flat, sources, targets, counts)
    return tuple(out.reshape(pool.shape) for out, pool in zip(outs, pools, strict=True))


def _kernel(
    *refs,  # host pools [P', K H], pools [P, K H], sources, targets int32 [B, F], counts int32 [B]; then the pools as outputs
    number: int,
    width: int,
    tile_rows: int,
):
    host_refs, out_refs = refs[:number], refs[-number:]
    sources_ref, targets_ref, counts_ref = refs[2 * number : -number]
    b, program = pl.program_id(0), pl.program_id(1)
    columns = pl.program_id(2) * width + jnp.arange(width, dtype=jnp.int32)[None, :]
    capacity = sources_ref.shape[1]
    count = jnp.minimum(counts_ref[b], capacity)

    def copy_tile(index, _):
        place = (index * pl.num_programs(1) + program) * tile_rows + jnp.arange(tile_rows, dtype=jnp.int32)
        at = jnp.minimum(place, capacity - 1)
        source, target = sources_ref[b, at], targets_ref[b, at]
        valid = (place < count) & (source >= 0) & (source < host_refs[0].shape[0]) & (target >= 0) & (target < out_refs[0].shape[0])
        source, target = jnp.where(valid, source, 0), jnp.where(valid, target, out_refs[0].shape[0])  # the interpreter drops the latter
        mask = jnp.broadcast_to(valid[:, None], (tile_rows, width))
        tiles = [plt.load(ref.at[source[:, None], columns], mask=mask, other=0) for ref in host_refs]
        for ref, tile in zip(out_refs, tiles, strict=True):
            plt.store(ref.at[target[:, None], columns], tile, mask=mask)

    num_tiles = pl.cdiv(count - program * tile_rows, pl.num_programs(1) * tile_rows)
    jax.lax.fori_loop(0, jnp.maximum(num_tiles, 0), copy_tile, None)
