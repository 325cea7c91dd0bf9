"""Rotation and pool writes of a decode step against numpy, the rows of the pools bit by bit."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import rotate_and_write
from pallas_kernels.rotary.api import _rotate_and_write_triton, unsupported_reason
from tests.pallas_kernels.lowering import cuda_lowering

IMPLEMENTATIONS = [("xla", False), ("triton", True), pytest.param("triton", False, marks=pytest.mark.gpu, id="triton-gpu")]
CASES = {  # kv heads, query heads of each, head size, rows of the new tokens in a pool of 12
    "mha": (4, 1, 64, [3, 0, 11]),
    "gqa_3": (2, 3, 64, [5]),  # a group that is no power of two
    "gqa_4": (2, 4, 128, [7, 2]),
    "mqa_16": (1, 16, 32, [1, 8]),
    "nothing_written": (2, 1, 64, [-1, 12, 2**31 - 1, -(2**31)]),
    "some_written": (1, 2, 256, [-12, 4, 12, 9, -1]),  # -12 and -1 would be rows if counted from the end
}


def make(name, dtype, seed=0):
    """qkv, cos, sin, rows and pools, which hold NaN in some rows and infinities in others."""
    num_kv_heads, group, head_size, rows = CASES[name]
    rng = np.random.default_rng(seed)
    qkv = rng.normal(size=(len(rows), num_kv_heads, group + 2, head_size)).astype(dtype)
    angles = rng.uniform(-100, 100, (len(rows), head_size // 2)).astype(np.float32)
    k_pool, v_pool = (rng.normal(size=(12, num_kv_heads, head_size)).astype(dtype) for _ in range(2))
    for pool in (k_pool, v_pool):
        pool[::3], pool[1::4] = np.nan, -np.inf
    return qkv, np.cos(angles), np.sin(angles), np.asarray(rows, np.int32), k_pool, v_pool


def oracle(qkv, cos, sin):
    """Queries and keys turned as complex numbers: pair (i, i + H/2) is the number that exp(i angle) multiplies."""
    x = qkv[:, :, :-1].astype(np.complex128)
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin.astype(np.complex128))[:, None, None, :]
    both = np.concatenate([turned.real, turned.imag], axis=-1)
    return both[:, :, :-1].reshape(len(qkv), -1, 2 * half), both[:, :, -1]


def run(arrays, implementation, interpret):
    write = functools.partial(rotate_and_write, implementation=implementation, interpret=interpret)
    return [np.asarray(out) for out in jax.jit(write)(*(jnp.asarray(array) for array in arrays))]


def bits(array):
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


@pytest.mark.parametrize("implementation, interpret", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", CASES)
def test_matches_oracle_and_writes_its_rows_alone(name, dtype, implementation, interpret):
    arrays = make(name, dtype)
    qkv, cos, sin, rows, k_before, v_before = arrays
    q, k_after, v_after = run(arrays, implementation, interpret)
    exact_q, exact_k = oracle(qkv, cos, sin)
    # Rounded once: half a unit in the last place, and what float32 arithmetic leaves.
    tolerance = {"atol": 2e-6, "rtol": float(ml_dtypes.finfo(dtype).eps) / 2 + 1e-6}
    np.testing.assert_allclose(q.astype(np.float64), exact_q, **tolerance)
    written = {row: b for b, row in enumerate(rows.tolist()) if 0 <= row < len(k_before)}
    for row in range(len(k_before)):
        if row in written:
            np.testing.assert_allclose(k_after[row].astype(np.float64), exact_k[written[row]], **tolerance)
            np.testing.assert_array_equal(bits(v_after[row]), bits(qkv[written[row], :, -1]))
        else:
            np.testing.assert_array_equal(bits(k_after[row]), bits(k_before[row]))
            np.testing.assert_array_equal(bits(v_after[row]), bits(v_before[row]))


SABOTAGE = {
    "angle of the other direction": lambda qkv, cos, sin: (qkv, cos, -sin),
    "another sequence's angle": lambda qkv, cos, sin: (qkv, cos[::-1], sin[::-1]),
    "pairs next to each other": lambda qkv, cos, sin: (qkv.reshape(*qkv.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(qkv.shape), cos, sin),
    "key for a query": lambda qkv, cos, sin: (qkv[:, :, ::-1], cos, sin),
    "cosines off by 2%": lambda qkv, cos, sin: (qkv, 1.02 * cos, sin),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_tolerance_has_teeth(name):
    qkv, cos, sin, *rest = make("gqa_4", ml_dtypes.bfloat16)
    exact, _ = oracle(qkv, cos, sin)
    q, *_ = run((*SABOTAGE[name](qkv, cos, sin), *rest), "xla", False)
    assert not np.allclose(q.astype(np.float64), exact, atol=2e-6, rtol=2**-8 + 1e-6)


@pytest.mark.gpu
def test_donated_pools_are_updated_in_place():
    arrays = [jnp.asarray(array) for array in make("mha", np.float32)]
    write = jax.jit(functools.partial(rotate_and_write, implementation="triton"), donate_argnums=(4, 5))
    assert write.lower(*arrays).compile().memory_analysis().temp_size_in_bytes == 0
    before = [pool.unsafe_buffer_pointer() for pool in arrays[4:]]
    assert [pool.unsafe_buffer_pointer() for pool in write(*arrays)[1:]] == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: jnp.ones((3, 4, 2, 64))}, r"qkv must be a float \[B, K, G \+ 2, H\]"),
        ({1: jnp.ones((3, 64))}, r"cos must be float32 \[B, H / 2\] = \[3, 32\], got float32\[3, 64\]"),
        ({2: jnp.ones((3, 32), jnp.bfloat16)}, "sin must be float32"),
        ({3: jnp.ones((3,))}, r"rows must be int32 \[B\] = \[3\]"),
        ({4: jnp.ones((12, 4, 64), jnp.bfloat16)}, "k_pool must be float32"),
        ({5: jnp.ones((9, 4, 64))}, "k_pool and v_pool must agree"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arrays = [jnp.asarray(array) for array in make("mha", np.float32)]
    for index, array in change.items():
        arrays[index] = array
    with pytest.raises(ValueError, match=message):
        rotate_and_write(*arrays)


def test_kernel_says_what_it_cannot_do():
    qkv, angles, pool = jnp.ones((1, 1, 3, 96)), jnp.ones((1, 48)), jnp.ones((4, 1, 96))
    assert "head size must be 32, 64, 128 or 256, got 96" in unsupported_reason("triton", qkv, interpret=True)
    rows = jnp.zeros((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match="'triton': head size"):
        rotate_and_write(qkv, angles, angles, rows, pool, pool, implementation="triton", interpret=True)
    assert rotate_and_write(qkv, angles, angles, rows, pool, pool)[0].shape == (1, 1, 96)  # None picks one that can
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        rotate_and_write(qkv, angles, angles, rows, pool, pool, implementation="cuda")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("num_kv_heads, group, head_size", [(32, 1, 128), (8, 4, 128), (3, 3, 64), (1, 16, 256)])
def test_lowers_for_cuda(num_kv_heads, group, head_size, dtype):
    shape = jax.ShapeDtypeStruct
    pool, angles = shape((640, num_kv_heads, head_size), dtype), shape((8, head_size // 2), jnp.float32)
    args = (shape((8, num_kv_heads, group + 2, head_size), dtype), angles, angles, shape((8,), jnp.int32), pool, pool)
    assert cuda_lowering(functools.partial(_rotate_and_write_triton, interpret=False), *args).count("__gpu$xla.gpu.triton") == 1
