"""The benchmark of prompt attention: what its cases allow, how it measures errors, and its rows."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import prompt_attention as bench
from benchmarks import span_decode, timing
from benchmarks.shapes import PROMPT_SHAPES, PromptShape
from pallas_kernels import prompt_attention

SHAPES = {
    "causal": PromptShape("causal", "", 2, 128, 4, 2, 32),
    "offset": PromptShape("offset", "", 1, 64, 4, 2, 32, first_query=128),
    "local": PromptShape("local", "", 2, 192, 4, 2, 32, mask="local"),
    "window": PromptShape("window", "", 1, 192, 4, 2, 32, mask="window"),
}
make = functools.cache(lambda name: bench.Workload.make(SHAPES[name], 0))


@pytest.mark.parametrize("name", SHAPES)
def test_pairs_and_errors_of_a_case(name):
    workload, shape = make(name), SHAPES[name]
    mask = workload.mask
    position = shape.first_query + np.arange(shape.num_queries)
    inside = position[None, :] < np.asarray(mask.lengths)[:, None]
    pairs = np.asarray(bench.all_pairs(workload))
    assert pairs.shape == (shape.batch_size, 1, shape.num_queries, shape.num_keys)
    assert workload.num_pairs == (pairs[:, 0] & inside[:, :, None]).sum()
    assert workload.flops == 4 * 4 * 32 * workload.num_pairs
    if name == "local":
        assert inside.sum() > 0.9 * inside.size and workload.num_pairs < 0.3 * 2 * 192 * 193 / 2
    out = prompt_attention(workload.q, *workload.pools, mask, implementation="reference")
    assert bench.error(workload, out) < 5e-3  # the output's own rounding
    swapped = prompt_attention(workload.q, *reversed(workload.pools), mask, implementation="reference")
    assert bench.error(workload, swapped) > 0.5
    moved = dataclasses.replace(mask, first_query=mask.first_query - 1)
    assert bench.error(workload, prompt_attention(workload.q, *workload.pools, moved, implementation="reference")) > 2e-2


def test_every_implementation_gets_a_row(tmp_path, monkeypatch, capsys):
    """Those that cannot run on this device say why."""
    header = {"device": "some GPU", "versions": {"jax": "1"}, "read_ceiling_terabytes_per_second": 2.0}
    monkeypatch.setattr(timing, "report_header", lambda: header)
    monkeypatch.setattr(bench, "chain_us", lambda *_, **options: (50.0, 1.0))
    monkeypatch.setattr(bench, "bf16_peak", lambda device_kind: 1e12)
    monkeypatch.setattr(bench, "unsupported_reason", lambda name, *_: None if name == "reference" else f"{name} is not here")
    monkeypatch.setattr(bench, "attend_cudnn", lambda q, k, v, pairs: q)
    with timing.KernelReport(tmp_path / "found.json") as report:
        for name in ("causal", "offset"):
            bench.run_shape(SHAPES[name], list(bench.IMPLEMENTATIONS), report, 0, "float16")
    rows = {(row["shape"], row["implementation"]): row for row in report.content["cases"]}
    assert len(rows) == 8
    assert rows["causal", "mosaic"]["not_run"] == "mosaic is not here"
    assert rows["offset", "cudnn"]["not_run"] == "its causal mask has no offset"
    reference, wrong = rows["causal", "reference"], rows["causal", "cudnn"]
    assert reference["flops_per_second"] == make("causal").flops / 50e-6
    assert reference["percent_of_peak"] == pytest.approx(reference["flops_per_second"] / 1e10)
    assert 0 < reference["relative_error"] < 1e-3  # of half precision that has 11 bits
    assert wrong["relative_error"] > 0.5  # of what returns its queries
    assert "TFLOP/s" in capsys.readouterr().out


def test_a_chain_runs_as_often_as_asked_for(monkeypatch):
    calls = []

    def seconds(function, **options):
        calls.append(float(function()[0]))
        return [1.0] * 5

    monkeypatch.setattr(timing, "run_seconds", seconds)
    microseconds, spread = span_decode.chain_us(lambda q, step: q + step, jnp.zeros(2), (), [(jnp.ones(2),), (jnp.ones(2),)], rounds=3)
    assert calls == [6.0] and (microseconds, spread) == (pytest.approx(1e6 / 6), 0)


def test_cases_are_what_kernels_take():
    for shape in PROMPT_SHAPES:
        assert shape.why and shape.num_queries % 64 == 0 and shape.num_keys % 64 == 0 and shape.num_heads % shape.num_kv_heads == 0
    assert len({shape.name for shape in PROMPT_SHAPES}) == len(PROMPT_SHAPES)
