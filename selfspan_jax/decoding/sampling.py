"""Sampling: the next token of every sequence from its logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from selfspan_jax.config import Sampling


@functools.partial(jax.jit, static_argnames=("num_sequences",))
def sequence_keys(key: PRNGKeyArray | None, num_sequences: int) -> PRNGKeyArray:
    """Derive a key for each sequence of a batch, so that what one draws depends on no other; from key 0 where none is given."""
    numbers = jnp.arange(num_sequences, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0) if key is None else key, numbers)


def sample(logits: Float[Array, "B V"], keys: PRNGKeyArray, sampling: Sampling) -> Int[Array, "B"]:
    """Sample the next tokens: the most likely ones at temperature 0, else draws from the nucleus of mass top_p (1904.09751)."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores = logits / sampling.temperature
    if sampling.top_p < 1:
        order = jnp.argsort(scores, axis=-1, descending=True)
        ranked = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1)
        mass_before = jnp.cumsum(ranked, axis=-1) - ranked
        kept = jnp.put_along_axis(jnp.zeros(scores.shape, bool), order, mass_before < sampling.top_p, axis=-1, inplace=False)
        scores = jnp.where(kept, scores, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
