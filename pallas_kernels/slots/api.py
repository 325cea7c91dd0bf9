"""The public functions: validate, choose an implementation, launch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import choose_implementation, device_reason, require
from pallas_kernels.jax_triton import launch
from pallas_kernels.slots.reference import xla_read, xla_update, xla_write
from pallas_kernels.slots.triton import Row, largest_of_row, read_row, triton_per_sequence, update_row, write_rows

IMPLEMENTATIONS = ("xla", "triton", "jax_triton")


class Rule(NamedTuple):
    """Which tokens of a sequence its newest one attends to, and which of them are to be listed. Every field is int32 `[B]`.

    Of the tokens t before `end` these, and the newest in any case:

        keys[t] == 0  or  keys[t] == key  or  marks[keys[t]] >= since  or  t < below  or  t >= start
    """

    end: jax.Array  # tokens of the sequence, the newest included
    first: jax.Array  # tokens before this one are listed already; `end` leaves a sequence as it is
    key: jax.Array
    since: jax.Array
    below: jax.Array
    start: jax.Array
    num_entries: jax.Array  # so many of `entries` are attended to as well
    keep: jax.Array  # 1 where the next token goes on from the slots by keys, 0 where it begins anew


def per_sequence(function: Callable, state: Any, *others: Any, implementation: str | None = None, interpret: bool = False) -> Any:
    """Compute `function(state, *others)`, which treats each of B sequences by itself, in one launch.

    Args:
      function: returns the state afterwards, and results. It does what NumPy does elementwise with arrays `[B]`, and passes arrays `[B, X]`
        to `read_elements`, `read_largest`, `write_elements` and `update_slots` only. A kernel calls it with one sequence's numbers in
        place of `[B]`.
      state: a pytree of these arrays, int32 or, if `[B]`, bool; it may be updated in place.
      others: pytrees of what it reads only; a number for all sequences `[]` too, and float32 `[B, X]`.
      implementation, interpret: as `pallas_kernels` says.
    """
    for leaf in jax.tree.leaves((state, others)):
        dtypes = (jnp.int32, jnp.float32) if leaf.ndim == 2 else (jnp.int32, jnp.bool_)
        require(leaf.ndim <= 2 and leaf.dtype in dtypes, "expected int32 or float32 [B, X], or int32 or bool [B]", leaf)
    chosen = choose_implementation(implementation, ("triton", "xla"), lambda name: unsupported_reason(name, interpret=interpret))
    if chosen == "xla":
        return function(state, *others)
    return launch(chosen, lambda state, *others: triton_per_sequence(function, state, others, interpret), state, *others)


def read_elements(array: jax.Array, columns: jax.Array) -> jax.Array:
    """Read one element of each row, `array[b, columns[b]]`; a column outside reads the nearest one.

    Args:
      array: int32 `[B, X]`.
      columns: int32 `[B]`.
    """
    if isinstance(array, Row):
        return read_row(array, columns)
    return xla_read(array, columns)


def read_largest(array: jax.Array) -> jax.Array:
    """Return the column of the largest element of each row, float32 `[B, X]`: int32 `[B]`, the first of several."""
    return largest_of_row(array) if isinstance(array, Row) else jnp.argmax(array, axis=1).astype(jnp.int32)


def write_elements(arrays: Sequence[jax.Array], columns: Sequence[jax.Array], values: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Write one element into each row of several arrays: `arrays[i][b, columns[i][b]] = values[i][b]`.

    Args:
      arrays: int32 `[B, X]`, each of its own X.
      columns, values: int32 `[B]`, one for each array. A column outside writes nothing.
    """
    if isinstance(arrays[0], Row):
        return write_rows(arrays, columns, values)
    for array, column, value in zip(arrays, columns, values, strict=True):
        fits = array.ndim == 2 and column.shape == value.shape == array.shape[:1]
        require(
            fits and array.dtype == column.dtype == value.dtype == jnp.int32, "expected int32 [B, X], [B] and [B]", array, column, value
        )
    return xla_write(arrays, columns, values)


def update_slots(
    slots: jax.Array, kept: jax.Array, slot_table: jax.Array, keys: jax.Array, marks: jax.Array, entries: jax.Array | None, rule: Rule
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """List the pool rows that the newest token of every sequence attends to, going on from those that are kept.

    Args:
      slots: int32 `[B, A + 1]`; `slots[b, :kept[b]]` stay. What stands beyond is arbitrary, and the last column is never in use.
      kept: int32 `[B]`; 0 to make slots anew.
      slot_table: int32 `[B, A]`, the pool row of each token; a token where it is `ELSEWHERE` is never listed.
      keys: int32 `[B, A]`, of each token, below L.
      marks: int32 `[B, L]`, of each key.
      entries: int32 `[B, C]`, indices of tokens, or None: after those that the rule selects come the first `rule.num_entries[b]` of these
        that it does not.
      rule: which tokens. From `rule.first[b]` on they are listed, in order.

    Returns:
      `slots`; how many are in use, 0 in sequences that are left as they are; and `kept` for the next update: how many of them the rule
      selected.
    """
    if isinstance(slots, Row):
        return update_row(slots, kept, slot_table, keys, marks, entries, rule)  # type: ignore[arg-type]  # rows as slots is
    batch, capacity = slot_table.shape
    wanted = {"slots": (slots, (batch, capacity + 1)), "kept": (kept, (batch,)), "slot_table": (slot_table, (batch, capacity))}
    wanted |= {"keys": (keys, (batch, capacity)), "marks": (marks, (batch, marks.shape[-1]))}
    wanted |= {} if entries is None else {"entries": (entries, (batch, entries.shape[-1]))}
    for name, (array, shape) in {**wanted, **{name: (field, (batch,)) for name, field in rule._asdict().items()}}.items():
        fits = array.shape == shape and array.dtype == jnp.int32
        require(fits, f"{name} must be int32{list(shape)} beside a slot_table {list(slot_table.shape)}", array)
    return xla_update(slots, kept, slot_table, keys, marks, entries, rule)


def unsupported_reason(implementation: str, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot run on the default device; None when it can."""
    return device_reason(implementation, IMPLEMENTATIONS, interpret)
