"""Small random models for the tests, and a task for them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from selfspan_jax.attention.sequences import attend_under
from selfspan_jax.config import ModelConfig
from selfspan_jax.model import Decoder
from tests.selfspan_jax.streams import VOCAB, VOCAB_SIZE

TINY = dict(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, max_context_tokens=64,
    compute_dtype="float32",
)  # fmt: skip


class Digits:
    """A task over the small vocabulary of the tests: digits are themselves."""

    def encode_prompt(self, text):
        return np.array([1, *(int(character) for character in text), 3], np.int32)

    def decode(self, token_ids):
        return " ".join(str(int(token)) for token in token_ids)

    def answer(self, response_ids):
        return None


class Words:
    """A task over the small vocabulary of the tests whose text tokens are written as given."""

    def __init__(self, words=("4", "5", "6", "7", "8", "9"), structural="<{}>"):
        self.words, self.structural = words, structural

    def encode_prompt(self, text):
        return np.array([1, *(int(character) for character in text), 3], np.int32)

    def decode(self, token_ids):
        return "".join(self.words[i - 4] if 4 <= i < 10 else self.structural.format(i) for i in map(int, token_ids))

    def answer(self, response_ids):
        return self.decode(response_ids)[-80:]


def random_model(seed=0, **changes):
    """A model whose weights are large enough that attention to one token more or less shows in the logits."""
    model = Decoder(ModelConfig(**{**TINY, **changes}), vocab=VOCAB, vocab_size=VOCAB_SIZE, rngs=nnx.Rngs(seed))
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, state))
    return model


@nnx.jit
def forward(model, token_ids, mask):
    """Logits [B, T, V] of whole sequences under a given mask."""
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
    hidden, _ = model(token_ids, positions, attend_under(mask))
    return model.logits(hidden)


def reference_logits(model, token_ids, masks):
    return np.asarray(forward(model, jnp.asarray(token_ids, jnp.int32), jnp.asarray(np.array(masks))))
