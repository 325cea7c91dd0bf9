"""Infini-attention (2404.07143): attention within a segment, beside a matrix of constant size into which all segments before were added.

For each kv head M [H, H] and z [H] hold the segments before. With s(x) = ELU(x) + 1, of queries and keys that are not rotated:

    recalled = s(q) M / (s(q) z), 0 in the first segment
    out = g recalled + (1 - g) (causal attention within the segment), g the sigmoid of a learned gate for each query head
    at a segment's end, for all its keys and values: M += s(k)^T (v - s(k) M / (s(k) z)), z += sum of s(k)

The "linear" rule leaves the subtraction out. Whole sequences go through a scan over segments, decoding through one token at a time:
it adds each token to a second pair, which is added to the first at the segment's end.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import norm_heads, rotate_and_attend
from selfspan_jax.config import ModelConfig
from selfspan_jax.errors import UserError
from selfspan_jax.neighbours.attending import norms_of


class Memory(NamedTuple):
    """What all kv heads of a layer have kept, in float32."""

    matrix: Float[Array, "B K H H"]
    total: Float[Array, "B K H"]

    @classmethod
    def empty(cls, batch: int, num_kv_heads: int, head_size: int, dtype: Any = jnp.float32) -> Memory:
        """Return a memory of nothing."""
        return cls(jnp.zeros((batch, num_kv_heads, head_size, head_size), dtype), jnp.zeros((batch, num_kv_heads, head_size), dtype))

    def recall(self, q: Float[Array, "B T K G H"]) -> Float[Array, "B T K G H"]:
        """Read the memory by queries; zeros from an empty one."""
        features = _features(q)
        found = jnp.einsum("btkgh,bkhd->btkgd", features, self.matrix)
        weight = jnp.einsum("btkgh,bkh->btkg", features, self.total)[..., None]
        return jnp.where(weight > 0, found / jnp.where(weight > 0, weight, 1), 0)

    def news(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], rule: str, adds: Bool[Array, "B T"]) -> Memory:
        """Compute what the tokens that `adds` add to this memory, each as if it were the first of its segment."""
        features = jnp.where(adds[:, :, None, None], _features(k), 0)
        v = v.astype(features.dtype)
        v = v - self.recall(k[:, :, :, None])[:, :, :, 0] if rule == "delta" else v
        return Memory(jnp.einsum("btkh,btkd->bkhd", features, v), jnp.sum(features, axis=1))

    def only(self, where: Bool[Array, "B"]) -> Memory:
        """Return this where `where` is True, and nothing elsewhere."""
        return self.choose(where, jax.tree.map(jnp.zeros_like, self))

    def choose(self, where: Bool[Array, "B"], other: Memory) -> Memory:
        """Return this where `where` is True, and the other elsewhere."""
        return jax.tree.map(lambda own, other: jnp.where(where.reshape(-1, *[1] * (own.ndim - 1)), own, other), self, other)

    def __add__(self, other: Any) -> Memory:
        return jax.tree.map(jnp.add, self, other)


def _features(x: Array) -> Array:
    return jax.nn.elu(x.astype(_kept_dtype(x))) + 1


def _kept_dtype(x: Array) -> Any:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


class Kept(NamedTuple):
    """A layer's state: the memory of whole segments, and what the tokens of the segment that has not ended will add to it."""

    memory: Memory
    pending: Memory

    def after(self, news: Memory, any_new: Bool[Array, "B"], ends: Bool[Array, "B"]) -> Kept:
        """Add what tokens of one segment add; in sequences where it ends, to the memory."""
        pending = (self.pending + news).choose(any_new, self.pending)
        return Kept(self.memory + pending.only(ends), pending.only(~ends))


def scan_segments(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    rule: str,
    segment_tokens: int,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    kept: Kept | None = None,
) -> tuple[Float[Array, "B T K G H"], Kept]:
    """Read the memory by all queries of whole sequences, segment after segment.

    Args:
      q, k: not rotated.
      segment_ids: sequences packed in one row, told apart by number. The row is cut into segments, wherever a sequence begins; a segment
        adds the tokens of the sequence that goes on after it, to what is kept of that sequence.
      lengths: so many tokens are there, others add nothing. By default all, the last segment filled up.
      kept: the state before; by default nothing.

    Returns: what was recalled, and the state afterwards (of packed rows the memory of the last sequence).
    """
    batch, num_tokens, num_kv_heads, head_size = k.shape
    padding = -num_tokens % segment_tokens

    def segments(x):
        x = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(batch, -1, segment_tokens, *x.shape[2:]).swapaxes(0, 1)

    empty = Memory.empty(batch, num_kv_heads, head_size, _kept_dtype(q))
    before = Kept(empty, empty) if kept is None else kept
    lengths = jnp.full(batch, num_tokens, jnp.int32) if lengths is None else lengths
    is_there = jnp.arange(num_tokens, dtype=jnp.int32)[None] < lengths[:, None]
    ids = segments(jnp.ones((batch, num_tokens), jnp.int32) if segment_ids is None else segment_ids)
    last = jnp.concatenate([ids[:1, :, 0], ids[:, :, -1]])

    def step(kept: Kept, now):
        q, k, v, ids, is_there, earlier, own = now
        recalled = kept.memory.recall(q)
        adds = is_there
        if segment_ids is not None:
            recalled = jnp.where((ids == earlier[:, None])[:, :, None, None, None], recalled, 0)
            kept, adds = Kept(kept.memory.only(own == earlier), kept.pending), adds & (ids == own[:, None])
        ends = jnp.all(is_there, axis=1)
        return kept.after(kept.memory.news(k, v, rule, adds), jnp.any(adds, axis=1), ends), recalled

    after, recalled = jax.lax.scan(step, before, (*map(segments, (q, k, v)), ids, segments(is_there), last[:-1], last[1:]))
    return recalled.swapaxes(0, 1).reshape(batch, -1, *q.shape[2:])[:, :num_tokens], after


class CompressiveMemory(nnx.Module):
    """A layer's gates between its memory and the attention within the segment, and how its memory works."""

    def __init__(self, config: ModelConfig):
        self.gate = nnx.Param(jnp.zeros((config.num_heads,), jnp.float32))
        self.rule, self.segment_tokens = config.attention_memory, config.memory_segment_tokens

    def scan(self, q, k, v, **rows: Any) -> tuple[Float[Array, "B T K G H"], Kept]:
        """Read by all queries of whole sequences, as `scan_segments`."""
        return scan_segments(q, k, v, rule=self.rule, segment_tokens=self.segment_tokens, **rows)

    def mix(self, recalled: Float[Array, "B T K G H"], own: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Weigh what was recalled and what the segment gave."""
        share = jax.nn.sigmoid(self.gate[...].astype(recalled.dtype))[None, None, :, None]
        return (share * recalled.reshape(own.shape) + (1 - share) * own.astype(share.dtype)).astype(own.dtype)


def split_heads(qkv: Float[Array, "B T K G+2 H"], options: dict[str, Any]) -> tuple[Array, dict[str, Any], tuple[Array, Array, Array]]:
    """Normalise the heads where the layer does. Returns: them, the options of attention, and queries, keys and values, not rotated."""
    norms = norms_of(options)
    heads = norm_heads(qkv, **norms)
    return heads, norms, (heads[:, :, :, :-2], heads[:, :, :, -2], heads[:, :, :, -1])


def with_memory(attend: Any, config: ModelConfig, segment_ids: Int[Array, "B T"] | None = None) -> Any:
    """Add the memory to the attention of whole sequences within their segments, where the model has one."""
    if config.mask != "memory":
        return attend

    def attend_both(qkv, options, angles, cache):
        _, norms, parts = split_heads(qkv, options)
        own, cache = attend(qkv, norms, angles, cache)
        return options["memory"].mix(options["memory"].scan(*parts, segment_ids=segment_ids)[0], own), cache

    return attend_both


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegmentSlots:
    """The pool rows of the segment at hand: `slots[b, :counts[b]]`."""

    slots: Int[Array, "B A"]  # A tokens are a segment
    counts: Int[Array, "B"]
    active: Bool[Array, "B"]
    kept: ClassVar[None] = None

    def prepared(self, cache: Any) -> Any:
        """Return the cache, whose layers have their memory already."""
        return cache

    def attend(self, own: Int[Array, "B"], implementation: Any) -> Any:
        """Make the attention of one new token per sequence: write it to slot `own`, read the segment and the memory, and add it there."""

        def attend(qkv, options, angles, layer):
            *pools, kept = layer
            _, norms, (q, k, v) = split_heads(qkv, options)
            arrays = qkv[:, 0], angles[0][:, 0], angles[1][:, 0], own, *pools, self.slots, self.counts
            out, *pools = rotate_and_attend(*arrays, **norms, implementation=implementation)
            out = options["memory"].mix(kept.memory.recall(q), out[:, None])
            news = kept.memory.news(k, v, options["memory"].rule, self.active[:, None])
            ends = self.active & (self.counts == self.slots.shape[1])
            return out.reshape(len(own), 1, -1), (*pools, kept.after(news, self.active, ends))

        return attend


@dataclasses.dataclass(frozen=True)
class SegmentMemory:
    """Attend to the segment, and to the memory of those before: a form of a model's layers, see `ModelConfig.mask`."""

    name: ClassVar[str] = "memory"
    description: ClassVar[str] = "its segment, and a memory of those before (models trained so)"

    def mask(self, token_ids, vocab, views, *, segment_ids=None, first_query=0, num_queries=None):
        """Compute the mask of the attention within segments."""
        check_policy(self.name, views)
        batch, num_tokens = token_ids.shape
        keys = jnp.arange(num_tokens, dtype=jnp.int32)
        queries = first_query + jnp.arange(num_tokens if num_queries is None else num_queries, dtype=jnp.int32)
        same = queries[:, None] // views.memory_segment_tokens == keys[None] // views.memory_segment_tokens
        mask = jnp.broadcast_to((same & (queries[:, None] >= keys[None]))[None], (batch, len(queries), num_tokens))
        if segment_ids is None:
            return mask
        return mask & (jax.lax.dynamic_slice_in_dim(segment_ids, first_query, len(queries), axis=1)[:, :, None] == segment_ids[:, None])

    def prompt_masks(self, token_ids, lengths, vocab, views, *, responses):
        """Raise UserError: of prompts too the mask alone does not say what is read."""
        check_policy(self.name, views)
        raise UserError("attention is 'memory': an engine of such a model is made by make_engine")

    def initial_slots(self, slot_table):
        """Return the rows of a segment, none of them in use."""
        none = jnp.zeros(slot_table.shape[0], jnp.int32)
        return SegmentSlots(slot_table, none, none > 0)

    def step_slots(self, slots, slot_table, *, span, active, **_):
        """Count the tokens of the segment so far."""
        counts = jnp.where(active, (span.num_tokens - 1) % slot_table.shape[1] + 1, 0)
        return dataclasses.replace(slots, counts=counts, active=active)


def check_policy(name: str, config: Any) -> None:
    """Raise UserError for a policy that reads a memory where the layers have none, or the other way round."""
    if (name == "memory") != (config.mask == "memory"):
        allowed = "memory" if config.mask == "memory" else "others, as its layers have no memory"
        raise UserError(f"attention is {name!r}, the model was trained under the mask {config.mask!r}; allowed: {allowed}")
