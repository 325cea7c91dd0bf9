"""What a benchmark says: rows against the floor and against each other, as JSON, as a table and as a picture."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from benchmarks import peers as benchmark_peers
from benchmarks.decoding import (
    STREAMED_TOKENS,
    Case,
    Plan,
    Shape,
    ShapeName,
    compile_all,
    has_own_labels,
    named_shape,
    segment_tokens,
    step_bytes,
    sweep,
)
from benchmarks.timing import header_line, report_header
from selfspan_jax.lm import SpanLM
from selfspan_jax.parallel.mesh import describe
from selfspan_jax.spans import SpanVocab


def run(
    plan: Plan,
    name: str,
    lm: SpanLM | None,
    arithmetic_vocab: SpanVocab,
    arithmetic_tokens: Callable[[int, int, int], Int[np.ndarray, "B T"]],
    save: Callable[[dict[str, Any]], None] | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Measures a plan, peers first, and returns the report; prints each row as it comes.

    Args:
      name: of the shape, which is measured with random weights, or of the model given.
      lm: the model to measure.
      arithmetic_vocab: structural ids of the arithmetic vocabulary.
      arithmetic_tokens: oracle examples of that vocabulary, by batch size, tokens and how many of the last are response.
      save: is called with the report after each row.

    Raises: ValueError for a plan that the model cannot follow.
    """
    model = lm.model if lm else None
    if model:
        shape = Shape(model.config, model.vocab, model.vocab_size)
        plan = plan.within(model.config.max_context_tokens)
        workload = plan.workload or ("arithmetic" if model.vocab == arithmetic_vocab else "segments")
        if workload == "arithmetic" and model.vocab != arithmetic_vocab:
            raise ValueError("workload is 'arithmetic', but the model has another vocabulary; allowed: segments")
    else:
        shape_name = cast(ShapeName, name)
        own = has_own_labels(shape_name)
        workload = plan.workload or ("arithmetic" if own else "segments")
        plan = plan.within(None)
        shape = named_shape(shape_name, arithmetic_vocab if own or workload == "arithmetic" else None)
        shape = shape.with_context(max(plan.context) + plan.steps // 2 + STREAMED_TOKENS)

    @functools.lru_cache(maxsize=2)
    def draw(batch_size: int, num_tokens: int):
        if workload == "arithmetic":
            return arithmetic_tokens(batch_size, num_tokens, plan.steps)
        size = {"batch_size": batch_size, "num_tokens": num_tokens, "steps": plan.steps, "seed": plan.seed}
        return segment_tokens(shape, attended_fraction=plan.attended_fraction, **size)

    mesh = plan.devices(shape.config)
    draw(1, min(plan.context) + plan.steps // 2)  # what cannot be had is said before anything is measured
    report = header(name, shape, workload=workload, plan=dataclasses.asdict(plan))
    print(header_line(report, describe(mesh)), flush=True)

    def add(row: dict[str, Any]) -> None:
        add_row(report, shape, row)
        tqdm.write("  ".join(line(row)))
        sys.stdout.flush()
        if save:
            save(report)

    with contextlib.ExitStack() as stack:
        peers = None
        if plan.peers and (reason := benchmark_peers.missing_reason()):
            print(f"peers not run: {reason}", flush=True)
        elif plan.peers:
            config = dataclasses.asdict(shape.config)
            peers = stack.enter_context(benchmark_peers.Peers(config, shape.vocab_size, plan.peer_cases, plan.seed))
        compiled = compile_all(shape, plan.cases, mesh)  # beside the peers' own compilation
        for row in peers.rows() if peers else ():
            report["versions"] |= row.pop("versions")
            add(row)

    def tokens_of(case: Case):
        return draw(case.batch_size, case.num_tokens)

    options: dict[str, Any] = {"seed": plan.seed, "stream": plan.stream_check, "profile": plan.profile, "mesh": mesh, "compiled": compiled}
    for row in sweep(shape, plan.cases, tokens_of, model=model, **options):
        add(row)
    if picture:
        plot(report, picture)
    return report


def header(name: str, shape: Shape, **settings: Any) -> dict[str, Any]:
    """A report without rows: the device, its read ceiling (measured here), versions, the shape and the settings of the run."""
    return {
        "shape": name,
        **report_header(),
        **settings,
        "model": dataclasses.asdict(shape.config),
        "vocab_size": shape.vocab_size,
        "rows": [],
    }


def add_row(report: dict[str, Any], shape: Shape, row: dict[str, Any]) -> None:
    """Adds a measured row, ours or a peer's, and compares it: with its floor, our own dense row, and the compiled peer."""
    if "ms_per_step" in row:
        if "peer" in row:  # reads every row of its cache, whatever is in it
            rows_read = row["batch_size"] * (row["context_tokens"] + row["steps"] / 2)
            row["bytes_per_step"] = step_bytes(shape.abstract(), rows_read, row["batch_size"])
        if "bytes_per_step" in row:
            row["floor_ms"] = row["bytes_per_step"] / report["read_ceiling_terabytes_per_second"] / 1e9
            row["percent_of_floor"] = 100 * row["floor_ms"] / row["ms_per_step"]
        for name, other in (("speedup_over_dense", _find(report, row, attention="dense")), ("speedup_over_hf", _find(report, row))):
            if other:
                row[name] = other["ms_per_step"] / row["ms_per_step"]
    report["rows"].append(row)


def _find(report: dict[str, Any], row: dict[str, Any], attention: str | None = None) -> dict[str, Any] | None:
    """The measured row of the same batch and context: of a policy with the same weights, or the compiled peer's."""
    if row.get("num_samples", 1) > 1 or row.get("stream"):
        return None
    for other in [*report["rows"], row]:
        alike = all(other[key] == row[key] for key in ("batch_size", "context_tokens")) and "ms_per_step" in other
        if not alike or other.get("num_samples", 1) > 1 or other.get("stream"):
            continue
        if attention and other.get("attention") == attention and other["int8"] == row.get("int8"):
            return other
        if not attention and other.get("peer") == "hf-compiled":
            return other
    return None


def label(row: dict[str, Any]) -> str:
    """What a row measured, in a few words."""
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
    ("floor ms", lambda r: f"{r['floor_ms']:.3f}"),
    ("of floor", lambda r: f"{r['percent_of_floor']:.0f}%"),
    ("vs dense", lambda r: f"{r['speedup_over_dense']:.2f}x"),
    ("vs hf", lambda r: f"{r['speedup_over_hf']:.2f}x"),
    ("upkeep", lambda r: f"{r['upkeep_fraction']:.1%}"),
    ("first token", lambda r: f"{r['time_to_first_token_ms']:.0f} ms"),
    ("KV", lambda r: f"{r['kv_memory_bytes'] / 2**30:.2f} GiB"),
    ("memory", lambda r: f"{r['program_memory_bytes'] / 2**30:.1f} GiB"),
    ("compile", lambda r: f"{r['compile_seconds']:.0f} s"),
)


def line(row: dict[str, Any]) -> list[str]:
    """The cells of a row; "-" for what it does not have."""
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
    """Rows under a head, in columns."""
    head = ["", "batch", "context", *(name for name, _ in _COLUMNS)]
    lines = [head, *(line(row) for row in rows)]
    widths = [max(len(cells[i]) for cells in lines if len(cells) == len(head)) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)) for cells in lines)


def plot(report: dict[str, Any], file: Path) -> None:
    """Milliseconds per step against what was swept, batch or context; the floors of our rows are drawn dashed."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if "ms_per_step" in row and row.get("num_samples", 1) == 1 and not row.get("stream")]
    contexts, batches = ({row[key] for row in rows} for key in ("context_tokens", "batch_size"))
    axis_key, axis_name, panel_key, panel_name = ("batch_size", "batch", "context_tokens", "context")
    if len(contexts) > len(batches):
        axis_key, axis_name, panel_key, panel_name = (panel_key, "context, tokens", axis_key, axis_name)
    panels = sorted({row[panel_key] for row in rows})
    figure = Figure(figsize=(5.5 * max(len(panels), 1), 4.2), layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        here = [row for row in rows if row[panel_key] == panel]
        for number, name in enumerate(dict.fromkeys(map(label, rows))):
            line = sorted((row[axis_key], row["ms_per_step"], row["floor_ms"]) for row in here if label(row) == name)
            if line:
                x, ms, floors = zip(*line)
                axes.plot(x, ms, marker="o", color=f"C{number}", label=name)
                if not name.startswith("hf"):
                    axes.plot(x, floors, linestyle="--", linewidth=0.9, color=f"C{number}")
        axes.set(xscale="log", xlabel=axis_name, ylabel="ms per step", ylim=(0, None), title=f"{report['shape']}, {panel_name} {panel}")
        ticks = sorted({row[axis_key] for row in here})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.legend(fontsize=8, title="dashed: byte floor", title_fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
