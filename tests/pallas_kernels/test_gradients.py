"""Rotation and SwiGLU against formulas written out in numpy (float64) and their derivatives taken by differences and by JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gradients
from tests.pallas_kernels.lowering import cuda_lowering

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

INTERPRET = [True, pytest.param(False, marks=pytest.mark.gpu, id="gpu")]
SHAPES = [(2, 1, 64), (1, 3, 32)]  # kv heads, group, head size


def heads(num_kv_heads, group, head_size, rows=64):
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 7, (rows, head_size // 2))
    return rng.normal(size=(rows, num_kv_heads, group + 2, head_size)), angles


def by_complex_numbers(qkv, angles):
    """A pair is a complex number, turned by e^(i angle)."""
    half = qkv.shape[-1] // 2
    turned = (qkv[..., :half] + 1j * qkv[..., half:]) * np.exp(1j * angles)[:, None, None, :]
    turned = np.concatenate([turned.real, turned.imag], axis=-1)
    return turned[:, :, :-2].reshape(len(qkv), -1, qkv.shape[-1]), turned[:, :, -2], qkv[:, :, -1]


@pytest.mark.parametrize("interpret", [None, *INTERPRET])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_are_turned_and_their_gradients_turned_back(shape, interpret):
    """A rotation is orthogonal: its transpose, the gradient, undoes it."""
    qkv, angles = heads(*shape)
    cos, sin, x = (jnp.asarray(array, jnp.float32) for array in (np.cos(angles), np.sin(angles), qkv))
    if interpret is None:
        found, backward = jax.vjp(lambda x: gradients.rotated_heads(x, cos, sin), x)
        (restored,) = backward(found)
    else:
        found = gradients.rotate_kernel(x, cos, sin, interpret)
        restored = gradients.rotate_gradient_kernel(*found, cos, sin, interpret)
    for one, other in zip(found, by_complex_numbers(qkv, angles), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    np.testing.assert_allclose(restored, qkv, atol=2e-6)


@pytest.mark.parametrize("interpret", [None, *INTERPRET])
def test_gradient_of_swiglu_is_its_slope(interpret):
    rng = np.random.default_rng(0)
    gate_up, grad = rng.normal(size=(16, 1024)) * 3, rng.normal(size=(16, 512))

    def value(x):
        return x[:, :512] / (1 + np.exp(-x[:, :512])) * x[:, 512:]

    step = 1e-5 * np.concatenate([np.ones((16, 512)), np.zeros((16, 512))], axis=1)
    expected = [(value(gate_up + s) - value(gate_up - s)) / 2e-5 * grad for s in (step, step[:, ::-1])]
    x, g = jnp.asarray(gate_up, jnp.float32), jnp.asarray(grad, jnp.float32)
    if interpret is None:
        found, backward = jax.vjp(gradients.swiglu, x)
        np.testing.assert_allclose(found, value(gate_up), atol=1e-5)
        (found,) = backward(g)
    else:
        found = gradients.swiglu_gradient_kernel(x, g, interpret)
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), atol=2e-5)


@pytest.mark.parametrize("interpret", INTERPRET)
def test_half_precision_rounds_where_the_formulas_do(interpret):
    qkv, angles = heads(2, 2, 64)
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    wide = jnp.asarray(qkv, jnp.bfloat16)
    for one, other in zip(
        gradients.rotate_kernel(wide, cos, sin, interpret), by_complex_numbers(np.asarray(wide, float), angles), strict=True
    ):
        np.testing.assert_allclose(np.asarray(one, float), other, rtol=2**-8, atol=1e-5)
    gate_up, grad = wide.reshape(64, 512), wide.reshape(64, 512)[:, :256]
    _, backward = jax.vjp(lambda x: jax.nn.silu(x[:, :256].astype(jnp.float32)).astype(x.dtype) * x[:, 256:], gate_up)
    found = gradients.swiglu_gradient_kernel(gate_up, grad, interpret)
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(backward(grad)[0], float), rtol=2**-6, atol=1e-5)


def test_lowers_for_cuda():
    qkv, angles = jax.ShapeDtypeStruct((64, 4, 3, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 32), jnp.float32)
    q = jax.ShapeDtypeStruct((64, 4, 64), jnp.bfloat16)
    gate_up, grad = jax.ShapeDtypeStruct((64, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((64, 512), jnp.bfloat16)
    for kernel, args in (
        (gradients.rotate_kernel, (qkv, angles, angles)),
        (gradients.rotate_gradient_kernel, (q, q, q, angles, angles)),
        (gradients.swiglu_gradient_kernel, (gate_up, grad)),
    ):
        assert "__gpu$xla.gpu.triton" in cuda_lowering(kernel, *args)
