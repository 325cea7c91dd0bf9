"""Report decode benchmarks: rows against their roofline and against each other, as JSON, as a table and as a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.shapes import Shape, step_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_row(report: dict[str, Any], shape: Shape, row: dict[str, Any]) -> None:
    """Add a measured row, ours or a peer's, compared with its roofline, with our dense row and with the compiled peer."""
    report["rows"].append(row)
    if "ms_per_step" not in row:
        return
    if "peer" in row:  # reads its whole cache, whatever is in it
        rows_read = row["batch_size"] * (row["context_tokens"] + row["steps"] / 2)
        row["bytes_per_step"] = step_bytes(shape.abstract(), rows_read, row["batch_size"])
    if "bytes_per_step" in row:
        row["floor_ms"] = row["bytes_per_step"] / report["read_ceiling_terabytes_per_second"] / 1e9
        row["percent_of_floor"] = 100 * row["floor_ms"] / row["ms_per_step"]
    if not _is_plain(row):
        return
    for other in filter(_is_plain, report["rows"]):
        if all(other[key] == row[key] for key in ("batch_size", "context_tokens")):
            if other.get("peer") == "hf-compiled":
                row["speedup_over_hf"] = other["ms_per_step"] / row["ms_per_step"]
            elif other.get("attention") == "dense" and other["int8"] == row.get("int8"):
                row["speedup_over_dense"] = other["ms_per_step"] / row["ms_per_step"]


def _is_plain(row: dict[str, Any]) -> bool:
    """Tell whether a row was measured, in one loop, of sequences that share no prompt."""
    return "ms_per_step" in row and row.get("num_samples", 1) == 1 and not row.get("stream")


def label(row: dict[str, Any]) -> str:
    """Name what a row measured, in a few words."""
    if "peer" in row:
        return row["peer"]
    words = row["attention"] + (" int8" if row["int8"] else "")
    words += f" x{row['num_samples']} samples" if row["num_samples"] > 1 else ""
    return words + (" streamed" if row.get("stream") else "")


_COLUMNS = (
    ("ms/step", lambda r: f"{r['ms_per_step']:.3f}"),
    ("tokens/s", lambda r: f"{r['tokens_per_second']:,.0f}"),
    ("attended", lambda r: f"{r['attended_tokens']:.0f} ({r['attended_fraction']:.1%})"),
    ("GB/step", lambda r: f"{r['bytes_per_step'] / 1e9:.2f}"),
    ("roofline ms", lambda r: f"{r['floor_ms']:.3f}"),
    ("of roofline", lambda r: f"{r['percent_of_floor']:.0f}%"),
    ("vs dense", lambda r: f"{r['speedup_over_dense']:.2f}x"),
    ("vs hf", lambda r: f"{r['speedup_over_hf']:.2f}x"),
    ("mask overhead", lambda r: f"{r['upkeep_fraction']:.1%}"),
    ("first token", lambda r: f"{r['time_to_first_token_ms']:.0f} ms"),
    ("KV", lambda r: f"{r['kv_memory_bytes'] / 2**30:.2f} GiB"),
    ("memory", lambda r: f"{r['program_memory_bytes'] / 2**30:.1f} GiB"),
    ("compile", lambda r: f"{r['compile_seconds']:.0f} s"),
)


def line(row: dict[str, Any]) -> list[str]:
    """Format the cells of a row, "-" where it has no value."""
    cells = [label(row), str(row["batch_size"]), str(row["context_tokens"])]
    if "not_run" in row:
        return [*cells, f"not run: {row['not_run']}"]
    if "cost_of_streaming" in row:
        return [*cells, f"{row['ms_per_step']:.3f} ms/step, {row['cost_of_streaming']:+.1%} against one loop"]
    for _, write in _COLUMNS:
        try:
            cells.append(write(row))
        except (KeyError, TypeError):
            cells.append("-")
    return cells


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows as a table in columns."""
    head = ["", "batch", "context", *(name for name, _ in _COLUMNS)]
    lines = [head, *(line(row) for row in rows)]
    widths = [max(len(cells[i]) for cells in lines if len(cells) == len(head)) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)) for cells in lines)


def plot(report: dict[str, Any]) -> Figure:
    """Plot milliseconds per step against the swept axis, batch or context; the rooflines of our rows are dashed."""
    from matplotlib.figure import Figure

    rows = list(filter(_is_plain, report["rows"]))
    contexts, batches = ({row[key] for row in rows} for key in ("context_tokens", "batch_size"))
    axis_key, axis_name, panel_key, panel_name = ("batch_size", "batch", "context_tokens", "context")
    if len(contexts) > len(batches):
        axis_key, axis_name, panel_key, panel_name = (panel_key, "context, tokens", axis_key, axis_name)
    panels = sorted({row[panel_key] for row in rows})
    figure = Figure(figsize=(5.5 * max(len(panels), 1), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels):
        here = [row for row in rows if row[panel_key] == panel]
        for number, name in enumerate(dict.fromkeys(map(label, rows))):
            line = sorted((row[axis_key], row["ms_per_step"], row["floor_ms"]) for row in here if label(row) == name)
            if line:
                x, ms, rooflines = zip(*line)
                axes.plot(x, ms, marker="o", color=f"C{number}", label=name)
                if not name.startswith("hf"):
                    axes.plot(x, rooflines, linestyle="--", linewidth=0.9, color=f"C{number}")
        axes.set(xscale="log", xlabel=axis_name, ylabel="ms per step", ylim=(0, None), title=f"{report['shape']}, {panel_name} {panel}")
        ticks = sorted({row[axis_key] for row in here})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.legend(fontsize=8, title="dashed: roofline", title_fontsize=8)
    return figure
