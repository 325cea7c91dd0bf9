"""Rotation against complex numbers in numpy, its gradient, and the pool writes of a decode step bit by bit."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import rotate_and_write, rotate_heads
from pallas_kernels.rotary import RUN_TOKENS, unsupported_reason
from pallas_kernels.rotary.triton import triton_rotate_and_write, triton_rotate_heads, triton_rotate_heads_gradient
from tests.pallas_kernels.budget import KERNELS, program
from tests.pallas_kernels.lowering import cuda_lowering

BFLOAT16 = ml_dtypes.bfloat16
CASES = {  # kv heads, query heads of each, head size, slots of the new tokens in a pool of 12
    "mha": (4, 1, 64, [3, 0, 11]),
    "gqa_3": (2, 3, 64, [5]),  # a group that is no power of two
    "gqa_4": (2, 4, 128, [7, 2]),
    "mqa_16": (1, 16, 32, [1, 8]),
    "nothing_written": (2, 1, 64, [-1, 12, 2**31 - 1, -(2**31)]),
    "some_written": (1, 2, 256, [-12, 4, 12, 9, -1]),  # -12 and -1 would be rows if counted from the end
}
# The interpreter runs each case once, in one dtype; a GPU runs all.
DTYPES = {
    "mha": np.float32,
    "gqa_3": BFLOAT16,
    "gqa_4": np.float16,
    "mqa_16": BFLOAT16,
    "nothing_written": np.float32,
    "some_written": BFLOAT16,
}
RUNS = [(name, dtype, *implementation) for name, dtype in DTYPES.items() for implementation in (("xla", False), ("triton", True))]
RUNS += [
    pytest.param(name, dtype, "triton", False, marks=pytest.mark.gpu) for name in CASES for dtype in (np.float32, np.float16, BFLOAT16)
]


def make(name, dtype, seed=0):
    """qkv, cos, sin, slots and pools, which hold NaN in some rows and infinities in others."""
    num_kv_heads, group, head_size, slots = CASES[name]
    rng = np.random.default_rng(seed)
    qkv = rng.normal(size=(len(slots), num_kv_heads, group + 2, head_size)).astype(dtype)
    angles = rng.uniform(-100, 100, (len(slots), head_size // 2)).astype(np.float32)
    k_pool, v_pool = (rng.normal(size=(12, num_kv_heads, head_size)).astype(dtype) for _ in range(2))
    for pool in (k_pool, v_pool):
        pool[::3], pool[1::4] = np.nan, -np.inf
    return qkv, np.cos(angles), np.sin(angles), np.asarray(slots, np.int32), k_pool, v_pool


def oracle(qkv, cos, sin):
    """Queries and keys turned as complex numbers: pair (i, i + H/2) is the number that exp(i angle) multiplies."""
    x = qkv[:, :, :-1].astype(np.complex128)
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin.astype(np.complex128))[:, None, None, :]
    both = np.concatenate([turned.real, turned.imag], axis=-1)
    return both[:, :, :-1].reshape(len(qkv), -1, 2 * half), both[:, :, -1]


def run(arrays, implementation, interpret):
    write = functools.partial(rotate_and_write, implementation=implementation, interpret=interpret)
    return [np.asarray(out) for out in program(write, interpret)(*(jnp.asarray(array) for array in arrays))]


def bits(array):
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


@pytest.mark.parametrize("name, dtype, implementation, interpret", RUNS)
def test_matches_oracle_and_writes_its_slots_alone(name, dtype, implementation, interpret):
    arrays = make(name, dtype)
    qkv, cos, sin, slots, k_before, v_before = arrays
    q, k_after, v_after = run(arrays, implementation, interpret)
    exact_q, exact_k = oracle(qkv, cos, sin)
    # Rounded once: half a unit in the last place, and what float32 arithmetic leaves.
    tolerance = {"atol": 2e-6, "rtol": float(ml_dtypes.finfo(dtype).eps) / 2 + 1e-6}
    np.testing.assert_allclose(q.astype(np.float64), exact_q, **tolerance)
    written = {row: b for b, row in enumerate(slots.tolist()) if 0 <= row < len(k_before)}
    for row in range(len(k_before)):
        if row in written:
            np.testing.assert_allclose(k_after[row].astype(np.float64), exact_k[written[row]], **tolerance)
            np.testing.assert_array_equal(bits(v_after[row]), bits(qkv[written[row], :, -1]))
        else:
            np.testing.assert_array_equal(bits(k_after[row]), bits(k_before[row]))
            np.testing.assert_array_equal(bits(v_after[row]), bits(v_before[row]))


@pytest.mark.parametrize("implementation, interpret", [("xla", False), *KERNELS])
def test_runs_are_written_like_their_tokens_one_by_one(implementation, interpret):
    """Runs of 32 tokens whose rows begin anywhere, also at the ends of the pool."""
    rng, first_slots = np.random.default_rng(4), np.array([36, 0, 68], np.int32)
    qkv = jnp.asarray(rng.normal(size=(96, 2, 5, 32)), jnp.float32)
    cos, sin = (jnp.asarray(rng.normal(size=(96, 16)), jnp.float32) for _ in range(2))
    pools = [jnp.asarray(rng.normal(size=(100, 2, 32)), jnp.float32) for _ in range(2)]
    slots = (first_slots[:, None] + np.arange(RUN_TOKENS, dtype=np.int32)).reshape(-1)
    expected = run((qkv, cos, sin, slots, *pools), "xla", False)
    for found, each in zip(run((qkv, cos, sin, first_slots, *pools), implementation, interpret), expected, strict=True):
        np.testing.assert_allclose(found, each, atol=2e-6)


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
        ({0: jnp.ones((3, 4, 2, 64))}, r"qkv must be a float \[rows, K, G \+ 2, H\]"),
        ({1: jnp.ones((3, 64))}, r"cos must be float32 \[rows, H / 2\] = \[3, 32\], got float32\[3, 64\]"),
        ({2: jnp.ones((3, 32), jnp.bfloat16)}, "sin must be float32"),
        ({3: jnp.ones((3,))}, r"slots must be int32 \[B\] = \[3\]"),
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
    slots = jnp.zeros((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match="'triton': head size"):
        rotate_and_write(qkv, angles, angles, slots, pool, pool, implementation="triton", interpret=True)
    assert rotate_and_write(qkv, angles, angles, slots, pool, pool)[0].shape == (1, 1, 96)  # None picks one that can
    assert "multiple of 32, got 1" in unsupported_reason("triton", jnp.ones((1, 1, 3, 64)), row_multiple=32, interpret=True)
    with pytest.raises(NotImplementedError, match="'triton': the number of rows must be a multiple of 32, got 1"):
        rotate_heads(qkv, angles, angles, implementation="triton", interpret=True)
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        rotate_and_write(qkv, angles, angles, slots, pool, pool, implementation="cuda")


@pytest.mark.parametrize(
    "num_kv_heads, group, head_size, dtype", [(8, 4, 128, jnp.bfloat16), (3, 3, 64, jnp.bfloat16), (1, 16, 256, jnp.float32)]
)
def test_lowers_for_cuda(num_kv_heads, group, head_size, dtype):
    shape = jax.ShapeDtypeStruct
    pool, angles = shape((640, num_kv_heads, head_size), dtype), shape((8, head_size // 2), jnp.float32)
    args = (shape((8, num_kv_heads, group + 2, head_size), dtype), angles, angles, shape((8,), jnp.int32), pool, pool)
    assert cuda_lowering(triton_rotate_and_write, *args).count("__gpu$xla.gpu.triton") == 1
    angles = shape((64, head_size // 2), jnp.float32)
    runs = (shape((64, num_kv_heads, group + 2, head_size), dtype), angles, angles, shape((2,), jnp.int32), pool, pool)
    assert cuda_lowering(triton_rotate_and_write, *runs).count("__gpu$xla.gpu.triton") == 1


# Whole sequences.


def by_complex_numbers(qkv, angles):
    turned_q, turned_k = oracle(qkv, np.cos(angles), np.sin(angles))
    return turned_q, turned_k, qkv[:, :, -1]


@pytest.mark.parametrize(("implementation", "interpret"), [("xla", False), *KERNELS])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 1, 64), np.float32), ((1, 3, 32), np.float32), ((2, 2, 64), BFLOAT16)], ids=["mha", "gqa_3", "bfloat16"]
)
def test_heads_are_turned_and_their_gradients_turned_back(shape, dtype, implementation, interpret):
    """A rotation is orthogonal: its transpose, the gradient, undoes it."""
    num_kv_heads, group, head_size = shape
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 7, (64, head_size // 2))
    qkv = rng.normal(size=(64, num_kv_heads, group + 2, head_size)).astype(dtype)
    cos, sin, x = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32), jnp.asarray(qkv)

    def both(x):
        heads, backward = jax.vjp(lambda x: rotate_heads(x, cos, sin, implementation=implementation, interpret=interpret), x)
        return heads, backward(heads)[0]

    heads, restored = program(both, interpret)(x)
    tolerance = {"atol": 2e-6} if dtype == np.float32 else {"rtol": 2**-8, "atol": 1e-5}
    for one, other in zip(heads, by_complex_numbers(qkv.astype(np.float64), angles), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, **tolerance)
    # In half precision it was rounded twice, in pairs whose larger number says how much.
    np.testing.assert_allclose(
        np.asarray(restored, np.float64), qkv.astype(np.float64), **{"atol": 2e-6} if dtype == np.float32 else {"atol": 0.03}
    )


def test_heads_of_whole_sequences_lower_for_cuda():
    qkv, angles = jax.ShapeDtypeStruct((64, 4, 3, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 32), jnp.float32)
    q = jax.ShapeDtypeStruct((64, 4, 64), jnp.bfloat16)
    assert "__gpu$xla.gpu.triton" in cuda_lowering(triton_rotate_heads, qkv, angles, angles)
    assert "__gpu$xla.gpu.triton" in cuda_lowering(triton_rotate_heads_gradient, q, q, q, angles, angles)
