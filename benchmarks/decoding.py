"""What a decode step costs: milliseconds against the bytes that it must move, for shapes, batches, contexts and policies.

How it is measured. A workload is whole sequences, prompt and response. All but the last tokens of each are prefilled; the
rest, `steps` of them, is replayed in one compiled loop (`decoding.run` with `forced` tokens), so that the automaton, the row
lists and the mask do what they do for a model that writes these tokens, whatever the weights are; scores are still computed
and their maximum taken. The replayed tokens stand around the context asked for: the mean context of the timed steps is
`context_tokens`. Milliseconds per step are the wall time of the loop divided by its steps, the median of several
repetitions of the same steps, launches and the loop's own questions to the host included, compilation apart.

The floor of a step is its bytes (`step_bytes`) at the read ceiling of the memory, which is measured in the same process. On
a mesh bytes, memory and floor are those of one device: its heads and features of the weights, its sequences' rows.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int
from tqdm import tqdm

from benchmarks import peers as benchmark_peers
from benchmarks.timing import device_times, median_and_spread, timed
from selfspan_jax.attention.sequences import attend_cached, sequence_mask
from selfspan_jax.config import PRESETS, Attention, DecodeConfig, ModelConfig
from selfspan_jax.decoding import engine as decoding
from selfspan_jax.decoding.cache import SlotList
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import layout
from selfspan_jax.parallel.mesh import check_batch, check_decoding, make_mesh, num_data_shards
from selfspan_jax.spans import SpanVocab

WARM_UPS, REPETITIONS = 2, 5
STREAMED_TOKENS = 256
DEFAULT_CONTEXT = 2048
NUM_LABELS = 512  # of a vocabulary that had none
WorkloadName = Literal["arithmetic", "segments"]
REFS_PER_STEP, STEP_TOKENS = 4, 32  # of the synthetic responses


# ---------------------------------------------------------------------------------------------------------- models


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model without its weights."""

    config: ModelConfig
    vocab: SpanVocab
    vocab_size: int

    def abstract(self, *, int8: bool = False) -> Decoder:
        """The decoder as `for_decoding` leaves it, with shapes in place of arrays."""
        make = functools.partial(Decoder, self.config, vocab=self.vocab, vocab_size=self.vocab_size)
        return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)).for_decoding(int8=int8))

    def random(self, seed: int) -> Decoder:
        """The decoder with random weights, drawn on the device in the dtype that it decodes with."""
        graph, params = nnx.split(self.abstract())
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        drawn = [_draw(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
        return nnx.merge(graph, jax.tree.unflatten(tree, drawn))

    def with_context(self, tokens: int) -> Shape:
        """The same with room for sequences of so many tokens."""
        room = max(tokens, self.config.max_context_tokens)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, max_context_tokens=room))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(key, shape: tuple[int, ...], dtype) -> Array:
    return jnp.ones(shape, dtype) if len(shape) == 1 else 0.02 * jax.random.normal(key, shape, dtype)


def borrowed_labels(vocab_size: int, num_labels: int = NUM_LABELS) -> SpanVocab:
    """Structural ids at the top of a vocabulary that has none."""
    first = vocab_size - 2 * num_labels - 4
    if first < 1:
        raise ValueError(f"vocab_size is {vocab_size}; {num_labels} labels need {2 * num_labels + 4} ids and leave none for text")
    return SpanVocab.consecutive(first, num_labels)


ShapeName = Literal["llama2-7b", "llama3-8b", "smollm2-135m", "arithmetic-base"]

# Shapes of published models (their config.json), and a preset; vocabulary sizes, None for the arithmetic vocabulary's.
_SHAPES: dict[ShapeName, tuple[ModelConfig, int | None]] = {
    "llama2-7b": (
        ModelConfig(
            hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32, head_size=128, tie_embeddings=False
        ),
        32_000,
    ),
    "llama3-8b": (
        ModelConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_size=128,
            rope_theta=500_000.0,
            tie_embeddings=False,
        ),
        128_256,
    ),
    "smollm2-135m": (
        ModelConfig(hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, rope_theta=100_000.0),
        49_152,
    ),
    "arithmetic-base": (PRESETS["arithmetic-base"].model, None),
}


def named_shape(name: ShapeName, vocab: SpanVocab | None) -> Shape:
    """A shape by name, with structural ids that the workload comes with, or with borrowed ones."""
    config, vocab_size = _SHAPES[name]
    if vocab is None:
        assert vocab_size is not None
        return Shape(config, borrowed_labels(vocab_size), vocab_size)
    return Shape(config, vocab, vocab_size or vocab.least_vocab_size)


def has_own_labels(name: ShapeName) -> bool:
    """Whether a shape is one of the arithmetic vocabulary."""
    return _SHAPES[name][1] is None


# ------------------------------------------------------------------------------------------------------- workloads


def segment_tokens(
    shape: Shape, *, batch_size: int, num_tokens: int, steps: int, attended_fraction: float, seed: int
) -> Int[np.ndarray, "B T"]:
    """Sequences whose last `steps` tokens attend to a given share of their context on average, span tokens included.

    A prompt of labelled segments of random text, then a response in steps of 32 tokens: `<seg>`, four `<ref>` that name
    segments of the prompt, random text. The segments are as long as the share asks for, give or take a quarter; which ones a
    step names is drawn so that the mean stays on course. Sequences are at different places of their steps at the same time.

    Raises: ValueError for a share that cannot be had this way.
    """
    vocab, rng = shape.vocab, np.random.default_rng(seed)
    structural = {vocab.pad_id, vocab.bos_id, vocab.eos_id, vocab.solve_id}
    structural |= {base + label for base in (vocab.seg_base, vocab.ref_base) for label in range(vocab.num_labels)}
    text = np.setdiff1d(np.arange(shape.vocab_size), list(structural))
    # A token at place i of its step sees <bos> and <solve>, i + 1 tokens of its own, and the min(i, refs) segments named so far.
    named_share = np.minimum(np.arange(STEP_TOKENS), REFS_PER_STEP).mean()
    wanted = attended_fraction * (num_tokens - (steps - 1) / 2)  # tokens that the timed ones attend to, on average
    segment = (wanted - 2 - (STEP_TOKENS + 1) / 2) / named_share
    longest_response = 2 * STEP_TOKENS + steps
    num_segments = int((num_tokens - longest_response - 2) // max(segment, 1))
    num_labels = num_segments + 1 + longest_response // STEP_TOKENS + 2
    if segment < 2 or num_segments < 2 * REFS_PER_STEP or num_labels > vocab.num_labels:
        raise ValueError(
            f"attended_fraction is {attended_fraction}: in a context of {num_tokens} tokens that takes {max(num_segments, 0)} segments "
            f"of {segment:.1f} tokens; allowed: {2 * REFS_PER_STEP} segments and more, 2 tokens and more, {vocab.num_labels} labels in all"
        )
    return np.stack([_segment_row(rng, vocab, text, num_tokens, steps, segment, num_segments) for _ in range(batch_size)])


def _segment_row(
    rng: np.random.Generator, vocab: SpanVocab, text: np.ndarray, num_tokens: int, steps: int, segment: float, num_segments: int
) -> Int[np.ndarray, "T"]:
    before = STEP_TOKENS + int(rng.integers(STEP_TOKENS))  # response tokens before the timed ones
    prompt_tokens = num_tokens - steps - before
    row = rng.choice(text, num_tokens).astype(np.int32)
    row[0], row[prompt_tokens - 1] = vocab.bos_id, vocab.solve_id
    ends = 1 + np.cumsum(segment * rng.uniform(0.75, 1.25, num_segments)).round().astype(int)
    starts = np.concatenate([[1], ends[:-1]])
    ends = np.minimum(ends, prompt_tokens - 1)
    usable = np.flatnonzero(ends - starts >= 2)
    row[starts[usable]] = vocab.seg_base + 1 + usable
    if ends[usable[-1]] < prompt_tokens - 1:  # what is left carries a label that nobody names
        row[ends[usable[-1]]] = vocab.seg_base + 1 + num_segments
    ahead = 0.0  # tokens named so far beyond what was wanted
    for number, start in enumerate(range(prompt_tokens, num_tokens, STEP_TOKENS)):
        choices = [rng.choice(usable, REFS_PER_STEP, replace=False) for _ in range(32)]
        sizes = [(ends[names] - starts[names]).sum() - REFS_PER_STEP * segment for names in choices]
        best = int(np.argmin(np.abs(ahead + np.array(sizes))))
        ahead += sizes[best]
        header = [vocab.seg_base + num_segments + 2 + number, *(vocab.ref_base + 1 + choices[best])]
        row[start : start + len(header)] = header[: num_tokens - start]
    return row


# ---------------------------------------------------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration to measure."""

    attention: Attention
    batch_size: int
    context_tokens: int
    steps: int
    int8: bool = False
    num_samples: int = 1
    """Sequences that share a prompt."""

    @property
    def num_tokens(self) -> int:
        """Of whole sequences: the mean context of the last `steps` tokens is then `context_tokens`."""
        return self.context_tokens + self.steps // 2

    @property
    def prompt_tokens(self) -> int:
        return self.num_tokens - self.steps

    @property
    def config(self) -> DecodeConfig:
        return DecodeConfig(attention=self.attention, max_new_tokens=self.steps)

    def __str__(self) -> str:
        extras = (", int8" if self.int8 else "") + (f", {self.num_samples} samples a prompt" if self.num_samples > 1 else "")
        return f"batch {self.batch_size}, context {self.context_tokens}, {self.attention}{extras}"


def step_bytes(model: Decoder, num_attended: float, batch_size: int) -> int:
    """Bytes that one decode step must move: weights once, embeddings of the tokens, rows attended to, rows written.

    Args:
      model: as `for_decoding` makes it, or its shapes; on a mesh what one device has of it (`FrozenDecoder.share`).
      num_attended: tokens attended to, over the whole batch; on a mesh over the device's sequences.
      batch_size: sequences; on a mesh the device's.
    """
    config = model.config
    embedding = model.embed_tokens.embedding.get_value()
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if model.lm_head is not None:  # else the embedding is the output layer too, and read whole
        weights -= embedding.size * embedding.dtype.itemsize
    lookups = batch_size * config.hidden_size * embedding.dtype.itemsize
    row = 2 * config.num_layers * config.num_kv_heads * config.head_size * jnp.dtype(config.compute_dtype).itemsize
    return round(weights + lookups + (num_attended + batch_size) * row)


def bytes_of(tree: Any) -> int:
    """Of arrays or shapes; on a mesh what one device has of them."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(layout.shard_shape(leaf)) * leaf.dtype.itemsize for leaf in leaves)


def device_memory_bytes() -> int | None:
    """What the first device lets this process have; None where it does not say."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


# Where arrays lie whose first, or second, axis is that of the sequences.
_EACH, _EACH_STEP = layout.spec("sequences"), layout.spec(None, "sequences")


class DoesNotFit(Exception):
    """A case that needs more memory than there is."""


@dataclasses.dataclass
class Programs:
    """What a case runs, compiled: nothing is allocated yet."""

    frozen: decoding.FrozenDecoder  # shapes in place of parameters
    prefill: Any
    replay: Any
    bare: Any | None  # see `_bare_loop`
    needed_bytes: int
    compile_seconds: float


def compile_case(shape: Shape, case: Case, mesh: Mesh | None = None) -> Programs:
    """Compiles a case from shapes alone. Raises DoesNotFit where what it needs exceeds the device's memory."""
    began = time.perf_counter()
    frozen = decoding.FrozenDecoder.of(shape.abstract(int8=case.int8), mesh)
    params, config = frozen.params, case.config

    def prefill(params, token_ids, lengths, keys):
        return decoding.prefill_on_devices(frozen.structure, params, token_ids, lengths, keys, config, case.num_samples)

    def replay(params, state, forced):
        return decoding.run(dataclasses.replace(frozen, params=params), state, config, forced=forced)

    def ints(*sizes: int):
        return jax.ShapeDtypeStruct(sizes, jnp.int32)

    num_prompts = case.batch_size // case.num_samples
    keys = jax.eval_shape(lambda: decoding.sequence_keys(None, case.batch_size))
    prompts = layout.device_put_global((ints(num_prompts, decoding.bucket(case.prompt_tokens)), ints(num_prompts), keys), mesh, _EACH)
    traced = jax.jit(prefill).trace(params, *prompts)
    state = layout.device_put_global(traced.out_info, mesh, decoding.DecodeState.places())
    _check_fits(case, bytes_of(params) + bytes_of(state))
    compiled_prefill = traced.lower().compile()
    forced = layout.device_put_global(ints(case.batch_size, case.steps), mesh, _EACH)
    compiled_replay = jax.jit(replay, donate_argnums=1).lower(params, state, forced).compile()
    bare = None
    if case.attention == "span" and case.num_samples == 1:
        shapes = (ints(case.steps, case.batch_size, state.cache.table.shape[1]), ints(case.steps, case.batch_size))
        rows = layout.device_put_global(shapes, mesh, _EACH_STEP)
        loop = jax.jit(functools.partial(_bare_loop, frozen, config, case.prompt_tokens), donate_argnums=1)
        bare = loop.lower(params, state.cache.pools, state.logits, *rows, rows[1]).compile()
    needed = max(_footprint(compiled_prefill), _footprint(compiled_replay))
    _check_fits(case, needed)
    return Programs(frozen, compiled_prefill, compiled_replay, bare, needed, time.perf_counter() - began)


def _footprint(program) -> int:
    """Bytes of arguments, results and temporaries of a compiled program."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return sizes - memory.alias_size_in_bytes


def _check_fits(case: Case, needed_bytes: int) -> None:
    limit = device_memory_bytes()
    if limit is not None and needed_bytes > limit:
        raise DoesNotFit(f"does not fit: needs {needed_bytes / 2**30:.1f} GiB of memory, the device has {limit / 2**30:.1f}")


def _bare_loop(frozen: decoding.FrozenDecoder, config: DecodeConfig, first_position: int, params, pools, logits, rows, counts, own):
    """The steps of a replay without automaton, row lists and bookkeeping: what each step attends to is handed in.

    The same products, cache writes and attention to as many and the same rows, and the most likely token fed back, in a loop
    of known length. The difference to the replay is what choosing its own span costs.
    """

    def steps(model, pools, logits, rows, counts, own):
        def step(index, carry):
            pools, logits = carry
            tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            attend = attend_cached(own[index], SlotList(rows[index], counts[index]), config.implementation)
            positions = jnp.full((logits.shape[0], 1), first_position + index, jnp.int32)
            hidden, pools = model(tokens[:, None], positions, attend, pools, linear=config.linear)
            return pools, model.logits(hidden[:, 0], linear=config.linear)

        return jax.lax.fori_loop(0, counts.shape[0], step, (pools, logits))

    places = decoding.DecodeState.places()
    carried = (places.cache.pools, places.logits)
    loop = frozen.structure.on_devices(steps, *carried, _EACH_STEP, _EACH_STEP, _EACH_STEP, outputs=carried)
    return loop(params, pools, logits, rows, counts, own)


def measure_case(
    shape: Shape, params: tuple[Array, ...], case: Case, programs: Programs, token_ids: Int[np.ndarray, "B T"], *, profile: bool = False
) -> dict[str, Any]:
    """Runs a compiled case on a workload and returns its row; a profiled row has the device's time by kind of operation too."""
    state, first_token_ms = _prefilled(shape, params, case, programs, token_ids)
    forced = np.repeat(token_ids[: case.batch_size // case.num_samples, case.prompt_tokens :], case.num_samples, axis=0)
    mesh = programs.frozen.mesh
    lists = () if programs.bare is None else _row_lists(shape, case, token_ids, np.asarray(state.cache.table))
    lists = layout.device_put_global(lists, mesh, _EACH_STEP)
    # A replay consumes its state. So each one gets a copy of everything but the pools, in which it writes the same rows again.
    pools = state.cache.pools
    kept = dataclasses.replace(state, cache=dataclasses.replace(state.cache, pools=()))
    del state

    seconds, bare_seconds = [], []
    given = layout.device_put_global(jnp.asarray(forced), mesh, _EACH)

    def ready():
        fresh = jax.tree.map(lambda x: x.copy(), kept)
        return jax.block_until_ready(dataclasses.replace(fresh, cache=dataclasses.replace(fresh.cache, pools=pools)))

    for _ in range(WARM_UPS + REPETITIONS):
        state, elapsed = timed(programs.replay, params, ready(), given)
        seconds.append(elapsed)
        pools = state.cache.pools
        if programs.bare is not None:  # in turns, so that both see the device in the same state
            (pools, _), elapsed = timed(programs.bare, params, pools, kept.logits, *lists)
            bare_seconds.append(elapsed)
    if not np.array_equal(np.asarray(state.new_tokens), forced):
        raise RuntimeError(f"{case}: the loop did not replay the tokens that it was given")

    median_ms, spread_ms = median_and_spread([1e3 * s / case.steps for s in seconds[WARM_UPS:]])
    counts, contexts = np.asarray(state.num_attended), np.arange(case.prompt_tokens + 1, case.num_tokens + 1)
    parts = 1 if mesh is None else num_data_shards(mesh)
    row: dict[str, Any] = {
        "ms_per_step": median_ms,
        "spread_ms": spread_ms,
        "tokens_per_second": 1e3 * case.batch_size / median_ms,
        "mean_context_tokens": float(contexts.mean()),
        "attended_tokens": float(counts.mean()),
        "attended_fraction": float((counts / contexts).mean()),
        "bytes_per_step": step_bytes(programs.frozen.share, float(counts.sum(axis=0).mean()) / parts, case.batch_size // parts),
        "time_to_first_token_ms": first_token_ms,
        "kv_memory_bytes": bytes_of(pools),
        "program_memory_bytes": programs.needed_bytes,
        "process_peak_memory_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "compile_seconds": programs.compile_seconds,
    }
    if bare_seconds:
        bare_ms = 1e3 * statistics.median(bare_seconds[WARM_UPS:]) / case.steps
        row |= {"bare_ms_per_step": bare_ms, "upkeep_fraction": 1 - bare_ms / row["ms_per_step"]}
    if profile:
        del state
        traced = ready()
        row |= device_times(lambda: jax.block_until_ready(programs.replay(params, traced, given)), case.steps)
    return row


def _prefilled(shape: Shape, params, case: Case, programs: Programs, token_ids: Int[np.ndarray, "B T"]) -> tuple[Any, float]:
    """The state after the prompts, and the milliseconds that it took: the median after one run, of one run if they are long."""
    num_prompts, length = case.batch_size // case.num_samples, case.prompt_tokens
    room = decoding.bucket(length)
    prompts = np.full((num_prompts, room), shape.vocab.pad_id, np.int32)
    prompts[:, :length] = token_ids[:num_prompts, :length]
    inputs = (jnp.asarray(prompts), jnp.full((num_prompts,), length, jnp.int32), decoding.sequence_keys(None, case.batch_size))
    arguments = (params, *layout.device_put_global(inputs, programs.frozen.mesh, _EACH))
    state: Any = None
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) <= REPETITIONS and sum(seconds) < 2):
        del state  # the next one needs its memory
        state, elapsed = timed(programs.prefill, *arguments)
        seconds.append(elapsed)
    return state, 1e3 * statistics.median(seconds[1:])


_mask_rows = jax.jit(sequence_mask, static_argnames=("vocab", "config", "attention", "first_query", "num_queries"))


def _row_lists(shape: Shape, case: Case, token_ids: Int[np.ndarray, "B T"], table: Int[np.ndarray, "B A"]):
    """For each timed step: the rows that the mask names [M, B, A], how many [M, B], and the row of the token itself [M, B]."""
    rows = np.zeros((case.steps, *table.shape), np.int32)
    counts = np.zeros((case.steps, case.batch_size), np.int32)
    which = {"first_query": case.prompt_tokens, "num_queries": case.steps}
    for b in range(case.batch_size):
        visible = np.asarray(_mask_rows(jnp.asarray(token_ids[b : b + 1]), shape.vocab, shape.config, case.attention, **which))[0]
        counts[:, b] = visible.sum(axis=1)
        for step in range(case.steps):
            rows[step, b, : counts[step, b]] = table[b, np.flatnonzero(visible[step])]
    own = np.ascontiguousarray(table[:, case.prompt_tokens : case.num_tokens].T)
    return jnp.asarray(rows), jnp.asarray(counts), jnp.asarray(own)


def measure_stream(model: Decoder, token_ids: Int[np.ndarray, "B T"], case: Case, mesh: Mesh | None = None) -> dict[str, Any]:
    """What streaming costs: ms per step of `decoding.stream` against one loop, free running, the first chunk apart.

    Both write the same tokens after the prompt of a case; prefill and the first chunk of 8 tokens are not counted.
    """
    chunk, frozen = 8, decoding.FrozenDecoder.of(model, mesh)
    room = model.config.max_context_tokens - case.prompt_tokens
    new_tokens = min(STREAMED_TOKENS, room // chunk * chunk)
    if new_tokens < 2 * chunk:
        return {"not_run": f"the model has room for {room} tokens only after the prompt"}
    prompts = token_ids[:, : case.prompt_tokens]
    lengths = np.full(case.batch_size, case.prompt_tokens, np.int32)
    config = dataclasses.replace(case.config, max_new_tokens=new_tokens)
    whole, streamed = [], []
    for _ in range(1 + REPETITIONS):
        state = decoding.run(frozen, decoding.prefill(frozen, prompts, lengths, config), config, until=chunk)
        jax.block_until_ready(state)
        state, elapsed = timed(decoding.run, frozen, state, config)
        whole.append(elapsed)
        if int(state.num_steps) < new_tokens:
            return {"not_run": f"the model ended its response after {int(state.num_steps)} tokens"}
        del state
        times = [time.perf_counter() for _ in decoding.stream(frozen, prompts, lengths, config, chunk_tokens=chunk)]
        streamed.append(times[-1] - times[0])
    whole_ms, stream_ms = (1e3 * statistics.median(x[1:]) / (new_tokens - chunk) for x in (whole, streamed))
    return {
        "generate_ms_per_step": whole_ms,
        "ms_per_step": stream_ms,
        "cost_of_streaming": stream_ms / whole_ms - 1,
        "chunk_tokens": chunk,
    }


# ------------------------------------------------------------------------------------------------------------ sweep


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep. What the fields mean stands in the help of `decode.py bench`."""

    batch_size: tuple[int, ...]
    context: tuple[int, ...]
    attention: tuple[Attention, ...]
    steps: int
    int8: bool
    peers: tuple[benchmark_peers.Name, ...]
    workload: WorkloadName | None
    attended_fraction: float
    num_samples: int
    stream_check: bool
    profile: bool
    mesh: str | None
    seed: int

    def __post_init__(self):
        for name in ("batch_size", "context", "num_samples"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=1) < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 and above")
        if self.steps < 2 or self.steps % 2:
            raise ValueError(f"steps is {self.steps}; allowed: even numbers, 2 and above")
        if self.context and min(self.context) <= self.steps:
            raise ValueError(f"context is {min(self.context)}; allowed: more than the {self.steps} timed steps")
        if not 0 < self.attended_fraction < 1:
            raise ValueError(f"attended_fraction is {self.attended_fraction}; allowed: above 0, below 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; allowed: 0 and above")
        if self.peers and self.mesh:
            raise ValueError(f"mesh is {self.mesh!r}, but peers are measured on one device: give one of --mesh and --peers")

    def within(self, max_context_tokens: int | None) -> Plan:
        """The same with the contexts filled in where none were given; None for models with any room.

        Raises: ValueError for a context that the model has no room for.
        """
        if not self.context:
            room = DEFAULT_CONTEXT if max_context_tokens is None else max_context_tokens - self.steps // 2
            return dataclasses.replace(self, context=(min(DEFAULT_CONTEXT, room),))
        longest = max(self.context) + self.steps // 2
        if max_context_tokens is not None and longest > max_context_tokens:
            raise ValueError(f"context {max(self.context)} takes {longest} tokens; the model's context is {max_context_tokens}")
        return self

    def devices(self, config: ModelConfig) -> Mesh | None:
        """The mesh. Raises ValueError for one that does not fit the model or the batches."""
        mesh = make_mesh(self.mesh) if self.mesh else None
        if mesh is not None:
            check_decoding(config, mesh)
            for case in self.cases:
                check_batch(case.batch_size // case.num_samples, mesh, "the number of prompts")
        return mesh

    @property
    def cases(self) -> list[Case]:
        """In the order in which they are measured: dense first, because the others are compared with it, int8 last."""
        policies = sorted(dict.fromkeys(self.attention), key=lambda policy: policy != "dense")
        every = itertools.product((False, True) if self.int8 else (False,), self.context, self.batch_size, policies)
        cases = [Case(policy, batch, context, self.steps, int8) for int8, context, batch, policy in every]
        if self.num_samples > 1:
            apart = Case("span", self.num_samples, max(self.context), self.steps)
            cases += [apart, dataclasses.replace(apart, num_samples=self.num_samples)]
        return sorted(dict.fromkeys(cases), key=lambda case: case.int8)

    @property
    def peer_cases(self) -> list[dict[str, Any]]:
        every = itertools.product(self.peers, self.context, self.batch_size)
        return [{"peer": p, "batch_size": batch, "context_tokens": context, "steps": self.steps} for p, context, batch in every]


def sweep(
    shape: Shape,
    cases: Sequence[Case],
    tokens_of: Callable[[Case], Int[np.ndarray, "B T"]],
    *,
    model: Decoder | None = None,
    seed: int = 0,
    stream: bool = False,
    profile: bool = False,
    mesh: Mesh | None = None,
    compiled: Mapping[Case, Programs | str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Measures cases and yields a row for each; one that does not fit in memory gets a row that says so.

    Args:
      model: with its weights in float32 or the compute dtype; random weights by default.
      tokens_of: the workload of a case, [B, case.num_tokens].
      compiled: what `compile_all` returned for the cases.
      stream: measure streaming too, on the first case with span attention.
      profile: run each case once more, under the profiler.
      mesh: the devices to decode on, by default one.
    """
    cases = list(dict.fromkeys(cases))
    streamed = next((case for case in cases if case.attention == "span" and not case.int8), None)
    waiting = dict(compile_all(shape, cases, mesh) if compiled is None else compiled)
    decoder = model.for_decoding() if model is not None else shape.random(seed)
    params, quantized = decoding.FrozenDecoder.of(decoder, mesh).params, False
    for case in tqdm(cases, desc="measure", unit="row", leave=False, disable=None):
        row = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
        programs = waiting.pop(case)
        try:
            if isinstance(programs, str):
                raise DoesNotFit(programs)
            if case.int8 and not quantized:
                decoder, quantized = decoder.for_decoding(int8=True), True
                params = decoding.FrozenDecoder.of(decoder, mesh).params
            yield row | measure_case(shape, params, case, programs, tokens_of(case), profile=profile)
        except DoesNotFit as reason:
            yield row | {"not_run": str(reason)}
        except jax.errors.JaxRuntimeError as error:
            if not _out_of_memory(error):
                raise
            yield row | {"not_run": "does not fit: the device ran out of memory"}
        if stream and case == streamed:
            yield row | {"stream": True} | measure_stream(decoder, tokens_of(case), case, mesh)


def _out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def compile_all(shape: Shape, cases: Sequence[Case], mesh: Mesh | None = None) -> dict[Case, Programs | str]:
    """Programs of every case, or why there are none. Compiled side by side: XLA leaves most processors idle on one program."""

    def compile_one(case: Case) -> Programs | str:
        try:
            return compile_case(shape, case, mesh)
        except DoesNotFit as reason:
            return str(reason)
        except jax.errors.JaxRuntimeError as error:
            if not _out_of_memory(error):
                raise
            return "does not fit: the device ran out of memory while it was compiled"

    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        waiting = {pool.submit(compile_one, case): case for case in cases}
        done = concurrent.futures.as_completed(waiting)
        return {waiting[future]: future.result() for future in tqdm(done, "compile", len(cases), unit="case", leave=False, disable=None)}
