"""Decoding: one state, one pure step, and the engine that drives it."""

from selfspan_jax.decoding.engine import Engine

__all__ = ["Engine"]
