"""The public function: validate, choose an implementation, launch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import PLAIN, choose_implementation, device_reason, require
from pallas_kernels.jax_triton import launch
from pallas_kernels.place_rows.reference import xla_place_rows
from pallas_kernels.place_rows.triton import triton_place_rows

IMPLEMENTATIONS = ("xla", "triton", "jax_triton")


class Wanted(NamedTuple):
    """Which tokens of each sequence are in use. Every field is int32 `[B]`.

    keys[t] == 0  or  keys[t] == key  or  keys[t] == named  or  marks[keys[t]] >= since,   t < end
    """

    place: jax.Array  # 0 leaves a sequence as it is
    end: jax.Array
    key: jax.Array
    named: jax.Array  # another key, -1 for none
    since: jax.Array


class Placement(NamedTuple):
    """What `place_rows` returns."""

    slot_table: jax.Array  # int32 [B, A]
    owner: jax.Array  # int32 [B, W]
    sources: jax.Array  # int32 [B, W], rows of the host pool that are to be copied
    targets: jax.Array  # int32 [B, W], rows of the device's pool that they are to be copied to
    counts: jax.Array  # int32 [B], how many; what stands beyond is arbitrary
    left: jax.Array  # int32 [B], how many more would have been given without `most`


def place_rows(
    slot_table: jax.Array,
    owner: jax.Array,
    keys: jax.Array,
    marks: jax.Array,
    wanted: Wanted,
    pinned: jax.Array,
    host_rows: jax.Array,
    most: jax.Array | None = None,
    turn: jax.Array | None = None,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> Placement:
    """Give rows of a working set to tokens that are in use and have none.

    Sequence b has the rows `b * W ... (b + 1) * W - 1` of the device's pool, and its token t lies in row `host_rows[b, t]` of the host's.
    Rows are taken from tokens that are not in use: first rows that nobody has, then those of the lowest `marks` (the least recently named
    label), of equal ones the first. Where there are too few, the last tokens in use get none.

    Args:
      slot_table: int32 `[B, A]`: the device's row of each token, or -1 - r for row r of the host's pool.
      owner: int32 `[B, W]`: the token whose row this is, -1 for none.
      keys: int32 `[B, A]`, of each token, below L.
      marks: int32 `[B, L]`, of each key, from -1 to A - 1: when it was last in use.
      wanted: which tokens are in use.
      pinned: int32 `[B]`: so many first rows are never taken.
      host_rows: int32 `[B, A]`; what stands there for tokens that are not in host memory is arbitrary.
      most: int32 `[]`: so many rows are given in all at most; None for no limit. With it
      turn: int32 `[B]`: sequences of lower numbers get theirs first, of equal ones the first.
      implementation, interpret: as `pallas_kernels` says.
    """
    batch, capacity = slot_table.shape
    shapes: dict[str, tuple[jax.Array, tuple[int, ...]]]
    shapes = {"slot_table": (slot_table, (batch, capacity)), "owner": (owner, (batch, owner.shape[-1])), "keys": (keys, (batch, capacity))}
    shapes |= {"marks": (marks, (batch, marks.shape[-1])), "pinned": (pinned, (batch,)), "host_rows": (host_rows, (batch, capacity))}
    for name, (array, shape) in (shapes | {name: (field, (batch,)) for name, field in wanted._asdict().items()}).items():
        fits = array.shape == shape and array.dtype == jnp.int32
        require(fits, f"{name} must be int32{list(shape)} beside a slot_table {list(slot_table.shape)}", array)
    if most is not None:
        fits = most.shape == () and turn is not None and turn.shape == (batch,) and most.dtype == turn.dtype == jnp.int32
        require(fits, "expected most int32 [] and turn int32 [B]", most, turn)
    chosen = choose_implementation(implementation, ("triton", "xla"), lambda name: unsupported_reason(name, interpret=interpret))
    arrays = slot_table, owner, keys, marks, *wanted, pinned, host_rows, most, turn
    kernel = functools.partial(triton_place_rows, interpret=interpret)
    return Placement(*(xla_place_rows(*arrays) if chosen == "xla" else launch(chosen, kernel, *arrays)))


def unsupported_reason(implementation: str, *, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot run on the default device; None when it can."""
    reason = device_reason(implementation, IMPLEMENTATIONS, interpret)
    return reason if reason or implementation in PLAIN else None
