"""Copies of rows bit by bit, against a loop in numpy; and that the host's pools stay where they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import copy_rows
from pallas_kernels.copy_rows.triton import triton_copy_rows
from tests.pallas_kernels.lowering import cuda_lowering

SOURCES = np.array([[3, 0, 7, 7, 49, 50, -1], [1, 2, 3, 4, 5, 6, 8], [9, 9, 9, 9, 9, 9, 9]], np.int32)  # of 50 rows
TARGETS = np.array([[4, 29, 0, 11, 30, 5, 6], [1, 2, 3, 7, 8, 9, 10], [12, 13, -1, 14, 15, 16, 17]], np.int32)  # of 30
COUNTS = np.array([7, 0, 4], np.int32)
RUNS = [("xla", False), ("triton", True), pytest.param("triton", False, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("implementation, interpret", RUNS)
@pytest.mark.parametrize("num_heads, head_size", [(8, 128), (3, 64)], ids=["whole rows", "heads that are no power of two"])
def test_rows_are_copied(num_heads, head_size, implementation, interpret):
    rng = np.random.default_rng(0)
    host, pools = ([rng.normal(size=(rows, num_heads, head_size)).astype(np.float32) for _ in range(2)] for rows in (50, 30))
    expected = [pool.copy() for pool in pools]
    for b, count in enumerate(COUNTS):
        for source, target in zip(SOURCES[b, :count], TARGETS[b, :count]):
            if 0 <= source < 50 and 0 <= target < 30:
                for pool, rows in zip(expected, host):
                    pool[target] = rows[source]
    pinned = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    copy = jax.jit(functools.partial(copy_rows, implementation=implementation, interpret=interpret))
    found = copy(tuple(jax.device_put(host, pinned)), tuple(map(jnp.asarray, pools)), SOURCES, TARGETS, COUNTS)
    assert all(map(np.array_equal, found, expected)) and not np.array_equal(expected[0], pools[0])
    assert {pool.sharding.memory_kind for pool in found} == {"device"}


def test_what_does_not_fit_together_is_refused():
    pool = jnp.zeros((4, 2, 8))
    for host, lists in (((pool, pool), SOURCES), ((pool.astype(jnp.bfloat16),), SOURCES), ((pool,), SOURCES[:, :3])):
        with pytest.raises(ValueError, match="expected"):
            copy_rows(host, (pool,), jnp.asarray(lists), jnp.asarray(TARGETS), jnp.asarray(COUNTS))


def test_the_kernel_lowers_for_cuda():
    host, pools = ([jnp.zeros((rows, 8, 128), jnp.bfloat16)] * 2 for rows in (50, 30))
    assert "copy_rows" in cuda_lowering(triton_copy_rows, host, pools, SOURCES, TARGETS, COUNTS)
