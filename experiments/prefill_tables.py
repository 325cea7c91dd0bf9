"""Tables of docs/prefill-figures.md, each of the JSON files of one command: their names, what they have, and the cells made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pages import Reports, Row, conditions, each, link, markdown_table, sections_of, shown
from selfspan_jax import files

Writer = Callable[[Reports], str]
PLOT = "sparse_quality.png"
SCORES = (
    "answer_accuracy",
    "step_accuracy",
    "span_accuracy",
    "rougeL",
    "section_named",
    "span_recall",
    "all_facts_right",
)  # where a task has them
_GIB = 2**30


def sections(results: Path) -> dict[str, str]:
    """Write each section of the pages whose files there are, by its name."""
    return sections_of(results, SECTIONS)


def _each(head: tuple[str, ...], rows: Callable[[Row], list[list[str]]]) -> Writer:
    """Write one table for each report."""
    return each(lambda report: markdown_table(head, rows(report)))


def _joined(head: tuple[str, ...], key: str, cells: Callable[[Row], list[str]], *, name: str) -> Writer:
    """Write one table of the rows of all reports; of those of the same settings, as dense prefill has in each, the first."""

    def write(reports: Reports) -> str:
        unique: dict[tuple[Any, ...], Row] = {}
        for _, report in reports:
            for row in report[key]:
                unique.setdefault(tuple(row.get(part) for part in ("tokens", "context_tokens", *_SETTINGS)), row)
        links: dict[str, list[str]] = {}
        for file, report in reports:
            links.setdefault(conditions(report, str(report.get(name))), []).append(link(file))
        told = "\n\n".join(f"{words} ({', '.join(files)})" for words, files in links.items())
        return f"{told}:\n\n{markdown_table(head, [cells(row) for row in unique.values()])}"

    return write


_SETTINGS = ("selector", "threshold", "prefill", "kept")


# ---------------------------------------------------------------------------------------------------------- dense prefill

FIRST_TOKEN = ("policy", "batch", "tokens", "first token, ms", "tokens/s", "TFLOP/s", "of the peak", "allowed pairs", "cache, GiB")
DECODING = ("policy", "batch", "context", "attended tokens", "ms a step", "of the roofline", "first token, ms", "cache, GiB", "memory, GiB")
PEERS = {"hf-sdpa": "transformers, SDPA"}


def _first_tokens(report: Row) -> list[list[str]]:
    return [[*first_token_cells(row), shown(row, "program_memory_bytes", ".1f", 1 / _GIB)] for row in report["rows"]]


def first_token_cells(row: Row) -> list[str]:
    policy = PEERS[row["peer"]] if "peer" in row else row["attention"]
    first = [policy, f"{row['batch_size']:,}", f"{row['context_tokens']:,}"]
    if "not_run" in row:
        return [*first, f"not run: {row['not_run']}", *["-"] * (len(FIRST_TOKEN) - len(first) - 1)]
    speed = f"{row['time_to_first_token_ms']:,.1f}", f"{row['tokens_per_second']:,.0f}", f"{row['model_flops_per_second'] / 1e12:.0f}"
    pairs = f"{row.get('allowed_fraction', 1):.1%}"
    return [*first, *speed, shown(row, "percent_of_peak", ".0f") + "%", pairs, shown(row, "kv_memory_bytes", ".2f", 1 / _GIB)]


def _steps(report: Row) -> list[list[str]]:
    cells = []
    for row in report["rows"]:
        first = [row["attention"], f"{row['batch_size']:,}", f"{row['context_tokens']:,}"]
        if "not_run" in row:
            cells.append([*first, f"not run: {row['not_run']}", *["-"] * (len(DECODING) - len(first) - 1)])
            continue
        step = f"{row['attended_tokens']:,.0f}", f"{row['ms_per_step']:.3f}", f"{row['percent_of_roofline']:.0f}%"
        memory = (shown(row, key, ".1f", 1 / _GIB) for key in ("kv_memory_bytes", "program_memory_bytes"))
        cells.append([*first, *step, f"{row['time_to_first_token_ms']:,.0f}", *memory])
    return cells


IMPLEMENTATIONS = ("mosaic", "triton", "cudnn", "reference")


def _attention(report: Row) -> list[list[str]]:
    lines = []
    for shape in report["shapes"]:
        own = {case["implementation"]: case for case in report["cases"] if case["shape"] == shape["name"]}
        heads = f"N {shape['num_heads']}, K {shape['num_kv_heads']}, H {shape['head_size']}"
        heads += ", float16" if report.get("dtype") == "float16" else ""
        prompts = f"{shape['batch_size']} of {shape['num_queries']:,}" + (f" at {shape['first_query']:,}" if shape["first_query"] else "")
        speeds = [shown(own.get(name, {}), "flops_per_second", ".3g", 1e-12) for name in IMPLEMENTATIONS]
        errors = [shown(own.get(name, {}), "relative_error", ".1e") for name in IMPLEMENTATIONS[:3]]
        lines.append([shape["mask"], prompts, heads, *speeds, *errors])
    return lines


def _many_rows(report: Row) -> list[list[str]]:
    """One line for each map: the kernel as models run it beside XLA's program."""
    maps: dict[tuple[Any, ...], list[Row]] = {}
    for case in report["cases"]:
        maps.setdefault((case["map"], case["shape"], case["rows"]), []).append(case)
    lines = []
    for (name, shape, rows), cases in maps.items():
        (xla,) = (case for case in cases if case["variant"] == "xla")
        own = next((case for case in cases if case.get("taken")), None)
        kernel = ["-"] * 3 if own is None else [own["variant"], f"{own['microseconds']:,.0f}", f"{own['flops_per_second'] / 1e12:.0f}"]
        lines.append([name, shape, f"{rows:,}", f"{xla['microseconds']:,.0f}", f"{xla['flops_per_second'] / 1e12:.0f}", *kernel])
    return lines


# --------------------------------------------------------------------------------------------------------- sparse prefill

TASK = ("prompt tokens", "prefill", "threshold", "tiles read", "retained mass, mean", "least")
QUALITY = ("tokens", *TASK[1:], "perplexity", "loss above dense")
_KINDS = ("attention", "matrix products", "the rest")
_KINDS_MS = tuple(f"{kind}, ms" for kind in _KINDS)
SPEED = ("tokens", "prefill", "tiles before the diagonal", "mass, mean", "first token, ms", "spread, ms", "runs", "times dense", *_KINDS_MS)
_QUALITY_NAMES = {"sample": "sample 2", "sample-1": "sample 1"}  # of what benchmarks call otherwise


def _kept_cells(row: Row) -> list[str]:
    threshold = "" if row["threshold"] is None else f"{row['threshold']:g}{' tiles' if row['selector'] == 'window' else ''}"
    mass = f"{row['retained_mass_mean']:.1%}", f"{row['retained_mass_min']:.2%}"
    return [f"{row['tokens']:,}", row["selector"], threshold, f"{row['tiles_kept']:.1%}", *mass]


def quality_cells(row: Row) -> list[str]:
    loss = "" if row["selector"] == "dense" else f"{row['loss_more']:+.4f} ± {row['loss_more_error']:.4f}"
    return [*_kept_cells(row), f"{row['perplexity']:.3f}", loss]


def task_cells(row: Row) -> list[str]:
    return [*_kept_cells(row), *(f"{row[score]:.1%}" for score in SCORES if score in row)]


def _speed(reports: Reports) -> str:
    """Write the speeds, and beside each share of the tiles the mass that the selector retained where it chose as many on real text."""
    measured = [row for file in sorted(reports[0][0].parent.glob("sparse_quality_*.json")) for row in files.read_json(file)["quality"]]

    def cells(row: Row) -> list[str]:
        kind = str(_QUALITY_NAMES.get(row["prefill"], row["prefill"]))
        alike = (each for each in measured if each["selector"] == kind and abs(each["tiles_kept"] - row["kept"]) < 0.006)
        mass = "100.0%" if kind == "dense" else shown(next(alike, {}), "retained_mass_mean", ".1%")
        first = [f"{row['context_tokens']:,}", kind, f"{row['kept']:.0%}", mass]
        if "not_run" in row:
            return [*first, f"not run: {row['not_run']}", *["-"] * (len(SPEED) - len(first) - 1)]
        parts = [shown(row.get("device_ms_by_kind", {}), each, ",.0f") for each in _KINDS]
        times = f"{row['time_to_first_token_ms']:,.0f}", shown(row, "spread_ms", ",.0f"), shown(row, "repetitions", ".0f")
        return [*first, *times, shown(row, "speedup_over_dense", ".2f"), *parts]

    return _joined(SPEED, "rows", cells, name="shape")(reports)


def _quality(reports: Reports) -> str:
    rows = [row for _, report in reports for row in report["quality"]]
    directory = reports[0][0].parent
    files.write_picture(directory / PLOT, draw(rows))
    plot = f"![Loss above dense prefill against the share of tiles read]({directory.name}/{PLOT})"
    return f"{_joined(QUALITY, 'quality', quality_cells, name='model')(reports)}\n\n{plot}"


def _tasks(reports: Reports) -> str:
    """Write one table for each model: their tasks have different scores."""
    models = dict.fromkeys(report["model"] for _, report in reports)
    texts = []
    for model in models:
        own = [(file, report) for file, report in reports if report["model"] == model]
        scores = tuple(score.replace("_", " ") for score in SCORES if score in own[0][1]["tasks"][0])
        texts.append(_joined((*TASK, *scores), "tasks", task_cells, name="model")(own))
    return "\n\n".join(texts)


def draw(rows: list[Row]) -> Any:
    """Draw the loss above dense prefill against the share of tiles read, a panel for each length."""
    from matplotlib.figure import Figure

    lengths = sorted({row["tokens"] for row in rows})
    figure = Figure(figsize=(4.2 * len(lengths), 3.2), layout="constrained")
    for axes, tokens in zip(np.ravel(figure.subplots(1, len(lengths), squeeze=False)), lengths):
        here = [row for row in rows if row["tokens"] == tokens and row["selector"] != "dense"]
        for number, kind in enumerate(dict.fromkeys(row["selector"] for row in here)):
            own = sorted((row for row in here if row["selector"] == kind), key=lambda row: row["tiles_kept"])
            kept, loss, error = ([row[key] for row in own] for key in ("tiles_kept", "loss_more", "loss_more_error"))
            axes.errorbar(100 * np.array(kept), loss, yerr=np.nan_to_num(error), marker="o", color=f"C{number}", label=kind)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set(xlabel="tiles read, % of dense", ylabel="loss above dense", title=f"{tokens:,} tokens")
        axes.legend(fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------------------- training

TRAINING = ("row, tokens", "rows", "mask", "attention", "ms a step", "tokens/s", "MFU", "memory, GB", *_KINDS_MS)


def _training(reports: Reports) -> str:
    texts = []
    for file, report in reports:
        lines = []
        for length in report["lengths"]:
            for name, own in length["attention"].items():
                taken = f"{name} (taken)" if name == length["training_takes"] else name
                first = [
                    f"{length['sequence_tokens']:,}",
                    str(length["batch_size"]),
                    f"{length['mask']}, remat" if length.get("remat") else length["mask"],
                    taken,
                ]
                if "not_run" in own:
                    lines.append([*first, f"not run: {own['not_run']}", "-", "-", f"{own['memory_gb']:.1f}", *["-"] * len(_KINDS)])
                    continue
                speed = f"{own['ms_per_step']:.1f}", f"{own['tokens_per_second']:,.0f}", shown(own, "mfu", ".1%")
                kinds = [shown(own["device_ms_by_kind"], kind, ".1f") for kind in _KINDS]
                lines.append([*first, *speed, f"{own['memory_gb']:.1f}", *kinds])
        told = conditions(report["lengths"][0], report["shape"], f"{report['step_tokens']:,} tokens a step")
        texts.append(f"{told} ({link(file)}):\n\n{markdown_table(TRAINING, lines)}")
    return "\n\n".join(texts)


_FIRST = _each((*FIRST_TOKEN, "program, GiB"), _first_tokens)
_MANY_ROWS = ("map", "shape", "rows", "XLA, us", "XLA, TFLOP/s", "kernel", "kernel, us", "kernel, TFLOP/s")
_ERRORS = tuple(f"error, {name}" for name in IMPLEMENTATIONS[:3])
SECTIONS: dict[str, tuple[str, Writer]] = {  # of the page: the files, and what is written of them
    "attention": ("prompt_attention*.json", _each(("mask", "prompts", "heads", *IMPLEMENTATIONS, *_ERRORS), _attention)),
    "llama3-8b": ("llama3-8b.json", _FIRST),
    "smollm2-135m": ("smollm2-135m.json", _FIRST),
    "arithmetic-small": ("arithmetic-small.json", _FIRST),
    "arithmetic-base": ("arithmetic-base.json", _FIRST),
    "many rows": ("many_rows.json", _each(_MANY_ROWS, _many_rows)),
    "llama3-8b 128k": ("llama3-8b_128k.json", _FIRST),
    "llama3-8b 128k decoding": ("llama3-8b_128k_decode*.json", _each(DECODING, _steps)),
    "sparse quality": ("sparse_quality_*.json", _quality),
    "sparse tasks": ("sparse_tasks_*.json", _tasks),
    "sparse speed": ("sparse_speed_*.json", _speed),
    "training": ("training_*.json", _training),
}
