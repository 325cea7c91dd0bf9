"""Lists of pool rows kept up to date on the device: one list per sequence, rebuilt or extended by one.

    rebuild[b]:  rows[b] = the table[b, t] with visible[b, t], in order of t;  counts[b] = how many
    append[b]:   rows[b, counts[b]] = own[b];  counts[b] += 1
    neither:     as it was

Why it exists: which sequences rebuild is known on the device only. A conditional of XLA asks the host,
once per decode step; a plain compaction (cumulative sum and scatter) does the work for all sequences
in every step. Here each sequence has a program that does what its own flags say, in place.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import device_reason

TILE = 1024  # table entries that a program compacts at once


def update_row_lists(
    rows: jax.Array,
    counts: jax.Array,
    visible: jax.Array,
    table: jax.Array,
    own: jax.Array,
    rebuild: jax.Array,
    append: jax.Array,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The lists after one step.

    Args:
      rows: int32 `[B, A + 1]`; `rows[b, :counts[b]]` is the list. What stands beyond is arbitrary,
        and the last column is never part of it.
      counts: int32 `[B]`.
      visible: bool `[B, A]`, which table entries a rebuilt list holds.
      table: int32 `[B, A]`.
      own: int32 `[B]`, the row to append. Appended to a list of A rows it is lost.
      rebuild, append: bool `[B]`, never both.
      implementation: None for "triton" on CUDA devices and "xla" elsewhere.
      interpret: run the Pallas kernel in its interpreter.

    Returns:
      `rows` and `counts`, updated; the arrays given may be updated in place.

    Raises:
      ValueError: the arguments do not fit together.
      NotImplementedError: "triton" without a CUDA device.
    """
    batch, capacity = table.shape
    if rows.shape != (batch, capacity + 1) or visible.shape != table.shape:
        raise ValueError(f"rows must be [B, A + 1] and visible [B, A] for a table {list(table.shape)}, got {rows.shape}, {visible.shape}")
    if any(x.shape != (batch,) for x in (counts, own, rebuild, append)):
        raise ValueError(f"counts, own, rebuild and append must be [{batch}]")
    if implementation not in (None, "xla", "triton"):
        raise ValueError(f"unknown implementation {implementation!r}, choose from xla, triton or None")
    reason = None if interpret else device_reason(80)
    if implementation == "triton" and reason:
        raise NotImplementedError(f"implementation='triton': {reason}")
    if implementation == "xla" or (implementation is None and reason):
        return _xla(rows, counts, visible, table, own, rebuild, append)
    return _triton(rows, counts, visible, table, own, rebuild, append, interpret)


def _xla(rows, counts, visible, table, own, rebuild, append):
    batch, capacity = table.shape
    sequence = jnp.arange(batch, dtype=jnp.int32)
    target = jnp.where(append, jnp.minimum(counts, capacity), capacity)
    rows = rows.at[sequence, target].set(own)
    counts = counts + append.astype(jnp.int32)

    def compact():
        place = jnp.cumsum(visible, axis=1, dtype=jnp.int32) - 1
        target = jnp.where(visible & rebuild[:, None], place, capacity)
        return rows.at[sequence[:, None], target].set(table), jnp.where(rebuild, place[:, -1] + 1, counts)

    return jax.lax.cond(jnp.any(rebuild), compact, lambda: (rows, counts))


def _kernel(
    _rows,  # the list, which rows_ref is
    _counts,
    visible_ref,  # int32 [B, A], 0 or 1
    table_ref,  # int32 [B, A]
    own_ref,  # int32 [B]
    rebuild_ref,  # int32 [B]
    append_ref,  # int32 [B]
    rows_ref,  # int32 [B, A + 1]
    counts_ref,  # int32 [B]
    *,
    tile: int,
):
    capacity = table_ref.shape[1]
    b = pl.program_id(0)

    @pl.when(append_ref[b] != 0)
    def extend():
        count = counts_ref[b]
        rows_ref[b, jnp.minimum(count, capacity)] = own_ref[b]
        counts_ref[b] = count + 1

    @pl.when(rebuild_ref[b] != 0)
    def compact():
        lanes = jnp.arange(tile, dtype=jnp.int32)

        def step(index, count):
            token = index * tile + lanes
            at = jnp.minimum(token, capacity - 1)
            seen = jnp.where(token < capacity, visible_ref[b, at], 0)
            place = count + jnp.cumsum(seen) - 1
            # What is not in the list goes to the last column, so that no store needs a mask.
            rows_ref[b, jnp.where(seen != 0, place, capacity)] = table_ref[b, at]
            return count + jnp.sum(seen)

        counts_ref[b] = jax.lax.fori_loop(0, pl.cdiv(capacity, tile), step, jnp.int32(0))


def _triton(rows, counts, visible, table, own, rebuild, append, interpret):
    tile = min(TILE, pl.next_power_of_2(max(table.shape[1], 32)))
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile),
        grid=(table.shape[0],),
        out_shape=(jax.ShapeDtypeStruct(rows.shape, rows.dtype), jax.ShapeDtypeStruct(counts.shape, counts.dtype)),
        input_output_aliases={0: 0, 1: 1},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="update_row_lists",
    )(rows, counts, visible.astype(jnp.int32), table, own, rebuild.astype(jnp.int32), append.astype(jnp.int32))
