"""Sparse prefill in the engine: under a selector whose tiles are known, prefill is one forward under them; and where it does not apply."""

import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels.prompt_attention import BlockMeans, SampleAttention, WindowTiles
from selfspan_jax.attention.policies import Window
from selfspan_jax.attention.selectors import get_selector
from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.state import prefill_chunk_tokens
from selfspan_jax.errors import UserError
from selfspan_jax.parallel.mesh import make_mesh
from selfspan_jax.viewing import retention
from tests.selfspan_jax.models import random_model, reference_logits
from tests.selfspan_jax.streams import VOCAB

MODEL = random_model(max_context_tokens=1024, prompt_view="causal", header_view="all")
ENGINE = Engine(MODEL)
LENGTHS = np.array([512, 300, 129, 1], np.int32)
ROWS = np.random.default_rng(3).integers(4, VOCAB.seg_base, (4, 512)).astype(np.int32)
TILES = WindowTiles(first_tiles=1, near_tiles=2, dense_below_tokens=0)
DENSE = DecodeConfig(max_new_tokens=4, prefill_tokens=4 * 128)  # chunks of 128
SPARSE = dataclasses.replace(DENSE, prefill=TILES)
t, s = np.indices((512, 512))
WINDOW = (s <= t) & ((t // 128 - s // 128 < 2) | (s < 128))
TOLERANCE = 1e-4  # as test_engine.py


def test_prefill_in_chunks_is_one_forward_under_the_tiles():
    """Ragged prompts, at and after the ends of chunks; the tiles left out matter."""
    assert prefill_chunk_tokens(4, 512, SPARSE) == 128
    last = np.arange(4), LENGTHS - 1
    sparse = np.asarray(ENGINE.prefill(ROWS, LENGTHS, SPARSE).logits)
    np.testing.assert_allclose(sparse, reference_logits(MODEL, ROWS, [WINDOW] * 4)[last], atol=TOLERANCE, rtol=TOLERANCE)
    dense = reference_logits(MODEL, ROWS, [s <= t] * 4)[last]
    assert np.abs(sparse - dense)[0].max() > 100 * TOLERANCE
    np.testing.assert_allclose(sparse[2:], dense[2:], atol=TOLERANCE, rtol=TOLERANCE)  # two tiles or one


@pytest.mark.parametrize("selector", [SampleAttention(share=1, dense_below_tokens=0), BlockMeans(alpha=0, dense_below_tokens=0)], ids=str)
def test_everything_kept_is_dense_to_the_bit(selector):
    kept = ENGINE.prefill(ROWS, LENGTHS, dataclasses.replace(DENSE, prefill=selector)).logits
    np.testing.assert_array_equal(kept, ENGINE.prefill(ROWS, LENGTHS, DENSE).logits)


def test_what_is_kept_is_measured_by_layer_and_head():
    """By counting tiles; what is two tiles long loses nothing. The state is that of prefill."""
    state, measured = retention.measured_prefill(ENGINE, ROWS, LENGTHS, SPARSE)
    np.testing.assert_array_equal(state.logits, ENGINE.prefill(ROWS, LENGTHS, SPARSE).logits)
    assert measured.every == 1 and measured.least.shape == (2, 4, 4)  # layers, prompts, heads
    np.testing.assert_array_equal(measured.queries[0, :, 0], LENGTHS)
    np.testing.assert_array_equal(measured.tiles[1, :, 3], [10, 6, 3, 1])
    np.testing.assert_array_equal(measured.kept[1, :, 3], [9, 6, 3, 1])
    assert (measured.least[:, 0] < 0.999).all() and (measured.least[:, 2:] > 0.9999).all()
    found = retention.to_json(measured)
    assert found["tiles_kept"] == pytest.approx((0.9 + 1 + 1 + 1) / 4) and found["measured_every"] == 1
    assert np.shape(found["by_layer_and_head"]["retained_mass_min"]) == (2, 4)
    assert found["retained_mass_min"] == pytest.approx(measured.least.min(), abs=1e-6)
    dense = retention.to_json(retention.measured_prefill(ENGINE, ROWS, LENGTHS, DENSE)[1])
    assert dense["tiles_kept"] == 1 and dense["retained_mass_min"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("attention", ["dense", "span"])
def test_a_prefix_within_a_response_is_sparse_where_everything_is_read(attention):
    """Under "span" its tokens read what they name, and selectors choose nothing."""
    rows, config = ROWS.copy(), dataclasses.replace(DENSE, attention=attention)
    rows[:, 60] = VOCAB.solve_id
    logits = np.asarray(ENGINE.prefill(rows, LENGTHS, dataclasses.replace(config, prefill=TILES)).logits)
    if attention == "span":
        np.testing.assert_array_equal(logits, ENGINE.prefill(rows, LENGTHS, config).logits)
    else:
        expected = reference_logits(MODEL, rows, [WINDOW] * 4)[np.arange(4), LENGTHS - 1]
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_prompt_too_short_to_be_measured_does_not_count(monkeypatch):
    """One query in 32 is measured: none of the prompt of one token, whose tiles count all the same."""
    monkeypatch.setattr(retention, "EXACT_TOKENS", 16)
    _, measured = retention.measured_prefill(ENGINE, ROWS, LENGTHS, SPARSE)
    assert measured.every == 32 and measured.queries[0, :, 0].tolist() == [16, 9, 4, 0]
    found, mean = retention.to_json(measured), measured.total[:, :3] / measured.queries[:, :3]
    assert found["retained_mass_mean"] == pytest.approx(mean.mean(), abs=1e-6) and 0.5 < mean.mean() < 0.999
    assert found["tiles_kept"] == pytest.approx((0.9 + 1 + 1 + 1) / 4)
    _, wider = retention.measured_prefill(ENGINE, np.pad(ROWS, ((0, 0), (0, 128))), LENGTHS, SPARSE)
    assert wider.every == 32  # padding asks for no wider steps


@pytest.mark.parametrize(
    "why, config, tokens",
    [
        ("no whole tiles in a chunk", SPARSE, 320),
        ("a room below the selector's bound", dataclasses.replace(DENSE, prefill=WindowTiles(near_tiles=1)), 512),
    ],
    ids=["chunks", "short"],
)
def test_what_cannot_be_sparse_is_read_densely(why, config, tokens):
    prompts, dense = (ROWS[:, :tokens], np.minimum(LENGTHS, tokens)), dataclasses.replace(config, prefill="dense")
    np.testing.assert_array_equal(ENGINE.prefill(*prompts, config).logits, ENGINE.prefill(*prompts, dense).logits, err_msg=why)


def test_local_prompts_have_nothing_to_choose():
    for model, attention in [(random_model(max_context_tokens=1024, prompt_view="local"), "span"), (MODEL, Window(4, 64))]:
        with pytest.raises(UserError, match=r"prefill='sample' is for prompts that read everything before; .* are already sparse"):
            Engine(model).prefill(ROWS, LENGTHS, dataclasses.replace(DENSE, attention=attention, prefill="sample"))


def test_what_is_no_selector_is_named():
    for wrong in ("sparse", SampleAttention, 3, None):
        with pytest.raises(UserError, match=r"prefill is .*; allowed: dense, sample, blocks, or a selector"):
            DecodeConfig(prefill=wrong)
    assert get_selector("dense") is None and get_selector("blocks") == BlockMeans() and get_selector(TILES) is TILES
    row = ROWS[:1].copy()
    row[0, 5] = VOCAB.solve_id
    with pytest.raises(UserError, match="here a response has begun"):
        retention.measured_prefill(ENGINE, row, LENGTHS[:1], SPARSE)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices of one kind")
def test_a_mesh_keeps_what_one_device_keeps():
    """Prompts divided over two devices, heads over two; chunks of the same length, because each chunk makes its own choice."""
    config = dataclasses.replace(DENSE, prefill=SampleAttention(share=0.3, diagonal_share=0.3, dense_below_tokens=0))
    halves = dataclasses.replace(config, prefill_tokens=config.prefill_tokens // 2)  # of half the prompts
    state, measured = retention.measured_prefill(Engine(MODEL, make_mesh("data=2,tensor=2")), ROWS, LENGTHS, halves)
    expected, alone = retention.measured_prefill(ENGINE, ROWS, LENGTHS, config)
    np.testing.assert_array_equal(measured.kept, alone.kept)
    np.testing.assert_allclose(measured.total, alone.total, rtol=1e-3)
    np.testing.assert_allclose(state.logits, expected.logits, atol=TOLERANCE, rtol=TOLERANCE)
    assert (alone.kept < alone.tiles).any()
