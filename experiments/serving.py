"""Tables of docs/serving.md and docs/serving-figures.md, of files of `benchmarks.batching`, `benchmarks.serving` and `decode.py eval`.

python -m experiments.serving
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

from experiments import pages
from experiments.pages import Columns, Row, each, judge, markdown_table, rows_table, value

MODEL, MODEL_RATES, EVALUATION = "arithmetic-small.json", "arithmetic-small_rates.json", "eval.json"  # the files
PEERS = {"peers": "smollm2-135m.json", "peers_short": "smollm2-135m_short.json"}
PEER_RATES = "smollm2-135m_rates.json"
# Of servers under load; sections have the names of the files.
HTTP = (
    *("http_defaults", "http_defaults_long", "http_chunk16", "http_chunk16_long", "http_slots256", "http_smollm2"),
    *("http_data2", "http_tensor2", "http_data2_tensor2"),
)
_SYSTEMS = {"scheduler": "scheduler", "scheduler, longest first": "the same, longest prompts first"}
_SYSTEMS |= {"static": "static batches, in the order of arrival", "sorted": "static batches of similar lengths"}
_MADE_BY = {"sorted": ", as `decode.py eval` has them"}


def at_once(report: Row) -> list[Row]:
    """Return the rows of requests that are all there at once."""
    return [row for row in report["rows"] if row["requests_per_second"] is None]


_EVALUATION = (
    ("expressions", value("num_examples", ",")),
    ("batch of the same cache", value("batch_size")),
    ("places of the scheduler", value("num_places")),
    ("right", value("answer_accuracy", ".1%")),
    ("right answers/s", value("problems_per_second", ".0f")),
    ("tokens/s", value("response_tokens_per_second", ",.0f")),
)
_MIXED = (
    ("all at once", lambda row: _SYSTEMS.get(row["system"]) or row["system"]),
    ("chunk", value("chunk_tokens")),
    ("requests", value("num_requests", ",")),
    ("seconds", value("seconds", ".2f")),
    ("tokens/s", value("tokens_per_second", ",.0f")),
    ("right answers/s", value("right_answers_per_second", ",.0f")),
    ("first tokens, ms, p50", value("first_token_ms_p50", ",.0f")),
    ("the whole, ms, p50", value("whole_ms_p50", ",.0f")),
)
_EQUAL = (
    ("sequences", value("batch_size")),
    ("chunk", value("chunk_tokens")),
    ("prompt tokens at once", value("prefill_tokens", ",")),
    ("static batch, tokens/s", value("static_tokens_per_second", ",.0f")),
    ("scheduler, tokens/s", value("tokens_per_second", ",.0f")),
    ("of static, %", value("of_static", ".1f", 100)),
    ("host waits, %", value("host_waits", ".1f", 100)),
)
_STALLS = (
    ("long prompts", value("long_prompts")),
    ("rounds", value("rounds")),
    *((head, value(key, ",.1f")) for head, key in (("p50", "ms_p50"), ("p99", "ms_p99"), ("most", "ms_most"))),
    ("p99 with ramps", value("with_ramp_ms_p99", ",.1f")),
    ("host p50", value("host_ms_p50", ",.1f")),
    ("host p99", value("host_ms_p99", ",.1f")),
    ("its processor p99", value("host_cpu_ms_p99", ",.1f")),
)
_RATES = (
    ("requests/s", value("requests_per_second", "g")),
    ("", lambda row: row.get("system", "HTTP")),
    ("tokens/s", value("tokens_per_second", ",.0f")),
    ("right answers/s", value("right_answers_per_second", ",.1f")),
    ("first tokens, ms, p50", value("first_token_ms_p50", ",.1f")),
    ("p99", value("first_token_ms_p99", ",.1f")),
    ("between events, p50", value("between_events_ms_p50", ",.1f")),
    ("p99", value("between_events_ms_p99", ",.1f")),
    ("p99/p50", lambda row: f"{row['between_events_ms_p99'] / p50:.2f}" if (p50 := row["between_events_ms_p50"]) else "-"),
    ("the whole, p50", value("whole_ms_p50", ",.1f")),
    ("p99", value("whole_ms_p99", ",.1f")),
)


def _targets(report: Row) -> str:
    rows = []
    systems = {row["system"]: row for row in at_once(report)[::-1]}  # the first of each, which has the chunks of `throughput_scheduler`
    for row in {row["defaults"]: row for row in sorted(report.get("equal", [])[::-1], key=lambda row: row["defaults"])}.values():
        what = "a server's defaults" if row["defaults"] else "many places"
        target = f"tokens/s at saturation, % of one static batch of {row['batch_size']} ({what})"
        rows.append(judge(target, "90", f"{100 * row['of_static']:.1f}", reached=row["of_static"] >= 0.9))
    for others, name in itertools.product(("static", "sorted"), ("scheduler", "scheduler, longest first")):
        if name in systems and others in systems:
            ratio = systems[name]["right_answers_per_second"] / systems[others]["right_answers_per_second"]
            longest = ", longest prompts first" if "longest" in name else ""
            target = f"right answers/s on 2 to 200 operators{longest}, times those of {_SYSTEMS[others]}{_MADE_BY.get(others, '')}"
            rows.append(judge(target, "2", f"{ratio:.2f}", reached=ratio >= 2))
    for row in report.get("stalls", []):
        if row["long_prompts"]:
            target = "time between deliveries while prompts of some 1,970 tokens arrive, p99 over p50"
            rows.append(judge(target, "3", f"{row['p99_of_p50']:.2f}", reached=row["p99_of_p50"] <= 3))
    if found := report.get("first"):
        most = found["first_token_ms_most"]
        rows.append(judge("first tokens of a short expression, ms, most of 20", "50", f"{most:.1f}", reached=most <= 50))
    return markdown_table(pages.TARGETS, rows)


def _rates(rows: Iterable[Row]) -> str:
    return rows_table(sorted(rows, key=lambda row: row["requests_per_second"]), _RATES)


def _at_rates(report: Row) -> str:
    return _rates(row for row in report["rows"] if row["requests_per_second"] is not None)


def _table(columns: Columns, rows: Callable[[Row], Iterable[Row]]) -> Callable[[pages.Reports], str]:
    return each(lambda report: rows_table(rows(report), columns))


SECTIONS: dict[str, tuple[str, Callable[[pages.Reports], str]]] = {  # of the pages: the file, and what is written of it
    "targets": (MODEL, each(_targets)),
    "mixed": (MODEL, _table(_MIXED, at_once)),
    "equal": (MODEL, _table(_EQUAL, lambda report: report.get("equal", []))),
    "stalls": (MODEL, _table(_STALLS, lambda report: report.get("stalls", []))),
    "rates": (MODEL_RATES, each(_at_rates)),
    "peers_rates": (PEER_RATES, each(_at_rates)),
    **{name: (f"{name}.json", each(lambda report: _rates(report["rows"]))) for name in HTTP},
    **{name: (file, _table(_MIXED, at_once)) for name, file in PEERS.items()},
    "eval": (EVALUATION, _table(_EVALUATION, lambda report: [report | report["by_batch_size"][0]])),
}


def sections(results: Path) -> dict[str, str]:
    """Write each section of the pages whose file there is, by its name."""
    return pages.sections_of(results, SECTIONS)


Page = pages.tables_page("docs/serving", sections)


def main(argv: list[str] | None = None) -> None:
    pages.run_command(Page, argv)


if __name__ == "__main__":
    main()
