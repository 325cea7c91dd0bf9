"""The update as a Pallas kernel with the Triton lowering (Ampere and newer), in place.

    extend[b]:  slots[b, counts[b]:] = the slot_table[b, t] with visible[b, t], in order of t;  counts[b] += how many
    append[b]:  slots[b, counts[b]] = own[b];  counts[b] += 1
    neither:    as it was

Why it exists: which sequences are extended is known on the device only. A conditional of XLA asks the host,
once per decode step; a plain compaction (cumulative sum and scatter) does the work for all sequences
in every step.

How: each sequence has a program that does what its own flags say. It compacts a tile of the table at a time.

Numerics: integers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

TILE = 1024  # table entries that a program compacts at once


def triton_update(slots, counts, visible, slot_table, own, extend, append, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Run the kernel; arrays as in `update_slots`, already checked."""
    tile = min(TILE, pl.next_power_of_2(max(slot_table.shape[1], 32)))
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile),
        grid=(slot_table.shape[0],),
        out_shape=(jax.ShapeDtypeStruct(slots.shape, slots.dtype), jax.ShapeDtypeStruct(counts.shape, counts.dtype)),
        input_output_aliases={0: 0, 1: 1},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="update_slots",
    )(slots, counts, visible.astype(jnp.int32), slot_table, own, extend.astype(jnp.int32), append.astype(jnp.int32))


def _kernel(
    _slots,  # the output slots_ref
    _counts,  # the output counts_ref
    visible_ref,  # int32 [B, A], 0 or 1
    slot_table_ref,  # int32 [B, A]
    own_ref,  # int32 [B]
    extend_ref,  # int32 [B]
    append_ref,  # int32 [B]
    slots_ref,  # int32 [B, A + 1]
    counts_ref,  # int32 [B]
    *,
    tile: int,
):
    capacity = slot_table_ref.shape[1]
    b = pl.program_id(0)

    @pl.when(append_ref[b] != 0)
    def append():
        count = counts_ref[b]
        slots_ref[b, jnp.minimum(count, capacity)] = own_ref[b]
        counts_ref[b] = count + 1

    @pl.when(extend_ref[b] != 0)
    def extend():
        lanes = jnp.arange(tile, dtype=jnp.int32)

        def step(index, count):
            token = index * tile + lanes
            at = jnp.minimum(token, capacity - 1)
            seen = jnp.where(token < capacity, visible_ref[b, at], 0)
            place = count + jnp.cumsum(seen) - 1
            # What is not kept goes to the last column, so that no store needs a mask.
            slots_ref[b, jnp.where(seen != 0, place, capacity)] = slot_table_ref[b, at]
            return count + jnp.sum(seen)

        counts_ref[b] = jax.lax.fori_loop(0, pl.cdiv(capacity, tile), step, counts_ref[b])
