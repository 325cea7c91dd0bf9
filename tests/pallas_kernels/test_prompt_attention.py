"""The attention of prompts over pooled rows against a float64 oracle, within measured error budgets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import PromptMask, prompt_attention
from pallas_kernels.prompt_attention import api, unsupported_reason
from pallas_kernels.prompt_attention.heuristics import LOCAL_BLOCK
from pallas_kernels.tiles import list_tiles
from tests.pallas_kernels.budget import error, gpu_run, program, round_to, run
from tests.pallas_kernels.cases.prompt_attention import CASE, CASES, Problem, make_problem
from tests.pallas_kernels.lowering import cuda_lowering

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

HALF = {"causal_chunk": ml_dtypes.bfloat16, "local_chunk": ml_dtypes.bfloat16, "gqa_3_scale": np.float16, "head_128": ml_dtypes.bfloat16}
MOSAIC = ("causal", "causal_chunk", "gqa_3_scale", "causal_128")  # which tests run on a GPU only
FLOAT32 = [run(CASE[name], np.float32, "reference") for name in ("causal_ragged", "local_chunk", "gqa_3_scale")]
FLOAT32 += [run(case, np.float32, "triton", True) for case in CASES if case.name not in HALF]
HALF_PRECISION = [run(CASE[name], dtype, "triton", True) for name, dtype in HALF.items()]
HALF_PRECISION += [gpu_run(case, HALF.get(case.name, ml_dtypes.bfloat16), "triton") for case in CASES]
HALF_PRECISION += [gpu_run(CASE[name], HALF.get(name, ml_dtypes.bfloat16), "mosaic") for name in MOSAIC]


def attention(problem: Problem, rounded=lambda x: x) -> np.ndarray:
    """The output by the textbook, one head of one prompt at a time; matrix products are of and to `rounded` numbers."""
    out, case = np.zeros_like(problem.q), problem.case
    scale = case.head_size**-0.5 if case.scale is None else case.scale
    for b, n in np.ndindex(len(problem.lengths), case.num_heads):
        rows = slice(b * case.num_keys, (b + 1) * case.num_keys)
        keys, values = (rounded(x[rows, n * case.num_kv_heads // case.num_heads]) for x in (problem.k, problem.v))
        scores = np.where(problem.mask[b], rounded(rounded(problem.q[b, :, n]) @ keys.T) * scale, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[b, :, n] = rounded(rounded(weights / weights.sum(axis=1, keepdims=True)) @ values)
    return out[of_prompts(problem)]


def of_prompts(problem: Problem) -> np.ndarray:
    """Which queries [B, T] are of prompts; those after the end give anything."""
    return problem.case.first_query + np.arange(problem.case.num_queries)[None] < problem.lengths[:, None]


def make_mask(problem: Problem, first_query=None) -> PromptMask:
    case = problem.case
    first = case.first_query if first_query is None else first_query
    lengths = jnp.asarray(problem.lengths, jnp.int32)
    if case.window_tokens is None:
        return PromptMask.causal(first, lengths, num_keys=case.num_keys)
    labels = jnp.asarray(problem.labels, jnp.int32)
    queries = labels[:, case.first_query : case.first_query + case.num_queries]
    return PromptMask.local(first, lengths, queries, labels, num_labels=case.num_labels, window_tokens=case.window_tokens)


@functools.cache
def compiled(implementation, interpret, scale):
    return program(functools.partial(prompt_attention, scale=scale, implementation=implementation, interpret=interpret), interpret)


def attend(problem: Problem, dtype, implementation, interpret=False, **mask) -> np.ndarray:
    q, k, v = (jnp.asarray(x, dtype) for x in (problem.q, problem.k, problem.v))
    out = compiled(implementation, interpret, problem.case.scale)(q, k, v, make_mask(problem, **mask))
    assert out.dtype == dtype and out.shape == q.shape
    return np.asarray(out).astype(np.float64)[of_prompts(problem)]


@pytest.mark.parametrize("case, dtype, implementation, interpret", FLOAT32)
def test_float32_matches_oracle(case, dtype, implementation, interpret):
    problem = round_to(make_problem(case), dtype)
    np.testing.assert_allclose(attend(problem, dtype, implementation, interpret), attention(problem), atol=1e-5, rtol=1e-4)


def error_units(out, problem, dtype) -> float:
    return error(out, attention(problem, lambda x: x.astype(dtype).astype(np.float64)), attention(problem))


@pytest.mark.parametrize("case, dtype, implementation, interpret", HALF_PRECISION)
def test_half_precision_within_budget(case, dtype, implementation, interpret):
    problem = round_to(make_problem(case), dtype)
    assert error_units(attend(problem, dtype, implementation, interpret), problem, dtype) < 2


SABOTAGE = {
    "swapped K and V": lambda p: dataclasses.replace(p, k=p.v, v=p.k),
    "zeros": lambda p: dataclasses.replace(p, v=np.zeros_like(p.v)),
    "scale off by 2%": lambda p: dataclasses.replace(p, case=dataclasses.replace(p.case, scale=1.02 * p.case.head_size**-0.5)),
    "a window that is one token longer": lambda p: dataclasses.replace(p, case=dataclasses.replace(p.case, window_tokens=17)),
    "labels of the token before": lambda p: dataclasses.replace(p, labels=np.roll(p.labels, 1, axis=1)),
    "another prompt's rows": lambda p: dataclasses.replace(p, k=np.roll(p.k, p.case.num_keys, axis=0)),
}


def test_budget_has_teeth():
    problem = round_to(make_problem(CASE["local_chunk"]), ml_dtypes.bfloat16)
    exact, plain = attention(problem), attention(problem, lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float64))
    wrong = {name: attend(change(problem), ml_dtypes.bfloat16, "reference") for name, change in SABOTAGE.items()}
    wrong["queries one place on"] = attend(problem, ml_dtypes.bfloat16, "reference", first_query=problem.case.first_query + 1)
    units = {name: error(out, plain, exact) for name, out in wrong.items()}
    assert min(units.values()) > 2, units


@pytest.mark.parametrize("name", ["causal_chunk", "local"])
def test_what_no_tile_lists_is_not_read(name):
    """NaN in tiles that no query of the chunk needs, and in rows beyond the prompts, change nothing."""
    problem = round_to(make_problem(CASE[name]), np.float32)
    clean = attend(problem, jnp.float32, "triton", True)
    block_k = LOCAL_BLOCK if name == "local" else 64
    num_tiles = problem.case.num_keys // block_k
    needed = problem.mask.any(axis=1).reshape(len(problem.lengths), num_tiles, -1).any(axis=2)
    for b, tile in np.argwhere(~needed):
        first = b * problem.case.num_keys + tile * block_k
        problem.k[first : first + block_k] = problem.v[first : first + block_k] = np.nan
    problem.k[-40:] = problem.v[-40:] = np.nan
    np.testing.assert_array_equal(attend(problem, jnp.float32, "triton", True), clean)


@pytest.mark.parametrize("name", ["local", "local_chunk", "window", "own_only"])
def test_tiles_that_are_listed_are_those_with_pairs(name):
    problem = make_problem(CASE[name])
    mask = make_mask(problem)
    block_q, block_k = mask.blocks
    shape = (len(problem.lengths), problem.case.num_queries // block_q, block_q, -1, block_k)
    used = of_prompts(problem).reshape(shape[:3]).any(axis=2)
    needed = problem.mask.reshape(shape).any(axis=(2, 4)) & used[:, :, None]
    for b, i in np.ndindex(needed.shape[:2]):
        count = int(mask.key_counts[b, 0, i, 1])
        assert sorted(np.asarray(mask.key_tiles[b, 0, i, :count])) == list(np.flatnonzero(needed[b, i])), (b, i)
    pairs, real = np.asarray(mask.pairs(problem.case.num_queries)), of_prompts(problem)
    np.testing.assert_array_equal(pairs[:, 0][real], problem.mask[real])


RUNS = [("reference", False, (64, 64), jnp.float32), ("triton", True, (64, 64), jnp.float32), ("triton", True, (128, 128), jnp.float32)]
RUNS += [pytest.param("mosaic", False, (128, block_k), jnp.bfloat16, marks=pytest.mark.gpu) for block_k in (64, 128)]


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("implementation, interpret, blocks, dtype", RUNS)
def test_tiles_may_be_listed_for_each_head(num_heads, implementation, interpret, blocks, dtype):
    """Of causal prompts some tiles only, others for every head, or the same for all; an offset of one and a half tiles."""
    rng, num_keys, num_queries, first = np.random.default_rng(2), 512, 256, 192
    shapes = (1, num_queries, 4, 64), (num_keys, 2, 64), (num_keys, 2, 64)
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    position, key = first + np.arange(num_queries)[:, None], np.arange(num_keys)[None]
    tiles = (num_queries // blocks[0], blocks[0], num_keys // blocks[1], blocks[1])
    some, every = ((key <= position).reshape(tiles).any((1, 3)), (key <= position).reshape(tiles).all((1, 3)))
    kept = some & ~every | some & (rng.random((1, num_heads, tiles[0], tiles[2])) < 0.5)
    kept[..., 0] = True
    listed, counts = list_tiles(jnp.asarray(kept), jnp.asarray(kept & every))
    causal = PromptMask.causal(first, jnp.array([512]), num_keys=num_keys)
    mask = dataclasses.replace(causal, key_tiles=listed, key_counts=counts, blocks=blocks)
    out = compiled(implementation, interpret, None)(q, k, v, mask)
    pairs = np.broadcast_to(kept, (1, 4, *kept.shape[2:])).repeat(blocks[0], axis=2).repeat(blocks[1], axis=3) & (key <= position)
    for n in range(4):
        scores = np.asarray(q[0, :, n], np.float64) @ np.asarray(k[:, n // 2], np.float64).T / 8
        weights = np.where(pairs[0, n], np.exp(scores), 0)
        expected = weights @ np.asarray(v[:, n // 2], np.float64) / weights.sum(axis=1, keepdims=True)
        tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == jnp.float32 else {"atol": 2e-2}
        np.testing.assert_allclose(np.asarray(out[0, :, n], np.float64), expected, **tolerance)


def arguments(**changes):
    q, pool = jnp.ones((2, 64, 4, 64)), jnp.ones((256, 2, 64))
    mask = PromptMask.causal(0, jnp.array([64, 64]), num_keys=128)
    return {"q": q, "k_pool": pool, "v_pool": pool, "mask": mask} | changes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": jnp.ones((2, 64, 64))}, r"q must be bfloat16, float16 or float32 \[B, T, N, H\]"),
        ({"q": jnp.ones((2, 64, 3, 64))}, "3 query heads must be a multiple of the 2 kv heads"),
        ({"v_pool": jnp.ones((255, 2, 64))}, "v_pool must be"),
        ({"k_pool": jnp.ones((255, 2, 64)), "v_pool": jnp.ones((255, 2, 64))}, "must have 2 times 128 rows"),
        ({"q": jnp.ones((1, 64, 4, 64))}, "must be of 1 sequences"),
        ({"q": jnp.ones((2, 63, 4, 64))}, "must be multiples of 64, got 63, 128"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    named = arguments(**change)
    positional = [named.pop(name) for name in ("q", "k_pool", "v_pool", "mask")]
    with pytest.raises(ValueError, match=message):
        prompt_attention(*positional, **named)


def test_backends_say_what_they_cannot_do(monkeypatch):
    monkeypatch.setattr(api, "device_reason", lambda *_: None)
    local, causal = make_problem(CASE["local"]), make_problem(CASE["one_tile"])
    for problem, dtype, reason in [
        (local, jnp.bfloat16, "masks by labels are only in triton"),
        (causal, jnp.float32, "dtype must be bfloat16 or float16, got float32"),
        (causal, jnp.bfloat16, "queries must be a multiple of 128, got 64"),
    ]:
        q, pool = (jax.ShapeDtypeStruct(x.shape, dtype) for x in (problem.q, problem.k))
        assert reason in unsupported_reason("mosaic", q, pool, make_mask(problem))
    shape = jax.ShapeDtypeStruct
    q, pool, mask = (
        shape((1, 128, 2, 64), jnp.bfloat16),
        shape((2049, 2, 64), jnp.bfloat16),
        PromptMask.causal(0, jnp.ones(1), num_keys=128),
    )
    assert "pool rows must be a multiple of 8, got 2049" in unsupported_reason("mosaic", q, pool, mask)
    assert "head size must be 32, 64 or 128, got 96" in unsupported_reason("triton", shape((1, 64, 2, 96), jnp.bfloat16), pool, mask)


LOWERINGS = [("causal_chunk", jnp.bfloat16, "triton"), ("local_chunk", jnp.bfloat16, "triton"), ("head_128", jnp.float32, "triton")]
LOWERINGS += [(name, jnp.bfloat16, "mosaic") for name in ("causal_chunk", "causal_128")]


@pytest.mark.parametrize("name, dtype, implementation", LOWERINGS)
def test_lowers_for_cuda(name, dtype, implementation, monkeypatch):
    monkeypatch.setattr(api, "device_reason", lambda *_: None)
    problem = make_problem(CASE[name])
    q, k, v = (jax.ShapeDtypeStruct(x.shape, dtype) for x in (problem.q, problem.k, problem.v))

    def two_layers(q, k, v, mask):
        attend = functools.partial(prompt_attention, k_pool=k, v_pool=v, mask=mask, implementation=implementation)
        return attend(attend(2 * q))  # arguments of a program are lowered apart from what it computes

    lowered = cuda_lowering(two_layers, q, k, v, make_mask(problem))
    assert lowered.count({"triton": "__gpu$xla.gpu.triton", "mosaic": "custom_call @mosaic_gpu"}[implementation]) == 1  # for both layers
