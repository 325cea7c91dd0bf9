"""Products of few rows against a float64 oracle, within measured error budgets.

On a machine without a GPU the Pallas kernel runs in the interpreter and is lowered for CUDA; with one, the tests marked
`gpu` run the same cases on it.
"""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks.linear import MATRICES
from pallas_kernels import QuantizedWeight, ScaledRows, SplitRows, fused_linear, look_up, may_launch_early, quantize_weight, silu_and_mul
from pallas_kernels.linear import expected_bytes, lookup, many_rows, mosaic, unsupported_reason
from pallas_kernels.linear.heuristics import (
    MAX_SHARED_BYTES,
    LinearConfig,
    TileConfig,
    is_fastest,
    is_tiled,
    linear_config,
    mosaic_config,
    mosaic_shared_bytes,
    tile_config,
)
from pallas_kernels.linear.mosaic import mosaic_linear
from pallas_kernels.linear.triton import padded_rows, triton_linear
from pallas_kernels.linear.triton_tiled import triton_tiled_linear
from tests.pallas_kernels.budget import INTERPRET, KERNELS, error, gpu_run, program, rms, round_to, run
from tests.pallas_kernels.cases.linear import CASE, CASES, MANY_ROWS, Case, Problem, make_problem, shared_memory_bytes
from tests.pallas_kernels.lowering import cuda_lowering

ALL = [("reference", False), ("xla", False), *KERNELS]

# The interpreter runs each case once, in one dtype, since it compiles each for a second; XLA has no tiles, so that few shapes, with
# everything that can be fused, are enough. A GPU runs all.
FLOAT32 = ("batch_1", "batch_8", "qkv", "all_of_it", "odd_gate", "inputs_576")
FLOAT16 = ("batch_3", "batch_33")
INT8 = ("qkv", "all_of_it", "odd_gate", "batch_33")
PLAIN = [CASE[name] for name in ("o", "qkv", "all_of_it")]
FLOAT32_RUNS = [run(CASE[name], np.float32, "triton", True) for name in FLOAT32]
FLOAT32_RUNS += [run(case, np.float32, name) for case in PLAIN for name in ("reference", "xla")]
FLOAT32_RUNS += [gpu_run(case, np.float32, "triton") for case in CASES]
HALF_RUNS = [run(case, ml_dtypes.bfloat16, "triton", True) for case in CASES if case.name not in (*FLOAT32, *FLOAT16, "o", "gate_up")]
HALF_RUNS += [run(case, ml_dtypes.bfloat16, name) for case in PLAIN for name in ("reference", "xla")]
HALF_RUNS += [run(CASE[name], np.float16, "triton", True) for name in FLOAT16] + [run(CASE["batch_3"], np.float16, "xla")]
HALF_RUNS += [gpu_run(case, ml_dtypes.bfloat16, "triton") for case in CASES]
HALF_RUNS += [gpu_run(CASE[name], np.float16, "triton") for name in FLOAT16]
INT8_RUNS = [run(CASE[name], ml_dtypes.bfloat16, "triton", True) for name in INT8]
INT8_RUNS += [run(CASE["all_of_it"], ml_dtypes.bfloat16, name) for name in ("reference", "xla")]
INT8_RUNS += [gpu_run(CASE[name], ml_dtypes.bfloat16, "triton") for name in INT8]


def silu(x):
    return x / (1.0 + np.exp(-x))


def oracle(problem: Problem) -> np.ndarray:
    """The formula in float64."""
    x = problem.x
    if problem.norm is not None:
        x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + problem.norm_eps) * problem.norm
    out = x @ problem.weight.T
    out = out if problem.bias is None else out + problem.bias
    if problem.gated:
        half = out.shape[1] // 2
        out = silu(out[:, :half]) * out[:, half:]
    return out if problem.residual is None else out + problem.residual


def plain(problem: Problem, dtype) -> np.ndarray:
    """What a Llama written down in `dtype` gives: rounded after the norm, its scale, the product, silu, the gate and the sum."""

    def rounded(x):
        return x.astype(dtype).astype(np.float32)

    x = rounded(problem.x)
    if problem.norm is not None:
        x = rounded(x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + np.float32(problem.norm_eps)))
        x = rounded(x * rounded(problem.norm))
    out = rounded(x @ rounded(problem.weight).T)
    out = out if problem.bias is None else rounded(out + rounded(problem.bias))
    if problem.gated:
        half = out.shape[1] // 2
        out = rounded(rounded(silu(out[:, :half])) * out[:, half:])
    return out if problem.residual is None else rounded(out + rounded(problem.residual))


def within_budget(out: np.ndarray, problem: Problem, dtype) -> bool:
    return error(out, plain(problem, dtype), oracle(problem)) < 2


def arrays_of(problem: Problem, dtype, weight=lambda weight: weight):
    """x, weight, norm, bias and residual as JAX arrays; the norm's scale in float32, as models keep it."""

    def array(x, dtype=dtype):
        return None if x is None else jnp.asarray(x, dtype)

    weight, norm = weight(array(problem.weight)), array(problem.norm, jnp.float32)
    return array(problem.x), weight, norm, array(problem.bias), array(problem.residual)


@functools.cache
def compiled(implementation, interpret, gated, norm_eps, out_dtype):
    options = {"gated": gated, "norm_eps": norm_eps, "out_dtype": out_dtype, "implementation": implementation, "interpret": interpret}

    def product(x, weight, norm, bias, residual):
        return fused_linear(x, weight, norm=norm, bias=bias, residual=residual, **options)

    return program(product, interpret)


def product(problem: Problem, dtype, implementation, interpret=False, weight=lambda weight: weight, out_dtype=None) -> np.ndarray:
    function = compiled(implementation, interpret, problem.gated, problem.norm_eps, out_dtype)
    x, *rest = arrays_of(problem, dtype, weight)
    out = function(x, *rest)
    assert out.dtype == (out_dtype or x.dtype) and out.shape == oracle(problem).shape
    return np.asarray(out).astype(np.float64)


@pytest.mark.parametrize("case, dtype, implementation, interpret", FLOAT32_RUNS)
def test_float32_matches_oracle(case, dtype, implementation, interpret):
    problem = round_to(make_problem(case), dtype)
    np.testing.assert_allclose(product(problem, dtype, implementation, interpret), oracle(problem), atol=1e-5, rtol=2e-5)


@pytest.mark.parametrize("case, dtype, implementation, interpret", HALF_RUNS)
def test_half_precision_within_budget(case, dtype, implementation, interpret):
    problem = round_to(make_problem(case), dtype)
    assert within_budget(product(problem, dtype, implementation, interpret), problem, dtype)


def dequantized(problem: Problem) -> Problem:
    """The problem whose weight is what the int8 weight stands for."""
    weight = jax.jit(quantize_weight)(jnp.asarray(problem.weight, jnp.float32))
    values = np.asarray(weight.values, np.float64) * np.asarray(weight.scales, np.float64)[:, None]
    return dataclasses.replace(problem, weight=values)


@pytest.mark.parametrize("case, dtype, implementation, interpret", INT8_RUNS)
def test_int8_weights(case, dtype, implementation, interpret):
    problem = round_to(make_problem(case), dtype)
    out = product(problem, dtype, implementation, interpret, weight=jax.jit(quantize_weight))
    assert within_budget(out, dequantized(problem), dtype)
    # Rounding the weights costs more than the computation: measured 0.6 to 1.1% of the result's RMS.
    exact = oracle(problem)
    assert rms(out - exact) < 0.02 * rms(exact)


@pytest.mark.parametrize("implementation, interpret", ALL)
def test_float32_logits_of_bfloat16_rows(implementation, interpret):
    """Logits are not rounded to bfloat16: the budget is a tenth of what that rounding alone costs."""
    problem = round_to(make_problem(Case("head", "", 2, 200, 256)), ml_dtypes.bfloat16)
    out, exact = product(problem, ml_dtypes.bfloat16, implementation, interpret, out_dtype=jnp.float32), oracle(problem)
    assert rms(out - exact) < 0.1 * rms(exact.astype(ml_dtypes.bfloat16).astype(np.float64) - exact)


SABOTAGE = {
    "gate and up swapped": lambda p: dataclasses.replace(p, weight=np.roll(p.weight, len(p.weight) // 2, axis=0)),
    "no norm scale": lambda p: dataclasses.replace(p, norm=np.ones_like(p.norm)),
    "norm off by 2%": lambda p: dataclasses.replace(p, norm=1.02 * p.norm),
    "no bias": lambda p: dataclasses.replace(p, bias=None),
    "bias of the neighbour": lambda p: dataclasses.replace(p, bias=np.roll(p.bias, 1)),
    "no residual": lambda p: dataclasses.replace(p, residual=None),
    "another row's norm": lambda p: dataclasses.replace(p, x=p.x * 2.0 ** np.arange(len(p.x))[:, None], norm_eps=1e6),
    "outputs one off": lambda p: dataclasses.replace(p, weight=np.roll(p.weight, 1, axis=0)),
    "one input left out": lambda p: dataclasses.replace(p, x=p.x * (np.arange(p.x.shape[1]) > 0)),
    "rows swapped": lambda p: dataclasses.replace(p, x=p.x[::-1]),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_budget_has_teeth(name):
    problem = round_to(make_problem(Case("teeth", "", 4, 96, 256, norm=True, residual=True, gated=True, bias=True)), ml_dtypes.bfloat16)
    out = product(SABOTAGE[name](problem), ml_dtypes.bfloat16, "xla")
    assert not within_budget(out, problem, ml_dtypes.bfloat16)
    assert not within_budget(np.zeros_like(out), problem, ml_dtypes.bfloat16)
    assert within_budget(product(problem, ml_dtypes.bfloat16, "xla"), problem, ml_dtypes.bfloat16)


def test_int8_scales_have_teeth():
    problem = round_to(make_problem(CASE["qkv"]), ml_dtypes.bfloat16)

    def neighbours_scales(weight):
        weight = quantize_weight(weight)
        return QuantizedWeight(weight.values, jnp.roll(weight.scales, 1))

    out = product(problem, ml_dtypes.bfloat16, "triton", True, weight=jax.jit(neighbours_scales))
    assert not within_budget(out, dequantized(problem), ml_dtypes.bfloat16)


# The xla implementation is also the training path.


def test_xla_is_plain_llama_in_bfloat16():
    """Rounded where an ordinary model rounds: equal to one up to the last bit, which sums in another order may turn."""
    problem = round_to(make_problem(CASE["all_of_it"]), ml_dtypes.bfloat16)
    out, expected = product(problem, ml_dtypes.bfloat16, "xla"), plain(problem, ml_dtypes.bfloat16)
    assert np.mean(out == expected) > 0.9
    np.testing.assert_allclose(out, expected, rtol=2**-6, atol=2**-9)


def test_float32_master_weights_are_cast_and_get_float32_gradients():
    problem = round_to(make_problem(CASE["o"]), ml_dtypes.bfloat16)
    x, weight, _, _, residual = arrays_of(problem, jnp.bfloat16, weight=lambda weight: weight.astype(jnp.float32))
    np.testing.assert_array_equal(fused_linear(x, weight, residual=residual), fused_linear(x, weight.astype(x.dtype), residual=residual))
    wanted = np.random.default_rng(1).normal(size=residual.shape).astype(ml_dtypes.bfloat16)

    def loss(weight, residual):
        out = fused_linear(x, weight, residual=residual)
        return jnp.sum(out.astype(jnp.float32) * jnp.asarray(wanted, jnp.float32))

    to_weight, to_residual = jax.grad(loss, argnums=(0, 1))(weight, residual)
    assert to_weight.dtype == jnp.float32
    exact = wanted.astype(np.float64).T @ problem.x
    assert rms(np.asarray(to_weight) - exact) < 0.01 * rms(exact)
    np.testing.assert_array_equal(np.asarray(to_residual, np.float32), wanted.astype(np.float32))


def test_gradient_of_the_kernel_is_refused():
    x, weight = jnp.ones((2, 64)), jnp.ones((32, 64))
    for argument in (0, 1):
        with pytest.raises(NotImplementedError, match="train with implementation='xla'"):
            jax.grad(lambda *args: fused_linear(*args, implementation="triton", interpret=True).sum(), argument)(x, weight)


# Arguments.


def test_leading_axes():
    problem = make_problem(CASE["all_of_it"])
    x, weight, norm, bias, residual = arrays_of(problem, jnp.float32)
    product = compiled(None, False, True, problem.norm_eps, None)
    flat = product(x, weight, norm, bias, residual)
    for leading in ((2, 2), (4, 1, 1)):
        out = product(x.reshape(*leading, -1), weight, norm, bias, residual.reshape(*leading, -1))
        np.testing.assert_array_equal(out, flat.reshape(*leading, -1))
    np.testing.assert_allclose(product(x[0], weight, norm, bias, residual[0]), flat[0], rtol=1e-5, atol=1e-6)
    assert fused_linear(x[:0], weight, gated=True).shape == (0, 48)


def arguments(**change):
    return {"x": jnp.ones((2, 64)), "weight": jnp.ones((32, 64))} | change


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.ones((2, 64), jnp.int32)}, "x must be"),
        ({"weight": jnp.ones((64, 32))}, r"weight must be \[M, D\] with the D = 64 of x, got \[64, 32\]"),
        ({"weight": jnp.ones((32, 64), jnp.bfloat16)}, "weight must be float32"),
        ({"weight": jnp.ones((33, 64)), "gated": True}, "odd M = 33"),
        ({"weight": QuantizedWeight(jnp.ones((32, 64), jnp.int8), jnp.ones((64,)))}, r"scales must be \[M\] = \[32\]"),
        ({"weight": QuantizedWeight(jnp.ones((32, 64), jnp.int32), jnp.ones((32,)))}, "int8 values"),
        ({"norm": jnp.ones((32,))}, r"norm must be a float \[D\] = \[64\]"),
        ({"bias": jnp.ones((64,))}, r"bias must be a float \[M\] = \[32\]"),
        ({"residual": jnp.ones((2, 64))}, r"residual must be a float \[2, 32\]"),
        ({"residual": jnp.ones((2, 32)), "gated": True}, r"residual must be a float \[2, 16\]"),
        ({"out_dtype": jnp.int32}, "out_dtype must be"),
        ({"implementation": "cublas"}, "unknown implementation 'cublas'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        fused_linear(**arguments(**change))


@pytest.mark.parametrize(
    "x, weight, options, message",
    [((2, 72), (32, 72), {}, "multiple of 16, got 72"), ((2, 64), (30, 64), {"gated": True}, "at least 16 outputs, got 15")],
)
def test_kernel_says_what_it_cannot_do(x, weight, options, message):
    x, weight = jnp.ones(x), jnp.ones(weight)
    assert message in unsupported_reason("triton", x, weight, interpret=True, **options)
    with pytest.raises(NotImplementedError, match=f"'triton': .*{message}"):
        fused_linear(x, weight, implementation="triton", interpret=True, **options)
    assert fused_linear(x, weight, **options).shape[0] == x.shape[0]  # None picks one that can


def test_kernel_refuses_dtypes_that_it_cannot_serve_well():
    x, weight = jnp.ones((2, 64), jnp.bfloat16), jnp.ones((32, 64))
    assert "twice the bytes: cast them once" in unsupported_reason("triton", x, weight, interpret=True)
    if jax.default_backend() != "gpu":
        assert "needs a CUDA device" in unsupported_reason("triton", x, weight.astype(x.dtype))


def test_expected_bytes():
    x, weight = jnp.ones((2, 3, 64), jnp.bfloat16), jnp.ones((32, 64), jnp.bfloat16)
    assert expected_bytes(x, weight) == 2 * (6 * 64 + 32 * 64 + 6 * 32)
    quantized, norm = quantize_weight(weight), jnp.ones((64,), jnp.bfloat16)
    residual = jnp.ones((2, 3, 16), jnp.bfloat16)
    expected = 32 * 64 + 4 * 32 + 2 * (6 * 64 + 64 + 6 * 16) + 4 * 6 * 16
    assert expected_bytes(x, quantized, norm=norm, residual=residual, gated=True, out_dtype=jnp.float32) == expected


def test_quantize_weight_rounds_to_half_a_step():
    weight = 3.0 * np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    weight[5] = 0.0
    quantized = jax.jit(quantize_weight)(weight)
    assert quantized.shape == (32, 64) and quantized.values.dtype == jnp.int8
    values, step = np.asarray(quantized.values, np.float32), np.asarray(quantized.scales)[:, None]
    assert np.all(np.abs(values).max(axis=1)[np.arange(32) != 5] == 127) and np.all(values[5] == 0)
    assert np.all(np.abs(values * step - weight) <= 0.5001 * step)
    with pytest.raises(ValueError, match="must be a float"):
        quantize_weight(quantized.values)


# The kernel's own matters: settings, and lowering for CUDA without a GPU.


SETTINGS = [
    LinearConfig(16, 1, 64, 1, 2, programs=264),
    LinearConfig(2, 8, 32, 1, 3, programs=7),  # two programs have three tiles, the others two
    LinearConfig(8, 4, 16, 2, 3, programs=1),
    LinearConfig(32, 2, 32, 4, 2, programs=1),  # the last tile overlaps the one before it
    LinearConfig(32, 1, 256, 8, 2, programs=2),
]


@pytest.mark.parametrize(
    "batch, config, interpret",
    [(1 if config.segments == 8 else 5, config, True) for config in SETTINGS]
    + [pytest.param(batch, config, False, marks=pytest.mark.gpu) for batch in (1, 5) for config in SETTINGS],
    ids=str,
)
def test_settings_do_not_change_the_answer(batch, config, interpret):
    problem = round_to(make_problem(Case("settings", "", batch, 2 * 39, 256, norm=True, residual=True, gated=True)), ml_dtypes.bfloat16)
    options = {"norm_eps": 1e-5, "gated": True, "out_dtype": jnp.dtype(jnp.bfloat16), "config": config, "interpret": interpret}
    out = program(functools.partial(triton_linear, **options), interpret)(*arrays_of(problem, jnp.bfloat16))
    assert within_budget(np.asarray(out, np.float64), problem, ml_dtypes.bfloat16)


STREAMED = {"odd_outputs": False, "all_of_it": True, "inputs_11008": False}  # with int8 weights or not


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("name", STREAMED)
def test_small_matrices_by_the_streaming_kernel(name, interpret):
    """Named cases are small, so the public function gives them to the tiled kernel; large matrices take the other."""
    case, dtype = CASE[name], ml_dtypes.bfloat16
    problem = round_to(make_problem(case), dtype)
    weight_bytes, weight = (1, jax.jit(quantize_weight)) if STREAMED[name] else (2, lambda weight: weight)
    config = linear_config(case.batch, case.num_results, case.num_inputs, weight_bytes, case.gated)
    options = {"norm_eps": 1e-5, "gated": case.gated, "out_dtype": jnp.dtype(dtype), "config": config, "interpret": interpret}
    out = program(functools.partial(triton_linear, **options), interpret)(*arrays_of(problem, jnp.bfloat16, weight))
    assert within_budget(np.asarray(out, np.float64), dequantized(problem) if STREAMED[name] else problem, dtype)


TILES = [
    (1, TileConfig(1, 8, 512, 2, 1)),
    (5, TileConfig(4, 8, 512, 2, 1)),  # rows one by one, off the matrix unit
    (5, TileConfig(8, 16, 64, 1, 2, rows_first=False)),
    (5, TileConfig(8, 32, 512, 1, 1, rows_first=False)),
    (70, TileConfig(32, 32, 128, 4, 3)),
]


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("batch, config", TILES, ids=str)
def test_tiles_do_not_change_the_answer(batch, config, interpret):
    """Inputs at once, in pieces of 256 and 64, in chunks, in chunks and a rest; tiles of outputs and of rows that overlap or are cut."""
    case = Case("tiles", "", batch, 2 * 39, 320, norm=True, residual=True, gated=True, bias=True)
    problem = round_to(make_problem(case), ml_dtypes.bfloat16)
    options = {"norm_eps": 1e-5, "gated": True, "out_dtype": jnp.dtype(jnp.bfloat16), "config": config, "interpret": interpret}
    out = program(functools.partial(triton_tiled_linear, **options), interpret)(*arrays_of(problem, jnp.bfloat16))
    assert within_budget(np.asarray(out, np.float64), problem, ml_dtypes.bfloat16)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("tile_inputs", [64, 256])
def test_float16_rows_are_normalised_before_their_scale(tile_inputs, interpret):
    """Rows of 10,000 times a scale of 10 exceed float16; a norm's factor after the product would come too late."""
    problem = make_problem(Case("large", "", 2, 32, 256, norm=True))
    problem = round_to(dataclasses.replace(problem, x=1e4 * np.sign(problem.x), norm=10 * problem.norm), np.float16)
    options = {"norm_eps": 1e-5, "gated": False, "out_dtype": jnp.dtype(jnp.float16), "interpret": interpret}
    linear = functools.partial(triton_tiled_linear, config=TileConfig(16, 16, tile_inputs, 1, 2), **options)
    out = program(linear, interpret)(*arrays_of(problem, jnp.float16))
    assert within_budget(np.asarray(out, np.float64), problem, np.float16)


# 80 outputs in tiles of 32: the last tile overlaps the one before it, whose squares must not be counted twice.
SCALED = {
    "streamed": (triton_linear, 5, LinearConfig(32, 1, 32, 2, 2, programs=2), LinearConfig(16, 1, 16, 2, 2, programs=264)),
    "tiled": (triton_tiled_linear, 70, TileConfig(32, 32, 64, 4, 3), TileConfig(16, 16, 80, 2, 2, rows_first=False)),
}


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("name", SCALED)
def test_a_product_prepares_the_norm_of_the_next(name, interpret):
    linear, batch, *configs = SCALED[name]
    dtype, options = ml_dtypes.bfloat16, {"norm_eps": 1e-5, "out_dtype": jnp.dtype(jnp.bfloat16), "interpret": interpret}
    first = round_to(make_problem(Case("first", "", batch, 80, 64, residual=True)), dtype)
    second = round_to(make_problem(Case("second", "", batch, 2 * 39, 80, norm=True, residual=True, gated=True)), dtype)

    def both(x, weight, residual, following, norm, rest):
        scaled = linear(x, weight, None, None, residual, norm, gated=False, config=configs[0], **options)
        return scaled, linear(scaled, following, norm, None, rest, gated=True, config=configs[1], **options)

    (x, weight, _, _, residual), (_, following, norm, _, rest) = arrays_of(first, jnp.bfloat16), arrays_of(second, jnp.bfloat16)
    scaled, out = program(both, interpret)(x, weight, residual, following, norm, rest)
    assert within_budget(np.asarray(scaled.rows, np.float64), first, dtype)
    rows = np.asarray(scaled.rows, np.float64)
    np.testing.assert_allclose(np.asarray(scaled.squares).sum(axis=0), (rows**2).sum(axis=1), rtol=1e-5)
    second = dataclasses.replace(second, x=rows.astype(np.float32))
    assert within_budget(np.asarray(out, np.float64), second, dtype)
    assert not within_budget(np.asarray(out, np.float64), dataclasses.replace(second, norm=1.02 * second.norm), dtype)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("batch, implementation", [(2, "triton"), (3, "triton"), (2, "xla")])
def test_a_product_combines_the_parts_of_attention(batch, implementation, interpret):
    """Three heads of 32; a part without a weight holds numbers that are not to be read, a head without any gives zeros.

    Up to two rows every program of the kernel combines them.
    """
    rng = np.random.default_rng(0)
    parts, lse, weight = rng.normal(size=(4, batch, 96)), 3 * rng.normal(size=(4, batch, 3)), rng.normal(size=(32, 96))
    lse[2, 0, 1] = lse[:, -1, 2] = -np.inf
    weights = np.where(lse > -np.inf, np.exp2(lse), 0.0)
    weights = np.repeat(weights / np.maximum(weights.sum(axis=0), 1e-9), 32, axis=-1)
    exact = (weights * parts).sum(axis=0) @ weight.T
    product = program(functools.partial(fused_linear, implementation=implementation, interpret=interpret), interpret)
    rows, matrix = jnp.asarray(parts, jnp.float32), jnp.asarray(weight, jnp.float32)
    for given, right in ((lse, True), (lse[::-1], False)):
        out = product(SplitRows(rows, jnp.asarray(given, jnp.float32)).reshape(batch, 1, 96), matrix)
        assert out.shape == (batch, 1, 32) and np.allclose(out[:, 0], exact, atol=1e-4) == right


@pytest.mark.parametrize(
    ("rows", "dtype", "outputs", "inputs", "options", "capability", "early"),
    [
        (16, jnp.bfloat16, 1536, 576, {}, "9.0", True),
        (17, jnp.bfloat16, 1536, 576, {}, "9.0", False),  # 64 were measured to lose
        (1, jnp.float16, 1536, 576, {}, "9.0", False),
        (1, jnp.bfloat16, 576, 2064, {}, "9.0", False),  # XLA computes so many inputs, and reads before it waits
        (1, jnp.bfloat16, 4096, 4096, {}, "9.0", False),  # so does what adds up the parts of attention for the streaming kernel
        (1, jnp.bfloat16, 1536, 576, {"implementation": "jax_triton"}, "9.0", True),
        (1, jnp.bfloat16, 1536, 576, {}, "8.0", False),  # the instruction is Hopper's
    ],
)
def test_kernels_of_few_rows_may_let_the_next_be_launched(rows, dtype, outputs, inputs, options, capability, early, monkeypatch):
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA", compute_capability=capability)
    monkeypatch.setattr("pallas_kernels.common.jax.devices", lambda: [device])
    x, weight = jax.ShapeDtypeStruct((rows, 1, 576), dtype), jax.ShapeDtypeStruct((outputs, inputs), dtype)
    assert may_launch_early(x, [weight], **options) == early


@pytest.mark.parametrize("batch, dtype, scaled", [(2, jnp.bfloat16, False), (3, jnp.bfloat16, True), (3, jnp.float16, False)], ids=str)
def test_rows_are_scaled_where_that_gains(batch, dtype, scaled):
    """One or two rows are normalised by every program; float16 rows times a scale may exceed float16. Others give what plain rows give."""
    x, weight, norm = jnp.ones((1, batch, 64), dtype), jnp.eye(64, dtype=dtype), jnp.arange(64, dtype=jnp.float32)
    options = {"implementation": "triton", "interpret": True}
    prepare = functools.partial(fused_linear, x, weight, residual=x, next_norm=norm, **options)
    assert isinstance(jax.eval_shape(prepare), ScaledRows) == scaled
    if not scaled:
        return
    out, plain = prepare(), fused_linear(x, weight, residual=x, **options)
    for implementation in ("triton", "xla"):
        options["implementation"] = implementation
        results = [fused_linear(rows, weight, norm=norm, residual=rows, **options) for rows in (out, plain)]
        assert results[0].shape == x.shape
        np.testing.assert_allclose(*(np.asarray(result, np.float32) for result in results), rtol=2**-6)
    with pytest.raises(ValueError, match=r"next_norm must be a float \[M\] = \[64\]"):
        fused_linear(x, weight, next_norm=norm[1:])


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 8, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("item_bytes", [1, 2, 4])
def test_settings_fit_every_shape(batch, item_bytes):
    for num_results in (16, 17, 48, 564, 4096, 32000):
        for num_inputs in (16, 48, 64, 96, 576, 768, 4096, 11008, 14336):
            for gated in (False, True):
                config = linear_config(batch, num_results, num_inputs, item_bytes, gated)
                assert config.tile_outputs <= num_results
                assert config.tile_outputs * config.segments * (2 if gated else 1) >= 16
                assert padded_rows(batch, config.segments) * config.segments >= 8
                assert config.segment_inputs >= 16 and num_inputs % (config.segments * config.segment_inputs) == 0
                assert shared_memory_bytes(config, batch, item_bytes, max(2, item_bytes), gated) < 227 * 1024
                shared = shared_memory_bytes(config, batch, item_bytes, max(2, item_bytes), gated) // (config.num_stages + 1)
                assert config.alone or 2 * config.num_stages * shared <= 220_000  # two programs at once, a buffer for each stage


@pytest.mark.parametrize("batch", [1, 2, 8, 9, 64, 128, 129, 512, 513, 1024, 5000])
@pytest.mark.parametrize("item_bytes", [1, 2, 4])
def test_tiles_fit_every_shape(batch, item_bytes):
    for num_results, num_inputs, gated in itertools.product((16, 17, 48, 564, 4096), (16, 48, 96, 576, 1536, 4096, 11008), (False, True)):
        config = tile_config(batch, num_results, num_inputs, item_bytes, gated)
        assert config.tile_outputs <= num_results
        if not config.on_matrix_unit:
            assert batch == config.tile_rows and config.tile_inputs == num_inputs
            continue
        in_chunks = config.tile_inputs < num_inputs
        assert 16 <= config.tile_inputs <= num_inputs and (not in_chunks or config.tile_inputs.bit_count() == 1)
        assert (config.tile_rows if config.rows_first else config.tile_outputs) >= 16  # of the matrix unit's long side
        matrix_rows = config.tile_outputs * (2 if gated else 1)
        step_bytes = (config.tile_rows * max(2, item_bytes) + matrix_rows * item_bytes) * config.tile_inputs
        assert config.num_stages * step_bytes < 227 * 1024


@pytest.mark.parametrize("batch, num_results, tile_outputs", [(129, 576, 16), (256, 512, 16), (256, 576, 32), (512, 512, 32)])
def test_tiles_of_long_sums_are_narrow_where_all_programs_run_at_once(batch, num_results, tile_outputs):
    config = tile_config(batch, num_results, 1536, 2, gated=False)
    assert config.tile_outputs == tile_outputs
    programs = -(-batch // config.tile_rows) * (num_results // 16)
    assert (programs <= 132) == (tile_outputs == 16)  # a Hopper's multiprocessors


@pytest.mark.parametrize(
    "batch, num_outputs, item_bytes, gated, fastest",
    [
        (1, 4096, 2, False, True),
        (32, 4096, 2, False, True),
        (33, 4096, 2, False, False),
        (8, 4096, 1, False, True),
        (9, 4096, 1, False, False),
        (1, 4095, 2, False, False),  # small, with more inputs than were measured
    ],
)
def test_none_takes_the_kernel_where_it_was_measured_to_be_faster(batch, num_outputs, item_bytes, gated, fastest):
    assert is_fastest(batch, num_outputs, 4096, item_bytes, gated) == fastest
    assert not is_fastest(batch, num_outputs, 4096, 4, gated)  # float32 was not measured


@pytest.mark.parametrize(
    "batch, gated, fastest", [(1, True, True), (128, True, True), (129, True, False), (1024, False, True), (1025, False, False)]
)
def test_none_takes_tiles_for_small_matrices(batch, gated, fastest):
    assert is_fastest(batch, 3072, 512, 2, gated) == fastest
    assert is_fastest(batch, 3072, 512, 2, gated, scaled=True) == (batch <= 1024)
    assert not is_fastest(batch, 3072, 512, 1, gated) and not is_fastest(batch, 3072, 512, 4, gated)  # nor were these


@pytest.mark.parametrize("quantized", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize(
    "name, batch",
    [("7b-qkv", 1), ("7b-gate-up", 8), ("7b-down", 1), ("7b-head", 64), ("8b-head", 8), ("768-qkv", 64), ("576-gate-up", 1)]
    + [("576-gate-up", 256), ("576-down", 512), ("512-down", 256)],
)
def test_lowers_for_cuda(name, batch, quantized):
    (matrix,) = (matrix for matrix in MATRICES if matrix.name == name)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x, norm = shape((batch, matrix.num_inputs)), shape((matrix.num_inputs,)) if matrix.norm else None
    rows = (matrix.num_outputs, matrix.num_inputs)
    weight = shape(rows)
    if quantized:
        weight = QuantizedWeight(jax.ShapeDtypeStruct(rows, jnp.int8), jax.ShapeDtypeStruct(rows[:1], jnp.float32))
    tiled = is_tiled(batch, matrix.num_results, matrix.num_inputs, matrix.gated)
    choose, linear = (tile_config, triton_tiled_linear) if tiled else (linear_config, triton_linear)
    config = choose(batch, matrix.num_results, matrix.num_inputs, 1 if quantized else 2, matrix.gated)
    product = functools.partial(linear, norm_eps=1e-5, config=config, gated=matrix.gated, out_dtype=matrix.out_dtype)
    residual = shape((batch, matrix.num_results))
    assert cuda_lowering(product, x, weight, norm, None, residual).count("__gpu$xla.gpu.triton") == 1


# ------------------------------------------------------------------------------------------------------------- many rows


def half(x):
    return jnp.asarray(x, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [case.name for case in MANY_ROWS])
def test_many_rows(name):
    """Within the error of a float64 result rounded to bfloat16 once; gate and up swapped, or outputs moved by one, are far outside."""
    case = CASE[name]
    problem = round_to(make_problem(case), ml_dtypes.bfloat16)
    config = mosaic_config(case.num_results, case.num_inputs, gated=case.gated, added=case.residual)
    exact = oracle(problem)
    budget = 1.1 * rms(exact.astype(ml_dtypes.bfloat16).astype(np.float64) - exact)
    wrong = dataclasses.replace(problem, weight=np.roll(problem.weight, case.num_results if case.gated else 1, axis=0))
    for one, right in ((problem, True), (wrong, False)):
        residual = None if one.residual is None else half(one.residual)
        out = mosaic_linear(half(one.x), half(one.weight), residual, gated=case.gated, config=config)
        assert (rms(np.asarray(out, float) - exact) < budget) == right


@pytest.mark.gpu
def test_gradients_of_many_rows():
    """Against the same in XLA's programs, in bfloat16, and those in float64."""
    rng = np.random.default_rng(0)
    sizes = ((16384, 128), 1), ((512, 128), 11), ((128, 256), 16)
    x, gate_up, down = (rng.normal(size=size).astype(ml_dtypes.bfloat16).astype(float) / by for size, by in sizes)

    def loss(x, gate_up, down):
        out = fused_linear(fused_linear(x, gate_up, gated=True, implementation="xla"), down, residual=x, implementation="xla")
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    arguments = [half(a) for a in (x, gate_up, down)]
    assert "fused_linear_kernel" in jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).as_text()
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    expected = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*(jnp.asarray(a, jnp.float32) for a in (x, gate_up, down)))
    for one, exact in zip(found, expected):
        exact = np.asarray(exact, float)
        assert rms(np.asarray(one, float) - exact) < 0.01 * rms(exact)


def test_many_rows_are_fused_where_it_was_measured(monkeypatch):
    """From 16,384 rows on: gates up to 768 inputs, residuals up to 3,072, without bias; on no other device. With gradients too."""
    calls = []

    def kernel(x, weight, residual=None, *, gated, config, keep_products=False):
        calls.append((*x.shape, weight.shape[0], config.band_tiles, residual is not None, keep_products))
        products = jnp.matmul(x, weight.T)
        out = silu_and_mul(products) if gated else products + residual
        return (out, products) if keep_products else out

    def product(x, weight, gated=True, **more):
        jax.eval_shape(lambda x, weight, more: fused_linear(x, weight, gated=gated, implementation="xla", **more), x, weight, more)

    monkeypatch.setattr(mosaic, "mosaic_linear", kernel)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x, weight, narrow = shape((16384, 768)), jax.ShapeDtypeStruct((6144, 768), jnp.float32), shape((3072, 512))
    product(x, weight)
    assert not calls  # this device has no kernel
    monkeypatch.setattr(many_rows, "device_reason", lambda *_: None)
    product(x, weight)
    product(shape((64, 512, 512)), narrow)
    product(shape((16384, 3072)), shape((768, 3072)), gated=False, residual=x)
    expected = [(16384, 768, 6144, 8, False, False), (32768, 512, 3072, 1, False, False), (16384, 3072, 768, 1, True, False)]
    assert calls == expected
    product(shape((16383, 768)), weight)
    product(shape((16384, 4096)), shape((1024, 4096)))
    product(shape((16384, 4096)), shape((768, 4096)), gated=False, residual=x)
    product(x, shape((6144 + 64, 768)))
    product(x, weight, residual=shape((16384, 3072)))
    product(x, weight, bias=shape((6144,)))
    product(jax.ShapeDtypeStruct(x.shape, jnp.float32), weight)
    product(x, weight, gated=False)
    assert calls == expected

    rng = np.random.default_rng(0)
    few, matrix, rest = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((8, 64), (128, 64), (8, 128)))
    for gated, residual in ((True, None), (False, rest)):

        def fused(x, weight, gated=gated, residual=residual):
            return many_rows.linear_of_many_rows(x, weight, residual, gated)

        def apart(x, weight, gated=gated, residual=residual):
            products = jnp.matmul(x, weight.T, precision="highest")
            return silu_and_mul(products) if gated else products + residual

        loss = [jax.grad(lambda *args, f=f: jnp.sum(f(*args) ** 2), argnums=(0, 1)) for f in (fused, apart)]
        for found, exact in zip(*(gradients(few, matrix) for gradients in loss), strict=True):
            np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)
    assert [call[-1] for call in calls[3:]] == [True, False]  # products are kept for their gradient


def test_the_kernel_of_many_rows_says_what_it_cannot_do():
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    for rows, outputs, inputs, reason in [
        (256, 512, 96, "multiples of 64, got 96 and 256"),
        (256, 320, 64, "multiples of 64, got 64 and 160"),
        (260, 512, 64, "a multiple of 8 from 128, got 260"),
        (64, 512, 64, "a multiple of 8 from 128, got 64"),
    ]:
        assert reason in mosaic.unsupported_reason(shape((rows, inputs)), shape((outputs, inputs)), True)
    x, weight = shape((256, 64)), shape((320, 64))
    assert mosaic.unsupported_reason(x, weight, False) is None
    assert "got float32 and bfloat16" in mosaic.unsupported_reason(jax.ShapeDtypeStruct(x.shape, jnp.float32), weight, False)


MOSAIC_LOWERINGS = [  # rows, outputs, inputs, gated
    (65536, 3072, 512, True),
    (16384, 3072, 576, True),
    (16384, 6144, 768, True),
    (65536, 768, 3072, False),
    (16384, 576, 1536, False),
]


@pytest.mark.parametrize("rows, outputs, inputs, gated", MOSAIC_LOWERINGS)
def test_the_kernel_of_many_rows_lowers_for_cuda(rows, outputs, inputs, gated):
    """Gates with their products kept, the others with a residual; and their settings fit into shared memory."""
    results = outputs // 2 if gated else outputs
    config = mosaic_config(results, inputs, gated=gated, added=not gated)
    assert mosaic_shared_bytes(config, not gated) <= MAX_SHARED_BYTES and config.num_stages >= 3
    assert results % (config.outputs // 2 if gated else config.outputs) == 0
    product = functools.partial(mosaic_linear, gated=gated, config=config, keep_products=gated)
    sizes = (rows, inputs), (outputs, inputs), *([] if gated else [(rows, outputs)])
    assert "mosaic_gpu" in cuda_lowering(product, *(jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes))


def test_gradients_of_float32_logits_are_products_of_halves():
    """Not TF32: the logits' gradient is rounded to bfloat16, and the weight's is summed up in float32."""
    rng = np.random.default_rng(0)
    x, weight, grad = rng.normal(size=(24, 64)), rng.normal(size=(96, 64)), rng.normal(size=(24, 96))
    x, weight = (a.astype(ml_dtypes.bfloat16).astype(np.float64) for a in (x, weight))
    rows, matrix = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.float32)

    def gradients(rows, matrix, grad):
        return jax.vjp(lambda *args: fused_linear(*args, out_dtype=jnp.float32, implementation="xla"), rows, matrix)[1](grad)

    found = gradients(rows, matrix, jnp.asarray(grad, jnp.float32))
    rounded = grad.astype(ml_dtypes.bfloat16).astype(np.float64)
    for one, plain, exact in zip(found, (rounded @ weight, rounded.T @ x), (grad @ weight, grad.T @ x), strict=True):
        assert error(np.asarray(one, float), plain.astype(one.dtype).astype(np.float64), exact) < 1.5
    assert found[1].dtype == jnp.float32
    products = [eqn for eqn in jax.make_jaxpr(gradients)(rows, matrix, jnp.asarray(grad, jnp.float32)).eqns if "dot_general" in str(eqn)]
    assert len(products) >= 2 and not any("f32[24,96] bf16" in str(eqn) for eqn in products)


@pytest.mark.parametrize(("dtype", "table_rows"), [("float32", 7), ("bfloat16", 7), ("bfloat16", lookup.MAX_ROWS + 1)])
def test_the_gradient_of_a_lookup_sums_what_came_back_for_each_id(dtype, table_rows):
    """Ids that come often, once and never; as a product with one-hot rows, and as a scatter where rows are many."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((table_rows, 3)), jnp.float32)
    ids = np.array([[0, 5, 5], [6, 5, 0]])
    back = jnp.asarray(rng.standard_normal((2, 3, 3)), dtype)
    rows, gradient = jax.vjp(lambda table: look_up(table, jnp.asarray(ids), jnp.dtype(dtype)), table)
    np.testing.assert_array_equal(rows, table[ids].astype(dtype))
    expected = np.zeros(table.shape)
    np.add.at(expected, ids, np.asarray(back, np.float64))
    np.testing.assert_allclose(gradient(back)[0], expected, rtol=1e-6, atol=1e-6)
    assert ("scatter" in str(jax.make_jaxpr(gradient)(back))) == (table_rows > lookup.MAX_ROWS)
