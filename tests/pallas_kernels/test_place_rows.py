"""Which rows of a working set are given to whom, against a simulation in plain Python, over many steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Wanted, place_rows
from pallas_kernels.place_rows import triton
from pallas_kernels.place_rows.triton import triton_place_rows
from tests.pallas_kernels.budget import JAX_TRITON
from tests.pallas_kernels.lowering import cuda_lowering

BATCH, CAPACITY, LABELS = 5, 70, 9
RUNS = [("xla", False, 25), ("triton", True, 12), pytest.param("triton", False, 25, marks=pytest.mark.gpu)]
RUNS += [pytest.param("jax_triton", False, 25, marks=JAX_TRITON)]


def simulate(table, owner, keys, marks, wanted, pinned, host_rows, most, turn):
    """The slot table and owners afterwards, of each sequence the pairs of rows that are copied, and how many are left for later."""
    table, owner = table.copy(), owner.copy()
    copies, later, width = [[] for _ in range(BATCH)], [0] * BATCH, owner.shape[1]
    for b in sorted(range(BATCH), key=lambda b: turn[b]):

        def in_use(token, b=b):
            return keys[b, token] in (0, wanted.key[b], wanted.named[b]) or marks[b, max(keys[b, token], 0)] >= wanted.since[b]

        missing = [t for t in range(wanted.end[b]) if table[b, t] < 0 and in_use(t)] if wanted.place[b] else []
        free = [row for row in range(pinned[b], width) if owner[b, row] < 0 or not in_use(owner[b, row])]
        free.sort(key=lambda row, b=b: (-2 if owner[b, row] < 0 else marks[b, max(keys[b, owner[b, row]], 0)], row))
        now = min(len(missing), len(free), most - sum(map(len, copies)))
        later[b] = min(len(missing), len(free)) - now
        for token, row in zip(missing, sorted(free[:now])):
            if (left := owner[b, row]) >= 0:
                table[b, left] = -1 - host_rows[b, left]
            table[b, token], owner[b, row] = b * width + row, token
            copies[b].append((host_rows[b, token], b * width + row))
    return table, owner, copies, later


@pytest.mark.parametrize("implementation, interpret, steps", RUNS)
@pytest.mark.parametrize("width", [1, 6, 20, CAPACITY])
def test_the_least_recently_named_give_their_rows(width, implementation, interpret, steps, monkeypatch):
    monkeypatch.setattr(triton, "TILE", 32)  # several for the tokens, and for the rows of the last width, which are not held
    monkeypatch.setattr(triton, "MAX_HELD_ROWS", 32)
    rng = np.random.default_rng(width)
    host_rows = rng.permutation(BATCH * CAPACITY).reshape(BATCH, CAPACITY).astype(np.int32)
    table = -1 - host_rows
    owner, marks = np.full((BATCH, width), -1, np.int32), np.full((BATCH, LABELS), -1, np.int32)
    keys = rng.integers(0, LABELS, (BATCH, CAPACITY)).astype(np.int32)
    pinned = rng.integers(0, min(width, 5) + 1, BATCH).astype(np.int32)
    place = jax.jit(functools.partial(place_rows, implementation=implementation, interpret=interpret))
    moved = put_off = 0
    for step in range(steps):
        marks[np.arange(BATCH), rng.integers(0, LABELS, BATCH)] = step
        sizes = rng.integers(0, 4, BATCH), rng.integers(0, CAPACITY + 1, BATCH), rng.integers(0, LABELS, BATCH)
        sizes = *sizes, rng.integers(-1, LABELS, BATCH)
        wanted = Wanted(*(x.astype(np.int32) for x in (*sizes, step - rng.integers(0, 3, BATCH))))
        limit = np.int32(rng.integers(0, width) if step % 2 else 2**31 - 1), rng.integers(-1, 3, BATCH).astype(np.int32)
        found = place(*map(jnp.asarray, (table, owner, keys, marks)), wanted, pinned, host_rows, *map(jnp.asarray, limit))
        table, owner, copies, later = simulate(table, owner, keys, marks, wanted, pinned, host_rows, *limit)
        np.testing.assert_array_equal(found.slot_table, table)
        np.testing.assert_array_equal(found.owner, owner)
        pairs = np.stack([found.sources, found.targets], axis=2)
        assert [list(map(tuple, pairs[b, :count])) for b, count in enumerate(np.asarray(found.counts))] == copies
        np.testing.assert_array_equal(found.left, later)
        moved, put_off = moved + sum(map(len, copies)), put_off + sum(later)
    assert moved and put_off


def test_shapes_that_do_not_fit_are_refused():
    row, table = jnp.zeros(2, jnp.int32), jnp.zeros((2, 8), jnp.int32)
    with pytest.raises(ValueError, match=r"pinned must be int32\[2\]"):
        place_rows(table, table, table, table, Wanted(row, row, row, row, row), row[:1], table)
    with pytest.raises(ValueError, match=r"expected most int32 \[\] and turn int32 \[B\]"):
        place_rows(table, table, table, table, Wanted(row, row, row, row, row), row, table, row)


def test_the_kernel_lowers_for_cuda():
    row, table = jnp.zeros(4, jnp.int32), jnp.zeros((4, 9000), jnp.int32)
    assert "place_rows" in cuda_lowering(triton_place_rows, table, table[:, :4096], table, table[:, :512], *[row] * 6, table, row[0], row)
