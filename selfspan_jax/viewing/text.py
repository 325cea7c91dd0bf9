"""Lay out responses and evaluations as text, for a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from selfspan_jax.task import judgement
from selfspan_jax.viewing.output import Output
from selfspan_jax.viewing.reading import attended_line


def response_table(out: Output, *, told: Collection[str] = ()) -> str:
    """Lay out a response as its task's `view` says: "sources", or "steps", the default. Warnings come first, but for those `told`."""
    lines = _sources_lines(out) if getattr(out.task, "view", "steps") == "sources" else _steps_lines(out)
    return "\n".join([*warning_lines(warning for warning in out.warnings if warning not in told), *lines])


def response_tables(outs: Sequence[Output], *, told: Collection[str] = ()) -> str:
    """Lay out several responses, one below the other, each with its number and the beginning of its prompt, but for warnings `told`."""
    heads = (f"[{number}/{len(outs)}] {_beginning(out.prompt)}" for number, out in enumerate(outs, 1))
    return "\n\n".join(f"{head}\n{response_table(out, told=told)}" for head, out in zip(heads, outs))


def _beginning(prompt: str, width: int = 100) -> str:
    """Write the beginning of a prompt as one line of at most `width` characters."""
    line = " ".join(prompt.split())
    return line if len(line) <= width else f"{line[: width - 4]} ..."


def warning_lines(warnings: Iterable[str]) -> list[str]:
    """Lay out warnings, a line each."""
    return [f"warning: {warning}" for warning in warnings]


def warn(warnings: Iterable[str]) -> None:
    """Print warnings of a work to standard error before it begins."""
    for line in warning_lines(warnings):
        print(line, file=sys.stderr, flush=True)


def answer_line(out: Output) -> str:
    """Write the answer beside what the verifier says of it; what is not right begins with WRONG, FLAWED or STOPPED, see `judgement`."""
    assert out.verdict is not None
    said = f"{_beginning(out.prompt, 1000)} = {'(no answer)' if out.answer is None else out.answer}   ({out.verdict.message})"
    word = judgement(out.verdict, ended=out.ended)
    return said if word == "right" else f"{word.upper()}: {said}"


def prefill_line(kept: Mapping[str, Any]) -> str:
    """Say what a sparse prefill kept of its prompts, as `SpanLM.measure_prefill` found it."""
    least, mean = kept["retained_mass_min"], kept["retained_mass_mean"]
    read = f"prefill: {kept['selector']} reads {kept['tiles_kept']:.1%} of the tiles"
    read += " (short prompts are read densely)" * (kept["tiles_kept"] == 1)
    return f"{read}; retained mass: {mean:.2%} in the mean of queries and heads, {least:.2%} at least"


def for_terminal(table: str) -> str:
    """Write a table in color where standard output is a terminal and the user did not forbid it (NO_COLOR)."""
    return in_color(table) if sys.stdout.isatty() and "NO_COLOR" not in os.environ else table


def in_color(table: str) -> str:
    """Write the lines of what is wrong in red and warnings in yellow, for a terminal."""
    colors = {"WRONG:": 31, "FLAWED:": 31, "STOPPED:": 33, "warning:": 33}
    lines = ((line, colors.get(line.split(" ", 1)[0])) for line in table.split("\n"))
    return "\n".join(line if color is None else f"\x1b[{color}m{line}\x1b[0m" for line, color in lines)


def _steps_lines(out: Output) -> list[str]:
    """Lay out the steps with what each read, the answer with the verdict on it, and how much of the context was read."""
    lines = [out.prompt, f"response: {out.text}", ""] if out.verdict else [out.prompt + out.text, ""]
    if out.steps:
        head = ("step", "reads", "writes", "attended tokens")
        rows = [(f"<{s.label}>", " ".join(f"<{ref}>" for ref in s.refs) or "-", s.text, f"{s.attended_tokens:.1f}") for s in out.steps]
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)] + [""]
    mean_context = (out.prompt_tokens + 1 + len(out.token_ids)) / 2
    lines += [answer_line(out)] if out.verdict else []
    return [*lines, f"{attended_line(out)}   dense decoding: {mean_context:.1f} tokens, 100%"]


def _sources_lines(out: Output) -> list[str]:
    """Lay out the steps, each with the pieces of the prompt that it named below it, and how much of the context was read."""
    ids, labels = (x[: out.prompt_tokens] for x in (out.token_ids, out.roles.labels))
    opens = (ids >= out.vocab.seg_base) & (ids < out.vocab.seg_base + out.vocab.num_labels)
    lines = [out.answer, ""] if out.answer else [f"(no step was {'written' if out.steps else 'opened'})", f"response: {out.text}"]
    written: dict[int, str] = {}
    for step in out.steps:
        lines.append(f"<{step.label}> {step.text.strip()}")
        for ref in dict.fromkeys(ref for ref in step.refs if ref != step.label):  # that names nothing new
            piece = ids[(labels == ref) & ~opens]
            source = out.task.decode(piece).strip() if len(piece) else written.get(ref, "(nothing so far carries that label)")
            lines.append(f"    from <{ref}> {source}")
        written[step.label] = f"its own sentence: {step.text.strip()}"
    return [*lines, "", attended_line(out)]


def evaluation_table(report: Mapping[str, Any], task: Any) -> str:
    """Lay out what `evaluation.report` returned: warnings, then verified answers by group or by set, else a line for each kind of score."""
    table = _verified_table(report, task) if "first_errors" in report else _scores_table(report, task)
    kept = [prefill_line(report["prefill"])] if "prefill" in report else []
    return "\n".join([*warning_lines(report.get("warnings", ())), table, *kept])


_FIRST_ERRORS = {  # as `evaluation.first_error` names them
    "first label": "the label of the first step",
    "next label": "the label of a later step",
    "refs": "the labels that a step names",
    "body": "the text of a step",
    "eos": "an end too early or too late",
}


def _verified_table(report: Mapping[str, Any], task: Any) -> str:
    grouped = hasattr(task, "group")
    title, groups = (task.group_title, report[f"by_{task.group_by}"]) if grouped else ("set", report["sets"])
    width = max(map(len, (title, *groups)))
    lines = [f"{title:>{width}}  examples  answers  steps   spans   attended  tokens"]
    for name, row in [*groups.items(), ("all", report)]:
        accuracies = " ".join(f"{row[f'{what}_accuracy']:7.1%}" for what in ("answer", "step", "span"))
        attended = f"{row['attended_fraction']:7.1%}  {row['attended_tokens']:7.1f}"
        lines.append(f"{name:>{width}}  {row['num_examples']:>8}  {accuracies}  {attended}")
    for name, own in report["sets"].items():
        for speed in own["by_batch_size"]:
            rate, size = _rate(speed[f"{task.unit}_per_second"]), speed["batch_size"]
            read = f", {_rate(speed[f'{task.unit}_per_second_with_reading'])} with the reading of responses"
            lines.append(f"{_named(name, report, task)}: {rate} right answers per second of prefill and decoding{read}, batch {size}")
    if errors := report["first_errors"]:
        lines.append("first errors: " + ", ".join(f"{_FIRST_ERRORS[kind]}: {count}" for kind, count in errors.items()))
    if wrong := report["first_wrong"]:
        lines.append(f"first wrong: {wrong}")
    return "\n".join([*lines, *_left_out(report, task)])


def _rate(per_second: float) -> str:
    return f"{per_second:.1f}" if per_second >= 1 else f"{per_second:.2g}"


def _scores_table(report: Mapping[str, Any], task: Any) -> str:
    head = f"{report['num_examples']} {task.unit} ({report['attention']} attention), "
    lines = [head + f"{report['finished_fraction']:.1%} ended by themselves"]
    kinds = {**getattr(task, "score_kinds", {}), "attended": ("attended_fraction", "attended_fraction_body", "attended_fraction_header")}
    for title, keys in kinds.items():
        known = [f"{key.replace('_', ' ')} {report[key]:.1%}" for key in keys if report.get(key) is not None]
        lines += [f"{title:<9} {',  '.join(known)}"] if known else []
    for own in report["sets"].values():
        for speed in own["by_batch_size"]:
            lines.append(
                f"{_rate(speed[f'{task.unit}_per_second'])} {task.unit} and {speed['response_tokens_per_second']:.0f} tokens per second "
                f"of prefill and decoding, batch {speed['batch_size']}"
            )
    return "\n".join([*lines, *_left_out(report, task)])


def _left_out(report: Mapping[str, Any], task: Any) -> list[str]:
    """Lay out what an evaluation did not decode, and what says little of the model."""
    lines = []
    for name, own in report["sets"].items():
        if own["num_with_warnings"]:
            lines.append(f"{_named(name, report, task)}: beyond what the model was trained on, or cut: {own['num_with_warnings']} examples")
        if own["num_too_long"]:
            lines.append(f"{_named(name, report, task)}: left out, because they exceed the model's context: {own['num_too_long']} examples")
        if own.get("missed_rows"):
            lines.append(f"{_named(name, report, task)}: rows read in host memory, which working sets did not hold: {own['missed_rows']}")
    return lines + [
        f"{_named(row['set'], report, task)}: not run at batch {row['batch_size']}: {row['reason']}" for row in report["not_run"]
    ]


def _named(name: str, report: Mapping[str, Any], task: Any) -> str:
    """Name a set of examples: fresh ones by their groups ("20 operators"), those of a corpus directory by its name."""
    return f"{name} {task.group_title}" if hasattr(task, "group") and "data" not in report else name
