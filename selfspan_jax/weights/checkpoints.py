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

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from selfspan_jax.config import ModelConfig, from_json
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import distributed
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


# ------------------------------------------------------------------------------------------------- compact exports

_EXPORT_FORMAT = {"format": "selfspan training state", "version": 1}
_PART_BYTES = 16 * 2**20
_HEADER_BYTES = 2**16  # room for a part's own table of contents
_BLOCK = 256  # neighbours that share a scale
# What a second moment is as a share of the largest of its block: 0, then powers of 2^(1/8), from 2^-31.75 to 1.
_SHARES = np.array([0.0] + [math.ldexp(2.0 ** (-(i % 8) / 8), -(i // 8)) for i in range(254, -1, -1)], np.float32)


def save_export(directory: Path, state: Any, step: int, next_example: int | Sequence[int], beside: Sequence[Path] = ()) -> Any:
    """Writes a training state after `step` steps compactly, in place of an older export, and returns what `load_export` will read.

    The state is rounded by this, so a run that goes on from what is returned and one that goes on from the files are one and
    the same. Decoding takes nothing but products and tables, so the result is the same bits on every machine.

    Args:
      state: a pytree; leaves below a `params` become bfloat16, below a `mu` and a `nu` 8 bits with a float32 scale for every
        256 neighbours, others stay as they are.
      next_example: the position in the data: a number, or one for each of its parts.
      beside: files to copy into the export.

    Of several processes all take part, and the first writes.

    Raises: ValueError for an array of which one row is larger than a part.
    """
    leaves, tree = jax.tree.flatten_with_path(state)
    encoded = {
        _name(path): _encode(_name(path), np.asarray(leaf if leaf.is_fully_addressable else process_allgather(leaf, tiled=True)))
        for path, leaf in leaves
    }
    parts: list[dict[str, np.ndarray]] = []
    room = 0
    for name, arrays in encoded.items():
        for suffix, array in arrays.items():
            for piece, rows in _pieces(f"{name}:{suffix}", array):
                if rows.nbytes > room:
                    parts.append({})
                    room = _PART_BYTES - _HEADER_BYTES
                parts[-1][piece] = rows
                room -= rows.nbytes
    if distributed.is_first_process():
        fields = {**_EXPORT_FORMAT, "step": step, "next_example": next_example, "parts": len(parts)}
        _write_export(Path(directory), parts, fields, beside)
    return jax.tree.unflatten(tree, [_decode(encoded[_name(path)], leaf) for path, leaf in leaves])


def _pieces(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """An array under its name; one that is larger than a part as pieces of its rows, with numbers behind the name."""
    room = _PART_BYTES - _HEADER_BYTES
    if array.nbytes <= room:
        yield name, array
        return
    row_bytes = array.nbytes // len(array)
    if row_bytes > room:
        raise ValueError(f"{name}: a row takes {row_bytes:,} bytes; a part of an export has {room:,}")
    for number, start in enumerate(range(0, len(array), room // row_bytes)):
        yield f"{name}#{number}", array[start : start + room // row_bytes]


def _joined(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `_pieces`, of all arrays; where pieces are missing the shape tells."""
    pieces: dict[str, dict[int, np.ndarray]] = collections.defaultdict(dict)
    for name, array in found.items():
        whole, _, number = name.partition("#")
        pieces[whole][int(number) if number.isdecimal() else 0] = array
    return {name: np.concatenate([own[i] for i in sorted(own)]) if len(own) > 1 else own.popitem()[1] for name, own in pieces.items()}


def _write_export(directory: Path, parts: Sequence[Mapping[str, np.ndarray]], fields: dict[str, Any], beside: Sequence[Path]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial, older = (directory.with_name(f".{directory.name}.{os.getpid()}.{kind}") for kind in ("partial", "older"))
    partial.mkdir()
    try:
        for number, part in enumerate(parts):
            save_file({name: jnp.asarray(array) for name, array in part.items()}, partial / _part(number))
            (partial / _part(number)).chmod(0o644)
        (partial / "state.json").write_text(json.dumps(fields, indent=2) + "\n")
        for file in beside:
            shutil.copyfile(file, partial / file.name)
        if directory.exists():
            os.rename(directory, older)
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)


def load_export(directory: Path, like: Any) -> tuple[Any, int | list[int]]:
    """The training state of an export, with the structure, shapes and placement of `like`, and its position in the data.

    Raises:
      FileNotFoundError: there is no export, or a part of it is missing.
      ValueError: a file that is not what it should be, or arrays that do not fit `like`.
    """
    directory = Path(directory)
    if not (directory / "state.json").is_file():
        raise FileNotFoundError(f"{directory}: not an export of a training state, state.json is missing")
    fields = read_json(directory / "state.json")
    if {key: fields.get(key) for key in _EXPORT_FORMAT} != _EXPORT_FORMAT or fields.keys() != {
        *_EXPORT_FORMAT,
        "step",
        "next_example",
        "parts",
    }:
        raise ValueError(f"{directory / 'state.json'}: expected format {_EXPORT_FORMAT['format']!r} version {_EXPORT_FORMAT['version']}")
    position = fields["next_example"]
    numbers = [fields["step"], fields["parts"], *(position if isinstance(position, list) and position else [position])]
    if any(type(number) is not int or number < 0 for number in numbers) or fields["parts"] > 9999:
        raise ValueError(f"{directory / 'state.json'}: step, next_example and parts must be whole numbers")
    found: dict[str, np.ndarray] = {}
    for number in range(fields["parts"]):
        file = directory / _part(number)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing; the export has {fields['parts']} parts")
        try:
            with safe_open(file, "flax") as part:
                found |= {name: np.asarray(part.get_tensor(name)) for name in part.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a safetensors file ({error})") from error
    found = _joined(found)
    leaves, tree = jax.tree.flatten_with_path(like)
    wanted = {_name(path): _layout(_name(path), leaf) for path, leaf in leaves}
    layout = {f"{name}:{suffix}": kind for name, arrays in wanted.items() for suffix, kind in arrays.items()}
    for name in sorted(layout.keys() | found.keys()):
        if name not in found or name not in layout:
            raise ValueError(f"{directory}: {name} is {'missing' if name in layout else 'not of this run'}")
        if (found[name].shape, str(found[name].dtype)) != layout[name]:
            raise ValueError(
                f"{directory}: {name} is {found[name].dtype}{list(found[name].shape)}, expected {layout[name][1]}{list(layout[name][0])}"
            )
    decoded = [_decode({suffix: found[f"{_name(path)}:{suffix}"] for suffix in wanted[_name(path)]}, leaf) for path, leaf in leaves]
    return jax.tree.unflatten(tree, decoded), fields["next_example"]


def _part(number: int) -> str:
    return f"part-{number:02d}.safetensors"


def _name(path: Any) -> str:
    return "/".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)


def _layout(name: str, leaf: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """The arrays that a leaf becomes: shape and type by what they hold."""
    keys, shape = name.split("/"), tuple(leaf.shape)
    moment = next((key for key in ("mu", "nu") if key in keys), None)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return {"value": (shape, str(leaf.dtype))}
    if moment:
        blocks = -(-math.prod(shape) // _BLOCK)
        return {"codes": (shape, "int8" if moment == "mu" else "uint8"), "scales": ((blocks,), "float32")}
    return {"value": (shape, "bfloat16" if keys[0] == "params" else str(leaf.dtype))}


def _encode(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    layout = _layout(name, array)
    if "codes" not in layout:
        return {"value": array.astype(jnp.dtype(layout["value"][1]))}
    (num_blocks,), _ = layout["scales"]
    blocks = np.zeros((num_blocks, _BLOCK), np.float32)
    blocks.reshape(-1)[: array.size] = array.reshape(-1)
    largest = np.abs(blocks).max(axis=1, initial=0)
    shares = blocks / np.where(largest > 0, largest, np.float32(1))[:, None]
    if layout["codes"][1] == "int8":
        codes = np.rint(shares * 127)
        scales = largest / np.float32(127)
    else:  # nothing above 0 becomes 0: a step is divided by its root
        with np.errstate(divide="ignore"):
            codes = np.where(shares > 0, np.clip(255 + np.rint(8 * np.log2(shares)), 1, 255), 0)
        scales = largest
    return {"codes": codes.reshape(-1)[: array.size].reshape(array.shape).astype(layout["codes"][1]), "scales": scales}


def _decode(arrays: Mapping[str, np.ndarray], like: Any) -> Array:
    if "codes" not in arrays:
        value = arrays["value"].astype(like.dtype)
    else:
        codes = arrays["codes"].reshape(-1)
        shares = codes.astype(np.float32) if codes.dtype == np.int8 else _SHARES[codes]
        value = (shares * np.repeat(arrays["scales"], _BLOCK)[: codes.size]).reshape(like.shape).astype(like.dtype)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
