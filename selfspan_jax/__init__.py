"""selfspan: a language model that chooses its own attention span, and decodes faster for it."""

from selfspan_jax import spans
from selfspan_jax.lm import Output, SpanLM, Step

__all__ = ["Output", "SpanLM", "Step", "spans"]
