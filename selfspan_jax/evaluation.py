"""Evaluate a model on a task's examples: the task's own scores, attended tokens, throughput."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from pallas_kernels.prompt_attention import Selector
from selfspan_jax import compiling
from selfspan_jax.attention.policies import Policy, get_policy
from selfspan_jax.config import DecodeConfig
from selfspan_jax.errors import UserError
from selfspan_jax.forcing import Order, generate_under
from selfspan_jax.lm import SpanLM
from selfspan_jax.parallel.memory import DoesNotFit, attempt
from selfspan_jax.parallel.mesh import check_batch, num_data_shards
from selfspan_jax.serving.requests import Request
from selfspan_jax.serving.throughput import is_faster, run_together, shared_beginning, throughput_scheduler
from selfspan_jax.spans import SpanVocab
from selfspan_jax.task import JUDGED, Example, judgement
from selfspan_jax.viewing.output import Output, prompt_warnings
from selfspan_jax.viewing.reading import attended, attended_by_kind

MODEL, ORDER = "model", "order"  # the model chooses what steps name, or what the order of the steps does not say of it
MARGIN_TOKENS = 16  # that a response may be longer than the longest gold one
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
        sizes = {"context_tokens": context_tokens, "num_too_long": self.num_too_long, "num_with_warnings": warned}
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


def evaluate(
    lm: SpanLM,
    examples: Sequence[Example],
    *,
    attention: str | Policy | None = None,
    prefill: str | Selector = "dense",
    batch_size: int = 128,
    max_new_tokens: int | None = None,
    passes: int = 1,
    sources: str = MODEL,
    constrained: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Decode the examples' prompts greedily, all batches of one shape; or, where that saves steps, by a `Scheduler` on the cache of one.

    Args:
      attention: a policy or its name; by default what the model was trained with.
      prefill: how causal prompts are read, as `SpanLM.generate` has it.
      max_new_tokens: by default 16 more than the longest gold response has.
      passes: times that each batch is decoded; the median of its times counts.
      sources: what steps name: what the model chooses, or labels that the task's `headers` gives by another name. Then the host
        gives each token, so that the times say nothing.
      constrained: let the text of each step begin with one of the task's `beginnings`, such as the methods of a catalogue; by the host
        as well.

    Raises: UserError for no examples, prompts that are too long, a batch size that the mesh does not divide, and sources or
    beginnings that the task does not give.
    """
    if not examples:
        raise UserError("no examples to evaluate")
    given = None if sources == MODEL and not constrained else _given(lm.task, examples, sources, constrained)
    ids = [lm.task.encode_prompt(example.prompt) for example in examples]
    token_ids, lengths = lm.pad(ids)
    batch_size = _batch_size(lm, batch_size, len(ids))
    policy = get_policy(attention or lm.model.config.mask)
    config = _config(lm, examples, ids, policy, prefill, max_new_tokens)
    if _is_served(lm, examples, ids, config, batch_size, passes=passes, sources=sources, constrained=constrained):
        return _evaluate_served(lm, examples, ids, config, batch_size)
    compile_seconds, read_seconds = _compile(lm, batch_size, int(lengths.max()), config), 0.0
    seconds = np.zeros(2)  # of prefill, and of all
    state: Any = None
    order = np.argsort([len(prompt) for prompt in ids], kind="stable")  # similar lengths end at about the same step
    outputs: dict[int, Output] = {}
    with tqdm(total=len(ids), desc=f"decode ({policy.name})", unit="prompt", leave=False, disable=None if progress else True) as bar:
        for start in range(0, len(ids), batch_size):
            chosen = order[start : start + batch_size]
            filled = [*chosen, *[chosen[0]] * (batch_size - len(chosen))]  # the last batch repeats a prompt, for one shape
            taken = []
            for _ in range(passes):
                del state  # the next one needs its memory
                began = time.perf_counter()
                prompts = token_ids[filled], lengths[filled], config
                prefilled = began
                if given is None:
                    state = jax.block_until_ready(lm.engine.prefill(*prompts))
                    prefilled = time.perf_counter()
                    state = jax.block_until_ready(lm.engine.run(state, config))
                else:
                    own_given: dict[str, Any] = {name: [own[i] for i in filled] for name, own in given.items()}
                    state = generate_under(lm.engine, *prompts, **own_given, names_more=sources == ORDER)
                taken.append((prefilled - began, time.perf_counter() - began))
            seconds += np.median(taken, axis=0)
            began = time.perf_counter()
            found = lm.outputs([examples[i].prompt for i in chosen], [ids[i] for i in chosen], state, policy)
            for out in found:
                _ = out.text, out.roles, out.verdict  # computed when they are first asked for
            read_seconds += time.perf_counter() - began
            outputs |= dict(zip(chosen, found, strict=True))
            bar.update(len(chosen))
    in_order = tuple(outputs[i] for i in range(len(ids)))
    first, both = seconds.tolist()
    own: dict[str, Any] = {"prefill_seconds": first if given is None else None, "read_seconds": read_seconds}
    return Evaluation(lm.task, tuple(examples), in_order, batch_size, both, compile_seconds, **own)


def _is_served(lm: SpanLM, examples, ids, config: DecodeConfig, batch_size: int, passes=1, sources=MODEL, constrained=False, **_) -> bool:
    """Tell whether a scheduler decodes the examples, in place of static batches of similar lengths."""
    pairs = sorted((len(prompt), len(example.response_ids)) for prompt, example in zip(ids, examples, strict=True))
    prompt_tokens, new_tokens = ([pair[i] for pair in pairs] for i in range(2))
    plain = passes == 1 and sources == MODEL and not constrained
    return plain and is_faster(lm.engine, config, prompt_tokens, new_tokens, batch_size, shared_beginning(ids))


def _evaluate_served(lm: SpanLM, examples: Sequence[Example], ids: Sequence[Int[np.ndarray, "T"]], config, batch_size: int) -> Evaluation:
    longest, policy, stamps = max(map(len, ids)), get_policy(config.attention), [time.perf_counter()]
    scheduler = throughput_scheduler(lm.engine, config, batch_size, longest, longest + config.max_new_tokens)
    scheduler.warm_up(draws=False)
    stamps.append(time.perf_counter())
    found = run_together(scheduler, [Request(prompt, config.max_new_tokens) for prompt in ids])
    stamps.append(time.perf_counter())
    decoded = zip(examples, ids, found, strict=True)
    outputs = tuple(lm.read_tokens(own.prompt, prompt, tokens[0], tokens[1], policy) for own, prompt, tokens in decoded)
    for out in outputs:
        _ = out.text, out.roles, out.verdict  # computed when they are first asked for
    compiling, decoding, reading = np.diff([*stamps, time.perf_counter()]).tolist()
    places = scheduler.config.num_sequences
    return Evaluation(lm.task, tuple(examples), outputs, batch_size, decoding, compiling, num_places=places, read_seconds=reading)


def _given(task: Any, examples: Sequence[Example], sources: str, constrained: bool) -> dict[str, list[Any]]:
    """Return what the steps of each response are to name and to begin with. Raises UserError for a task that does not say it."""
    given: dict[str, list[Any]] = {"headers": [()] * len(examples), "beginnings": [()] * len(examples)}
    if sources != MODEL:
        if not hasattr(task, "headers"):
            raise UserError(f"sources are {sources!r}, but this model's task gives none; allowed: {MODEL}")
        given["headers"] = [task.headers(example, sources) for example in examples]
        if hasattr(task, "opens"):
            given["orders"] = [Order(*task.opens(example, sources)) for example in examples]
    if constrained:
        if not hasattr(task, "beginnings"):
            raise UserError("constrained is True, but this model's task says nothing that steps are to begin with")
        given["beginnings"] = [task.beginnings(example.prompt) for example in examples]
    return given


def evaluate_all(
    lm: SpanLM,
    sets: Mapping[str, Sequence[Example]],
    *,
    batch_sizes: Sequence[int],
    attention: str | Policy | None = None,
    prefill: str | Selector = "dense",
    **options: Any,
) -> dict[str, list[Evaluation | NotRun]]:
    """Call `evaluate` for sets of examples at each batch size, all of them compiled first, several at once.

    Examples that exceed the model's context are left out and counted. A batch that the device has no memory for is `NotRun`,
    as is a set that has no example left; the others go on.

    Raises: UserError for no examples, and a batch size that the mesh does not divide.
    """
    cases = [(name, size) for name in sets for size in batch_sizes]
    policy = get_policy(attention or lm.model.config.mask)
    if not all(sets.values()):
        raise UserError("no examples to evaluate")
    ids = {name: [lm.task.encode_prompt(example.prompt) for example in examples] for name, examples in sets.items()}
    fitting = {name: _fitting(lm, examples, ids[name]) for name, examples in sets.items()}

    def compile_case(case: tuple[str, int]) -> float | DoesNotFit:
        name, size = case
        examples, prompts = [sets[name][i] for i in fitting[name]], [ids[name][i] for i in fitting[name]]
        if not examples:
            context = lm.model.config.max_context_tokens
            return DoesNotFit(f"does not fit: prompt and response of each example exceed the model's context of {context} tokens")
        config = _config(lm, examples, prompts, policy, prefill)
        if _is_served(lm, examples, prompts, config, _batch_size(lm, size, len(examples)), **options):
            return 0.0  # the scheduler compiles its programs itself
        return attempt(lambda: _compile(lm, _batch_size(lm, size, len(examples)), max(map(len, prompts)), config))

    # An engine's programs are made ready in the thread that compiles them.
    programs = [functools.partial(functools.partial, compile_case, case) for case in cases]
    compiled = dict(zip(cases, compiling.compile_all(programs), strict=True))
    found: dict[str, list[Evaluation | NotRun]] = {name: [] for name in sets}
    for name, size in cases:
        seconds, examples = compiled[name, size], [sets[name][i] for i in fitting[name]]
        run = functools.partial(evaluate, lm, examples, batch_size=size, attention=policy, prefill=prefill, **options)
        evaluation = seconds if isinstance(seconds, DoesNotFit) else attempt(run)
        if isinstance(seconds, DoesNotFit) or isinstance(evaluation, DoesNotFit):
            found[name].append(NotRun(size, str(evaluation)))
        else:
            left_out, seconds = len(sets[name]) - len(examples), max(seconds, evaluation.compile_seconds)
            found[name].append(dataclasses.replace(evaluation, compile_seconds=seconds, num_too_long=left_out))
    return found


def _fitting(lm: SpanLM, examples: Sequence[Example], ids: Sequence[Int[np.ndarray, "T"]]) -> list[int]:
    """Return the numbers of the examples whose prompts leave room for the longest gold response of all that fit by themselves."""
    context = lm.model.config.max_context_tokens
    prompts, responses = np.array([len(x) for x in ids]), np.array([len(example.response_ids) for example in examples])
    longest = responses[prompts + responses <= context].max(initial=0)
    return np.flatnonzero(prompts + np.maximum(responses, longest) <= context).tolist()


def _config(
    lm: SpanLM,
    examples: Sequence[Example],
    ids: Sequence[Int[np.ndarray, "T"]],
    policy: Policy,
    prefill: str | Selector,
    max_new_tokens: int | None = None,
) -> DecodeConfig:
    """Give the responses room for the longest gold one and a margin, as far as the context has it."""
    if max_new_tokens is None:
        longest = max(len(example.response_ids) for example in examples)
        left = lm.model.config.max_context_tokens - max(map(len, ids))
        max_new_tokens = max(longest, min(longest + MARGIN_TOKENS, left))
    return DecodeConfig(policy, max_new_tokens, prefill=prefill)


def _batch_size(lm: SpanLM, wanted: int, num_prompts: int) -> int:
    """Limit a batch size to the number of prompts; on a mesh that is rounded up to what the mesh divides.

    Raises: UserError for a size that the mesh does not divide.
    """
    if lm.engine.mesh is None:
        return min(wanted, num_prompts)
    check_batch(wanted, lm.engine.mesh)
    parts = num_data_shards(lm.engine.mesh)
    return min(wanted, -(-num_prompts // parts) * parts)


def _compile(lm: SpanLM, batch_size: int, prompt_tokens: int, config: DecodeConfig) -> float:
    """Compile for a batch and return the seconds that it took, hardly any where it was compiled before."""
    began = time.perf_counter()
    lm.engine.compile(batch_size, prompt_tokens, config)
    return time.perf_counter() - began


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
