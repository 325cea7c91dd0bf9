"""What a model is worth: the answers, steps and spans that are right, what it attended to, and right answers per second."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from selfspan_jax import decoding
from selfspan_jax.config import Attention, DecodeConfig
from selfspan_jax.lm import Output, SpanLM


class Verdict(Protocol):
    """What a task's verifier says of a response."""

    @property
    def answer_right(self) -> bool: ...
    @property
    def steps_right(self) -> bool: ...
    @property
    def spans_right(self) -> bool: ...
    @property
    def message(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Result:
    """One evaluated prompt."""

    output: Output
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Scores:
    """Over a set of prompts. Accuracies and fractions are between 0 and 1."""

    num_examples: int
    answer_accuracy: float
    """The final value is right."""
    step_accuracy: float
    """All steps are right."""
    span_accuracy: float
    """All named sets are the minimal ones."""
    attended_fraction: float
    """Mean over response tokens of |attended| / (t + 1)."""
    attended_tokens: float
    """Mean over response tokens of |attended|."""
    finished_fraction: float
    """Responses that ended by themselves."""

    @classmethod
    def of(cls, results: Sequence[Result]) -> Scores:
        """Raises ValueError for no results: their mean is not a number."""
        if not results:
            raise ValueError("no results to score")

        def share(values) -> float:
            return float(np.mean([bool(value) for value in values]))

        contexts = [np.arange(out.prompt_tokens + 1, len(out.token_ids) + 1) for out in (r.output for r in results)]
        attended = np.concatenate([result.output.num_attended for result in results])
        return cls(
            num_examples=len(results),
            answer_accuracy=share(result.verdict.answer_right for result in results),
            step_accuracy=share(result.verdict.steps_right for result in results),
            span_accuracy=share(result.verdict.spans_right for result in results),
            attended_fraction=float(np.mean(attended / np.concatenate(contexts))),
            attended_tokens=float(np.mean(attended)),
            finished_fraction=share(result.output.finished for result in results),
        )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results in the order of the prompts, and the seconds that prefill and decoding took, compilation apart."""

    results: tuple[Result, ...]
    decode_seconds: float
    compile_seconds: float

    @property
    def problems_per_second(self) -> float:
        """Right answers per second of decoding."""
        return sum(result.verdict.answer_right for result in self.results) / self.decode_seconds

    def to_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(Scores.of(self.results)),
            "problems_per_second": self.problems_per_second,
            "decode_seconds": self.decode_seconds,
            "compile_seconds": self.compile_seconds,
        }


def evaluate(
    lm: SpanLM,
    prompts: Sequence[str],
    *,
    verify: Callable[[str, np.ndarray], Verdict],
    attention: Attention = "span",
    max_new_tokens: int,
    batch_size: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Decodes prompts greedily, all batches of one shape, and judges the responses.

    Args:
      verify: the task's verdict on (prompt, response ids).
    """
    ids = [lm.task.encode_prompt(prompt) for prompt in prompts]
    batch_size = min(batch_size, len(ids))
    token_ids, lengths = lm.padded(ids)
    config = DecodeConfig(attention=attention, max_new_tokens=max_new_tokens)
    order = np.argsort([len(prompt) for prompt in ids], kind="stable")  # alike lengths end at about the same step
    results: dict[int, Result] = {}
    seconds = compile_seconds = 0.0
    bar = tqdm(total=len(ids), desc=f"decode ({attention})", unit="prompt", leave=False, disable=None if progress else True)
    with bar:
        for start in range(0, len(ids), batch_size):
            chosen = order[start : start + batch_size]
            filled = [*chosen, *[chosen[0]] * (batch_size - len(chosen))]  # the last batch repeats a prompt, for one shape
            batch = (token_ids[filled], lengths[filled])
            if start == 0:
                began = time.perf_counter()
                decoding.compile_generate(lm.frozen, *batch, config)
                compile_seconds = time.perf_counter() - began
            began = time.perf_counter()
            state = jax.block_until_ready(decoding.generate(lm.frozen, *batch, config))
            seconds += time.perf_counter() - began
            outputs = lm.outputs([prompts[i] for i in chosen], [ids[i] for i in chosen], state, attention)
            for i, output in zip(chosen, outputs, strict=True):
                results[i] = Result(output, verify(prompts[i], output.response_ids))
            bar.update(len(chosen))
    return Evaluation(tuple(results[i] for i in range(len(ids))), seconds, compile_seconds)


def scores_by(results: Sequence[Result], keys: Sequence[int]) -> dict[str, Scores]:
    """Scores of the results that share a key, in order of the keys."""
    return {str(key): Scores.of([result for result, own in zip(results, keys, strict=True) if own == key]) for key in sorted(set(keys))}


def report(evaluation: Evaluation, by_ops: dict[str, Scores], **settings: Any) -> dict[str, Any]:
    """What JSON can hold of an evaluation, with its settings and the device."""
    return {
        **settings,
        "attention": evaluation.results[0].output.attention,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **evaluation.to_json(),
        "by_ops": {name: dataclasses.asdict(scores) for name, scores in by_ops.items()},
    }


def output_json(out: Output) -> dict[str, Any]:
    """What JSON can hold of a decoded response."""
    values = {field.name: getattr(out, field.name) for field in dataclasses.fields(out) if field.name != "lm"}
    values |= {"steps": [dataclasses.asdict(step) for step in out.steps], "attended_fraction": out.attended_fraction}
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}


def response_table(out: Output, verdict: Verdict | None) -> str:
    """The response, as a table where it has steps; the answer with the verdict on it; and how much of the context was read."""
    lines = [out.prompt + out.text, ""]
    if out.steps:
        head = ("step", "reads", "writes", "attended tokens")
        rows = [(f"<{s.label}>", " ".join(f"<{ref}>" for ref in s.refs) or "-", s.text, f"{s.attended_tokens:.1f}") for s in out.steps]
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)] + [""]
    mean_context = (out.prompt_tokens + 1 + len(out.token_ids)) / 2
    lines += [f"{out.prompt} = {out.answer}   ({verdict.message})"] if verdict else []
    lines += [
        f"attended: {out.num_attended.mean():.1f} tokens, {out.attended_fraction:.1%} of the context"
        f"   dense decoding: {mean_context:.1f} tokens, 100%",
    ]
    if not out.finished:
        lines.append(f"stopped after {len(out.response_ids)} new tokens, before the response had ended")
    if out.unresolved_refs:
        lines.append(f"{out.unresolved_refs} span tokens named a label that nothing carried")
    return "\n".join(lines)


def scores_table(rows: dict[str, Scores]) -> str:
    """Scores by a name, for arithmetic the number of operators."""
    columns = ("answer_accuracy", "step_accuracy", "span_accuracy", "attended_fraction", "attended_tokens")
    lines = ["operators  examples  answers  steps   spans   attended  tokens"]
    for name, scores in rows.items():
        answer, step, span, fraction, tokens = (getattr(scores, column) for column in columns)
        lines.append(f"{name:>9}  {scores.num_examples:>8}  {answer:7.1%} {step:7.1%} {span:7.1%}  {fraction:7.1%}  {tokens:7.1f}")
    return "\n".join(lines)
