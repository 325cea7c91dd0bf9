"""Report benchmarks of decode steps and of prefill: rows against their roofline and each other, as JSON, as a table and as a plot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from benchmarks import prefill
from benchmarks.shapes import Shape, step_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_row(report: dict[str, Any], shape: Shape, row: dict[str, Any]) -> None:
    """Add a measured row, ours or a peer's, compared with its roofline, with our dense row and with the peer."""
    report["rows"].append(row)
    if _milliseconds(row) is None:
        return
    if "ms_per_step" not in row:
        row |= prefill.rates(shape, row)
    elif "peer" in row:  # reads its whole cache, whatever is in it
        rows_read = row["batch_size"] * (row["context_tokens"] + row["steps"] / 2)
        row["bytes_per_step"] = step_bytes(shape.abstract(), rows_read, row["batch_size"])
    if "bytes_per_step" in row:
        row["roofline_ms"] = row["bytes_per_step"] / report["read_ceiling_terabytes_per_second"] / 1e9
        row["percent_of_roofline"] = 100 * row["roofline_ms"] / row["ms_per_step"]
    if not _is_plain(row):
        return
    for other in filter(_is_plain, report["rows"]):
        if all(other[key] == row[key] for key in ("batch_size", "context_tokens")):
            if other.get("peer") in ("hf-compiled", "hf-sdpa"):
                row["speedup_over_hf"] = _milliseconds(other) / _milliseconds(row)
            elif label(other) == "dense" + " int8" * row.get("int8", False):
                row["speedup_over_dense"] = _milliseconds(other) / _milliseconds(row)


def _is_plain(row: dict[str, Any]) -> bool:
    """Tell whether a row was measured, in one loop, of sequences that share no prompt."""
    return _milliseconds(row) is not None and row.get("num_samples", 1) == 1 and not row.get("stream")


def _milliseconds(row: dict[str, Any]) -> Any:
    """Return what a row measured: ms of a step, or of a prefill; None where it was not run."""
    return row.get("ms_per_step", row.get("time_to_first_token_ms"))


def label(row: dict[str, Any]) -> str:
    """Name what a row measured, in a few words."""
    if "peer" in row:
        return row["peer"]
    words = row["attention"] if row.get("prefill", "dense") == "dense" else f"{row['prefill']} {row['kept']:.0%}"
    words += " int8" if row["int8"] else ""
    words += " host" if row.get("kv_memory") == "host" else ""
    words += f" x{row['num_samples']} samples" if row.get("num_samples", 1) > 1 else ""
    return words + (" streamed" if row.get("stream") else "")


_TOKENS = ("tokens/s", lambda r: f"{r['tokens_per_second']:,.0f}")
_VERSUS = ("vs dense", lambda r: f"{r['speedup_over_dense']:.2f}x"), ("vs hf", lambda r: f"{r['speedup_over_hf']:.2f}x")
_KV = ("KV", lambda r: f"{r['kv_memory_bytes'] / 2**30:.2f} GiB")
_PROGRAM = (("memory", lambda r: f"{r['program_memory_bytes'] / 2**30:.1f} GiB"), ("compile", lambda r: f"{r['compile_seconds']:.0f} s"))
_STEP_COLUMNS = (
    ("ms/step", lambda r: f"{r['ms_per_step']:.3f}"),
    _TOKENS,
    ("attended", lambda r: f"{r['attended_tokens']:.0f} ({r['attended_fraction']:.1%})"),
    ("GB/step", lambda r: f"{r['bytes_per_step'] / 1e9:.2f}"),
    ("link GB/step", lambda r: f"{r['link_bytes_per_step'] / 1e9:.3f}"),
    ("roofline ms", lambda r: f"{r['roofline_ms']:.3f}"),
    ("of roofline", lambda r: f"{r['percent_of_roofline']:.0f}%"),
    *_VERSUS,
    ("mask overhead", lambda r: f"{r['overhead_fraction']:.1%}" if r["overhead_fraction"] >= 0 else "-"),
    ("first token", lambda r: f"{r['time_to_first_token_ms']:.0f} ms"),
    _KV,
    *_PROGRAM,
)
_PREFILL_COLUMNS = (
    ("first token", lambda r: f"{r['time_to_first_token_ms']:.1f} ms"),
    _TOKENS,
    ("TFLOP/s", lambda r: f"{r['model_flops_per_second'] / 1e12:.1f}"),
    ("of bf16 peak", lambda r: f"{r['percent_of_peak']:.0f}%"),
    ("allowed pairs", lambda r: f"{r['allowed_pairs']:.3g} ({r.get('allowed_fraction', 1):.1%})"),
    *_VERSUS,
    _KV,
    ("temporary", lambda r: f"{r['temporary_memory_bytes'] / 2**30:.2f} GiB"),
    *_PROGRAM,
)


def _columns(rows: list[dict[str, Any]]) -> Any:
    return _PREFILL_COLUMNS if any("allowed_pairs" in row for row in rows) else _STEP_COLUMNS


def line(row: dict[str, Any]) -> list[str]:
    """Format the cells of a row, "-" where it has no value."""
    cells = [label(row), str(row["batch_size"]), str(row["context_tokens"])]
    if "not_run" in row:
        return [*cells, f"not run: {row['not_run']}"]
    if "cost_of_streaming" in row:
        return [*cells, f"{row['ms_per_step']:.3f} ms/step, {row['cost_of_streaming']:+.1%} against one loop"]
    for _, write in _columns([row]):
        try:
            cells.append(write(row))
        except (KeyError, TypeError):
            cells.append("-")
    return cells


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows as a table in columns."""
    head = ["", "batch", "context", *(name for name, _ in _columns(rows))]
    lines = [head, *(line(row) for row in rows)]
    widths = [max(len(cells[i]) for cells in lines if len(cells) == len(head)) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)) for cells in lines)


def plot(report: dict[str, Any]) -> Figure:
    """Plot milliseconds, of a step or of a prefill, against the swept axis, batch or context; rooflines of our rows are dashed."""
    from matplotlib.figure import Figure

    rows = list(filter(_is_plain, report["rows"]))
    of_prefill = _columns(rows) is _PREFILL_COLUMNS
    contexts, batches = ({row[key] for row in rows} for key in ("context_tokens", "batch_size"))
    axis_key, axis_name, panel_key, panel_name = ("batch_size", "batch", "context_tokens", "context")
    if len(contexts) > (1 if of_prefill else len(batches)):
        axis_key, axis_name, panel_key, panel_name = (panel_key, "context, tokens", axis_key, axis_name)
    panels = sorted({row[panel_key] for row in rows})
    figure = Figure(figsize=(5.5 * max(len(panels), 1), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels):
        here = [row for row in rows if row[panel_key] == panel]
        for number, name in enumerate(dict.fromkeys(map(label, rows))):
            line = sorted((row[axis_key], _milliseconds(row), row.get("roofline_ms", math.nan)) for row in here if label(row) == name)
            if line:
                x, ms, rooflines = zip(*line)
                axes.plot(x, ms, marker="o", color=f"C{number}", label=name)
                if not name.startswith("hf"):
                    axes.plot(x, rooflines, linestyle="--", linewidth=0.9, color=f"C{number}")
        axes.set(xscale="log", xlabel=axis_name, title=f"{report['shape']}, {panel_name} {panel}")
        axes.set(**{"yscale": "log", "ylabel": "ms to the first token"} if of_prefill else {"ylim": (0, None), "ylabel": "ms per step"})
        ticks = sorted({row[axis_key] for row in here})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.legend(fontsize=8, title=f"dashed: {'operations at the bf16 peak' if of_prefill else 'roofline'}", title_fontsize=8)
    return figure
