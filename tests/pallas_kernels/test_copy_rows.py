"""Copies of rows bit by bit, alone and beside a product, against a loop in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import SHARES, Copies, HostRows, copies_beside, copy_rows, fused_linear, rotate_and_attend
from pallas_kernels.copy_rows.triton import triton_copy_rows
from pallas_kernels.linear import triton
from pallas_kernels.linear.heuristics import LinearConfig, linear_config
from pallas_kernels.span_decode import triton as span_decode
from pallas_kernels.span_decode.heuristics import triton_config
from tests.pallas_kernels.budget import INTERPRET, JAX_TRITON
from tests.pallas_kernels.lowering import cuda_lowering

SOURCES = np.array([[3, 0, 7, 7, 49, 50, -1], [1, 2, 3, 4, 5, 6, 8], [9, 9, 9, 9, 9, 9, 9]], np.int32)  # of 50 rows
TARGETS = np.array([[4, 29, 0, 11, 30, 5, 6], [1, 2, 3, 7, 8, 9, 10], [12, 13, -1, 14, 15, 16, 17]], np.int32)  # of 30
COUNTS = np.array([7, 0, 4], np.int32)
RUNS = [("xla", False), ("triton", True), pytest.param("triton", False, marks=pytest.mark.gpu)]
RUNS += [pytest.param("jax_triton", False, marks=JAX_TRITON)]


def make_pools(num_heads, head_size, memory_kind="pinned_host"):
    """Source pools in a kind of memory, pools, and these as they are to be afterwards."""
    rng = np.random.default_rng(0)
    sources, pools = ([rng.normal(size=(rows, num_heads, head_size)).astype(np.float32) for _ in range(2)] for rows in (50, 30))
    expected = [pool.copy() for pool in pools]
    for b, count in enumerate(COUNTS):
        for source, target in zip(SOURCES[b, :count], TARGETS[b, :count]):
            if 0 <= source < 50 and 0 <= target < 30:
                for pool, rows in zip(expected, sources):
                    pool[target] = rows[source]
    assert not np.array_equal(expected[0], pools[0])
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=memory_kind)
    return tuple(jax.device_put(sources, place)), tuple(map(jnp.asarray, pools)), expected


@pytest.mark.parametrize("implementation, interpret", RUNS)
@pytest.mark.parametrize("num_heads, head_size", [(8, 128), (3, 64)], ids=["whole rows", "heads that are no power of two"])
@pytest.mark.parametrize("memory_kind", ["pinned_host", "device"])
def test_rows_are_copied(memory_kind, num_heads, head_size, implementation, interpret):
    sources, pools, expected = make_pools(num_heads, head_size, memory_kind)
    copy = jax.jit(functools.partial(copy_rows, implementation=implementation, interpret=interpret))
    found = copy(sources, pools, SOURCES, TARGETS, COUNTS)
    assert all(map(np.array_equal, found, expected))
    assert {pool.sharding.memory_kind for pool in found} == {"device"}


@pytest.mark.parametrize("implementation, interpret", RUNS)
def test_shares_that_join_are_all_copies(implementation, interpret):
    sources, pools, expected = make_pools(3, 64)
    copy = jax.jit(functools.partial(copy_rows, implementation=implementation, interpret=interpret))
    for begin, end in ((0, 1), (1, 500), (500, 500), (500, 900), (900, SHARES)):
        assert not all(map(np.array_equal, pools, expected))
        pools = copy(sources, pools, SOURCES, TARGETS, COUNTS, np.array([begin, end], np.int32))
    assert all(map(np.array_equal, pools, expected))


@pytest.mark.parametrize("gated", [True, False], ids=["gated, scaled rows", "plain"])
@pytest.mark.parametrize("interpret", INTERPRET)
def test_rows_are_copied_beside_a_product(interpret, gated, monkeypatch):
    """The product is what it is without copies, to the bit, and the rows are there."""
    monkeypatch.setattr(triton, "BESIDE_PROGRAMS", 3)
    rng = np.random.default_rng(1)
    x, weight, norm = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((5, 64), (96, 64), (48,)))
    options = {"norm_eps": 1e-5, "gated": gated, "out_dtype": x.dtype, "interpret": interpret, "config": LinearConfig(8, 1, 32, 1, 2, 4)}
    linear = jax.jit(functools.partial(triton.triton_linear, **options))
    host, pools, expected = make_pools(3, 64)
    arrays = x, weight, None, None, None, norm if gated else None
    out, found = linear(*arrays, Copies(host, pools, *map(jnp.asarray, (SOURCES, TARGETS, COUNTS))))
    assert all(map(np.array_equal, found, expected))
    jax.tree.map(np.testing.assert_array_equal, out, linear(*arrays))


@pytest.mark.parametrize("interpret", INTERPRET)
def test_rows_are_copied_beside_attention(interpret, monkeypatch):
    """Attention and its pools are what they are without copies, to the bit, and a share of the rows is there, then the rest."""
    monkeypatch.setattr(span_decode, "BESIDE_PROGRAMS", 3)
    rng, batch, num_kv_heads = np.random.default_rng(2), 1, 2
    qkv, cos, sin, *own_pools = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((batch, num_kv_heads, 4, 32), (batch, 16), (batch, 16), *[(64, num_kv_heads, 32)] * 2)
    )
    slots, counts = jnp.asarray(rng.permutation(60)[None, :40].repeat(batch, axis=0), jnp.int32), jnp.full(batch, 40, jnp.int32)
    arrays = qkv, cos, sin, jnp.arange(60, 60 + batch, dtype=jnp.int32), *own_pools, slots, counts
    attend = functools.partial(rotate_and_attend, implementation="triton", interpret=interpret)
    (host, pools, expected), alone = make_pools(3, 64), list(attend(*arrays))
    for begin, end in ((0, 600), (600, SHARES)):
        lists = map(jnp.asarray, (SOURCES, TARGETS, COUNTS, np.array([begin, end], np.int32)))
        *found, pools = attend(*arrays, copies=Copies(host, pools, *lists))
        jax.tree.map(np.testing.assert_array_equal, found, alone)
    assert all(map(np.array_equal, pools, expected))


def test_copies_beside_any_product():
    """Where no kernel of ours multiplies, they are made before it."""
    host, pools, expected = make_pools(3, 64)
    x, weight = jnp.ones((2, 64)), jnp.ones((32, 64))
    out, found = fused_linear(x, weight, copies=Copies(host, pools, *map(jnp.asarray, (SOURCES, TARGETS, COUNTS))))
    assert np.all(out == 64) and all(map(np.array_equal, found, expected))


@pytest.mark.parametrize(
    "outputs, inputs, gated, beside", [(6144, 4096, False, True), (28672, 4096, True, True), (4096, 14336, False, False)]
)
def test_rows_are_copied_where_no_program_waits_for_it(outputs, inputs, gated, beside):
    """Beside maps two programs of which a multiprocessor has room for."""
    x, weight = (jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in ((32, inputs), (outputs, inputs)))
    assert copies_beside(x, weight, gated=gated, implementation="triton", interpret=True) == beside


def test_copies_beside_a_product_of_no_rows():
    """They are made all the same, beside a matrix too whose kernel copies while it multiplies."""
    host, pools, expected = make_pools(3, 64)
    x, weight = jnp.ones((0, 4096), jnp.bfloat16), jnp.zeros((4096, 4096), jnp.bfloat16)
    copies = Copies(host, pools, *map(jnp.asarray, (SOURCES, TARGETS, COUNTS)))
    out, found = fused_linear(x, weight, copies=copies, implementation="triton", interpret=True)
    assert out.shape == (0, 4096) and all(map(np.array_equal, found, expected))


def test_what_does_not_fit_together_is_refused():
    pool = jnp.zeros((4, 2, 8))
    for host, lists in (((pool, pool), SOURCES), ((pool.astype(jnp.bfloat16),), SOURCES), ((pool,), SOURCES[:, :3])):
        with pytest.raises(ValueError, match="expected"):
            copy_rows(host, (pool,), jnp.asarray(lists), jnp.asarray(TARGETS), jnp.asarray(COUNTS))


def test_the_kernel_lowers_for_cuda():
    host, pools = ([jnp.zeros((rows, 8, 128), jnp.bfloat16)] * 2 for rows in (50, 30))
    assert "copy_rows" in cuda_lowering(triton_copy_rows, host, pools, SOURCES, TARGETS, COUNTS, None)
    copies = Copies(tuple(host), tuple(pools), *map(jnp.asarray, (SOURCES, TARGETS, COUNTS)))
    x, weight = (jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in ((32, 4096), (28672, 4096)))
    options = {"norm_eps": 1e-5, "gated": True, "out_dtype": x.dtype, "config": linear_config(32, 14336, 4096, 2, True)}
    assert "fused_linear" in cuda_lowering(functools.partial(triton.triton_linear, **options), x, weight, *[None] * 4, copies)
    qkv, angles = jax.ShapeDtypeStruct((8, 8, 6, 128), jnp.bfloat16), jax.ShapeDtypeStruct((8, 64), jnp.float32)
    lists, config = [jax.ShapeDtypeStruct(size, jnp.int32) for size in ((8,), (8, 64), (8,))], triton_config(8, 8, 128, 2, 64, True)
    attend = functools.partial(span_decode.triton_rotate_and_attend, norm_eps=1e-5, scale=0.1, config=config)
    arrays = qkv, angles, angles, lists[0], *pools, *lists[1:], None, (), HostRows(*host, jnp.zeros(8, jnp.int32)), copies
    assert "span_decode_attend" in cuda_lowering(attend, *arrays)
