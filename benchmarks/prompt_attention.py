"""Time the attention of prompts against the peak of the matrix units, and against cuDNN.

    python -m benchmarks.prompt_attention --json FILE     a table of docs/prefill-figures.md

What is timed: chains of dependent calls inside one compiled program, the output of a call being the query of the next. Microseconds
are wall time per call, launches included, nothing subtracted; lists of tiles are made beforehand, as once for all layers of a model.
Operations are 4 x N x H for each pair that the mask allows: what is computed and then cut off counts as time only. Beside the
kernels stand cuDNN (`jax.nn.dot_product_attention`), which is given local masks as arrays of booleans, and the JAX reference. The
error is the RMS of the difference to float32, relative to the RMS of what was expected, over 64 queries of each prompt.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.prefill import causal_pairs, count_pairs, without_tiles
from benchmarks.shapes import PROMPT_SHAPES, PromptShape
from benchmarks.span_decode import chain_us
from benchmarks.timing import KernelReport
from benchmarks.workloads import arithmetic_prompts, prompt_operators
from data import arithmetic, commandline
from data.vocab import Vocab
from pallas_kernels import PromptMask, prompt_attention
from pallas_kernels.prompt_attention import unsupported_reason
from pallas_kernels.sequence_attention.reference import reference_attention
from selfspan_jax.attention.policies import get_policy
from selfspan_jax.config import AttentionViews
from selfspan_jax.parallel.memory import catch_out_of_memory
from selfspan_jax.spans import SpanVocab
from selfspan_jax.training.metrics import bf16_peak

IMPLEMENTATIONS = ("mosaic", "triton", "cudnn", "reference")
Dtype = Literal["bfloat16", "float16"]
ROUNDS = 2  # calls in a chain, each of which takes milliseconds
_CHUNKS, _CHUNK_QUERIES = 4, 16  # of each prompt, whose errors are measured
Attend = Callable[..., jax.Array]


@dataclasses.dataclass
class Workload:
    """Arrays on the device, and how many pairs the mask allows."""

    shape: PromptShape
    q: jax.Array  # [B, T, N, H]
    pools: tuple[jax.Array, jax.Array]  # [B * S, K, H]
    mask: PromptMask
    num_pairs: int

    @classmethod
    def make(cls, shape: PromptShape, seed: int, dtype: Dtype = "bfloat16") -> Workload:
        keys = jax.random.split(jax.random.key(seed), 3)
        draw = functools.partial(jax.random.normal, dtype=dtype)
        pool_shape = (shape.batch_size * shape.num_keys, shape.num_kv_heads, shape.head_size)
        q = draw(keys[0], (shape.batch_size, shape.num_queries, shape.num_heads, shape.head_size))
        mask = jax.block_until_ready(make_mask(shape, seed))
        pairs = count_pairs(mask) - shape.batch_size * causal_pairs([shape.first_query])
        return cls(shape, q, (draw(keys[1], pool_shape), draw(keys[2], pool_shape)), mask, pairs)

    @property
    def flops(self) -> int:
        return 4 * self.shape.num_heads * self.shape.head_size * self.num_pairs

    @property
    def caches(self) -> list[jax.Array]:
        """Keys and values [B, S, K, H]."""
        batch, num_keys = self.shape.batch_size, self.shape.num_keys
        return [pool.reshape(batch, num_keys, *pool.shape[1:]) for pool in self.pools]


def make_mask(shape: PromptShape, seed: int) -> PromptMask:
    """Make the mask of a shape; local ones are of expressions that have about as many tokens as there is room for."""
    lengths = np.full(shape.batch_size, shape.num_keys, np.int32)
    if shape.mask == "causal":
        return PromptMask.causal(shape.first_query, jnp.asarray(lengths), num_keys=shape.num_keys)
    task = arithmetic.ArithmeticTask(vocab=Vocab(prompt_operators(shape.num_keys) + 1))
    token_ids = np.zeros((shape.batch_size, shape.num_keys), np.int32)
    if shape.mask == "local":
        token_ids, lengths = arithmetic_prompts(task, batch_size=shape.batch_size, num_tokens=shape.num_keys, seed=seed)
    policy = get_policy("window" if shape.mask == "window" else "span")

    @jax.jit
    def make(token_ids, lengths):
        masks = policy.prompt_masks(token_ids, lengths, SpanVocab(**task.vocab.span_ids()), AttentionViews(), responses=False)
        assert masks is not None
        return masks(jnp.int32(0), shape.num_queries)

    return make(jnp.asarray(token_ids), jnp.asarray(lengths))


def chunks(workload: Workload) -> Iterator[tuple[int, PromptMask]]:
    """Yield where some chunks of queries begin, the last one at the end of the shortest prompt, and their masks."""
    mask, first = without_tiles(workload.mask), workload.shape.first_query
    last = int(mask.lengths.min()) - first - _CHUNK_QUERIES
    for start in np.linspace(0, last, _CHUNKS).astype(int).tolist():
        labels = None if mask.query_labels is None else mask.query_labels[:, start : start + _CHUNK_QUERIES]
        yield start, dataclasses.replace(mask, first_query=jnp.int32(first + start), query_labels=labels)


@functools.partial(jax.jit, static_argnames=("scale",))
def _exact(q: jax.Array, k: jax.Array, v: jax.Array, mask: PromptMask, scale: float) -> jax.Array:
    return reference_attention(q.astype(jnp.float32), k, v, mask.pairs(q.shape[1]), scale=scale)


def error(workload: Workload, out: jax.Array) -> float:
    """Compute the relative RMS of the error of an output, over some chunks of queries."""
    found, expected = [], []
    for start, mask in chunks(workload):
        rows = slice(start, start + _CHUNK_QUERIES)
        found.append(out[:, rows])
        expected.append(_exact(workload.q[:, rows], *workload.caches, mask, scale=workload.shape.head_size**-0.5))
    return timing.relative_error(jnp.concatenate(found), jnp.concatenate(expected))


def attend_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, pairs: jax.Array | None) -> jax.Array:
    """Attend by cuDNN to keys `[B, S, K, H]`, under a causal mask or bool `[B, 1, T, S]`."""
    return jax.nn.dot_product_attention(q, k, v, mask=pairs, is_causal=pairs is None, implementation="cudnn")


def all_pairs(workload: Workload) -> jax.Array:
    """Make the bool [B, 1, T, S] of pairs that the mask allows."""
    shape = workload.shape
    make = jax.jit(lambda mask: mask.pairs(shape.num_queries).reshape(shape.batch_size, 1, shape.num_queries, shape.num_keys))
    return make(without_tiles(workload.mask))


def prepare(name: str, workload: Workload) -> tuple[Attend, Any, Any]:
    """Return an implementation as a function of queries, keys, values and one more argument; the keys and values, and that argument.

    Raises: NotImplementedError for what it cannot compute.
    """
    if name == "cudnn":
        if workload.shape.first_query:
            raise NotImplementedError("its causal mask has no offset")
        return attend_cudnn, workload.caches, None if workload.shape.mask == "causal" else all_pairs(workload)
    if reason := unsupported_reason(name, workload.q, workload.pools[0], workload.mask):
        raise NotImplementedError(reason)
    return functools.partial(prompt_attention, implementation=name), workload.pools, workload.mask


def run_shape(shape: PromptShape, implementations: Sequence[str], report: KernelReport, seed: int, dtype: Dtype) -> None:
    """Time the implementations on a shape; one that cannot compute it, or does not fit, gets a row that says so."""
    workload, peak = Workload.make(shape, seed, dtype), bf16_peak(jax.devices()[0].device_kind)
    for name in implementations:
        row: dict[str, Any] = {"shape": shape.name, "implementation": name, "allowed_pairs": workload.num_pairs, "flops": workload.flops}
        label = f"{shape.name:18} {name:10}"
        try:
            with catch_out_of_memory():
                attend, keys_and_values, more = prepare(name, workload)
                row["relative_error"] = error(workload, jax.jit(attend)(workload.q, *keys_and_values, more))
                microseconds, spread = chain_us(attend, workload.q, keys_and_values, [(more,)], rounds=ROUNDS)
        except (RuntimeError, NotImplementedError, ValueError) as reason:
            report.not_run(label, reason)
            report.content["cases"].append(row | {"not_run": str(reason).splitlines()[0][:200]})
            continue
        per_second = 1e6 * workload.flops / microseconds
        row |= {"microseconds": microseconds, "spread_microseconds": spread, "flops_per_second": per_second}
        row["percent_of_peak"] = None if peak is None else 100 * per_second / peak
        report.content["cases"].append(row)
        of_peak = "" if peak is None else f"{row['percent_of_peak']:5.0f}% of the bf16 peak"
        print(f"{label} {microseconds:10.1f} us {per_second / 1e12:7.1f} TFLOP/s{of_peak}, error {row['relative_error']:.1e}", flush=True)


BY_NAME = {shape.name: shape for shape in PROMPT_SHAPES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptAttention(timing.KernelCommand):
    """Time the attention of prompts against the peak of the matrix units, and against cuDNN."""

    shapes: Annotated[tuple[str, ...], commandline.commas(*BY_NAME)] = (*BY_NAME,)
    """Problems."""
    implementations: Annotated[tuple[str, ...], commandline.commas(*IMPLEMENTATIONS)] = IMPLEMENTATIONS
    """Of ours, and cuDNN."""
    dtype: Dtype = "bfloat16"
    """Of queries, keys and values; both have the same peak."""

    def run(self) -> None:
        shapes = [BY_NAME[name] for name in self.shapes]
        with self.report(dtype=self.dtype, shapes=list(map(dataclasses.asdict, shapes))) as report:
            for shape in shapes:
                run_shape(shape, self.implementations, report, self.seed, self.dtype)
                report.save()


def main(arguments: list[str] | None = None) -> None:
    timing.run_command(PromptAttention, arguments)


if __name__ == "__main__":
    main()
