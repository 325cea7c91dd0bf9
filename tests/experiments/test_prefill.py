"""The experiment of sparse prefill, on a small model and on toy sizes: what it computes, and the page that it writes."""

import json
import math

import numpy as np
import pytest

from experiments import prefill
from selfspan_jax.lm import SpanLM
from tests.experiments.reports import call
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.streams import VOCAB


class Letters:
    """A task whose documents are letters a to f."""

    def encode_prompt(self, text):
        return np.array([4 + ord(letter) - ord("a") for letter in text.strip()], np.int32)

    def decode(self, token_ids):
        return "".join(chr(int(token) - 4 + ord("a")) for token in token_ids)


@pytest.fixture
def texts(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for number, length in enumerate((300, 500, 450, 50)):
        (tmp_path / "texts" / f"{number}.txt").write_text("".join(rng.choice(list("abcdef"), length)))
    return tmp_path / "texts"


def test_quality_is_that_of_one_forward_after_each_prefill(texts, monkeypatch, tmp_path, capsys):
    model = random_model(max_context_tokens=1024, prompt_view="causal", header_view="all")
    lm = SpanLM(model, Letters())
    monkeypatch.setattr(prefill.SpanLM, "load", lambda *_, **__: lm)
    options = ["--tokens", 392, "--continuation", 8, "--num-texts", 2, "--sample-1", "1.0", "--sample-2", "0.1", "--blocks", "1.0"]
    status, out, err = call(prefill, capsys, "quality", "model", texts, *options, "--json", tmp_path / "quality.json")
    assert (status or 0) == 0, err
    report = json.loads((tmp_path / "quality.json").read_text())
    rows = {(row["selector"], row["threshold"]): row for row in report["quality"]}
    assert len(out.splitlines()) == len(rows)

    ids = prefill.concatenated(lm, [texts], 392, 2)  # 300 and 92 of 500 letters; 450 of the third: no document in two texts
    assert ids.shape == (2, 392) and VOCAB.solve_id not in ids
    logits = np.stack([lm.logits(row, "dense") for row in ids])
    right = np.take_along_axis(logits[:, :-1], ids[:, 1:, None], axis=2)[..., 0]
    losses = np.log(np.exp(logits[:, :-1]).sum(axis=2)) - right
    dense = rows["dense", None]
    assert dense["perplexity"] == pytest.approx(math.exp(losses[:, -8:].mean()), rel=1e-4)
    assert dense["loss_more"] == 0 and dense["tiles_kept"] == 1
    everything, little = rows["sample 1", 1.0], rows["sample 2", 0.1]
    assert everything["loss_more"] == 0 and everything["retained_mass_min"] == pytest.approx(1, abs=1e-5)
    assert little["tiles_kept"] < 1 and little["retained_mass_min"] < 0.9 and abs(little["loss_more"]) > 1e-3
    windows = [row for (kind, _), row in rows.items() if kind == "window"]
    assert all(row["tiles_kept"] >= little["tiles_kept"] - 1e-6 for row in windows)

    page = tmp_path / "page.md"
    page.write_text("<!-- sparse quality -->\n<!-- end -->\n<!-- sparse speed -->\n<!-- end -->\n")
    speed = {
        "device": "H100",
        "jax": "0.11.2",
        "shape": "llama3-8b",
        "speed": [{"tokens": 8192, "selector": "blocks", "kept": 0.25, "not_run": "no room"}],
    }
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    status, _, err = call(prefill, capsys, "page", tmp_path / "quality.json", tmp_path / "speed.json", "--page", page)
    assert (status or 0) == 0, err
    assert "| 392 | sample 2 | 0.1 |" in page.read_text() and "| 8,192 | blocks | 25% | not run: no room |" in page.read_text()
    assert (tmp_path / prefill.PLOT).stat().st_size > 1000

    status, _, err = call(prefill, capsys, "quality", "model", texts, "--tokens", 392, "--num-texts", 9)
    assert status == 2 and err == "error: --num-texts is 9: 4 documents give only 2 texts of 392 tokens\n"


@pytest.mark.parametrize("share, num_tiles, near", [(1.0, 8, 7), (0.5, 8, 2), (0.01, 8, 1), (1.0, 1, 1), (0.75, 2, 1)])
def test_the_window_of_equal_cost_keeps_at_least_as_many_tiles(share, num_tiles, near):
    assert prefill.window_of(share, num_tiles) == near

    def tiles(near):
        return sum(len({0, *range(max(0, own - near + 1), own + 1)}) for own in range(num_tiles))

    total = num_tiles * (num_tiles + 1) / 2
    assert tiles(near) >= share * total > (tiles(near - 1) if near > 1 else -1)
