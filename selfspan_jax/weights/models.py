"""Models in files: finished models, named tensors, and the names and layout of Llama under which parameters are stored.

A finished model is a directory:

    config.json         architecture, attention views, ids of the structural tokens
    model.safetensors   parameters under Llama's names and layout ([out, in]), bfloat16 if the model computes in it
    vocab.json          the task: how text becomes ids; vocab.json.gz where it has a tokenizer
    README.md           the card: how it was trained and what it scores
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from selfspan_jax.config import ModelConfig, from_json
from selfspan_jax.errors import UserError
from selfspan_jax.files import new_directory, read_json, shown_path, write_json, write_packed_json
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab

HISTORY = ("schedules", "finished_steps", "left_out_examples")
"""The keys of a run.json that say how the run went, see `training.runs`: the others decide its result."""


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Tensors of a file or a directory."""

    where: Path
    """The file or directory, which errors name."""
    shapes: dict[str, tuple[int, ...]]
    """By name."""
    read_unchecked: Callable[[str], Array]
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By name, in the words of the file: "F32", "BF16", "Q4_1"."""

    @property
    def main_dtype(self) -> str | None:
        """The dtype that most numbers are stored in; None where no tensor says its own."""
        sizes = collections.Counter[str]()
        for name in self.shapes.keys() & self.dtypes.keys():
            sizes[self.dtypes[name]] += math.prod(self.shapes[name])
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None

    def read(self, name: str) -> Array:
        """Read a tensor. Raises UserError for numbers that are not finite."""
        array = self.read_unchecked(name)
        if jnp.issubdtype(array.dtype, jnp.floating) and not _is_finite(array):
            raise UserError(f"{self.where}: {name} has numbers that are not finite (NaN or infinite): the weights are damaged")
        return array

    def check(self, wanted: Mapping[str, Any], ignored: Container[str] = ()) -> None:
        """Compare names and shapes with those of `wanted` (arrays, or shapes in their place); no tensor is read.

        Args:
          ignored: names that may be there although they are not wanted.

        Raises: UserError that names the first tensor that is missing, unknown or of another shape.
        """
        if missing := sorted(wanted.keys() - self.shapes.keys()):
            raise UserError(f"{self.where}: {len(missing)} tensors missing, {missing[0]} among them")
        if unknown := sorted(name for name in self.shapes.keys() - wanted.keys() if name not in ignored):
            raise UserError(f"{self.where}: {len(unknown)} tensors that the config does not know, {unknown[0]} among them")
        for name, array in wanted.items():
            if self.shapes[name] != array.shape:
                raise UserError(f"{self.where}: {name} is {list(self.shapes[name])}, but the config asks for {list(array.shape)}")


@jax.jit  # without an array of booleans
def _is_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


def open_safetensors(where: Path, files: Sequence[Path]) -> Tensors:
    """Open safetensors files, the shards of one model, and read their names and shapes.

    Raises: UserError for a file that is not in this format; FileNotFoundError.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    file_of: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "flax") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a mapping)
                    tensor = shard.get_slice(name)
                    shapes[name], dtypes[name], file_of[name] = tuple(tensor.get_shape()), tensor.get_dtype(), file
        except SafetensorError as error:
            raise UserError(f"{file}: not a safetensors file ({error})") from error

    def read(name: str) -> Array:
        with safe_open(file_of[name], "flax") as shard:
            return shard.get_tensor(name)

    return Tensors(where, shapes, read, dtypes)


def save_safetensors(file: Path, arrays: Mapping[str, jax.Array], metadata: dict[str, str] | None = None) -> None:
    """Write arrays to a safetensors file that everyone may read. Raises UserError if it cannot be written."""
    try:
        save_file(dict(arrays), file, metadata=metadata)
    except SafetensorError as error:
        raise UserError(f"{file} cannot be written: {error}") from error
    file.chmod(0o644)  # the library gives it to its owner only


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of directory: a description of the model, tensors, `vocab.json` and `README.md`."""

    name: str
    description: str
    """Name of the JSON file."""
    tensors: str
    """Name of the safetensors file."""
    metadata: dict[str, str] | None = None
    """Of the safetensors file."""

    def write(
        self,
        directory: Path,
        model: Decoder,
        arrays: Mapping[str, Array],
        task: dict[str, Any],
        card: str,
        *,
        replace: bool = False,
        **more: Any,
    ) -> None:
        """Write a directory atomically; `more` are fields of the description beside those of every model.

        Raises: FileExistsError if the directory exists and is not to be replaced.
        """
        fields = {"format": self.name, "version": 1, "model": dataclasses.asdict(model.config), "vocab_size": model.vocab_size}
        with new_directory(directory, replace=replace) as partial:
            save_safetensors(partial / self.tensors, arrays, self.metadata)
            write_json(partial / self.description, fields | {"span_vocab": dataclasses.asdict(model.vocab)} | more)
            if "tokenizer_json" in (task.get("vocab") or ()):
                write_packed_json(partial / f"{_VOCAB}.gz", task)
            else:
                write_json(partial / _VOCAB, task)
            (partial / "README.md").write_text(card, encoding="utf-8")

    def open(self, directory: Path, *more: str) -> tuple[Decoder, Tensors, dict[str, Any], dict[str, Any]]:
        """Open a directory; `more` are fields that the description must have beside those of every model.

        Returns: the decoder with shapes in place of parameters, the tensors, of which none has been read, `vocab.json` and the
          description.
        Raises:
          FileNotFoundError: no such directory, or a file of it is missing.
          UserError: a file that is malformed or of another format, or values that are not allowed.
        """
        if directory.is_file():
            raise UserError(f"{directory}: neither a directory nor a GGUF file")
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: no such checkpoint directory")
        vocab = vocab_file(directory)
        for name in (self.description, vocab.name, self.tensors):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory}: not a checkpoint, {name} is missing")
        fields = read_json(file := directory / self.description)
        if (fields.get("format"), fields.get("version")) != (self.name, 1):
            raise UserError(f"{file}: expected format {self.name!r} version 1")
        if missing := {"model", "vocab_size", "span_vocab", *more} - fields.keys():
            raise UserError(f"{file}: {', '.join(sorted(missing))} missing")
        if not isinstance(vocab_size := fields["vocab_size"], int):
            raise UserError(f"{file}: vocab_size is {vocab_size!r}, not a whole number")
        try:
            decoder = abstract_decoder(from_json(ModelConfig, fields["model"]), from_json(SpanVocab, fields["span_vocab"]), vocab_size)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error
        tensors = open_safetensors(directory / self.tensors, [directory / self.tensors])
        return decoder, tensors, read_json(vocab), fields


_VOCAB = "vocab.json"


def vocab_file(directory: Path) -> Path:
    """Return where a directory keeps its task: compressed, as with a tokenizer's vocabulary, or as text."""
    packed = directory / f"{_VOCAB}.gz"
    return packed if packed.is_file() else directory / _VOCAB


METADATA = {"format": "pt"}  # `transformers` refuses safetensors files without it
_MODEL = Format("selfspan model", "config.json", "model.safetensors", METADATA)


def save_model(directory: str | Path, model: Decoder, task: dict[str, Any], card: str, *, replace: bool = False) -> None:
    """Write a finished model, atomically.

    Args:
      task: content of `vocab.json`: the task's own `to_json`.
      card: content of `README.md`, Markdown.
      replace: put it in place of an older directory.

    Raises: FileExistsError if the directory exists and is not to be replaced; UserError for a quantised or adapted model.
    """
    _MODEL.write(Path(directory), model, to_llama(model), task, card, replace=replace)


def card(
    title: str, model: Decoder, identity: Mapping[str, Any], scores: Mapping[str, float], *, trained_on: str, scored_on: str, limits: str
) -> str:
    """Write the README of a finished model, with the command line of this process.

    Args:
      identity: what `training.runs.check` returned.
      trained_on, scored_on: the examples, in a few words.
      limits: a sentence or more on what the model does not know.
    """
    command = [re.sub("(?<==)/.*|^/.*", lambda path: shown_path(path[0]), word) for word in sys.argv[1:]]
    lines = [f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in scores.items()]
    config, schedules = identity["training"], identity.get("schedules", [])[1:]
    changes = "".join(f" From step {step:,} on the learning rate follows the schedule of {steps:,} steps." for step, steps in schedules)
    scored = f"Scores on {scored_on}, decoded greedily by the model itself (attention: {model.config.mask}):\n\n" + "\n".join(lines)
    shown = _with_shown_paths({name: value for name, value in identity.items() if name not in HISTORY})
    origin = f", fine-tuned from `{identity['base']['name']}`" if "base" in identity else ", trained"
    return (
        f"# {title}\n\nA span model of {model.num_parameters:,} parameters{origin} by `train.py` of selfspan on {trained_on}.\n\n"
        f"```\npython train.py {shlex.join(command)}\n```\n\n"
        f"{config['steps']:,} steps of {config['batch_size']} x {config['sequence_tokens']} tokens, "
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}.{changes}\n\n"
        f"{scored if scores else 'Not scored.'}\n\n"
        f"## Limits\n\n{limits}\n\n"
        f"`config.json`{', or `adapter.json` of an adapter,' if 'lora' in identity else ''} has the architecture, "
        f"`{_VOCAB}{'.gz' if 'base' in identity else ''}` the task.\n\n"
        f"```json\n{json.dumps(shown, indent=2)}\n```\n"
    )


def _with_shown_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_shown_paths(own) for name, own in value.items()}
    return shown_path(value) if isinstance(value, str) else value


def is_model(directory: Path) -> bool:
    """Return whether this is the directory of a finished model."""
    config = directory / _MODEL.description
    return config.is_file() and read_json(config).get("format") == _MODEL.name


def open_model(directory: Path) -> tuple[Decoder, Tensors, dict[str, Any]]:
    """Open a finished model: the decoder with shapes in place of parameters, the tensors and `vocab.json`; errors as of `Format.open`."""
    return _MODEL.open(directory)[:3]


def load_model(directory: Path) -> tuple[Decoder, dict[str, Any]]:
    """Read a finished model, its parameters in float32, and its `vocab.json`; see `Format.open` for errors.

    Raises: UserError for tensors that do not fit the config.
    """
    decoder, tensors, task = open_model(Path(directory))
    tensors.check(llama_shapes(decoder))
    return from_llama(decoder, lambda name: tensors.read(name).astype(jnp.float32)), task


# Maps that the decoder fuses, and their names in Llama.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@functools.lru_cache(maxsize=1)  # an adapter asks for the same one three times, a second each
def abstract_decoder(config: ModelConfig, vocab: SpanVocab, vocab_size: int) -> Decoder:
    """Build a decoder with shapes in place of parameters, to be filled, not changed."""
    return nnx.eval_shape(lambda: Decoder(config, vocab=vocab, vocab_size=vocab_size, rngs=nnx.Rngs(0)))


def llama_shapes(decoder: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a decoder's parameters under Llama's names."""
    return nnx.eval_shape(to_llama, decoder)  # type: ignore[arg-type]


def to_llama(model: Decoder) -> dict[str, Array]:
    """Convert parameters to Llama's names and layout, in the compute dtype: `model.layers.0.self_attn.q_proj.weight` and so on.

    Raises: UserError for a quantised or adapted model.
    """
    model.check_plain()
    config, arrays = model.config, dict[str, Array]()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array, tail = variable[...].astype(config.compute_dtype), variable.shape[1:]
        names = _llama_names(path)
        if len(names) == 3:
            heads = array.reshape(config.num_kv_heads, -1, config.head_size, *tail)
            parts = [part.reshape(-1, *tail) for part in (heads[:, :-2], heads[:, -2], heads[:, -1])]
        else:
            parts = [array] if len(names) == 1 else jnp.split(array, len(names))
        arrays |= dict(zip(names, parts))
    return arrays


def from_llama(decoder: Decoder, read: Callable[[str], Array]) -> Decoder:
    """Fill an abstract decoder with the tensors that `read` returns for Llama's names, which `Tensors.check` has passed."""
    graph, params = nnx.split(decoder, nnx.Param)
    flat = []
    for path, _ in nnx.to_flat_state(params):
        parts = [read(name) for name in _llama_names(path)]
        if len(parts) == 3:  # each kv head's queries, key and value next to each other
            tail = parts[0].shape[1:]
            by_kv_head = [part.reshape(decoder.config.num_kv_heads, -1, *tail) for part in parts]
            fused = jnp.concatenate(by_kv_head, axis=1).reshape(-1, *tail)
        else:
            fused = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        flat.append((path, nnx.Param(jax.block_until_ready(fused))))  # so that the parts are freed before the next are read
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _llama_names(path: tuple[Any, ...]) -> list[str]:
    *owners, owner, leaf = map(str, path)
    first = [] if owner == "lm_head" else ["model"]
    leaf = "bias" if leaf == "bias" else "weight"
    return [".".join([*first, *owners, part, leaf]) for part in _FUSED.get(owner, (owner,))]
