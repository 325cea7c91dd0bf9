"""The load generator: what it counts of a known course of events, and a run against a server."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import serving
from benchmarks.arrivals import Sent, arrivals, summary, table
from data.errors import UserError
from selfspan_jax.serving.requests import Stats
from tests.selfspan_jax.serving.test_server import RESPONSE, Scripted
from tests.selfspan_jax.serving.test_server import serving as server_of


def test_latencies_count_from_the_arrival_and_failures_apart():
    requests = [
        Sent(1.0, [1.5, 1.6, 2.0], 9, True),
        Sent(2.0, [2.1, 3.0], 10, False),
        Sent(3.0, [], 0, None, "status 429"),
        Sent(3.5, [9.0], 0, None, left=True),
    ]
    row = summary(4.0, requests)
    assert (row["num_requests"], row["num_failed"], row["num_left"]) == (4, 1, 1) and (row["tokens"], row["failures"]) == (
        19,
        ["status 429"],
    )
    assert row["tokens_per_second"] == pytest.approx(19 / 2) and row["right_answers_per_second"] == pytest.approx(1 / 2)
    assert row["first_token_ms_p50"] == pytest.approx(300) and row["first_token_ms_p99"] == pytest.approx(496)
    assert row["between_events_ms_p50"] == pytest.approx(400) and row["per_token_ms_p50"] == pytest.approx((62.5 + 100) / 2)
    cells = table([row]).splitlines()[1].split()
    assert cells[:5] == ["4", "4", "1", "9.5", "0.50"]


def test_a_run_against_a_server(tmp_path, monkeypatch, capsys):
    prompts, report = tmp_path / "prompts.txt", tmp_path / "load.json"
    prompts.write_text("45\n9\n456\n")
    with server_of(Scripted(), device="NVIDIA H200") as address:
        words = [address, "--rates", "100,200", "--num-requests", "9,6", "--prompts", str(prompts), "--json", str(report)]
        monkeypatch.setattr(sys, "argv", ["benchmarks.serving", *words])
        serving.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("this client took")]  # on a busy machine
    written = json.loads(report.read_text())
    command = "python -m benchmarks.serving URL --rates 100,200 --num-requests 9,6 --prompts prompts.txt"
    assert (written["command"], written["device"], written["jax"]) == (command, "NVIDIA H200", jax.__version__)
    assert written["model"]["selfspan"]["serving"] == dataclasses.asdict(Scripted.config)
    assert written["model"]["id"] == "tiny" and written["prompts"] == "prompts.txt" and "api_key" not in written
    for row, number in zip(written["rows"], (9, 6), strict=True):
        assert (row["num_requests"], row["num_failed"], row["tokens"]) == (number, number // 3, number // 3 * 2 * len(RESPONSE))
        assert row["failures"] == ["decoding failed: the device is on fire"] and row["right_answers_per_second"] > 0
        assert 0 < row["first_token_ms_p50"] <= row["whole_ms_p50"] <= row["whole_ms_p99"]
    told = "failed: decoding failed: the device is on fire"
    assert [line.split()[:3] if line != told else told for line in lines[-4:]] == [["100", "9", "3"], told, ["200", "6", "2"], told]


def test_a_server_that_wants_a_key_gets_it_or_is_named(tmp_path):
    (tmp_path / "prompts.txt").write_text("45\n")
    with server_of(Scripted(), api_key="sécret") as address:
        load = serving.Load(url=address, rates=(200.0,), num_requests=(1,), prompts=tmp_path / "prompts.txt", api_key="sécret")
        load.run()
        with pytest.raises(UserError, match="wants another API key: give it with --api-key"):
            dataclasses.replace(load, api_key=None).run()


def test_clients_that_go_away_are_counted_and_the_server_says_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "stats", Stats(pages_cached=1, pages_free=4))
    report = tmp_path / "load.json"
    (tmp_path / "prompts.txt").write_text("456\n")
    with server_of(Scripted()) as address:
        serving.Load(url=address, rates=(200.0,), num_requests=(30,), prompts=tmp_path / "prompts.txt", leave=0.6, json=report).run()
    written = json.loads(report.read_text())
    assert 5 < written["rows"][0]["num_left"] < 25 and written["rows"][0]["num_failed"] == 0
    assert written["afterwards"] == dict(zip(serving.HELD, (0, 0, 0, 1, 4)))


def test_expressions_are_of_mixed_lengths_and_arrivals_of_a_poisson_process():
    load = serving.Load(url="", num_requests=(60,), min_ops=2, max_ops=40)
    sizes = [sum(text.count(sign) for sign in "+-*") for text in load.texts()]
    assert len(set(sizes)) > 15 and min(sizes) < 8 and max(sizes) > 32 and load.texts() == load.texts()
    waits = np.diff(arrivals(5, 2000, seed=0))
    assert waits.mean() == pytest.approx(0.2, rel=0.1) and waits.std() == pytest.approx(0.2, rel=0.1)
