"""Rows of a sequence on several devices: every step is that of one forward, and each device has, lists and reads its own rows alone."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import ELSEWHERE
from selfspan_jax.attention.policies import get_policy
from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.state import DecodeState
from selfspan_jax.errors import UserError
from selfspan_jax.neighbours.rebalanced import Rebalanced
from selfspan_jax.parallel import context, layout
from selfspan_jax.parallel.collectives import shard_map
from selfspan_jax.parallel.engine import make_engine
from selfspan_jax.parallel.mesh import make_mesh, sum_over_context, training_mesh
from selfspan_jax.serving.scheduler import Scheduler
from tests.selfspan_jax.decoding.test_engine import (
    CASES,
    GREEDY,
    MAX_PROMPT,
    NAMED_PROMPT_LENGTHS,
    NAMED_ROWS,
    assert_decodes_like_one_forward,
    reference_masks,
)
from tests.selfspan_jax.models import random_model, reference_logits
from tests.selfspan_jax.streams import VOCAB

S = VOCAB.seg_base
LONG_BEGINNING = [1, 4, *[token for k in (1, 2, 3, 4, 5, 2, 1) for token in (S + k, 5, 6, 7, 8, 9, 4, 5)]]  # 58 tokens


@pytest.mark.parametrize(
    "text, case, before",
    [("context=2", 3, LONG_BEGINNING), ("context=3,tensor=2", 2, [])],
    ids=["labels-causal, two devices that divide prompts", "all-local, three, and tensor"],
)
def test_streams_decode_like_one_forward(text, case, before, monkeypatch):
    """Malformed streams after prompts from one token on: devices without rows, labels that one device has alone.

    With tokens before them prompts end in the first half of a chunk or in the second, which two devices read.
    """
    monkeypatch.setattr(context, "MIN_PART_TOKENS", 64)
    rows = np.array([[*before, *row] for row in NAMED_ROWS])
    lengths = [len(before) + length for length in NAMED_PROMPT_LENGTHS]
    model, mesh = random_model(max_context_tokens=1024, num_layers=1, **CASES[case]), make_mesh(text)
    masks = reference_masks(rows, CASES[case])
    expected = reference_logits(model, rows, masks)
    assert_decodes_like_one_forward(make_engine(model, mesh), rows, lengths, masks, expected, num_devices=mesh.shape["context"])


def test_tokens_are_shared_out_in_turns():
    """Helpers of one device against NumPy: 7 tokens on 3 devices."""
    x = np.arange(14, dtype=np.int32).reshape(2, 7)
    rows = np.where(np.isin(x, (2, 3, 11)), ELSEWHERE, x)

    def of_one(x, rows):
        own = context.take_own(x)
        listed, number = context.list_own(rows, np.full(2, 6, np.int32))
        return own, context.spread(own, 7), context.num_own(np.arange(8, dtype=np.int32)), listed, number, np.full(1, context.share(7))

    mesh = make_mesh("context=3")
    run = jax.jit(shard_map(of_one, mesh, PartitionSpec(), layout.spec("rows")))
    own, spread, numbers, listed, number, most = (np.asarray(found).reshape(3, -1, *found.shape[1:]) for found in run(x, rows))
    for c in range(3):
        np.testing.assert_array_equal(own[c][:, : len(range(c, 7, 3))], x[:, c::3])
        np.testing.assert_array_equal(spread[c], np.where(np.arange(7) % 3 == c, x, ELSEWHERE))
        np.testing.assert_array_equal(numbers[c], [len(range(c, n, 3)) for n in range(8)])
        assert most[c] == 3 == own.shape[-1]
        np.testing.assert_array_equal(number[c], [4, 5])
        np.testing.assert_array_equal(listed[c][0, :4], [0, 1, 4, 5])
        np.testing.assert_array_equal(listed[c][1, :5], [7, 8, 9, 10, 12])
    counts = np.arange(12)  # of two parts of a batch, each of two sequences on three devices
    np.testing.assert_array_equal(sum_over_context(counts, make_mesh("data=2,context=3")), [0 + 2 + 4, 1 + 3 + 5, 6 + 8 + 10, 7 + 9 + 11])


def test_two_devices_hold_twice_the_context():
    """Of the same pools, counted from shapes alone."""
    model, sizes = random_model(num_layers=1), []
    for text, tokens in ((None, 4096), ("context=2", 8192)):
        engine = make_engine(model, text and make_mesh(text))
        state = engine.lower_prefill(2, tokens, dataclasses.replace(GREEDY, max_new_tokens=tokens // 64)).out_info
        placed = layout.device_put_global(state, engine.mesh, DecodeState.partition_specs())
        sizes.append({layout.shard_shape(pool) for layer in placed.cache.pools for pool in layer})
    assert sizes[0] == sizes[1] == {(2 * (4096 + 64), 2, 8)}


def test_what_cannot_be_divided_is_refused():
    model = random_model(num_layers=1)
    with pytest.raises(UserError, match="context takes an engine that divides rows"):
        Engine(model, make_mesh("context=2"))
    engine = make_engine(model, make_mesh("context=2"))
    prompt = np.full((1, MAX_PROMPT), 5), np.array([MAX_PROMPT])
    for policy in map(get_policy, ("quest", "oracle", Rebalanced())):
        with pytest.raises(UserError, match=f"attention is '{policy.name}', which looks at all keys: a mesh that divides context"):
            engine.prefill(*prompt, DecodeConfig(attention=policy, max_new_tokens=4))
    with pytest.raises(UserError, match=r"takes tensor .*: its sequences share one cache"):
        Scheduler(engine)
    with pytest.raises(UserError, match="mesh is 'context=2': context is for decoding"):
        training_mesh("context=2")
