"""Import pretrained language models from Hugging Face directories and GGUF files, with structural tokens added.

Every shape is compared with the config before a tensor is read, and tensors are read one parameter at a time, so that memory
stays near the model's size.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from selfspan_jax.config import COMPUTE_DTYPES, Dtype
from selfspan_jax.errors import UserError
from selfspan_jax.files import read_json
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab
from selfspan_jax.weights import gguf, hub, huggingface, tokenizers
from selfspan_jax.weights.huggingface import Source
from selfspan_jax.weights.models import abstract_decoder, from_llama, is_model, llama_shapes, open_model, vocab_file
from selfspan_jax.weights.tokenizers import NUM_LABELS, TextTask

_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_PRECISE: dict[str, Dtype] = {"F32": "f32", "F64": "f32", "F16": "f16"}  # what bfloat16 rounds, and the option that does not


def is_pretrained(path: Path) -> bool:
    """Return whether this is a GGUF file, or a directory with a Hugging Face config."""
    config = path / "config.json"
    return gguf.is_gguf(path) or (config.is_file() and "model_type" in read_json(config))


def open_source(path: str | Path) -> Source:
    """Open a GGUF file, a Hugging Face directory or hub id, or a finished model of this project; see there for errors."""
    path = hub.locate(path)
    if gguf.is_gguf(path):
        return gguf.open_source(path)
    if (path / "adapter.json").is_file():
        raise UserError(f"{path} is an adapter: expected a whole model, such as the one that fine-tuning writes beside it")
    if not is_model(path):
        return huggingface.open_source(path)
    decoder, tensors, task = open_model(path)
    vocabulary = task["vocab"] if isinstance(task.get("vocab"), dict) else {}
    make_tokenizer = functools.partial(tokenizers.from_vocabulary, vocab_file(path), vocabulary, decoder.vocab)
    return Source(decoder.config, decoder.vocab_size, tensors, make_tokenizer, vocab=decoder.vocab)


def load(
    path: str | Path,
    *,
    num_labels: int | None = None,
    fewer_labels: bool = False,
    labels_as_words: bool = False,
    seed: int = 0,
    **changes: Any,
) -> tuple[Decoder, TextTask]:
    """Load a language model and its tokenizer, both with the structural tokens.

    A model that has them already, because it is an export of this project or a finished model, keeps them and their embeddings.

    Args:
      num_labels: labels that are added, by default 256; of a model that has structural tokens so many are used, by default all.
      fewer_labels: take a model that has structural tokens of fewer labels.
      labels_as_words: see `load_decoder`; for a model that is to be trained.

    Other arguments and errors: see `load_decoder`. Raises: UserError for a tokenizer that does not fit the model.
    """
    if not (num_labels is None or (type(num_labels) is int and num_labels >= 2)):
        raise UserError(f"num_labels is {num_labels!r}; allowed: whole numbers from 2")
    source = open_source(path)  # first: the tokenizer's library reads the config too
    where, tokenizer, rows = source.tensors.where, source.load_tokenizer(), source.vocab_size
    if (highest := max(tokenizer.get_vocab().values(), default=-1)) >= rows:
        raise UserError(f"{where}: the tokenizer has {highest + 1:,} tokens, the model's embedding {rows:,} rows: not of one model")
    if tokenizer.eos_token_id is None and source.eos_ids:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(source.eos_ids[0])
    try:
        vocab, new_ids, used_ids = source.vocab or tokenizers.find_span_tokens(tokenizer), None, None
        if vocab is None:
            old = set(tokenizer.get_vocab().values())
            vocab = tokenizers.add_span_tokens(tokenizer, num_labels or NUM_LABELS)
            new_ids, used_ids = sorted(set(tokenizer.get_vocab().values()) - old), sorted(old)
        elif (num_labels or 0) > vocab.num_labels and not fewer_labels:
            raise UserError(f"has span tokens of {vocab.num_labels} labels: num_labels is {num_labels}")
        elif num_labels:
            vocab = dataclasses.replace(vocab, num_labels=min(num_labels, vocab.num_labels))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    model = load_decoder(source, vocab, new_ids=new_ids, used_ids=used_ids, labels_as_words=labels_as_words, seed=seed, **changes)
    return model, TextTask(tokenizer, model.stop_ids)


def load_decoder(
    source: str | Path | Source,
    vocab: SpanVocab | None = None,
    *,
    new_ids: Sequence[int] | None = None,
    used_ids: Sequence[int] | None = None,
    labels_as_words: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Decoder:
    """Load the decoder of a pretrained model, its parameters in the compute dtype.

    The embedding of a new token is the mean of the old ones plus a hundredth of their spread: the mean leaves the probabilities of
    the old tokens nearly as they were (a new token scores like an average one), the noise tells the new tokens apart.

    Args:
      source: a path, a hub id, or what `open_source` returned for it.
      vocab: ids of the structural tokens; by default the model's own, or after the file's vocabulary, with 256 labels.
      new_ids: ids of new tokens within the file's rows, which then begin like those beyond.
      used_ids: ids of old tokens, whose rows new ones begin with the mean of; by default all below the new ones.
      labels_as_words: begin the rows of `<seg:k>` and `<ref:k>` as that of one old token, drawn for each label, plus a row of the
        family: a pretrained model copies its old tokens, so it can name a label that it reads before it has learnt any. Without
        training such a model would write labels where it means these tokens.
      seed: seed of what is drawn for new embeddings.
      changes: fields of ModelConfig in place of the file's: compute_dtype, mask, header_view, prompt_view and so on.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: an architecture that the decoder does not have, or tensors that do not fit the config.
    """
    source = source if isinstance(source, Source) else open_source(source)
    old_size = source.vocab_size
    vocab = vocab or source.vocab or SpanVocab.consecutive(old_size, NUM_LABELS)
    new_size = max(old_size, vocab.min_vocab_size)
    new_rows = np.array(sorted({*(new_ids or ()), *range(old_size, new_size)}), np.int32)
    old_rows = np.array(used_ids or range(new_rows[0] if len(new_rows) else 0), np.int32)
    config = dataclasses.replace(source.config, **changes)
    abstract = abstract_decoder(config, vocab, new_size)
    shapes = llama_shapes(abstract)
    for name in shapes.keys() & _EMBEDDINGS:
        shapes[name] = jax.ShapeDtypeStruct((old_size, config.hidden_size), shapes[name].dtype)
    ignored = {name for name in source.tensors.shapes if name.endswith("rotary_emb.inv_freq")}  # of old files; they follow from the config
    source.tensors.check(shapes, ignored | ({"lm_head.weight"} if config.tie_embeddings else set()))
    if "compute_dtype" not in changes:
        _say_if_rounded(source, config.compute_dtype)

    def read(name: str) -> Array:
        array = source.tensors.read(name).astype(config.compute_dtype)
        if name not in _EMBEDDINGS or not len(new_rows):
            return array
        rows = _extended(array, new_size, old_rows, new_rows, jax.random.key(seed))
        return _with_words(rows, old_rows, vocab, jax.random.key(seed)) if labels_as_words else rows

    model = from_llama(abstract, read)
    model.stop_ids = tuple(i for i in source.eos_ids if i != vocab.eos_id)
    return model


def _say_if_rounded(source: Source, compute_dtype: str) -> None:
    """Log where weights are stored more precisely than they are computed with by default."""
    option = _PRECISE.get(source.tensors.main_dtype or "")
    if option and (stored := COMPUTE_DTYPES[option]) != compute_dtype:
        logging.getLogger(__name__).warning(
            f"{source.tensors.where}: weights stored in {stored}, computed in {compute_dtype}; option dtype: {option} to round nothing"
        )


def _extended(
    rows: Float[Array, "V D"], size: int, old: Int[np.ndarray, "m"], new: Int[np.ndarray, "n"], key: Array
) -> Float[Array, "V2 D"]:
    """Give rows to the new ids: the mean of the rows of old ones, plus noise."""
    wide = rows[old].astype(jnp.float32)
    noise = jax.random.normal(key, (len(new), rows.shape[1]), jnp.float32)
    values = jnp.mean(wide, axis=0, keepdims=True) + 0.01 * jnp.std(wide, axis=0, keepdims=True) * noise
    longer = jnp.concatenate([rows, jnp.zeros((size - rows.shape[0], rows.shape[1]), rows.dtype)])
    return longer.at[new].set(values.astype(rows.dtype))


def _with_words(rows: Float[Array, "V D"], old: Int[np.ndarray, "m"], vocab: SpanVocab, key: Array) -> Float[Array, "V D"]:
    """Give both tokens of each label the row of one frequent old token, plus noise that all of a family share.

    Tokenizers number frequent tokens first, after single bytes; rare ones a model has hardly learnt.
    """
    frequent = rows[old[len(old) // 50 : len(old) // 5 + 1]].astype(jnp.float32)
    words = jax.random.choice(key, frequent, (vocab.num_labels,), replace=len(frequent) < vocab.num_labels)
    for family, base in enumerate((vocab.seg_base, vocab.ref_base)):
        noise = jax.random.normal(jax.random.fold_in(key, family), (1, rows.shape[1]), jnp.float32)
        values = words + 0.25 * jnp.std(rows[old].astype(jnp.float32), axis=0, keepdims=True) * noise
        rows = rows.at[base : base + vocab.num_labels].set(values.astype(rows.dtype))
    return rows
