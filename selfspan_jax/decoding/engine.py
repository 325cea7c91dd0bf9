"""Engine: prefill, decode and stream with one model, on one device or a mesh.

There is one decode state, one pure step (`selfspan_jax.decoding.state`) and two drivers of it: `run` decodes in one compiled loop
until all sequences have ended, `stream` runs the same steps in chunks. Nothing in a step depends on the host.

The model decodes with the parameters that it has: `Decoder.for_decoding` makes a copy in the compute dtype, or in int8.

On a mesh each device runs the same loop on its own sequences and kv heads, with slots of its own pool. Devices that share
sequences psum twice a layer (over `tensor`); devices with different sequences do not wait for each other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.sampling import sequence_keys
from selfspan_jax.decoding.state import DecodeState, bucket, decode_step, extend_state, prefill_state, sample_step
from selfspan_jax.errors import UserError, check_ids
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import collectives, layout, memory
from selfspan_jax.parallel.mesh import check_batch, check_decoding

MAX_STEPS_PER_SYNC = 8  # on a GPU, see `_run`


class Chunk(NamedTuple):
    """New tokens of every sequence, as they stream; padding after a sequence's end."""

    tokens: Int[np.ndarray, "B C"]
    num_attended: Int[np.ndarray, "B C"]  # 0 where padding


class Engine:
    """Decode with one model on one device or a mesh.

    The decoder is taken apart once, so that calls need not (some 10 ms for 32 layers); later changes to it are not seen. Its
    parameters may be shapes (`jax.ShapeDtypeStruct`), for `lower_prefill`, `lower_run` and `compile`. Engines of decoders that
    differ in nothing but their parameters share compiled programs.

    Args:
      mesh: the devices to decode on: sequences are divided over `data`, heads and features over `tensor`.
      steps_per_sync: steps between two questions to the device whether all sequences have ended; by default 1, on a GPU up to 8.
      prefill: what reads prompts; `parallel.engine.make_engine` has that of a mesh with `context`.

    Raises: UserError for a mesh that does not divide the decoder.
    """

    def __init__(self, model: Decoder, mesh: Mesh | None = None, *, steps_per_sync: int | None = None, prefill: Callable = prefill_state):
        self.config, self.vocab, self.vocab_size = model.config, model.vocab, model.vocab_size
        self.mesh, self.steps_per_sync = mesh, steps_per_sync
        graph, state = nnx.split(model)
        specs: tuple = ()
        if mesh is not None:
            check_decoding(model.config, mesh, divides_rows=prefill is not prefill_state)
            specs = tuple(jax.tree.leaves(layout.parameter_specs(state)))
            state = layout.shard_params(state, mesh)
            graph, _ = nnx.split(model.shard(mesh))
        leaves, tree = jax.tree.flatten(state)
        self.params: tuple[Array, ...] = tuple(leaves)
        self.graph = Graph(graph, tree, mesh, specs, prefill)

    @property
    def shard(self) -> Decoder:
        """Return one device's part of the decoder, as shapes: on a mesh its heads and features, else everything."""
        shapes = [jax.ShapeDtypeStruct(layout.shard_shape(leaf), leaf.dtype) for leaf in self.params]
        return self.graph.decoder(shapes)  # type: ignore[arg-type]

    def check_ids(self, token_ids: Int[np.ndarray, "..."]) -> None:
        """Raise UserError for ids outside the model's vocabulary."""
        check_ids(token_ids, self.vocab_size)

    def prefill(
        self,
        token_ids: Int[np.ndarray, "b T"],
        lengths: Int[np.ndarray, "b"],
        config: DecodeConfig,
        key: PRNGKeyArray | None = None,
        *,
        num_samples: int = 1,
    ) -> DecodeState:
        """Read prompts: the first `lengths[b]` tokens of each row, at least one; the rest of a row is ignored.

        Args:
          key: of what is drawn; or one for each sequence, see `sequence_keys`.
          num_samples: sequences per prompt, next to each other in the state; they share the prompt's slots.

        Raises: UserError as `check_prompts`, and for sparse prefill of prompts that are not read causally.
        """
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}; allowed: 1 and above")
        prompts = self.check_prompts(token_ids, lengths, config)
        keys = key if key is not None and key.ndim else sequence_keys(key, len(lengths) * num_samples)
        return self._read_prompts(*prompts, keys, config, num_samples, self.goes_on(token_ids, lengths))

    def _read_prompts(self, token_ids, lengths, keys, config, num_samples, responses) -> DecodeState:
        return _prefill(self.graph, self.params, token_ids, lengths, keys, config, num_samples, responses)

    def check_prompts(self, token_ids: Int[np.ndarray, "b T"], lengths: Int[np.ndarray, "b"], config: DecodeConfig) -> tuple[Array, Array]:
        """Return prompts, padded to one of few sizes, and their lengths.

        Raises: UserError for no prompts, and for ones that are empty, hold unknown ids, or leave no room for the new tokens.
        """
        if token_ids.ndim != 2 or lengths.shape != token_ids.shape[:1]:
            raise UserError(f"prompts of shape {token_ids.shape} with lengths of shape {lengths.shape}; expected [B, T] and [B]")
        self.check_ids(token_ids)
        if not lengths.size:
            raise UserError("there are no prompts")
        if not (1 <= lengths.min() and lengths.max() <= token_ids.shape[1]):
            raise UserError(f"prompt lengths from {lengths.min()} to {lengths.max()} in rows of {token_ids.shape[1]}")
        longest, new, context = int(lengths.max()), config.max_new_tokens, self.config.max_context_tokens
        if longest + new > context:
            raise UserError(f"{longest} prompt tokens and {new} new ones exceed the model's context of {context} tokens")
        if self.mesh is not None:
            check_batch(len(lengths), self.mesh, "the number of prompts")
        padding = bucket(token_ids.shape[1]) - token_ids.shape[1]
        token_ids = np.pad(token_ids, ((0, 0), (0, padding)), constant_values=self.vocab.pad_id)
        return jnp.asarray(token_ids, jnp.int32), jnp.asarray(lengths, jnp.int32)

    def step(self, state: DecodeState, tokens: Int[np.ndarray, "B"], config: DecodeConfig) -> DecodeState:
        """Feed one given token per sequence. Donates the state."""
        return _step(self.graph, self.params, state, jnp.asarray(tokens, jnp.int32), config)

    def run(
        self, state: DecodeState, config: DecodeConfig, *, until: int | None = None, forced_tokens: Int[np.ndarray, "B M"] | None = None
    ) -> DecodeState:
        """Decode, in one compiled loop, until every sequence has ended or `until` tokens are written. Donates the state.

        Args:
          until: by default as many as there is room for.
          forced_tokens: tokens to write in place of the sampled ones, -1 where the sample stands; the work is the same.
        """
        room = state.new_tokens.shape[1]
        forced = None if forced_tokens is None else jnp.asarray(forced_tokens, jnp.int32)
        until = room if until is None else min(until, room)
        return _run(self.graph, self.params, state, jnp.int32(until), forced, config, self._steps_per_sync(room))

    def room(self, num_steps: int, state: DecodeState) -> int:
        """Tell how many new tokens there is room for when there are `num_steps` of them; `extend` makes more."""
        return state.new_tokens.shape[1]

    def extend(self, state: DecodeState, config: DecodeConfig, limit_tokens: int) -> DecodeState:
        """Double the room for new tokens, up to `limit_tokens` rounded up to a multiple of 64 (few sizes, so that few are compiled)."""
        room = state.new_tokens.shape[1]
        return _extend(self.graph, self.params, state, config, min(room, -(-(limit_tokens - room) // 64) * 64))

    def generate(
        self, token_ids, lengths, config: DecodeConfig, key=None, *, limit_tokens: int | None = None, **samples: int
    ) -> DecodeState:
        """Prefill, then decode until every sequence has written `<eos>` or `limit_tokens`. Other arguments as for `prefill`.

        By default the limit is `config.max_new_tokens`. Where it is more, memory for that many is taken first, then doubled as long as
        a sequence has not ended.
        """
        state = self.run(self.prefill(token_ids, lengths, config, key, **samples), config, until=limit_tokens)
        while limit_tokens is not None and state.new_tokens.shape[1] < limit_tokens and not jnp.all(state.done):
            state = self.run(self.extend(state, config, limit_tokens), config, until=limit_tokens)
        return state

    def stream(
        self, token_ids, lengths, config: DecodeConfig, key=None, *, limit_tokens: int | None = None, chunk_tokens: int = 8, **samples
    ) -> Iterator[Chunk]:
        """Yield the tokens that `generate` would return, `chunk_tokens` at a time as they are decoded. Arguments as for `generate`.

        The device is always one chunk ahead, so that it does not wait while the host reads one.
        """
        limit = config.max_new_tokens if limit_tokens is None else limit_tokens

        def decode() -> Iterator[tuple[int, Any]]:
            state, start = self.prefill(token_ids, lengths, config, key, **samples), 0
            while start < limit:
                if start == (room := self.room(max(start - 1, 0), state)):
                    state = self.extend(state, config, limit)
                    room = self.room(start, state)
                size = min(chunk_tokens, room - start, limit - start)
                state, chunk = _run_chunk(self.graph, self.params, state, jnp.int32(start), config, size)
                yield start, chunk
                start += size

        for (start, chunk), _ in itertools.pairwise(itertools.chain(decode(), [(0, None)])):
            tokens, attended, num_steps, finished = map(np.asarray, chunk)
            if num_steps > start:
                yield Chunk(tokens[:, : num_steps - start], attended[:, : num_steps - start])
            if finished:
                return

    def lower_prefill(
        self, batch_size: int, prompt_tokens: int, config: DecodeConfig, *, num_samples: int = 1, responses: bool = False
    ) -> jax.stages.Lowered:
        """Lower what `prefill` runs for so many prompts of at most so many tokens; with `responses` for those that go on after `<solve>`.

        Compiled it takes `params`, token ids [b, bucket(prompt_tokens)], lengths [b] and `sequence_keys`, and returns a state.
        """
        prompts = jax.ShapeDtypeStruct((batch_size, bucket(prompt_tokens)), jnp.int32), jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        keys = sequence_keys(None, batch_size * num_samples)
        return _prefill.lower(self.graph, self.params, *prompts, keys, config, num_samples, responses)

    def lower_run(self, state: DecodeState, config: DecodeConfig, *, forced_tokens: Int[Array, "B M"] | None = None) -> jax.stages.Lowered:
        """Lower what `run` runs. State and forced tokens may be shapes.

        Compiled it takes `params`, the state (donated), `until` (an int32 scalar) and the forced tokens, and returns a state.
        """
        room = state.new_tokens.shape[1]
        return _run.lower(self.graph, self.params, state, jnp.int32(room), forced_tokens, config, self._steps_per_sync(room))

    def compile(self, batch_size: int, prompt_tokens: int, config: DecodeConfig) -> None:
        """Compile what `generate` runs for so many prompts of at most so many tokens, so that its next call can be timed.

        Nothing runs and no memory of the device is taken, so that several can be compiled at once.
        Raises: DoesNotFit for parameters and a state beyond the device's memory; the compiler would take minutes over them.
        """
        lowered = self.lower_prefill(batch_size, prompt_tokens, config)
        state = layout.device_put_global(lowered.out_info, self.mesh, _STATE)
        memory.check_fits(memory.bytes_of((self.params, state)))
        lowered.compile()
        self.lower_run(state, config).compile()

    def goes_on(self, token_ids: Int[np.ndarray, "b T"], lengths: Int[np.ndarray, "b"]) -> bool:
        """Tell whether some row goes on after `<solve>`."""
        return bool(np.any((token_ids == self.vocab.solve_id) & (np.arange(1, token_ids.shape[1] + 1) < lengths[:, None])))

    def _steps_per_sync(self, num_steps: int) -> int:
        most = MAX_STEPS_PER_SYNC if jax.default_backend() == "gpu" else 1
        return self.steps_per_sync or max(divisor for divisor in range(1, most + 1) if num_steps % divisor == 0)


# ------------------------------------------------------------------------------------------------- compiled programs


@dataclasses.dataclass(frozen=True)
class Graph:
    """A decoder without its parameters, static under jit. On a mesh it is that of one device's shard."""

    graph: nnx.GraphDef
    tree: jax.tree_util.PyTreeDef
    mesh: Mesh | None
    specs: tuple  # PartitionSpecs of the parameters
    prefill: Callable[..., DecodeState]

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.graph, self.tree, self.mesh, self.specs))

    def __hash__(self) -> int:  # kept, because the hash of a GraphDef takes a millisecond
        return self._hash

    def decoder(self, params: Sequence[Array]) -> Decoder:
        """Put the decoder together again; on a mesh its shard."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, params))

    def shard_map(self, compute: Callable, *in_specs: Any, out_specs: Any) -> Callable:
        """Map `compute(decoder, *arrays)`, written for one device, to a function of an engine's `params` and global arrays."""

        def merged(params, *arrays):
            return compute(self.decoder(params), *arrays)

        return collectives.shard_map(merged, self.mesh, (self.specs, *in_specs), out_specs)


_EACH = layout.spec("sequences")
_STATE = DecodeState.partition_specs()


@functools.partial(jax.jit, static_argnames=("graph", "config", "num_samples", "responses"))
def _prefill(graph, params, token_ids, lengths, keys, config, num_samples, responses):
    prefill = functools.partial(graph.prefill, config=config, num_samples=num_samples, responses=responses)
    return graph.shard_map(prefill, _EACH, _EACH, _EACH, out_specs=_STATE)(params, token_ids, lengths, keys)


@functools.partial(jax.jit, static_argnames=("graph", "config"), donate_argnames=("state",))
def _step(graph, params, state, tokens, config):
    def step(model, state, tokens):
        return decode_step(model, state, (tokens, ~state.done), config)

    return graph.shard_map(step, _STATE, _EACH, out_specs=_STATE)(params, state, tokens)


@functools.partial(jax.jit, static_argnames=("graph", "config", "num_tokens"))
def _extend(graph, params, state, config, num_tokens):
    def extend(model, state):
        return extend_state(model, state, num_tokens, config)

    return graph.shard_map(extend, _STATE, out_specs=_STATE)(params, state)


@functools.partial(jax.jit, static_argnames=("graph", "config", "steps_per_sync"), donate_argnames=("state",))
def _run(graph, params, state, until, forced_tokens, config, steps_per_sync):
    """Run steps until every sequence has `until` tokens or is done.

    On a GPU each round of a while loop whose end is data waits for the host to read that data. So the loop asks every
    `steps_per_sync` steps; between them it runs a loop of known length, which the host queues without waiting.
    """

    def run(model, state, until, forced_tokens):
        def step(_, state):
            return sample_step(model, state, until, forced_tokens, config)

        return jax.lax.while_loop(
            lambda state: jnp.any(state.is_active(until)),
            lambda state: step(None, state) if steps_per_sync == 1 else jax.lax.fori_loop(0, steps_per_sync, step, state),
            state,
        )

    return graph.shard_map(run, _STATE, layout.REPLICATED, _EACH, out_specs=_STATE)(params, state, until, forced_tokens)


@functools.partial(jax.jit, static_argnames=("graph", "config", "size"), donate_argnames=("state",))
def _run_chunk(graph, params, state, start, config, size):
    """Run `size` steps, and return what the host needs to know of them.

    A loop of known length, even where all sequences end within it: the call returns as soon as the device has its orders.
    One whose end is data returns when the data is there, and the device then waits for the next call: 3 ms a chunk.
    """

    def run(model, state, start):
        return jax.lax.fori_loop(0, size, lambda _, state: sample_step(model, state, start + size, None, config), state)

    state = graph.shard_map(run, _STATE, layout.REPLICATED, out_specs=_STATE)(params, state, start)
    tokens, attended = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (state.new_tokens, state.num_attended))
    return state, (tokens, attended, state.num_steps, jnp.all(state.done))
