"""The benchmark's own parts that need no GPU: which slots it draws, and what it tells a user."""

import contextlib
import dataclasses
import functools
import types

import numpy as np
import pytest

from benchmarks import span_decode as bench
from benchmarks.shapes import AttentionShape
from data.errors import UserError
from pallas_kernels import span_decode_attention
from pallas_kernels.span_decode.heuristics import TritonConfig
from selfspan_jax import errors

SHAPE = AttentionShape("tiny", "", (640, 64, 1), 4, 2, 32)


@pytest.mark.parametrize("density", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("pattern", bench.PATTERNS)
@pytest.mark.parametrize("length", [1, 65, 4096])
def test_positions_have_the_density_asked_for(length, density, pattern):
    positions = bench.draw_positions(np.random.default_rng(0), length, density, pattern)
    assert len(positions) == max(1, round(density * length))
    assert np.all(np.diff(positions) > 0) and 0 <= positions[0] and positions[-1] < length


def test_patterns_are_what_they_are_called():
    runs = {}
    for pattern in bench.PATTERNS:
        positions = bench.draw_positions(np.random.default_rng(0), 65536, 0.02, pattern)
        runs[pattern] = len(positions) / (1 + np.count_nonzero(np.diff(positions) > 1))
    assert runs["tokens"] < 1.1 and 8 <= runs["spans"] <= 30 and runs["blocks"] > 60


def test_sequences_have_slots_of_their_own():
    slots, counts = bench.draw_slots(0, SHAPE, 0.1, "tokens", first_row=1000)
    assert counts.tolist() == [64, 6, 1]
    for b, (first, last) in enumerate([(1000, 1640), (1640, 1704), (1704, 1705)]):
        used = slots[b, : counts[b]]
        assert np.all((used >= first) & (used < last)) and np.all(slots[b, counts[b] :] == -1)


def test_unequal_sequences_have_the_density_in_the_mean():
    shape = dataclasses.replace(SHAPE, lengths=(1000,) * 2000)
    _, counts = bench.draw_slots(0, shape, 0.04, "unequal", first_row=0)
    assert abs(counts.mean() - 40) < 2 and abs(np.log(counts).std() - 0.4) < 0.03 and counts.max() > 100


def test_given_tiles_are_timed_beside_what_is_chosen(monkeypatch):
    """Of shapes with as many sequences as asked for; each setting computes attention."""
    shape = AttentionShape("few", "", (90, 40), 9, 3, 64)
    monkeypatch.setattr(bench, "CACHE_BYTES", 0)
    monkeypatch.setattr(bench, "triton_attention", functools.partial(bench.triton_attention, interpret=True))

    def chain_us(attend, q, pools, inputs):
        expected = span_decode_attention(q, *pools, *inputs[0], implementation="reference")
        np.testing.assert_allclose(*(np.asarray(out, np.float32) for out in (attend(q, *pools, *inputs[0]), expected)), atol=0.02)
        return 1.0 * len(q), 0.0

    monkeypatch.setattr(bench, "chain_us", chain_us)
    report = types.SimpleNamespace(content={"cases": []}, save=lambda: None)
    settings = bench.SpanDecode(tune=True, batch_size=(1, 3), tile_rows=(16, 64))
    monkeypatch.setattr(bench, "BY_NAME", dict.fromkeys(settings.shapes, shape))
    monkeypatch.setattr(bench.SpanDecode, "report", lambda self, **_: contextlib.nullcontext(report))
    dataclasses.replace(settings, shapes=settings.shapes[:1]).run()
    chosen = [tuple(bench.triton_config(number, 3, 64, 2, 90)) for number in (1, 3)]
    given = [tuple(TritonConfig(rows, max(1, rows // 32), 3, splits)) for rows in (16, 64) for splits in (0, 2)]
    timed = [(row["batch_size"], tuple(row["config"].values()), row["density"], row["pattern"]) for row in report.content["cases"]]
    cases = [(1.0, "all"), (0.1, "tokens"), (0.02, "tokens"), (0.04, "unequal")]
    every = [(n, config, *case) for n, own in zip((1, 3), chosen) for config in dict.fromkeys([own, *given]) for case in cases]
    assert timed == every


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tile_rows": (16,)}, "are for --tune"),
        ({"batch_size": (3,)}, "are for --tune"),
        ({"tune": True, "tile_rows": (48,)}, "tile_rows is 48; allowed: powers of 2 from 16"),
        ({"tune": True, "batch_size": (0,)}, "batch_size is 0"),
    ],
)
def test_settings_that_cannot_be_timed_are_refused(options, message):
    with pytest.raises((UserError, errors.UserError), match=message):
        bench.SpanDecode(**options)
