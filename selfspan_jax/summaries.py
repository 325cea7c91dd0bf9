"""What a model that writes from sources is worth: its task's scores, what it read, how fast it was, what it wrote from what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Int

from selfspan_jax.evaluation import Evaluation, evaluate
from selfspan_jax.lm import Output, SpanLM
from selfspan_jax.viewing.reading import attended


class Example(Protocol):
    """A prompt, as the task's `encode_prompt` takes it, and the ids of its gold response."""

    @property
    def prompt(self) -> str: ...
    @property
    def response_ids(self) -> Int[np.ndarray, "R"]: ...


def report(
    lm: SpanLM,
    examples: Sequence[Example],
    *,
    scores: Callable[[Sequence[Any], Sequence[Int[np.ndarray, "R"]]], dict[str, float]],
    attention: str,
    batch_sizes: Sequence[int],
    settings: Mapping[str, Any],
    passes: int = 1,
) -> dict[str, Any]:
    """Decodes the examples' prompts greedily: what JSON can hold of scores, of what was read, and of speed at each batch size.

    Responses may be 32 tokens longer than the longest gold one. Scores are of the fastest batch size.

    Args:
      scores: of examples and the ids of their responses; see `runs.ScoringTask`.
      passes: as for `evaluate`.
    """
    room = max(len(example.response_ids) for example in examples) + 32
    prompts = [example.prompt for example in examples]
    options: dict[str, Any] = {"verify": lambda prompt, ids: None, "attention": attention, "max_new_tokens": room}
    evaluations = [evaluate(lm, prompts, batch_size=size, passes=passes, progress=True, **options) for size in batch_sizes]
    best = min(evaluations, key=lambda evaluation: evaluation.decode_seconds)
    outputs = [result.output for result in best.results]
    first = outputs[0]
    return {
        **settings,
        "attention": attention,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "num_parameters": lm.model.num_parameters,
        "num_examples": len(outputs),
        **scores(examples, [out.response_ids for out in outputs]),
        **attended([out.reading for out in outputs]),
        "finished_fraction": float(np.mean([out.finished for out in outputs])),
        "unresolved_refs": sum(out.unresolved_refs for out in outputs),
        **_speed(best),
        "by_batch_size": [_speed(evaluation) for evaluation in evaluations],
        "first": {"steps": [str(step) for step in first.steps], "gold": lm.task.decode(examples[0].response_ids)},
    }


def _speed(evaluation: Evaluation) -> dict[str, float]:
    seconds = evaluation.decode_seconds
    return {
        "batch_size": evaluation.batch_size,
        "summaries_per_second": len(evaluation.results) / seconds,
        "response_tokens_per_second": sum(len(result.output.response_ids) for result in evaluation.results) / seconds,
        "decode_seconds": seconds,
        "compile_seconds": evaluation.compile_seconds,
    }


def table(report: Mapping[str, Any]) -> str:
    """What `report` returns, for people."""
    names = {
        "ROUGE": ("rouge1", "rouge2", "rougeL"),
        "facts": ("fact_accuracy", "fact_recall", "all_facts_right"),
        "spans": ("span_precision", "span_recall"),
        "attended": ("attended_fraction", "attended_fraction_body", "attended_fraction_header"),
    }
    lines = [f"{report['num_examples']} summaries ({report['attention']} attention), {report['finished_fraction']:.1%} ended by themselves"]
    for title, keys in names.items():
        known = [f"{key.replace('_', ' ')} {report[key]:.1%}" for key in keys if report.get(key) is not None]
        lines += [f"{title:<9} {',  '.join(known)}"] if known else []
    for speed in report["by_batch_size"]:
        lines.append(
            f"{speed['summaries_per_second']:.1f} summaries and {speed['response_tokens_per_second']:.0f} tokens per second "
            f"of prefill and decoding, batch {speed['batch_size']}"
        )
    return "\n".join(lines)


def sources_table(out: Output) -> str:
    """The response, each step below it with the pieces of the prompt that it named; and how much was read."""
    vocab, labels = out.reading.vocab, out.reading.roles.labels
    ids, prompt = np.asarray(out.token_ids), np.arange(len(out.token_ids)) < out.prompt_tokens
    opens = (ids >= vocab.seg_base) & (ids < vocab.seg_base + vocab.num_labels)
    lines = [out.answer or "(no step was opened)", ""]
    for step in out.steps:
        lines.append(f"<{step.label}> {step.text.strip()}")
        for ref in dict.fromkeys(step.refs):
            piece = ids[(labels == ref) & prompt & ~opens]
            lines.append(
                f"    from <{ref}> {out.task.decode(piece).strip() if len(piece) else '(nothing of the article carries that label)'}"
            )
    read = attended([out.reading]) if len(out.response_ids) else {}
    parts = {"text": read.get("attended_fraction_body"), "span tokens": read.get("attended_fraction_header")}
    lines += ["", "attended, of the context: " + ", ".join(f"{name} {share:.1%}" for name, share in parts.items() if share is not None)]
    if not out.finished:
        lines.append(f"stopped after {len(out.response_ids)} new tokens, before the response had ended")
    return "\n".join(lines)
