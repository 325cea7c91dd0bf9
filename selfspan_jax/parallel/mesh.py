"""Meshes: made from a text like `data=2,tensor=4`, and checked against models, batches and processes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from selfspan_jax.config import ModelConfig
from selfspan_jax.errors import UserError
from selfspan_jax.parallel.layout import TABLE

MESH_AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of the first devices from a text like `data=2,tensor=4`; axes not named have size 1.

    `tensor` is innermost: its neighbours are devices of one host where the host has enough of them.

    Raises: UserError that says what is wrong with the text, or how many devices are missing.
    """
    sizes = axis_sizes(text)
    devices = jax.devices() if devices is None else list(devices)
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        raise UserError(f"mesh is {text!r}: takes {wanted} devices, here are {len(devices)} ({devices[0].device_kind})")
    if jax.process_count() > 1 and wanted != len(devices):
        raise UserError(f"mesh is {text!r}: takes {wanted} devices; {jax.process_count()} processes must use all of their {len(devices)}")
    grid = np.array(devices[:wanted]).reshape([sizes[name] for name in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def axis_sizes(text: str) -> dict[str, int]:
    """Read the size of each axis from a text like `data=2,tensor=4`. Raises UserError that says what is wrong with it."""
    if not isinstance(text, str):
        raise UserError(f"mesh is {text!r}; expected text such as data=2,tensor=2")
    sizes = dict.fromkeys(MESH_AXES, 1)
    seen = set()
    for part in text.split(","):
        name, equals, number = (word.strip() for word in part.partition("="))
        if name not in sizes:
            raise UserError(f"mesh is {text!r}: no axis {name!r}; allowed: {', '.join(MESH_AXES)}, as in data=2,tensor=2")
        if name in seen or not equals or not number.isdecimal() or int(number) < 1:
            raise UserError(f"mesh is {text!r}: each axis takes one size, 1 and above, as in data=2,tensor=2")
        seen.add(name)
        sizes[name] = int(number)
    return sizes


def training_mesh(text: str | None) -> Mesh | None:
    """Make the mesh of a training run: by default none, or with several processes one that divides rows over all devices."""
    if text is None and jax.process_count() == 1:
        return None
    mesh = make_mesh(text or f"data={jax.device_count()}")
    if mesh.shape["context"] > 1:
        raise UserError(f"mesh is {text!r}: context is for decoding, it divides the rows of a cache; training takes data, fsdp and tensor")
    return mesh


def describe(mesh: Mesh | None) -> str:
    """Return the devices of a mesh as text, as in `4 x NVIDIA H100 (data=2,tensor=2)`; None is one device."""
    kind = jax.devices()[0].device_kind
    if mesh is None:
        return kind
    divided = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {kind}" + (f" ({divided})" if divided else "")


def check_model(config: ModelConfig, mesh: Mesh) -> None:
    """Raise UserError naming a size of the model that the mesh does not divide."""
    if config.mask == "memory" and mesh.size > num_data_shards(mesh):
        raise UserError("mesh: the memory of the model's layers is not divided; allowed: data, and fsdp in training")
    for axis, sizes in {"tensor": ("num_kv_heads", "intermediate_size"), "fsdp": ("hidden_size",)}.items():
        for size in sizes:
            if getattr(config, size) % mesh.shape[axis]:
                raise UserError(f"mesh: {axis}={mesh.shape[axis]} does not divide {size}={getattr(config, size)}")


def check_decoding(config: ModelConfig, mesh: Mesh, divides_rows: bool = True) -> None:
    """Raise UserError for a mesh that does not divide the model, divides parameters over `fsdp`, or rows where they are to be whole."""
    if mesh.shape["context"] > 1 and not divides_rows:
        raise UserError("mesh: context takes an engine that divides rows, parallel.engine.make_engine")
    if mesh.shape["fsdp"] > 1:
        raise UserError("mesh: fsdp is for training, which can wait for parameters; decoding takes data, context and tensor")
    check_model(config, mesh)


def num_data_shards(mesh: Mesh) -> int:
    """Return how many parts the sequences of a batch are divided into."""
    return math.prod(mesh.shape[name] for name in TABLE["sequences"])


def sum_over_context(counts: np.ndarray, mesh: Mesh | None) -> np.ndarray:
    """Add up what each device counts of its own rows, `state.slots.counts`: [B]."""
    if mesh is None:
        return counts
    return counts.reshape(num_data_shards(mesh), mesh.shape["context"], -1).sum(axis=1).reshape(-1)


def check_batch(size: int, mesh: Mesh, name: str = "batch_size") -> None:
    """Raise UserError if the mesh does not divide a batch of this size."""
    if size % num_data_shards(mesh):
        axes = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in TABLE["sequences"] if mesh.shape[axis] > 1)
        raise UserError(f"mesh: {axes} does not divide {name}={size}")


def process_parts(num_parts: int, mesh: Mesh | None) -> range:
    """Return which of the equal parts of a batch's rows belong to the devices of this process.

    Raises: UserError if a part would be divided between processes.
    """
    if mesh is None or jax.process_count() == 1:
        return range(num_parts)
    shards = np.arange(mesh.shape["data"] * mesh.shape["fsdp"]).reshape(mesh.shape["data"], mesh.shape["fsdp"], 1, 1)
    here = np.vectorize(lambda device: device.process_index == jax.process_index())(mesh.devices)
    own = np.unique(np.broadcast_to(shards, here.shape)[here])
    if num_parts * len(own) % shards.size:
        minimum = shards.size // len(own)
        raise UserError(f"data_parts is {num_parts}: each of {minimum} hosts reads a part of its own; allowed: multiples of {minimum}")
    return range(int(own[0]) * num_parts // shards.size, (int(own[-1]) + 1) * num_parts // shards.size)
