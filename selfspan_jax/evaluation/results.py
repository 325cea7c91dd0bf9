"""What an evaluation found: scores, speeds and counts of one batch size, and the report of several."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from selfspan_jax.lm import SpanLM
from selfspan_jax.parallel.memory import DoesNotFit
from selfspan_jax.spans import SpanVocab
from selfspan_jax.task import JUDGED, Example, judgement
from selfspan_jax.viewing.output import Output, prompt_warnings
from selfspan_jax.viewing.reading import attended, attended_by_kind

_Z = 1.959964  # the normal distribution's two-sided 95% quantile

Scores = dict[str, Any]
"""Averages over examples by name; accuracies and fractions are between 0 and 1."""


@dataclasses.dataclass(frozen=True)
class NotRun:
    """A batch size at which a set of examples was not decoded, and why."""

    batch_size: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Outputs in the order of the examples, and the seconds that prefill and decoding took, compilation and reading excluded."""

    task: Any  # a Task, and what more it offers
    examples: tuple[Example, ...]
    outputs: tuple[Output, ...]
    batch_size: int
    decode_seconds: float
    compile_seconds: float
    num_too_long: int = 0
    """Examples that were left out, because prompt and response exceed the model's context."""
    num_places: int | None = None
    """Sequences that a scheduler decoded at the same time, on the rows of cache of a batch; None: the batches were static."""
    prefill_seconds: float | None = None
    """What of `decode_seconds` reading the prompts took; None where they are read while others are decoded, or the host gives tokens."""
    read_seconds: float = 0.0
    """What reading the responses back took: their texts, what each token is and read, the verdicts."""
    missed_rows: int | None = None
    """Rows that all tokens read in host memory; None where none lie there."""

    @functools.cached_property
    def scores(self) -> Scores:
        """Averages over the examples: the task's scores, what response tokens attended to, and how many responses finished.

        Where the task verifies responses, its scores are the shares of right answers, steps and spans.
        """
        verdicts = [out.verdict for out in self.outputs if out.verdict]
        if verdicts:
            judged = np.mean([[getattr(verdict, name) for name in JUDGED] for verdict in verdicts], axis=0)
            own = dict(zip(("answer_accuracy", "step_accuracy", "span_accuracy"), judged.tolist(), strict=True))
        else:
            own = self.task.scores(self.examples, [out.response_ids for out in self.outputs])
        finished = float(np.mean([out.finished for out in self.outputs]))
        return {"num_examples": len(self.outputs), **own, **attended(self.outputs), "finished_fraction": finished}

    @property
    def right_per_second(self) -> float:
        """Right answers per second of decoding; responses per second where the task verifies no answers."""
        return sum(out.verdict is None or out.verdict.answer_right for out in self.outputs) / self.decode_seconds

    def speed(self) -> dict[str, Any]:
        """Return what depends on the batch size, as JSON."""
        accuracy = {"answer_accuracy": self.scores["answer_accuracy"]} if self.outputs[0].verdict else {}  # others are slow to score
        rate, unit = self.right_per_second, self.task.unit
        return {
            "batch_size": self.batch_size,
            **({} if self.num_places is None else {"num_places": self.num_places}),
            f"{unit}_per_second": rate,
            f"{unit}_per_second_with_reading": rate * self.decode_seconds / (self.decode_seconds + self.read_seconds),
            "response_tokens_per_second": sum(len(out.response_ids) for out in self.outputs) / self.decode_seconds,
            "decode_seconds": self.decode_seconds,
            **({} if self.prefill_seconds is None else {"prefill_seconds": self.prefill_seconds}),
            "read_seconds": self.read_seconds,
            "compile_seconds": self.compile_seconds,
            **accuracy,
        }

    def scores_json(self) -> dict[str, Any]:
        """Return scores, with Wilson's interval for each accuracy of verified answers, as JSON."""
        accuracies = [name for name in self.scores if name.endswith("_accuracy") and self.outputs[0].verdict]
        return self.scores | {f"{name}_interval": wilson(self.scores[name], len(self.outputs)) for name in accuracies}

    def to_json(self) -> dict[str, Any]:
        """Return scores, counts of verdicts, speed and mean length, as JSON."""
        context_tokens = float(np.mean([len(out.token_ids) for out in self.outputs]))
        verdicts = [out.verdict for out in self.outputs if out.verdict]
        counts = {name: sum(getattr(verdict, name) for verdict in verdicts) for name in JUDGED}
        counts["all_right"] = sum(judgement(verdict) == "right" for verdict in verdicts)
        warned = sum(bool(prompt_warnings(self.task, out.prompt)) for out in self.outputs)
        sizes: dict[str, Any] = {"context_tokens": context_tokens, "num_too_long": self.num_too_long, "num_with_warnings": warned}
        sizes |= {} if self.missed_rows is None else {"missed_rows": self.missed_rows}
        return {**self.scores_json(), **({"verdicts": counts} if verdicts else {}), **self.speed(), **sizes}

    def first_errors(self) -> dict[str, int]:
        """Count the responses by what they get wrong first, see `first_error`; the most frequent kind first."""
        pairs = zip(self.outputs, self.examples, strict=True)
        kinds = (first_error(out.response_ids, example.response_ids, out.vocab) for out, example in pairs)
        return dict(collections.Counter(kind for kind in kinds if kind).most_common())

    def by_example(self) -> dict[str, Any]:
        """Return each example's digest, tokens and what it adds to the scores, in order, as JSON: for intervals and comparisons.

        A digest is of the prompt's text.
        """
        counts = [self.task.counts(example, out.response_ids) for example, out in zip(self.examples, self.outputs, strict=True)]
        names = list(dict.fromkeys(name for own in counts for name in own))
        return {
            "digests": [hashlib.sha256(example.prompt.encode()).hexdigest()[:16] for example in self.examples],
            "prompt_tokens": [out.prompt_tokens for out in self.outputs],
            "response_tokens": [len(out.response_ids) for out in self.outputs],
            "counts": {name: [[round(float(x), 4) for x in own.get(name, (0, 0))] for own in counts] for name in names},
        }

    def groups(self) -> dict[str, Evaluation]:
        """Return the evaluation of each of the task's groups of prompts, numbers in order."""
        members: dict[str, list] = {}
        for example, out in zip(self.examples, self.outputs, strict=True):
            members.setdefault(self.task.group(example.prompt), []).append((example, out))
        found = {}
        for name in sorted(members, key=lambda name: (len(name), name)):
            examples, outputs = zip(*members[name], strict=True)
            found[name] = dataclasses.replace(self, examples=examples, outputs=outputs)
        return found


def wilson(share: float, num_examples: int) -> tuple[float, float]:
    """Compute the 95% interval of a share of so many examples (Wilson, 1927), which holds near 0 and 1 too."""
    middle = share + _Z**2 / (2 * num_examples)
    half = _Z * math.sqrt(share * (1 - share) / num_examples + (_Z / (2 * num_examples)) ** 2)
    whole = 1 + _Z**2 / num_examples
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def first_error(response_ids: Iterable[int], gold_ids: Iterable[int], vocab: SpanVocab) -> str | None:
    """Name what a response gets wrong first: "first label", "next label", "refs", "eos" (too early or too late), "body" or None.

    Decided by the first token that differs from the gold response: a `<ref:k>` written or left out counts as "refs", other text as "body".
    """
    pairs = list(itertools.zip_longest(map(int, response_ids), map(int, gold_ids), fillvalue=vocab.pad_id))
    wrong = next((i for i, (found, gold) in enumerate(pairs) if found != gold), None)
    if wrong is None:
        return None
    tokens = np.array(pairs[wrong])
    segs, refs = ((tokens >= base) & (tokens < base + vocab.num_labels) for base in (vocab.seg_base, vocab.ref_base))
    if refs.any():
        return "refs"
    if wrong == 0 and segs[1]:
        return "first label"
    if segs.all():
        return "next label"
    return "eos" if vocab.eos_id in tokens or vocab.pad_id in tokens else "body"


def _joined(task: Any, evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return one evaluation of all examples: of a single one itself, whose scores need no second computation."""
    if len(evaluations) == 1:
        return evaluations[0]
    prefills = [own.prefill_seconds for own in evaluations if own.prefill_seconds is not None]
    return Evaluation(
        task,
        tuple(example for own in evaluations for example in own.examples),
        tuple(out for own in evaluations for out in own.outputs),
        max(own.batch_size for own in evaluations),
        sum(own.decode_seconds for own in evaluations),
        sum(own.compile_seconds for own in evaluations),
        sum(own.num_too_long for own in evaluations),
        prefill_seconds=sum(prefills) if len(prefills) == len(evaluations) else None,
        read_seconds=sum(own.read_seconds for own in evaluations),
    )


def report(lm: SpanLM, found: Mapping[str, Sequence[Evaluation | NotRun]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Summarize what `evaluate_all` returned, with its settings, what the task fixes and the device, as JSON.

    Everything about a set is of its fastest batch size; `by_batch_size` has the speed of all, `not_run` what was not decoded. Where
    the task groups its prompts, `by_...` (`by_ops` for arithmetic) has the scores of each group over all sets. Where `prefill` is among
    the settings, it becomes what was kept of the first batch's prompts.

    Raises: DoesNotFit if nothing was decoded.
    """
    not_run = [{"set": name, **dataclasses.asdict(item)} for name, own in found.items() for item in own if isinstance(item, NotRun)]
    by_set = {name: [item for item in own if isinstance(item, Evaluation)] for name, own in found.items()}
    if not any(by_set.values()):
        raise DoesNotFit("; ".join(dict.fromkeys(f"{row['set']} at batch {row['batch_size']}: {row['reason']}" for row in not_run)))
    evaluations = {name: own for name, own in by_set.items() if own}
    chosen = {name: max(own, key=lambda evaluation: evaluation.right_per_second) for name, own in evaluations.items()}
    whole = _joined(lm.task, [*chosen.values()])
    outputs, first = whole.outputs, whole.outputs[0]
    by_batch_size = {name: [evaluation.speed() for evaluation in own] for name, own in evaluations.items()}
    values = {
        **settings,
        "attention": first.attention,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "num_parameters": lm.model.num_parameters,
        "max_context_tokens": lm.model.config.max_context_tokens,
        "task": {name: value for name, value in lm.task.to_json().items() if name != "vocab"},
        **whole.to_json(),
        **attended_by_kind(outputs),
        "unresolved_refs": sum(out.unresolved_refs for out in outputs),
        "first": {"steps": [str(step) for step in first.steps], "gold": lm.task.decode(whole.examples[0].response_ids)},
        "sets": {name: chosen[name].to_json() | {"by_batch_size": speeds} for name, speeds in by_batch_size.items()},
    }
    values["not_run"] = not_run
    if hasattr(lm.task, "counts"):
        values["by_example"] = whole.by_example()
    if selector := settings.get("prefill"):
        some = [out.prompt for out in outputs[: whole.batch_size]]
        values["prefill"] = {"selector": selector, **lm.measure_prefill(some, selector, attention=first.attention)}
    if len(evaluations) == 1:
        (values["by_batch_size"],) = by_batch_size.values()
    if first.verdict:
        wrong = (f"{out.prompt}: {out.verdict.message}" for out in outputs if out.verdict and not out.verdict.steps_right)
        values |= {"first_errors": whole.first_errors(), "first_wrong": next(wrong, None)}
    if hasattr(lm.task, "group"):
        groups = whole.groups().items()
        values[f"by_{whole.task.group_by}"] = {name: own.scores_json() | {"first_errors": own.first_errors()} for name, own in groups}
    return values
