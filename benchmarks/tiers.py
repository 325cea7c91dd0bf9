"""Measure decode steps of prompts in host memory: the replay of `benchmarks.decoding`, and what comes over the link.

Working sets hold at first what every step reads, as after any prefill. A replay is repeated from that state. Rows that it copied are then
in pools that the repetition takes for empty: it copies them again, which is what is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from benchmarks.decoding import REPETITIONS, WARM_UPS, Case, Programs, copy_state, detach_pools, draw_layer, draw_rows, replay_row
from benchmarks.shapes import Shape
from benchmarks.timing import timed
from pallas_kernels import copy_rows
from selfspan_jax.config import WORKING_SET_TOKENS, KvMemory
from selfspan_jax.decoding.cache import LayerPools
from selfspan_jax.model import Decoder
from selfspan_jax.parallel.memory import bytes_of, check_fits
from selfspan_jax.tiers.engine import HostEngine
from selfspan_jax.tiers.prefill import read_to_host

LINK_ROWS = 1 << 14  # of 4 KiB, by which the link is measured
MAX_REPEATED_SECONDS = 20.0  # of a prefill; what takes longer hardly feels its compilation


@dataclasses.dataclass(frozen=True)
class TieredCase(Case):
    """A case whose prompts lie in host memory."""

    kv_memory: KvMemory = "host"
    working_set_tokens: int = WORKING_SET_TOKENS


def compile_case(shape: Shape, case: TieredCase, mesh: Mesh | None = None) -> Programs:
    """Make the engine; it compiles as it runs. Raises: DoesNotFit where the parameters alone exceed the device's memory."""
    read = fill_with_random_rows if case.random_rows else read_to_host
    engine = HostEngine(shape.abstract(case.weights), working_set_tokens=case.working_set_tokens, read=read)
    check_fits(needed := bytes_of(engine.params))
    return Programs(engine, None, needed, 0.0)


def fill_with_random_rows(decoder: Decoder, token_ids: Array, lengths, config, responses, free_rows: int) -> tuple[tuple, Array]:
    """Draw what `read_to_host` returns, layer by layer, so that the device holds one layer's rows."""
    config, dtype, pools = decoder.config, jnp.dtype(decoder.config.compute_dtype), []
    last, key = draw_rows(jnp.zeros(2, jnp.uint32), (len(token_ids), config.hidden_size), dtype)
    for _ in range(config.num_layers):
        layer, key = jax.block_until_ready(_draw_layer(key, (token_ids.size + free_rows, config.num_kv_heads, config.head_size), dtype))
        pools.append(layer)
    return tuple(pools), last


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw_layer(key: Array, shape: tuple[int, ...], dtype: Any) -> tuple[LayerPools, Array]:
    pools, key = draw_layer(key, shape, dtype)
    return jax.device_put(pools, jax.memory.Space.Host), key


@functools.cache
def link_bytes_per_second() -> float:
    """Measure how fast a kernel of its own copies rows from host memory: what a slow link shows by."""
    rows = jnp.arange(LINK_ROWS, dtype=jnp.int32)[None]
    pool = jnp.zeros((LINK_ROWS, 8, 128), jnp.bfloat16)
    host = jax.jit(lambda: jax.device_put((pool, pool), jax.memory.Space.Host))()
    copy = jax.jit(lambda host, pools: copy_rows(host, pools, rows, rows, jnp.array([LINK_ROWS], jnp.int32)))
    seconds = [timed(copy, host, (pool, pool))[1] for _ in range(WARM_UPS + REPETITIONS)]
    return 2 * pool.nbytes / statistics.median(seconds[WARM_UPS:])


def measure_case(
    shape: Shape,
    params: tuple[Array, ...],
    case: TieredCase,
    programs: Programs,
    token_ids: Int[np.ndarray, "B T"],
    *,
    profile: bool = False,
) -> dict[str, Any]:
    """Run a case on a workload and return its row; there is no profile of it."""
    engine, config = programs.engine, case.config
    engine.params = params
    prompts, lengths = token_ids[: case.num_prompts, : case.prompt_tokens], np.full(case.num_prompts, case.prompt_tokens)
    prefill = functools.partial(engine.prefill, num_samples=case.num_samples)
    state, prefill_seconds = timed(prefill, prompts, lengths, config)
    if prefill_seconds < MAX_REPEATED_SECONDS and not case.random_rows:
        del state
        state, prefill_seconds = timed(prefill, prompts, lengths, config)
    forced = np.repeat(token_ids[: case.num_prompts, case.prompt_tokens :], case.num_samples, axis=0)
    kept, pools = detach_pools(state)
    del state
    run, seconds = functools.partial(engine.run, forced_tokens=forced), []
    for _ in range(WARM_UPS + REPETITIONS):
        state, elapsed = timed(run, copy_state(kept, pools), config)
        seconds.append(elapsed)
        pools = state.cache.pools
    copied, missed = (float(np.asarray(rows, np.int64).sum()) / case.steps for rows in (state.cache.copied, state.cache.misses))
    row_bytes = bytes_of([pool[:1] for layer in pools for pool in layer[:2]])  # of all layers
    return replay_row(engine, case, state, forced, seconds, None if case.random_rows else prefill_seconds) | {
        "copied_rows_per_step": copied,
        "missed_rows_per_step": missed,
        "link_bytes_per_step": (copied + missed) * row_bytes,
        "link_bytes_per_second": link_bytes_per_second(),
        "kv_memory_bytes": bytes_of([layer[:2] for layer in pools]),
        "host_memory_bytes": bytes_of([layer[2:] for layer in pools]),
        "process_peak_memory_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
