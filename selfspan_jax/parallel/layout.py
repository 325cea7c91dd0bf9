"""The layout of arrays on a mesh: one table of which axis is divided over which mesh axes, and the placement of arrays by it.

A mesh has four axes. `data` and `fsdp` divide the sequences of a batch; `fsdp` also divides the stored parameters, which are
gathered layer by layer when they are used (ZeRO, 1910.02054, stage 3). `context` divides the rows of each sequence's cache when
decoding (Helix, 2507.07120), see `parallel.context`. `tensor` divides heads and feed-forward features (Megatron-LM, 1909.08053): a kv
head stays with its queries, a gate with its up.

No other module of the project names a PartitionSpec.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr
from jaxtyping import Array

# The mesh axes that an axis of a parameter or an activation is divided over.
TABLE: dict[str, tuple[str, ...]] = {
    "sequences": ("data", "fsdp"),  # of a batch
    "rows": ("data", "fsdp", "context"),  # of their cache, and each device's own tables of them
    "heads": ("tensor",),  # kv heads, each with its queries
    "features": ("tensor",),  # F, of the feed-forward layer
    "width": ("fsdp",),  # D of a stored parameter
    "vocabulary": (),  # replicated: a split output layer would take another collective for each token
}
# Axes of a weight by the module that holds it: outputs, inputs. Parameters of other modules (norms) are replicated.
PARAMETERS = {
    "qkv_proj": ("heads", "width"),
    "o_proj": ("width", "heads"),
    "gate_up_proj": ("features", "width"),
    "down_proj": ("width", "features"),
    "embed_tokens": ("vocabulary", "width"),
    "lm_head": ("vocabulary", "width"),
}
_ADAPTERS = {"lora_a", "lora_b", "new_rows"}  # small, so replicated, and their optimizer's moments with them
# Replicated parameters that each shard of `tensor` uses for its own outputs only: their gradients are partial sums.
_PARTIAL_GRADIENTS = {"q_norm", "k_norm"}


def spec(*axes: str | None) -> PartitionSpec:
    """Return the PartitionSpec of an array whose axes are these of TABLE; None, and axes beyond, are not divided."""
    places = [TABLE[axis] if axis else () for axis in axes]
    return PartitionSpec(*(None if not place else place[0] if len(place) == 1 else place for place in places))


REPLICATED = spec()


def one_each(mesh: Mesh) -> PartitionSpec:
    """Return the spec of an array with one element for each device of a mesh."""
    return PartitionSpec(mesh.axis_names)


def parameter_specs(tree: Any) -> Any:
    """Return the PartitionSpecs of parameters, or of a tree with their paths, such as an optimizer's moments."""
    return jax.tree.map_with_path(lambda path, leaf: spec(*_parameter_axes(path, np.ndim(leaf))), tree)


def fsdp_axis(path: Any, ndim: int) -> int | None:
    """Return which axis of a parameter `fsdp` divides; None for a parameter that it does not divide."""
    axes = _parameter_axes(path, ndim)
    return next((i for i, axis in enumerate(axes) if axis and "fsdp" in TABLE[axis]), None)


def gradient_axes(path: Any, ndim: int, mesh: Mesh) -> tuple[str, ...]:
    """Return the mesh axes over which the gradient of a parameter is still to be summed.

    What `fsdp` divides is summed over it already: the gradient of a gather is a reduce-scatter.
    """
    axes = ["data"] if fsdp_axis(path, ndim) is not None and mesh.shape["fsdp"] > 1 else list(TABLE["sequences"])
    if _PARTIAL_GRADIENTS.intersection(_names(path)):
        axes.append("tensor")
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def _names(path: Any) -> list[str]:
    return keystr(path, simple=True, separator="/").split("/")


def _parameter_axes(path: Any, ndim: int) -> tuple[str | None, ...]:
    names = _names(path)
    outputs, inputs = next((PARAMETERS[name] for name in names if name in PARAMETERS and not _ADAPTERS.intersection(names)), (None, None))
    if ndim == 1:  # a bias, or the scales of int8 weights: small, so only divided with the outputs
        return (None if outputs == "width" else outputs,)
    return (outputs, inputs)[:ndim]


def shard_params(tree: Any, mesh: Mesh) -> Any:
    """Divide parameters, or a tree with their paths, over a mesh, in the order of its shards (see `from_saved_order`).

    Shapes (`jax.ShapeDtypeStruct`) get their sharding. Every process passes the same values and keeps its part of them.
    """

    def reorder(path, leaf):
        return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else _reordered(path, np.asarray(leaf), mesh.shape["tensor"], saved=False)

    return device_put_global(jax.tree.map_with_path(reorder, tree), mesh, parameter_specs(tree))


def device_put_global(tree: Any, mesh: Mesh | None, specs: Any) -> Any:
    """Place arrays, of which every process has all values, on a mesh.

    Args:
      mesh: None leaves the arrays as they are.
      specs: one PartitionSpec, or a tree of them of which every leaf may stand for a part of `tree`.
    """
    if mesh is None:
        return tree

    def place(spec, part):
        return jax.tree.map(functools.partial(_put, sharding=NamedSharding(mesh, spec)), part)

    return jax.tree.map(place, specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(leaf, sharding)
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def from_process_local(rows: np.ndarray, num_rows: int, mesh: Mesh) -> Array:
    """Place a batch of `num_rows` rows on a mesh, from the rows of this process's devices."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec("sequences")), rows, (num_rows, *rows.shape[1:]))


def shard_shape(leaf: Any) -> tuple[int, ...]:
    """Return the shape of one device's part of an array, or of a shape with a sharding."""
    return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)


def to_saved_order(tree: Any, mesh: Mesh | None) -> Any:
    """Reorder sharded parameters, or a tree with their paths, to all gates before all ups, as on disk. They stay sharded."""
    return _reorder(tree, mesh, saved=True)


def from_saved_order(tree: Any, mesh: Mesh | None) -> Any:
    """Reorder sharded parameters so that each shard of `tensor` has its gates, then its ups: inverse of `to_saved_order`."""
    return _reorder(tree, mesh, saved=False)


def gather_params(tree: Any, mesh: Mesh | None) -> Any:
    """Gather sharded parameters, in saved order, on the first device of each process: inverse of `shard_params`."""
    if mesh is None:
        return tree
    gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, REPLICATED))
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), gather(to_saved_order(tree, mesh)))


def _reorder(tree: Any, mesh: Mesh | None, *, saved: bool) -> Any:
    if mesh is None or mesh.shape["tensor"] == 1:
        return tree
    reorder = functools.partial(jax.tree.map_with_path, functools.partial(_reordered, parts=mesh.shape["tensor"], saved=saved))
    return jax.jit(reorder, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, tree))(tree)


def _reordered(path: Any, leaf: Any, parts: int, *, saved: bool) -> Any:
    if parts == 1 or "gate_up_proj" not in _names(path) or np.ndim(leaf) == 0:
        return leaf
    first = (parts, 2) if saved else (2, parts)
    return leaf.reshape(*first, -1, *leaf.shape[1:]).swapaxes(0, 1).reshape(leaf.shape)
