"""The benchmark of a training step: what it writes of a step, and that it trains nothing."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import training
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
    assert "32 tokens a step" in training.table(result)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True):
        np.testing.assert_array_equal(old, new)  # it measures, it does not train
