"""Working sets: which rows of a cache in host memory the device has too, and the attention of a step that reads both.

Headers say which labels a step reads before any body token reads them. So tokens of these labels that have no row on the device get one,
taken from the least recently named labels that are not in use, and the rows are copied within the step.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import SHARES, Copies, HostRows, Wanted, copies_beside, copy_rows, per_sequence, place_rows, rotate_and_attend
from selfspan_jax.attention.policies import AnySlots
from selfspan_jax.decoding.cache import KVCache
from selfspan_jax.model import Attend, Linear
from selfspan_jax.spans import SpanState, SpanVocab

_GATE_UP, _QKV = 2, 4  # of those that copy for a layer's attention: the attention before it, o, gate and up, down, its own QKV


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WorkingSets(KVCache):
    """A cache whose pools are of two places: of each layer keys and values on the device, then keys and values in host memory.

    `slot_table[b, t]` is a row of the device's pools, or -1 - r for row r of the host's. Row w of the working set of sequence b is row
    b * W + w of the device's.
    """

    owner: Int[Array, "B W"]  # the token in each row of the working set, -1 for none
    pinned: Int[Array, "B"]  # so many first rows of it are kept for good
    host_rows: Int[Array, "B A"]  # the row of each token in the host's pools, of a new one when it is written there
    sources: Int[Array, "B W"]  # the first num_copied rows are copied to targets in the step at hand
    targets: Int[Array, "B W"]
    num_copied: Int[Array, "B"]
    on_host: Int[Array, "B"]  # slots in use that are rows in host memory
    copied: Int[Array, "B"]  # rows copied since the prompt, of each layer
    misses: Int[Array, "B"]  # rows read from host memory since then, of each layer
    most_rows: Int[Array, ""] | None  # that a step copies, of all sequences; who misses more waits for the next step. None: no limit

    is_resident: ClassVar[bool] = False

    @staticmethod
    def nothing(sequences: int, width: int) -> dict[str, Any]:
        """Return the fields of working sets with nothing in them, except for `host_rows`."""
        rows, none = jnp.full((sequences, width), -1, jnp.int32), jnp.zeros(sequences, jnp.int32)
        numbers = dict.fromkeys(("pinned", "num_copied", "on_host", "copied", "misses"), none)
        return {"owner": rows, "sources": rows, "targets": rows, **numbers, "most_rows": None}

    def pin(self, tokens: Bool[Array, "B A"], anew: Bool[Array, "B"]) -> Self:
        """Keep these tokens on the device for good, as many as half of a working set has room for, and note what is to be copied.

        Args:
          anew: sequences with nothing in their working sets; the others have no such tokens, and stay as they are.
        """
        sequences, width = self.owner.shape
        sequence = jnp.arange(sequences, dtype=jnp.int32)[:, None]
        row = jnp.cumsum(tokens, axis=1, dtype=jnp.int32) - 1
        tokens &= row < width // 2
        number = jnp.sum(tokens, axis=1, dtype=jnp.int32)
        row, target = jnp.where(tokens, row, width), sequence * width + row
        return dataclasses.replace(
            self,
            slot_table=jnp.where(tokens, target, self.slot_table),
            owner=self.owner.at[sequence, row].set(jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1), mode="drop"),
            sources=self.sources.at[sequence, row].set(self.host_rows, mode="drop"),
            targets=self.targets.at[sequence, row].set(target, mode="drop"),
            num_copied=number,
            pinned=jnp.where(anew, number, self.pinned),
        )

    def fetched(self, state, tokens, active, vocab, implementation=None):
        """Give rows on the device to what headers open and name, before they are fed; `implementation` is that of the choice.

        Returns the cache, the tokens, and which active sequences need not wait for their rows.

        Where `most_rows` are not enough for all, those go first that have named something in their step: others' rows come while they
        write the rest of it. Then those with the shortest responses. A sequence that misses rows takes no token, and draws the same one
        in the next step.
        """
        if state.slots.kept is None:  # a policy that reads whatever is named
            return self, (tokens, active)
        span = state.span
        opened, named = (vocab.label_of(tokens, base) for base in (vocab.seg_base, vocab.ref_base))
        opens, latest = opened >= 0, span.num_tokens - 1
        place = (active & span.in_response & (opens | (named >= 0))).astype(jnp.int32)
        key, since = jnp.where(opens, opened, span.label), jnp.where(opens, span.num_tokens, span.step_index)
        turn = jnp.where(span.is_header & (latest > span.step_index), -1, latest - span.solve_index)
        cache, left = self._placed(span, Wanted(place, span.num_tokens, key, named, since), turn, implementation)
        return cache, (tokens, active & (left == 0))

    def choose_slots(self, step_slots, slots, implementation=None, **now):
        """Compute the slots of the newest tokens, and count those that are rows in host memory; `implementation` is of both."""
        active = now["active"]
        if slots.kept is not None:  # a policy that reads what is named

            def choose(slots, table, now):
                return step_slots(slots, table, **now), None

            slots, _ = per_sequence(choose, slots, self.slot_table, now, implementation=implementation)
        else:
            slots = step_slots(slots, self.slot_table, **now)
        used = jax.lax.broadcasted_iota(jnp.int32, slots.slots.shape, 1) < jnp.where(active, slots.counts, 0)[:, None]
        on_host = jnp.sum(used & (slots.slots < 0), axis=1, dtype=jnp.int32)
        return dataclasses.replace(self, on_host=on_host, misses=self.misses + on_host), slots

    def placed(self, span: SpanState, chosen: Bool[Array, "B"]) -> Self:
        """Choose rows for what the steps of chosen sequences read by label, and note what is to be copied."""
        none = jnp.full_like(span.label, -1)
        return self._placed(span, Wanted(chosen.astype(jnp.int32), span.num_tokens, span.label, none, span.step_index))[0]

    def _placed(self, span, in_use: Wanted, turn=None, implementation: Literal["jax_triton"] | None = None) -> tuple[Self, Array]:
        arrays = self.slot_table, self.owner, span.token_labels, span.last_named, in_use, self.pinned, self.host_rows
        most = None if turn is None else self.most_rows
        found = place_rows(*arrays, most, turn, implementation=implementation)
        return dataclasses.replace(
            self,
            slot_table=found.slot_table,
            owner=found.owner,
            sources=found.sources,
            targets=found.targets,
            num_copied=found.counts,
            copied=self.copied + found.counts,
        ), found.left

    def copies(self, layer: tuple[Array, ...], share: Int[Array, "2"] | None = None) -> Copies:
        """Say which rows that were noted a layer's pools on the device are to get, or a share of them."""
        return Copies(layer[2:], layer[:2], self.sources, self.targets, self.num_copied, share)

    def with_copies(self) -> Self:
        """Copy these rows in all layers, between steps; return the cache that has them."""
        pools = tuple((*copy_rows(*self.copies(layer)), *layer[2:]) for layer in self.pools)
        return dataclasses.replace(self, pools=pools, num_copied=jnp.zeros_like(self.num_copied))

    def attend(self, own, slots: AnySlots, implementation) -> Attend:
        """Make the attention of one new token per sequence; one that takes no token reads nothing."""
        counts = jnp.where(own < self.pools[0][0].shape[0], slots.counts, 0)
        return _Attend(self, own, dataclasses.replace(slots, counts=counts), implementation)


def always_read(span: SpanState, token_ids: Int[Array, "B T"], vocab: SpanVocab) -> Bool[Array, "B A"]:
    """Tell which tokens of prompts every step reads: those of label 0, and where headers read it the table of contents."""
    labels = span.token_labels
    always = labels == 0
    if span.toc is None:
        return always
    opens = jnp.pad(vocab.label_of(token_ids, vocab.seg_base) >= 0, ((0, 0), (0, labels.shape[1] - token_ids.shape[1])))
    return always | ((labels >= 0) & opens)


class _Attend:
    """The attention of one new token per sequence, traced layer by layer. Rows of a layer are copied while the layer before works.

    Of what copies meanwhile, that layer's attention and the maps between the two, each has a share as large as its share of the bytes that
    they read.
    """

    def __init__(self, cache: WorkingSets, own: Array, slots: AnySlots, implementation):
        self.cache, self.own, self.slots, self.implementation = cache, own, slots, implementation
        self.waiting = list(cache.pools)  # of layers that have not attended
        self.cuts: list[Array] = []  # where the share of each begins, and where the last one's ends
        self.next, self.begins = _QKV, 0  # whose turn it is, and with whose share begins what nobody has copied
        self.last = _QKV  # that copies

    def __call__(self, qkv, options, angles, _):
        layer, ahead = self.waiting.pop(0), options.get("ahead", ())
        if self.begins <= self.last:
            copying = "jax_triton" if self.implementation == "jax_triton" else None  # the attention may be one that copies have not
            layer = (*copy_rows(*self.cache.copies(layer, self._share(self.last)), implementation=copying), *layer[2:])
        if ahead and not self.cuts:
            self._divide(qkv, layer[0], ahead)
        k_pool, v_pool, *host = layer
        arrays = (qkv[:, 0], angles[0][:, 0], angles[1][:, 0], self.own, k_pool, v_pool, self.slots.slots, self.slots.counts)
        options = options | {"split": True, "sparse": self.slots.kept is not None, "host": HostRows(*host, self.cache.on_host)}
        self.next = self.begins = 0
        copies = self._copies(bool(self.cuts))
        out, k_pool, v_pool, *copied = rotate_and_attend(*arrays, **options, copies=copies, implementation=self.implementation)
        self._put(*copied)
        return out.reshape(len(self.own), 1, -1), (k_pool, v_pool, *host)

    def beside(self, linear, x, **options):
        """Apply a linear map, and meanwhile copy a share of what the next layer reads."""
        able = isinstance(linear, Linear) and linear.tensor_parallel is None  # and not one with an adapter
        norm, implementation = options.get("norm"), options["implementation"]
        if able:
            asked = {"norm": None if norm is None else norm.scale[...], "implementation": implementation}
            able = copies_beside(x, linear.weight[...], gated=options.get("gated", False), **asked)
        if (copies := self._copies(able)) is None:
            return linear(x, **options)
        out, pools = linear(x, copies=copies, **options)
        self._put(pools)
        return out

    def _divide(self, qkv: Array, pool: Array, ahead: list[Array]) -> None:
        """Choose shares, once for all layers; none where no map copies."""
        rows = [jax.ShapeDtypeStruct((qkv.shape[0], weight.shape[1]), qkv.dtype) for weight in ahead]
        able = [copies_beside(x, weight, gated=number == _GATE_UP) for number, (x, weight) in enumerate(zip(rows, ahead), 1)]
        if not any(able):
            return
        self.last = max(number for number, copies in enumerate(able, 1) if copies)
        attended = jnp.sum(self.slots.counts).astype(jnp.float32) * (2 * pool.shape[1] * pool.shape[2] * pool.dtype.itemsize)
        sizes = [jnp.float32(copies * weight.size * weight.dtype.itemsize) for copies, weight in zip(able, ahead)]
        ends = jnp.cumsum(jnp.stack([attended, *sizes]))
        self.cuts = [jnp.int32(0), *(ends / ends[-1] * SHARES).astype(jnp.int32)[: self.last], jnp.int32(SHARES)]

    def _copies(self, able: bool) -> Copies | None:
        """Return the share of whose turn it is, with what nobody has copied before it; None where it does not copy."""
        number, self.next = self.next, self.next + 1
        if not (able and self.waiting and number <= self.last):
            return None
        share, self.begins = self._share(number), number + 1
        return self.cache.copies(self.waiting[0], share)

    def _share(self, number: int) -> Array | None:
        return jnp.stack([self.cuts[self.begins], self.cuts[number + 1]]) if self.cuts else None

    def _put(self, *pools) -> None:
        for own in pools:
            self.waiting[0] = (*own, *self.waiting[0][2:])
