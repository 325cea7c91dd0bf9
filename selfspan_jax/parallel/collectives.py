"""All collectives between devices and processes.

What runs on a device is written for one shard and run by `shard_map`, so that kernels see ordinary arrays. The forward pass
takes one all-reduce after the attention output and one after the feed-forward layer, over `tensor` (Megatron-LM, 1909.08053),
and the gathering of parameters over `fsdp` (ZeRO, 1910.02054, stage 3); a decode step takes one all-gather of a layer's partial
attention over `context`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import keystr
from jaxtyping import Array

from pallas_kernels import SplitRows
from selfspan_jax.parallel.context import context_size
from selfspan_jax.parallel.layout import REPLICATED, TABLE, fsdp_axis, gradient_axes, one_each

GATHERED = "gathered"  # name of gathered parameters, for the policy of `jax.checkpoint`


def shard_map(compute: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable:
    """Map a function of one device's shards to one of global arrays; without a mesh return it as it is."""
    if mesh is None:
        return compute
    # Kernels do not declare which mesh axes their outputs vary over, and gradients are summed by `psum_gradients`.
    return jax.shard_map(compute, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@jax.custom_vjp
def copy_to_tensor_parallel(x: Array) -> Array:
    """Return x; the backward pass is a psum over `tensor` (Megatron-LM's f)."""
    return x


copy_to_tensor_parallel.defvjp(lambda x: (x, None), lambda _, grad: (jax.lax.psum(grad, "tensor"),))


@jax.custom_vjp
def reduce_from_tensor_parallel(x: Array) -> Array:
    """Sum x over `tensor`; the backward pass is the identity (Megatron-LM's g)."""
    return jax.lax.psum(x, "tensor")


reduce_from_tensor_parallel.defvjp(lambda x: (reduce_from_tensor_parallel(x), None), lambda _, grad: (grad,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_gather(axis: int, dtype: Any, weight: Array) -> Array:
    return jax.lax.all_gather(weight.astype(dtype), "fsdp", axis=axis, tiled=True)


_all_gather.defvjp(
    lambda axis, dtype, weight: (_all_gather(axis, dtype, weight), None),
    lambda axis, dtype, _, grad: (jax.lax.psum_scatter(grad.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True),),
)


def all_gather_params(params: Any, dtype: Any) -> Any:
    """Gather the parameters of a layer over `fsdp`, in the dtype of its products; the backward pass is a float32 reduce-scatter.

    What is gathered is named GATHERED, so that `jax.checkpoint` can drop it after the forward pass.
    """

    def gather(path, leaf):
        axis = fsdp_axis(path, leaf.ndim)
        return leaf if axis is None else checkpoint_name(_all_gather(axis, jnp.dtype(dtype), leaf), GATHERED)

    return jax.tree.map_with_path(gather, params)


def all_gather_embeddings(params: Any, mesh: Mesh | None) -> Any:
    """Gather the embedding and the output layer over `fsdp`, in their own dtype: float32 where trained, as gradients sum many rows.

    Parameters of the layers stay sharded: each layer gathers its own by `all_gather_params`.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return params

    def gather(path, leaf):
        axis = None if keystr(path[:1], simple=True) == "layers" else fsdp_axis(path, leaf.ndim)
        return leaf if axis is None else _all_gather(axis, leaf.dtype, leaf)

    return jax.tree.map_with_path(gather, params)


def psum_gradients(grads: Any, mesh: Mesh | None) -> Any:
    """Sum the gradients of each device's sequences over all sequences."""
    if mesh is None:
        return grads

    def psum(path, grad):
        axes = gradient_axes(path, grad.ndim, mesh)
        return jax.lax.psum(grad, axes) if axes else grad

    return jax.tree.map_with_path(psum, grads)


def psum_data(tree: Any, mesh: Mesh | None) -> Any:
    """Sum values over the devices that hold different sequences."""
    axes = _data_axes(mesh)
    return jax.lax.psum(tree, axes) if axes else tree


def _data_axes(mesh: Mesh | None) -> tuple[str, ...]:
    return () if mesh is None else tuple(axis for axis in TABLE["sequences"] if mesh.shape[axis] > 1)


def gather_attention(out: Any) -> Any:
    """Gather the attention of all devices of `context`, each to its own rows, as parts that the product after it combines.

    One device's is returned as it is. Both fields were faster than their bits side by side: 23 and 29 us (two H200).
    """
    if context_size() == 1:
        return out
    return SplitRows(*jax.lax.all_gather(tuple(out), "context", tiled=True))


def gather_prompt_rows(pools: Sequence[Array], slots: Array) -> list[Array]:
    """Gather the rows of neighbouring runs of tokens, one run on each device of `context`, into pools of whole prompts [b T, K, H].

    Args:
      slots: int32 [b, Q], the rows of this device's runs.
    """
    batch, size = slots.shape
    begin = slots[0, 0]
    prompts = [pool.reshape(batch, -1, *pool.shape[1:]) for pool in pools]
    runs = [jax.lax.dynamic_slice_in_dim(prompt, begin, size, axis=1) for prompt in prompts]
    first = begin - size * jax.lax.axis_index("context")
    gathered = jax.lax.all_gather(runs, "context", axis=1, tiled=True)
    rows = [jax.lax.dynamic_update_slice_in_dim(prompt, some, first, axis=1) for prompt, some in zip(prompts, gathered)]
    return [prompt.reshape(pool.shape) for prompt, pool in zip(rows, pools)]


def psum_context(x: Array) -> Array:
    """Sum x over the devices that share the rows of sequences."""
    return x if context_size() == 1 else jax.lax.psum(x, "context")


def broadcast_from_first(x: Array) -> Array:
    """Broadcast x from the first device along 'context'."""
    return jax.lax.all_gather(x, "context")[0]


def process_max(values: int | Sequence[int]) -> Any:
    """Return the maximum over all processes of a number, or of each number of a sequence."""
    if jax.process_count() == 1:
        return values
    return np.max(multihost_utils.process_allgather(np.asarray(values, np.int32)), axis=0).tolist()


def process_max_async(value: int, mesh: Mesh | None) -> Any:
    """Start to compute the maximum over all processes of a number: `int` of what is returned waits for it, behind the steps so far."""
    if mesh is None or jax.process_count() == 1:
        return value
    sharding = NamedSharding(mesh, one_each(mesh))
    values = jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.full(1, value, np.int32))
    return _replicated_max(mesh)(values)


@functools.lru_cache(maxsize=1)
def _replicated_max(mesh: Mesh) -> Callable:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, REPLICATED))
