"""Several devices: a mesh, the one table of what lies where on it, and the few collectives that a split decoder needs.

A mesh has three axes. `data` and `fsdp` divide the sequences of a batch; `fsdp` also divides what is stored of the parameters,
which are gathered layer by layer when they are used (ZeRO, 1910.02054, stage 3). `tensor` divides heads and feed-forward features
(Megatron-LM, 1909.08053): a kv head stays with its queries, a gate with its up. Everything computed on a device is written
for one shard and run by `per_device`, so that kernels see ordinary arrays and every collective stands in this module. Of the
forward pass these are one sum after the attention output and one after the feed-forward, over `tensor`, and the gathering.

No other module of the project names a PartitionSpec.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

if TYPE_CHECKING:
    from selfspan_jax.config import ModelConfig
    from selfspan_jax.model import Decoder

MESH_AXES = ("data", "fsdp", "tensor")

# What an axis of a parameter or an activation is, and the mesh axes that it is divided over.
TABLE: dict[str, tuple[str, ...]] = {
    "sequences": ("data", "fsdp"),  # of a batch, and the cache rows that are theirs
    "heads": ("tensor",),  # kv heads, each with its queries
    "features": ("tensor",),  # of the feed-forward layer
    "width": ("fsdp",),  # D of what is stored of a parameter
    "vocabulary": (),  # whole everywhere: a split output layer would take a collective more for each token
}
# Axes of a weight by the module that holds it: outputs, inputs. Parameters of other modules (norms) are whole everywhere.
PARAMETERS = {
    "qkv_proj": ("heads", "width"),
    "o_proj": ("width", "heads"),
    "gate_up_proj": ("features", "width"),
    "down_proj": ("width", "features"),
    "embed_tokens": ("vocabulary", "width"),
    "lm_head": ("vocabulary", "width"),
}
# Whole on every device but used by each shard of `tensor` for its own outputs: their gradients are added up over it.
_SHARED = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")


# ------------------------------------------------------------------------------------------------------------- meshes


def mesh_of_run(text: str | None) -> Mesh | None:
    """The mesh that a text asks for; by default none, but of several processes one that divides rows over all devices."""
    if text is None and jax.process_count() == 1:
        return None
    return make_mesh(text or f"data={jax.device_count()}")


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a text like `data=2,tensor=4` asks for, of the first devices that there are; axes not named have size 1.

    `tensor` is innermost: its neighbours are devices of one host where the host has enough of them.

    Raises: ValueError with what is wrong with the text, or how many devices are missing.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    seen = set()
    for part in text.split(","):
        name, equals, number = (word.strip() for word in part.partition("="))
        if name not in sizes:
            raise ValueError(f"mesh is {text!r}: no axis {name!r}; allowed: {', '.join(MESH_AXES)}, as in data=2,tensor=2")
        if name in seen or not equals or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"mesh is {text!r}: each axis takes one size, 1 and above, as in data=2,tensor=2")
        seen.add(name)
        sizes[name] = int(number)
    devices = jax.devices() if devices is None else list(devices)
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        raise ValueError(f"mesh is {text!r}: takes {wanted} devices, here are {len(devices)} ({devices[0].device_kind})")
    if jax.process_count() > 1 and wanted != len(devices):
        raise ValueError(f"mesh is {text!r}: takes {wanted} devices; {jax.process_count()} processes must use all of their {len(devices)}")
    grid = np.array(devices[:wanted]).reshape([sizes[name] for name in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def devices(mesh: Mesh | None) -> str:
    """Which devices, for people."""
    kind = jax.devices()[0].device_kind
    if mesh is None:
        return kind
    divided = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {kind}" + (f" ({divided})" if divided else "")


def check_model(config: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError with the size that a mesh does not divide."""
    for axis, sizes in {"tensor": ("num_kv_heads", "intermediate_size"), "fsdp": ("hidden_size",)}.items():
        for size in sizes:
            if getattr(config, size) % mesh.shape[axis]:
                raise ValueError(f"mesh: {axis}={mesh.shape[axis]} does not divide {size}={getattr(config, size)}")


def check_decoding(config: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError for a mesh that decoding has no use for."""
    if mesh.shape["fsdp"] > 1:
        raise ValueError("mesh: fsdp is for training, which can wait for parameters; decoding takes data and tensor")
    check_model(config, mesh)


def num_parts(mesh: Mesh) -> int:
    """How many parts the sequences of a batch are divided into."""
    return math.prod(mesh.shape[name] for name in TABLE["sequences"])


def check_batch(size: int, mesh: Mesh, name: str = "batch_size") -> None:
    """Raises ValueError where a batch does not divide evenly."""
    if size % num_parts(mesh):
        over = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in TABLE["sequences"] if mesh.shape[axis] > 1)
        raise ValueError(f"mesh: {over} does not divide {name}={size}")


# ---------------------------------------------------------------------------------------------------- what lies where


def spec(*axes: str | None) -> PartitionSpec:
    """Where an array lies whose axes are these of TABLE; None, and axes beyond, are whole everywhere."""
    places = [TABLE[axis] if axis else () for axis in axes]
    return PartitionSpec(*(None if not place else place[0] if len(place) == 1 else place for place in places))


WHOLE = spec()


def _owner(path: Any) -> str | None:
    return next((name for name in _names(path) if name in PARAMETERS), None)


def _names(path: Any) -> list[str]:
    return [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]


def _parameter_axes(path: Any, ndim: int) -> tuple[str | None, ...]:
    owner = _owner(path)
    if owner is None or ndim == 0:
        return (None,) * ndim
    outputs, inputs = PARAMETERS[owner]
    if ndim == 1:  # a bias, or the scales of int8 weights: small, so whole but where the outputs are split
        return (None if outputs == "width" else outputs,)
    return (outputs, inputs)


def parameter_specs(tree: Any) -> Any:
    """Where the leaves of a tree of parameters lie, or of anything that has the paths of one, moments of an optimizer say."""
    return jax.tree.map_with_path(lambda path, leaf: spec(*_parameter_axes(path, np.ndim(leaf))), tree)


def _reordered(path: Any, leaf: Any, parts: int, *, back: bool) -> Any:
    """Gates and ups in the order of the shards: each shard's gates, then its ups; or back, all gates, then all ups."""
    if _owner(path) != "gate_up_proj" or parts == 1 or np.ndim(leaf) == 0:
        return leaf
    first = (parts, 2) if back else (2, parts)
    return leaf.reshape(*first, -1, *leaf.shape[1:]).swapaxes(0, 1).reshape(leaf.shape)


def place(tree: Any, mesh: Mesh) -> Any:
    """Parameters (or what has their paths), whole on this process, as shards on the devices of a mesh, gates and ups in their order.

    Shapes (`jax.ShapeDtypeStruct`) become shapes with a place. Every process hands in the same values and keeps its part of them.
    """

    def put(path, leaf):
        sharding = NamedSharding(mesh, spec(*_parameter_axes(path, np.ndim(leaf))))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return laid_out(_reordered(path, np.asarray(leaf), mesh.shape["tensor"], back=False), sharding)

    return jax.tree.map_with_path(put, tree)


def put(tree: Any, mesh: Mesh | None, where: Any) -> Any:
    """Arrays that every process has whole, placed as `where`, a tree of specs or one for all, says. Without a mesh as they are."""
    if mesh is None:
        return tree
    where = jax.tree.map(lambda spec, part: jax.tree.map(lambda _: spec, part), where, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))

    def one(leaf, spec):
        sharding = NamedSharding(mesh, spec)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(leaf, sharding)
        return laid_out(np.asarray(leaf), sharding)

    return jax.tree.map(one, tree, where)


def shard_shape(leaf: Any) -> tuple[int, ...]:
    """The sizes of what one device has of an array, or of a shape with a place."""
    return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)


def laid_out(values: np.ndarray, where: Sharding) -> Array:
    """An array that every process has whole, where it is to lie."""
    return jax.make_array_from_callback(values.shape, where, lambda index: values[index])


def whole(array: Array) -> np.ndarray:
    """All of an array, on every process; one at a time, so that no device and no host needs room for a whole tree."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


# ------------------------------------------------------------------------------------------------- several processes


def own_parts(num_parts: int, mesh: Mesh | None) -> range:
    """Which of the equal parts of a batch's rows the devices of this process compute with.

    Raises: ValueError where a part would be divided between processes.
    """
    if mesh is None or jax.process_count() == 1:
        return range(num_parts)
    shards = np.arange(mesh.shape["data"] * mesh.shape["fsdp"]).reshape(mesh.shape["data"], mesh.shape["fsdp"], 1)
    here = np.vectorize(lambda device: device.process_index == jax.process_index())(mesh.devices)
    own = np.unique(np.broadcast_to(shards, here.shape)[here])
    if num_parts * len(own) % shards.size:
        least = shards.size // len(own)
        raise ValueError(f"data_parts is {num_parts}: each of {least} hosts reads a part of its own; allowed: multiples of {least}")
    return range(int(own[0]) * num_parts // shards.size, (int(own[-1]) + 1) * num_parts // shards.size)


def own_rows(rows: np.ndarray, num_rows: int, mesh: Mesh) -> Array:
    """A batch of `num_rows` rows on the devices that compute with them, from those rows that this process has devices for."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec("sequences")), rows, (num_rows, *rows.shape[1:]))


def most_of_processes(values: int | Sequence[int]) -> Any:
    """The largest that any process has, number by number."""
    if jax.process_count() == 1:
        return values
    return np.max(multihost_utils.process_allgather(np.asarray(values, np.int32)), axis=0).tolist()


# --------------------------------------------------------------------------------------------------- one shard's view


def shard_config(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The sizes of what one device computes."""
    parts = mesh.shape["tensor"]
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // parts,
        num_kv_heads=config.num_kv_heads // parts,
        intermediate_size=config.intermediate_size // parts,
    )


def make_shard(model: Decoder, mesh: Mesh) -> None:
    """Turns a decoder into the one that a device computes with: its sizes, and the sums that it takes part in. Not its parameters."""
    check_model(model.config, mesh)
    model.config = shard_config(model.config, mesh)
    model.gathers = mesh.shape["fsdp"] > 1
    split = mesh.shape["tensor"] > 1
    for layer in model.layers:
        layer.self_attn.config = model.config
        for linear in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj):
            linear.split = "outputs" if split else None
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.split = "inputs" if split else None


def per_device(compute: Callable, mesh: Mesh | None, inputs: Any, outputs: Any) -> Callable:
    """`compute` of one shard as a function of whole arrays; `inputs` and `outputs` say where those lie. Without a mesh itself."""
    if mesh is None:
        return compute
    # What varies over which axis is not tracked: the kernels do not say it, and the gradients' sums stand in this module.
    return jax.shard_map(compute, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


@jax.custom_vjp
def entering(x: Array) -> Array:
    """What all shards of `tensor` read for their own outputs: itself; its gradient is the sum of theirs."""
    return x


entering.defvjp(lambda x: (x, None), lambda _, grad: (jax.lax.psum(grad, "tensor"),))


@jax.custom_vjp
def leaving(x: Array) -> Array:
    """The sum over `tensor` of what each shard has of it; each shard's gradient is that of the sum."""
    return jax.lax.psum(x, "tensor")


leaving.defvjp(lambda x: (leaving(x), None), lambda _, grad: (grad,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(axis: int, dtype: Any, weight: Array) -> Array:
    return jax.lax.all_gather(weight.astype(dtype), "fsdp", axis=axis, tiled=True)


def _gather_backward(axis: int, dtype: Any, _, grad: Array) -> tuple[Array]:
    return (jax.lax.psum_scatter(grad.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True),)


_gather.defvjp(lambda axis, dtype, weight: (_gather(axis, dtype, weight), None), _gather_backward)


def _gathered_axis(path: Any, ndim: int) -> int | None:
    axes = _parameter_axes(path, ndim)
    return next((i for i, axis in enumerate(axes) if axis and "fsdp" in TABLE[axis]), None)


def gathered(params: Any, dtype: Any) -> Any:
    """The parts of parameters that this device's neighbours on `fsdp` keep, put together, in the dtype that they compute in.

    The gradient is float32, added up over `fsdp`, and each device keeps the part that it stores. What is gathered is named
    "gathered", for `jax.checkpoint` to throw it away.
    """

    def whole(path, leaf):
        axis = _gathered_axis(path, leaf.ndim)
        return leaf if axis is None else checkpoint_name(_gather(axis, jnp.dtype(dtype), leaf), "gathered")

    return jax.tree.map_with_path(whole, params)


def gathered_ends(params: Any, mesh: Mesh) -> Any:
    """Embedding and output layer put together, in float32: their gradients add up many rows. Layers gather their own."""

    if mesh.shape["fsdp"] == 1:
        return params

    def end(path, leaf):
        axis = None if _names(path)[0] == "layers" else _gathered_axis(path, leaf.ndim)
        return leaf if axis is None else _gather(axis, leaf.dtype, leaf)

    return jax.tree.map_with_path(end, params)


def added_up(grads: Any, mesh: Mesh | None) -> Any:
    """Gradients of the loss of one device's sequences, as those of all; what `fsdp` divides is added up over it already."""
    if mesh is None:
        return grads

    def total(path, grad):
        over = ["data"] if _gathered_axis(path, grad.ndim) is not None and mesh.shape["fsdp"] > 1 else list(TABLE["sequences"])
        if mesh.shape["tensor"] > 1 and any(name in _SHARED for name in _names(path)):
            over.append("tensor")
        over = [axis for axis in over if mesh.shape[axis] > 1]
        return jax.lax.psum(grad, tuple(over)) if over else grad

    return jax.tree.map_with_path(total, grads)


def sum_of_parts(tree: Any, mesh: Mesh | None) -> Any:
    """Numbers of one device's sequences, added up over all."""
    over = _divided(mesh)
    return jax.lax.psum(tree, over) if over else tree


def most_of_parts(x: Array, mesh: Mesh | None) -> Array:
    """The largest of the numbers that the parts of a batch have."""
    over = _divided(mesh)
    return jax.lax.pmax(x, over) if over else x


def _divided(mesh: Mesh | None) -> tuple[str, ...]:
    return () if mesh is None else tuple(axis for axis in TABLE["sequences"] if mesh.shape[axis] > 1)


# ------------------------------------------------------------------------------------------------- whole trees again


def natural(tree: Any, mesh: Mesh | None) -> Any:
    """Placed parameters, or what has their paths, still as shards, with all gates before all ups: what is written to disk."""
    return _ordered(tree, mesh, back=True)


def placed(tree: Any, mesh: Mesh | None) -> Any:
    """The inverse of `natural`."""
    return _ordered(tree, mesh, back=False)


def _ordered(tree: Any, mesh: Mesh | None, *, back: bool) -> Any:
    if mesh is None or mesh.shape["tensor"] == 1:
        return tree
    where = jax.tree.map(lambda leaf: leaf.sharding, tree)
    reorder = functools.partial(jax.tree.map_with_path, functools.partial(_reordered, parts=mesh.shape["tensor"], back=back))
    return jax.jit(reorder, out_shardings=where)(tree)


def on_one_device(tree: Any, mesh: Mesh | None) -> Any:
    """Placed parameters, whole and in their natural order, on the first device of each process."""
    if mesh is None:
        return tree
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, WHOLE), tree)
    reorder = functools.partial(jax.tree.map_with_path, functools.partial(_reordered, parts=mesh.shape["tensor"], back=True))
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), jax.jit(reorder, out_shardings=everywhere)(tree))
