"""Decoding: the engine, its state, the KV cache and sampling."""

from selfspan_jax.decoding.engine import Chunk, Engine
from selfspan_jax.decoding.state import DecodeState

__all__ = ["Chunk", "DecodeState", "Engine"]
