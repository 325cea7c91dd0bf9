"""Both as Pallas kernels with the Triton lowering (Ampere and newer), in place; integers throughout.

    write:   arrays[i][b, columns[i][b]] = values[i][b]
    update:  n = kept[b];  for t in first[b] .. end[b] - 2, selected by the rule:  slots[b, n] = slot_table[b, t];  n += 1
             slots[b, n] = slot_table[b, end[b] - 1];  n += 1;  kept[b] = n * keep[b]
             for t in entries[b, :num_entries[b]], not selected:  slots[b, n] = slot_table[b, t];  n += 1
             counts[b] = n

Why they exist: which sequences list more than their newest token is known on the device only. A conditional of XLA asks the host, once
per decode step; a plain compaction (cumulative sum and scatter) reads whole tables for all sequences in every step, where a
sequence that appends reads one entry. And a step writes one element into each row of several arrays: a launch for all, not one for each.

How: each sequence has a program, which reads a tile of the keys at a time, those of its tokens and no others.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

TILE = 2048  # tokens whose keys a program reads at once


def triton_write(arrays, columns, values, *, interpret: bool = False) -> tuple[jax.Array, ...]:
    """Run the kernel; arrays as in `write_elements`, already checked."""
    return pl.pallas_call(
        _write_kernel,
        grid=(arrays[0].shape[0],),
        out_shape=tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays),
        input_output_aliases={i: i for i in range(len(arrays))},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="write_elements",
    )(*arrays, *columns, *values)


def _write_kernel(*refs):  # int32: arrays [B, X], columns [B], values [B], then the arrays as outputs
    number, b = len(refs) // 4, pl.program_id(0)
    for column_ref, value_ref, array_ref in zip(refs[number : 2 * number], refs[2 * number : 3 * number], refs[3 * number :]):
        column = column_ref[b]

        @pl.when((column >= 0) & (column < array_ref.shape[1]))
        def write(array_ref=array_ref, column=column, value_ref=value_ref):
            array_ref[b, column] = value_ref[b]


def triton_update(slots, kept, slot_table, keys, marks, entries, rule, *, interpret: bool = False):
    """Run the kernel; arrays as in `update_slots`, already checked."""
    tile = min(TILE, pl.next_power_of_2(max(slot_table.shape[1], 32)))
    counts = jax.ShapeDtypeStruct(kept.shape, kept.dtype)
    slots, kept, counts = pl.pallas_call(
        functools.partial(_update_kernel, tile=tile, has_entries=entries is not None),
        grid=(slot_table.shape[0],),
        out_shape=(jax.ShapeDtypeStruct(slots.shape, slots.dtype), counts, counts),
        input_output_aliases={0: 0, 1: 1},
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="update_slots",
    )(slots, kept, slot_table, keys, marks, *rule, *(() if entries is None else (entries,)))
    return slots, counts, kept


def _update_kernel(
    _slots,  # the output slots_ref
    _kept,  # the output kept_ref
    slot_table_ref,  # int32 [B, A]
    keys_ref,  # int32 [B, A]
    marks_ref,  # int32 [B, L]
    end_ref,  # int32 [B], as all of a Rule
    first_ref,
    key_ref,
    since_ref,
    below_ref,
    start_ref,
    num_entries_ref,
    keep_ref,
    *refs,  # entries [B, C] where there are some; then the outputs slots [B, A + 1], kept [B] and counts [B], int32
    tile: int,
    has_entries: bool,
):
    *entries, slots_ref, kept_ref, counts_ref = refs
    capacity, b = slot_table_ref.shape[1], pl.program_id(0)
    end, first, kept = end_ref[b], first_ref[b], kept_ref[b]

    @pl.when(first >= end)
    def rest():
        counts_ref[b] = 0

    @pl.when(first < end)
    def update():
        key, since, below, start = key_ref[b], since_ref[b], below_ref[b], start_ref[b]

        def selected(token):
            own = keys_ref[b, token]
            marked = marks_ref[b, jnp.maximum(own, 0)] >= since
            return (own == 0) | (own == key) | marked | (token < below) | (token >= start)

        def extend(count, token, chosen):  # what is not chosen goes to the last column, so that no store needs a mask
            chosen = chosen.astype(jnp.int32)
            place = count + jnp.cumsum(chosen) - 1
            slots_ref[b, jnp.where(chosen != 0, place, capacity)] = slot_table_ref[b, token]
            return count + jnp.sum(chosen)

        def tokens(index, count):
            token = first + index * tile + jnp.arange(tile, dtype=jnp.int32)
            at = jnp.minimum(token, end - 1)
            return extend(count, at, (token < end - 1) & selected(at))

        count = jax.lax.fori_loop(0, pl.cdiv(end - 1 - first, tile), tokens, kept)
        slots_ref[b, jnp.minimum(count, capacity)] = slot_table_ref[b, end - 1]
        count += 1
        kept_ref[b] = count * keep_ref[b]
        if has_entries:
            (entries_ref,) = entries
            number = num_entries_ref[b]

            def listed(index, count):
                place = index * tile + jnp.arange(tile, dtype=jnp.int32)
                token = entries_ref[b, jnp.minimum(place, number - 1)]
                return extend(count, token, (place < number) & (token < end - 1) & ~selected(token))

            count = jax.lax.fori_loop(0, pl.cdiv(number, tile), listed, count)
        counts_ref[b] = count
