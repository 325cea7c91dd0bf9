"""Finished models, and the names and layout of Llama under which parameters are stored.

A finished model is a directory:

    config.json         architecture, attention views, ids of the structural tokens
    model.safetensors   parameters under Llama's names and layout ([out, in]), bfloat16 if the model computes in it
    vocab.json          the task: how text becomes ids
    README.md           the card: how it was trained and what it scores
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from selfspan_jax.config import ModelConfig, from_json
from selfspan_jax.errors import UserError
from selfspan_jax.files import new_directory, read_json, write_json
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab
from selfspan_jax.weights.tensors import Tensors, open_safetensors, save_safetensors

_FORMAT = "selfspan model"


def save_model(directory: Path, model: Decoder, task: dict[str, Any], card: str) -> None:
    """Write a finished model, atomically.

    Args:
      task: content of `vocab.json`: the task's own `to_json`.
      card: content of `README.md`, Markdown.

    Raises: FileExistsError if the directory exists.
    """
    with new_model_directory(directory, model, describe(_FORMAT, model)) as partial:
        write_json(partial / "vocab.json", task)
        (partial / "README.md").write_text(card)


def load_model(directory: Path) -> tuple[Decoder, dict[str, Any]]:
    """Read a finished model, its parameters in float32, and its `vocab.json`.

    Raises:
      FileNotFoundError: no such directory, or a file of it is missing.
      UserError: a file that is malformed, or tensors that do not fit the config.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such checkpoint directory")
    for file in ("config.json", "vocab.json", "model.safetensors"):
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory}: not a checkpoint, {file} is missing")
    config, vocab, vocab_size, _ = read_description(directory / "config.json", _FORMAT)
    task = read_json(directory / "vocab.json")
    try:
        abstract = abstract_decoder(config, vocab, vocab_size)
    except ValueError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from error
    tensors = open_safetensors(directory / "model.safetensors", [directory / "model.safetensors"])
    tensors.check(llama_shapes(abstract))
    return with_tensors(abstract, tensors.map(lambda _, array: array.astype(jnp.float32))), task


@contextlib.contextmanager
def new_model_directory(directory: Path, model: Decoder, config: dict[str, Any]) -> Iterator[Path]:
    """Create a directory with `config.json` and `model.safetensors`, atomically; the block may add files to it.

    Yields: where to write. Raises: FileExistsError if the directory exists; UserError for a quantised or adapted model.
    """
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    if {"scales", "lora_a", "new_rows"} & {path[-1] for path, _ in flat}:
        raise UserError("int8 weights and adapters cannot be saved as a model: save the model that they were made from, or merge them")
    params = to_llama(model.config, nnx.state(model, nnx.Param))
    arrays = {name: array.astype(model.config.compute_dtype) for name, array in params.items()}
    with new_directory(directory) as partial:
        save_safetensors(partial / "model.safetensors", arrays, metadata={"format": "pt"})
        write_json(partial / "config.json", config)
        yield partial


# ------------------------------------------------------------------------------------------------------ descriptions


def describe(name: str, model: Decoder) -> dict[str, Any]:
    """Describe a model as JSON: name and version of the format, architecture, vocabulary."""
    return {
        "format": name,
        "version": 1,
        "model": dataclasses.asdict(model.config),
        "vocab_size": model.vocab_size,
        "span_vocab": dataclasses.asdict(model.vocab),
    }


def read_description(file: Path, name: str, more: tuple[str, ...] = ()) -> tuple[ModelConfig, SpanVocab, int, dict[str, Any]]:
    """Read what `describe` wrote: config, structural ids, size of the vocabulary, and all fields of the file.

    Args:
      more: other fields that must be there.

    Raises: UserError for another format, missing fields, or values that are not allowed.
    """
    fields = read_json(file)
    if (fields.get("format"), fields.get("version")) != (name, 1):
        raise UserError(f"{file}: expected format {name!r} version 1")
    if missing := {"model", "vocab_size", "span_vocab", *more} - fields.keys():
        raise UserError(f"{file}: {', '.join(sorted(missing))} missing")
    try:
        config, vocab = from_json(ModelConfig, fields["model"]), from_json(SpanVocab, fields["span_vocab"])
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    if not isinstance(vocab_size := fields["vocab_size"], int):
        raise UserError(f"{file}: vocab_size is {vocab_size!r}, not a whole number")
    return config, vocab, vocab_size, fields


# -------------------------------------------------------------------------------------------------- names and layout

# Maps that the decoder fuses, and their names in Llama.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def abstract_decoder(config: ModelConfig, vocab: SpanVocab, vocab_size: int) -> Decoder:
    """Build a decoder with shapes in place of parameters."""
    return nnx.eval_shape(lambda: Decoder(config, vocab=vocab, vocab_size=vocab_size, rngs=nnx.Rngs(0)))


def llama_shapes(decoder: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a decoder's parameters under Llama's names."""
    return jax.eval_shape(functools.partial(to_llama, decoder.config), nnx.state(decoder, nnx.Param))


def with_tensors(decoder: Decoder, tensors: Tensors) -> Decoder:
    """Fill an abstract decoder with tensors under Llama's names, which `Tensors.check` has passed."""
    graph, params = nnx.split(decoder, nnx.Param)
    return nnx.merge(graph, from_llama(decoder.config, params, tensors))


def to_llama(config: ModelConfig, params: nnx.State) -> dict[str, Array]:
    """Convert parameters to Llama's names and layout: `model.layers.0.self_attn.q_proj.weight` and so on."""
    arrays = {}
    for path, variable in nnx.to_flat_state(params):
        for name, part in zip(_llama_names(path), _parts(config, path, variable[...]), strict=True):
            arrays[name] = part
    return arrays


def from_llama(config: ModelConfig, like: nnx.State, arrays: Mapping[str, Array]) -> nnx.State:
    """Convert arrays as named by `to_llama` to parameters with the structure of `like`."""
    flat = []
    for path, _ in nnx.to_flat_state(like):
        parts = [arrays[name] for name in _llama_names(path)]
        if len(parts) == 3:  # each kv head's queries, key and value next to each other
            tail = parts[0].shape[1:]
            by_kv_head = [part.reshape(config.num_kv_heads, -1, *tail) for part in parts]
            fused = jnp.concatenate(by_kv_head, axis=1).reshape(-1, *tail)
        else:
            fused = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        flat.append((path, nnx.Param(jax.block_until_ready(fused))))  # so that the parts are freed before the next are read
    return nnx.from_flat_state(flat)


def _llama_names(path: tuple[Any, ...]) -> list[str]:
    *owners, owner, leaf = map(str, path)
    first = [] if owner == "lm_head" else ["model"]
    leaf = "bias" if leaf == "bias" else "weight"
    return [".".join([*first, *owners, part, leaf]) for part in _FUSED.get(owner, (owner,))]


def _parts(config: ModelConfig, path: tuple[Any, ...], array: Array) -> list[Array]:
    match str(path[-2]):
        case "qkv_proj":
            tail = array.shape[1:]
            heads = array.reshape(config.num_kv_heads, -1, config.head_size, *tail)
            return [part.reshape(-1, *tail) for part in (heads[:, :-2], heads[:, -2], heads[:, -1])]
        case "gate_up_proj":
            return jnp.split(array, 2)
        case _:
            return [array]
