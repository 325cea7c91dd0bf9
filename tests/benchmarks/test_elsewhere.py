"""Attention on other devices than the model computes the same, and so do heads that are divided."""

import dataclasses
import json

from benchmarks import elsewhere


def test_all_ways_compute_the_same(monkeypatch, tmp_path):
    plain = elsewhere.named_shape

    def tiny(name):
        shape = plain(name)
        sizes = {"hidden_size": 32, "intermediate_size": 36, "num_heads": 6, "num_kv_heads": 3, "head_size": 32}
        return dataclasses.replace(shape, config=dataclasses.replace(shape.config, **sizes, compute_dtype="float32"))

    monkeypatch.setattr(elsewhere, "named_shape", tiny)
    file = tmp_path / "elsewhere.json"
    sizes = "--shape smollm2-135m --layers 1 --devices 3 --batch-size 2 --context 60 --steps 2 --attended-fraction 0.5"
    elsewhere.main([*sizes.split(), "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["way"] for row in rows] == [*elsewhere.WAYS] and rows[0]["largest_difference"] == 0
    assert max(row["largest_difference"] for row in rows) < 1e-5 < min(row["ms_per_step"] for row in rows)
