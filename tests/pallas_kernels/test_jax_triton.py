"""Kernels written down in Triton's language: run by NumPy without a GPU, against the oracles of their ops; by Triton on one."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import fused_linear, jax_triton
from pallas_kernels.copy_rows.reference import everything
from pallas_kernels.copy_rows.triton import triton_copy_rows
from pallas_kernels.jax_triton import launch, triton_source
from pallas_kernels.linear.heuristics import LinearConfig, TileConfig
from pallas_kernels.linear.triton import triton_linear
from pallas_kernels.linear.triton_tiled import triton_tiled_linear
from pallas_kernels.place_rows import Placement
from pallas_kernels.place_rows.triton import triton_place_rows
from pallas_kernels.slots.triton import triton_per_sequence
from pallas_kernels.span_decode.heuristics import TritonConfig
from pallas_kernels.span_decode.triton import triton_rotate_and_attend
from tests.pallas_kernels import test_copy_rows, test_linear, test_place_rows, test_slots, test_span_decode
from tests.pallas_kernels.budget import JAX_TRITON, round_to
from tests.pallas_kernels.cases import linear, span_decode

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


class Pointer:
    """A pointer into a flat array, or many of them."""

    def __init__(self, flat, offset=0):
        self.flat, self.offset = flat, offset

    def __add__(self, offset):
        return Pointer(self.flat, self.offset + offset)


def load(pointer, mask=True, other=0):
    if mask is True:
        return pointer.flat[pointer.offset]
    return np.where(mask, pointer.flat[np.where(mask, pointer.offset, 0)], np.asarray(other, pointer.flat.dtype))


def store(pointer, value, mask=True):
    if mask is True:
        pointer.flat[pointer.offset] = value
    else:
        pointer.flat[pointer.offset[mask]] = np.broadcast_to(value, mask.shape)[mask]


def numpy_language(program) -> types.SimpleNamespace:
    """What kernels use of `triton.language`, for one program of a grid, in NumPy."""
    return types.SimpleNamespace(
        load=load,
        store=store,
        program_id=lambda axis: np.int32(program[axis]),
        arange=lambda start, stop: np.arange(start, stop, dtype=np.int32),
        zeros=np.zeros,
        full=lambda shape, value, dtype: np.full(shape, value, dtype)[()],
        dot=lambda a, b, input_precision: np.dot(a, b),
        sum=lambda x, axis: np.sum(x, axis=axis, dtype=x.dtype),
        cumsum=lambda x, axis: np.cumsum(x, axis=axis, dtype=x.dtype),
        rsqrt=lambda x: 1 / np.sqrt(x),
        debug_barrier=lambda: None,
        trans=np.transpose,
        **{name: getattr(np, name) for name in ("broadcast_to", "reshape", "where", "maximum", "minimum", "exp", "exp2", "max")},
        **{"int32": np.int32, "int1": np.bool_, "float32": np.float32},
    )


def numpy_call(equation, arrays):
    """Run a kernel's text in place of `jax_triton._call`, one program after the other."""
    params = equation.params
    grid = (*params["grid_mapping"].grid, 1, 1)[:3]
    source = triton_source(params["jaxpr"], grid).replace(".to(", ".astype(")
    arrays, reused = [np.array(array) for array in arrays], {out: i for i, out in dict(params["input_output_aliases"]).items()}
    outs = [arrays[reused[i]] if i in reused else np.zeros(x.aval.shape, x.aval.dtype) for i, x in enumerate(equation.outvars)]
    for program in itertools.product(*map(range, grid)):
        namespace = {"tl": numpy_language(program), "range": lambda start, stop: map(np.int32, range(start, stop))}
        exec(source, namespace)
        namespace["kernel"](*(Pointer(array.reshape(-1)) for array in (*arrays, *outs)))
    return list(map(jnp.asarray, outs))


@pytest.fixture
def by_numpy(monkeypatch):
    monkeypatch.setattr(jax_triton, "_call", numpy_call)
    with np.errstate(invalid="ignore", over="ignore"):
        yield


LINEAR = {
    "rows at once": (triton_tiled_linear, linear.Case("", "", 3, 2 * 39, 192, True, True, True, True), TileConfig(4, 32, 192, 1, 1)),
    "in chunks": (triton_tiled_linear, linear.Case("", "", 5, 80, 128, True, True), TileConfig(4, 32, 64, 4, 3, rows_first=False)),
    "streamed": (triton_linear, linear.Case("", "", 2, 2 * 40, 128, True, True, True), LinearConfig(8, 4, 16, 1, 3, programs=3)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_maps(name, by_numpy):
    kernel, case, config = LINEAR[name]
    problem = round_to(linear.make_problem(case), np.float32)
    options = {"norm_eps": problem.norm_eps, "gated": case.gated, "out_dtype": jnp.dtype(jnp.float32), "config": config}
    out = launch("jax_triton", functools.partial(kernel, **options), *test_linear.arrays_of(problem, jnp.float32))
    np.testing.assert_allclose(out, test_linear.oracle(problem), atol=1e-5, rtol=2e-5)


@pytest.mark.parametrize("config", [TritonConfig(16, 1, 2, 2, kv_heads=2), TritonConfig(32, 1, 2, 0)], ids=["divided", "whole"])
def test_a_step_of_attention(config, by_numpy):
    problem = round_to(span_decode.make_problem(span_decode.Case("", "", (40, 2, 0), 6, 2, 32)), np.float32)
    new = test_span_decode.new_tokens(problem, True)
    wanted = test_span_decode.after_new_tokens(problem, **new)
    pools = (jnp.asarray(pool, jnp.float32) for pool in (problem.k_pool, problem.v_pool))
    step = functools.partial(triton_rotate_and_attend, norm_eps=1e-5, scale=32**-0.5, config=config)
    heads = (new[name] for name in ("qkv", "cos", "sin", "own"))
    out, *pools = launch("jax_triton", step, *heads, *pools, problem.slots, problem.counts, new["norms"])
    np.testing.assert_allclose(out, test_span_decode.oracle(wanted), atol=1e-5, rtol=2e-5)
    for pool, after in zip(pools, (wanted.k_pool, wanted.v_pool), strict=True):
        np.testing.assert_allclose(pool, after, atol=2e-6, rtol=1e-5)


def test_bookkeeping(by_numpy, monkeypatch):
    """The tests of `per_sequence`, its kernel through this way."""

    def run(function, state, *others, implementation, interpret):
        return launch("jax_triton", lambda state, *others: triton_per_sequence(function, state, others, False), state, *others)

    monkeypatch.setattr(test_slots, "per_sequence", run)
    monkeypatch.setattr(test_slots, "program", lambda function, interpret: function)
    test_slots.test_slots_over_many_steps("less than a warp", "triton", False, True)
    test_slots.test_a_function_of_each_sequence(3, "triton", False)


def test_copies_of_rows(by_numpy):
    host, pools, expected = test_copy_rows.make_pools(3, 64)
    lists = test_copy_rows.SOURCES, test_copy_rows.TARGETS, test_copy_rows.COUNTS
    found = launch("jax_triton", triton_copy_rows, tuple(map(np.asarray, host)), pools, *lists, everything())
    assert all(map(np.array_equal, found, expected))


def test_places_of_rows(by_numpy, monkeypatch):
    """The test of `place_rows`, its kernel through this way."""

    def run(table, owner, keys, marks, wanted, *others, **_):
        return Placement(*launch("jax_triton", triton_place_rows, table, owner, keys, marks, *wanted, *others))

    monkeypatch.setattr(test_place_rows, "place_rows", run)
    monkeypatch.setattr(test_place_rows.jax, "jit", lambda function: function)
    test_place_rows.test_the_least_recently_named_give_their_rows(20, "jax_triton", False, 6, monkeypatch)


def test_what_has_no_text_is_named():
    def kernel(x_ref, out_ref):
        out_ref[0] = jnp.sin(x_ref[0])

    x = jax.ShapeDtypeStruct((1,), jnp.float32)
    (equation,) = jax.make_jaxpr(pl.pallas_call(kernel, out_shape=x))(x).jaxpr.eqns
    with pytest.raises(NotImplementedError, match="a kernel's sin has no text in Triton's language"):
        triton_source(equation.params["jaxpr"], (1, 1, 1))


# On a GPU: the public functions.


@pytest.mark.parametrize("name", [pytest.param(name, marks=JAX_TRITON) for name in ("batch_1", "batch_100", "all_of_it", "inputs_576")])
def test_linear_maps_by_triton(name):
    problem = round_to(linear.make_problem(linear.CASE[name]), jnp.bfloat16)
    x, weight, norm, bias, residual = test_linear.arrays_of(problem, jnp.bfloat16)
    options = {"gated": problem.gated, "implementation": "jax_triton"}
    out = jax.jit(functools.partial(fused_linear, **options))(x, weight, norm=norm, bias=bias, residual=residual)
    assert test_linear.within_budget(np.asarray(out, np.float64), problem, jnp.bfloat16)


@pytest.mark.parametrize("name", [pytest.param(name, marks=JAX_TRITON) for name in ("ragged", "gqa_3", "kv_16")])
def test_a_step_of_attention_by_triton(name):
    problem = round_to(span_decode.make_problem(span_decode.CASE[name]), np.float32)
    new = test_span_decode.new_tokens(problem, True)
    wanted = test_span_decode.after_new_tokens(problem, **new)
    out, *_ = test_span_decode.take_step(problem, None, implementation="jax_triton", **new)
    np.testing.assert_allclose(out, test_span_decode.oracle(wanted), atol=1e-5, rtol=2e-5)


@pytest.mark.parametrize("name", [pytest.param(name, marks=JAX_TRITON) for name in test_slots.SHAPES])
def test_bookkeeping_by_triton(name):
    test_slots.test_slots_over_many_steps(name, "jax_triton", False, True)
    test_slots.test_a_function_of_each_sequence(5, "jax_triton", False)


@pytest.mark.parametrize("name", [pytest.param("gqa_3", marks=JAX_TRITON)])
def test_rows_in_host_memory_by_triton(name):
    problem = round_to(span_decode.make_problem(span_decode.CASE[name]), np.float32)
    new = test_span_decode.new_tokens(problem, False)
    tiered, host = test_span_decode.in_host_memory(problem, new["own"])
    out, *_ = test_span_decode.take_step(tiered, None, "jax_triton", **new, host=host)
    np.testing.assert_allclose(out, test_span_decode.oracle(test_span_decode.after_new_tokens(problem, **new)), atol=1e-5, rtol=2e-5)
