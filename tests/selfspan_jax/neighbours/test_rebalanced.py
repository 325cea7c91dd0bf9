"""Attention-driven reasoning: prompts, decoding and whole sequences against a plain NumPy reading of its rule, on stored weights."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import decode
from selfspan_jax.attention.sequences import split_and_rotate
from selfspan_jax.config import DecodeConfig, ServerConfig, ServingConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM
from selfspan_jax.neighbours import rebalanced
from selfspan_jax.neighbours.rebalanced import Rebalanced, rebalanced_attention
from selfspan_jax.serving.requests import Request
from selfspan_jax.serving.scheduler import Scheduler
from selfspan_jax.tiers.engine import HostEngine
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.streams import VOCAB

MODEL = random_model(max_context_tokens=256, num_layers=3)
ENGINE = Engine(MODEL)
LENGTHS = np.array([1, 23, 70], np.int32)  # of prompts
ROWS = np.random.default_rng(1).integers(4, VOCAB.seg_base, (3, 72)).astype(np.int32)
NEW = 2
POLICY = Rebalanced(0.7, threshold=0.02)
CONFIG = DecodeConfig(POLICY, max_new_tokens=16, prefill_tokens=64)
TOLERANCE = 1e-4  # as in test_engine.py


def numpy_logits(model, token_ids, alpha, threshold, *, over=None):
    """Run a model layer by layer, with weights of all pairs in float64, as the public repository treats them.

    `over` are mistakes: the diagonal too, as much in all layers, the sums renormalised.
    """
    first, layer, num_layers = [], iter(range(100)), model.config.num_layers

    def attend(qkv, norms, angles, cache):
        q, k, v = (np.asarray(x, np.float64) for x in split_and_rotate(qkv, angles))
        k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        scores = np.einsum("bqnh,bsnh->bnqs", q, k) / np.sqrt(q.shape[3])
        weights = np.where(np.tri(q.shape[1], dtype=bool), np.exp(scores), 0)
        weights /= weights.sum(axis=3, keepdims=True)
        if (number := next(layer)) == 0:
            marked = weights > threshold
            marked[..., np.arange(q.shape[1]), np.arange(q.shape[1])] &= over == "diagonal"
            first.append(marked)
        else:
            weights[first[0]] *= 1 + alpha * (1 if over == "all layers" else 1 - number / (num_layers - 1))
            weights /= weights.sum(axis=3, keepdims=True) if over == "sums" else 1
        return jnp.asarray(np.einsum("bnqs,bsnh->bqnh", weights, v), jnp.float32), cache

    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
    hidden, _ = model(jnp.asarray(token_ids), positions, attend)
    return np.asarray(model.logits(hidden))


@pytest.fixture(scope="module")
def expected():
    return numpy_logits(MODEL, ROWS, POLICY.alpha, POLICY.threshold)


def test_prompts_and_steps_are_numpys(expected, monkeypatch):
    """Prompts in two chunks, whose keys are three tiles; then steps. What would be mistakes is far from it."""
    monkeypatch.setattr(rebalanced, "TILE_TOKENS", 48)
    state, found = ENGINE.prefill(ROWS[:, : LENGTHS.max()], LENGTHS, CONFIG), []
    for step in range(NEW):
        found.append(np.asarray(state.logits))
        state = ENGINE.step(state, ROWS[np.arange(3), LENGTHS + step], CONFIG)
    found, at = np.stack(found, axis=1), (np.arange(3)[:, None], LENGTHS[:, None] - 1 + np.arange(NEW))
    np.testing.assert_allclose(found, expected[at], atol=TOLERANCE, rtol=TOLERANCE)
    wrong = [numpy_logits(MODEL, ROWS, POLICY.alpha, POLICY.threshold, over=mistake) for mistake in ("diagonal", "all layers", "sums")]
    for other in (*wrong, numpy_logits(MODEL, ROWS, 0, POLICY.threshold), numpy_logits(MODEL, ROWS, POLICY.alpha, 0.05)):
        assert np.abs(found - other[at])[1:].max() > 10 * TOLERANCE
    np.testing.assert_array_equal(state.slots.counts, LENGTHS + NEW)


def test_whole_sequences_are_numpys(expected):
    lm = SpanLM(MODEL, None)
    np.testing.assert_allclose(lm.logits(ROWS[1], POLICY), expected[1], atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(lm.logits(ROWS[1], Rebalanced(0.0)), lm.logits(ROWS[1], "dense"), atol=TOLERANCE, rtol=TOLERANCE)


def test_a_scheduler_gives_the_tokens_of_an_engine():
    state = ENGINE.generate(ROWS[:, : LENGTHS.max()], LENGTHS, CONFIG)
    scheduler = Scheduler(ENGINE, ServingConfig(2, context_tokens=128, chunk_tokens=8), attention=POLICY)
    found = list(scheduler.generate([Request(ROWS[b, :length], 16) for b, length in enumerate(LENGTHS)]))
    for b, tokens in enumerate(found):
        np.testing.assert_array_equal(tokens[0], state.new_tokens[b, : int(state.num_new[b])])


def test_the_weights_of_a_layer_are_those_of_the_rule():
    """One query over four keys, by hand: alpha 1 in the second of three layers is half as much more."""
    keys = jnp.eye(4)[None, :, None]  # so that outputs are weights
    query = 2 * jnp.log(jnp.array([0.5, 0.005, 0.4, 0.095]))[None, None, None, None]
    distance = jnp.array([[[3, 2, 1, 0]]])
    gains = Rebalanced(1.0).gains(3)
    first, log_sum = rebalanced_attention(query, keys, keys, distance, gains[0], 0.01)
    np.testing.assert_allclose(first.ravel(), [0.5, 0.005, 0.4, 0.095], rtol=1e-6)
    found, _ = rebalanced_attention(jnp.zeros_like(query), keys, keys, distance, gains[1], 0.01, (query, keys, log_sum))
    np.testing.assert_allclose(found.ravel(), [0.375, 0.25, 0.375, 0.25], rtol=1e-6)
    assert Rebalanced(1.0).gains(3) == [0, 0.5, 0] and Rebalanced().gains(1) == [0]


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"alpha": float("nan")}, {"threshold": 0.0}, {"threshold": 1.0}])
def test_settings_that_cannot_be_are_refused(options):
    with pytest.raises(UserError, match=r"(^|threshold of )rebalance is \S+; allowed: (from 0|above 0, below 1)$"):
        Rebalanced(**options)


def test_a_server_is_started_with_it(monkeypatch):
    started = []
    monkeypatch.setattr("selfspan_jax.serving.server.serve", lambda load, *options: started.append(options))
    decode.Serve(checkpoint=Path("a-model"), rebalance=0.2, weights="int8").run()
    assert started == [("a-model", ServerConfig(), None, Rebalanced(0.2))]


def test_what_it_cannot_be_with_is_refused():
    with pytest.raises(UserError, match="rebalance is for dense attention, not for 'span'"):
        rebalanced.rebalanced("span", 0.2)
    assert rebalanced.rebalanced("dense", 0.3) == rebalanced.rebalanced(None, 0.3) == Rebalanced(0.3)
    assert rebalanced.rebalanced("span", None) == "span"
    with pytest.raises(UserError, match="prefill is 'sample'; allowed with an attention that weighs all keys itself: dense"):
        ENGINE.prefill(ROWS[:, :8], np.full(3, 8, np.int32), DecodeConfig(POLICY, max_new_tokens=4, prefill="sample"))
    with pytest.raises(UserError, match="attention is 'rebalanced', which looks at all keys: kv_memory='host' is not for it"):
        HostEngine(MODEL).prefill(ROWS[:, :8], np.full(3, 8, np.int32), DecodeConfig(POLICY, max_new_tokens=4))
