"""Slots against plain Python lists, over many steps of random flags."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import update_slots
from pallas_kernels.slots.triton import TILE, triton_update
from tests.pallas_kernels.budget import program
from tests.pallas_kernels.lowering import cuda_lowering

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

# name -> (B, A), why
SHAPES = {
    "one entry": (2, 1),
    "less than a warp": (3, 7),
    "one tile": (2, TILE),
    "a tile and one": (2, TILE + 1),
    "several tiles": (5, 2 * TILE + 300),
}


# XLA has no tiles, so that few shapes are enough.
RUNS = [(name, "xla", False) for name in ("one entry", "a tile and one")] + [(name, "triton", True) for name in SHAPES]
RUNS += [pytest.param(name, "triton", False, marks=pytest.mark.gpu) for name in SHAPES]


@pytest.mark.parametrize(("name", "implementation", "interpret"), RUNS)
def test_slots_over_many_steps(name, implementation, interpret):
    """Sequences begin anew, are extended, append and rest independently of each other; each has the slots that it should, in order."""
    shape = SHAPES[name]
    batch, capacity = shape
    rng = np.random.default_rng(capacity)
    table = rng.permutation(batch * capacity).reshape(shape).astype(np.int32)
    slots, counts = jnp.full((batch, capacity + 1), -7, jnp.int32), jnp.zeros(batch, jnp.int32)
    expected = [[] for _ in range(batch)]
    update = program(functools.partial(update_slots, implementation=implementation, interpret=interpret), interpret)
    for step, density in enumerate((0.0, 0.1, 0.5, 1.0, 0.03, 0.9)):
        visible = rng.random(shape) < density
        own = rng.integers(0, 10**6, batch).astype(np.int32)
        action = (np.arange(batch) + step) % 4  # 0 rests, 1 appends, 2 is made anew, 3 is extended
        for b in range(batch):
            room = capacity - len(expected[b])
            if action[b] == 1 and room:
                expected[b].append(own[b])
            elif action[b] == 1:
                action[b] = 0
            elif action[b] == 2:
                expected[b] = list(table[b][visible[b]])
            elif action[b] == 3:
                visible[b] &= np.cumsum(visible[b]) <= room
                expected[b] += list(table[b][visible[b]])
        counts = jnp.where(jnp.asarray(action == 2), 0, counts)
        slots, counts = update(slots, counts, *map(jnp.asarray, (visible, table, own, action >= 2, action == 1)))
        for b, wanted in enumerate(expected):
            assert counts[b] == len(wanted)
            np.testing.assert_array_equal(np.asarray(slots)[b, : len(wanted)], wanted)


def test_the_kernel_lowers_for_cuda():
    b, ba = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((4, 3000), jnp.int32)
    slots, visible = jax.ShapeDtypeStruct((4, 3001), jnp.int32), jax.ShapeDtypeStruct((4, 3000), bool)
    flags = jax.ShapeDtypeStruct((4,), bool)
    assert "__gpu$xla.gpu.triton" in cuda_lowering(triton_update, slots, b, visible, ba, b, flags, flags)


def test_what_does_not_fit_is_refused():
    b, flags, table = jnp.zeros(2, jnp.int32), jnp.zeros(2, bool), jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ValueError, match=r"slots must be int32\[2, 6\]"):
        update_slots(table, b, table > 0, table, b, flags, flags)
    slots = jnp.zeros((2, 6), jnp.int32)
    with pytest.raises(ValueError, match=r"counts must be int32\[2\]"):
        update_slots(slots, b[:1], table > 0, table, b, flags, flags)
    with pytest.raises(ValueError, match="unknown implementation"):
        update_slots(slots, b, table > 0, table, b, flags, flags, implementation="cuda")
