"""The choice as a Pallas kernel with the Triton lowering (Ampere and newer), slot table and owners in place; integers throughout.

Why it exists: which rows are missing is known on the device only. In most steps of most sequences none is, and a sequence that names
nothing costs its program one read; XLA would sort and scan whole tables of all sequences in every step.

How: each sequence has a program in each of two kernels. The first one lists the tokens that miss a row, and notes the age of every row.
Then it is known who wants how many, and rows are shared out. The second one finds by bisection the age up to which as many rows are to be
taken; lists these; and exchanges one for the other.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.place_rows.reference import FREE, NEVER, share_out

TILE = 8192  # tokens, or rows, that a program reads at once
MAX_HELD_ROWS = 16384  # of a working set, whose ages a program holds in registers


def triton_place_rows(
    slot_table, owner, keys, marks, place, end, key, named, since, pinned, host_rows, most, turn, *, interpret: bool = False
):
    """Run the kernels; arguments as in `place_rows`, already checked."""
    (batch, capacity), width = slot_table.shape, owner.shape[1]
    num_warps = 8 if max(capacity, width) <= 2048 else 16

    def launch(kernel, name, sizes, *arrays, aliases):
        return pl.pallas_call(
            functools.partial(kernel, interpret=interpret),
            grid=(batch,),
            out_shape=tuple(jax.ShapeDtypeStruct((batch, *size), jnp.int32) for size in sizes),
            input_output_aliases=aliases,
            compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
            interpret=interpret,
            name=name,
        )(*arrays)

    lists = [(width + 1,)] * 2  # one spare, so that what is not chosen has a place
    wanted, *listed = launch(
        _list_kernel, "list_missing_rows", [(), *lists], slot_table, owner, keys, marks, place, end, key, named, since, pinned, aliases={}
    )
    counts = share_out(wanted, most, turn)
    sizes = [(capacity,), *[(width,)] * 3, (width + 1,)]
    *results, _ = launch(_take_kernel, "place_rows", sizes, slot_table, owner, host_rows, counts, *listed, aliases={0: 0, 1: 1})
    return *results, counts, wanted - counts


class _Sequence:
    """What both kernels do with the arrays of one sequence."""

    def __init__(self, capacity: int, width: int, interpret: bool):
        self.b, self.width, self.interpret = pl.program_id(0), width, interpret
        self.tile = min(TILE, pl.next_power_of_2(max(capacity, width, 32)))

    def tiles(self, size, compute, carry):
        """Compute `carry = compute(indices, which of them are below size, carry)` for tiles of indices."""

        def step(index, carry):
            at = index * self.tile + jnp.arange(self.tile, dtype=jnp.int32)
            return compute(jnp.minimum(at, jnp.maximum(size - 1, 0)), at < size, carry)

        return jax.lax.fori_loop(0, pl.cdiv(size, self.tile), step, carry)

    def store(self, ref, at, values, chosen):
        """Store what is chosen; the rest is the same again, or goes to the spare column: the interpreter mixes up masks."""
        plt.store(ref.at[self.b, at], values, mask=None if self.interpret else chosen)

    def extend(self, ref, count, chosen, values):
        """Store what is chosen behind `count` others; return how many there are then."""
        places = count + jnp.cumsum(chosen.astype(jnp.int32)) - 1
        fits = chosen & (places < self.width)
        self.store(ref, jnp.where(fits, places, self.width), values, fits)
        return count + jnp.sum(chosen.astype(jnp.int32))

    def wait(self):
        """Wait for what other threads wrote; the interpreter runs one, and knows no barrier."""
        if not self.interpret:
            plt.debug_barrier()


def _list_kernel(
    table_ref,  # int32 [B, A]
    owner_ref,  # int32 [B, W]
    keys_ref,  # int32 [B, A]
    marks_ref,  # int32 [B, L]
    place_ref,  # int32 [B], and so on
    end_ref,
    key_ref,
    named_ref,
    since_ref,
    pinned_ref,
    wanted_ref,  # int32 [B], how many tokens miss a row that there is
    tokens_ref,  # int32 [B, W + 1], that miss a row
    ages_ref,  # int32 [B, W + 1], of rows, where some token misses one
    *,
    interpret: bool,
):
    own = _Sequence(table_ref.shape[1], owner_ref.shape[1], interpret)
    b = own.b
    end, key, named, since = end_ref[b], key_ref[b], named_ref[b], since_ref[b]

    def in_use(token):
        found = keys_ref[b, token]
        marked = marks_ref[b, jnp.maximum(found, 0)]
        return (found == 0) | (found == key) | (found == named) | (marked >= since), marked

    def list_missing(token, inside, count):
        return own.extend(tokens_ref, count, inside & (table_ref[b, token] < 0) & in_use(token)[0], token)

    def note_age(row, inside, count):
        held = owner_ref[b, row]
        used, marked = in_use(jnp.maximum(held, 0))
        age = jnp.where(held < 0, FREE, jnp.where(used, NEVER, marked))
        age = jnp.where(row < pinned_ref[b], NEVER, age)
        own.store(ages_ref, row, age, inside)
        return count + jnp.sum((inside & (age < NEVER)).astype(jnp.int32))

    @pl.when(place_ref[b] == 0)
    def leave():
        wanted_ref[b] = 0

    @pl.when(place_ref[b] != 0)
    def find():
        missing = own.tiles(end, list_missing, jnp.int32(0))
        wanted_ref[b] = jnp.minimum(missing, own.tiles(jnp.minimum(missing, 1) * own.width, note_age, jnp.int32(0)))


def _take_kernel(
    _table,  # the output table_ref
    _owner,  # the output owner_ref
    host_rows_ref,  # int32 [B, A]
    counts_ref,  # int32 [B]
    tokens_ref,  # int32 [B, W + 1]
    ages_ref,  # int32 [B, W + 1]
    table_ref,  # int32 [B, A]
    owner_ref,  # int32 [B, W]
    sources_ref,  # int32 [B, W]
    targets_ref,  # int32 [B, W]
    rows_ref,  # int32 [B, W + 1], that are taken
    *,
    interpret: bool,
):
    own = _Sequence(table_ref.shape[1], owner_ref.shape[1], interpret)
    b, width = own.b, own.width
    count, capacity = counts_ref[b], table_ref.shape[1]

    row = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)
    held = jnp.where(row < width, ages_ref[b, jnp.minimum(row, width - 1)], NEVER) if width <= MAX_HELD_ROWS else None

    def count_up_to(age):
        if held is not None:
            return jnp.sum((held <= age).astype(jnp.int32))
        return own.tiles(width, lambda row, inside, n: n + jnp.sum((inside & (ages_ref[b, row] <= age)).astype(jnp.int32)), jnp.int32(0))

    @pl.when(count > 0)
    def take():
        def halve(_, bounds):  # the oldest of which enough rows are at most so old is in low .. high
            low, high = bounds
            middle = (low + high) >> 1
            enough = count_up_to(middle) >= count
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        _, age = jax.lax.fori_loop(0, (capacity + 2).bit_length(), halve, (jnp.int32(FREE), jnp.int32(capacity)))
        equals = count - count_up_to(age - 1)  # so many of that age are taken

        def list_taken(row, inside, carry):
            taken, ties = carry
            found = ages_ref[b, row]
            tie = inside & (found == age)
            rank = ties + jnp.cumsum(tie.astype(jnp.int32))
            chosen = (inside & (found < age)) | (tie & (rank <= equals))
            return own.extend(rows_ref, taken, chosen, row), ties + jnp.sum(tie.astype(jnp.int32))

        own.tiles(width, list_taken, (jnp.int32(0), jnp.int32(0)))
        own.wait()

        def change(place, inside, _):
            token, row = tokens_ref[b, place], rows_ref[b, place]
            left, target = owner_ref[b, row], b * width + row
            had = left >= 0
            given_up = -1 - host_rows_ref[b, jnp.maximum(left, 0)]
            own.store(table_ref, jnp.where(had, left, token), jnp.where(had, given_up, target), inside)
            own.store(table_ref, token, target, inside)
            own.store(owner_ref, row, token, inside)
            own.store(sources_ref, place, host_rows_ref[b, token], inside)
            own.store(targets_ref, place, target, inside)

        own.tiles(count, change, None)
