"""The span protocol: the tokens themselves say which earlier tokens a token attends to.

Defined once, implemented twice: `attention_mask` for whole sequences (training, prefill) and `SpanState` for one token at a
time (decoding). They agree token for token, with each other and with the reference automaton of the tests.

The automaton, per sequence; each token first updates the state, then its query attends under the updated state:

    label = 0; named = {}; in_response = False
    first <solve>       -> in_response = True; label = 0; named = {}
    <seg:k>             -> label = k; in a response also named = {}
    <ref:k>, response   -> named |= {k}
    after <eos>         -> nothing changes any more

A token carries the label after its own update. A response token attends to the tokens up to itself that carry label 0, its
own label or a named one; header tokens (`<seg>` and `<ref>` of a response) may attend to more (`header_view`): every `<seg>` token,
the table of contents ("labels"), the whole prompt, or all.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.slots import Rule, write_elements
from selfspan_jax.errors import UserError

HeaderView = Literal["span", "labels", "prompt", "all"]
PromptView = Literal["causal", "local"]


@dataclasses.dataclass(frozen=True)
class SpanVocab:
    """Ids of the structural tokens: `<seg:k>` is `seg_base + k`, `<ref:k>` is `ref_base + k`, for labels k in [0, num_labels)."""

    pad_id: int
    bos_id: int
    eos_id: int
    solve_id: int
    seg_base: int
    ref_base: int
    num_labels: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) < 0:
                raise UserError(f"SpanVocab: {field.name} is {value}; ids and sizes are not negative")
        if self.num_labels < 2:
            raise UserError(f"SpanVocab: num_labels is {self.num_labels}; at least 2 are needed, label 0 being the sink")
        labels = range(self.num_labels)
        distinct = {self.pad_id, self.bos_id, self.eos_id, self.solve_id, *map(self.seg_id, labels), *map(self.ref_id, labels)}
        if len(distinct) != 4 + 2 * self.num_labels:
            raise UserError(f"SpanVocab: ids overlap: {self}")

    @classmethod
    def consecutive(cls, first: int, num_labels: int) -> SpanVocab:
        """Number ids from `first` on: `<pad> <bos> <eos> <solve>`, then both label families."""
        return cls(first, first + 1, first + 2, first + 3, seg_base=first + 4, ref_base=first + 4 + num_labels, num_labels=num_labels)

    @property
    def min_vocab_size(self) -> int:
        """The smallest vocabulary that holds all structural ids: the highest of them plus one."""
        return 1 + max(self.pad_id, self.bos_id, self.eos_id, self.solve_id, max(self.seg_base, self.ref_base) + self.num_labels - 1)

    def seg_id(self, label: int) -> int:
        """Return the id of `<seg:label>`."""
        return self._in_family(self.seg_base, label)

    def ref_id(self, label: int) -> int:
        """Return the id of `<ref:label>`."""
        return self._in_family(self.ref_base, label)

    def _in_family(self, base: int, label: int) -> int:
        if not 0 <= label < self.num_labels:
            raise UserError(f"label {label} is outside 0..{self.num_labels - 1}")
        return base + label

    def label_of(self, token_ids: Int[Array | np.ndarray, "..."], base: int) -> Int[Array, "..."]:
        """Return the label k where a token is `base + k`, -1 where it is outside that family."""
        label = token_ids - base
        return token_ids.__array_namespace__().where((label >= 0) & (label < self.num_labels), label, -1)


def check_views(header_view: str, prompt_view: str, prompt_window_tokens: int) -> None:
    """Raise UserError for a view that does not exist."""
    for name, view, views in (("header_view", header_view, HeaderView), ("prompt_view", prompt_view, PromptView)):
        if view not in get_args(views):
            raise UserError(f"{name} is {view!r}; allowed: {', '.join(get_args(views))}")
    if prompt_window_tokens < 1:
        raise UserError(f"prompt_window_tokens is {prompt_window_tokens}; at least 1 is needed, the token itself")


class TokenRoles(NamedTuple):
    """The automaton's view of each token of whole sequences; every field is [..., T]."""

    labels: Int[Array, "... T"]  # label that the token carries
    is_seg: Bool[Array, "... T"]  # a <seg>, wherever it stands
    is_response: Bool[Array, "... T"]  # after the first <solve>
    is_header: Bool[Array, "... T"]  # a <seg> or <ref> of the response
    in_response: Bool[Array, "... T"]  # the automaton's flag after this token: also true of the first <solve>
    ended: Bool[Array, "... T"]  # <eos> has been read
    solve_index: Int[Array, "... T"]  # index of the last <solve> that began a response, -1 before it
    step_index: Int[Array, "... T"]  # index of the token that opened the current step
    names: Int[Array, "... T"]  # the label that this token adds to the span, -1 for none
    segment_start: Int[Array, "... T"]  # index of the first token of the sequence


def token_roles(
    token_ids: Int[Array | np.ndarray, "... T"], vocab: SpanVocab, segment_ids: Int[Array, "... T"] | None = None
) -> TokenRoles:
    """Run the automaton over whole sequences, all tokens in parallel; of numpy arrays on the host, in numpy.

    Args:
      segment_ids: different numbers for sequences packed in one row; the automaton restarts at each.
    """
    axis, xp = token_ids.ndim - 1, token_ids.__array_namespace__()
    index = xp.broadcast_to(xp.arange(token_ids.shape[-1], dtype=xp.int32), token_ids.shape)
    cummax = jax.lax.cummax if isinstance(token_ids, jax.Array) else np.maximum.accumulate

    def last(event):  # index of the last event at or before each token, -1 before the first
        return cummax(xp.where(event, index, -1), axis=axis)

    first = index == 0
    if segment_ids is not None:
        first |= segment_ids != xp.roll(segment_ids, 1, axis=axis)
    segment_start = last(first)
    ended = last(token_ids == vocab.eos_id) >= segment_start
    active = ~ended  # <eos> itself changes no label, so that it may count as ended already

    opened, referred = (vocab.label_of(token_ids, base) for base in (vocab.seg_base, vocab.ref_base))
    opens = xp.where(active, opened, -1)
    solves = active & (token_ids == vocab.solve_id)
    last_solve = last(solves)
    in_response = last_solve >= segment_start
    previous_solve = xp.where(first, -1, xp.roll(last_solve, 1, axis=axis))
    first_solve = solves & (previous_solve < segment_start)
    names = xp.where(active & in_response, referred, -1)
    labels = xp.take_along_axis(xp.maximum(opens, 0), last(first | first_solve | (opens >= 0)), axis=axis)
    is_response = in_response & ~first_solve
    solve_index = last(first_solve)
    return TokenRoles(
        labels=labels,
        is_seg=opened >= 0,
        is_response=is_response,
        is_header=is_response & ((opened >= 0) | (referred >= 0)),
        in_response=in_response,
        ended=ended,
        solve_index=xp.where(solve_index >= segment_start, solve_index, -1),
        step_index=last(first_solve | (in_response & (opens >= 0))),
        names=names,
        segment_start=segment_start,
    )


def attention_mask(
    token_ids: Int[Array, "... T"],
    vocab: SpanVocab,
    *,
    header_view: HeaderView = "span",
    prompt_view: PromptView = "causal",
    prompt_window_tokens: int = 16,
    segment_ids: Int[Array, "... T"] | None = None,
    first_query: int | Int[Array, ""] = 0,
    num_queries: int | None = None,
) -> Bool[Array, "... Q T"]:
    """Compute the mask of training and prefill: `[..., t, s]` is True where token t may attend to token s.

    Args:
      token_ids: any integers; malformed sequences are never an error.
      vocab: the structural ids.
      header_view: what `<seg>` and `<ref>` tokens of a response attend to: the same as others ("span"), also every `<seg>`
        token ("labels"), also the whole prompt ("prompt"), or everything before ("all").
      prompt_view: what prompt tokens attend to: everything before ("causal"), or their own label, the sink and the last
        `prompt_window_tokens` tokens ("local").
      segment_ids: different numbers for sequences packed in one row; none attends to another.
      first_query, num_queries: compute these Q rows of the mask only; all T by default.

    Raises: UserError for an unknown view.
    """
    check_views(header_view, prompt_view, prompt_window_tokens)
    roles = token_roles(token_ids, vocab, segment_ids)
    whole = num_queries is None
    index = jax.lax.broadcasted_iota(jnp.int32, token_ids.shape, token_ids.ndim - 1)

    def query(x):  # [..., T] -> [..., Q, 1]
        return (x if whole else jax.lax.dynamic_slice_in_dim(x, first_query, num_queries, axis=-1))[..., :, None]

    def key(x):  # [..., T] -> [..., 1, T]
        return x[..., None, :]

    distance = query(index) - key(index)
    own = (key(roles.labels) == 0) | (key(roles.labels) == query(roles.labels))
    # The last token at or before t that names the label of s; it counts when the step of t had begun by then.
    naming = jnp.where(query(roles.names) == key(roles.labels), query(index), -1)
    last_naming = jax.lax.cummax(naming, axis=naming.ndim - 2)
    if not whole:
        last_naming = jnp.maximum(last_naming, key(_last_naming_before(first_query, roles, vocab)))
    named = last_naming >= query(roles.step_index)
    nothing, everything = jnp.zeros_like(own), jnp.ones_like(own)
    wider = {"span": nothing, "labels": key(roles.is_seg), "prompt": key(index) <= query(roles.solve_index), "all": everything}
    response = own | named | (query(roles.is_header) & wider[header_view])
    prompt = own | (distance < prompt_window_tokens) if prompt_view == "local" else everything
    causal = (distance >= 0) & (key(roles.segment_start) == query(roles.segment_start))
    return causal & jnp.where(query(roles.is_response), response, prompt)


def _last_naming_before(first_query: int | Int[Array, ""], roles: TokenRoles, vocab: SpanVocab) -> Int[Array, "... T"]:
    """Find for each token the last token before `first_query` that names its label; -1 where there is none."""
    names, labels = (x.reshape(-1, x.shape[-1]) for x in (roles.names, roles.labels))
    before = jax.lax.broadcasted_iota(jnp.int32, names.shape, 1) < first_query
    return jnp.take_along_axis(_last_naming(jnp.where(before, names, -1), vocab), labels, axis=1).reshape(roles.labels.shape)


def _last_naming(names: Int[Array, "B T"], vocab: SpanVocab) -> Int[Array, "B L"]:
    """Find the last token that names each label; -1 where there is none."""
    row, index = (jax.lax.broadcasted_iota(jnp.int32, names.shape, axis) for axis in (0, 1))
    nothing = jnp.full((names.shape[0], vocab.num_labels), -1, jnp.int32)
    return nothing.at[row, jnp.where(names < 0, vocab.num_labels, names)].max(index, mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpanState:
    """The automaton of B sequences during decoding, with a capacity of A tokens each."""

    label: Int[Array, "B"]
    last_named: Int[Array, "B L"]  # index of the last token that named each label, -1 for none: the step names it from its start on
    step_index: Int[Array, "B"]  # index of the token that opened the step, -1 before the first <solve>
    in_response: Bool[Array, "B"]
    ended: Bool[Array, "B"]
    solve_index: Int[Array, "B"]  # index of the first <solve>, -1 before it
    token_labels: Int[Array, "B A"]  # label that token s of sequence b carries, -1 where there is no token yet
    num_tokens: Int[Array, "B"]
    num_segs: Int[Array, "B"]
    toc: Int[Array, "B A"] | None  # for "labels" the table of contents: the first num_segs are the indices of the <seg> tokens
    # of the latest token
    is_response: Bool[Array, "B"]
    is_header: Bool[Array, "B"]

    @classmethod
    def of_prefix(
        cls, token_ids: Int[Array, "B T"], lengths: Int[Array, "B"], vocab: SpanVocab, capacity: int, header_view: HeaderView
    ) -> SpanState:
        """Compute the state after the first `lengths[b]` tokens of each row, from 0 tokens on; the rest of a row is ignored."""
        batch, num_tokens = token_ids.shape
        index = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), token_ids.shape)
        inside = index < lengths[:, None]
        roles = token_roles(token_ids, vocab)
        empty, at = lengths == 0, jnp.maximum(lengths - 1, 0)[:, None]

        def latest(x, before_first):
            return jnp.where(empty, before_first, jnp.take_along_axis(x, at, axis=1)[:, 0])

        row = jnp.arange(batch, dtype=jnp.int32)[:, None]
        is_seg = inside & roles.is_seg
        place = jnp.where(is_seg, jnp.cumsum(is_seg, axis=1, dtype=jnp.int32) - 1, capacity)
        toc = jnp.zeros((batch, capacity), jnp.int32).at[row, place].set(index, mode="drop") if header_view == "labels" else None
        return cls(
            label=latest(roles.labels, 0),
            last_named=_last_naming(jnp.where(inside, roles.names, -1), vocab),
            step_index=latest(roles.step_index, -1),
            in_response=latest(roles.in_response, False),
            ended=latest(roles.ended, False),
            solve_index=latest(roles.solve_index, -1),
            token_labels=jnp.pad(jnp.where(inside, roles.labels, -1), ((0, 0), (0, capacity - num_tokens)), constant_values=-1),
            num_tokens=lengths,
            num_segs=jnp.sum(is_seg, axis=1, dtype=jnp.int32),
            toc=toc,
            is_response=latest(roles.is_response, False),
            is_header=latest(roles.is_header, False),
        )

    def advance(self, tokens: Int[Array, "B"], vocab: SpanVocab, active: Bool[Array, "B"]) -> SpanState:
        """Compute the state after one more token in every active sequence; nothing changes in the others."""
        ended = self.ended | (active & (tokens == vocab.eos_id))
        alive = active & ~ended  # <eos> itself changes nothing else
        opened, referred = (vocab.label_of(tokens, base) for base in (vocab.seg_base, vocab.ref_base))
        opens, is_seg = jnp.where(alive, opened, -1), active & (opened >= 0)
        first_solve = alive & (tokens == vocab.solve_id) & ~self.in_response
        in_response = self.in_response | first_solve
        label = jnp.where(first_solve, 0, jnp.where(opens >= 0, opens, self.label))
        is_response = jnp.where(active, in_response & ~first_solve, self.is_response)
        num_tokens = self.num_tokens + active.astype(jnp.int32)
        index = num_tokens - 1  # of the token. Each field is read once, so that it is updated in place
        written = [(self.token_labels, jnp.where(active, index, -1), label)]
        written.append((self.last_named, jnp.where(alive & in_response, referred, -1), index))
        num_segs = self.num_segs + is_seg.astype(jnp.int32)
        written += [] if self.toc is None else [(self.toc, jnp.where(is_seg, num_segs - 1, -1), index)]
        token_labels, last_named, *toc = write_elements(*zip(*written))
        return dataclasses.replace(
            self,
            token_labels=token_labels,
            last_named=last_named,
            toc=toc[0] if toc else None,
            label=label,
            step_index=jnp.where(first_solve | (in_response & (opens >= 0)), index, self.step_index),
            in_response=in_response,
            ended=ended,
            solve_index=jnp.where(first_solve, index, self.solve_index),
            num_tokens=num_tokens,
            num_segs=num_segs,
            is_response=is_response,
            is_header=jnp.where(active, is_response & (is_seg | (referred >= 0)), self.is_header),
        )

    def rule(
        self, first: Int[Array, "B"], keep: Bool[Array, "B"], *, header_view: HeaderView, prompt_view: PromptView, prompt_window_tokens: int
    ) -> Rule:
        """Say in integers which tokens the latest token of each sequence attends to; arguments as the fields of `pallas_kernels.Rule`."""
        end, zero = self.num_tokens, jnp.zeros_like(self.num_tokens)
        wider = {"all": end, "prompt": self.solve_index + 1}.get(header_view, zero)
        below, start = (zero, end - prompt_window_tokens) if prompt_view == "local" else (end, end)  # of a prompt's tokens
        return Rule(
            end=end,
            first=first,
            key=self.label,
            since=jnp.where(self.is_response, self.step_index, jnp.iinfo(jnp.int32).max),
            below=jnp.where(self.is_response, jnp.where(self.is_header, wider, zero), below),
            start=jnp.where(self.is_response, end, start),
            num_entries=jnp.where(self.is_header, self.num_segs, zero),
            keep=keep.astype(jnp.int32),
        )
