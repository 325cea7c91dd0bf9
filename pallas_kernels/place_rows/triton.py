"""The choice as a Pallas kernel with the Triton lowering (Ampere and newer), slot table and owners in place; integers throughout.

Why it exists: which rows are missing is known on the device only. In most steps of most sequences none is, and a sequence that names
nothing costs its program one read; XLA would sort and scan whole tables of all sequences in every step.

How: each sequence has a program. It lists the tokens that miss a row; notes the age of every row; finds by bisection the age up to which
as many rows are to be taken; lists these; and exchanges one for the other.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.place_rows.reference import FREE, NEVER

TILE = 2048  # tokens, or rows, that a program reads at once


def triton_place_rows(slot_table, owner, keys, marks, place, end, key, since, pinned, host_rows, *, interpret: bool = False):
    """Run the kernel; arguments as in `place_rows`, already checked."""
    (batch, capacity), width = slot_table.shape, owner.shape[1]
    sizes = [
        (batch, capacity),
        *[(batch, width)] * 3,
        (batch,),
        *[(batch, width + 1)] * 3,
    ]  # one spare, so that what is not chosen has a place
    results = pl.pallas_call(
        functools.partial(_kernel, interpret=interpret),
        grid=(batch,),
        out_shape=tuple(jax.ShapeDtypeStruct(size, jnp.int32) for size in sizes),
        input_output_aliases={0: 0, 1: 1},
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="place_rows",
    )(slot_table, owner, keys, marks, place, end, key, since, pinned, host_rows)
    return results[:5]


def _kernel(
    _table,  # the output table_ref
    _owner,  # the output owner_ref
    keys_ref,  # int32 [B, A]
    marks_ref,  # int32 [B, L]
    place_ref,  # int32 [B], and so on
    end_ref,
    key_ref,
    since_ref,
    pinned_ref,
    host_rows_ref,  # int32 [B, A]
    table_ref,  # int32 [B, A]
    owner_ref,  # int32 [B, W]
    sources_ref,  # int32 [B, W]
    targets_ref,  # int32 [B, W]
    counts_ref,  # int32 [B]
    tokens_ref,  # int32 [B, W + 1], that miss a row
    rows_ref,  # int32 [B, W + 1], that are taken
    ages_ref,  # int32 [B, W + 1], of rows
    *,
    interpret: bool,
):
    b = pl.program_id(0)
    capacity, width = table_ref.shape[1], owner_ref.shape[1]
    end, key, since = end_ref[b], key_ref[b], since_ref[b]

    def tiles(size, compute, carry):  # of indices below `size`, and which of them are
        tile = min(TILE, pl.next_power_of_2(max(capacity, width, 32)))

        def step(index, carry):
            at = index * tile + jnp.arange(tile, dtype=jnp.int32)
            return compute(jnp.minimum(at, jnp.maximum(size - 1, 0)), at < size, carry)

        return jax.lax.fori_loop(0, pl.cdiv(size, tile), step, carry)

    def wait():  # for what other threads wrote; the interpreter runs one, and knows no barrier
        if not interpret:
            plt.debug_barrier()

    def store(ref, at, values, chosen):  # what is not chosen is the same again, or goes to the spare column: the interpreter mixes up masks
        plt.store(ref.at[b, at], values, mask=None if interpret else chosen)

    def in_use(token):
        own = keys_ref[b, token]
        marked = marks_ref[b, jnp.maximum(own, 0)]
        return (own == 0) | (own == key) | (marked >= since), marked

    def extend(ref, count, chosen, values):
        places = count + jnp.cumsum(chosen.astype(jnp.int32)) - 1
        fits = chosen & (places < width)
        store(ref, jnp.where(fits, places, width), values, fits)
        return count + jnp.sum(chosen.astype(jnp.int32))

    def list_missing(token, inside, count):
        return extend(tokens_ref, count, inside & (table_ref[b, token] < 0) & in_use(token)[0], token)

    def note_age(row, inside, count):
        held = owner_ref[b, row]
        used, marked = in_use(jnp.maximum(held, 0))
        age = jnp.where(held < 0, FREE, jnp.where(used, NEVER, marked))
        age = jnp.where(row < pinned_ref[b], NEVER, age)
        store(ages_ref, row, age, inside)
        return count + jnp.sum((inside & (age < NEVER)).astype(jnp.int32))

    def count_up_to(age):
        return tiles(width, lambda row, inside, n: n + jnp.sum((inside & (ages_ref[b, row] <= age)).astype(jnp.int32)), jnp.int32(0))

    @pl.when(place_ref[b] == 0)
    def leave():
        counts_ref[b] = 0

    @pl.when(place_ref[b] != 0)
    def exchange():
        missing = tiles(end, list_missing, jnp.int32(0))
        count = jnp.minimum(missing, tiles(jnp.minimum(missing, 1) * width, note_age, jnp.int32(0)))  # where none is missing, none is noted
        counts_ref[b] = count

        @pl.when(count > 0)
        def take():
            wait()

            def halve(_, bounds):  # the oldest of which enough rows are at most so old is in low .. high
                low, high = bounds
                middle = (low + high) >> 1
                enough = count_up_to(middle) >= count
                return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

            _, age = jax.lax.fori_loop(0, (capacity + 2).bit_length(), halve, (jnp.int32(FREE), jnp.int32(capacity)))
            equals = count - count_up_to(age - 1)  # so many of that age are taken

            def list_taken(row, inside, carry):
                taken, ties = carry
                own = ages_ref[b, row]
                tie = inside & (own == age)
                rank = ties + jnp.cumsum(tie.astype(jnp.int32))
                chosen = (inside & (own < age)) | (tie & (rank <= equals))
                return extend(rows_ref, taken, chosen, row), ties + jnp.sum(tie.astype(jnp.int32))

            tiles(width, list_taken, (jnp.int32(0), jnp.int32(0)))
            wait()

            def change(place, inside, _):
                token, row = tokens_ref[b, place], rows_ref[b, place]
                left, target = owner_ref[b, row], b * width + row
                had = left >= 0
                given_up = -1 - host_rows_ref[b, jnp.maximum(left, 0)]
                store(table_ref, jnp.where(had, left, token), jnp.where(had, given_up, target), inside)
                store(table_ref, token, target, inside)
                store(owner_ref, row, token, inside)
                store(sources_ref, place, host_rows_ref[b, token], inside)
                store(targets_ref, place, target, inside)

            tiles(count, change, None)
