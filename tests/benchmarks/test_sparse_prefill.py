"""The benchmark of sparse prefill: lists of a given share are of that share, and its rows at toy size."""

import json

import numpy as np
import pytest

from benchmarks import sparse_prefill
from pallas_kernels.prompt_attention import BLOCK, WindowTiles


def test_lists_of_a_share_are_of_that_share():
    q, k = np.ones((1, 8 * BLOCK, 4, 8), np.float32), np.ones((1, 64 * BLOCK, 2, 8), np.float32)
    selector = sparse_prefill.OfShare(selector=WindowTiles(near_tiles=1), share=0.3, dense_below_tokens=0)
    tiles, counts = selector.choose(q, k, first_query=56 * BLOCK)
    own, kept = 56 + np.arange(8), np.asarray(counts)[0, :, :, 1]
    assert ((kept - 1).sum(axis=0) / (4 * own)).mean() == pytest.approx(0.3, abs=0.03) and (np.asarray(counts)[..., 0] == 1).all()
    for n, i in np.ndindex(4, 8):
        listed = np.asarray(tiles)[0, n, i, : kept[n, i]]
        assert listed[0] == own[i] and (listed[1:] < own[i]).all() and len(set(listed)) == len(listed)
    assert len({tuple(np.asarray(tiles)[0, n, 0, :10]) for n in range(4)}) == 4


def test_rows_at_toy_size(tmp_path, capsys):
    options = ["--shape", "arithmetic-small", "--layers", "1", "--tokens", "256", "--kept", "0.5", "--selectors", "sample 2,blocks"]
    sparse_prefill.main([*options, "--repetitions", "1", "--json", str(tmp_path / "speed.json")])
    assert len(capsys.readouterr().out.splitlines()) == 3
    report = json.loads((tmp_path / "speed.json").read_text())
    assert [row["selector"] for row in report["speed"]] == ["dense", "sample 2", "blocks"] and report["num_layers"] == 1
    assert all(row["first_token_ms"] > 0 and row["attention_ms"] > 0 and row["times_dense"] > 0 for row in report["speed"])
    with pytest.raises(SystemExit):
        sparse_prefill.main(["--kept", "0.5,2", "--selectors", "blocks"])
    assert "error: --kept is (0.5, 2.0); allowed: numbers from 0 to 1, one, or one for each of blocks" in capsys.readouterr().err
    assert report["speed"][1]["choice_ms"] > 0
