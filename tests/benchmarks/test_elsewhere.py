"""Attention on other devices than the model computes the same."""

import dataclasses
import json

from benchmarks import elsewhere


def test_both_ways_compute_the_same(monkeypatch, tmp_path):
    plain = elsewhere.named_shape

    def tiny(name):
        shape = plain(name)
        return dataclasses.replace(
            shape, config=dataclasses.replace(shape.config, hidden_size=32, intermediate_size=32, compute_dtype="float32")
        )

    monkeypatch.setattr(elsewhere, "named_shape", tiny)
    file = tmp_path / "elsewhere.json"
    sizes = "--shape smollm2-135m --layers 1 --devices 3 --batch-size 2 --context 60 --steps 2 --attended-fraction 0.5"
    elsewhere.main([*sizes.split(), "--json", str(file)])
    together, apart = json.loads(file.read_text())["rows"]
    assert together["way"] == "together" and apart["way"] == "elsewhere"
    assert together["largest_difference"] == 0 < apart["ms_per_step"]
    assert apart["largest_difference"] < 1e-5
