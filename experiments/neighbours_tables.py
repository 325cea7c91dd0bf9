"""Tables of docs/neighbours-figures.md and the picture of docs/neighbours.md, of files of `experiments.neighbours`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import rebalancing
from experiments.pages import Reports, Row, conditions, markdown_table
from selfspan_jax import files

PICTURE = "quality.png"
SCORES = {"papers": ("rougeL", "ROUGE-L"), "verdicts": ("verdict_accuracy", "right verdicts, %"), "stories": ("rougeL", "ROUGE-L")}
"""What each corpus of documents is judged by, in hundredths, and what a table calls it."""
_TICKS = (1, 2, 5, 10, 20, 50, 100)
_WHOLE = ("span", "dense")
_MIB = 2**20


def sections(results: Path) -> dict[str, str]:
    """Write each section of the page whose files there are, by its name; and the picture."""
    found = {}
    for name, (patterns, write) in SECTIONS.items():
        if reports := [(file, files.read_json(file)) for pattern in patterns for file in _in_order(results.glob(f"{pattern}*.json"))]:
            found[name] = f"{write(reports)}\n\nFiles: {', '.join(f'[{file.stem}]({results.name}/{file.name})' for file, _ in reports)}."
    if panels := list(panels_of(results)):
        files.write_picture(results / PICTURE, draw(panels))
        found["picture"] = f"![quality against the share of the context read, a panel a task]({results.name}/{PICTURE})"
    return found


def _in_order(found: Iterable[Path]) -> list[Path]:
    return sorted(found, key=lambda file: [(int(part), "") if part.isdecimal() else (-1, part) for part in file.stem.split("_")])


def _told(report: Row, *more: str) -> str:
    """Say what a table is of: what, the device, versions."""
    return "; ".join([*more, conditions(report)]) + ":"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


# -------------------------------------------------------------------------------------------------------------- arithmetic


def arithmetic(reports: Reports) -> str:
    """Write the table of right answers: a row for each number of operators and system, a column for each count of rows."""
    reports = sorted(reports, key=lambda own: own[1]["arithmetic"][0]["ops"])
    every = [report["arithmetic"] for _, report in reports]
    for row in (row for rows in every for row in rows if row["tokens"] is not None):
        row["column"] = -1 if row["as_spans"] else _nearest(100 * row["tokens"] / row["context_tokens"])
    columns, table = sorted({row["column"] for rows in every for row in rows if "column" in row}), []
    for rows in every:
        for kind in dict.fromkeys(row["neighbour"] for row in rows):
            own = {row.get("column"): row for row in rows if row["neighbour"] == kind}
            cells = [_percent(own[column]["answer_accuracy"]) if column in own else "-" for column in columns]
            whole = _percent(own[None]["answer_accuracy"]) if kind in _WHOLE else "-"
            table.append([str(rows[0]["ops"]), f"`{kind}`", str(rows[0]["num_examples"]), whole, *cells])
    shares = ["as spans" if column == -1 else f"{column}%" for column in columns]
    report = reports[0][1]
    as_spans = ", ".join(f"{rows[0]['ops']} operators: {_as_spans(rows)}" for rows in every)
    told = _told(
        report, f"Right answers in percent, by the most rows that a token may read, in shares of the whole; `{report['dense']}` cut"
    )
    head = ("operators", "read by", "expressions", "uncut: right, %", *shares)
    return f"{told}\n\n{markdown_table(head, table)}\n\nRows that count as spans: {as_spans}."


def _as_spans(rows: Sequence[Row]) -> str:
    return next((str(row["tokens"]) for row in rows if row.get("as_spans")), "-")


def _nearest(share: float) -> int:
    return min(_TICKS, key=lambda tick: abs(np.log(tick / share)))


# --------------------------------------------------------------------------------------------------------------- documents


def documents(reports: Reports) -> str:
    """Write the table of scores of documents: a row for each task, system and count."""
    table = []
    for file, report in sorted(reports, key=lambda own: [*SCORES].index(_task(own[0]))):
        task = _task(file)
        score, name = SCORES[task]
        for row in report.get("documents") or report["presses"]:
            system = f"`{_system(row, report)}`"
            read = [f"{row['attended_tokens']:,.0f}", _percent(row["attended_fraction"])]
            number = f"{row.get('num_examples', report.get('num_examples', 0)):,}"
            table.append([task, system, number, *read, name.removesuffix(", %"), f"{100 * row[score]:.1f}"])
    devices = dict.fromkeys(_told(report).removesuffix(":") for _, report in reports)
    told = "; ".join(devices)
    return f"{told}:\n\n{markdown_table(('task', 'read by', 'examples', 'rows read', 'of the context, %', 'score', 'found'), table)}"


def _task(file: Path) -> str:
    return file.stem.rpartition("_")[2]


def _system(row: Row, report: Row) -> str:
    if "presses" not in report:
        return row["neighbour"]
    return "transformers" if row["neighbour"] == "dense" else f"kvpress {row['neighbour']}"


# -------------------------------------------------------------------------------------------------------------------- text

TEXT = ("read by", "rows at most", "rows read", "of the context, %", "perplexity", "loss above dense", "± (one error)")


def text(reports: Reports) -> str:
    """Write the table of losses."""
    written = []
    for _, report in reports:
        table = []
        for row in report["text"]:
            read = ["-" if row["tokens"] is None else f"{row['tokens']:,}", f"{row['attended_tokens']:,.1f}", f"{_share(row, report):.1f}"]
            loss = [f"{row['perplexity']:.2f}", f"{row['loss_more']:+.4f}", f"{row['loss_more_error']:.4f}"]
            table.append([f"`{row['neighbour']}`", *read, *loss])
        lengths = f"{report['num_texts']} texts of {report['tokens']:,} tokens, the last {report['continuation_tokens']} scored"
        written.append(f"{_told(report, '`' + report['model'] + '`', lengths)}\n\n{markdown_table(TEXT, table)}")
    return "\n\n".join(written)


def _share(row: Row, report: Row) -> float:
    return 100 * row["attended_tokens"] / (report["tokens"] - (report["continuation_tokens"] - 1) / 2)


# ------------------------------------------------------------------------------------------------------------------- speed


def speed(reports: Reports) -> str:
    """Write the table of decode steps."""
    table = []
    for _, report in reports:
        for row in report.get("documents") or report["presses"]:
            memory = [f"{row[name] / _MIB:,.0f}" if row.get(name) else "-" for name in ("cache_bytes", "peak_bytes")]
            speed = [f"{row['attended_tokens']:,.0f}", f"{row['ms_per_step']:.2f}", f"{row['tokens_per_second']:,.0f}"]
            table.append([f"`{_system(row, report)}`", str(row["batch_size"]), *speed, *memory])
    head = ("read by", "sequences", "rows read", "ms a step", "tokens/s", "cache kept, MiB", "peak, MiB")
    return f"{'; '.join(dict.fromkeys(_told(report).removesuffix(':') for _, report in reports))}:\n\n{markdown_table(head, table)}"


# -------------------------------------------------------------------------------------------------------------- rebalancing


def rebalanced(reports: Reports) -> str:
    """Write the table of rebalanced attention."""
    written = []
    for _, report in reports:
        table = markdown_table(rebalancing.HEADER, [*map(rebalancing.cells, report["rebalancing"])])
        written.append(f"{_told(report, '`' + report['model'] + '`', report['dtype'])}\n\n{table}")
    return "\n\n".join(written)


SECTIONS: Mapping[str, tuple[Sequence[str], Callable[[Reports], str]]] = {
    "arithmetic": (("arithmetic_",), arithmetic),
    "documents": (("spans_", "documents_", "presses_"), documents),
    "text": (("text",), text),
    "speed": (("speed_",), speed),
    "rebalancing": (("rebalancing_",), rebalanced),
}
"""Sections by name: what the names of their files begin with, and what writes them."""


# ----------------------------------------------------------------------------------------------------------------- picture


class Panel(NamedTuple):
    """What is drawn of one task: points (share of the context in percent, quality) of each system; those of one point are marked."""

    title: str
    quality: str
    curves: dict[str, list[tuple[float, float]]]


def panels_of(results: Path) -> Iterator[Panel]:
    """Yield a panel for each task that has results."""
    reports = {file.stem: files.read_json(file) for file in results.glob("*.json")}
    for rows in sorted((own["arithmetic"] for own in reports.values() if "arithmetic" in own), key=lambda rows: rows[0]["ops"]):
        yield Panel(f"{rows[0]['ops']} operators", "right answers, %", _curves(rows, lambda row: 100 * row["answer_accuracy"]))
    for task, (score, quality) in SCORES.items():
        named: list[Row] = []
        for kind, name in ((kind, name) for kind in ("spans", "documents", "presses") for name in sorted(reports)):
            if name.startswith(f"{kind}_") and name.endswith(f"_{task}"):
                rows = reports[name].get("documents") or reports[name]["presses"]
                named += [{**row, "neighbour": _system(row, reports[name])} for row in rows]
        curves = _curves(named, functools.partial(_hundredths, score))
        curves.pop("transformers", None)  # the same model as `dense`
        if curves:
            yield Panel(task, quality, curves)
    for report in (reports[name] for name in sorted(reports) if "text" in reports[name]):
        rows = [{**row, "attended_fraction": _share(row, report) / 100} for row in report["text"]]
        yield Panel(f"text, {report['tokens']:,} tokens", "loss above dense", _curves(rows, lambda row: row["loss_more"]))
    sparse: dict[str, list[tuple[float, float]]] = {}
    for report in map(files.read_json, sorted((results.parent / "prefill").glob("sparse_quality_*.json"))):
        for row in report["quality"]:
            name = "dense" if row["selector"] == "dense" else f"prompt: {row['selector']}"
            sparse.setdefault(name, []).append((100 * row["tiles_kept"], row["loss_more"]))
    if sparse:
        yield Panel("text, prompts read sparsely", "loss above dense", {name: sorted(points) for name, points in sparse.items()})


def _hundredths(score: str, row: Row) -> float:
    return 100 * row[score]


def _curves(rows: Sequence[Row], quality: Callable[[Row], float]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row["neighbour"], []).append((100 * row["attended_fraction"], quality(row)))
    return {name: sorted(points) for name, points in curves.items()}


def draw(panels: Sequence[Panel]) -> Any:
    """Draw quality against the share of the context read, a panel a task, all systems in the same colours."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for panel in panels for name in panel.curves if name not in _WHOLE))
    columns = min(4, len(panels))
    figure = Figure(figsize=(3.4 * columns, 2.9 * -(-len(panels) // columns) + 0.5), layout="constrained")
    every = np.ravel(figure.subplots(-(-len(panels) // columns), columns, squeeze=False))
    shown: dict[str, Any] = {}
    for axes, panel in zip(every, panels):
        for name, points in panel.curves.items():
            if name == "dense":
                shown[name] = axes.axhline(points[0][1], color="grey", linestyle="--", linewidth=1)
            elif name == "span":
                (shown["span model"],) = axes.plot(*zip(*points), "k*", markersize=10)
            else:
                line = {"kvpress": "--", "prompt:": ":"}.get(name.split()[0], "-")
                style = {"color": f"C{names.index(name)}", "linestyle": line}
                (shown[name],) = axes.plot(*zip(*points), marker="o", markersize=3, **style)
        axes.set(xscale="log", title=panel.title, ylabel=panel.quality, xlabel="of the context read, %")
        axes.set_xticks(_TICKS, [*map(str, _TICKS)])
        axes.set_xticks([], minor=True)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", fontsize=8, ncols=6)
    return figure
