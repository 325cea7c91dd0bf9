"""The experiment of sparse prefill, on a small model and on toy sizes: what it computes, and the page that it writes."""

import dataclasses
import json
import math

import numpy as np
import pytest
from flax import nnx

from benchmarks.shapes import PROMPT_SHAPES
from data import arithmetic
from data.vocab import Vocab
from experiments import prefill, prefill_tables
from selfspan_jax.lm import SpanLM
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab
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


def test_quality_is_that_of_one_forward_after_each_prefill(texts, monkeypatch, tmp_path, call):
    model = random_model(num_layers=1, max_context_tokens=1024, prompt_view="causal", header_view="all")
    lm = SpanLM(model, Letters())
    monkeypatch.setattr(prefill.SpanLM, "load", lambda *_, **__: lm)
    options = ["--tokens", 392, "--continuation", 8, "--num-texts", 2, "--sample-1", "1.0", "--sample-2", "0.1", "--blocks", "1.0"]
    status, out, err = call(prefill.main, "quality", "model", texts, *options, "--json", tmp_path / "quality.json")
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

    for options, told in (
        (["--tokens", 392, "--num-texts", 9], "--num-texts is 9: 4 documents give only 2 texts of 392 tokens"),
        (["--tokens", "392,256"], "--tokens is 256; allowed: above the 256 of the continuation"),
    ):
        status, _, err = call(prefill.main, "quality", "model", texts, *options)
        assert status == 2 and err == f"error: {told}\n"


def test_tasks_are_scored_after_each_prefill(monkeypatch, tmp_path, call):
    """Everything kept gives what dense prefill gives."""
    task = arithmetic.ArithmeticTask(vocab=Vocab(64))
    vocab = SpanVocab(**task.vocab.span_ids())
    config = dataclasses.replace(random_model().config, num_layers=1, max_context_tokens=1024, prompt_view="causal")
    lm = SpanLM(Decoder(config, vocab=vocab, vocab_size=vocab.min_vocab_size, rngs=nnx.Rngs(0)), task)
    monkeypatch.setattr(prefill.SpanLM, "load", lambda *_, **__: lm)
    sizes = ["--ops", 40, "--num-examples", 2, "--batch-size", 2, "--prefill-tokens", 1024, "--selectors", "sample 1", "--sample-1", "1.0"]
    status, out, err = call(prefill.main, "tasks", "model", *sizes, "--json", tmp_path / "tasks.json")
    assert (status or 0) == 0, err
    report = json.loads((tmp_path / "tasks.json").read_text())
    rows = {(row["selector"], row["threshold"]): row for row in report["tasks"]}
    assert report["task"] == "arithmetic" and report["longest_prompt_tokens"] > 256 and len(out.splitlines()) == len(rows)
    dense, everything = rows["dense", None], rows["sample 1", 1.0]
    assert all(everything[name] == dense[name] for name in ("answer_accuracy", "step_accuracy", "attended_tokens"))
    assert dense["num_examples"] == 2 and dense["tiles_kept"] == everything["tiles_kept"] == 1

    (some,) = task.held_out(3, seed=1, ops=[(40, 40)]).values()  # of a corpus: those that fit, in whole batches
    monkeypatch.setattr(prefill.examples, "stored", lambda *_: (task, {"c": some}, {"data": "c", "split": "test", "warnings": []}))
    stored = [*sizes[2:], "--data", tmp_path, "--json", tmp_path / "stored.json"]
    status, _, err = call(prefill.main, "tasks", "model", *stored)
    assert (status or 0) == 0, err
    again = json.loads((tmp_path / "stored.json").read_text())
    assert again["tasks"] == report["tasks"] and (again["data"], again["split"]) == ("c", "test")
    lm.model.config = dataclasses.replace(lm.model.config, max_context_tokens=300)
    status, _, err = call(prefill.main, "tasks", "model", *stored)
    assert status == 2 and err == f"error: --batch-size is 2: of {tmp_path} only 0 examples fit into 300 tokens\n"

    lm.model.config = dataclasses.replace(lm.model.config, prompt_view="local")
    status, _, err = call(prefill.main, "tasks", "model", *sizes)
    assert status == 2 and err == "error: model reads its prompts by labels, not causally: there is nothing to choose\n"
    status, _, err = call(prefill.main, "tasks", "model", "--num-examples", 3, "--batch-size", 2)
    assert status == 2 and err == "error: --num-examples is 3; allowed: multiples of --batch-size=2\n"


DEVICE = {"device": "H100", "jax": "0.11.2"}
KEPT = {"tokens": 392, "threshold": 0.1, "retained_mass_mean": 0.5, "retained_mass_min": 0.25, "tiles_kept": 0.75}
PREFILLED = {"attention": "dense", "batch_size": 1, "context_tokens": 8192, "time_to_first_token_ms": 1234.5}
STEPS = {"ms_per_step": 9.5, "tokens_per_second": 1000, "mfu": 0.451, "memory_gb": 20.25, "device_ms_by_kind": {"attention": 3.0}}
FILES = {  # what each command writes, and lines of the tables made of it
    "prompt_attention": (
        {
            "shapes": [dataclasses.asdict(PROMPT_SHAPES[3])],
            "cases": [{"shape": "b1-8k-at-24k", "implementation": "mosaic", "flops_per_second": 6.449e14, "relative_error": 0.00241}],
        },
        ["| causal | 1 of 8,192 at 24,576 | N 32, K 8, H 128 | 645 | - | - | - | 2.4e-03 | - | - |"],
    ),
    "many_rows": (
        {
            "cases": [
                {"map": "SwiGLU", "shape": "base", "rows": 16384, "variant": variant, "microseconds": us, "flops_per_second": 1e17 / us}
                | ({} if variant == "xla" else {"taken": "1" in variant})
                for variant, us in (("xla", 400.0), ("mosaic, bands of 1", 300.0), ("mosaic, bands of 8", 250.0))
            ]
            + [{"map": "QKV", "shape": "base", "rows": 128, "variant": "xla", "microseconds": 4.0, "flops_per_second": 1e12}]
        },
        ["| SwiGLU | base | 16,384 | 400 | 250 | mosaic, bands of 1 | 300 | 333 |", "| QKV | base | 128 | 4 | 1 | - | - | - |"],
    ),
    "llama3-8b_128k_decode": (
        {
            "rows": [
                PREFILLED | {"attended_tokens": 131072.0, "ms_per_step": 5.5, "percent_of_roofline": 81.2, "kv_memory_bytes": 2**34},
                {**PREFILLED, "attention": "span", "not_run": "no room"},
            ]
        },
        ["| dense | 1 | 8,192 | 131,072 | 5.500 | 81% | 1,234 | 16.0 | - |", "| span | 1 | 8,192 | not run: no room | - | - | - | - | - |"],
    ),
    "sparse_quality_model": (
        {"model": "model", "quality": [KEPT | {"selector": "blocks", "perplexity": 8.5, "loss_more": 0.01, "loss_more_error": 0.002}]},
        ["| 392 | blocks | 0.1 | 75.0% | 50.0% | 25.00% | 8.500 | +0.0100 ± 0.0020 |", "![Loss above dense"],
    ),
    "sparse_tasks_model": (
        {"model": "model", "tasks": [KEPT | {"selector": "window", "threshold": 2, "answer_accuracy": 0.5, "step_accuracy": 0.25}] * 2},
        ["| least | answer accuracy | step accuracy |", "| 392 | window | 2 tiles | 75.0% | 50.0% | 25.00% | 50.0% | 25.0% |"],
    ),
    "sparse_speed_8k": (
        {
            "shape": "llama3-8b",
            "rows": [
                PREFILLED | {"prefill": "sample", "kept": 0.4, "speedup_over_dense": 2.0, "device_ms_by_kind": {"attention": 31.4}},
                PREFILLED | {"prefill": "blocks", "kept": 0.754, "repetitions": 5, "spread_ms": 2.25},
                PREFILLED | {"prefill": "blocks", "kept": 0.25, "not_run": "no room"},
            ],
        },
        [
            "| 8,192 | sample 2 | 40% | - | 1,234 | - | - | 2.00 | 31 | - | - |",
            "| 8,192 | blocks | 75% | 50.0% | 1,234 | 2 | 5 | - | - | - | - |",
            "| 8,192 | blocks | 25% | - | not run: no room | - | - | - | - | - | - |",
        ],
    ),
    "training_base": (
        {
            "shape": "base",
            "step_tokens": 8192,
            "lengths": [
                {**DEVICE, "sequence_tokens": 4096, "batch_size": 2, "mask": "span", "training_takes": "triton"}
                | {"attention": {"triton": STEPS, "cudnn": {"not_run": "no room", "memory_gb": 99.0}}}
            ],
        },
        [
            "base, 8,192 tokens a step, H100, JAX 0.11.2 ([JSON](page/training_base.json)):",
            "| 4,096 | 2 | span | triton (taken) | 9.5 | 1,000 | 45.1% | 20.2 | 3.0 | - | - |",
            "| 4,096 | 2 | span | cudnn | not run: no room | - | - | 99.0 | - | - | - |",
        ],
    ),
}


def test_the_page_has_a_table_of_every_file_and_keeps_what_has_none(tmp_path, call):
    (tmp_path / "page").mkdir()
    for name, (report, _) in FILES.items():
        (tmp_path / "page" / f"{name}.json").write_text(json.dumps(DEVICE | report))
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\nas it was\n<!-- end -->\n" for name in prefill_tables.SECTIONS))
    status, _, err = call(prefill.main, "page", tmp_path / "page")
    assert (status or 0) == 0, err
    written = page.read_text()
    for name, (_, lines) in FILES.items():
        assert [line for line in lines if line not in written] == [], name
    assert written.count("as it was") == len(prefill_tables.SECTIONS) - len(FILES) == 5
    assert written.count("| 392 | window |") == 1  # of rows that are in several files, the first
    assert (tmp_path / "page" / prefill_tables.PLOT).stat().st_size > 1000


@pytest.mark.parametrize("share, num_tiles, near", [(1.0, 8, 7), (0.5, 8, 2), (0.01, 8, 1), (1.0, 1, 1), (0.75, 2, 1)])
def test_the_window_of_equal_cost_keeps_at_least_as_many_tiles(share, num_tiles, near):
    assert prefill.window_of(share, num_tiles) == near

    def tiles(near):
        return sum(len({0, *range(max(0, own - near + 1), own + 1)}) for own in range(num_tiles))

    total = num_tiles * (num_tiles + 1) / 2
    assert tiles(near) >= share * total > (tiles(near - 1) if near > 1 else -1)
