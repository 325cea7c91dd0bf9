"""The tables of docs/serving.md: each cell is of its file, and what was not run stays as it is."""

import json

from experiments import serving

HEADER = {"device": "H100", "versions": {"jax": "0.11.2"}}
LATENCIES = {f"{name}_ms_{q}": 1.25 for name in ("first_token", "between_events", "whole") for q in ("p50", "p99")}


def row(system, right, rate=None):
    return {"system": system, "requests_per_second": rate, "num_requests": 1024, "seconds": 2.5, "tokens_per_second": 4e5} | {
        "right_answers_per_second": right, **LATENCIES
    }  # fmt: skip


STALLS = {"streams": 32, "rounds": 370, "ms_p50": 4.0, "ms_p99": 12.4, "ms_most": 13.0, "p99_of_p50": 3.1, "with_ramp_ms_p99": 14.0}
STALLS |= {"host_ms_p50": 2.0, "host_ms_p99": 9.0, "host_cpu_ms_p99": 3.0}
EQUAL = {
    "batch_size": 256,
    "defaults": False,
    "chunk_tokens": 32,
    "prefill_tokens": 4096,
    "static_tokens_per_second": 1e6,
    "tokens_per_second": 9.1e5,
}
EQUAL |= {"of_static": 0.91, "host_waits": 0.25}
REPORT = HEADER | {
    "rows": [row("scheduler", 500.0), row("static", 240.0), row("sorted", 400.0), row("scheduler", 450.0)],
    "first": {"first_token_ms_most": 6.1},
    "stalls": [STALLS | {"long_prompts": 0}, STALLS | {"long_prompts": 36}],
    "equal": [EQUAL],
}


def cells(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]


def test_targets_are_judged_by_the_figures_of_the_same_run(tmp_path):
    rates = [row("static", 20.0, 100.0), row("scheduler", 90.0, 100.0)]
    (tmp_path / serving.MODEL).write_text(json.dumps(REPORT))
    (tmp_path / serving.MODEL_RATES).write_text(json.dumps(REPORT | {"rows": [*REPORT["rows"], *rates]}))
    found = serving.sections(tmp_path)
    assert [(own[2], own[3]) for own in cells(found["targets"])] == [
        ("91.0", "yes"), ("2.08", "yes"), ("1.25", "**no**"), ("3.10", "**no**"), ("6.1", "yes")
    ]  # fmt: skip
    assert found["mixed"].startswith(f"H100, JAX 0.11.2 ([JSON]({tmp_path.name}/{serving.MODEL}))")
    assert [own[5] for own in cells(found["mixed"])] == ["500", "240", "400", "450"]
    assert [own[:4] for own in cells(found["rates"])] == [["100", "static", "400,000", "20.0"], ["100", "scheduler", "400,000", "90.0"]]
    assert cells(found["rates"])[0][6:9] == ["1.2", "1.2", "1.00"]  # between events: p50, p99, and the one over the other
    assert [own[0] for own in cells(found["stalls"])] == ["0", "36"] and cells(found["equal"])[0][-2:] == ["91.0", "25.0"]
    assert set(found) == {"targets", "mixed", "equal", "stalls", "rates"}  # of the other files nothing is known
