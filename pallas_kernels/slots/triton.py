"""Bookkeeping of a decode step as one Pallas kernel with the Triton lowering (Ampere and newer), in place; integers throughout.

    read:    value[b] = array[b, column[b]]
    largest: column[b] = argmax_x array[b, x]
    write:   arrays[i][b, columns[i][b]] = values[i][b]
    update:  n = kept[b];  for t in first[b] .. end[b] - 2, selected by the rule:  slots[b, n] = slot_table[b, t];  n += 1
             slots[b, n] = slot_table[b, end[b] - 1];  n += 1;  kept[b] = n * keep[b]
             for t in entries[b, :num_entries[b]], not selected:  slots[b, n] = slot_table[b, t];  n += 1
             counts[b] = n
             where slot_table[b, t] is ELSEWHERE, t is passed over

Why it exists: a step updates some twenty numbers of each sequence and one element of several of its rows. XLA makes up to twenty launches
of that. And which sequences list more than their newest token is known on the device only: a conditional of XLA asks the host, once
per decode step; a plain compaction (cumulative sum and scatter) reads whole tables for all sequences in every step, where a
sequence that appends reads one entry.

How: each sequence has a program, which runs the caller's function on its own numbers, and the operations above on its own rows. An
update reads a tile of the keys at a time, those of its tokens and no others, and asks for the next tile before it lists this one.

Warps and tiles took the least time in decode steps when they were chosen. One H200, microseconds of the launch by the profiler:

    scores of a sequence | sequences | tokens | 1 warp | 2    | 4    | 8    | 16  | 8 warps, tiles of 4,096 scores | of 16,384
    1,044                | 64        | 900    | 6.3    | 4.9  | 4.9  | 4.5  | -   | -                              | -
    1,044                | 256       | 900    | 6.6    | 5.2  | 5.3  | 4.9  | -   | -                              | -
    1,044                | 1,024     | 3,000  | 17.5   | 16.1 | 13.3 | 26.2 | -   | -                              | -
    49,152               | 1         | 2,048  | -      | -    | 6.4  | 5.6  | 5.4 | 5.1                            | 5.4
    49,152               | 64        | 2,048  | -      | -    | 13.6 | 9.0  | 9.0 | 8.1                            | 8.4

with tiles of 2,048 tokens and of 8,192 scores. Tiles of fewer tokens, `warps/tokens`, each with and without the next one asked for ahead:

    sequences | 8/2,048 | 8/1,024   | 8/512       | 4/2,048 | 4/1,024     | 4/512       | 4/256
    256       | 5.0     | - (4.5)   | 6.0         | -       | 5.3         | 5.7 (5.1)   | - (6.5)
    1,024     | -       | -         | 17.1 (15.3) | 13.5    | 12.2 (10.8) | 15.0 (11.8) | 18.3 (16.5)

A multiprocessor's registers hold two programs of eight warps or three of four.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.slots.reference import ELSEWHERE

TILE = 1024  # tokens whose keys a program reads at once
LARGEST_TILE = 4096  # numbers of which a program keeps the largest
AT_ONCE = 264  # programs of eight warps that run at once on 132 multiprocessors


@dataclasses.dataclass
class Row:
    """A sequence's row of an array `[B, X]`, inside of the kernel; without a reference where only shapes are asked for."""

    width: int
    ref: Any = None
    b: Any = None
    interpret: bool = False
    written: bool = False


def triton_per_sequence(function: Callable, state: Any, others: tuple, interpret: bool) -> Any:
    """Run the kernel; arguments as in `per_sequence`."""
    carried, read = jax.tree.leaves(state), jax.tree.leaves(others)
    arrays = [array if array.ndim else array.reshape(1) for array in (*carried, *read)]
    structure: Any = jax.tree.structure((state, *others))
    (batch,) = {array.shape[0] for array in carried or read if array.ndim}
    returned: list[Any] = []

    def results_of(numbers):
        given = iter(numbers)
        _, results = function(*structure.unflatten([Row(array.shape[1]) if array.ndim == 2 else next(given) for array in arrays]))
        returned.append(jax.tree.structure(results))
        return jax.tree.leaves(results)

    results = jax.eval_shape(results_of, [jax.ShapeDtypeStruct((), array.dtype) for array in arrays if array.ndim < 2])
    out_shape = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in carried]
    out_shape += [jax.ShapeDtypeStruct((batch,), number.dtype) for number in results]
    outs = pl.pallas_call(
        functools.partial(_kernel, function=function, structure=structure, num_carried=len(carried), interpret=interpret),
        grid=(batch,),
        out_shape=tuple(out_shape),
        input_output_aliases={i: i for i in range(len(carried))},
        compiler_params=plt.CompilerParams(num_warps=_num_warps(batch, carried, read), num_stages=1),
        interpret=interpret,
        name="per_sequence",
    )(*arrays)
    of_state: Any = jax.tree.structure(state)
    return of_state.unflatten(outs[: len(carried)]), returned[0].unflatten(outs[len(carried) :])


def _num_warps(batch: int, carried: list, read: list) -> int:
    """Return the warps of a program, by the table above; programs that go through no rows have one."""
    num_scores = max((array.shape[1] for array in read if array.dtype == jnp.float32), default=0)
    if not num_scores and all(array.ndim < 2 for array in carried):
        return 1
    return 4 if batch > AT_ONCE and num_scores <= LARGEST_TILE else 8


def _kernel(
    *refs,  # int32 or bool, [B], [B, X] or [1]: the state, what else is read; then the outputs: the state, results [B]
    function: Callable,
    structure: Any,
    num_carried: int,
    interpret: bool,
):
    b, number = pl.program_id(0), structure.num_leaves
    outs = refs[number:]
    given = (*outs[:num_carried], *refs[num_carried:number])
    views = [Row(ref.shape[1], ref, b, interpret) if ref.ndim == 2 else ref[b if ref.shape[0] > 1 else 0] for ref in given]
    found = jax.tree.leaves(function(*structure.unflatten(views)))
    for ref, value in zip(outs, found, strict=True):
        if not isinstance(value, Row):
            ref[b] = value


def read_row(row: Row, column):
    """Read an element of a row; a column outside reads the nearest one."""
    return jnp.int32(0) if row.ref is None else row.ref[row.b, jnp.clip(column, 0, row.width - 1)]


def largest_of_row(row: Row):
    """Find the largest element of a row, as `read_largest`; what is no number is passed over.

    Each place of a tile keeps its largest, so that reads do not wait for sums over the program.
    """
    if row.ref is None:
        return jnp.int32(0)
    tile = min(LARGEST_TILE, 1 << (row.width.bit_length() - 1))
    largest, at = jnp.full((tile,), -jnp.inf, jnp.float32), jnp.zeros((tile,), jnp.int32)
    for start in range(0, row.width, tile):
        start = min(start, row.width - tile)  # the last tile reads some of the one before again
        found, place = row.ref[row.b, pl.ds(start, tile)], start + jnp.arange(tile, dtype=jnp.int32)
        largest, at = jnp.where(found > largest, found, largest), jnp.where(found > largest, place, at)
    return -jnp.max(jnp.where(largest == jnp.max(largest), -at, -row.width))


def write_rows(rows, columns, values):
    """Write an element of each row, as `write_elements`."""
    for row, column, value in zip(rows, columns, values, strict=True):
        row.written = True
        if row.ref is not None:

            @pl.when((column >= 0) & (column < row.width))
            def write(row=row, column=column, value=value):
                row.ref[row.b, column] = value

    return tuple(rows)


def update_row(slots: Row, kept, slot_table: Row, keys: Row, marks: Row, entries: Row | None, rule):
    """Update a sequence's slots, as `update_slots`."""
    slots.written = True
    if slots.ref is None:
        return slots, jnp.int32(0), jnp.int32(0)
    capacity, b, last = slot_table.width, slots.b, jnp.maximum(rule.end - 1, 0)
    tile = min(TILE, pl.next_power_of_2(max(capacity, 32)))
    if (keys.written or marks.written) and not slots.interpret:  # the interpreter runs one thread, and knows no barrier
        plt.debug_barrier()

    def selected(token, own):
        marked = marks.ref[b, jnp.maximum(own, 0)] >= rule.since
        return (own == 0) | (own == rule.key) | marked | (token < rule.below) | (token >= rule.start)

    def extend(count, rows, chosen):  # what is not chosen goes to the last column, so that no store needs a mask
        chosen = (chosen & (rows != ELSEWHERE)).astype(jnp.int32)
        place = count + jnp.cumsum(chosen) - 1
        slots.ref[b, jnp.where(chosen != 0, place, capacity)] = rows
        return count + jnp.sum(chosen)

    def tokens_of(index):
        return rule.first + index * tile + jnp.arange(tile, dtype=jnp.int32)

    def keys_and_rows(index):
        token = jnp.minimum(tokens_of(index), last)
        return keys.ref[b, token], slot_table.ref[b, token]

    def listed_by_rule(index, carry):
        (count, own, rows), ahead, token = carry, keys_and_rows(index + 1), tokens_of(index)
        return extend(count, rows, (token < rule.end - 1) & selected(token, own)), *ahead

    def listed(index, count):
        place = index * tile + jnp.arange(tile, dtype=jnp.int32)
        token = entries.ref[b, jnp.clip(place, 0, jnp.maximum(rule.num_entries - 1, 0))]
        chosen = (place < rule.num_entries) & (token < rule.end - 1) & ~selected(token, keys.ref[b, token])
        return extend(count, slot_table.ref[b, token], chosen)

    active, newest = rule.first < rule.end, slot_table.ref[b, last]
    tiles = jnp.maximum(pl.cdiv(rule.end - 1 - rule.first, tile), 0)
    count, *_ = jax.lax.fori_loop(0, tiles, listed_by_rule, (kept, *keys_and_rows(0)))
    appended = active & (newest != ELSEWHERE)
    slots.ref[b, jnp.where(appended, jnp.minimum(count, capacity), capacity)] = newest
    span = count + appended.astype(jnp.int32)
    count = span
    if entries is not None:
        tiles = jnp.where(active, pl.cdiv(rule.num_entries, tile), 0)
        count = jax.lax.fori_loop(0, tiles, listed, count)
    return slots, jnp.where(active, count, 0), jnp.where(active, span * rule.keep, kept)
