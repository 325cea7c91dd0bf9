"""Import pretrained language models from Hugging Face directories and GGUF files, with structural tokens added.

Every shape is compared with the config before a tensor is read, and tensors are read one parameter at a time, so that memory
stays near the model's size.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfspan_jax.errors import UserError
from selfspan_jax.files import read_json
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab
from selfspan_jax.weights import gguf, huggingface
from selfspan_jax.weights.huggingface import Source
from selfspan_jax.weights.models import abstract_decoder, from_llama, llama_shapes
from selfspan_jax.weights.tokenizers import TextTask, add_span_tokens

NUM_LABELS = 256  # added by default
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def is_pretrained(path: Path) -> bool:
    """Return whether this is a GGUF file, or a directory with a Hugging Face config."""
    config = path / "config.json"
    return path.suffix == ".gguf" or (config.is_file() and "model_type" in read_json(config))


def open_source(path: Path) -> Source:
    """Open a GGUF file, or a Hugging Face directory; see there for errors."""
    return gguf.open_source(path) if path.suffix == ".gguf" else huggingface.open_source(path)


def load(path: str | Path, *, num_labels: int = NUM_LABELS, seed: int = 0, **changes: Any) -> tuple[Decoder, TextTask]:
    """Load a language model and its tokenizer, both with the structural tokens of `num_labels` labels added.

    Other arguments and errors: see `load_decoder`. Raises: UserError for a tokenizer that does not fit the model.
    """
    source = open_source(Path(path))  # first: the tokenizer's library reads the config too
    tokenizer, rows = source.load_tokenizer(), source.vocab_size
    if len(tokenizer) > rows:
        raise UserError(f"{path}: the tokenizer has {len(tokenizer):,} tokens, the model's embedding {rows:,} rows: not of one model")
    try:
        vocab = add_span_tokens(tokenizer, num_labels)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return load_decoder(source, vocab, seed=seed, **changes), TextTask(tokenizer)


def load_decoder(source: str | Path | Source, vocab: SpanVocab | None = None, *, seed: int = 0, **changes: Any) -> Decoder:
    """Load the decoder of a Hugging Face directory or a GGUF file, its parameters in the compute dtype.

    The embedding of a new token is the mean of the old ones plus a hundredth of their spread: the mean leaves the probabilities of
    the old tokens nearly as they were (a new token scores like an average one), the noise tells the new tokens apart.

    Args:
      source: a path, or what `open_source` returned for it.
      vocab: ids of the structural tokens; by default after the file's vocabulary, with 256 labels.
      seed: seed of the noise of new embeddings.
      changes: fields of ModelConfig in place of the file's: compute_dtype, mask, header_view, prompt_view and so on.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: an architecture that the decoder does not have, or tensors that do not fit the config.
    """
    source = source if isinstance(source, Source) else open_source(Path(source))
    old_size = source.vocab_size
    vocab = vocab or SpanVocab.consecutive(old_size, NUM_LABELS)
    new_size = max(old_size, vocab.min_vocab_size)
    config = dataclasses.replace(source.config, **changes)
    abstract = abstract_decoder(config, vocab, new_size)
    shapes = llama_shapes(abstract)
    for name in shapes.keys() & _EMBEDDINGS:
        shapes[name] = jax.ShapeDtypeStruct((old_size, config.hidden_size), shapes[name].dtype)
    ignored = {name for name in source.tensors.shapes if name.endswith("rotary_emb.inv_freq")}  # of old files; they follow from the config
    source.tensors.check(shapes, ignored | ({"lm_head.weight"} if config.tie_embeddings else set()))

    def read(name: str) -> Array:
        array = source.tensors.read(name).astype(config.compute_dtype)
        return _extended(array, new_size, jax.random.key(seed)) if name in _EMBEDDINGS else array

    return from_llama(abstract, read)


def _extended(rows: Float[Array, "V D"], size: int, key: Array) -> Float[Array, "V2 D"]:
    wide = rows.astype(jnp.float32)
    noise = jax.random.normal(key, (size - rows.shape[0], rows.shape[1]), jnp.float32)
    new = jnp.mean(wide, axis=0, keepdims=True) + 0.01 * jnp.std(wide, axis=0, keepdims=True) * noise
    return jnp.concatenate([rows, new.astype(rows.dtype)])
