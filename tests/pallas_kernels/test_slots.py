"""Row lists against plain Python lists, over many steps of random flags."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import update_row_lists
from pallas_kernels.slots.api import TILE, _triton
from tests.pallas_kernels.lowering import cuda_lowering

KERNELS = [("xla", False), ("triton", True), pytest.param("triton", False, marks=pytest.mark.gpu, id="triton-gpu")]

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

# name -> (B, A), why
SHAPES = {
    "one entry": (2, 1),
    "less than a warp": (3, 7),
    "one tile": (2, TILE),
    "a tile and one": (2, TILE + 1),
    "several tiles": (5, 2 * TILE + 300),
}


@pytest.mark.parametrize(("implementation", "interpret"), KERNELS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lists_over_many_steps(shape, implementation, interpret):
    """Sequences rebuild, append and rest independently of each other; a list holds exactly what it should, in order."""
    batch, capacity = shape
    rng = np.random.default_rng(capacity)
    table = rng.permutation(batch * capacity).reshape(shape).astype(np.int32)
    rows, counts = jnp.full((batch, capacity + 1), -7, jnp.int32), jnp.zeros(batch, jnp.int32)
    expected = [[] for _ in range(batch)]
    update = jax.jit(functools.partial(update_row_lists, implementation=implementation, interpret=interpret))
    for step, density in enumerate((0.0, 0.1, 0.5, 1.0, 0.03, 0.9)):
        visible = rng.random(shape) < density
        own = rng.integers(0, 10**6, batch).astype(np.int32)
        action = (np.arange(batch) + step) % 3  # 0 rests, 1 appends, 2 rebuilds
        for b in range(batch):
            if action[b] == 1 and len(expected[b]) < capacity:
                expected[b].append(own[b])
            elif action[b] == 1:
                action[b] = 0
            elif action[b] == 2:
                expected[b] = list(table[b][visible[b]])
        rows, counts = update(rows, counts, *map(jnp.asarray, (visible, table, own, action == 2, action == 1)))
        for b, wanted in enumerate(expected):
            assert counts[b] == len(wanted)
            np.testing.assert_array_equal(np.asarray(rows)[b, : len(wanted)], wanted)


def test_the_kernel_lowers_for_cuda():
    b, ba = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((4, 3000), jnp.int32)
    rows, visible = jax.ShapeDtypeStruct((4, 3001), jnp.int32), jax.ShapeDtypeStruct((4, 3000), bool)
    flags = jax.ShapeDtypeStruct((4,), bool)
    update = functools.partial(_triton, interpret=False)
    assert "__gpu$xla.gpu.triton" in cuda_lowering(update, rows, b, visible, ba, b, flags, flags)


def test_what_does_not_fit_is_refused():
    b, flags, table = jnp.zeros(2, jnp.int32), jnp.zeros(2, bool), jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ValueError, match="rows must be"):
        update_row_lists(table, b, table > 0, table, b, flags, flags)
    rows = jnp.zeros((2, 6), jnp.int32)
    with pytest.raises(ValueError, match=r"must be \[2\]"):
        update_row_lists(rows, b[:1], table > 0, table, b, flags, flags)
    with pytest.raises(ValueError, match="unknown implementation"):
        update_row_lists(rows, b, table > 0, table, b, flags, flags, implementation="cuda")
