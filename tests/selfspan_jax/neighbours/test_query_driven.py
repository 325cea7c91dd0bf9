"""Policies driven by queries: what they choose against plain NumPy, what they keep of keys, and that all rows are dense attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfspan_jax.attention.policies import get_policy
from selfspan_jax.config import DecodeConfig, ServingConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.errors import UserError
from selfspan_jax.neighbours.query_driven import Oracle, Quest
from selfspan_jax.serving.requests import Request
from selfspan_jax.serving.scheduler import Scheduler
from selfspan_jax.tiers.engine import HostEngine
from tests.selfspan_jax.models import random_model, reference_logits
from tests.selfspan_jax.streams import VOCAB

MODEL = random_model(max_context_tokens=256)
ENGINE = Engine(MODEL)
LENGTHS = np.array([1, 15, 16, 23], np.int32)  # of prompts: a token, a page less one, a page, within the second page
ROWS = np.random.default_rng(1).integers(4, VOCAB.seg_base, (4, 64)).astype(np.int32)
NEW = 26
TOLERANCE = 1e-4  # as in test_engine.py


def fed(policy, engine=ENGINE, **options):
    """Feed rows after their prompts; return the logits of every step, and the last state."""
    config = DecodeConfig(policy, max_new_tokens=NEW, **options)
    state, logits = engine.prefill(ROWS[:, : LENGTHS.max()], LENGTHS, config), []
    for step in range(NEW):
        logits.append(np.asarray(state.logits))
        state = engine.step(state, ROWS[np.arange(4), LENGTHS + step], config)
    return np.stack(logits, axis=1), state


@pytest.fixture(scope="module")
def dense():
    every = reference_logits(MODEL, ROWS, [np.tri(64, dtype=bool)] * 4)
    return np.stack([every[b, n - 1 : n - 1 + NEW] for b, n in enumerate(LENGTHS)])


@pytest.mark.parametrize("policy", [Quest(60, page_tokens=5), Oracle(64)], ids=str)
def test_all_rows_are_dense_attention(policy, dense):
    logits, state = fed(policy)
    np.testing.assert_allclose(logits, dense, atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_array_equal(state.slots.counts, LENGTHS + NEW)


def test_fewer_rows_are_not(dense):
    """The teeth of the test above."""
    assert np.abs(fed(Oracle(8))[0] - dense).max() > 10 * TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [Quest(16), Quest(30, page_tokens=5), Oracle(8)], ids=str)
def test_the_kernel_reads_what_each_head_chooses(policy):
    """Heads of 64 and groups of 4, which it takes; in float32, so that both choose the same rows."""
    engine = Engine(random_model(max_context_tokens=256, hidden_size=64, intermediate_size=96, head_size=64, num_heads=8, num_kv_heads=2))
    found, expected = (fed(policy, engine, implementation=name, linear="xla")[0] for name in ("triton", "xla"))
    np.testing.assert_allclose(found, expected, atol=10 * TOLERANCE, rtol=10 * TOLERANCE)


# ----------------------------------------------------------------------------------------------------------- against NumPy


def numpy_choice(policy, q, keys):
    """The tokens that one kv head reads: q [G, H], keys [n, H] of all tokens so far, in float64."""
    q, keys, newest = q.astype(np.float64), keys.astype(np.float64), len(keys) - 1
    if isinstance(policy, Oracle):
        scores = np.exp(q @ keys.T / np.sqrt(q.shape[1]))
        mass = (scores / scores.sum(axis=1, keepdims=True)).sum(axis=0)
        return set(np.argsort(-mass)[: policy.tokens].tolist())
    pages = [list(range(first, min(first + policy.page_tokens, len(keys)))) for first in range(0, len(keys), policy.page_tokens)]
    chosen = pages.pop()
    assert newest in chosen
    bounds = [max(np.maximum(one * keys[page].min(axis=0), one * keys[page].max(axis=0)).sum() for one in q) for page in pages]
    for index in np.argsort(bounds)[::-1]:
        if len(chosen) + policy.page_tokens > policy.tokens:
            break
        chosen = chosen + pages[index]
    return set(chosen)


CASES = {
    "one token": (Quest(8, page_tokens=4), 1),
    "the newest page full": (Quest(8, page_tokens=4), 16),
    "the newest page has one token": (Quest(8, page_tokens=4), 17),
    "no room for a page beside the newest": (Quest(7, page_tokens=4), 16),
    "pages of the default": (Quest(33), 50),
    "fewer pages than may be read": (Quest(40, page_tokens=4), 22),
    "single rows": (Oracle(5), 50),
    "one row": (Oracle(1), 50),
    "more rows than there are": (Oracle(30), 7),
}


@pytest.mark.parametrize("policy, num_tokens", CASES.values(), ids=list(CASES))
def test_choices_are_those_of_numpy(policy, num_tokens):
    """Slots in any order; the other sequence is shorter, or takes no token: its pages are as they were."""
    rng = np.random.default_rng(num_tokens)
    q, pool = rng.normal(size=(3, 2, 3, 8)), rng.normal(size=(180, 2, 8))
    table = rng.permutation(180)[: 3 * 50].reshape(3, 50)
    lengths = np.array([num_tokens, (num_tokens + 1) // 2, 0], np.int32)

    @jax.jit
    def choose(q, pool, table, num_tokens):
        slots = dataclasses.replace(policy.initial_slots(table), counts=policy.count(num_tokens), num_tokens=num_tokens)
        before = policy.summarize(pool, table)
        after = policy.update(before, pool, slots)
        return before, after, policy.choose(q, pool, after, slots), slots.counts

    before, summaries, found, counts = choose(q.astype(np.float32), pool.astype(np.float32), table.astype(np.int32), lengths)
    for b, length in enumerate(lengths):
        for head in range(2):
            expected = numpy_choice(policy, q[b, head], pool[table[b, :length], head]) if length else set()
            chosen = np.asarray(found)[b, head, : counts[b]].tolist()
            assert len(chosen) == len(expected) and set(chosen) == expected, (b, head)
    for old, new in zip(before, summaries):
        np.testing.assert_array_equal(old[2], new[2])


def test_bounds_are_those_of_the_keys_of_each_page():
    """After prompts that end within a page, steps, more room, and steps of some sequences alone; a page that has not ended is known as
    soon as a token is added to it."""
    config = DecodeConfig(Quest(16), max_new_tokens=NEW)
    state = fed(config.attention)[1]
    state = ENGINE.extend(state, config, 2 * NEW)
    state = dataclasses.replace(state, done=jnp.array([False, True, False, False]))
    for token in (5, 6, 7):
        state = ENGINE.step(state, np.full(4, token, np.int32), config)
    table, totals = np.asarray(state.cache.slot_table), np.asarray(state.span.num_tokens)
    np.testing.assert_array_equal(totals, LENGTHS + NEW + [3, 0, 3, 3])
    for k_pool, _, bounds in state.cache.pools:
        for b, total in enumerate(totals):
            keys = np.asarray(k_pool)[table[b, :total]]
            for page in range(total // 16 if b == 1 else -(-total // 16)):
                own = keys[16 * page : 16 * page + 16]
                np.testing.assert_array_equal(np.asarray(bounds)[b, :, page], np.stack([own.min(axis=0), own.max(axis=0)], axis=1))


# ---------------------------------------------------------------------------------------------------------------- elsewhere


def test_a_scheduler_gives_the_tokens_of_an_engine():
    policy = Quest(8, page_tokens=4)
    config = DecodeConfig(policy, max_new_tokens=24)
    state = ENGINE.generate(ROWS[:, : LENGTHS.max()], LENGTHS, config)
    scheduler = Scheduler(ENGINE, ServingConfig(2, context_tokens=64, chunk_tokens=8), attention=policy)
    found = list(scheduler.generate([Request(ROWS[b, :length], 24) for b, length in enumerate(LENGTHS)]))
    for b, tokens in enumerate(found):
        length = int(state.num_new[b])
        np.testing.assert_array_equal(tokens[0][:length], state.new_tokens[b, :length])
        np.testing.assert_array_equal(tokens[1][:length], state.num_attended[b, :length])


@pytest.mark.parametrize("make", [lambda: Quest(8), lambda: Quest(8, page_tokens=0), lambda: Oracle(0)])
def test_sizes_that_cannot_be_are_refused(make):
    with pytest.raises(UserError, match=r"tokens is .*; allowed: from 1"):
        make()


def test_there_is_no_mask_and_no_memory_of_the_host():
    with pytest.raises(UserError, match="attention is 'quest', which chooses by query, layer and head: there is no mask"):
        get_policy("quest").mask(jnp.asarray(ROWS), VOCAB, MODEL.config)
    with pytest.raises(UserError, match="attention is 'oracle', which looks at all keys: kv_memory='host' is not for it"):
        HostEngine(MODEL).prefill(ROWS[:, :8], np.full(4, 8, np.int32), DecodeConfig("oracle", max_new_tokens=4))
