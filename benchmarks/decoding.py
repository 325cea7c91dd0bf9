"""Measure decode steps: milliseconds against the bytes that a step must move.

A workload is whole sequences, prompt and response. All but the last `steps` tokens of each are prefilled. The rest is replayed
in one compiled loop (`Engine.run` with `forced_tokens`), so that automaton, slots and mask do what they do for a model that
writes these tokens, whatever its weights are; logits are still computed and their maximum taken. The mean context of the
replayed tokens is `context_tokens`. Milliseconds per step are the wall time of the loop divided by its steps: the median of
several repetitions of the same steps, launches and the loop's own questions to the host included, compilation excluded.

The roofline of a step is its bytes (`step_bytes`) at the read ceiling of the memory, which is measured in the same process. On
a mesh bytes, memory and roofline are those of one device: its heads and features of the weights, its rows of its sequences.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from benchmarks.shapes import Shape, step_bytes
from benchmarks.timing import device_times, median_and_spread, timed
from selfspan_jax.attention.policies import POLICIES, Slots
from selfspan_jax.config import DecodeConfig, Weights
from selfspan_jax.decoding.cache import KVCache, LayerPools
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.sampling import sequence_keys
from selfspan_jax.decoding.state import DecodeState, bucket, start_state
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import layout
from selfspan_jax.parallel.engine import make_engine
from selfspan_jax.parallel.memory import bytes_of, check_fits
from selfspan_jax.parallel.mesh import num_data_shards

WARM_UPS, REPETITIONS = 2, 5
PREFILL_SECONDS = 2.0  # after which a prefill is not repeated again
STREAMED_TOKENS, CHUNK_TOKENS = 256, 8


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration to measure."""

    attention: str
    batch_size: int
    context_tokens: int
    steps: int
    weights: Weights = "bf16"
    num_samples: int = 1
    """Sequences that share a prompt."""
    random_rows: bool = False
    """Fill the cache with random rows instead of reading prompts."""

    @property
    def num_tokens(self) -> int:
        """Tokens of a whole sequence: the mean context of the last `steps` of them is then `context_tokens`."""
        return self.context_tokens + self.steps // 2

    @property
    def prompt_tokens(self) -> int:
        return self.num_tokens - self.steps

    @property
    def num_prompts(self) -> int:
        return self.batch_size // self.num_samples

    @property
    def config(self) -> DecodeConfig:
        return DecodeConfig(attention=self.attention, max_new_tokens=self.steps)


# ------------------------------------------------------------------------------------------------------------- programs

# PartitionSpecs of arrays whose first, or second, axis is that of the sequences.
_EACH, _EACH_STEP = layout.spec("sequences"), layout.spec(None, "sequences")


@dataclasses.dataclass
class Programs:
    """The compiled programs of a case; nothing is allocated yet."""

    engine: Engine  # shapes in place of parameters
    prefill: Any
    needed_bytes: int
    compile_seconds: float
    replay: Any = None  # where steps are timed
    oracle_mask: Any = None  # see `_oracle_mask_loop`

    def memory(self, pools: Any) -> dict[str, Any]:
        """Return what a row says of memory, of the cache's pools among others, and how long compilation took."""
        return {
            "kv_memory_bytes": bytes_of(pools),
            "program_memory_bytes": self.needed_bytes,
            "process_peak_memory_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
            "compile_seconds": self.compile_seconds,
        }


def compile_case(shape: Shape, case: Case, mesh: Mesh | None = None) -> Programs:
    """Compile a case from shapes alone.

    Raises: DoesNotFit where its arguments, results and temporaries exceed the device's memory.
    """
    began = time.perf_counter()
    ways = {"prefill": fill_with_random_rows} if case.random_rows else {}
    engine, config = make_engine(shape.abstract(case.weights), mesh, **ways), case.config

    def ints(*sizes: int):
        return jax.ShapeDtypeStruct(sizes, jnp.int32)

    prefill, state = compile_prefill(engine, case.num_prompts, case.prompt_tokens, config, num_samples=case.num_samples, responses=True)
    forced_tokens = layout.device_put_global(ints(case.batch_size, case.steps), mesh, _EACH)
    replay = engine.lower_run(state, config, forced_tokens=forced_tokens).compile()
    oracle_mask = None
    on_one = mesh is None or mesh.shape["context"] == 1  # of which slots are read off one table
    if case.attention == "span" and case.num_samples == 1 and on_one and not case.random_rows:
        shapes = (ints(case.steps, case.batch_size, state.cache.slot_table.shape[1]), ints(case.steps, case.batch_size))
        slots = layout.device_put_global(shapes, mesh, _EACH_STEP)
        loop = jax.jit(functools.partial(_oracle_mask_loop, engine, config, case.prompt_tokens), donate_argnums=1)
        oracle_mask = loop.lower(engine.params, state.cache.pools, state.logits, *slots, slots[1]).compile()
    needed = max(footprint(prefill), footprint(replay))
    check_fits(needed)
    return Programs(engine, prefill, needed, time.perf_counter() - began, replay, oracle_mask)


def fill_with_random_rows(model: Decoder, token_ids, lengths, keys, config: DecodeConfig, num_samples: int, responses: bool) -> DecodeState:
    """Make the state after prompts, as `prefill_state`, with random rows in place of theirs."""
    cache = KVCache.empty(model.config, lengths, token_ids.shape[1], num_samples, config.max_new_tokens)
    last, key = draw_rows(jnp.zeros(2, jnp.uint32), (len(lengths), model.config.hidden_size), jnp.dtype(model.config.compute_dtype))
    pools = []
    for layer in cache.pools:
        own, key = draw_layer(key, layer[0].shape, layer[0].dtype)
        pools.append(own)
    return start_state(model, KVCache(tuple(pools), cache.slot_table), last, token_ids, lengths, keys, config, num_samples)


def draw_rows(key: Array, shape: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    """Draw random rows; return them, and the key of the next ones, which waits for them.

    Of all pools at once XLA makes one kernel, which for 32 layers took minutes to compile.
    """
    return jax.lax.optimization_barrier((jax.random.normal(jax.random.wrap_key_data(key), shape, dtype), key + jnp.uint32(1)))


def draw_layer(key: Array, shape: tuple[int, ...], dtype: Any) -> tuple[LayerPools, Array]:
    """Draw keys and values of a layer, as `draw_rows` does."""
    k, key = draw_rows(key, shape, dtype)
    v, key = draw_rows(key, shape, dtype)
    return (k, v), key


def compile_prefill(engine: Engine, *sizes: Any, **options: Any) -> tuple[jax.stages.Compiled, DecodeState]:
    """Compile `Engine.prefill` from shapes alone, and return it with the shapes of its state; arguments are those of `lower_prefill`.

    Raises: DoesNotFit where parameters and state exceed the device's memory.
    """
    lowered = engine.lower_prefill(*sizes, **options)
    state = layout.device_put_global(lowered.out_info, engine.mesh, DecodeState.partition_specs())
    check_fits(bytes_of(engine.params) + bytes_of(state))
    return lowered.compile(), state


def footprint(program: Any) -> int:
    """Count the bytes of a compiled program's arguments, results and temporaries."""
    memory = program.memory_analysis()
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return sizes - memory.alias_size_in_bytes


def _oracle_mask_loop(engine: Engine, config: DecodeConfig, first_position: int, params, pools, logits, slots, counts, own):
    """Take the steps of a replay with the slots of each step given, without automaton, slot updates and bookkeeping.

    The same products, cache writes and attention to the same rows, the most likely token fed back, in a loop of known length.
    A replay's additional time is the overhead of deriving its mask.
    """

    def steps(model, pools, logits, slots, counts, own):
        def step(index, carry):
            pools, logits = carry
            tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            attend = Slots(slots[index], counts[index], kept=counts[index]).attend(own[index], config.implementation)
            positions = jnp.full((logits.shape[0], 1), first_position + index, jnp.int32)
            hidden, pools = model(tokens[:, None], positions, attend, pools, linear=config.linear)
            return pools, model.logits(hidden[:, 0], linear=config.linear)

        return jax.lax.fori_loop(0, counts.shape[0], step, (pools, logits))

    specs = DecodeState.partition_specs()
    carried = (specs.cache.pools, specs.logits)
    loop = engine.graph.shard_map(steps, *carried, _EACH_STEP, _EACH_STEP, _EACH_STEP, out_specs=carried)
    return loop(params, pools, logits, slots, counts, own)


# ---------------------------------------------------------------------------------------------------------- measurement


def measure_case(
    shape: Shape, params: tuple[Array, ...], case: Case, programs: Programs, token_ids: Int[np.ndarray, "B T"], *, profile: bool = False
) -> dict[str, Any]:
    """Run a compiled case on a workload and return its row, with the device's time by kind of operation if `profile`."""
    prompts, lengths = token_ids[: case.num_prompts, : case.prompt_tokens], np.full(case.num_prompts, case.prompt_tokens)
    arguments = prefill_arguments(programs.prefill, params, prompts, lengths, shape.vocab.pad_id, num_samples=case.num_samples)
    state, prefill_seconds = time_prefill(programs.prefill, arguments, PREFILL_SECONDS)
    forced = np.repeat(token_ids[: case.num_prompts, case.prompt_tokens :], case.num_samples, axis=0)
    mesh = programs.engine.mesh
    slots = () if programs.oracle_mask is None else oracle_slots(shape, case, token_ids, np.asarray(state.cache.slot_table))
    slots = layout.device_put_global(slots, mesh, _EACH_STEP)
    kept, pools = detach_pools(state)
    del state
    until_and_forced = (jnp.int32(case.steps), layout.device_put_global(jnp.asarray(forced), mesh, _EACH))

    seconds, oracle_seconds = [], []
    for _ in range(WARM_UPS + REPETITIONS):
        state, elapsed = timed(programs.replay, params, copy_state(kept, pools), *until_and_forced)
        seconds.append(elapsed)
        pools = state.cache.pools
        if programs.oracle_mask is not None:  # in turns, so that both see the device in the same state
            (pools, _), elapsed = timed(programs.oracle_mask, params, pools, kept.logits, *slots)
            oracle_seconds.append(elapsed)
    first = None if case.random_rows else statistics.median(prefill_seconds)
    row = replay_row(programs.engine, case, state, forced, seconds, first) | programs.memory(pools)
    if oracle_seconds:
        oracle_ms = 1e3 * statistics.median(oracle_seconds[WARM_UPS:]) / case.steps
        row |= {"bare_ms_per_step": oracle_ms, "overhead_fraction": 1 - oracle_ms / row["ms_per_step"]}
    if profile:
        del state
        traced = copy_state(kept, pools)
        row |= device_times(lambda: jax.block_until_ready(programs.replay(params, traced, *until_and_forced)), case.steps)
    return row


def detach_pools(state: DecodeState) -> tuple[DecodeState, tuple]:
    """Take a state apart into what replays get copies of, and its pools.

    A replay consumes its state. So each one gets a copy of everything but the pools, in which it writes the same rows again.
    """
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, pools=())), state.cache.pools


def copy_state(kept: DecodeState, pools: tuple) -> DecodeState:
    """Copy what `detach_pools` kept and put the pools, as they are, into the copy."""
    fresh = jax.tree.map(lambda x: x.copy(), kept)
    return jax.block_until_ready(dataclasses.replace(fresh, cache=dataclasses.replace(fresh.cache, pools=pools)))


def replay_row(
    engine: Engine, case: Case, state: DecodeState, forced: Int[np.ndarray, "B M"], seconds: list[float], prefill_seconds: float | None
) -> dict[str, Any]:
    """Return what every replay reports: times, tokens, and the bytes that a device moves.

    Args:
      state: after the last replay.
      seconds: of all replays, warm-ups first.

    Raises: RuntimeError where the loop wrote other tokens than the forced ones.
    """
    if not np.array_equal(np.asarray(state.new_tokens), forced):
        raise RuntimeError(f"{case}: the loop did not replay the tokens that it was given")
    median_ms, spread_ms = median_and_spread([1e3 * s / case.steps for s in seconds[WARM_UPS:]])
    counts, contexts = np.asarray(state.num_attended), np.arange(case.prompt_tokens + 1, case.num_tokens + 1)
    parts = 1 if engine.mesh is None else num_data_shards(engine.mesh)
    devices = parts if engine.mesh is None else parts * engine.mesh.shape["context"]  # that share the rows
    return {
        "ms_per_step": median_ms,
        "spread_ms": spread_ms,
        "tokens_per_second": 1e3 * case.batch_size / median_ms,
        "mean_context_tokens": float(contexts.mean()),
        "attended_tokens": float(counts.mean()),
        "attended_fraction": float((counts / contexts).mean()),
        "bytes_per_step": step_bytes(engine.shard, float(counts.sum(axis=0).mean()) / devices, case.batch_size // parts),
        "time_to_first_token_ms": None if prefill_seconds is None else 1e3 * prefill_seconds,
    }


def prefill_arguments(
    program: jax.stages.Compiled,
    params: tuple[Array, ...],
    prompts: Int[np.ndarray, "b T"],
    lengths: Int[np.ndarray, "b"],
    pad_id: int,
    *,
    num_samples: int = 1,
) -> tuple[Any, ...]:
    """Put what a compiled prefill takes on its devices: parameters, padded prompts, their lengths, keys."""
    prompts = np.pad(prompts, ((0, 0), (0, bucket(prompts.shape[1]) - prompts.shape[1])), constant_values=pad_id)
    inputs = jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32), sequence_keys(None, len(lengths) * num_samples)
    return params, *jax.device_put(inputs, program.input_shardings[0][1:])


def time_prefill(program: jax.stages.Compiled, arguments: tuple[Any, ...], max_seconds: float) -> tuple[DecodeState, list[float]]:
    """Run a compiled prefill several times; return the last state and the seconds of up to five runs, the first never among them.

    Args:
      max_seconds: no further run begins after so many; there are two at least.
    """
    state: Any = None
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < WARM_UPS + REPETITIONS and sum(seconds) < max_seconds):
        del state  # the next one needs its memory
        state, elapsed = timed(program, *arguments)
        seconds.append(elapsed)
    return state, seconds[max(1, len(seconds) - REPETITIONS) :]


_span_mask = jax.jit(POLICIES["span"].mask, static_argnames=("vocab", "views", "first_query", "num_queries"))


def oracle_slots(shape: Shape, case: Case, token_ids: Int[np.ndarray, "B T"], slot_table: Int[np.ndarray, "B A"]):
    """Read the slots of each timed step off the training mask of span attention.

    Returns: slots [M, B, A], how many of them are used [M, B], and the slot of the token itself [M, B].
    """
    slots = np.zeros((case.steps, *slot_table.shape), np.int32)
    counts = np.zeros((case.steps, case.batch_size), np.int32)
    rows = {"first_query": case.prompt_tokens, "num_queries": case.steps}
    for b in range(case.batch_size):  # one at a time: the masks of all would take gigabytes
        visible = np.asarray(_span_mask(token_ids[b : b + 1], shape.vocab, shape.config, **rows))[0]
        counts[:, b] = visible.sum(axis=1)
        slots[:, b, : visible.shape[1]] = slot_table[b, np.argsort(~visible, axis=1, kind="stable")]
    own = np.ascontiguousarray(slot_table[:, case.prompt_tokens : case.num_tokens].T)
    return jnp.asarray(slots), jnp.asarray(counts), jnp.asarray(own)


def measure_stream(model: Decoder, token_ids: Int[np.ndarray, "B T"], case: Case, mesh: Mesh | None = None) -> dict[str, Any]:
    """Measure streaming: ms per step of `Engine.stream` against one loop that writes the same tokens, both sampling freely.

    Prefill and the first chunk are not counted.
    """
    engine = make_engine(model, mesh)
    room = model.config.max_context_tokens - case.prompt_tokens
    new_tokens = min(STREAMED_TOKENS, room // CHUNK_TOKENS * CHUNK_TOKENS)
    if new_tokens < 2 * CHUNK_TOKENS:
        return {"not_run": f"the model has room for {room} tokens only after the prompt"}
    prompts = token_ids[:, : case.prompt_tokens]
    lengths = np.full(case.batch_size, case.prompt_tokens, np.int32)
    config = dataclasses.replace(case.config, max_new_tokens=new_tokens)
    whole, streamed = [], []
    for _ in range(1 + REPETITIONS):
        state = engine.run(engine.prefill(prompts, lengths, config), config, until=CHUNK_TOKENS)
        jax.block_until_ready(state)
        state, elapsed = timed(engine.run, state, config)
        whole.append(elapsed)
        if int(state.num_steps) < new_tokens:
            return {"not_run": f"the model ended its response after {int(state.num_steps)} tokens"}
        del state
        times = [time.perf_counter() for _ in engine.stream(prompts, lengths, config, chunk_tokens=CHUNK_TOKENS)]
        streamed.append(times[-1] - times[0])
    whole_ms, stream_ms = (1e3 * statistics.median(x[1:]) / (new_tokens - CHUNK_TOKENS) for x in (whole, streamed))
    return {
        "generate_ms_per_step": whole_ms,
        "ms_per_step": stream_ms,
        "cost_of_streaming": stream_ms / whole_ms - 1,
        "chunk_tokens": CHUNK_TOKENS,
    }
