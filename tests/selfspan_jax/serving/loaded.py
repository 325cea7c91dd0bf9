"""The model of the workers' tests: apart from them, because a worker imports the module that it is loaded by."""

from selfspan_jax.lm import SpanLM
from tests.selfspan_jax.models import Words, random_model


def load(mesh=None):
    """Make it in a worker."""
    return SpanLM(random_model(max_context_tokens=64, num_layers=1), Words(), mesh=mesh)
