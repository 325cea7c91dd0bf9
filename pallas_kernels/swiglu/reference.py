"""SwiGLU (2002.05202, equation 6) and its gradient in plain JAX."""

import jax
import jax.numpy as jnp


def xla_silu_and_mul(gate_up: jax.Array) -> jax.Array:
    """Compute silu(gate) * up, `[R, F]`, of `[R, 2 F]`: silu in float32, rounded to the dtype of `gate_up` before the product."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up


def xla_gradient(gate_up: jax.Array, grad: jax.Array) -> jax.Array:
    """Compute the gradient of `gate_up`, `[R, 2 F]`, from that of the result, `[R, F]`."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jnp.concatenate(gradients(gate, up, grad), axis=-1)


def gradients(gate: jax.Array, up: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients of gate and up in float32, rounded where `xla_silu_and_mul` rounds; the kernel calls it too."""
    wide = gate.astype(jnp.float32)
    slope = jax.nn.sigmoid(wide)
    through = (grad * up).astype(jnp.float32)
    dgate = through * (slope + wide * slope * (1.0 - slope))
    return dgate.astype(gate.dtype), (wide * slope).astype(gate.dtype) * grad
