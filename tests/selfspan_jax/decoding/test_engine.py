"""Decoding is one forward: token by token under the cache, in prefill by chunks, in the loop, and in the stream."""

import collections
import dataclasses
import functools
import importlib
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfspan_jax.attention import policies
from selfspan_jax.attention.policies import Window, get_policy
from selfspan_jax.config import DecodeConfig, LoraConfig, Sampling
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.sampling import sample, sequence_keys
from selfspan_jax.decoding.state import bucket, decode_step, prefill_chunk_tokens, prefill_state, sample_step
from selfspan_jax.errors import UserError
from selfspan_jax.weights import lora
from tests.pallas_kernels.budget import rms
from tests.selfspan_jax.models import random_model, reference_logits
from tests.selfspan_jax.reference import Reference
from tests.selfspan_jax.streams import NAMED, VIEWS, VOCAB, VOCAB_SIZE, streams

# One model, one engine and few shapes for the whole file, because compiling is what takes the time. Four of the twelve pairs of
# views, in which every header view and every prompt view stands; test_spans.py has all.
CASES = [VIEWS[i] for i in (0, 7, 11, 3)]  # span causal, prompt local, all local, labels causal
CASE_IDS = ["-".join(map(str, views.values())) for views in CASES]
MODELS = [random_model(max_context_tokens=1024, **views) for views in CASES]
ENGINES = [Engine(model) for model in MODELS]
LENGTH, MAX_PROMPT = 24, 10
GREEDY = DecodeConfig(max_new_tokens=LENGTH)
SAMPLED = DecodeConfig(max_new_tokens=LENGTH, sampling=Sampling(temperature=1.0))
# float32 rounding: gather and einsum order differ between the two paths. Measured worst over all tests here: 2e-5.
TOLERANCE = 1e-4


def padded(rows, length, fill):
    return np.array([[*row[:length], *[fill] * (length - len(row))] for row in rows], np.int32)


def reference_masks(rows, views):
    return [np.array(Reference(row, VOCAB, **views).mask()) for row in rows]


NAMED_ROWS = padded([token_ids for token_ids, _ in NAMED.values()], LENGTH, fill=4)
NAMED_PROMPT_LENGTHS = [1 + i % MAX_PROMPT for i in range(len(NAMED_ROWS))]

# ------------------------------------------------------------------------- invariant 2: cached decode is one forward


def assert_decodes_like_one_forward(engine, rows, prompt_lengths, masks, expected, config=GREEDY, num_devices=1):
    """Feed each row after its own prompt, token by token: every step's logits and slots are those of one masked forward.

    Of several devices each lists the tokens that it has, every one of so many.
    """
    longest, length = max(prompt_lengths), len(rows[0])
    prompts = [row[:n] for row, n in zip(rows, prompt_lengths)]
    prompts = padded(prompts, max(longest, MAX_PROMPT), VOCAB_SIZE - 1)  # garbage after the prompts
    state = engine.prefill(prompts, np.array(prompt_lengths, np.int32), config)
    ended = np.zeros(len(rows), bool)
    for step in range(length - longest):
        at = np.array(prompt_lengths) + step
        alive = np.flatnonzero(~ended)
        np.testing.assert_allclose(
            np.asarray(state.logits)[alive], expected[alive, at[alive] - 1], atol=TOLERANCE, rtol=TOLERANCE, err_msg=f"step {step}"
        )
        tokens = np.array([row[i] for row, i in zip(rows, at)])
        state = engine.step(state, tokens, config)
        arrays = state.slots.slots, state.slots.counts, state.cache.slot_table
        slots, counts, table = (np.asarray(x).reshape(num_devices, len(rows), *x.shape[1:]) for x in arrays)
        for device, b in itertools.product(range(num_devices), alive):
            own = np.flatnonzero(masks[b][at[b]] & (np.arange(length) % num_devices == device))
            np.testing.assert_array_equal(np.sort(slots[device, b, : counts[device, b]]), table[device, b][own])
        ended |= tokens == VOCAB.eos_id  # a sequence that is done is no longer computed


@pytest.mark.parametrize("case", range(len(CASES)), ids=CASE_IDS)
def test_streams_decode_like_one_forward(case):
    """The named streams, then any streams, malformed ones included, after prompts of any length."""

    def check(rows, prompt_lengths):
        masks = reference_masks(rows, CASES[case])
        assert_decodes_like_one_forward(ENGINES[case], rows, prompt_lengths, masks, reference_logits(MODELS[case], rows, masks))

    @given(
        rows=st.lists(streams(LENGTH), min_size=len(NAMED_ROWS), max_size=len(NAMED_ROWS)),
        prompt_lengths=st.lists(st.integers(1, MAX_PROMPT), min_size=len(NAMED_ROWS), max_size=len(NAMED_ROWS)),
    )
    @settings(max_examples=4)
    def check_any(rows, prompt_lengths):
        check(np.array(rows, np.int32), prompt_lengths)

    check(NAMED_ROWS, NAMED_PROMPT_LENGTHS)
    check_any()


@pytest.mark.parametrize("case", [0, -1], ids=[CASE_IDS[0], CASE_IDS[-1]])
def test_a_stream_alone_decodes_like_one_forward(case):
    """In a batch one sequence's span token rebuilds the slots of all; alone, nothing hides slots that should have been rebuilt."""
    masks = reference_masks(NAMED_ROWS, CASES[case])
    expected = reference_logits(MODELS[case], NAMED_ROWS, masks)
    for b in range(len(NAMED_ROWS)):
        one = slice(b, b + 1)
        assert_decodes_like_one_forward(ENGINES[case], NAMED_ROWS[one], [MAX_PROMPT - 8], masks[one], expected[one])


@pytest.mark.parametrize("policy", ["dense", Window(2, 5)], ids=str)
def test_policies_decode_like_one_forward(policy):
    """Under their own masks, which test_policies.py compares with formulas."""
    config = dataclasses.replace(GREEDY, attention=policy)
    mask = np.asarray(get_policy(policy).mask(jnp.asarray(NAMED_ROWS), VOCAB, MODELS[0].config))
    expected = reference_logits(MODELS[0], NAMED_ROWS, mask)
    assert_decodes_like_one_forward(ENGINES[0], NAMED_ROWS, NAMED_PROMPT_LENGTHS, mask, expected, config)


def test_the_tolerance_has_teeth():
    """One token more or less in one query's span must exceed the tolerance, else the tests above prove nothing."""
    row = NAMED_ROWS[:1]
    (mask,) = reference_masks(row, CASES[0])
    right = reference_logits(MODELS[0], NAMED_ROWS, reference_masks(NAMED_ROWS, CASES[0]))[0]
    pairs = [(t, s) for t in range(2, LENGTH) for s in range(t)]
    pairs += pairs[: -len(pairs) % len(NAMED_ROWS)]
    smallest = np.inf
    for some in np.array(pairs).reshape(-1, len(NAMED_ROWS), 2):  # the shape of the tests above
        changed = np.repeat(mask[None], len(some), axis=0)
        changed[np.arange(len(some)), some[:, 0], some[:, 1]] ^= True
        wrong = reference_logits(MODELS[0], np.repeat(row, len(some), axis=0), changed)
        smallest = min(smallest, *(np.abs(wrong[i, t] - right[t]).max() for i, (t, _) in enumerate(some)))
    assert smallest > 10 * TOLERANCE


def test_chunks_of_prompts_are_what_kernels_take():
    """Of any shape: equal parts, of whole tiles, with as many rows as kernels of many rows want, and no more than that takes."""
    config = DecodeConfig()
    sizes = itertools.product((1, 2, 3, 5, 8, 64, 100, 130, 1000), (64, 200, 300, 520, 640, 800, 2000, 3000, 8000, 17_000, 131_072))
    for batch, capacity in ((batch, bucket(tokens)) for batch, tokens in sizes):
        tile = 128 if capacity % 128 == 0 else 64
        enough = [part for part in range(tile, capacity, tile) if capacity % part == 0 and batch * part >= 16_384]
        assert prefill_chunk_tokens(batch, capacity, config) == min(enough, default=capacity), (batch, capacity)
    named = {(3, 8000): 8192, (1, 17_000): 20_480, (64, 8000): 256, (1024, 2968): 128, (1, 131_072): 16_384, (200, 300): 320}
    assert {(b, tokens): prefill_chunk_tokens(b, bucket(tokens), config) for b, tokens in named} == named


def test_prefill_in_chunks_is_one_forward():
    """Lengths at and around the ends of chunks of 64; a prompt far shorter than the rest; what follows a prompt is ignored. So are steps
    that go on from there."""
    rng = np.random.default_rng(3)
    lengths = np.array([192, 1, 63, 64, 65, 128, 160, 191], np.int32)
    rows = rng.integers(4, VOCAB_SIZE, (len(lengths), 192 + 2)).astype(np.int32)
    rows[:, 0] = VOCAB.bos_id
    rows[rows == VOCAB.solve_id] = VOCAB.bos_id
    for b in range(len(lengths) - 1):  # a response begins in most of them, so that steps, names and views reach across chunks
        rows[b, rng.integers(64, 120)] = VOCAB.solve_id  # after the first chunk, which is read as that of prompts
    t, s = np.indices((194, 194))
    window = (s <= t) & ((t - s < 70) | (s < 2))
    for case, policy, masks in [
        (1, "span", reference_masks(rows, CASES[1])),
        (1, "dense", [s <= t] * len(rows)),
        (1, Window(2, 70), [window] * len(rows)),
        (3, "span", reference_masks(rows, CASES[3])),
    ]:
        config = DecodeConfig(policy, max_new_tokens=4, prefill_tokens=8 * 64)
        assert prefill_chunk_tokens(8, 192, config) == 64
        state, expected = ENGINES[case].prefill(rows[:, :192], lengths, config), reference_logits(MODELS[case], rows, masks)
        for index in range(3):
            at = np.arange(8), lengths - 1 + index
            state = ENGINES[case].step(state, rows[at], config) if index else state
            np.testing.assert_allclose(state.logits, expected[at], atol=TOLERANCE, rtol=TOLERANCE, err_msg=f"{config.attention} {index}")


@pytest.mark.gpu
@pytest.mark.parametrize("policy, prompt_view", [("span", "local"), ("span", "causal"), ("dense", "local"), (Window(2, 70), "local")])
@pytest.mark.parametrize("chunk_tokens, responses", [(128, False), (256, False), (128, True), (256, True)])
def test_the_kernels_of_prompts_are_one_forward(policy, prompt_view, chunk_tokens, responses):
    """Heads of 32, which they take; masks that are positions and labels, and bits where responses go on; chunks of one tile and of many."""
    rng, lengths = np.random.default_rng(5), np.array([256, 1, 63, 130], np.int32)
    rows = rng.integers(4, VOCAB_SIZE, (4, 256)).astype(np.int32)
    rows[rows == VOCAB.solve_id] = VOCAB.bos_id
    rows[np.arange(4), np.minimum(lengths - 1, 140) if responses else lengths - 1] = VOCAB.solve_id  # 140: in the second chunk of 128
    model = random_model(max_context_tokens=1024, head_size=32, prompt_view=prompt_view, prompt_window_tokens=5)
    masks = np.array(get_policy(policy).mask(jnp.asarray(rows), VOCAB, model.config))
    config = DecodeConfig(policy, max_new_tokens=4, prefill_tokens=4 * chunk_tokens)
    assert prefill_chunk_tokens(4, 256, config) == chunk_tokens
    logits = np.asarray(Engine(model).prefill(rows, lengths, config).logits)
    expected = reference_logits(model, rows, masks)[np.arange(4), lengths - 1]
    np.testing.assert_allclose(logits, expected, atol=10 * TOLERANCE, rtol=10 * TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_tokens", [128, 512])
def test_prompts_in_half_precision_are_one_forward(chunk_tokens):
    """The Mosaic kernel, heads of 64 in bfloat16, ragged, in one chunk and in four: as near to float32 as XLA's bfloat16 is, and where
    the best token stands out it is the best. So are steps that go on from there. A tile of keys less is far outside."""
    rows, lengths = np.random.default_rng(6).integers(4, VOCAB.seg_base, (4, 512)).astype(np.int32), np.array([510, 140, 129, 300])
    sizes = {"max_context_tokens": 1024, "head_size": 64, "prompt_view": "causal"}
    exact, model = (random_model(compute_dtype=dtype, **sizes) for dtype in ("float32", "bfloat16"))
    t, s = np.indices((512, 512))
    expected, plain = (reference_logits(one, rows, [s <= t] * 4) for one in (exact, model))
    wrong = reference_logits(exact, rows, [(s <= t) & ((s >= 128) | (t < 128))] * 4)
    config, engine = DecodeConfig("dense", max_new_tokens=4, prefill_tokens=4 * chunk_tokens), Engine(model)
    assert prefill_chunk_tokens(4, 512, config) == chunk_tokens
    assert "mosaic_gpu" in engine.lower_prefill(4, 512, config).as_text()
    state = engine.prefill(rows, lengths.astype(np.int32), config)
    for index in range(3):
        at = np.arange(4), lengths - 1 + index
        state = engine.step(state, rows[at], config) if index else state
        budget = 2 * rms(plain[at] - expected[at])
        assert rms(np.asarray(state.logits) - expected[at]) < budget < 0.2 * rms(wrong[at] - expected[at])
        best = np.sort(expected[at], axis=1)[:, -2:]
        clear = best[:, 1] - best[:, 0] > 4 * budget
        assert clear.any() and (np.argmax(state.logits, axis=1) == np.argmax(expected[at], axis=1))[clear].all()


# --------------------------------------------------------------------------------------------------- the two drivers

PROMPTS = [NAMED["specification"][0][:14], NAMED["reopened"][0][:8], [1, 10, 4, 3]]
PROMPT_IDS = padded(PROMPTS, 14, 0)
LENGTHS = np.array([len(prompt) for prompt in PROMPTS], np.int32)
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def sampled():
    return ENGINES[0].generate(PROMPT_IDS, LENGTHS, SAMPLED, KEY)


@pytest.mark.parametrize("case", [0, -1], ids=[CASE_IDS[0], CASE_IDS[-1]])
def test_generate_is_greedy_decoding_under_the_reference_mask(case):
    """Each token is the most likely one of a forward over all before it, attends to what the mask says, and nothing follows <eos>."""
    state = ENGINES[case].generate(PROMPT_IDS, LENGTHS, GREEDY)
    new_tokens, num_attended = np.asarray(state.new_tokens), np.asarray(state.num_attended)
    rows = padded([[*prompt, *new] for prompt, new in zip(PROMPTS, new_tokens)], 14 + LENGTH, 0)
    masks = reference_masks(rows, CASES[case])
    best = np.argmax(reference_logits(MODELS[case], rows, masks), axis=-1)
    for b, length in enumerate(LENGTHS):
        written = list(new_tokens[b]).index(VOCAB.eos_id) + 1 if VOCAB.eos_id in new_tokens[b] else LENGTH
        np.testing.assert_array_equal(new_tokens[b, :written], best[b, length - 1 : length - 1 + written])
        np.testing.assert_array_equal(num_attended[b, :written], masks[b].sum(axis=1)[length : length + written])
        assert set(new_tokens[b, written:]) <= {VOCAB.pad_id} and not np.any(num_attended[b, written:])
    for b in range(len(PROMPTS)):  # and no sequence of the batch touches another
        alone = ENGINES[case].generate(PROMPT_IDS[b : b + 1], LENGTHS[b : b + 1], GREEDY)
        np.testing.assert_array_equal(alone.new_tokens[0], new_tokens[b])
        np.testing.assert_array_equal(alone.num_attended[0], num_attended[b])


def test_stream_gives_what_generate_gives(sampled):
    chunks = list(ENGINES[0].stream(PROMPT_IDS, LENGTHS, SAMPLED, KEY, chunk_tokens=10))
    for name, whole in (("tokens", sampled.new_tokens), ("num_attended", sampled.num_attended)):
        streamed = np.concatenate([getattr(chunk, name) for chunk in chunks], axis=1)
        np.testing.assert_array_equal(streamed, np.asarray(whole)[:, : streamed.shape[1]])
        assert streamed.shape[1] == int(sampled.num_steps)


def test_a_loop_that_seldom_asks_writes_the_same(sampled):
    """Steps beyond the limit, or after the last <eos>, change nothing."""
    seldom = Engine(MODELS[0], steps_per_sync=7).generate(PROMPT_IDS, LENGTHS, SAMPLED, KEY)
    for name in ("new_tokens", "num_attended", "num_steps", "done"):
        np.testing.assert_array_equal(getattr(seldom, name), getattr(sampled, name), err_msg=name)
    for field in vars(sampled.span):
        np.testing.assert_array_equal(getattr(seldom.span, field), getattr(sampled.span, field), err_msg=field)


def test_the_same_key_gives_the_same_tokens_and_another_key_others(sampled):
    again, other = (ENGINES[0].generate(PROMPT_IDS, LENGTHS, SAMPLED, key) for key in (KEY, jax.random.key(6)))
    np.testing.assert_array_equal(sampled.new_tokens, again.new_tokens)
    assert np.any(np.asarray(sampled.new_tokens) != np.asarray(other.new_tokens))


def test_pools_have_rows_in_eights():
    """Those that no sequence owns are read by nobody; kernels copy rows in eights."""
    state = ENGINES[0].prefill(PROMPT_IDS[:1], LENGTHS[:1], dataclasses.replace(GREEDY, max_new_tokens=23))
    assert {pool.shape[0] for pool in jax.tree.leaves(state.cache.pools)} == {64 + 24}
    assert np.asarray(state.cache.slot_table).max() == 64 + 22


def pool_bytes(state):
    return sum(pool.nbytes for pool in jax.tree.leaves(state.cache.pools))


def test_samples_of_a_prompt_are_what_copies_of_it_would_write():
    """The same tokens from fewer pool rows: the prompt's are there once, and no sample writes to them."""
    shared = ENGINES[0].generate(PROMPT_IDS, LENGTHS, SAMPLED, KEY, num_samples=3)
    copies = ENGINES[0].generate(np.repeat(PROMPT_IDS, 3, axis=0), np.repeat(LENGTHS, 3), SAMPLED, KEY)
    np.testing.assert_array_equal(shared.new_tokens, copies.new_tokens)
    np.testing.assert_array_equal(shared.num_attended, copies.num_attended)
    assert np.any(shared.new_tokens[0] != shared.new_tokens[1])
    room, config = bucket(PROMPT_IDS.shape[1]), MODELS[0].config
    assert pool_bytes(copies) - pool_bytes(shared) == 2 * 3 * room * config.num_layers * 2 * 2 * 8 * 4
    prompts_only = ENGINES[0].prefill(PROMPT_IDS, LENGTHS, SAMPLED)
    table = np.asarray(shared.cache.slot_table)
    for b, length in enumerate(LENGTHS):
        slots = table[3 * b, :length]
        for i in range(3):
            np.testing.assert_array_equal(table[3 * b + i, :length], slots)
            assert len(set(table[3 * b + i, : length + LENGTH])) == length + LENGTH
        own = table[3 * b : 3 * b + 3, length : length + LENGTH]
        assert len(np.unique(own)) == own.size and own.min() >= len(PROMPTS) * room > slots.max()
        for pool, before in zip(jax.tree.leaves(shared.cache.pools), jax.tree.leaves(prompts_only.cache.pools)):
            np.testing.assert_array_equal(np.asarray(pool)[slots], np.asarray(before)[slots])


def test_decoding_stops_at_eos_and_stays_stopped():
    """Sequences end at different steps; one that has ended changes nothing of itself."""
    engine = ENGINES[-1]
    state = engine.step(engine.prefill(PROMPT_IDS, LENGTHS, GREEDY), np.array([2, 4, 4]), GREEDY)
    span, pools = jax.tree.map(np.asarray, (state.span, state.cache.pools))
    assert list(np.asarray(state.done)) == [True, False, False]
    for tokens in ([4, 2, 4], [10, 16, 2]):
        state = engine.step(state, np.array(tokens), GREEDY)
    assert np.all(state.done)
    for field, before in vars(span).items():
        np.testing.assert_array_equal(getattr(state.span, field)[0], before[0], err_msg=field)
    slots = np.asarray(state.cache.slot_table[0])
    for pool, before in zip(jax.tree.leaves(state.cache.pools), jax.tree.leaves(pools)):
        np.testing.assert_array_equal(np.asarray(pool)[slots], before[slots])


def test_forced_tokens_are_written_and_fed_in_place_of_the_sampled_ones():
    engine = ENGINES[0]
    free = np.asarray(engine.generate(PROMPT_IDS, LENGTHS, GREEDY).new_tokens)
    forced = np.full((3, LENGTH), -1)
    forced[0, :5], forced[1, 2] = [11, 16, 5, 6, 7], 4
    state = engine.run(engine.prefill(PROMPT_IDS, LENGTHS, GREEDY), GREEDY, forced_tokens=forced)
    written = np.asarray(state.new_tokens)
    np.testing.assert_array_equal(written[0, :5], forced[0, :5])
    np.testing.assert_array_equal(written[1, :2], free[1, :2])
    assert written[1, 2] == 4
    np.testing.assert_array_equal(written[2], free[2])
    fed = engine.prefill(PROMPT_IDS, LENGTHS, GREEDY)
    for step in range(LENGTH):
        fed = engine.step(fed, written[:, step], GREEDY)
    np.testing.assert_allclose(state.logits, fed.logits, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.9)])
def test_tokens_are_drawn_with_the_stated_probabilities(temperature, top_p):
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    probabilities = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    kept, mass = np.zeros(6, bool), 0.0
    for token in np.argsort(-probabilities):
        if mass < top_p:
            kept[token] = True
        mass += probabilities[token]
    probabilities = probabilities * kept / (probabilities * kept).sum()
    drawn = sample(jnp.broadcast_to(jnp.array(logits, jnp.float32), (40_000, 6)), sequence_keys(None, 40_000), Sampling(temperature, top_p))
    frequencies = np.bincount(drawn, minlength=6) / 40_000
    # four standard deviations of a binomial share of 40,000 draws are at most 0.01
    np.testing.assert_allclose(frequencies, probabilities, atol=0.01)
    assert not np.any(frequencies[~kept])


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("token_ids", "lengths", "options", "message"),
    [
        (np.zeros((0, 4), np.int32), [], {}, "there are no prompts"),
        ([[1, 3]], [0], {}, "prompt lengths from 0"),
        ([[1, 3]], [3], {}, "prompt lengths from 3"),
        ([[1, 20]], [2], {}, "the model knows 0 to 19"),
        ([[1, -1]], [2], {}, "token ids from -1"),
        ([1, 3], [2], {}, "expected"),
        ([[1, 3]], [2], dict(config=DecodeConfig(max_new_tokens=1023)), "context of 1024 tokens"),
        ([[1, 3]], [2], dict(num_samples=0), "num_samples is 0"),
        ([[1, 3]], [2], dict(config=DecodeConfig("nothing")), "attention is 'nothing'; allowed: span, dense, window"),
    ],
)
def test_arguments_that_cannot_be_are_refused(token_ids, lengths, options, message):
    with pytest.raises(UserError, match=message):
        ENGINES[0].prefill(np.array(token_ids), np.array(lengths), **{"config": GREEDY, **options})


# ------------------------------------------------------------------------------------------------ programs compiled


def test_lengths_of_a_bucket_and_engines_of_one_structure_share_their_programs():
    assert [bucket(n) for n in (1, 64, 65, 500, 513, 2048, 2049, 8000)] == [64, 64, 128, 512, 640, 2048, 2560, 8192]
    config, events = DecodeConfig(max_new_tokens=3), []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))

    def compiles(engine, length):
        events.clear()
        engine.generate(np.full((1, length), 4, np.int32), np.array([length], np.int32), config)
        return any("trace" in name or "compile" in name for name in events)

    ENGINES[0].compile(1, 50, config)
    assert any("compile" in name for name in events)
    assert not any(compiles(ENGINES[0], length) for length in (50, 64, 3))
    assert not compiles(Engine(random_model(seed=1, max_context_tokens=1024, **CASES[0])), 50)
    assert compiles(ENGINES[1], 50)  # other views


def equations(jaxpr):
    """Yield what a program computes, kernels as they are, calls of other programs as what those compute."""
    for equation in jaxpr.eqns:
        inner = [x.jaxpr if hasattr(x, "jaxpr") else x for x in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)]
        inner = [] if equation.primitive.name == "pallas_call" else [x for x in inner if hasattr(x, "eqns")]
        yield from itertools.chain.from_iterable(map(equations, inner)) if inner else [equation]


def _is_program(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_a_step_computes_no_array_as_long_as_the_context_or_the_vocabulary(monkeypatch):
    """Outside of kernels, which update it in place, nothing of the state has more than a few numbers for each sequence, but the logits.

    So a step of text costs the same in a context of any length. One kernel takes the likeliest token, and has automaton, slots and logs.
    """
    for op in ("linear", "span_decode", "rotary", "slots"):
        monkeypatch.setattr(f"pallas_kernels.{op}.api.device_reason", lambda *_, **__: None)
    batch, room = 3, 71
    config = DecodeConfig(max_new_tokens=room, implementation="triton", linear="triton")
    model = random_model(hidden_size=64, intermediate_size=96, head_size=32, header_view="labels", compute_dtype="bfloat16").for_decoding()
    shapes = jax.ShapeDtypeStruct((batch, 192), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    prefill = functools.partial(prefill_state, model, config=config, num_samples=1, responses=False)
    state = jax.eval_shape(prefill, *shapes, sequence_keys(None, batch))
    step = jax.make_jaxpr(lambda state: sample_step(model, state, jnp.int32(room), None, config))(state)
    capacity, labels = 192 + room, VOCAB.num_labels
    long, kernels, logits = [], collections.Counter(), 0
    for equation in equations(step.jaxpr):
        is_kernel = equation.primitive.name == "pallas_call"
        kernels[equation.params.get("name") if is_kernel else None] += 1
        for shape in (x.aval.shape for x in equation.outvars):
            logits += shape == (batch, VOCAB_SIZE)
            if not is_kernel and {capacity, capacity + 1, labels, room} & {*shape}:
                long.append((equation.primitive.name, shape))
    assert not long
    assert kernels["per_sequence"] == 1
    assert logits == 1  # written once: nothing is chosen from those of the step before


def arrays_of_pairs(policy, prompt_view: str, responses: bool) -> tuple[set, set]:
    """Names and types of what a program that reads chunks of prompts has, outside of kernels, for each query and token; its kernels."""
    batch, tokens, sizes = 2, 640, dict(hidden_size=64, intermediate_size=96, head_size=32, num_layers=1)
    model = random_model(max_context_tokens=1024, prompt_view=prompt_view, **sizes)
    config = DecodeConfig(policy, max_new_tokens=8, prefill_tokens=batch * 128)
    chunk = prefill_chunk_tokens(batch, tokens, config)
    shapes = jax.ShapeDtypeStruct((batch, tokens), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32), sequence_keys(None, batch)
    read = functools.partial(prefill_state, model, config=config, num_samples=1, responses=responses)
    pairs, kernels = set(), set()
    for equation in equations(jax.make_jaxpr(read)(*shapes).jaxpr):
        kernels.add(equation.params.get("name") if equation.primitive.name == "pallas_call" else None)
        outs = [x.aval for x in equation.outvars]
        pairs |= {(equation.primitive.name, out.dtype) for out in outs if {tokens, chunk} <= {*out.shape} or out.shape.count(tokens) > 1}
    return pairs, kernels - {None}


def test_prompts_are_read_without_an_array_of_pairs(monkeypatch):
    """Masks are positions and labels. What only the policy's `mask` says, as of responses, is kept in bits, without scores or a bias.

    Where a device has no kernels there are such arrays: so the search finds them.
    """
    assert arrays_of_pairs("dense", "causal", False)[0]
    for op in ("prompt_attention", "sequence_attention"):
        monkeypatch.setattr(importlib.import_module(f"pallas_kernels.{op}.api"), "device_reason", lambda *_, **__: None)
    for policy, prompt_view in (("dense", "causal"), ("window", "causal"), ("span", "causal"), ("span", "local")):
        assert arrays_of_pairs(policy, prompt_view, False) == (set(), {"prompt_attention"})
    pairs, kernels = arrays_of_pairs("span", "local", True)
    assert kernels == {"prompt_attention", "masked_attention"}  # of the chunks before any response, and of the others
    assert pairs and all(dtype in (bool, jnp.int32, jnp.uint32) for _, dtype in pairs)


# Of a JAX program, what no GPU launches anything for: other shapes of the same bytes.
FREE = {"reshape", "squeeze", "broadcast_in_dim", "slice"}


def traced_step(batch_size, num_layers, linear=None, weights="bf16", adapters=(), **sizes):
    """A decode step as a GPU would choose its kernels, traced on any machine."""
    sizes = dict(hidden_size=64, intermediate_size=96, head_size=32, num_layers=num_layers) | sizes
    model = random_model(**sizes).for_decoding(weights=weights)
    model = lora.adapt(model, LoraConfig(rank=2, targets=adapters)) if adapters else model
    tokens, active = (jax.ShapeDtypeStruct((batch_size,), dtype) for dtype in (jnp.int32, jnp.bool_))
    prompts, keys = jax.ShapeDtypeStruct((batch_size, 64), jnp.int32), sequence_keys(None, batch_size)
    prefill = functools.partial(prefill_state, model, config=GREEDY, num_samples=1, responses=False)
    state = jax.eval_shape(prefill, prompts, tokens, keys)
    config = dataclasses.replace(GREEDY, linear=linear)
    return jax.make_jaxpr(lambda state, *given: decode_step(model, state, given, config))(state, tokens, active).jaxpr


def launches_of_a_layer(two, three) -> collections.Counter:
    """What a step of three layers runs more than one of two."""
    two, three = (collections.Counter(each.params.get("name", each.primitive.name) for each in equations(step)) for step in (two, three))
    return collections.Counter({name: count for name, count in (three - two).items() if name not in FREE})


def readers_of_early_results(jaxpr, are_early, readers) -> list[bool]:
    """Tell which results of a program a kernel has that lets the next be launched; count the kernels, and name what else reads theirs."""
    early = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*[False] * len(jaxpr.constvars), *are_early), strict=True))

    def is_early(atom):
        return not hasattr(atom, "val") and early.get(atom, False)  # a literal has one

    for each in jaxpr.eqns:
        given, inner = list(map(is_early, each.invars)), [x for x in each.params.values() if _is_program(x)]
        name, outs = each.primitive.name, [False] * len(each.outvars)
        if name == "pallas_call":
            outs = ["griddepcontrol" in str(each.params["jaxpr"])] * len(outs)
            readers["kernels"] += outs[0]
        elif len(inner) == 1 and name in ("jit", "pjit", "custom_jvp_call"):
            outs = readers_of_early_results(getattr(inner[0], "jaxpr", inner[0]), given, readers)
        elif name in FREE:
            outs = [any(given)]
        elif any(given):
            readers[name] += 1
        early |= dict(zip(each.outvars, outs, strict=True))
    return list(map(is_early, jaxpr.outvars))


@pytest.mark.parametrize(
    ("batch_size", "options", "early"),
    [
        (1, {}, 8),
        (8, {"qkv_bias": True, "output_bias": True, "qk_norm": True}, 8),
        (1024, {"compute_dtype": "float16", "weights": "int8", "linear": "triton"}, 0),
    ],
    ids=str,
)
def test_a_layer_of_a_decode_step_is_five_launches(batch_size, options, early, monkeypatch):
    """Norm and q, k, v; attention with rotation and writes; output map; norm, gate and up; down.

    Of one sequence, which is divided, the output map combines. With `linear=None` as a GPU would choose. Of few rows all but the first
    let the next be launched early, in each layer but the last. Nothing else reads their results: XLA's code may do so before it waits.
    """
    for op in ("linear", "span_decode", "rotary", "slots"):
        monkeypatch.setattr(f"pallas_kernels.{op}.api.device_reason", lambda *_, **__: None)
    steps = [traced_step(batch_size, num_layers, **{"compute_dtype": "bfloat16"} | options) for num_layers in (2, 3)]
    assert launches_of_a_layer(*steps) == {"fused_linear": 4, "span_decode_attend": 1}
    readers = collections.Counter()
    readers_of_early_results(steps[1], [False] * len(steps[1].invars), readers)
    assert +readers == ({"kernels": early} if early else {})


@pytest.mark.parametrize("header_view, few", [("labels", True), ("all", False)])
def test_attention_expects_few_rows_unless_headers_read_everything(header_view, few, monkeypatch):
    real, asked = policies.rotate_and_attend, []
    monkeypatch.setattr(policies, "rotate_and_attend", lambda *arrays, **how: (asked.append(how["sparse"]), real(*arrays, **how))[1])
    traced_step(2, 1, header_view=header_view)
    assert asked == [few]


def test_maps_with_adapters_are_never_early(monkeypatch):
    """XLA adds what an adapter says. Which maps of a layer have one decides for all."""
    for op in ("linear", "span_decode", "rotary", "slots"):
        monkeypatch.setattr(f"pallas_kernels.{op}.api.device_reason", lambda *_, **__: None)
    step, readers = traced_step(1, 2, adapters=("down_proj",), compute_dtype="bfloat16"), collections.Counter()
    assert readers_of_early_results(step, [False] * len(step.invars), readers) and not +readers


LOOP = DecodeConfig(max_new_tokens=64)


def loop_engine():
    return Engine(random_model(max_context_tokens=1024, head_size=32, header_view="labels"), steps_per_sync=8)


@pytest.mark.parametrize("attention", ["span", "window", "quest"])  # "dense" and "oracle" carry nothing that these do not
def test_the_loop_copies_no_pool_and_asks_the_host_for_nothing(attention):
    """Pools are written in place; temporary memory is that of one token per sequence and, without the kernels, one layer's rows."""
    engine, config = loop_engine(), dataclasses.replace(LOOP, attention=attention)
    state = engine.lower_prefill(4, 512, config).out_info
    compiled = engine.lower_run(state, config).compile()
    program, pool = compiled.as_text(), state.cache.pools[0][0]
    writes = [line for line in program.splitlines() if re.search(rf"= f32\[{','.join(map(str, pool.shape))}\]\S* copy", line)]
    assert not writes, writes[0]
    steps = set(re.findall(r"body=%([\w.\-]+)", program))
    for computation in program.split("\n\n"):
        if computation.split(" ", 1)[0].removeprefix("%") in steps:
            steps.remove(computation.split(" ", 1)[0].removeprefix("%"))
            assert not re.findall(r"= (\w+\[\d\S*) copy\(", computation)  # of anything that the loop carries
    assert not steps
    for word in ("outfeed", "infeed", "send(", "recv(", "host_callback", "xla_python"):
        assert word not in program
    stats, pool_bytes = compiled.memory_analysis(), 4 * pool.size
    assert stats.alias_size_in_bytes >= 2 * engine.config.num_layers * pool_bytes  # every pool goes in and comes out as one
    assert stats.temp_size_in_bytes < 4 * pool_bytes + 2**20


def test_the_search_for_copies_has_teeth():
    """A loop whose pools are not donated must copy them."""
    engine = loop_engine()
    state = engine.lower_prefill(4, 512, LOOP).out_info
    program = jax.jit(lambda state: engine.run(state, LOOP)).lower(state).compile().as_text()
    assert re.search(r"= f32\[\d+,2,32\]\S* copy", program)


# --------------------------------------------- the kernels in the loop, on a GPU (the head sizes above are none of theirs)

WIDE = dict(hidden_size=64, intermediate_size=96, head_size=64, num_heads=8, num_kv_heads=2)
KERNELS = dataclasses.replace(GREEDY, implementation="triton", linear="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("views", CASES, ids=CASE_IDS)
def test_the_kernels_decode_like_one_forward(views):
    model, masks = random_model(**WIDE, **views), reference_masks(NAMED_ROWS, views)
    expected = reference_logits(model, NAMED_ROWS, masks)
    assert_decodes_like_one_forward(Engine(model), NAMED_ROWS, NAMED_PROMPT_LENGTHS, masks, expected, KERNELS)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size, beside", [(1, 8), (64, 6)])
def test_a_compiled_step_has_few_launches_beside_five_a_layer(batch_size, beside):
    """In the loop that a GPU runs: counter, choice and bookkeeping, embedding, cosine and sine, last norm, output map."""
    sizes = dict(hidden_size=64, intermediate_size=96, head_size=32, num_layers=3, max_context_tokens=1024, compute_dtype="bfloat16")
    engine = Engine(random_model(**sizes, header_view="labels").for_decoding())
    program = engine.lower_run(engine.lower_prefill(batch_size, 64, LOOP).out_info, LOOP).compile().as_text()
    launched = [len(re.findall(r" = .*? (?:fusion|custom-call|copy|reduce|dot)\(", part)) for part in program.split("\n\n")]
    assert 5 * 3 + 3 < max(launched) <= 5 * 3 + beside


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_the_kernels_in_half_precision_err_as_plain_arithmetic_does(weights):
    """Against the float32 model with the same weights, decoding errs at most twice as much as one forward in half precision."""
    rows, masks = NAMED_ROWS, reference_masks(NAMED_ROWS, CASES[0])
    half = random_model(**WIDE, **CASES[0], compute_dtype="bfloat16").for_decoding(weights=weights)
    expected, forward_half = (reference_logits(model, rows, masks)[:, 4:-1] for model in (random_model(**WIDE, **CASES[0]), half))
    engine = Engine(half)
    state = engine.prefill(rows[:, :4], np.full(len(rows), 4, np.int32), KERNELS)
    found = []
    for t in range(4, LENGTH - 1):
        state = engine.step(state, rows[:, t], KERNELS)
        found.append(np.asarray(state.logits))
    alive = np.array([VOCAB.eos_id not in row for row in rows])
    error, budget = (np.sqrt(np.mean(np.square(logits - expected)[alive])) for logits in (np.stack(found, axis=1), forward_half))
    assert 0 < error < 2 * budget
