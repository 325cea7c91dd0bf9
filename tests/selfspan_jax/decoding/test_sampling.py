"""Sampling against `transformers`: which tokens are left, with which probabilities, at the edges too."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from selfspan_jax.config import DecodeConfig, Sampling, normal_float32
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.sampling import filtered_scores, mark_occurring, penalized, sample, sequence_keys
from selfspan_jax.errors import UserError
from selfspan_jax.evaluation.forcing import generate_under
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.streams import VOCAB, VOCAB_SIZE

SIZE = 50
LOGITS = np.random.default_rng(0).normal(0, 3, (6, SIZE)).astype(np.float32)
LOGITS[1] = np.round(LOGITS[1])  # ties
LOGITS[2] = 0.25  # nothing but ties
LOGITS[3, 7] = 40  # one that is certain
LOGITS[4, :10] = -np.inf  # some that cannot be
LOGITS[5] = -np.abs(LOGITS[5])  # nothing above 0

FILTERS = {  # why it is here -> (settings, rows with ties where it cuts, of which transformers keeps any)
    "temperature": (dict(temperature=0.7), ()),
    "a hot one": (dict(temperature=50.0), ()),
    "top-k": (dict(temperature=1.0, top_k=5), ()),
    "the most likely": (dict(temperature=1.0, top_k=1), ()),
    "all": (dict(temperature=1.0, top_k=SIZE), ()),
    "beyond the vocabulary": (dict(temperature=1.0, top_k=10**9), ()),
    "nucleus": (dict(temperature=0.8, top_p=0.9), (1, 2)),
    "a small nucleus": (dict(temperature=1.0, top_p=0.01), (1, 2)),
    "all but the last digits": (dict(temperature=1.0, top_p=0.9999999), (1, 2)),
    "min-p": (dict(temperature=1.5, min_p=0.1), ()),
    "min-p of the most likely": (dict(temperature=1.0, min_p=1.0), ()),
    "all of them": (dict(temperature=1.3, top_k=20, top_p=0.8, min_p=0.05), (1, 2)),
}


def probabilities(scores):
    weights = np.exp(np.asarray(scores, np.float64) - np.max(scores, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("name", FILTERS)
def test_filters_leave_what_those_of_transformers_leave(name):
    torch, generation = pytest.importorskip("torch"), pytest.importorskip("transformers.generation")
    settings, tied = FILTERS[name]
    scores = torch.from_numpy(LOGITS)
    for warper, value in (  # in the order of `generate`
        (generation.TemperatureLogitsWarper, settings["temperature"]),
        (generation.TopKLogitsWarper, settings.get("top_k")),
        (generation.TopPLogitsWarper, settings.get("top_p")),
        (generation.MinPLogitsWarper, settings.get("min_p")),
    ):
        scores = scores if value is None else warper(value)(None, scores)
    theirs, ours = probabilities(scores.numpy()), probabilities(filtered_scores(jnp.asarray(LOGITS), Sampling(**settings)))
    theirs[list(tied)], ours[list(tied)] = np.sort(theirs[list(tied)]), np.sort(ours[list(tied)])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_array_equal(ours > 0, theirs > 0)


@pytest.mark.parametrize("penalty", [1.3, 0.5, 1e-30, 1e30])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    """But for span tokens, which are exempt, and that nothing becomes infinite."""
    torch, generation = pytest.importorskip("torch"), pytest.importorskip("transformers.generation")
    ids = np.array([[5, 5, 2, 3], [4, 9, 0, 6]], np.int32)
    logits = np.random.default_rng(1).normal(0, 3, (2, VOCAB_SIZE)).astype(np.float32)
    inside = np.array([[True, True, True, True], [True, True, False, True]])
    theirs = []
    for row, keep, own in zip(ids, inside, logits):
        told = torch.from_numpy(row[keep][None].astype(np.int64))
        theirs.append(generation.RepetitionPenaltyLogitsProcessor(penalty)(told, torch.from_numpy(own[None]))[0])
    occurred = mark_occurring(jnp.zeros((len(ids), VOCAB_SIZE), bool), jnp.asarray(ids), jnp.asarray(inside), VOCAB)
    found = penalized(jnp.asarray(logits), occurred, penalty)
    largest = np.finfo(np.float32).max
    np.testing.assert_allclose(found, np.clip(np.stack(theirs), -largest, largest), rtol=1e-6, atol=1e-30)
    assert np.isfinite(found).all() and np.isfinite(penalized(jnp.asarray(logits), occurred, normal_float32(1e-300))).all()


def test_span_tokens_are_exempt_from_the_penalty():
    ids = jnp.array([[VOCAB.seg_base + 1, VOCAB.ref_base, 4, VOCAB.eos_id]])
    marked = mark_occurring(jnp.zeros((1, VOCAB_SIZE), bool), ids, jnp.ones((1, 4), bool), VOCAB)
    assert np.flatnonzero(marked).tolist() == [VOCAB.eos_id, 4]


CERTAIN = {
    "a temperature that float32 flushes to 0": dict(temperature=1e-38),
    "one that it does not have": dict(temperature=5e-324),
    "a small one": dict(temperature=1e-6),
    "a nucleus that float32 does not have": dict(temperature=1.0, top_p=1e-50),
    "top-k of one": dict(temperature=1.0, top_k=1),
    "min-p of one": dict(temperature=1.0, min_p=1.0),
    "all at once": dict(temperature=1e-38, top_k=3, top_p=1e-50, min_p=1.0),
}


@pytest.mark.parametrize("name", CERTAIN)
def test_what_leaves_one_token_takes_the_most_likely(name):
    drawn = sample(jnp.asarray(LOGITS[[0, 3, 4, 5]]), sequence_keys(None, 4), Sampling(**CERTAIN[name]))
    np.testing.assert_array_equal(drawn, LOGITS[[0, 3, 4, 5]].argmax(axis=-1))


def test_a_temperature_without_end_draws_from_all_that_can_be():
    drawn = np.asarray(sample(jnp.repeat(jnp.asarray(LOGITS[4:5]), 4000, axis=0), sequence_keys(None, 4000), Sampling(1e300)))
    assert set(drawn) == set(range(10, SIZE)) and np.bincount(drawn).max() < 160  # 100 each


WRONG = {
    "temperature": [-1.0, float("nan"), float("inf"), "1", True, None],
    "top_k": [-1, 2.0, "5", True],
    "top_p": [0.0, 1.1, float("nan"), "x"],
    "min_p": [-0.1, 1.1, float("nan")],
    "repetition_penalty": [0, -1.0, float("inf"), float("nan")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_sampling_that_cannot_be_is_refused(name, value):
    with pytest.raises(UserError, match=f"{name} is .*; allowed: "):
        Sampling(**{name: value})


def test_a_penalty_counts_prompt_and_response(length=12):
    """Against a loop that feeds token by token and penalizes in numpy; prompts of different lengths, garbage after the shorter one."""
    engine, penalty = Engine(random_model(max_context_tokens=64)), 1.7
    config = DecodeConfig(max_new_tokens=length, sampling=Sampling(repetition_penalty=penalty))
    prompts, lengths = np.array([[1, 5, 6, 3], [1, 3, 9, 9]], np.int32), np.array([4, 2], np.int32)
    found = np.asarray(engine.generate(prompts, lengths, config, num_samples=2).new_tokens)
    state, told = engine.prefill(prompts, lengths, config), [{1, 5, 6, 3}, {1, 3}]
    plain = set(range(VOCAB_SIZE)) - {*range(VOCAB.seg_base, VOCAB.ref_base + VOCAB.num_labels)}
    for step in range(length):
        logits = np.array(state.logits)
        for row, known in zip(logits, told):
            counted = sorted(known & plain)
            row[counted] = np.where(row[counted] < 0, row[counted] * np.float32(penalty), row[counted] / np.float32(penalty))
        tokens = logits.argmax(axis=-1)
        active = ~np.asarray(state.done)
        np.testing.assert_array_equal(found[::2, step][active], tokens[active])
        np.testing.assert_array_equal(found[::2], found[1::2])
        for known, token in zip(told, tokens):
            known.add(int(token))
        state = engine.step(state, tokens, config)


def test_a_step_that_has_named_goes_on_with_the_first_label_that_is_likely_enough(length=10, share=0.02):
    """Against a loop that feeds token by token and chooses in numpy, where half the prompts end with a name; the host chooses so too."""
    engine, config = Engine(random_model(max_context_tokens=64, name_share=share)), DecodeConfig(max_new_tokens=length)
    labels = np.arange(VOCAB.ref_base, VOCAB.ref_base + VOCAB.num_labels)
    prompts = np.array([[1, first, VOCAB.solve_id, labels[0]] for first in range(4, 10)], np.int32)
    lengths = np.array([4, 3] * 3, np.int32)
    state, last, chosen, others = engine.prefill(prompts, lengths, config), prompts[np.arange(6), lengths - 1], [], 0
    for _ in range(length):
        logits, done = np.asarray(state.logits, np.float64), np.asarray(state.done)
        tokens = logits.argmax(axis=-1)
        near = (logits[:, labels] >= logits.max(axis=-1, keepdims=True) + np.log(share)) & (labels > last[:, None])
        last = np.where(np.isin(last, labels) & near.any(axis=1), labels[near.argmax(axis=1)], tokens)
        others += np.sum(~done & (last != tokens))
        chosen.append(np.where(done, VOCAB.pad_id, last))
        state = engine.step(state, last, config)
    assert others > 2
    for found in (engine.generate(prompts, lengths, config), generate_under(engine, prompts, lengths, config, [[]] * 6)):
        np.testing.assert_array_equal(found.new_tokens, np.stack(chosen, axis=1))


def test_a_step_names_first_what_no_step_has_named_and_ends_when_it_is_long(length=40, most=3):
    """Against a loop that feeds token by token and keeps what steps named in sets; what `<solve>` names is still the first step's."""
    model, config = random_model(max_context_tokens=64, names_new=True, max_step_tokens=most), DecodeConfig(max_new_tokens=length)
    segs, refs = (range(base, base + VOCAB.num_labels) for base in (VOCAB.seg_base, VOCAB.ref_base))
    model.embed_tokens.embedding[...] *= jnp.where(jnp.arange(VOCAB_SIZE)[:, None] < VOCAB.ref_base, 1.0, 3.0)  # so that names are likely
    prompts, lengths = np.array([[1, 4, VOCAB.solve_id, refs[0]]] * 6, np.int32), np.array([4, 3] * 3, np.int32)
    given = np.random.default_rng(0).choice([*segs, *refs, 5, *[-1] * 10], (6, length)).astype(np.int32)
    engine = Engine(model)
    state, chosen, others, ended = engine.prefill(prompts, lengths, config), [], 0, 0
    named, last, written = [set() for _ in prompts], prompts[np.arange(6), lengths - 1].tolist(), [1, 0] * 3
    inside = np.setdiff1d(np.arange(VOCAB_SIZE), [*segs, VOCAB.eos_id])
    for forced in given.T:
        logits, done = np.array(state.logits), np.asarray(state.done)
        best = logits.argmax(axis=-1)
        for row in range(6):
            logits[row, sorted(named[row]) if last[row] in segs else []] = -np.inf
            ended += not done[row] and written[row] >= most and best[row] in inside
            logits[row, inside if written[row] >= most else []] = -np.inf
        others += np.sum(~done & (forced < 0) & (logits.argmax(axis=-1) != best))
        tokens = np.where(done, VOCAB.pad_id, np.where(forced < 0, logits.argmax(axis=-1), forced)).astype(np.int32)
        for own, before, token in zip(named, last, tokens.tolist()):
            own |= {token} if token in refs and before != VOCAB.solve_id else set()
        last = tokens.tolist()
        written = [0 if token in segs else count + 1 for token, count in zip(last, written)]  # after the token that opened it
        chosen.append(tokens)
        state = engine.step(state, tokens, config)
    assert others > 5 and ended > 5
    found = engine.run(engine.prefill(prompts, lengths, config), config, forced_tokens=given)
    np.testing.assert_array_equal(found.new_tokens, np.stack(chosen, axis=1))


def test_what_is_not_used_costs_nothing():
    """At temperature 0 filters are no operation of the program, nor is a penalty of 1."""
    engine = Engine(random_model(max_context_tokens=64))
    state = functools.cache(lambda config: engine.lower_prefill(1, 4, config).out_info)  # of settings, a penalty alone changes it

    def program(repetition_penalty=1.0, **settings):
        own = Sampling(repetition_penalty=repetition_penalty), Sampling(repetition_penalty=repetition_penalty, **settings)
        read, config = (DecodeConfig(max_new_tokens=8, sampling=sampling) for sampling in own)
        return engine.lower_run(state(read), config).as_text()

    assert program() == program(top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1) != program(repetition_penalty=1.1)
    assert "stablehlo.sort" not in program(temperature=1.0) and "stablehlo.sort" in program(temperature=1.0, top_p=0.5)
