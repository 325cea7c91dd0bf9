"""SwiGLU and its gradient in plain JAX."""

import jax
import jax.numpy as jnp


def xla_silu_and_mul(gate_up: jax.Array) -> jax.Array:
    """Compute `silu_and_mul`."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up


def gradients(gate: jax.Array, up: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients of gate and up in float32, rounded where `silu_and_mul` rounds."""
    wide = gate.astype(jnp.float32)
    slope = jax.nn.sigmoid(wide)
    through = (grad * up).astype(jnp.float32)
    dgate = through * (slope + wide * slope * (1.0 - slope))
    return dgate.astype(gate.dtype), (wide * slope).astype(gate.dtype) * grad


def xla_gradient(gate_up: jax.Array, grad: jax.Array) -> jax.Array:
    """Compute the gradient of `silu_and_mul`, `[R, 2 F]`, from that of its result, `[R, F]`."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jnp.concatenate(gradients(gate, up, grad), axis=-1)
