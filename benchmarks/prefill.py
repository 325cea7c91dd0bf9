"""Measure how fast prompts are read: first-token times against the peak of the matrix units.

A first-token time is the wall time of the compiled program that reads the prompts, from token ids on the device to the logits of
the first new token and the cache from which decoding goes on: the median of up to five runs, compilation excluded. Operations are
the model's (`prefill_flops`): its matrix products, and the pairs of tokens that the mask allows (`count_pairs`). Padding, and pairs
that are computed although the mask cuts them, count as time but not as operations.

Which tiles sparse prefill keeps depends on the model, and random weights say nothing of it. So its time is that of the selector's own
work, and of attention to a share of the tiles that is given, spread at random; `python -m experiments.prefill quality` finds shares.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from benchmarks.decoding import Programs, compile_prefill, footprint, prefill_arguments, time_prefill
from benchmarks.shapes import Shape
from benchmarks.timing import device_times, median_and_spread
from pallas_kernels import PromptMask
from pallas_kernels.prompt_attention import BLOCK, SampleAttention, Selector
from pallas_kernels.tiles import list_tiles
from selfspan_jax.attention import selectors
from selfspan_jax.attention.policies import Policy, get_policy
from selfspan_jax.config import DecodeConfig, ModelConfig, Weights
from selfspan_jax.decoding.state import bucket, prefill_chunk_tokens
from selfspan_jax.errors import UserError
from selfspan_jax.model import Decoder
from selfspan_jax.parallel.engine import make_engine
from selfspan_jax.parallel.memory import check_fits
from selfspan_jax.spans import SpanVocab
from selfspan_jax.training.metrics import mfu, step_flops

# By the names that `PrefillCase` takes.
SELECTORS: dict[str, Selector] = {name: selector for name, selector in selectors.SELECTORS.items() if selector is not None}
SELECTORS |= {"sample-1": SampleAttention(version=1)}
MAX_SECONDS = 30.0  # after which a prefill is not repeated again
Prompts = tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]  # padded, and how many tokens of each row there are


@dataclasses.dataclass(frozen=True)
class PrefillCase:
    """One configuration to measure."""

    attention: str
    batch_size: int
    context_tokens: int
    """Tokens that each prompt has, at most."""
    weights: Weights = "bf16"
    prefill: str = "dense"
    """Or the name of a selector, whose work is done; then `kept` is the share of the tiles before the diagonal that are read."""
    kept: float = 1.0

    def __post_init__(self):
        chunk = prefill_chunk_tokens(self.batch_size, bucket(self.context_tokens), self.config)
        if self.prefill != "dense" and chunk % BLOCK:
            wrong = (
                f"prompts of {self.context_tokens} tokens, {self.batch_size} at once, go through the model {chunk} tokens of each at a time"
            )
            raise UserError(f"sparse is {self.prefill!r}: {wrong}; allowed: multiples of {BLOCK}")

    @property
    def num_tokens(self) -> int:
        return self.context_tokens

    @property
    def num_prompts(self) -> int:
        return self.batch_size

    @property
    def config(self) -> DecodeConfig:
        chosen: str | OfShare = "dense"
        if self.prefill != "dense":
            chosen = OfShare(selector=SELECTORS[self.prefill], share=self.kept, dense_below_tokens=0)
        return DecodeConfig(attention=self.attention, max_new_tokens=1, prefill=chosen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfShare(Selector):
    """Do a selector's work, then keep its diagonal and a share of the other tiles, at random and other ones for each head."""

    selector: Selector
    share: float

    name = "share"

    def choose(self, q, k, *, first_query=0, lengths=None):
        tiles, counts = self.selector.choose(q, k, first_query=first_query, lengths=lengths)
        worked = counts[..., 1:] >= 0  # always, which no compiler knows: so the selector's work is not left out
        head, i, j = (jax.lax.broadcasted_iota(jnp.uint32, tiles.shape, axis) for axis in (1, 2, 3))
        draw = (head * jnp.uint32(0x9E3779B9)) ^ (i * jnp.uint32(0x85EBCA6B)) ^ (j * jnp.uint32(0xC2B2AE35))
        draw = (draw ^ (draw >> 15)) * jnp.uint32(0x2C1B3C6D)
        draw = (draw ^ (draw >> 12)) * jnp.uint32(0x297A2D39)
        own = (jnp.int32(first_query) // BLOCK).astype(jnp.uint32) + i
        kept = (j <= own) & ((j == own) | ((draw >> 8).astype(jnp.float32) < jnp.float32(self.share * 2**24)))
        return list_tiles(kept & worked, kept & worked & (j < own))


def compile_case(shape: Shape, case: PrefillCase, mesh: Mesh | None = None) -> Programs:
    """Compile a case from shapes alone.

    Raises: DoesNotFit where its arguments, results and temporaries exceed the device's memory.
    """
    began = time.perf_counter()
    engine = make_engine(shape.abstract(case.weights), mesh)
    prefill, _ = compile_prefill(engine, case.batch_size, case.context_tokens, case.config)
    check_fits(needed := footprint(prefill))
    return Programs(engine, prefill, needed, time.perf_counter() - began)


def measure_case(
    shape: Shape, params: tuple[Array, ...], case: PrefillCase, program: Programs, prompts: Prompts, *, profile: bool = False
) -> dict[str, Any]:
    """Run a compiled case on prompts and return its row, with the device's time by kind of operation if `profile`.

    On a mesh bytes are those of one device; tokens, pairs and operations those of all.
    """
    token_ids, lengths = prompts
    arguments = prefill_arguments(program.prefill, params, token_ids, lengths, shape.vocab.pad_id)
    state, seconds = time_prefill(program.prefill, arguments, MAX_SECONDS)
    median_ms, spread_ms = median_and_spread([1e3 * each for each in seconds])
    memory, mesh = program.prefill.memory_analysis(), program.engine.mesh
    if case.prefill == "dense":
        pairs = count_pairs(prompt_mask(get_policy(case.attention), token_ids, lengths, shape.vocab, shape.config))
    else:
        pairs = kept_pairs(lengths, case.kept)
    row: dict[str, Any] = {
        "time_to_first_token_ms": median_ms,
        "spread_ms": spread_ms,
        "repetitions": len(seconds),
        "num_tokens": int(lengths.sum()),
        "allowed_pairs": pairs,
        "allowed_fraction": pairs / causal_pairs(lengths),
        "num_devices": 1 if mesh is None else mesh.size,
        "argument_memory_bytes": memory.argument_size_in_bytes,
        "temporary_memory_bytes": memory.temp_size_in_bytes,
        **program.memory(state.cache.pools),
    }
    del state
    return row | (device_times(lambda: program.prefill(*arguments), 1) if profile else {})


# -------------------------------------------------------------------------------------------------------- what is counted


def prompt_mask(policy: Policy, token_ids: Int[np.ndarray, "B T"], lengths, vocab: SpanVocab, views: ModelConfig) -> PromptMask:
    """Return the mask of whole prompts, without its lists of tiles."""
    padding = bucket(token_ids.shape[1]) - token_ids.shape[1]
    padded = jnp.asarray(np.pad(token_ids, ((0, 0), (0, padding)), constant_values=vocab.pad_id), jnp.int32)
    return _prompt_mask(policy, padded, jnp.asarray(lengths, jnp.int32), vocab, views)


@functools.partial(jax.jit, static_argnames=("policy", "vocab", "views"))
def _prompt_mask(policy: Policy, token_ids, lengths, vocab: SpanVocab, views: ModelConfig) -> PromptMask:
    masks = policy.prompt_masks(token_ids, lengths, vocab, views, responses=False)
    assert masks is not None  # prompts only
    return without_tiles(masks(jnp.int32(0), token_ids.shape[1]))


def without_tiles(mask: PromptMask) -> PromptMask:
    """Return a mask without its lists of tiles, which say nothing that positions and labels do not."""
    return dataclasses.replace(mask, key_tiles=None, key_counts=None, blocks=None)


def causal_pairs(lengths: Iterable[int]) -> int:
    """Count the pairs of sequences in which every token attends to itself and everything before."""
    return sum(length * (length + 1) // 2 for length in map(int, lengths))


def kept_pairs(lengths: Iterable[int], share: float) -> int:
    """Count the pairs of causal sequences that lie in tiles on the diagonal, and a share of the others: what `OfShare` reads on average."""
    lengths = [*map(int, lengths)]
    diagonal = causal_pairs([BLOCK]) * sum(length // BLOCK for length in lengths) + causal_pairs(length % BLOCK for length in lengths)
    return diagonal + round(share * (causal_pairs(lengths) - diagonal))


def count_pairs(mask: PromptMask) -> int:
    """Count the pairs of queries and keys that a mask of whole prompts allows, padding aside; no pair is ever stored."""
    lengths = np.asarray(mask.lengths)
    if mask.query_labels is None or mask.key_labels is None:
        return causal_pairs(lengths)
    total = 0
    for query_labels, key_labels, length in zip(np.asarray(mask.query_labels, np.int64), np.asarray(mask.key_labels, np.int64), lengths):
        index = np.arange(length)
        before = np.maximum(index + 1 - mask.window_tokens, 0)  # keys that are older than the window
        queries, keys = query_labels[:length], key_labels[:length]
        shared = np.concatenate([[0], np.cumsum(keys == 0)])[before]
        places = np.sort(keys * length + index)  # by label, then by position
        own = np.searchsorted(places, queries * length + before) - np.searchsorted(places, queries * length)
        total += int(np.sum(index + 1 - before) + np.sum(shared) + np.sum(own[queries != 0]))
    return total


def prefill_flops(model: Decoder, num_tokens: int, num_prompts: int, num_pairs: int) -> float:
    """Count the floating-point operations of reading prompts: those of a forward pass, with the logits of each last token only.

        2 x (parameters of the layers' matrix products) x tokens  +  2 x V x D x prompts  +  4 x layers x N x H x (allowed pairs)

    A third of a training step (`step_flops`), less the output layer's products that are not needed: a product of n parameters with
    a token is 2 n operations, scores and values of a pair 4 H for each query head; norms and rotations are not counted.
    """
    return step_flops(model, num_tokens, num_pairs) / 3 - 2 * model.vocab_size * model.config.hidden_size * (num_tokens - num_prompts)


def rates(shape: Shape, row: dict[str, Any]) -> dict[str, Any]:
    """Compute the rates of a row, ours or a peer's: tokens and operations per second, percent of the bf16 peak (None without one).

    `roofline_ms` is the time that the operations take at the peak.
    """
    model = shape.abstract()
    flops = prefill_flops(model, row["num_tokens"], row["batch_size"], row["allowed_pairs"])
    per_second = 1e3 * flops / row["time_to_first_token_ms"]
    utilisation = mfu(model, per_second / row.get("num_devices", 1))
    return {
        "tokens_per_second": 1e3 * row["num_tokens"] / row["time_to_first_token_ms"],
        "model_flops": flops,
        "model_flops_per_second": per_second,
        "percent_of_peak": None if utilisation is None else 100 * utilisation,
        **({} if utilisation is None else {"roofline_ms": utilisation * row["time_to_first_token_ms"]}),
    }
