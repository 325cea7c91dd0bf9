"""SwiGLU against its formula in numpy (float64), its gradient against differences, and rounding against JAX's own gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import silu_and_mul
from pallas_kernels.swiglu import unsupported_reason
from pallas_kernels.swiglu.triton import triton_gradient
from tests.pallas_kernels.budget import KERNELS, program
from tests.pallas_kernels.lowering import cuda_lowering

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


@functools.cache
def value_and_gradient(implementation, interpret):
    def both(gate_up, grad):
        out, backward = jax.vjp(functools.partial(silu_and_mul, implementation=implementation, interpret=interpret), gate_up)
        return out, backward(grad)[0]

    return program(both, interpret)


@pytest.mark.parametrize(("implementation", "interpret"), [("xla", False), *KERNELS])
def test_gradient_is_the_slope(implementation, interpret):
    rng = np.random.default_rng(0)
    gate_up, grad = rng.normal(size=(16, 1024)) * 3, rng.normal(size=(16, 512))

    def value(x):
        return x[:, :512] / (1 + np.exp(-x[:, :512])) * x[:, 512:]

    step = 1e-5 * np.concatenate([np.ones((16, 512)), np.zeros((16, 512))], axis=1)
    expected = [(value(gate_up + s) - value(gate_up - s)) / 2e-5 * grad for s in (step, step[:, ::-1])]
    found, slope = value_and_gradient(implementation, interpret)(jnp.asarray(gate_up, jnp.float32), jnp.asarray(grad, jnp.float32))
    np.testing.assert_allclose(found, value(gate_up), atol=1e-5)
    np.testing.assert_allclose(slope, np.concatenate(expected, axis=1), atol=2e-5)


@pytest.mark.parametrize(("implementation", "interpret"), KERNELS)
def test_half_precision_rounds_where_the_formula_does(implementation, interpret):
    gate_up = jnp.asarray(np.random.default_rng(0).normal(size=(64, 512)), jnp.bfloat16)
    grad = gate_up[:, :256]

    def plain(x):
        return jax.nn.silu(x[:, :256].astype(jnp.float32)).astype(x.dtype) * x[:, 256:]

    expected = jax.jit(lambda x, grad: jax.vjp(plain, x)[1](grad)[0])(gate_up, grad)
    _, found = value_and_gradient(implementation, interpret)(gate_up, grad)
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), rtol=2**-6, atol=1e-5)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match=r"gate_up must be a float \[R, 2 F\], got float32\[2, 3\]"):
        silu_and_mul(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        silu_and_mul(jnp.ones((2, 4)), implementation="cuda")
    odd = jnp.ones((7, 512), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="'triton': rows and width must be multiples of 8 and 256, got 7 and 256"):
        silu_and_mul(odd, implementation="triton", interpret=True)
    assert silu_and_mul(odd).shape == (7, 256)  # None picks one that can
    assert unsupported_reason("triton", jnp.ones((8, 512), jnp.bfloat16), interpret=True) is None


def test_lowers_for_cuda():
    gate_up, grad = jax.ShapeDtypeStruct((64, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((64, 512), jnp.bfloat16)
    assert "__gpu$xla.gpu.triton" in cuda_lowering(triton_gradient, gate_up, grad)
