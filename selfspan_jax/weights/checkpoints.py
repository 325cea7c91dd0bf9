"""Three kinds of files: a finished model (safetensors and JSON, for others to load), a run's training state (Orbax, to resume),
and a compact export of that state (safetensors and JSON, to resume on another machine).

A finished model is a directory:

    config.json         architecture, attention views, ids of the structural tokens
    model.safetensors   parameters under Llama's names and layout ([out, in]), bfloat16 where the model computes in it
    vocab.json          the task: how text becomes ids
    README.md           the card: how it was trained and what it scores

An export is a directory of about 4 bytes a parameter in files of at most 16 MiB:

    state.json                 step, position in the data, how many parts there are
    part-00.safetensors ...    parameters as bfloat16, Adam's first moments as int8, its second ones as uint8 on a scale of powers;
                               arrays that are larger than a file by their rows
    run.json, metrics.jsonl    of the run that wrote it
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from selfspan_jax.config import ModelConfig, from_json
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab

_FORMAT = {"format": "selfspan model", "version": 1}


# ------------------------------------------------------------------------------------------------ finished models


# Maps that the decoder computes as one, and what they are called apart.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def to_llama(config: ModelConfig, params: nnx.State) -> dict[str, Array]:
    """The decoder's parameters under Llama's names and in its layout: `model.layers.0.self_attn.q_proj.weight` and so on."""
    arrays = {}
    for path, variable in nnx.to_flat_state(params):
        for name, part in zip(_llama_names(path), _parts(config, path, variable[...]), strict=True):
            arrays[name] = part
    return arrays


def from_llama(config: ModelConfig, like: nnx.State, arrays: Mapping[str, Array]) -> nnx.State:
    """Parameters of the structure of `like`, from arrays as `to_llama` names them."""
    flat = []
    for path, _ in nnx.to_flat_state(like):
        parts = [arrays[name] for name in _llama_names(path)]
        if len(parts) == 3:  # each kv head's queries, key and value next to each other
            tail = parts[0].shape[1:]
            by_kv_head = [part.reshape(config.num_kv_heads, -1, *tail) for part in parts]
            whole = jnp.concatenate(by_kv_head, axis=1).reshape(-1, *tail)
        else:
            whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        flat.append((path, nnx.Param(jax.block_until_ready(whole))))  # so that the parts are gone before the next are read
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


def save_model(directory: Path, model: Decoder, task: dict[str, Any], card: str) -> None:
    """Writes a finished model, whole or not at all.

    Args:
      task: what `vocab.json` is to say: the task's own `to_json`.
      card: Markdown for people.

    Raises: FileExistsError if the directory exists.
    """
    config = {
        **_FORMAT,
        "model": dataclasses.asdict(model.config),
        "vocab_size": model.vocab_size,
        "span_vocab": dataclasses.asdict(model.vocab),
    }
    with new_model_directory(directory, model, config) as partial:
        (partial / "vocab.json").write_text(json.dumps(task, indent=2) + "\n")
        (partial / "README.md").write_text(card)


@contextlib.contextmanager
def new_model_directory(directory: Path, model: Decoder, config: dict[str, Any]) -> Iterator[Path]:
    """A directory with `config.json` and the parameters in `model.safetensors`, for more files; there whole or not at all.

    Yields: where to write until it is whole. Raises: FileExistsError if the directory exists.
    """
    params = to_llama(model.config, nnx.state(model, nnx.Param))
    arrays = {name: array.astype(model.config.compute_dtype) for name, array in params.items()}
    with new_directory(directory) as partial:
        save_file(arrays, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "model.safetensors").chmod(0o644)  # the library keeps it to its owner
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        yield partial


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory that is there whole or not at all. Yields where to write until it is whole.

    Raises: FileExistsError if the directory exists.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} exists: choose another, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_model(directory: Path) -> tuple[Decoder, dict[str, Any]]:
    """A finished model and what its `vocab.json` says.

    Names and shapes are compared with the config before a tensor is read.

    Raises:
      FileNotFoundError: no such directory, or a file of it is missing.
      ValueError: a file that is not what it should be, or tensors that do not fit the config.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such checkpoint directory")
    for file in ("config.json", "vocab.json", "model.safetensors"):
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory}: not a checkpoint, {file} is missing")
    config, task = read_json(directory / "config.json"), read_json(directory / "vocab.json")
    if {key: config.get(key) for key in _FORMAT} != _FORMAT:
        raise ValueError(f"{directory / 'config.json'}: expected format {_FORMAT['format']!r} version {_FORMAT['version']}")
    if missing := {"model", "vocab_size", "span_vocab"} - config.keys():
        raise ValueError(f"{directory / 'config.json'}: {', '.join(sorted(missing))} missing")
    try:
        model_config, vocab = from_json(ModelConfig, config["model"]), from_json(SpanVocab, config["span_vocab"])
        vocab_size = config["vocab_size"]
        if not isinstance(vocab_size, int):
            raise ValueError(f"vocab_size is {vocab_size!r}, not a whole number")
        abstract = nnx.eval_shape(lambda: Decoder(model_config, vocab=vocab, vocab_size=vocab_size, rngs=nnx.Rngs(0)))
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
    return _with_tensors(abstract, directory / "model.safetensors"), task


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected an object, found {type(value).__name__}")
    return value


def _with_tensors(abstract: Decoder, file: Path) -> Decoder:
    graph, params = nnx.split(abstract, nnx.Param)
    wanted = jax.eval_shape(functools.partial(to_llama, abstract.config), params)
    try:
        with safe_open(file, "flax") as found:
            names = set(found.keys())
            if absent := sorted(wanted.keys() - names):
                raise ValueError(f"{file}: {len(absent)} tensors missing, {absent[0]} among them")
            if extra := sorted(names - wanted.keys()):
                raise ValueError(f"{file}: {len(extra)} tensors that the config does not know, {extra[0]} among them")
            for name, tensor in wanted.items():
                if (shape := tuple(found.get_slice(name).get_shape())) != tensor.shape:
                    raise ValueError(f"{file}: {name} is {list(shape)}, but the config asks for {list(tensor.shape)}")
            arrays = {name: found.get_tensor(name).astype(jnp.float32) for name in wanted}
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file ({error})") from error
    return nnx.merge(graph, from_llama(abstract.config, params, arrays))


# ------------------------------------------------------------------------------------------------- training state


class TrainingCheckpoints:
    """The last `keep` states of a run, each written in the background and visible only when whole (Orbax)."""

    def __init__(self, directory: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, next_example: int | Sequence[int]) -> None:
        """Begins to write the state after `step` steps, with the data position; waits only for the write before it.

        Of several processes all take part: each writes the shards that it has.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"next_example": next_example}))
        self._manager.save(step, args=args)

    def restore(self, like: Any) -> tuple[Any, int | list[int]]:
        """The latest state, with the structure, shapes and placement of `like`, and its data position."""
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(self._manager.latest_step(), args=args)
        return restored.state, restored.data["next_example"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
