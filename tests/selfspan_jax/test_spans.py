"""The training mask and the decode state against the reference automaton (invariant 1), and the mask's own edge cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfspan_jax import spans
from selfspan_jax.attention.policies import Span
from selfspan_jax.config import AttentionViews
from selfspan_jax.spans import SpanState, SpanVocab
from tests.selfspan_jax.reference import Reference
from tests.selfspan_jax.streams import NAMED, VIEWS, VOCAB, streams

LENGTH, BATCH = 14, 3
VIEW_IDS = ["-".join(map(str, views.values())) for views in VIEWS]

jit_mask = jax.jit(spans.attention_mask, static_argnames=("vocab", "header_view", "prompt_view", "prompt_window_tokens", "num_queries"))
jit_advance = jax.jit(lambda state, tokens: state.advance(tokens, VOCAB, jnp.ones(tokens.shape, bool)))
jit_of_prefix = jax.jit(lambda token_ids, lengths: SpanState.of_prefix(token_ids, lengths, VOCAB, LENGTH, "labels"))


def empty_state(batch, capacity, header_view="labels"):
    return SpanState.of_prefix(jnp.zeros((batch, 1), jnp.int32), jnp.zeros(batch, jnp.int32), VOCAB, capacity, header_view)


@functools.partial(jax.jit, static_argnames="views")
def jit_slots(slots, table, state, views):
    return Span().step_slots(slots, table, span=state, active=jnp.ones(table.shape[0], bool), views=views)


def read(slots, state, views):
    """Slots after the latest tokens, token t in slot t, and which tokens they are: none is listed twice."""
    table = jnp.broadcast_to(jnp.arange(state.token_labels.shape[1], dtype=jnp.int32), state.token_labels.shape)
    slots = jit_slots(Span().initial_slots(table) if slots is None else slots, table, state, AttentionViews(**views))
    visible = np.zeros(table.shape, int)
    for b, count in enumerate(np.asarray(slots.counts)):
        np.add.at(visible[b], np.asarray(slots.slots)[b, :count], 1)
    return slots, visible


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("views", VIEWS, ids=VIEW_IDS)
def test_mask_is_the_reference_on_named_streams(name, views):
    token_ids, reason = NAMED[name]
    token_ids = token_ids + [VOCAB.pad_id] * (26 - len(token_ids))  # one length, one compilation
    mask = jit_mask(jnp.array(token_ids, jnp.int32), VOCAB, **views)
    np.testing.assert_array_equal(mask, Reference(token_ids, VOCAB, **views).mask(), err_msg=reason)


@given(batch=st.lists(streams(LENGTH), min_size=BATCH, max_size=BATCH), views=st.sampled_from(VIEWS))
@settings(max_examples=150)
def test_mask_and_decode_state_are_the_reference_on_any_stream(batch, views):
    token_ids = jnp.array(batch, jnp.int32)
    references = [Reference(row, VOCAB, **views) for row in batch]
    expected = np.array([reference.mask() for reference in references])
    np.testing.assert_array_equal(jit_mask(token_ids, VOCAB, **views), expected)

    state, slots = empty_state(BATCH, LENGTH, views["header_view"]), None
    for t in range(LENGTH):
        state = jit_advance(state, token_ids[:, t])
        slots, visible = read(slots, state, views)
        np.testing.assert_array_equal(visible, expected[:, t], err_msg=f"token {t}")
    np.testing.assert_array_equal(state.token_labels, [reference.carries for reference in references])


@given(
    batch=st.lists(streams(LENGTH), min_size=BATCH, max_size=BATCH),
    views=st.sampled_from(VIEWS),
    num_queries=st.sampled_from([1, 5, LENGTH]),
    data=st.data(),
)
@settings(max_examples=60)
def test_rows_of_a_mask_are_rows_of_the_whole(batch, views, num_queries, data):
    first_query = data.draw(st.integers(0, LENGTH - num_queries))
    token_ids = jnp.array(batch, jnp.int32)
    rows = jit_mask(token_ids, VOCAB, **views, first_query=jnp.int32(first_query), num_queries=num_queries)
    whole = np.array([Reference(row, VOCAB, **views).mask() for row in batch])
    np.testing.assert_array_equal(rows, whole[:, first_query : first_query + num_queries])


@given(
    batch=st.lists(streams(LENGTH), min_size=BATCH, max_size=BATCH),
    lengths=st.lists(st.integers(0, LENGTH), min_size=BATCH, max_size=BATCH),
)
@settings(max_examples=60)
def test_state_of_a_prefix_is_the_state_after_its_tokens(batch, lengths):
    token_ids = jnp.array(batch, jnp.int32)
    summary = jax.tree.map(np.asarray, jit_of_prefix(token_ids, jnp.array(lengths, jnp.int32)))
    state = empty_state(BATCH, LENGTH)
    for t in range(LENGTH + 1):
        for field, stepped in vars(jax.tree.map(np.asarray, state)).items():
            for b in np.flatnonzero(np.array(lengths) == t):
                np.testing.assert_array_equal(getattr(summary, field)[b], stepped[b], err_msg=field)
        if t < LENGTH:
            state = jit_advance(state, token_ids[:, t])


@given(parts=st.lists(streams(5), min_size=3, max_size=3), views=st.sampled_from(VIEWS))
@settings(max_examples=60)
def test_packed_sequences_are_as_if_alone(parts, views):
    segment_ids = np.repeat([1, 2, 3], 5)
    packed = jit_mask(jnp.array(sum(parts, []), jnp.int32), VOCAB, **views, segment_ids=jnp.array(segment_ids, jnp.int32))
    expected = np.zeros((15, 15), bool)
    for i, part in enumerate(parts):
        expected[5 * i : 5 * i + 5, 5 * i : 5 * i + 5] = Reference(part, VOCAB, **views).mask()
    np.testing.assert_array_equal(packed, expected)


def test_mask_takes_any_leading_axes_under_jit():
    token_ids = np.array(NAMED["specification"][0], np.int32)
    single = spans.attention_mask(jnp.array(token_ids), VOCAB)
    assert single.shape == (26, 26) and single.dtype == bool
    stacked = jit_mask(jnp.broadcast_to(jnp.array(token_ids), (2, 3, 26)), VOCAB)
    assert stacked.shape == (2, 3, 26, 26)
    np.testing.assert_array_equal(stacked[1, 2], single)


def test_labels_that_no_family_has_are_text():
    vocab = SpanVocab(pad_id=0, bos_id=1, eos_id=2, solve_id=3, seg_base=4, ref_base=6, num_labels=2)
    token_ids = [1, 5, 8, 9, 3, 5, 7, 100, 2]  # 8 and above are text: ref_base + num_labels
    mask = spans.attention_mask(jnp.array(token_ids, jnp.int32), vocab)
    np.testing.assert_array_equal(mask, Reference(token_ids, vocab).mask())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_labels=1), "num_labels is 1; at least 2"),
        (dict(pad_id=-1), "pad_id is -1"),
        (dict(seg_base=12), "overlap"),
        (dict(eos_id=3), "overlap"),
        (dict(solve_id=16), "overlap"),
    ],
)
def test_vocabularies_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SpanVocab(**{**vars(VOCAB), **changes})


def test_vocabulary_builds_ids_of_labels():
    assert (VOCAB.seg_id(4), VOCAB.ref_id(0)) == (14, 15)
    with pytest.raises(ValueError, match=r"label 5 is outside 0\.\.4"):
        VOCAB.seg_id(5)


@pytest.mark.parametrize("views", [dict(header_view="none"), dict(prompt_view="window"), dict(prompt_view="local", prompt_window_tokens=0)])
def test_unknown_views_are_refused(views):
    with pytest.raises(ValueError, match="|".join(views)):
        spans.attention_mask(jnp.zeros(4, jnp.int32), VOCAB, **views)
