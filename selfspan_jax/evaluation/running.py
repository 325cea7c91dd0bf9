"""Decode a task's examples in batches or by a scheduler, all programs compiled first."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from pallas_kernels.prompt_attention import Selector
from selfspan_jax.attention.policies import Policy, get_policy
from selfspan_jax.config import DecodeConfig
from selfspan_jax.errors import UserError
from selfspan_jax.evaluation.forcing import Order, generate_under
from selfspan_jax.evaluation.results import Evaluation, NotRun
from selfspan_jax.lm import SpanLM, prefill_tokens
from selfspan_jax.parallel.compiling import compile_all
from selfspan_jax.parallel.memory import DoesNotFit, attempt
from selfspan_jax.parallel.mesh import check_batch, num_data_shards
from selfspan_jax.serving.requests import Request
from selfspan_jax.serving.throughput import is_faster, run_together, shared_beginning, throughput_scheduler
from selfspan_jax.task import Example
from selfspan_jax.tiers.engine import HostEngine
from selfspan_jax.viewing.output import Output

MODEL, ORDER = "model", "order"  # the model chooses what steps name, or what the order of the steps does not say of it
MARGIN_TOKENS = 16  # that a response may be longer than the longest gold one
_LINE_SECONDS = 30  # from a line of progress to the next, where there is no terminal


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
      progress: show a bar on a terminal, elsewhere print a line at times.

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
        return _evaluate_served(lm, examples, ids, config, batch_size, progress)
    compile_seconds, read_seconds = _compile(lm, batch_size, int(lengths.max()), config), 0.0
    seconds = np.zeros(2)  # of prefill, and of all
    state: Any = None
    order = np.argsort([len(prompt) for prompt in ids], kind="stable")  # similar lengths end at about the same step
    outputs: dict[int, Output] = {}
    with _counted(f"decode ({policy.name})", len(ids), progress) as count:
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
            count(len(chosen))
    in_order = tuple(outputs[i] for i in range(len(ids)))
    first, both = seconds.tolist()
    own: dict[str, Any] = {"prefill_seconds": first if given is None else None, "read_seconds": read_seconds}
    own["missed_rows"] = sum(out.misses or 0 for out in in_order) if isinstance(lm.engine, HostEngine) else None
    return Evaluation(lm.task, tuple(examples), in_order, batch_size, both, compile_seconds, **own)


def _is_served(lm: SpanLM, examples, ids, config: DecodeConfig, batch_size: int, passes=1, sources=MODEL, constrained=False, **_) -> bool:
    """Tell whether a scheduler decodes the examples, in place of static batches of similar lengths."""
    pairs = sorted((len(prompt), len(example.response_ids)) for prompt, example in zip(ids, examples, strict=True))
    prompt_tokens, new_tokens = ([pair[i] for pair in pairs] for i in range(2))
    plain = passes == 1 and sources == MODEL and not constrained
    return plain and is_faster(lm.engine, config, prompt_tokens, new_tokens, batch_size, shared_beginning(ids))


def _evaluate_served(
    lm: SpanLM, examples: Sequence[Example], ids: Sequence[Int[np.ndarray, "T"]], config: DecodeConfig, batch_size: int, progress: bool
) -> Evaluation:
    longest, policy, stamps = max(map(len, ids)), get_policy(config.attention), [time.perf_counter()]
    scheduler = throughput_scheduler(lm.engine, config, batch_size, longest, longest + config.max_new_tokens)
    scheduler.warm_up(draws=False)
    stamps.append(time.perf_counter())
    requests = [Request(prompt, config.max_new_tokens, expected_tokens=len(example.response_ids)) for prompt, example in zip(ids, examples)]
    with _counted(f"decode ({policy.name})", len(ids), progress) as count:
        found = run_together(scheduler, requests, lambda: count(1))
    stamps.append(time.perf_counter())
    decoded = zip(examples, ids, found, strict=True)
    outputs = tuple(lm.read_tokens(own.prompt, prompt, tokens[0], tokens[1], policy) for own, prompt, tokens in decoded)
    for out in outputs:
        _ = out.text, out.roles, out.verdict  # computed when they are first asked for
    compiling, decoding, reading = np.diff([*stamps, time.perf_counter()]).tolist()
    own: dict[str, Any] = {"num_places": scheduler.config.num_sequences, "read_seconds": reading}
    own["missed_rows"] = scheduler.stats.missed_rows if isinstance(lm.engine, HostEngine) else None
    return Evaluation(lm.task, tuple(examples), outputs, batch_size, decoding, compiling, **own)


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
    max_new_tokens: int | None = None,
    progress: bool = False,
    **options: Any,
) -> dict[str, list[Evaluation | NotRun]]:
    """Call `evaluate` for sets of examples at each batch size, all of them compiled first, several at once.

    With `progress` it says at once, before anything is compiled, how much there is to decode.
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
    chosen = {name: [sets[name][i] for i in own] for name, own in fitting.items()}
    ids = {name: [ids[name][i] for i in own] for name, own in fitting.items()}
    configs = {name: _config(lm, own, ids[name], policy, prefill, max_new_tokens) for name, own in chosen.items() if own}
    sizes = {(name, size): _batch_size(lm, size, len(chosen[name])) for name, size in cases}
    if progress:
        lengths, new_tokens = [len(prompt) for own in ids.values() for prompt in own], [own.max_new_tokens for own in configs.values()]
        prompts = f"prompts of {sum(lengths):,} tokens in all, the longest of {max(lengths, default=0):,}"
        _tell(f"decoding {len(lengths):,} examples: {prompts}; responses of at most {max(new_tokens, default=0):,}")

    def compile_case(case: tuple[str, int]) -> float | DoesNotFit:
        examples, prompts, size = chosen[case[0]], ids[case[0]], sizes[case]
        if not examples:
            context = lm.model.config.max_context_tokens
            return DoesNotFit(f"does not fit: prompt and response of each example exceed the model's context of {context} tokens")
        config = configs[case[0]]
        if _is_served(lm, examples, prompts, config, size, **options):
            return 0.0  # the scheduler compiles its programs itself
        return attempt(lambda: _compile(lm, size, max(map(len, prompts)), config))

    # An engine's programs are made ready in the thread that compiles them.
    programs = [functools.partial(functools.partial, compile_case, case) for case in cases]
    compiled = dict(zip(cases, compile_all(programs), strict=True))
    found: dict[str, list[Evaluation | NotRun]] = {name: [] for name in sets}
    for name, size in cases:
        seconds, examples = compiled[name, size], chosen[name]
        given: dict[str, Any] = {"prefill": prefill, "max_new_tokens": max_new_tokens, "progress": progress, **options}
        run = functools.partial(evaluate, lm, examples, batch_size=size, attention=policy, **given)
        evaluation = seconds if isinstance(seconds, DoesNotFit) else attempt(run)
        if isinstance(seconds, DoesNotFit) or isinstance(evaluation, DoesNotFit):
            found[name].append(NotRun(size, str(evaluation)))
        else:
            left_out, seconds = len(sets[name]) - len(examples), max(seconds, evaluation.compile_seconds)
            found[name].append(dataclasses.replace(evaluation, compile_seconds=seconds, num_too_long=left_out))
    return found


@contextlib.contextmanager
def _counted(what: str, number: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Give a function that counts prompts as done, and shows how many are."""
    done, told = 0, time.perf_counter() if shown else 0.0
    with tqdm(total=number, desc=what, unit="prompt", leave=False, disable=None if shown else True) as bar:

        def count(more: int) -> None:
            nonlocal done, told
            done += more
            bar.update(more)
            if shown and bar.disable and done < number and time.perf_counter() > told + _LINE_SECONDS:
                _tell(f"decoded {done:,} of {number:,} prompts")
                told = time.perf_counter()

        yield count


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
    prompt_tokens = max(map(len, ids))
    if max_new_tokens is None:
        longest = max(len(example.response_ids) for example in examples)
        left = lm.model.config.max_context_tokens - prompt_tokens
        max_new_tokens = max(longest, min(longest + MARGIN_TOKENS, left))
    return DecodeConfig(policy, max_new_tokens, prefill_tokens=prefill_tokens(prompt_tokens), prefill=prefill)


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
