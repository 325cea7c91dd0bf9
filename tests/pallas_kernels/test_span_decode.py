"""Every implementation against a float64 oracle, within measured error budgets.

On a machine without a GPU the Pallas kernels run in the interpreter and are lowered for CUDA;
with one, the tests marked `gpu` run the same cases on it.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import HostRows, QuantizedPool, SplitRows, quantize_pool, rotate_and_attend, span_decode_attention
from pallas_kernels.span_decode import expected_bytes, mosaic, triton, unsupported_reason
from pallas_kernels.span_decode.heuristics import MosaicConfig, TritonConfig, mosaic_config, triton_config
from tests.pallas_kernels.budget import INTERPRET, KERNELS, error, gpu_run, program, rms, round_to, run
from tests.pallas_kernels.cases.span_decode import CASE, CASES, Case, Problem, make_problem
from tests.pallas_kernels.lowering import cuda_lowering

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

# The interpreter runs each case once, in float32 or in half precision, since it compiles each for seconds; XLA has no tiles, so that
# few shapes are enough. A GPU runs all. `kv_8` and `kv_16` are what Mosaic needs.
HALF = {"gqa_3": ml_dtypes.bfloat16, "gqa_8_head_128": np.float16, "batch_1": ml_dtypes.bfloat16}
PLAIN = [CASE[name] for name in ("tile_edges", "all_empty", "gqa_3", "odd_capacity_scale")]
FLOAT32 = [run(case, np.float32, name) for case in PLAIN for name in ("reference", "xla")]
FLOAT32 += [run(case, np.float32, "triton", True) for case in CASES if case.name not in {*HALF, "kv_8", "kv_16"}]
FLOAT32 += [gpu_run(case, np.float32, name) for case in CASES for name in ("xla", "triton")]
if importlib.util.find_spec("triton"):  # an extra
    FLOAT32 += [gpu_run(case, np.float32, "jax_triton") for case in CASES]
HALF_PRECISION = [run(CASE[name], dtype, "triton", True) for name, dtype in HALF.items()]
HALF_PRECISION += [run(CASE[name], HALF[name], "xla") for name in ("gqa_3", "gqa_8_head_128")]
HALF_PRECISION += [gpu_run(CASE[name], dtype, "triton") for name, dtype in HALF.items()]

NEEDS_INTERPRETER = pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="JAX 0.10 cannot interpret Mosaic GPU")
MOSAIC = [pytest.param(True, marks=NEEDS_INTERPRETER, id="interpret"), pytest.param(False, marks=pytest.mark.gpu, id="gpu")]


# The oracle, and how wrong an implementation may be.


def oracle(problem: Problem) -> np.ndarray:
    """Softmax attention in float64, one head of one sequence at a time."""
    q, out = problem.q, np.zeros_like(problem.q)
    batch, num_heads, head_size = q.shape
    group = num_heads // problem.k_pool.shape[1]
    scale = head_size**-0.5 if problem.scale is None else problem.scale
    for b in range(batch):
        rows = problem.slots[b, : problem.counts[b]]
        for n in range(num_heads if len(rows) else 0):
            scores = problem.k_pool[rows, n // group] @ q[b, n] * scale
            weights = np.exp(scores - scores.max())
            out[b, n] = weights @ problem.v_pool[rows, n // group] / weights.sum()
    return out


def plain_attention(problem: Problem, dtype) -> np.ndarray:
    """What attention written down in `dtype` gives: products and weights rounded to it, softmax in float32."""
    q, k_pool, v_pool = (x.astype(dtype).astype(np.float32) for x in (problem.q, problem.k_pool, problem.v_pool))
    out = np.zeros(q.shape)
    group = q.shape[1] // k_pool.shape[1]
    scale = q.shape[2] ** -0.5 if problem.scale is None else problem.scale
    for b, count in enumerate(problem.counts):
        rows = problem.slots[b, :count]
        for n in range(q.shape[1] if count else 0):
            scores = (k_pool[rows, n // group] @ q[b, n]).astype(dtype).astype(np.float32) * np.float32(scale)
            weights = np.exp(scores - scores.max())
            weights = (weights / weights.sum()).astype(dtype).astype(np.float32)
            out[b, n] = (weights @ v_pool[rows, n // group]).astype(dtype)
    return out


def within_budget(out: np.ndarray, problem: Problem, dtype) -> bool:
    return error(out, plain_attention(problem, dtype), oracle(problem)) < 2


@functools.cache
def compiled(implementation, interpret, scale):
    return program(functools.partial(span_decode_attention, scale=scale, implementation=implementation, interpret=interpret), interpret)


def attend(problem: Problem, dtype, implementation, interpret=False, pool=lambda pool: pool) -> np.ndarray:
    q, k_pool, v_pool = (jnp.asarray(x, dtype) for x in (problem.q, problem.k_pool, problem.v_pool))
    slots, counts = jnp.asarray(problem.slots), jnp.asarray(problem.counts)
    out = compiled(implementation, interpret, problem.scale)(q, pool(k_pool), pool(v_pool), slots, counts)
    assert out.dtype == q.dtype and out.shape == q.shape
    return np.asarray(out).astype(np.float64)


def triton_attend(problem: Problem, config: TritonConfig, interpret: bool) -> np.ndarray:
    """The kernel with settings of our own, in float32."""
    arrays = (jnp.asarray(x, jnp.float32) for x in (problem.q, problem.k_pool, problem.v_pool))
    attend = functools.partial(triton.triton_attention, scale=problem.q.shape[2] ** -0.5, config=config, interpret=interpret)
    return np.asarray(program(attend, interpret)(*arrays, jnp.asarray(problem.slots), jnp.asarray(problem.counts)))


@pytest.mark.parametrize("case, dtype, implementation, interpret", FLOAT32)
def test_float32_matches_oracle(case, dtype, implementation, interpret):
    problem = round_to(make_problem(case), dtype)
    np.testing.assert_allclose(attend(problem, dtype, implementation, interpret), oracle(problem), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("case, dtype, implementation, interpret", HALF_PRECISION)
def test_half_precision_within_budget(case, dtype, implementation, interpret):
    problem = round_to(make_problem(case), dtype)
    assert within_budget(attend(problem, dtype, implementation, interpret), problem, dtype)


@pytest.mark.parametrize("interpret", MOSAIC)
@pytest.mark.parametrize("name, splits, dtype", [("kv_8", 1, np.float16), ("kv_16", 2, ml_dtypes.bfloat16)])
def test_mosaic_within_budget(name, splits, dtype, interpret):
    problem = round_to(make_problem(CASE[name]), dtype)
    arrays = (jnp.asarray(x, dtype) for x in (problem.q, problem.k_pool, problem.v_pool))
    config, scale = MosaicConfig(tile_rows=8, num_stages=3, splits=splits), problem.q.shape[2] ** -0.5
    attend = functools.partial(mosaic.mosaic_attention, scale=scale, config=config, interpret=interpret)
    out = jax.jit(attend)(*arrays, jnp.asarray(problem.slots), jnp.asarray(problem.counts))
    assert within_budget(np.asarray(out).astype(np.float64), problem, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["kv_8", "kv_16"])
def test_mosaic_through_the_public_function(name):
    problem = round_to(make_problem(CASE[name]), ml_dtypes.bfloat16)
    assert within_budget(attend(problem, ml_dtypes.bfloat16, "mosaic"), problem, ml_dtypes.bfloat16)


def dequantized(problem: Problem) -> Problem:
    """The problem whose rows are what the int8 rows stand for."""

    def through_int8(rows):
        pool = jax.jit(quantize_pool)(jnp.asarray(rows, jnp.float32))
        return np.asarray(pool.values, np.float64) * np.asarray(pool.scales, np.float64)[..., None]

    used = ~np.isnan(problem.k_pool)
    k_pool, v_pool = (np.where(used, through_int8(np.where(used, x, 0.0)), np.nan) for x in (problem.k_pool, problem.v_pool))
    return dataclasses.replace(problem, k_pool=k_pool, v_pool=v_pool)


@pytest.mark.parametrize(
    "name, implementation, interpret",
    [("gqa_3", "reference", False), ("gqa_3", "xla", False)]
    + [(name, "triton", True) for name in ("gqa_3", "batch_1")]
    + [pytest.param(name, "triton", False, marks=pytest.mark.gpu, id=f"{name}-triton-gpu") for name in ("gqa_3", "batch_1")],
)
def test_int8_pools(name, implementation, interpret):
    problem = round_to(make_problem(CASE[name]), ml_dtypes.bfloat16)
    out = attend(problem, ml_dtypes.bfloat16, implementation, interpret, pool=jax.jit(quantize_pool))
    assert within_budget(out, dequantized(problem), ml_dtypes.bfloat16)
    # Rounding the rows costs more than the computation: measured 0.9% of the output's RMS.
    exact = oracle(problem)
    assert rms(out - exact) < 0.02 * rms(exact)


def test_quantize_pool_rounds_to_half_a_step():
    pool = 3.0 * np.random.default_rng(0).normal(size=(32, 2, 64)).astype(np.float32)
    pool[5] = 0.0
    values, scales = (np.asarray(array) for array in jax.jit(quantize_pool)(pool))
    step = scales[..., None]
    assert np.all(np.abs(values * step - pool) <= 0.5001 * step) and np.all(values[5] == 0)


SABOTAGE = {
    "swapped K and V": lambda p: dataclasses.replace(p, k_pool=p.v_pool, v_pool=p.k_pool),
    "one slot too few": lambda p: dataclasses.replace(p, counts=p.counts - 1),
    "scale off by 2%": lambda p: dataclasses.replace(p, scale=1.02 * p.q.shape[2] ** -0.5),
    "another sequence's rows": lambda p: dataclasses.replace(p, slots=p.slots[::-1]),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_budget_has_teeth(name):
    case = Case("teeth", "equal counts, so that rows can be swapped", (64, 64), head_size=128)
    problem = round_to(make_problem(case), ml_dtypes.bfloat16)
    out = attend(SABOTAGE[name](problem), ml_dtypes.bfloat16, "xla")
    assert not within_budget(out, problem, ml_dtypes.bfloat16)
    assert not within_budget(np.zeros_like(out), problem, ml_dtypes.bfloat16)
    assert within_budget(attend(problem, ml_dtypes.bfloat16, "xla"), problem, ml_dtypes.bfloat16)


# A decode step's new tokens: rotated, written, attended to.


def new_tokens(problem: Problem, with_norms: bool, seed: int = 1) -> dict:
    """Heads and angles of a new token per sequence; its row, which no other sequence reads, holds NaN and stands anywhere in its slots."""
    rng, (batch, num_heads, head_size) = np.random.default_rng(seed), problem.q.shape
    num_kv_heads = problem.k_pool.shape[1]
    unused = np.flatnonzero(np.isnan(problem.k_pool[:, 0, 0]))
    own = np.where(problem.counts > 0, rng.permutation(unused)[:batch], len(problem.k_pool)).astype(np.int32)
    for b in np.flatnonzero(problem.counts):
        problem.slots[b, rng.integers(problem.counts[b])] = own[b]
    qkv = rng.normal(size=(batch, num_kv_heads, num_heads // num_kv_heads + 2, head_size)).astype(np.float32)
    angles = rng.uniform(-100, 100, (batch, head_size // 2))
    arrays = {"qkv": qkv, "cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32), "own": own}
    if with_norms:
        arrays["norms"] = tuple((1.0 + 0.3 * rng.normal(size=head_size)).astype(np.float32) for _ in range(2))
    return arrays


def after_new_tokens(problem: Problem, qkv, cos, sin, own, norms=None) -> Problem:
    """The problem that is left, in float64: heads normalised, then turned as complex numbers; pools with the new rows."""
    wide = qkv.astype(np.float64)
    group, half = wide.shape[2] - 2, wide.shape[3] // 2
    x = wide[:, :, :-1]
    if norms is not None:
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)
        x *= np.stack([norms[0]] * group + [norms[1]]).astype(np.float64)
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin.astype(np.complex128))[:, None, None, :]
    x = np.concatenate([turned.real, turned.imag], axis=-1)
    k_pool, v_pool = problem.k_pool.copy(), problem.v_pool.copy()
    for b, row in enumerate(own):
        if row < len(k_pool):
            k_pool[row], v_pool[row] = x[b, :, -1], wide[b, :, -1]
    return dataclasses.replace(problem, q=x[:, :, :-1].reshape(problem.q.shape), k_pool=k_pool, v_pool=v_pool)


@functools.cache
def compiled_step(config: TritonConfig | None, implementation, interpret, partial=False):
    if config is None:
        return program(functools.partial(rotate_and_attend, implementation=implementation, interpret=interpret, partial=partial), interpret)

    def step(qkv, cos, sin, own, *pools_and_slots, norms=None, host=None):
        options = {"norm_eps": 1e-5, "scale": qkv.shape[3] ** -0.5, "config": config, "interpret": interpret, "partial": partial}
        return triton.triton_rotate_and_attend(qkv, cos, sin, own, *pools_and_slots, norms, AHEAD, host, **options)

    return program(step, interpret)


def log_sums(problem: Problem) -> np.ndarray:
    """The log-sum-exps of the scores of `oracle`, in units of log 2."""
    group, scale = problem.q.shape[1] // problem.k_pool.shape[1], problem.q.shape[2] ** -0.5
    keys = [problem.k_pool[rows[:count]].repeat(group, axis=1) for rows, count in zip(problem.slots, problem.counts)]
    scores = (np.einsum("nh,anh->an", q, own) * scale for q, own in zip(problem.q, keys))
    return np.array([np.logaddexp2.reduce(own / np.log(2), axis=0, initial=-np.inf) for own in scores])


def take_step(problem: Problem, config, implementation="triton", interpret=False, partial=False, **new) -> list[np.ndarray]:
    """Output and pools; of a partial step the log-sum-exps of its one part too."""
    pools = (jnp.asarray(pool, jnp.float32) for pool in (problem.k_pool, problem.v_pool))
    step = compiled_step(config, implementation, interpret, partial)
    arrays = (new[name] for name in ("qkv", "cos", "sin", "own"))
    others = {name: new[name] for name in ("norms", "host") if name in new}
    out, *pools = step(*map(jnp.asarray, arrays), *pools, jnp.asarray(problem.slots), jnp.asarray(problem.counts), **others)
    if partial:
        (out,), (lse,) = out
        pools.append(lse)
    elif isinstance(out, SplitRows):
        parts, lse = (np.asarray(x, np.float64) for x in out)
        weights = np.exp2(lse - lse.max(axis=0)) / np.exp2(lse - lse.max(axis=0)).sum(axis=0)
        out = np.sum(weights[..., None] * parts.reshape(*lse.shape, -1), axis=0)
    return [np.asarray(x) for x in (out, *pools)]


AHEAD = [jnp.ones((40, 24)), jnp.ones((7, 16), jnp.bfloat16)]  # read and of no effect

STEPS = [  # case, with norms or not, settings, partial or not
    ("ragged", True, TritonConfig(16, 1, 2, 2, kv_heads=2), True),
    ("gqa_3", True, TritonConfig(16, 1, 2, 0, parts=4, ahead=2), False),  # 33 rows: the last part is empty
    ("kv_8", False, TritonConfig(16, 2, 2, 0, kv_heads=4, ahead=1), True),
    ("ragged", True, TritonConfig(16, 1, 2, 0, ahead=3, most_rows=20), True),
    ("mqa_16_head_32", False, None, False),
]


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("name, with_norms, config, partial", STEPS, ids=str)
def test_new_tokens_are_rotated_written_and_read(name, with_norms, config, partial, interpret):
    """Rows of new tokens hold NaN before: one that is read too early shows, in any split of its sequence."""
    problem = round_to(make_problem(CASE[name]), np.float32)
    new = new_tokens(problem, with_norms)
    wanted = after_new_tokens(problem, **new)
    out, *pools = take_step(problem, config, interpret=interpret, partial=partial, **new)
    if partial:
        np.testing.assert_allclose(pools.pop(), log_sums(wanted), atol=1e-5, rtol=2e-5)
    np.testing.assert_allclose(out.reshape(wanted.q.shape), oracle(wanted), atol=1e-5, rtol=2e-5)
    for pool, before, after in zip(pools, (problem.k_pool, problem.v_pool), (wanted.k_pool, wanted.v_pool), strict=True):
        np.testing.assert_allclose(pool, after, atol=2e-6, rtol=1e-5)
        np.testing.assert_array_equal(
            np.delete(pool, new["own"][problem.counts > 0], 0), np.delete(before, new["own"][problem.counts > 0], 0)
        )


def in_host_memory(problem: Problem, own, seed=0) -> tuple[Problem, HostRows]:
    """The problem with half of its rows in host memory, in another order, and NaN in their place; every other sequence has none there."""
    rng = np.random.default_rng(seed)
    kept = {*own, *problem.slots[1::2].ravel()}
    moved = rng.permutation([row for row in range(len(problem.k_pool)) if row not in kept])[: len(problem.k_pool) // 2]
    place = {row: -1 - index for index, row in enumerate(moved)}
    slots = np.vectorize(lambda row: place.get(row, row))(problem.slots).astype(np.int32)
    counts = [int((row[:count] < 0).sum()) for row, count in zip(slots, problem.counts)]
    pinned = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    pools, host = [], []
    for pool in (problem.k_pool, problem.v_pool):
        host.append(jax.device_put(np.nan_to_num(pool[moved]).astype(np.float32), pinned))
        pools.append(pool.copy())
        pools[-1][moved] = np.nan
    return dataclasses.replace(problem, k_pool=pools[0], v_pool=pools[1], slots=slots), HostRows(*host, jnp.asarray(counts, jnp.int32))


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("name, config", [(name, config) for name, _, config, _ in STEPS[:3]], ids=str)
def test_rows_in_host_memory_are_read(name, config, interpret):
    """A row that is looked for on the wrong side is NaN; one that is not looked for is missed."""
    problem = round_to(make_problem(CASE[name]), np.float32)
    new = new_tokens(problem, False)
    expected = oracle(after_new_tokens(problem, **new))
    tiered, host = in_host_memory(problem, new["own"])
    assert int(host.counts.sum()) > 0
    missed = host._replace(counts=jnp.zeros_like(host.counts))
    for rows, found in ((host, True), (missed, False)):
        out, *_ = take_step(tiered, config, interpret=interpret, **new, host=rows)
        assert np.allclose(out, expected, atol=1e-5, rtol=2e-5) == found
    if name == "gqa_3" and interpret:
        np.testing.assert_allclose(take_step(tiered, None, "xla", **new, host=host)[0], expected, atol=1e-5, rtol=2e-5)


@pytest.mark.parametrize("sabotage", ["none", "angle", "norms", "own"])
def test_a_step_without_the_kernel_and_the_tolerance_of_steps(sabotage):
    """XLA's step is within the tolerance; one with angles, norms or rows of another sequence is not."""
    problem = round_to(make_problem(CASE["gqa_3"]), np.float32)
    new = new_tokens(problem, True)
    expected = oracle(after_new_tokens(problem, **new))
    changes = {"angle": {"sin": -new["sin"]}, "norms": {"norms": new["norms"][::-1]}, "own": {"own": new["own"][::-1]}}
    out, *_ = take_step(problem, None, implementation="xla", **(new | changes.get(sabotage, {})))
    assert np.allclose(out, expected, atol=1e-5, rtol=2e-5) == (sabotage == "none")


# What callers may get wrong.


@pytest.mark.parametrize("implementation, interpret", [("xla", False), *KERNELS])
def test_hostile_slots_and_counts(implementation, interpret):
    """Slots outside the pool are clamped, counts are clamped to the capacity, repeated slots count twice."""
    problem = round_to(make_problem(Case("hostile", "", (40, 40, 40), capacity=40, num_rows=128)), np.float32)
    problem.k_pool[np.isnan(problem.k_pool)] = 1.0
    problem.v_pool[np.isnan(problem.v_pool)] = 2.0
    problem.slots[0, :3] = (-7, 2**31 - 1, 128)
    problem.slots[1, :40] = problem.slots[1, 0]
    clean = dataclasses.replace(problem, slots=np.clip(problem.slots, 0, 127))
    hostile = dataclasses.replace(problem, counts=np.asarray([2**31 - 1, 40, 41], np.int32))
    out = attend(hostile, jnp.float32, implementation, interpret)
    np.testing.assert_allclose(out, oracle(clean), atol=2e-6, rtol=2e-5)
    hostile = dataclasses.replace(problem, counts=np.asarray([-1, -(2**31), 0], np.int32))
    assert not attend(hostile, jnp.float32, implementation, interpret).any()


@pytest.mark.parametrize("implementation, interpret", [("xla", False), KERNELS[1]])
def test_kv_heads_read_slots_of_their_own(implementation, interpret):
    """Each is a problem of one kv head; slots outside the pool read no other head's rows."""
    cases = [Case("a head", "", counts, 3, 1, 32, capacity=40, num_rows=64) for counts in ((40, 0), (7, 33))]
    heads = [make_problem(case, seed) for seed, case in enumerate(cases)]
    for head in heads:
        head.k_pool[np.isnan(head.k_pool)] = head.v_pool[np.isnan(head.v_pool)] = 1.5
    heads[1].slots[0, 0] = 2**31 - 1
    arrays = {name: np.concatenate([getattr(head, name) for head in heads], axis=1) for name in ("q", "k_pool", "v_pool")}
    arrays |= {name: np.stack([getattr(head, name) for head in heads], axis=1) for name in ("slots", "counts")}
    problem = Problem(**arrays, scale=None)
    heads[1].slots[0, 0] = 63
    expected = np.concatenate([oracle(round_to(head, np.float32)) for head in heads], axis=1)
    np.testing.assert_allclose(attend(problem, np.float32, implementation, interpret), expected, atol=2e-6, rtol=2e-5)


def arguments(batch=2, heads=4, kv_heads=2, head_size=64, rows=16, capacity=8, dtype=jnp.float32):
    """Arrays that fit together, by name."""
    pool = jnp.ones((rows, kv_heads, head_size), dtype)
    slots, counts = jnp.zeros((batch, capacity), jnp.int32), jnp.ones((batch,), jnp.int32)
    return {"q": jnp.ones((batch, heads, head_size), dtype), "k_pool": pool, "v_pool": pool, "slots": slots, "counts": counts}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": jnp.ones((2, 4, 1, 64))}, r"q must be \[B, N, H\]"),
        ({"q": jnp.ones((2, 3, 64))}, "3 query heads must be a multiple of the 2 kv heads"),
        ({"q": jnp.ones((2, 4, 32))}, "head size 32, the pools have 64"),
        ({"q": jnp.ones((2, 4, 64), jnp.bfloat16)}, "q is bfloat16 but the pools are float32"),
        ({"q": jnp.ones((2, 4, 64), jnp.int32)}, "q must be bfloat16, float16 or float32"),
        ({"v_pool": jnp.ones((9, 2, 64))}, "k_pool and v_pool must agree"),
        ({"slots": jnp.ones((2, 8))}, "slots and counts must be int32"),
        ({"slots": jnp.zeros((3, 8), jnp.int32)}, "share the batch size, got 2, 3 and 2"),
        ({"slots": jnp.zeros((2, 3, 8), jnp.int32), "counts": jnp.ones((2, 3), jnp.int32)}, r"\[B, K, A\] and \[B, K\] with K = 2"),
        ({"k_pool": QuantizedPool(jnp.ones((16, 2, 64), jnp.int8), jnp.ones((16, 2)))}, "both be quantized"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    named = arguments() | change
    positional = [named.pop(name) for name in ("q", "k_pool", "v_pool", "slots", "counts")]
    with pytest.raises(ValueError, match=message):
        span_decode_attention(*positional, **named)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": jnp.ones((2, 2, 2, 64))}, r"qkv must be a float \[rows, K, G \+ 2, H\]"),
        ({"own": jnp.zeros((3,), jnp.int32)}, r"slots must be int32 \[B\] = \[2\]"),
        ({"norms": (jnp.ones(64), jnp.ones(32))}, r"norms must be float \[H\] = \[64\], got float32\[32\]"),
    ],
)
def test_wrong_arguments_of_a_step_are_named(change, message):
    new = {"qkv": jnp.ones((2, 2, 4, 64)), "cos": jnp.ones((2, 32)), "sin": jnp.ones((2, 32)), "own": jnp.zeros((2,), jnp.int32)} | change
    norms = new.pop("norms", None)
    _, *rest = arguments().values()
    with pytest.raises(ValueError, match=message):
        rotate_and_attend(*new.values(), *rest, norms=norms)


def test_gradient_is_refused():
    _, *rest = arguments().values()
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda q: span_decode_attention(q, *rest).sum())(arguments()["q"])


def test_backend_says_what_it_cannot_do():
    odd = arguments(head_size=96)
    assert "head size must be 32, 64, 128 or 256, got 96" in unsupported_reason("triton", odd["q"], odd["k_pool"], interpret=True)
    with pytest.raises(NotImplementedError, match="'triton': head size"):
        span_decode_attention(*odd.values(), implementation="triton", interpret=True)
    np.testing.assert_array_equal(span_decode_attention(*odd.values()), 1.0)  # None picks one that can
    assert "no interpreter" in unsupported_reason("jax_triton", odd["q"], odd["k_pool"], interpret=True)


@pytest.mark.parametrize("shape", [{"batch": 0}, {"capacity": 0}])
def test_nothing_to_do(shape):
    args = arguments(**shape)
    out = span_decode_attention(*args.values())
    assert out.shape == args["q"].shape and not out.any()


def test_expected_bytes():
    args = arguments(batch=2, heads=4, kv_heads=2, head_size=64, dtype=jnp.bfloat16)
    assert expected_bytes(args["q"], args["k_pool"], 10) == 10 * (2 * 2 * 64 * 2 + 4) + 2 * 2 * 4 * 64 * 2
    quantized = quantize_pool(args["k_pool"])
    assert expected_bytes(args["q"], quantized, 10) == 10 * (2 * 2 * (64 + 4) + 4) + 2 * 2 * 4 * 64 * 2


# The Triton kernel's own matters: split-KV, and lowering for CUDA without a GPU.


@pytest.mark.parametrize("splits", [1, 3, 40])
@pytest.mark.parametrize("counts", [(96, 2, 0, 5, 1), (48, 48, 48), (0, 0, 0)])
def test_triton_splits_sequences_fairly(counts, splits):
    """Each sequence has splits in proportion to its slots, at least one, and all splits fit the grid."""
    config = TritonConfig(tile_rows=16, num_warps=4, num_stages=2, splits=splits)
    split_rows, _, num_splits = triton.split_sequences(jnp.asarray(counts, jnp.int32), len(counts), 96, config)
    assert num_splits.sum() <= triton.max_splits(len(counts), splits)
    fair_rows = max(-(-sum(counts) // (splits * len(counts))), config.tile_rows)
    assert split_rows == fair_rows
    for count, found in zip(counts, num_splits.tolist(), strict=False):
        assert found == max(1, -(-count // fair_rows))


SETTINGS = [TritonConfig(16, 4, 2, 5), TritonConfig(128, 8, 2, 0), TritonConfig(16, 1, 4, 2, kv_heads=2)]
SETTINGS += [TritonConfig(16, 1, 3, 0, most_rows=20)]


@pytest.mark.parametrize(
    "config, interpret",
    [(config, True) for config in SETTINGS]
    + [pytest.param(config, False, marks=pytest.mark.gpu) for config in (*SETTINGS, TritonConfig(32, 1, 4, 1), TritonConfig(64, 2, 3, 0))],
    ids=str,
)
def test_triton_settings_do_not_change_the_answer(config, interpret):
    problem = round_to(make_problem(CASE["ragged"]), np.float32)
    np.testing.assert_allclose(triton_attend(problem, config, interpret), oracle(problem), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("interpret", INTERPRET)
def test_splits_of_many_sequences_are_combined(interpret, monkeypatch):
    """With so many sequences that a program combines whole heads: here, on a machine of one multiprocessor."""
    monkeypatch.setattr(triton, "MULTIPROCESSORS", 1)
    assert triton.combine_tile(2, 8, 128)[0] == 128
    problem = round_to(make_problem(CASE["gqa_8_head_128"]), np.float32)
    np.testing.assert_allclose(triton_attend(problem, TritonConfig(16, 2, 2, 3), interpret), oracle(problem), atol=2e-6, rtol=2e-5)


def test_longest_sequences_are_divided_and_lower_for_cuda():
    case = Case("gqa_3_many", "", (40,) * 40, 9, 3, 64)
    attend = functools.partial(triton.triton_attention, scale=0.1, config=TritonConfig(64, 2, 3, 0, most_rows=16))
    assert cuda_lowering(attend, *shapes(case, jnp.bfloat16, jnp.bfloat16)).count("__gpu$xla.gpu.triton") == 2


def shapes(case: Case, dtype, pool_dtype):
    """The arguments of a case as shapes, for lowering."""
    batch, rows, kv_heads, head_size = len(case.counts), case.num_rows, case.num_kv_heads, case.head_size
    q, pool = (batch, case.num_heads, head_size), jax.ShapeDtypeStruct((rows, kv_heads, head_size), pool_dtype)
    if pool_dtype == jnp.int8:
        pool = QuantizedPool(pool, jax.ShapeDtypeStruct((rows, kv_heads), jnp.float32))
    slots, counts = jax.ShapeDtypeStruct((batch, case.capacity), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jax.ShapeDtypeStruct(q, dtype), pool, pool, slots, counts


@pytest.mark.parametrize(
    "name, pool_dtype",
    [("gqa_3", jnp.bfloat16), ("gqa_3", jnp.int8), ("mha_head_256", jnp.float32), ("mha_head_256", jnp.int8)]
    + [("batch_1", jnp.bfloat16), ("batch_1", jnp.float16)],
)
def test_triton_lowers_for_cuda(name, pool_dtype):
    case = CASE[name]
    args = shapes(case, jnp.bfloat16 if pool_dtype == jnp.int8 else pool_dtype, pool_dtype)
    config = triton_config(len(case.counts), case.num_kv_heads, case.head_size, jnp.dtype(pool_dtype).itemsize, case.capacity)
    attend = functools.partial(triton.triton_attention, scale=0.1, config=config)
    assert cuda_lowering(attend, *args).count("__gpu$xla.gpu.triton") in (1, 2)


@pytest.mark.parametrize(
    "batch, capacity, divided",
    [(32, 8192, False), (8, 2112, False), (1, 2112, False), (32, 16384, True), (8, 8192, True)],  # the last two were not measured
)
def test_large_heads_that_name_few_rows_are_not_divided(batch, capacity, divided):
    """Eight heads of 128, as in Llama 3 8B. Where everything is named, or rows are int8, settings are as without the hint."""
    assert (triton_config(batch, 8, 128, 2, capacity, sparse=True).splits > 0) == divided
    assert triton_config(batch, 8, 128, 2, capacity).splits > 0 and triton_config(batch, 8, 128, 1, capacity, sparse=True).splits > 0


def test_many_sequences_of_long_contexts_have_wide_tiles():
    """Three heads of 64, as in SmolLM2-135M: where some sequences read many more rows than others, one warp is late with theirs."""
    own = {(batch, capacity): triton_config(batch, 3, 64, 2, capacity, sparse=True) for batch in (200, 400) for capacity in (900, 5000)}
    tiles = {case: config[:2] for case, config in own.items()}
    assert tiles[200, 900] == tiles[200, 5000] == tiles[400, 5000] == (64, 2) and tiles[400, 900] == (16, 1)
    assert {case for case, config in own.items() if config.most_rows} == {(200, 5000), (400, 5000)}
    assert not triton_config(400, 3, 64, 2, 5000).most_rows  # densely they read all their rows, some hundreds more or less


def test_sequences_are_divided_by_their_share_or_by_their_length_never_by_both():
    config = triton_config(400, 3, 64, 2, 20_480, sparse=True)
    assert config.most_rows and not config.splits
    config = triton_config(400, 3, 64, 2, 20_481, sparse=True)  # a sequence alone would hold up the others
    assert config.splits and not config.most_rows


def test_settings_divide_the_heads_and_lower_for_cuda():
    """Two kv heads share a program only where there are enough of them."""
    config = triton_config(32, 32, 128, 2, 2048)
    assert config.kv_heads == 2
    assert {triton_config(batch, kv_heads, 128, 2, 2048).kv_heads for batch, kv_heads in [(1, 32), (32, 8), (999, 3)]} == {1}
    case = Case("mha_32", "", (40,) * 32, 32, 32, 128)
    attend = functools.partial(triton.triton_attention, scale=0.1, config=config)
    assert "__gpu$xla.gpu.triton" in cuda_lowering(attend, *shapes(case, jnp.bfloat16, jnp.bfloat16))


@pytest.mark.parametrize("name, dtype", [("kv_8", jnp.float16), ("kv_16", jnp.bfloat16)])
def test_mosaic_lowers_for_cuda(name, dtype):
    case = CASE[name]
    config = mosaic_config(len(case.counts), case.num_kv_heads, case.head_size, case.capacity)
    attend = functools.partial(mosaic.mosaic_attention, scale=0.1, config=config)
    assert "mosaic_gpu" in cuda_lowering(attend, *shapes(case, dtype, dtype))


def test_mosaic_says_what_it_cannot_do():
    four, eight = arguments(dtype=jnp.bfloat16, heads=4, kv_heads=4), arguments(dtype=jnp.float32, heads=8, kv_heads=8)
    assert "multiple of 8, got 4" in mosaic.unsupported_reason(four["q"], four["k_pool"], False)
    assert "bfloat16 or float16, got float32" in mosaic.unsupported_reason(eight["q"], eight["k_pool"], False)
