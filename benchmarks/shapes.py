"""Model sizes that benchmarks measure, and the bytes that a decode step of them moves."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from data.vocab import DEFAULT_VOCAB, Vocab
from selfspan_jax.config import PRESETS, ModelConfig, Weights
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab

ShapeName = Literal["llama2-7b", "llama3-8b", "llama3-1b", "smollm2-135m", "arithmetic-small", "arithmetic-base"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model without its weights."""

    config: ModelConfig
    vocab: SpanVocab
    vocab_size: int

    def abstract(self, weights: Weights = "bf16") -> Decoder:
        """Build the decoder as `for_decoding` returns it, with shapes in place of arrays, to be filled, not changed."""
        return _abstract(self, weights)

    def random(self, seed: int) -> Decoder:
        """Build the decoder with random weights, drawn on the device in the compute dtype."""
        graph, params = nnx.split(self.abstract())
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        drawn = [_draw(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
        return nnx.merge(graph, jax.tree.unflatten(tree, drawn))

    def with_context(self, tokens: int) -> Shape:
        """Return this shape with room for sequences of at least `tokens` tokens."""
        room = max(tokens, self.config.max_context_tokens)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, max_context_tokens=room))


@functools.lru_cache(maxsize=8)  # of 32 layers it takes a second
def _abstract(shape: Shape, weights: Weights) -> Decoder:
    make = functools.partial(Decoder, shape.config, vocab=shape.vocab, vocab_size=shape.vocab_size)
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)).for_decoding(weights=weights))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(key, shape: tuple[int, ...], dtype) -> Array:
    return jnp.ones(shape, dtype) if len(shape) == 1 else 0.02 * jax.random.normal(key, shape, dtype)


# Sizes of published models (their config.json) with their vocabulary sizes; None for the arithmetic vocabulary.
_llama = functools.partial(ModelConfig, hidden_size=4096, num_layers=32, num_heads=32, head_size=128, tie_embeddings=False)
_SHAPES: dict[ShapeName, tuple[ModelConfig, int | None]] = {
    "llama2-7b": (_llama(intermediate_size=11008, num_kv_heads=32), 32_000),
    "llama3-8b": (_llama(intermediate_size=14336, num_kv_heads=8, rope_theta=500_000.0), 128_256),
    "llama3-1b": (
        ModelConfig(hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8, rope_theta=500_000.0),
        128_256,
    ),
    "smollm2-135m": (
        ModelConfig(hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, rope_theta=100_000.0),
        49_152,
    ),
    "arithmetic-small": (PRESETS["arithmetic-small"].model, None),
    "arithmetic-base": (PRESETS["arithmetic-base"].model, None),
}


def named_shape(name: ShapeName, *, arithmetic_vocab: bool = False, num_labels: int = DEFAULT_VOCAB.num_labels) -> Shape:
    """Look a shape up by its name.

    Args:
      arithmetic_vocab: use the control tokens of the arithmetic vocabulary. By default a published model gets its own number
        of ids, the last of them borrowed as control tokens.
      num_labels: of the arithmetic vocabulary.
    """
    config, vocab_size = _SHAPES[name]
    if vocab_size is not None and not arithmetic_vocab:
        return Shape(config, borrow_labels(vocab_size), vocab_size)
    vocab = SpanVocab(**Vocab(num_labels).span_ids())
    return Shape(config, vocab, vocab_size or vocab.min_vocab_size)


def borrow_labels(vocab_size: int, num_labels: int = 512) -> SpanVocab:
    """Place control tokens at the top of a vocabulary that has none."""
    return SpanVocab.consecutive(vocab_size - 2 * num_labels - 4, num_labels)


def step_bytes(model: Decoder, num_attended: float, batch_size: int) -> int:
    """Count the bytes that a decode step must move: weights, embeddings of the tokens, KV rows attended to, KV rows written.

    Layers with a memory also read it and what waits to be added to it, and write both.

    Args:
      model: as `for_decoding` returns it, or its shapes; on a mesh the share of one device.
      num_attended: tokens attended to, summed over the batch; on a mesh over the device's sequences.
      batch_size: sequences; on a mesh those of the device.
    """
    config = model.config
    embedding = model.embed_tokens.embedding.get_value()
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if model.lm_head is not None:  # otherwise the embedding is the output layer too, and is read as a whole
        weights -= embedding.size * embedding.dtype.itemsize
    lookups = batch_size * config.hidden_size * embedding.dtype.itemsize
    # Float32 [K, H, H] and [K, H], of the memory and of what waits to be added to it, each read and written.
    memory = 2 * 2 * 4 * config.num_layers * config.num_kv_heads * config.head_size * (config.head_size + 1)
    memory = memory if config.mask == "memory" else 0
    return round(weights + lookups + (num_attended + batch_size) * config.row_bytes + batch_size * memory)


# ---------------------------------------------------------------------------------------------------------------- kernels


def matrix_sizes(name: ShapeName) -> dict[str, tuple[int, int]]:
    """Outputs M and inputs D of the matrices of a decode step: those of a layer and the output layer; gate and up are one."""
    shape = named_shape(name)
    config = shape.config
    query_size = config.num_heads * config.head_size
    return {
        "qkv": (query_size + 2 * config.num_kv_heads * config.head_size, config.hidden_size),
        "o": (config.hidden_size, query_size),
        "gate-up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
        "head": (shape.vocab_size, config.hidden_size),
    }


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """A problem of the span decode kernel; `lengths` are the tokens that each sequence holds."""

    name: str
    why: str
    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def capacity(self) -> int:
        return max(self.lengths)

    @property
    def row_bytes(self) -> int:
        """Bytes of a key and its value in bfloat16, all heads."""
        return 2 * 2 * self.num_kv_heads * self.head_size


@dataclasses.dataclass(frozen=True)
class PromptShape:
    """A problem of the prompt attention kernel: `num_queries` queries of each prompt, from position `first_query` on."""

    name: str
    why: str
    batch_size: int
    num_queries: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    first_query: int = 0
    mask: Literal["causal", "local", "window"] = "causal"

    @property
    def num_keys(self) -> int:
        return self.first_query + self.num_queries


PROMPT_SHAPES = (
    PromptShape("b1-8k", "Llama-3-8B heads, one prompt that fills the machine", 1, 8192, 32, 8, 128),
    PromptShape("b4-2k", "short prompts: tiles on the diagonal are a tenth of the work", 4, 2048, 32, 8, 128),
    PromptShape("b1-32k", "long: the steady state of the loop over keys", 1, 32768, 32, 8, 128),
    PromptShape("b1-8k-at-24k", "the last chunk of a long prompt, over rows already in the pool", 1, 8192, 32, 8, 128, first_query=24576),
    PromptShape("b1-16k-h64", "SmolLM2-135M heads: head size 64, three queries to a key", 1, 16384, 9, 3, 64),
    PromptShape("b1-32k-mha", "as b1-32k, but no heads share keys: four times the keys and values", 1, 32768, 32, 32, 128),
    PromptShape("b1-32k-mqa", "as b1-32k, but all heads share keys: an eighth of the keys and values", 1, 32768, 32, 1, 128),
    PromptShape(
        "local-b128-3k", "expressions that attend to their own labels: few pairs, in small tiles", 128, 3072, 8, 4, 64, mask="local"
    ),
    PromptShape("local-b16-8k-mha", "longer ones with as many kv heads as query heads", 16, 8192, 12, 12, 64, mask="local"),
    PromptShape("window-b1-32k", "first and recent tokens of a long prompt, Llama-3-8B heads", 1, 32768, 32, 8, 128, mask="window"),
)


ATTENTION_SHAPES = (
    AttentionShape("b1-1k", "batch 1, short: nothing but latency", (1024,), 32, 4, 128),
    AttentionShape("b1-16k", "batch 1, long: one sequence must fill the machine", (16384,), 32, 4, 128),
    AttentionShape("b32-gqa4-8k", "Llama-3-8B heads, a full batch", (8192,) * 32, 32, 8, 128),
    AttentionShape("b32-mha-2k", "Llama-2-7B heads: the most KV bytes per token", (2048,) * 32, 32, 32, 128),
    AttentionShape("b128-mha-4k", "a small model at a large batch, head size 64", (4096,) * 128, 12, 12, 64),
    AttentionShape("b192-gqa3-5k", "SmolLM2-135M heads, papers in many places of a scheduler", (5000,) * 192, 9, 3, 64),
    AttentionShape("ragged", "one long sequence must not hold up 31 short ones", (32768, *(1024,) * 31), 32, 8, 128),
)
