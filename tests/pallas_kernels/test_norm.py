"""RMSNorm of a residual stream: its gradients against differences of the formula in numpy (float64), within measured error budgets."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import fork_rms_norm
from pallas_kernels.norm import triton, unsupported_reason
from tests.pallas_kernels.budget import KERNELS, error, program
from tests.pallas_kernels.lowering import cuda_lowering

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
EPS = 1e-2  # large enough to be seen

CASES = {
    "one_piece": (36, 32),
    "two_pieces": (14, 48),  # as SmolLM2's width, 512 + 64; seven tiles of two rows for three programs
    "a_row_at_a_time": (5, 96),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton, "PROGRAMS", 3)
    monkeypatch.setattr(triton, "TILE_SIZE", 128)


def make_problem(name):
    rng, (rows, columns) = np.random.default_rng(0), CASES[name]
    numbers = [rng.normal(size=(rows, columns)) for _ in range(3)] + [1 + rng.normal(size=columns) / 4]
    return [x.astype(ml_dtypes.bfloat16).astype(np.float64) for x in numbers]  # x, the gradients of both results, the scale


def expect(x, passed, grad, scale):
    """The gradients of x and of the scale, by differences: of a row in the direction of each number, all rows at once."""

    def loss(x, scale):
        return np.sum(passed * x + grad * scale * x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPS), axis=1)

    def slope(of, step=1e-5):
        return (of(step) - of(-step)) / (2 * step)

    unit = np.eye(x.shape[1])
    dx = np.stack([slope(lambda s, u=u: loss(x + s * u[None], scale)) for u in unit], axis=1)
    return dx, np.array([slope(lambda s, u=u: loss(x, scale + s * u)).sum() for u in unit])


@functools.cache
def gradients(implementation, interpret):
    def both(x, passed, grad, scale):
        fork = functools.partial(fork_rms_norm, eps=EPS, implementation=implementation, interpret=interpret)
        out, backward = jax.vjp(fork, x, scale)
        return out, backward((passed, grad))

    return program(both, interpret)


@pytest.mark.parametrize(("implementation", "interpret"), [("xla", False), *KERNELS])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_slopes(name, implementation, interpret):
    problem = make_problem(name)
    (same, normal), (dx, dscale) = gradients(implementation, interpret)(*(jnp.asarray(x, jnp.float32) for x in problem))
    np.testing.assert_array_equal(same, problem[0])
    root = np.sqrt(np.mean(problem[0] ** 2, axis=1, keepdims=True) + EPS)
    np.testing.assert_allclose(normal, problem[3] * problem[0] / root, atol=1e-5)
    for found, expected in zip((dx, dscale), expect(*problem), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-4)
    if interpret:  # a gradient that misses what goes on, or the slope of the root, is far outside
        wrong = expect(problem[0], 0 * problem[1], *problem[2:])[0], problem[1] + problem[2] * problem[3] / root
        assert all(np.max(np.abs(expect(*problem)[0] - each)) > 0.1 for each in wrong)


@pytest.mark.parametrize(("implementation", "interpret"), KERNELS)
def test_half_precision_rounds_once(implementation, interpret):
    """JAX's own gradient rounds the scaled gradient, both parts and their sum, and adds up the scale's in halves."""
    problem = make_problem("two_pieces")
    exact, halves = expect(*problem), [jnp.asarray(x, jnp.bfloat16) for x in problem]
    found, plain = (gradients(*way)(*halves)[1] for way in ((implementation, interpret), ("xla", False)))
    for out, of_jax, expected in zip(found, plain, exact, strict=True):
        assert error(np.asarray(out, float), np.asarray(of_jax, float), expected) < 1


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match=r"x must be a float \[..., D\] and scale \[D\], got float32\[2, 64\] float32\[32\]|got"):
        fork_rms_norm(jnp.ones((2, 64)), jnp.ones(32))
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        fork_rms_norm(jnp.ones((2, 64)), jnp.ones(64), implementation="cuda")
    wrong = {(66, 16): "multiple of 8, got 66", (8, 40): "multiple of 16", (8, 496): "at most 4 powers of two, got 496"}
    for shape, reason in wrong.items():
        assert reason in unsupported_reason("triton", jnp.ones(shape, jnp.bfloat16), interpret=True)
    assert fork_rms_norm(jnp.ones((3, 40), jnp.bfloat16), jnp.ones(40))[1].shape == (3, 40)  # None picks one that can


@pytest.mark.parametrize("columns", [512, 576, 768, 4096])
def test_lowers_for_cuda(columns):
    rows, scale = jax.ShapeDtypeStruct((256, columns), jnp.bfloat16), jax.ShapeDtypeStruct((columns,), jnp.float32)
    assert "__gpu$xla.gpu.triton" in cuda_lowering(functools.partial(triton.triton_gradient, eps=EPS), rows, scale, rows, rows)
