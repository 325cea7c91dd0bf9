"""Tables of docs/serving.md and docs/serving-figures.md, of files of `benchmarks.batching`, `benchmarks.serving` and `decode.py eval`.

python -m experiments.serving
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from experiments import pages
from experiments.pages import Row, each, judge, markdown_table

MODEL, EVALUATION = "arithmetic-small.json", "eval.json"  # the files
PEERS = {"peers": "smollm2-135m.json", "peers_short": "smollm2-135m_short.json"}
PEER_RATES = "smollm2-135m_rates.json"
HTTP = ("http32", "http_slots256", "http_data2", "http_tensor2")  # of servers under load; sections have the names of the files
_SYSTEMS = {"scheduler": "scheduler", "scheduler, longest first": "the same, longest prompts first"}
_SYSTEMS |= {"static": "static batches, in the order of arrival", "sorted": "static batches of similar lengths"}
_MADE_BY = {"sorted": ", as `decode.py eval` has them"}
_LATENCIES = ("first_token_ms", "between_events_ms", "whole_ms")


def at_once(report: Row) -> list[Row]:
    """Return the rows of requests that are all there at once."""
    return [row for row in report["rows"] if row["requests_per_second"] is None]


def _evaluation(report: Row) -> str:
    (speed,) = report["by_batch_size"]
    cells = [f"{report['num_examples']:,}", str(speed["batch_size"]), str(speed.get("num_places", "-"))]
    cells += [f"{report['answer_accuracy']:.1%}", f"{speed['problems_per_second']:.0f}", f"{speed['response_tokens_per_second']:,.0f}"]
    head = ("expressions", "batch of the same cache", "places of the scheduler", "right", "right answers/s", "tokens/s")
    return markdown_table(head, [cells])


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


def _mixed(report: Row) -> str:
    head = ("all at once", "chunk", "requests", "seconds", "tokens/s", "right answers/s", "first tokens, ms, p50", "the whole, ms, p50")
    return markdown_table(
        head,
        [
            [
                _SYSTEMS.get(row["system"]) or row["system"],
                str(row.get("chunk_tokens", "-")),
                f"{row['num_requests']:,}",
                f"{row['seconds']:.2f}",
                f"{row['tokens_per_second']:,.0f}",
                _number(row["right_answers_per_second"], 0),
                _number(row["first_token_ms_p50"], 0),
                _number(row["whole_ms_p50"], 0),
            ]
            for row in at_once(report)
        ],
    )


def _equal(report: Row) -> str:
    head = ("sequences", "chunk", "prompt tokens at once", "static batch, tokens/s", "scheduler, tokens/s", "of static, %", "host waits, %")
    return markdown_table(head, [_equal_cells(row) for row in report.get("equal", [])])


def _equal_cells(row: Row) -> list[str]:
    rates = [f"{row[name]:,.0f}" for name in ("static_tokens_per_second", "tokens_per_second")]
    return [
        str(row["batch_size"]),
        str(row["chunk_tokens"]),
        f"{row['prefill_tokens']:,}",
        *rates,
        *(f"{100 * row[name]:.1f}" for name in ("of_static", "host_waits")),
    ]


def _stalls(report: Row) -> str:
    head = ("long prompts", "rounds", "p50", "p99", "most", "p99 with ramps", "host p50", "host p99", "its processor p99")
    return markdown_table(head, [_stalls_cells(row) for row in report.get("stalls", [])])


def _stalls_cells(row: Row) -> list[str]:
    names = ("ms_p50", "ms_p99", "ms_most", "with_ramp_ms_p99", "host_ms_p50", "host_ms_p99", "host_cpu_ms_p99")
    return [str(row["long_prompts"]), str(row["rounds"]), *(_number(row[name], 1) for name in names)]


def _at_rates(report: Row) -> str:
    return _rates([row for row in report["rows"] if row["requests_per_second"] is not None])


def _rates(rows: list[Row]) -> str:
    head = [
        "requests/s",
        "",
        "tokens/s",
        "right answers/s",
        "first tokens, ms, p50",
        "p99",
        "between events, p50",
        "p99",
        "p99/p50",
        "the whole, p50",
        "p99",
    ]
    cells = [
        [
            f"{row['requests_per_second']:g}",
            row.get("system", "HTTP"),
            f"{row['tokens_per_second']:,.0f}",
            _number(row["right_answers_per_second"], 1),
            *(cell for name in _LATENCIES for cell in _quantiles(row, name)),
        ]
        for row in sorted(rows, key=lambda row: row["requests_per_second"])
    ]
    return markdown_table(head, cells)


def _quantiles(row: Row, name: str) -> list[str]:
    p50, p99 = (row[f"{name}_{quantile}"] for quantile in ("p50", "p99"))
    return [_number(p50, 1), _number(p99, 1), *([_number(p99 / p50 if p50 else None, 2)] if name == "between_events_ms" else [])]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


SECTIONS: dict[str, tuple[str, Callable[[pages.Reports], str]]] = {  # of the pages: the file, and what is written of it
    **{
        name: (MODEL, each(write))
        for name, write in {"targets": _targets, "mixed": _mixed, "equal": _equal, "stalls": _stalls, "rates": _at_rates}.items()
    },
    "peers_rates": (PEER_RATES, each(_at_rates)),
    **{name: (f"{name}.json", each(lambda report: _rates(report["rows"]))) for name in HTTP},
    **{name: (file, each(_mixed)) for name, file in PEERS.items()},
    "eval": (EVALUATION, each(_evaluation)),
}


def sections(results: Path) -> dict[str, str]:
    """Write each section of the pages whose file there is, by its name."""
    return pages.sections_of(results, SECTIONS)


Page = pages.tables_page("docs/serving", sections)


def main(argv: list[str] | None = None) -> None:
    pages.run_command(Page, "experiments.serving", argv)


if __name__ == "__main__":
    main()
