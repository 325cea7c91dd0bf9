"""What a model is worth: the answers, steps and spans that are right, what it attended to, and right answers per second."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from selfspan_jax.config import DecodeConfig
from selfspan_jax.lm import Output, SpanLM
from selfspan_jax.parallel.mesh import check_batch, num_data_shards
from selfspan_jax.spans import SpanVocab

_Z = 1.959964  # the normal distribution's two-sided 95% quantile


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

    def to_json(self) -> dict[str, Any]:
        """The scores, and for each accuracy its interval."""
        values = dataclasses.asdict(self)
        accuracies = [name for name in values if name.endswith("_accuracy")]
        return values | {f"{name}_interval": wilson(values[name], self.num_examples) for name in accuracies}


def wilson(share: float, num_examples: int) -> tuple[float, float]:
    """Bounds of the 95% interval of a share that was seen among so many (Wilson, 1927): true to its name near 0 and 1 too."""
    middle = share + _Z**2 / (2 * num_examples)
    half = _Z * math.sqrt(share * (1 - share) / num_examples + (_Z / (2 * num_examples)) ** 2)
    whole = 1 + _Z**2 / num_examples
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def first_error(response_ids: Iterable[int], gold_ids: Iterable[int], vocab: SpanVocab) -> str | None:
    """What a response got wrong first, or None: "first label", "next label", "refs", "eos" (too early or too late) or "body".

    By the first token that differs from the gold response: a `<ref:k>` written or left out counts as "refs", other text as "body".
    """
    pairs = list(itertools.zip_longest(map(int, response_ids), map(int, gold_ids), fillvalue=vocab.pad_id))
    wrong = next((i for i, (found, gold) in enumerate(pairs) if found != gold), None)
    if wrong is None:
        return None
    tokens = pairs[wrong]
    segs = [vocab.seg_base <= token < vocab.seg_base + vocab.num_labels for token in tokens]
    if any(vocab.ref_base <= token < vocab.ref_base + vocab.num_labels for token in tokens):
        return "refs"
    if wrong == 0 and segs[1]:
        return "first label"
    if all(segs):
        return "next label"
    return "eos" if vocab.eos_id in tokens or vocab.pad_id in tokens else "body"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results in the order of the prompts, and the seconds that prefill and decoding took, compilation apart."""

    results: tuple[Result, ...]
    batch_size: int
    decode_seconds: float
    compile_seconds: float

    @property
    def problems_per_second(self) -> float:
        """Right answers per second of decoding."""
        return sum(result.verdict.answer_right for result in self.results) / self.decode_seconds

    def to_json(self) -> dict[str, Any]:
        return {
            **Scores.of(self.results).to_json(),
            "batch_size": self.batch_size,
            "problems_per_second": self.problems_per_second,
            "response_tokens_per_second": sum(len(result.output.response_ids) for result in self.results) / self.decode_seconds,
            "context_tokens": float(np.mean([len(result.output.token_ids) for result in self.results])),
            "decode_seconds": self.decode_seconds,
            "compile_seconds": self.compile_seconds,
        }


def evaluate(
    lm: SpanLM,
    prompts: Sequence[str],
    *,
    verify: Callable[[str, np.ndarray], Verdict],
    attention: str = "span",
    max_new_tokens: int,
    batch_size: int = 64,
    passes: int = 1,
    progress: bool = False,
) -> Evaluation:
    """Decodes prompts greedily, all batches of one shape, and judges the responses.

    Args:
      verify: the task's verdict on (prompt, response ids).
      passes: times that each batch is decoded; of its times the median counts.
    """
    ids = [lm.task.encode_prompt(prompt) for prompt in prompts]
    token_ids, lengths = lm.pad(ids)
    batch_size = _batch_size(lm, batch_size, len(ids))
    config = DecodeConfig(attention=attention, max_new_tokens=max_new_tokens)
    order = np.argsort([len(prompt) for prompt in ids], kind="stable")  # alike lengths end at about the same step
    results: dict[int, Result] = {}
    compile_seconds, seconds = _compile(lm, batch_size, int(lengths.max()), config), 0.0
    bar = tqdm(total=len(ids), desc=f"decode ({attention})", unit="prompt", leave=False, disable=None if progress else True)
    with bar:
        for start in range(0, len(ids), batch_size):
            chosen = order[start : start + batch_size]
            filled = [*chosen, *[chosen[0]] * (batch_size - len(chosen))]  # the last batch repeats a prompt, for one shape
            batch = (token_ids[filled], lengths[filled])
            taken = []
            for _ in range(passes):
                began = time.perf_counter()
                state = jax.block_until_ready(lm.engine.generate(*batch, config))
                taken.append(time.perf_counter() - began)
            seconds += statistics.median(taken)
            outputs = lm.outputs([prompts[i] for i in chosen], [ids[i] for i in chosen], state, attention)
            for i, output in zip(chosen, outputs, strict=True):
                results[i] = Result(output, verify(prompts[i], output.response_ids))
            bar.update(len(chosen))
    return Evaluation(tuple(results[i] for i in range(len(ids))), batch_size, seconds, compile_seconds)


def evaluate_all(
    lm: SpanLM,
    prompts: Mapping[str, Sequence[str]],
    verify: Callable[[str, np.ndarray], Verdict],
    gold: Callable[[str], np.ndarray],
    *,
    batch_sizes: Sequence[int],
    **options: Any,
) -> dict[str, list[Evaluation]]:
    """`evaluate` of sets of prompts at each batch size. Responses may be 16 tokens longer than the longest gold one of their set.

    Args:
      gold: a prompt's gold response. `verify` and other options as for `evaluate`.
    """
    rooms = {name: max(len(gold(prompt)) for prompt in own) + 16 for name, own in prompts.items()}
    cases = [(name, size) for name in prompts for size in batch_sizes]
    longest = {name: max(len(lm.task.encode_prompt(prompt)) for prompt in own) for name, own in prompts.items()}

    def compile_case(name: str, size: int) -> float:
        config = DecodeConfig(attention=options.get("attention", "span"), max_new_tokens=rooms[name])
        return _compile(lm, _batch_size(lm, size, len(prompts[name])), longest[name], config)

    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:  # XLA leaves most processors idle on one
        seconds = dict(zip(cases, pool.map(compile_case, *zip(*cases, strict=True)), strict=True))
    found: dict[str, list[Evaluation]] = {name: [] for name in prompts}
    for name, size in cases:
        evaluation = evaluate(lm, prompts[name], verify=verify, max_new_tokens=rooms[name], batch_size=size, **options)
        found[name].append(dataclasses.replace(evaluation, compile_seconds=seconds[name, size]))
    return found


def _batch_size(lm: SpanLM, wanted: int, num_prompts: int) -> int:
    """No more than there are prompts; on a mesh rounded up to what it divides. Raises ValueError for a size that it does not divide."""
    if lm.engine.mesh is None:
        return min(wanted, num_prompts)
    check_batch(wanted, lm.engine.mesh)
    parts = num_data_shards(lm.engine.mesh)
    return min(wanted, -(-num_prompts // parts) * parts)


def _compile(lm: SpanLM, batch: int, prompt_tokens: int, config: DecodeConfig) -> float:
    """Seconds that it took; none to speak of where it was compiled before."""
    began = time.perf_counter()
    lm.engine.compile(batch, prompt_tokens, config)
    return time.perf_counter() - began


def fastest(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The one with the most right answers per second."""
    return max(evaluations, key=lambda evaluation: evaluation.problems_per_second)


def scores_by(results: Sequence[Result], keys: Sequence[int]) -> dict[str, Scores]:
    """Scores of the results that share a key, in order of the keys."""
    return {str(key): Scores.of([result for result, own in zip(results, keys, strict=True) if own == key]) for key in sorted(set(keys))}


def report(
    lm: SpanLM,
    evaluations: Mapping[str, Sequence[Evaluation]],
    *,
    gold: Callable[[str], np.ndarray],
    keys: Callable[[str], int],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What JSON can hold of what `evaluate_all` returns, with its settings and the device.

    Everything about a set is of its fastest batch size, and `by_batch_size` has the speed of all. `by_ops` has the scores
    of all results by what `keys` says of their prompt.
    """
    chosen = {name: fastest(own) for name, own in evaluations.items()}
    results = [result for evaluation in chosen.values() for result in evaluation.results]
    whole = Evaluation(
        tuple(results),
        max(evaluation.batch_size for evaluation in chosen.values()),
        sum(evaluation.decode_seconds for evaluation in chosen.values()),
        sum(evaluation.compile_seconds for evaluation in chosen.values()),
    )

    def errors(results: Sequence[Result]) -> dict[str, int]:
        kinds = (first_error(r.output.response_ids, gold(r.output.prompt), lm.model.vocab) for r in results)
        return dict(collections.Counter(kind for kind in kinds if kind).most_common())

    by_ops = {
        name: {**scores.to_json(), "first_errors": errors([result for result in results if str(keys(result.output.prompt)) == name])}
        for name, scores in scores_by(results, [keys(result.output.prompt) for result in results]).items()
    }
    speeds = ("batch_size", "problems_per_second", "response_tokens_per_second", "decode_seconds", "compile_seconds", "answer_accuracy")
    sets = {
        name: chosen[name].to_json() | {"by_batch_size": [{key: every.to_json()[key] for key in speeds} for every in own]}
        for name, own in evaluations.items()
    }
    wrong = next((result for result in results if not result.verdict.steps_right), None)
    return {
        **settings,
        "attention": results[0].output.attention,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "num_parameters": lm.model.num_parameters,
        **whole.to_json(),
        "first_errors": errors(results),
        "first_wrong": None if wrong is None else f"{wrong.output.prompt}: {wrong.verdict.message}",
        "by_ops": by_ops,
        "sets": sets,
    }


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


def evaluation_table(report: Mapping[str, Any]) -> str:
    """What `report` returns, for people: scores by number of operators, what went wrong first, and how fast it was."""
    columns = ("answer_accuracy", "step_accuracy", "span_accuracy", "attended_fraction")
    lines = ["operators  examples  answers  steps   spans   attended  tokens"]
    for name, row in [*report["by_ops"].items(), ("all", report)]:
        answer, step, span, fraction = (row[column] for column in columns)
        lines.append(
            f"{name:>9}  {row['num_examples']:>8}  {answer:7.1%} {step:7.1%} {span:7.1%}  {fraction:7.1%}  {row['attended_tokens']:7.1f}"
        )
    for name, own in report["sets"].items():
        for speed in own["by_batch_size"]:
            rate, size = speed["problems_per_second"], speed["batch_size"]
            lines.append(f"{name} operators: {rate:.1f} right answers per second of prefill and decoding, batch {size}")
    if errors := report["first_errors"]:
        lines.append("first errors: " + ", ".join(f"{kind} {count}" for kind, count in errors.items()))
    if wrong := report["first_wrong"]:
        lines.append(f"first wrong: {wrong}")
    return "\n".join(lines)
