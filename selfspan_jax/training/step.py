"""The training step: batches, the loss, the state, and one pure update of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from selfspan_jax.attention.sequences import SequenceImplementation, attend_in_training
from selfspan_jax.config import TrainConfig
from selfspan_jax.errors import UserError
from selfspan_jax.model import Decoder, Frozen
from selfspan_jax.parallel import collectives, layout
from selfspan_jax.parallel.mesh import check_batch, check_model
from selfspan_jax.training.optimizer import learning_rate, make_optimizer

MAX_LOGITS_BYTES = 2**29  # in float32, of the rows whose logits are computed at a time


class Batch(Protocol):
    """Rows of packed examples, and the position in the data after them. With several processes, the rows of this process only."""

    @property
    def token_ids(self) -> Int[np.ndarray, "B T"]: ...
    @property
    def segment_ids(self) -> Int[np.ndarray, "B T"]:
        """Number of the example within its row; 0 is padding."""

    @property
    def positions(self) -> Int[np.ndarray, "B T"]:
        """Rotary positions."""

    @property
    def target_mask(self) -> Bool[np.ndarray, "B T"]:
        """True where the token is a target of the loss."""

    @property
    def next_example(self) -> int | Sequence[int]:
        """Index of the next example; for data packed in parts, one of each part, 0 for parts of other processes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """The arrays of a batch, on the device."""

    token_ids: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    target_mask: Bool[Array, "B T"]

    @classmethod
    def of(cls, batch: Batch, *, num_rows: int = 0, mesh: Mesh | None = None) -> DeviceBatch:
        """Copy a batch to the default device, or the rows of this process, of `num_rows` in all, to the devices of a mesh."""
        arrays = [getattr(batch, field.name) for field in dataclasses.fields(cls)]
        return cls(*(jnp.asarray(array) if mesh is None else layout.from_process_local(array, num_rows, mesh) for array in arrays))


def count_tokens(batch: Batch, config: TrainConfig) -> float:
    """Count the tokens of a step without padding; with several processes, estimated from the rows of this one."""
    return np.count_nonzero(batch.segment_ids) * config.batch_size / len(batch.segment_ids)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """What a run does not change: the structure of the model and its frozen parameters."""

    graph: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    frozen: nnx.State
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})
    """With a mesh, `graph` is that of one device's shard, and the parameters are divided."""

    def model(self, params: nnx.State) -> Decoder:
        """Build the model of a run on one device with these trainable parameters."""
        return nnx.merge(self.graph, params, self.frozen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Trainable parameters, optimizer state and number of steps taken."""

    params: nnx.State
    opt_state: optax.OptState
    step: Int[Array, ""]


def check_mesh(model: Decoder, config: TrainConfig, mesh: Mesh | None) -> None:
    """Raise UserError for a mesh that does not divide the model or the batch, or for a model that cannot be trained so."""
    if model.config.compute_dtype == "float16":
        raise UserError("compute_dtype is float16, in which small gradients vanish; allowed in training: bfloat16, float32")
    if mesh is None:
        return
    check_model(model.config, mesh)
    check_batch(config.batch_size // config.accumulation_steps, mesh, "rows of an accumulation step")
    if (tensor := mesh.shape["tensor"]) > 1 and model.adapters is not None:
        raise UserError(f"tensor={tensor} divides no adapters; allowed in training them: data and fsdp")


def initial_state(model: Decoder, config: TrainConfig, mesh: Mesh | None = None) -> tuple[Fixed, TrainState]:
    """Split a model into its fixed parts and the state before the first step, sharded over the mesh if there is one.

    Raises: UserError for an int8 model, and see `check_mesh`.
    """
    if model.weights == "int8":
        model.check_plain()
    check_mesh(model, config, mesh)
    graph, *states = nnx.split(model, nnx.Param, Frozen)
    (params, frozen), init = states, make_optimizer(config).init
    if mesh is None:
        return Fixed(graph, frozen), TrainState(params, init(params), jnp.zeros((), jnp.int32))
    params, frozen = (layout.shard_params(own, mesh) for own in states)
    shapes = layout.shard_params(jax.eval_shape(init, params), mesh)
    opt_state = jax.jit(init, out_shardings=jax.tree.map(lambda shape: shape.sharding, shapes))(params)  # never whole on one device
    step = layout.device_put_global(jnp.zeros((), jnp.int32), mesh, layout.REPLICATED)
    return Fixed(nnx.split(model.shard(mesh))[0], frozen, mesh), TrainState(params, opt_state, step)


def num_trained(model: Decoder) -> int:
    """Count the trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def describe(model: Decoder) -> str:
    """Return the number of a model's parameters as text, and how many of them are trained where not all are."""
    trained, total = num_trained(model), model.num_parameters
    return f"{total:,} parameters" + (f", {trained:,} of them trained" if trained < total else "")


def loss_sums(
    model: Decoder, batch: DeviceBatch, attention: SequenceImplementation | None = None, *, weights: tuple[float, float] = (1.0, 1.0)
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Compute the cross-entropy summed over the targets, weighted: which `<ref:k>` a source is, not that it is one, and `<eos>`.

    Returns: the loss, and sums over the batch: "loss" (all counted once), "right" (predicted right), "targets", "pairs" (attended pairs).
    """
    attend, pairs = attend_in_training(batch.token_ids, model.vocab, model.config, segment_ids=batch.segment_ids, implementation=attention)
    hidden, _ = model(batch.token_ids, batch.positions, attend)
    targets, is_target = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))).reshape(-1) for x in (batch.token_ids, batch.target_mask))
    loss, (plain, right) = sums_of_targets(model, hidden.reshape(targets.size, -1), targets, is_target, weights)
    return loss, {"loss": plain, "right": right, "targets": jnp.sum(is_target, dtype=jnp.float32), "pairs": pairs}


def sums_of_targets(model, hidden, targets, is_target, weights, *, max_logits_bytes=MAX_LOGITS_BYTES):
    """Return the loss of rows [R, D], what of them all counted once is, and how many targets [R] are predicted right; see `loss_sums`.

    Where the logits of all rows would take more memory, they are computed for some rows at a time, of targets only, and each part's
    gradients with them: so nothing of a part is kept or computed again.
    """
    chunk = max(1, max_logits_bytes // (4 * model.vocab_size) // 128) * 128
    sums = _sums if hidden.shape[0] <= chunk else _sums_of_parts
    plan = chunk, *weights, model.vocab.eos_id, model.vocab.ref_base, model.vocab.ref_base + model.vocab.num_labels
    return sums(*nnx.split(model.output_layer, nnx.Param, ...), hidden, targets, is_target, plan)


def _sums(graph, params, rest, hidden, targets, is_target, plan):
    logits = nnx.merge(graph, params, rest).scores(hidden, "xla")
    logits -= jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
    # The target's own logit by a comparison, not by a lookup, whose gradient is a scatter and a pass over the logits of its own.
    own = jnp.sum(jnp.where(targets[:, None] == jnp.arange(logits.shape[1], dtype=targets.dtype)[None, :], logits, 0.0), axis=1)
    losses = jnp.where(is_target, jnp.log(jnp.sum(jnp.exp(logits), axis=1)) - own, 0.0)
    _, source_weight, end_weight, eos_id, low, high = plan
    among = jnp.where(is_target & (targets >= low) & (targets < high), jax.nn.logsumexp(logits[:, low:high], axis=1) - own, 0.0)
    plain, right = jnp.sum(losses), jnp.sum((own >= 0) & is_target, dtype=jnp.float32)
    more = (source_weight - 1) * among + (end_weight - 1) * jnp.where(targets == eos_id, losses, 0.0)
    return plain + jnp.sum(more), (plain, right)


def _sums_and_gradients(graph, params, rest, hidden, targets, is_target, plan):
    chunk, *_ = plan
    order = jnp.argsort(~is_target, stable=True)  # targets first: parts without any are left out
    order = jnp.pad(order, (0, -order.size % chunk), constant_values=order.size)

    def add(part, total):
        rows = jax.lax.dynamic_slice_in_dim(order, part * chunk, chunk)
        own = (x.at[rows].get(mode="fill", fill_value=0) for x in (hidden, targets, is_target))
        sums, (of_params, of_hidden) = jax.value_and_grad(_sums, argnums=(1, 3), has_aux=True)(graph, params, rest, *own, plan)
        *before, gradient = total
        return *jax.tree.map(jnp.add, tuple(before), (sums, of_params)), gradient.at[rows].set(of_hidden, mode="drop")

    nothing = (jnp.zeros(()), (jnp.zeros(()), jnp.zeros(()))), jax.tree.map(jnp.zeros_like, params), jnp.zeros_like(hidden)
    num_parts = (jnp.sum(is_target, dtype=jnp.int32) + (chunk - 1)) // chunk
    sums, *gradients = jax.lax.fori_loop(0, num_parts, add, nothing)
    return sums, gradients


def _scale_gradients(graph, plan, gradients, grad):
    of_params, of_hidden = jax.tree.map(lambda x: x * grad[0].astype(x.dtype), gradients)
    return of_params, None, of_hidden, None, None


_sums_of_parts = jax.custom_vjp(lambda *args: _sums_and_gradients(*args)[0], nondiff_argnums=(0, 6))
_sums_of_parts.defvjp(_sums_and_gradients, _scale_gradients)


@functools.partial(jax.jit, static_argnames=("config", "attention"), donate_argnames=("state",))
def train_step(
    fixed: Fixed, state: TrainState, batch: DeviceBatch, config: TrainConfig, attention: SequenceImplementation | None = None
) -> tuple[TrainState, dict[str, Array]]:
    """Take one optimizer step on the mean loss over all targets of a batch, in `config.accumulation_steps` parts.

    Gradients are taken of `state.params` only: no array of the size of the frozen parameters is made. On a mesh each device
    computes the gradients of its rows and heads, kernels included, and the optimizer updates each shard in place.

    Returns: the next state, and metrics: loss, token_accuracy, gradient_norm, learning_rate, attended_pairs.
    """
    mesh = fixed.mesh

    def loss(params, frozen, part):
        model = nnx.merge(fixed.graph, *(collectives.all_gather_embeddings(own, mesh) for own in (params, frozen)))
        return loss_sums(model, part, attention, weights=(config.source_weight, config.end_weight))

    def sum_gradients(params, frozen, batch):
        def gradients(part):
            return jax.grad(loss, has_aux=True)(params, frozen, part)

        if config.accumulation_steps == 1:
            grads, sums = gradients(batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(config.accumulation_steps, -1, *x.shape[1:]), batch)
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts)))
            add = functools.partial(jax.tree.map, jnp.add)
            (grads, sums), _ = jax.lax.scan(lambda total, part: (add(total, gradients(part)), None), zeros, parts)
        return collectives.psum_gradients(grads, mesh), collectives.psum_data(sums, mesh)

    param_specs, frozen_specs = (layout.parameter_specs(own) for own in (state.params, fixed.frozen))
    in_specs, out_specs = (param_specs, frozen_specs, layout.spec("sequences")), (param_specs, layout.REPLICATED)
    grads, sums = collectives.shard_map(sum_gradients, mesh, in_specs, out_specs)(state.params, fixed.frozen, batch)
    targets = jnp.maximum(sums["targets"], 1.0)
    grads = jax.tree.map(lambda grad: grad / targets, grads)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes step counts and rates
        rate = learning_rate(config)(state.step)
        updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    metrics = {"loss": sums["loss"] / targets, "token_accuracy": sums["right"] / targets, "gradient_norm": optax.tree.norm(grads)}
    metrics |= {"learning_rate": rate, "attended_pairs": sums["pairs"]}
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics
