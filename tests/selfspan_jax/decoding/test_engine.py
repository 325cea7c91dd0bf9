"""Invariant 2, the central one: decoding token by token gives the logits of one forward under the mask. And the two drivers."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfspan_jax.attention.policies import Window
from selfspan_jax.config import DecodeConfig, Sampling
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.sampling import sample, sequence_keys
from selfspan_jax.decoding.state import bucket, prefill_chunk_tokens
from tests.selfspan_jax.models import random_model, reference_logits
from tests.selfspan_jax.reference import Reference
from tests.selfspan_jax.streams import NAMED, VIEWS, VOCAB, VOCAB_SIZE, streams

VIEW_IDS = ["-".join(map(str, views.values())) for views in VIEWS]
MODELS = [random_model(**views) for views in VIEWS]
LENGTH, MAX_PROMPT = 24, 10
# float32 rounding: gather and einsum order differ between the two paths. Measured worst over all tests here: 2e-5.
TOLERANCE = 1e-4


def padded(rows, length, fill):
    return np.array([[*row[:length], *[fill] * (length - len(row))] for row in rows], np.int32)


def assert_decodes_like_one_forward(model, rows, prompt_lengths, masks, config):
    """Feeds each row after its own prompt, token by token, and compares every step's logits with one masked forward."""
    expected = reference_logits(model, rows, masks)
    prompts = padded([row[:n] for row, n in zip(rows, prompt_lengths)], MAX_PROMPT, VOCAB_SIZE - 1)  # garbage after the prompts
    state = Engine(model).prefill(prompts, np.array(prompt_lengths, np.int32), config)
    ended = np.array([VOCAB.eos_id in row[:0] for row in rows])
    for step in range(LENGTH - max(prompt_lengths)):
        at = np.array(prompt_lengths) + step
        logits = np.asarray(state.logits)
        for b in np.flatnonzero(~ended):
            np.testing.assert_allclose(logits[b], expected[b, at[b] - 1], atol=TOLERANCE, rtol=TOLERANCE, err_msg=f"{b} {step}")
        tokens = np.array([row[i] for row, i in zip(rows, at)])
        state = Engine(model).step(state, tokens, config)
        slots, counts, table = map(np.asarray, (state.slots.slots, state.slots.counts, state.cache.slot_table))
        for b in np.flatnonzero(~ended):
            rows_read = np.sort(slots[b, : counts[b]])
            np.testing.assert_array_equal(rows_read, table[b][np.flatnonzero(masks[b][at[b]])])
        ended |= tokens == VOCAB.eos_id  # a sequence that is done is no longer computed
    return state


SPAN = DecodeConfig(attention="span", max_new_tokens=LENGTH)


@pytest.mark.parametrize("model", MODELS, ids=VIEW_IDS)
def test_named_streams_decode_like_one_forward(model):
    views = {key: getattr(model.config, key) for key in VIEWS[0]}
    rows = padded([token_ids for token_ids, _ in NAMED.values()], LENGTH, fill=4)
    masks = [np.array(Reference(row, VOCAB, **views).mask()) for row in rows]
    prompt_lengths = [1 + i % MAX_PROMPT for i in range(len(rows))]
    assert_decodes_like_one_forward(model, rows, prompt_lengths, masks, SPAN)


@pytest.mark.parametrize("model", [MODELS[0], MODELS[-1]], ids=[VIEW_IDS[0], VIEW_IDS[-1]])
def test_a_stream_alone_decodes_like_one_forward(model):
    """In a batch one sequence's span token rebuilds the slots of all; alone, nothing hides a list that should have been rebuilt."""
    views = {key: getattr(model.config, key) for key in VIEWS[0]}
    for token_ids, _ in NAMED.values():
        row = padded([token_ids], LENGTH, fill=4)
        assert_decodes_like_one_forward(model, row, [MAX_PROMPT - 8], [np.array(Reference(row[0], VOCAB, **views).mask())], SPAN)


@given(
    batch=st.lists(streams(LENGTH), min_size=4, max_size=4),
    prompt_lengths=st.lists(st.integers(1, MAX_PROMPT), min_size=4, max_size=4),
    model=st.sampled_from(MODELS),
)
@settings(max_examples=60)
def test_any_streams_decode_like_one_forward(batch, prompt_lengths, model):
    views = {key: getattr(model.config, key) for key in VIEWS[0]}
    masks = [np.array(Reference(row, VOCAB, **views).mask()) for row in batch]
    assert_decodes_like_one_forward(model, np.array(batch, np.int32), prompt_lengths, masks, SPAN)


@pytest.mark.parametrize("attention", ["dense", "window"])
def test_baseline_policies_decode_like_one_forward(attention):
    config = DecodeConfig(attention=Window(2, 5) if attention == "window" else attention, max_new_tokens=LENGTH)
    rows = padded([token_ids for token_ids, _ in NAMED.values()], LENGTH, fill=4)
    t, s = np.indices((LENGTH, LENGTH))
    mask = (s <= t) if attention == "dense" else (s <= t) & ((t - s < 5) | (s < 2))
    prompt_lengths = [1 + i % MAX_PROMPT for i in range(len(rows))]
    assert_decodes_like_one_forward(MODELS[0], rows, prompt_lengths, [mask] * len(rows), config)


def test_the_tolerance_has_teeth():
    """One token more or less in one query's span must exceed the tolerance, else the tests above prove nothing."""
    row = np.array([padded([NAMED["specification"][0]], LENGTH, 4)[0]])
    mask = np.array(Reference(row[0], VOCAB).mask())
    model = MODELS[0]
    right = reference_logits(model, row, [mask])
    smallest = np.inf
    for t in range(2, LENGTH):
        for s in range(t):
            changed = mask.copy()
            changed[t, s] ^= True
            wrong = reference_logits(model, row, [changed])
            smallest = min(smallest, np.abs(wrong[0, t] - right[0, t]).max())
    assert smallest > 10 * TOLERANCE


PROMPTS = [NAMED["specification"][0][:14], NAMED["reopened"][0][:8], [1, 10, 4, 3]]
PROMPT_IDS = padded(PROMPTS, 14, 0)
LENGTHS = np.array([len(prompt) for prompt in PROMPTS], np.int32)


def generate_by_whole_forwards(model, prompt, steps):
    """Greedy decoding without a cache: one forward under the reference mask per token."""
    tokens = list(prompt)
    for _ in range(steps):
        width = PROMPT_IDS.shape[1] + steps  # one length, one compilation
        masks = [np.array(Reference([*tokens, *[0] * (width - len(tokens))], VOCAB, header_view=model.config.header_view,
                                    prompt_view=model.config.prompt_view,
                                    prompt_window_tokens=model.config.prompt_window_tokens).mask())]  # fmt: skip
        logits = reference_logits(model, padded([tokens], width, 0), masks)[0, len(tokens) - 1]
        tokens.append(int(np.argmax(logits)))
        if tokens[-1] == VOCAB.eos_id:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("model", MODELS[::4], ids=VIEW_IDS[::4])
def test_generate_is_greedy_decoding_without_a_cache(model):
    config = DecodeConfig(max_new_tokens=12)
    new_tokens = np.asarray(Engine(model).generate(PROMPT_IDS, LENGTHS, config).new_tokens)
    for b, prompt in enumerate(PROMPTS):
        expected = generate_by_whole_forwards(model, prompt, 12)
        assert list(new_tokens[b, : len(expected)]) == expected
        assert set(new_tokens[b, len(expected) :]) <= {VOCAB.pad_id}


def test_attended_counts_are_those_of_the_mask():
    model, config = MODELS[0], DecodeConfig(max_new_tokens=12)
    state = Engine(model).generate(PROMPT_IDS, LENGTHS, config)
    new_tokens, num_attended = np.asarray(state.new_tokens), np.asarray(state.num_attended)
    for b, prompt in enumerate(PROMPTS):
        tokens = [*prompt, *new_tokens[b]]
        views = {key: getattr(model.config, key) for key in VIEWS[0]}
        mask = np.array(Reference(tokens, VOCAB, **views).mask())
        end = tokens.index(VOCAB.eos_id) + 1 if VOCAB.eos_id in tokens else len(tokens)
        expected = mask.sum(axis=1)[len(prompt) : end]
        np.testing.assert_array_equal(num_attended[b, : len(expected)], expected)
        assert not np.any(num_attended[b, len(expected) :])


@pytest.mark.parametrize("attention", ["span", "dense", "window"])
def test_stream_gives_what_generate_gives(attention):
    config = DecodeConfig(attention=attention, max_new_tokens=11, sampling=Sampling(0.7))
    state = Engine(MODELS[0]).generate(PROMPT_IDS, LENGTHS, config, jax.random.key(3))
    chunks = list(Engine(MODELS[0]).stream(PROMPT_IDS, LENGTHS, config, jax.random.key(3), chunk_tokens=4))
    streamed = np.concatenate([chunk.tokens for chunk in chunks], axis=1)
    np.testing.assert_array_equal(streamed, state.new_tokens[:, : streamed.shape[1]])
    np.testing.assert_array_equal(
        np.concatenate([chunk.num_attended for chunk in chunks], axis=1), state.num_attended[:, : streamed.shape[1]]
    )
    assert streamed.shape[1] == int(state.num_steps)


def test_sequences_of_a_batch_do_not_touch_each_other():
    config = DecodeConfig(max_new_tokens=10)
    together = Engine(MODELS[4]).generate(PROMPT_IDS, LENGTHS, config)
    for b in range(len(PROMPTS)):
        alone = Engine(MODELS[4]).generate(PROMPT_IDS[b : b + 1], LENGTHS[b : b + 1], config)
        np.testing.assert_array_equal(together.new_tokens[b], alone.new_tokens[0])
        np.testing.assert_array_equal(together.num_attended[b], alone.num_attended[0])


def test_decoding_stops_at_eos_and_stays_stopped():
    """Sequences end at different steps; the loop ends with the last of them."""
    model, config = MODELS[0], DecodeConfig(max_new_tokens=12)
    state = Engine(model).prefill(PROMPT_IDS, LENGTHS, config)
    state = Engine(model).step(state, np.array([2, 4, 4]), config)
    frozen = jax.tree.map(np.asarray, (state.span, state.cache.pools))
    assert list(np.asarray(state.done)) == [True, False, False]
    state = Engine(model).step(state, np.array([4, 2, 4]), config)
    state = Engine(model).step(state, np.array([10, 16, 2]), config)
    assert np.all(state.done)
    for field, before in vars(frozen[0]).items():
        np.testing.assert_array_equal(getattr(state.span, field)[0], before[0], err_msg=field)
    own_rows = np.asarray(state.cache.slot_table[0])
    for (k_before, v_before), (k, v) in zip(frozen[1], state.cache.pools):
        np.testing.assert_array_equal(np.asarray(k)[own_rows], k_before[own_rows])
        np.testing.assert_array_equal(np.asarray(v)[own_rows], v_before[own_rows])


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


def test_the_same_key_gives_the_same_tokens_and_another_key_others():
    config = DecodeConfig(max_new_tokens=10, sampling=Sampling(1.5))
    first, again, other = (
        np.asarray(Engine(MODELS[0]).generate(PROMPT_IDS, LENGTHS, config, jax.random.key(key)).new_tokens) for key in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@pytest.mark.parametrize(
    ("token_ids", "lengths", "changes", "message"),
    [
        ([[1, 3]], [0], {}, "prompt lengths from 0"),
        ([[1, 3]], [3], {}, "prompt lengths from 3"),
        ([[1, 20]], [2], {}, "the model knows 0 to 19"),
        ([[1, -1]], [2], {}, "token ids from -1"),
        ([1, 3], [2], {}, "expected"),
        ([[1, 3]], [2], dict(max_new_tokens=63), "context of 64 tokens"),
    ],
)
def test_prompts_that_the_model_cannot_take_are_refused(token_ids, lengths, changes, message):
    config = dataclasses.replace(DecodeConfig(max_new_tokens=4), **changes)
    with pytest.raises(ValueError, match=message):
        Engine(MODELS[0]).prefill(np.array(token_ids), np.array(lengths), config)


# The kernels in the loop, on a GPU. (Head sizes of the tests above are none that they take.)

WIDE = dict(hidden_size=64, intermediate_size=96, head_size=64, num_heads=8, num_kv_heads=2)


@pytest.mark.gpu
@pytest.mark.parametrize("views", [VIEWS[0], VIEWS[4], VIEWS[8]], ids=[VIEW_IDS[0], VIEW_IDS[4], VIEW_IDS[8]])
def test_the_kernels_decode_like_one_forward(views):
    model = random_model(**WIDE, **views)
    rows = padded([token_ids for token_ids, _ in NAMED.values()], LENGTH, fill=4)
    masks = [np.array(Reference(row, VOCAB, **views).mask()) for row in rows]
    config = dataclasses.replace(SPAN, implementation="triton", linear="triton")
    assert_decodes_like_one_forward(model, rows, [1 + i % MAX_PROMPT for i in range(len(rows))], masks, config)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_the_kernels_in_half_precision_err_as_plain_arithmetic_does(weights):
    """Against the float32 model with the same weights, decoding errs at most twice as much as one forward in half precision."""
    views = VIEWS[0]
    exact = random_model(**WIDE, **views)
    half = random_model(**WIDE, **views, compute_dtype="bfloat16").for_decoding(weights=weights)
    rows = padded([token_ids for token_ids, _ in NAMED.values()], LENGTH, fill=4)
    masks = [np.array(Reference(row, VOCAB, **views).mask()) for row in rows]
    expected, forward_half = (reference_logits(model, rows, masks)[:, 4:-1] for model in (exact, half))
    config = dataclasses.replace(SPAN, implementation="triton", linear="triton")
    state = Engine(half).prefill(rows[:, :4], np.full(len(rows), 4, np.int32), config)
    found = []
    for t in range(4, LENGTH - 1):
        state = Engine(half).step(state, rows[:, t], config)
        found.append(np.asarray(state.logits))
    alive = np.array([VOCAB.eos_id not in row for row in rows])
    error, budget = (np.sqrt(np.mean(np.square(logits - expected)[alive])) for logits in (np.stack(found, axis=1), forward_half))
    assert 0 < error < 2 * budget


# Prefill in chunks, and prompts that share.


def long_prompts(lengths, seed):
    """Prompts with a response begun in most of them, so that steps, names and views reach across chunks; then padding."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(4, VOCAB_SIZE, (len(lengths), 256)).astype(np.int32)
    rows[:, 0] = VOCAB.bos_id
    for b in range(len(lengths) - 1):
        rows[b, rng.integers(1, 120)] = VOCAB.solve_id
    return rows, np.array(lengths, np.int32)


@pytest.mark.parametrize("views", [VIEWS[0], VIEWS[4], VIEWS[7]], ids=[VIEW_IDS[0], VIEW_IDS[4], VIEW_IDS[7]])
@pytest.mark.parametrize("attention", ["span", "dense", "window"])
def test_prefill_in_chunks_is_one_forward(views, attention):
    """Lengths at and around the ends of chunks of 64; a prompt far shorter than the rest; what follows a prompt is ignored."""
    model = random_model(max_context_tokens=300, **views)
    rows, lengths = long_prompts([256, 1, 63, 64, 65, 128, 200, 255], seed=3)
    policy = Window(2, 70) if attention == "window" else attention
    config = DecodeConfig(policy, max_new_tokens=4, prefill_tokens=8 * 64)
    if attention == "span":
        masks = [np.array(Reference(row, VOCAB, **views).mask()) for row in rows]
    else:
        t, s = np.indices((256, 256))
        masks = [(s <= t) if attention == "dense" else (s <= t) & ((t - s < 70) | (s < 2))] * len(rows)
    expected = reference_logits(model, rows, masks)
    assert prefill_chunk_tokens(8, 256, config) == 64
    state = Engine(model).prefill(rows, lengths, config)
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(state.logits[b], expected[b, length - 1], atol=TOLERANCE, rtol=TOLERANCE)


def test_lengths_of_a_bucket_share_their_programs():
    model, config = random_model(max_context_tokens=300), DecodeConfig(max_new_tokens=4)
    rows, _ = long_prompts([1], seed=0)
    traced = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: traced.append(name) if "jaxpr_trace" in name else None)

    def programs_after(length):
        Engine(model).generate(rows[:, :length], np.array([length], np.int32), config)
        return len(traced)

    first = programs_after(130)
    assert programs_after(192) == programs_after(150) == first
    assert programs_after(193) != first
    assert [bucket(n) for n in (1, 64, 65, 500, 513, 2048, 2049, 8000)] == [64, 64, 128, 512, 640, 2048, 2560, 8192]


def pool_bytes(state):
    return sum(pool.nbytes for pool in jax.tree.leaves(state.cache.pools))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_of_a_prompt_are_what_copies_of_it_would_write(temperature):
    """The same tokens from fewer rows: the prompt's are there once, and no sample writes to them."""
    model, config = MODELS[4], DecodeConfig(max_new_tokens=12, sampling=Sampling(temperature))
    key = jax.random.key(5)
    shared = Engine(model).generate(PROMPT_IDS, LENGTHS, config, key, num_samples=3)
    copies = Engine(model).generate(np.repeat(PROMPT_IDS, 3, axis=0), np.repeat(LENGTHS, 3), config, key)
    np.testing.assert_array_equal(shared.new_tokens, copies.new_tokens)
    np.testing.assert_array_equal(shared.num_attended, copies.num_attended)
    assert temperature == 0 or np.any(shared.new_tokens[0] != shared.new_tokens[1])
    room = bucket(PROMPT_IDS.shape[1])
    assert pool_bytes(copies) - pool_bytes(shared) == 2 * 3 * room * model.config.num_layers * 2 * 2 * 8 * 4
    prompts_only = Engine(model).prefill(PROMPT_IDS, LENGTHS, config)
    table, width = np.asarray(shared.cache.slot_table), LENGTHS.max()
    for b, length in enumerate(LENGTHS):
        for i in range(3):
            np.testing.assert_array_equal(table[3 * b + i, :length], table[3 * b, :length])
            assert len(set(table[3 * b + i, : length + 12])) == length + 12
        own = table[3 * b : 3 * b + 3, length : length + 12]
        assert len(np.unique(own)) == own.size and own.min() >= len(PROMPTS) * room > table[3 * b, :width][:length].max()
        for (k, v), (k_before, v_before) in zip(shared.cache.pools, prompts_only.cache.pools):
            rows = table[3 * b, :length]
            np.testing.assert_array_equal(np.asarray(k)[rows], np.asarray(k_before)[rows])
            np.testing.assert_array_equal(np.asarray(v)[rows], np.asarray(v_before)[rows])


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="num_samples is 0"):
        Engine(MODELS[0]).prefill(PROMPT_IDS, LENGTHS, DecodeConfig(max_new_tokens=4), num_samples=0)


# The loop: replay, and how seldom it asks.


def test_forced_tokens_are_written_and_fed_in_place_of_the_chosen_ones():
    model, config = MODELS[0], DecodeConfig(max_new_tokens=8)
    free = np.asarray(Engine(model).generate(PROMPT_IDS, LENGTHS, config).new_tokens)
    forced = np.full((3, 8), -1)
    forced[0, :5], forced[1, 2] = [11, 16, 5, 6, 7], 4
    state = Engine(model).run(Engine(model).prefill(PROMPT_IDS, LENGTHS, config), config, forced_tokens=forced)
    written = np.asarray(state.new_tokens)
    np.testing.assert_array_equal(written[0, :5], forced[0, :5])
    np.testing.assert_array_equal(written[1, :2], free[1, :2])
    assert written[1, 2] == 4
    np.testing.assert_array_equal(written[2], free[2])
    fed = Engine(model).prefill(PROMPT_IDS, LENGTHS, config)
    for step in range(8):
        fed = Engine(model).step(fed, written[:, step], config)
    np.testing.assert_allclose(state.logits, fed.logits, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("unasked", [2, 4, 7])
def test_a_loop_that_seldom_asks_writes_the_same(unasked):
    """Steps beyond the limit, or after the last <eos>, change nothing."""
    config = DecodeConfig(max_new_tokens=11, sampling=Sampling(1.0))
    key = jax.random.key(2)
    every_step = Engine(MODELS[0]).generate(PROMPT_IDS, LENGTHS, config, key)
    seldom = Engine(MODELS[0], steps_per_sync=unasked).generate(PROMPT_IDS, LENGTHS, config, key)
    streamed = list(Engine(MODELS[0]).stream(PROMPT_IDS, LENGTHS, config, key, chunk_tokens=4))
    for name in ("new_tokens", "num_attended", "num_steps", "done"):
        np.testing.assert_array_equal(getattr(seldom, name), getattr(every_step, name))
    for field in vars(every_step.span):
        np.testing.assert_array_equal(getattr(seldom.span, field), getattr(every_step.span, field))
    tokens = np.concatenate([chunk.tokens for chunk in streamed], axis=1)
    np.testing.assert_array_equal(tokens, np.asarray(every_step.new_tokens)[:, : tokens.shape[1]])


# What the compiler makes of the loop.


def compiled_loop(model, config, batch=4, prompt_tokens=512):
    """The compiled program of `run` for prompts of a length, and the shape of a pool as the program writes it."""
    token_ids, lengths = np.full((batch, prompt_tokens), 4, np.int32), np.full(batch, prompt_tokens, np.int32)
    engine = Engine(model, steps_per_sync=8)
    state = engine.prefill(token_ids, lengths, config)
    pool = state.cache.pools[0][0]
    compiled = engine.lower_run(state, config).compile()
    dtype = {"float32": "f32", "bfloat16": "bf16"}[pool.dtype.name]
    return compiled, f"{dtype}[{','.join(map(str, pool.shape))}]", pool.nbytes


@pytest.mark.parametrize("attention", ["span", "dense", "window"])
def test_the_loop_copies_no_pool_and_asks_the_host_for_nothing(attention):
    """Pools are written in place; temporary memory is that of one token per sequence and, without the kernels, one layer's rows."""
    model = random_model(max_context_tokens=1024, head_size=32)
    compiled, pool, pool_bytes = compiled_loop(model, DecodeConfig(attention=attention, max_new_tokens=64))
    program = compiled.as_text()
    writes = [line for line in program.splitlines() if re.search(rf"= {re.escape(pool)}\S* copy", line)]
    assert not writes, writes[0]
    for word in ("outfeed", "infeed", "send(", "recv(", "host_callback", "xla_python"):
        assert word not in program
    stats = compiled.memory_analysis()
    assert stats.alias_size_in_bytes >= 2 * model.config.num_layers * pool_bytes  # every pool goes in and comes out as one
    assert stats.temp_size_in_bytes < 4 * pool_bytes + 2**20


def test_the_search_for_copies_has_teeth():
    """A loop whose pools are not donated must copy them."""
    model = random_model(max_context_tokens=1024, head_size=32)
    config = DecodeConfig(max_new_tokens=64)
    token_ids, lengths = np.full((4, 512), 4, np.int32), np.full(4, 512, np.int32)
    engine = Engine(model, steps_per_sync=8)
    state = engine.prefill(token_ids, lengths, config)
    program = jax.jit(lambda state: engine.run(state, config)).lower(state).compile().as_text()
    assert re.search(r"= f32\[\d+,2,32\]\S* copy", program)
