"""The public function: validate, choose an implementation, launch."""

import jax
import jax.numpy as jnp

from pallas_kernels.common import check_known, choose_implementation, device_reason
from pallas_kernels.slots.reference import xla_update
from pallas_kernels.slots.triton import triton_update

IMPLEMENTATIONS = ("xla", "triton")


def update_slots(
    slots: jax.Array,
    counts: jax.Array,
    visible: jax.Array,
    slot_table: jax.Array,
    own: jax.Array,
    rebuild: jax.Array,
    append: jax.Array,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Update the slots of every sequence after one step: rebuild them, append one, or leave them.

    Args:
      slots: int32 `[B, A + 1]`; `slots[b, :counts[b]]` are in use. What stands beyond is arbitrary, and the last column
        is never in use.
      counts: int32 `[B]`.
      visible: bool `[B, A]`, the entries of the table that a rebuilt sequence keeps, in order.
      slot_table: int32 `[B, A]`, the pool row of each token.
      own: int32 `[B]`, the slot to append. Appended to a sequence with A slots it is lost.
      rebuild, append: bool `[B]`, never both.
      implementation: None for the best one that the default device supports, or one of `IMPLEMENTATIONS`.
      interpret: run the Pallas implementation in its interpreter (tests on machines without a GPU).

    Returns:
      `slots` and `counts`, updated; the arrays given may be updated in place.

    Raises:
      ValueError: the arguments do not fit together.
      NotImplementedError: the named implementation cannot do this.
    """
    _validate(slots, counts, visible, slot_table, own, rebuild, append)
    chosen = choose_implementation(
        implementation, IMPLEMENTATIONS, lambda name: unsupported_reason(name, interpret=interpret), preferred=("triton", "xla")
    )
    if chosen == "xla":
        return xla_update(slots, counts, visible, slot_table, own, rebuild, append)
    return triton_update(slots, counts, visible, slot_table, own, rebuild, append, interpret=interpret)


def unsupported_reason(implementation: str, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot run on the default device; None when it can."""
    check_known(implementation, IMPLEMENTATIONS)
    return None if implementation == "xla" or interpret else device_reason(80)


def _validate(slots, counts, visible, slot_table, own, rebuild, append) -> None:
    if slot_table.ndim != 2 or slot_table.dtype != jnp.int32:
        raise ValueError(f"slot_table must be int32 [B, A], got {slot_table.dtype}{list(slot_table.shape)}")
    batch, capacity = slot_table.shape
    for name, array, shape, dtype in (
        ("slots", slots, (batch, capacity + 1), jnp.int32),
        ("visible", visible, (batch, capacity), jnp.bool_),
        ("counts", counts, (batch,), jnp.int32),
        ("own", own, (batch,), jnp.int32),
        ("rebuild", rebuild, (batch,), jnp.bool_),
        ("append", append, (batch,), jnp.bool_),
    ):
        if array.shape != shape or array.dtype != dtype:
            wanted = f"{jnp.dtype(dtype)}{list(shape)} beside a slot_table {list(slot_table.shape)}"
            raise ValueError(f"{name} must be {wanted}, got {array.dtype}{list(array.shape)}")
