"""Models whose layers have a memory: decoding is one forward pass over segments, its state does not grow; and where there is none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selfspan_jax.attention.sequences import attend_in_training
from selfspan_jax.config import DecodeConfig, ServingConfig, TunedAttention
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM
from selfspan_jax.parallel.engine import make_engine
from selfspan_jax.serving.scheduler import Scheduler
from selfspan_jax.weights.models import load_model, save_model
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.streams import VOCAB

S = 8
LENGTHS = np.array([1, 7, 8, 21], np.int32)  # of prompts: a token, a segment less one, a segment, within the third
ROWS = np.random.default_rng(1).integers(4, VOCAB.seg_base, (4, 64)).astype(np.int32)
NEW = 20
TOLERANCE = 1e-4  # as in test_engine.py


def memory_model(rule="delta", **changes):
    """With gates that differ from head to head, so that both parts count and none of them alone."""
    model = random_model(max_context_tokens=256, mask="memory", attention_memory=rule, memory_segment_tokens=S, **changes)
    for layer in model.layers:
        layer.self_attn.memory.gate[...] = jnp.linspace(-1, 1, layer.self_attn.memory.gate.shape[0])
    return model


MODELS = {rule: memory_model(rule) for rule in ("delta", "linear")}


@nnx.jit
def forward(model, token_ids, positions, segment_ids=None):
    attend, _ = attend_in_training(token_ids, VOCAB, model.config, segment_ids=segment_ids)
    return model.logits(model(token_ids, positions, attend)[0])


def whole(model, rows=ROWS):
    return np.asarray(forward(model, jnp.asarray(rows), jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32), rows.shape)))


def fed(engine, config):
    """Feed rows after their prompts; return the logits of every step, and the last state."""
    state, logits = engine.prefill(ROWS[:, : LENGTHS.max()], LENGTHS, config), []
    for step in range(NEW):
        logits.append(np.asarray(state.logits))
        state = engine.step(state, ROWS[np.arange(4), LENGTHS + step], config)
    return np.stack(logits, axis=1), state


@pytest.mark.parametrize("rule", MODELS)
def test_decoding_is_one_forward_pass(rule):
    """Prompts are read in two parts of two segments."""
    every = whole(MODELS[rule])
    expected = np.stack([every[b, n - 1 : n - 1 + NEW] for b, n in enumerate(LENGTHS)])
    found, state = fed(make_engine(MODELS[rule]), DecodeConfig("memory", max_new_tokens=NEW, prefill_tokens=64))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_array_equal(state.slots.counts, (LENGTHS + NEW - 1) % S + 1)
    other = whole(MODELS["linear" if rule == "delta" else "delta"])  # teeth: the other rule differs as soon as there are two segments
    assert np.abs(every - other)[:, : 2 * S].max() < TOLERANCE and np.abs(every - other)[:, 2 * S :].max() > 100 * TOLERANCE


@pytest.mark.gpu
def test_the_kernels_of_a_gpu_decode_the_same():
    """Heads of 64 in float32; the rows of a segment are used again, so slots and bookkeeping go round."""
    engine = make_engine(memory_model(hidden_size=64, intermediate_size=96, head_size=64, num_heads=8, num_kv_heads=2))
    options = {"max_new_tokens": NEW, "linear": "xla"}
    found, expected = (fed(engine, DecodeConfig("memory", implementation=name, **options))[0] for name in ("triton", "xla"))
    np.testing.assert_allclose(found, expected, atol=10 * TOLERANCE, rtol=10 * TOLERANCE)


def test_a_packed_row_is_its_sequences():
    """The second begins within a segment, so its own segments are cut elsewhere: the first of them alone is as in a row of its own."""
    first, row = 13, ROWS[:1]
    ids = (np.arange(64) >= first).astype(np.int32)[None] + 1
    positions = np.concatenate([np.arange(first), np.arange(64 - first)]).astype(np.int32)[None]
    found = np.asarray(forward(MODELS["delta"], jnp.asarray(row), jnp.asarray(positions), jnp.asarray(ids)))
    np.testing.assert_allclose(found[0, :first], whole(MODELS["delta"], row[:, :first])[0], atol=TOLERANCE)
    alone = whole(MODELS["delta"], row[:, first:])[0]
    np.testing.assert_allclose(found[0, first : 2 * S], alone[: 2 * S - first], atol=TOLERANCE)
    assert np.abs(found[0, 2 * S :] - alone[2 * S - first :]).max() > 100 * TOLERANCE


def test_the_state_does_not_grow():
    engine = make_engine(MODELS["delta"])

    def kept(prompt_tokens, config):
        return jax.tree.map(jnp.shape, engine.lower_prefill(2, prompt_tokens, config).out_info.cache)

    config = DecodeConfig("memory", max_new_tokens=4)
    assert kept(64, config) == kept(224, dataclasses.replace(config, max_new_tokens=32))
    state = engine.generate(ROWS[:2, :30], np.array([30, 11], np.int32), config, limit_tokens=8, num_samples=2)  # takes more room
    assert state.cache.slot_table.shape == (4, S) and state.new_tokens.shape[1] >= 8
    rows = np.repeat(ROWS[:2], 2, axis=0)
    for row, new, first in zip(rows, np.asarray(state.new_tokens), (30, 30, 11, 11)):
        row[first : first + 8] = new[:8]
    likeliest = whole(MODELS["delta"], rows).argmax(axis=2)
    for row, found, first, number in zip(rows, likeliest, (30, 30, 11, 11), np.asarray(state.num_new)):
        np.testing.assert_array_equal(row[first : first + min(8, number)], found[first - 1 : first - 1 + min(8, number)])


def test_a_model_with_a_memory_is_stored_whole(tmp_path):
    save_model(tmp_path / "model", MODELS["linear"], {"task": "arithmetic"}, "")
    model, _ = load_model(tmp_path / "model")
    assert model.config == MODELS["linear"].config
    np.testing.assert_array_equal(whole(model), whole(MODELS["linear"]))


def test_what_cannot_be_is_refused():
    engine, plain = make_engine(MODELS["delta"]), Engine(random_model())
    prompts = ROWS[:1, :8], np.array([8], np.int32)
    with pytest.raises(UserError, match="attention is 'dense', the model was trained under the mask 'memory'; allowed: memory"):
        engine.prefill(*prompts, DecodeConfig("dense", max_new_tokens=4))
    with pytest.raises(UserError, match="attention is 'memory', the model was trained under the mask 'span'; allowed: others"):
        plain.prefill(*prompts, DecodeConfig("memory", max_new_tokens=4))
    with pytest.raises(UserError, match="prefill is 'sample'"):
        engine.prefill(*prompts, DecodeConfig("memory", max_new_tokens=4, prefill="sample"))
    with pytest.raises(UserError, match="the model's layers have a memory"):
        Scheduler(engine, ServingConfig(2, context_tokens=64))
    with pytest.raises(UserError, match="kv_memory is 'host', but the model's layers have a memory"):
        SpanLM(MODELS["delta"], None, kv_memory="host")
    with pytest.raises(UserError, match="mask is 'memory'"):
        TunedAttention(mask="memory")
