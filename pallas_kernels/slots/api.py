"""The public function: validate, choose an implementation, launch."""

import jax
import jax.numpy as jnp

from pallas_kernels.common import choose_implementation, device_reason, require
from pallas_kernels.slots.reference import xla_update
from pallas_kernels.slots.triton import triton_update

IMPLEMENTATIONS = ("xla", "triton")


def update_slots(
    slots: jax.Array,
    counts: jax.Array,
    visible: jax.Array,
    slot_table: jax.Array,
    own: jax.Array,
    extend: jax.Array,
    append: jax.Array,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Update the slots of every sequence: extend them by what is visible of a table, append one, or leave them.

    Args:
      slots: int32 `[B, A + 1]`; `slots[b, :counts[b]]` are in use. What stands beyond is arbitrary, and the last column
        is never in use.
      counts: int32 `[B]`; 0 to make slots anew.
      visible: bool `[B, A]`, the entries of the table that an extended sequence gets, in order.
      slot_table: int32 `[B, A]`, the pool row of each token.
      own: int32 `[B]`, the slot to append. Appended to a sequence with A slots it is lost.
      extend, append: bool `[B]`, never both.
      implementation, interpret: as `pallas_kernels` says.

    Returns:
      `slots` and `counts`, updated; the arrays given may be updated in place.
    """
    arrays = (slots, counts, visible, slot_table, own, extend, append)
    _validate(*arrays)
    chosen = choose_implementation(implementation, ("triton", "xla"), lambda name: unsupported_reason(name, interpret=interpret))
    return xla_update(*arrays) if chosen == "xla" else triton_update(*arrays, interpret=interpret)


def unsupported_reason(implementation: str, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot run on the default device; None when it can."""
    return device_reason(implementation, IMPLEMENTATIONS, interpret)


def _validate(slots, counts, visible, slot_table, own, extend, append) -> None:
    require(slot_table.ndim == 2 and slot_table.dtype == jnp.int32, "slot_table must be int32 [B, A]", slot_table)
    batch, capacity = slot_table.shape
    for name, array, shape, dtype in (
        ("slots", slots, (batch, capacity + 1), jnp.int32),
        ("visible", visible, (batch, capacity), jnp.bool_),
        ("counts", counts, (batch,), jnp.int32),
        ("own", own, (batch,), jnp.int32),
        ("extend", extend, (batch,), jnp.bool_),
        ("append", append, (batch,), jnp.bool_),
    ):
        wanted = f"{name} must be {jnp.dtype(dtype)}{list(shape)} beside a slot_table {list(slot_table.shape)}"
        require(array.shape == shape and array.dtype == dtype, wanted, array)
