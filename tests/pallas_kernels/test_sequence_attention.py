"""The output and the gradients of every implementation against a float64 oracle, within measured error budgets.

On a machine without a GPU the Pallas kernels run in the interpreter and are lowered for CUDA;
with one, the tests marked `gpu` run the cases in half precision, for which the kernels are, on it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import PackedMask, TileMask, masked_attention
from pallas_kernels.sequence_attention import api, unsupported_reason
from tests.pallas_kernels.budget import error, gpu_run, program, rms, round_to, run
from tests.pallas_kernels.cases.sequence_attention import CASE, CASES, PACKED, Case, Problem, blocks, causal, make_problem, spotted
from tests.pallas_kernels.lowering import cuda_lowering

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

RESULTS = ("out", "dq", "dk", "dv")

# The interpreter runs each case once, in float32 or in half precision, since it compiles each for seconds; the reference has no tiles,
# so that few shapes are enough.
HALF = {name: ml_dtypes.bfloat16 for name in ("blocks_gaps", "gqa_3", "head_32", "head_128")} | {"odd_length": np.float16}
FLOAT32 = [run(CASE[name], np.float32, "reference") for name in ("nothing", "gqa_3", "few_queries", "mqa_scale")]
FLOAT32 += [run(case, np.float32, "triton", True) for case in CASES if case.name not in HALF]
HALF_PRECISION = [run(CASE[name], dtype, "triton", True) for name, dtype in HALF.items()]
HALF_PRECISION += [gpu_run(CASE[name], dtype, "triton") for name, dtype in HALF.items()]
HALF_PRECISION += [gpu_run(PACKED, dtype, "mosaic") for dtype in (ml_dtypes.bfloat16, np.float16)]


# The oracle, and how wrong an implementation may be.


def as_is(x):
    return x


def attention(problem: Problem, rounded=as_is) -> dict[str, np.ndarray]:
    """Output and gradients by the textbook, one head of one sequence at a time; matrix products are of and to `rounded` numbers."""
    q, k, v, grad = (rounded(x) for x in (problem.q, problem.k, problem.v, problem.grad))
    results = {"out": np.zeros_like(q), "dq": np.zeros_like(q), "dk": np.zeros_like(k), "dv": np.zeros_like(v)}
    group = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if problem.scale is None else problem.scale
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            queries, keys, values, g = q[b, :, n], k[b, :, n // group], v[b, :, n // group], grad[b, :, n]
            scores = np.where(problem.mask[b], rounded(queries @ keys.T) * scale, -np.inf)
            weights = np.exp(scores - np.maximum(scores.max(axis=1, keepdims=True), -1e9))
            weights = rounded(weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300))
            dweights = rounded(g @ values.T)
            dscores = rounded(weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True)) * scale)
            results["out"][b, :, n] = rounded(weights @ values)
            results["dq"][b, :, n] = dscores @ keys
            results["dk"][b, :, n // group] += dscores.T @ queries
            results["dv"][b, :, n // group] += weights.T @ g
    return {name: rounded(result) for name, result in results.items()}


def errors(results: dict[str, np.ndarray], problem: Problem, dtype) -> dict[str, float]:
    """The error of each result in units of that of plain attention; the budget is 2."""
    exact, plain = attention(problem), attention(problem, lambda x: x.astype(dtype).astype(np.float64))
    return {name: error(results[name], plain[name], exact[name]) for name in RESULTS}


def within_budget(results: dict[str, np.ndarray], problem: Problem, dtype) -> bool:
    return all(error < 2 for error in errors(results, problem, dtype).values())


@functools.cache
def compiled(implementation, interpret, scale):
    def both(q, k, v, grad, mask):
        tiles = PackedMask.of(jnp.argmax(mask, axis=2)) if implementation == "mosaic" else TileMask.of(mask)
        attend = functools.partial(masked_attention, scale=scale, implementation=implementation, interpret=interpret)
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, tiles), q, k, v)
        return out, *backward(grad)

    return program(both, interpret)


def attend(problem: Problem, dtype, implementation, interpret=False) -> dict[str, np.ndarray]:
    q, k, v, grad = (jnp.asarray(x, dtype) for x in (problem.q, problem.k, problem.v, problem.grad))
    results = compiled(implementation, interpret, problem.scale)(q, k, v, grad, jnp.asarray(problem.mask))
    for result, argument in zip(results, (q, q, k, v), strict=True):
        assert result.dtype == dtype and result.shape == argument.shape
    return {name: np.asarray(result).astype(np.float64) for name, result in zip(RESULTS, results, strict=True)}


@pytest.mark.parametrize("case, dtype, implementation, interpret", FLOAT32)
def test_float32_matches_oracle(case, dtype, implementation, interpret):
    problem = round_to(make_problem(case), dtype)
    results, exact = attend(problem, dtype, implementation, interpret), attention(problem)
    for name in RESULTS:
        np.testing.assert_allclose(results[name], exact[name], atol=1e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("case, dtype, implementation, interpret", HALF_PRECISION)
def test_half_precision_within_budget(case, dtype, implementation, interpret):
    problem = round_to(make_problem(case), dtype)
    assert within_budget(attend(problem, dtype, implementation, interpret), problem, dtype)


SABOTAGE = {
    "swapped K and V": lambda p: dataclasses.replace(p, k=p.v, v=p.k),
    "one pair too many for each query": lambda p: dataclasses.replace(p, mask=p.mask | np.eye(p.mask.shape[1], k=1, dtype=bool)),
    "scale off by 2%": lambda p: dataclasses.replace(p, scale=1.02 * p.q.shape[3] ** -0.5),
    "another sequence's mask": lambda p: dataclasses.replace(p, mask=p.mask[::-1]),
}


def test_budget_has_teeth():
    """Each of the four results sees each sabotage, and one of zeros alone is seen."""
    problem = round_to(make_problem(Case("teeth", "", (blocks, blocks), 160)), ml_dtypes.bfloat16)
    right, *wrong = (attend(change(problem), ml_dtypes.bfloat16, "reference") for change in (as_is, *SABOTAGE.values()))
    exact, plain = attention(problem), attention(problem, lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float64))
    for result in RESULTS:
        units = {name: error(found[result], plain[result], exact[result]) for name, found in zip(SABOTAGE, wrong, strict=True)}
        assert min(units.values()) > 2 > error(right[result], plain[result], exact[result]), (result, units)
        assert error(np.zeros_like(exact[result]), plain[result], exact[result]) > 2, result


def test_what_is_not_allowed_is_not_read():
    """NaN in keys and values of tiles without any pair change no result."""
    problem = round_to(make_problem(CASE["blocks_gaps"]), np.float32)
    problem.mask[:, :, 64:128] = False
    clean = attend(problem, jnp.float32, "triton", True)
    problem.k[:, 64:128] = problem.v[:, 64:128] = np.nan
    dirty = attend(problem, jnp.float32, "triton", True)
    for name in RESULTS:
        np.testing.assert_array_equal(clean[name], dirty[name], err_msg=name)


# The mask as the kernels read it.


@pytest.mark.parametrize("tile", [(64, 64), (32, 64), (128, 32)], ids=str)
@pytest.mark.parametrize("name", ["blocks_gaps", "odd_length", "one_token"])
def test_a_mask_is_packed_without_loss(name, tile):
    mask = make_problem(CASE[name]).mask
    tiles = jax.jit(TileMask.of, static_argnums=1)(jnp.asarray(mask), tile)
    np.testing.assert_array_equal(jax.jit(TileMask.unpacked)(tiles), mask)
    assert (tiles.block_q, tiles.block_k) == tile
    padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % tile[0]), (0, -mask.shape[2] % tile[1])))
    allowed = padded.reshape(len(mask), -1, tile[0], padded.shape[2] // tile[1], tile[1]).mean((2, 4))
    for b, i in np.ndindex(allowed.shape[:2]):
        partial, needed = np.asarray(tiles.key_counts[b, i])
        assert set(np.asarray(tiles.key_tiles[b, i, :partial])) == set(np.flatnonzero((allowed[b, i] > 0) & (allowed[b, i] < 1)))
        assert set(np.asarray(tiles.key_tiles[b, i, partial:needed])) == set(np.flatnonzero(allowed[b, i] == 1))
    for b, j in np.ndindex(allowed.shape[0], allowed.shape[2]):
        partial, needed = np.asarray(tiles.query_counts[b, j])
        assert set(np.asarray(tiles.query_tiles[b, j, :partial])) == set(np.flatnonzero((allowed[b, :, j] > 0) & (allowed[b, :, j] < 1)))
        assert set(np.asarray(tiles.query_tiles[b, j, partial:needed])) == set(np.flatnonzero(allowed[b, :, j] == 1))


def test_packed_rows_are_a_mask_without_loss():
    """Rows of sequences from one token to many tiles long: what is listed, cut and counted is what the mask of pairs says."""
    segments = np.repeat(np.arange(9)[None], [1, 126, 2, 1, 60, 194, 128, 100, 28], axis=1)
    segments = np.concatenate([segments, np.zeros_like(segments)]).astype(np.int32)
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(640, dtype=bool)
    packed = jax.jit(PackedMask.of)(jnp.asarray(segments))
    np.testing.assert_array_equal(packed.unpacked(), mask)
    np.testing.assert_array_equal(packed.keys_of_queries(), mask.sum(axis=2))
    allowed = mask.reshape(2, 5, 128, 5, 128).mean((2, 4))
    for lists, counts, pairs in (
        (packed.key_tiles, packed.key_counts, allowed),
        (packed.query_tiles, packed.query_counts, allowed.swapaxes(1, 2)),
    ):
        for at in np.ndindex(2, 5):
            partial, needed = np.asarray(counts[at])
            assert {*np.asarray(lists[at][:partial])} == {*np.flatnonzero((pairs[at] > 0) & (pairs[at] < 1))}
            assert {*np.asarray(lists[at][partial:needed])} == {*np.flatnonzero(pairs[at] == 1)}


@pytest.mark.parametrize("num_queries", [128, 300])
def test_a_mask_made_in_chunks_is_the_mask(num_queries):
    rng = np.random.default_rng(0)
    mask = jnp.asarray(np.stack([spotted(rng, num_queries, 100), blocks(rng, num_queries, 100)]))
    sizes = []

    def rows(first, count):
        sizes.append(count)
        return jax.lax.dynamic_slice_in_dim(mask, first, count, axis=1)

    chunked = jax.jit(lambda: TileMask.of_rows(rows, 2, num_queries, 100, max_elements=2 * 128 * 100))()
    assert max(sizes) == 128
    for one, other in zip(jax.tree.leaves(chunked), jax.tree.leaves(jax.jit(TileMask.of)(mask)), strict=True):
        np.testing.assert_array_equal(one, other)


# What callers may get wrong.


def arguments(batch=2, queries=4, keys=4, heads=4, kv_heads=2, head_size=64, dtype=jnp.float32):
    """Arrays that fit together, by name."""
    k = jnp.ones((batch, keys, kv_heads, head_size), dtype)
    mask = TileMask.of(jnp.ones((batch, queries, keys), bool))
    return {"q": jnp.ones((batch, queries, heads, head_size), dtype), "k": k, "v": k, "mask": mask}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": jnp.ones((2, 4, 64))}, r"q must be \[B, T, N, H\]"),
        ({"q": jnp.ones((2, 4, 3, 64))}, "3 query heads must be a multiple of the 2 kv heads"),
        ({"q": jnp.ones((2, 4, 4, 32))}, "must share batch and head size"),
        ({"q": jnp.ones((2, 4, 4, 64), jnp.bfloat16)}, "k and v must agree and have the dtype bfloat16 of q"),
        ({"q": jnp.ones((2, 4, 4, 64), jnp.int32)}, "q must be bfloat16, float16 or float32"),
        ({"v": jnp.ones((2, 5, 2, 64))}, "k and v must agree"),
        ({"mask": TileMask.of(jnp.ones((2, 4, 5), bool))}, r"\[B, T, S\] = \[2, 4, 4\], got \[2, 4, 5\]"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
        ({"scale": 0.0}, "scale must be above 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    named = arguments() | change
    positional = [named.pop(name) for name in ("q", "k", "v", "mask")]
    with pytest.raises(ValueError, match=message):
        masked_attention(*positional, **named)


def test_backend_says_what_it_cannot_do():
    odd = arguments(head_size=96)
    assert "head size must be 32, 64 or 128, got 96" in unsupported_reason("triton", 96, interpret=True)
    with pytest.raises(NotImplementedError, match="'triton': head size"):
        masked_attention(*odd.values(), implementation="triton", interpret=True)
    np.testing.assert_allclose(masked_attention(*odd.values()), 1.0, rtol=1e-6)  # None picks one that can


def test_packed_rows_have_kernels_of_their_own(monkeypatch):
    rows = arguments(queries=128, keys=128) | {"mask": PackedMask.of(jnp.zeros((2, 128), jnp.int32))}
    np.testing.assert_allclose(masked_attention(*rows.values()), 1.0, rtol=1e-5)
    monkeypatch.setattr(api, "device_reason", lambda *_: None)
    for named, change, reason in (
        ("triton", {}, "masks of packed rows are only in mosaic"),
        ("mosaic", {}, "the dtype must be bfloat16 or float16, got float32"),
        ("mosaic", arguments(queries=128, keys=128, dtype=jnp.bfloat16), "masks in bits are only in triton"),
        ("mosaic", arguments(head_size=128), "head size must be 64, got 128"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            masked_attention(*(rows | change).values(), implementation=named)
    with pytest.raises(ValueError, match="multiples of 128 tokens"):
        PackedMask.of(jnp.zeros((2, 130), jnp.int32))


@pytest.mark.parametrize("shape", [{"batch": 0}, {"queries": 0}, {"keys": 0}])
def test_nothing_to_do(shape):
    args = arguments(**shape)
    out = masked_attention(*args.values())
    assert out.shape == args["q"].shape and not out.any()


def gradients_of_two_layers(implementation):
    """Two layers, in whose program each kernel is only once: lowering them takes seconds a layer otherwise."""

    def compute(q, k, v, grad, mask):
        attend = functools.partial(masked_attention, mask=mask, implementation=implementation)
        q, k, v, grad = (2 * x for x in (q, k, v, grad))  # arguments of a program are lowered apart from what it computes
        return jax.vjp(lambda q, k, v: attend(2 * attend(q, k, v), k, v), q, k, v)[1](grad)

    return compute


@pytest.mark.parametrize("name, dtype", [("gqa_3", jnp.bfloat16), ("head_128", jnp.float32)])
def test_lowers_for_cuda(name, dtype, monkeypatch):
    monkeypatch.setattr(api, "device_reason", lambda *_: None)
    case = CASE[name]
    q = jax.ShapeDtypeStruct((1, case.num_queries, case.num_heads, case.head_size), dtype)
    k = jax.ShapeDtypeStruct((1, case.num_queries, case.num_kv_heads, case.head_size), dtype)
    mask = jax.eval_shape(TileMask.of, jax.ShapeDtypeStruct((1, case.num_queries, case.num_queries), bool))

    assert cuda_lowering(gradients_of_two_layers("triton"), q, k, k, q, mask).count("__gpu$xla.gpu.triton") == 3


def test_packed_rows_lower_for_cuda(monkeypatch):
    monkeypatch.setattr(api, "device_reason", lambda *_: None)
    q, k, ids = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1, 256, 6, 64), jnp.bfloat16), ((1, 256, 2, 64), jnp.bfloat16), ((1, 256), jnp.int32))
    )

    mask = jax.eval_shape(PackedMask.of, ids)
    assert cuda_lowering(gradients_of_two_layers("mosaic"), q, k, k, q, mask).count("custom_call @mosaic_gpu") == 3


@pytest.mark.gpu
@pytest.mark.parametrize("tile, head_size", [((64, 64), 128), ((128, 64), 64)], ids=str)
def test_tiles_do_not_change_the_answer(tile, head_size):
    """On real sizes: several heads, several thousand tokens."""
    rng = np.random.default_rng(1)
    mask = jnp.asarray(np.stack([causal(rng, 1000, 1000), blocks(rng, 1000, 1000)]))
    q, k, v, grad = (jnp.asarray(rng.normal(size=(2, 1000, 4, head_size)), jnp.bfloat16) for _ in range(4))

    def both(implementation, tiles):
        return jax.vjp(lambda *args: masked_attention(*args, tiles, implementation=implementation), q, k, v)[1](grad)

    for found, expected in zip(both("triton", TileMask.of(mask, tile)), both("reference", TileMask.of(mask)), strict=True):
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        assert rms(found - expected) < 0.01 * rms(expected)
