"""The benchmark of a training step: what it writes of a step, and that it trains nothing."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import training
from tests.benchmarks.test_decoding import ARITHMETIC_SHAPE
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.training.test_loop import CONFIG, batches_from


def test_the_benchmark_of_a_step_names_every_figure():
    model = random_model()
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    config = dataclasses.replace(CONFIG, batch_size=4)
    result = training.measure(model, config, batches_from(0), steps=1)
    figures = result["attention"]["xla"]
    tokens = np.mean([np.count_nonzero(batch.segment_ids) for batch in itertools.islice(batches_from(0), 2)])
    assert figures["tokens_per_second"] * figures["ms_per_step"] / 1e3 == pytest.approx(tokens)
    assert figures["mfu"] is None and len(figures["ms_of_repetitions"]) == training.REPETITIONS
    assert "32 tokens a step" in training.table(result) and result["training_takes"] == "xla" and figures["memory_gb"] > 0
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True):
        np.testing.assert_array_equal(old, new)  # it measures, it does not train


def test_a_shape_is_timed_at_several_lengths_with_as_many_tokens(monkeypatch, tmp_path, capsys):
    config = dataclasses.replace(ARITHMETIC_SHAPE.config, compute_dtype="float32")
    monkeypatch.setattr(training, "named_shape", lambda *_, **__: dataclasses.replace(ARITHMETIC_SHAPE, config=config))
    options = ["--mask", "dense", "--tokens", "64,128", "--step-tokens", "128", "--steps", "1"]
    training.main([*options, "--json", str(tmp_path / "lengths.json")])
    report = json.loads((tmp_path / "lengths.json").read_text())
    assert [(row["batch_size"], row["sequence_tokens"], row["mask"]) for row in report["lengths"]] == [(2, 64, "dense"), (1, 128, "dense")]
    pairs = [row["attention"]["xla"]["attended_pairs"] for row in report["lengths"]]
    assert pairs == [2 * 64 * 65 // 2, 128 * 129 // 2]  # whole sequences, no padding
    assert len(capsys.readouterr().out.splitlines()) == 6
    training.main(["--rank", "2", "--tokens", "320", "--step-tokens", "320", "--steps", "1", "--json", str(tmp_path / "adapters.json")])
    adapters = json.loads((tmp_path / "adapters.json").read_text())
    assert adapters["rank"] == 2 and 0 < adapters["lengths"][0]["trained"] < adapters["lengths"][0]["parameters"]
