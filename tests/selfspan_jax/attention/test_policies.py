"""The masks of the policies against formulas. That slots say the same as masks: decoding/test_engine.py. Span: test_spans.py."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from selfspan_jax.attention.policies import POLICIES, Policy, Window, get_policy, policy_help
from selfspan_jax.errors import UserError
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.reference import Reference
from tests.selfspan_jax.streams import NAMED, VOCAB

CONFIG = random_model(header_view="prompt", prompt_view="local", prompt_window_tokens=3).config
TOKENS = np.array([NAMED["specification"][0][:20], NAMED["specification"][0][6:]], np.int32)
SEGMENTS = np.repeat([[1, 2, 3], [1, 1, 1]], [8, 7, 5], axis=1)
T, S = np.indices((20, 20))
FORMULAS = {"dense": S <= T, Window(2, 5): (S <= T) & ((T - S < 5) | (S < 2)), Window(0, 1): S == T}


@pytest.mark.parametrize("policy", FORMULAS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_masks_are_their_formulas(policy, packed):
    segments = SEGMENTS if packed else np.ones_like(SEGMENTS)
    expected = FORMULAS[policy] & (segments[:, :, None] == segments[:, None, :])
    options = {"segment_ids": jnp.asarray(segments)} if packed else {}
    for first, count in ((0, None), (0, 20), (3, 11), (19, 1)):
        mask = get_policy(policy).mask(jnp.asarray(TOKENS), VOCAB, CONFIG, first_query=first, num_queries=count, **options)
        np.testing.assert_array_equal(mask, expected[:, first : first + (count or 20)])


def test_the_span_policy_has_the_views_of_the_model():
    expected = [Reference(row, VOCAB, header_view="prompt", prompt_view="local", prompt_window_tokens=3).mask() for row in TOKENS]
    np.testing.assert_array_equal(get_policy("span").mask(jnp.asarray(TOKENS), VOCAB, CONFIG), expected)


@pytest.mark.parametrize("policy, prompt_view", [("span", "local"), *((policy, "causal") for policy in ("span", *FORMULAS))], ids=str)
def test_masks_of_prompts_are_their_masks(policy, prompt_view):
    """Rows of any part of prompts that end in `<solve>`, at their end or before it."""
    rows = np.full((2, 64), VOCAB.pad_id, np.int32)
    rows[:, :14] = [NAMED["specification"][0][:14], NAMED["specification"][0][:14]]
    assert rows[0, 13] == VOCAB.solve_id
    lengths, config = jnp.array([14, 9]), dataclasses.replace(CONFIG, prompt_view=prompt_view)
    masks = get_policy(policy).prompt_masks(jnp.asarray(rows), lengths, VOCAB, config, responses=False)
    expected = get_policy(policy).mask(jnp.asarray(rows), VOCAB, config)
    for b, length in enumerate(lengths):
        np.testing.assert_array_equal(masks(jnp.int32(0), 64).pairs(64)[b, 0, :length], expected[b, :length])


def test_policies_have_names_and_words_for_the_command_line():
    assert {name: policy.name for name, policy in POLICIES.items()} == {name: name for name in POLICIES}
    assert all(isinstance(policy, Policy) and f"{name}: {policy.description}" in policy_help() for name, policy in POLICIES.items())
    assert get_policy(Window(1, 2)) == Window(1, 2)


@pytest.mark.parametrize("policy", ["full", 3, None])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(UserError, match=f"attention is {policy!r}; allowed: span, dense, window, quest, oracle"):
        get_policy(policy)


@pytest.mark.parametrize("sizes", [(-1, 5), (4, 0)])
def test_a_window_that_cannot_be_is_refused(sizes):
    with pytest.raises(UserError, match="Window: sink_tokens is"):
        Window(*sizes)
