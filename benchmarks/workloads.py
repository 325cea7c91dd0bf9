"""Token sequences for benchmarks: prompts, and whole sequences to replay, as a trained model of that size would have read and written."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
from jaxtyping import Int

from benchmarks.shapes import Shape
from data import arithmetic
from data.vocab import Vocab
from selfspan_jax.errors import UserError
from selfspan_jax.spans import SpanVocab

WorkloadName = Literal["arithmetic", "segments"]
REFS_PER_STEP, STEP_TOKENS = 4, 32  # of responses to segments
_TOKENS_PER_OPERATOR = 18  # a little below what the corpus has, so that the first guess is seldom too few operators
_PROMPT_TOKENS_PER_OPERATOR = 6.65  # a little above what expressions have, so that most of the first guess have room


def arithmetic_tokens(
    task: arithmetic.ArithmeticTask, *, batch_size: int, num_tokens: int, steps: int, seed: int
) -> Int[np.ndarray, "B T"]:
    """Draw oracle examples, cut off within their responses: the last `steps` tokens belong to the response.

    The expressions are the shortest that are long enough, at numbers of operators a sixteenth apart.

    Raises: UserError where the vocabulary has too few labels for so long an expression, or none has so short a prompt.
    """
    vocab = task.vocab
    num_ops = max(2, num_tokens // _TOKENS_PER_OPERATOR)
    rows: list[Int[np.ndarray, "T"]] = []
    while len(rows) < batch_size:
        check_labels(num_ops, vocab, num_tokens)
        corpus = task.corpus(min_ops=num_ops, max_ops=num_ops)
        examples = list(itertools.islice(arithmetic.stream(corpus, seed=seed, split="test"), corpus.chunk_examples))
        if all(x.prompt_tokens > num_tokens - steps for x in examples):  # prompts of more operators are longer still
            raise UserError(
                f"{num_tokens} tokens, {steps} of them of a response, leave too few for a prompt: give more tokens or fewer steps"
            )
        fitting = [x.token_ids for x in examples if len(x.token_ids) > num_tokens and x.prompt_tokens <= num_tokens - steps]
        rows += fitting[: batch_size - len(rows)]
        num_ops = num_ops + max(1, num_ops // 16)
    return np.stack([row[:num_tokens] for row in rows])


def arithmetic_prompts(
    task: arithmetic.ArithmeticTask, *, batch_size: int, num_tokens: int, seed: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Draw prompts of expressions that have at most `num_tokens` tokens, and hardly fewer; return them padded, and their lengths.

    Raises: UserError where no expression is that short, or the vocabulary has too few labels for one that long.
    """
    num_ops = prompt_operators(num_tokens)
    check_labels(num_ops, task.vocab, num_tokens)
    rows: list[Int[np.ndarray, "T"]] = []
    while len(rows) < batch_size:
        if num_ops < 1:
            raise UserError(f"no expression has a prompt of {num_tokens} tokens or fewer")
        corpus = task.corpus(min_ops=num_ops, max_ops=num_ops)
        missing = batch_size - len(rows)
        chunks = -(-missing // corpus.chunk_examples)
        examples = itertools.islice(arithmetic.stream(corpus, seed=seed, split="test"), chunks * corpus.chunk_examples)
        rows += [x.token_ids[: x.prompt_tokens] for x in examples if x.prompt_tokens <= num_tokens][:missing]
        num_ops -= max(1, num_ops // 128)
    prompts = np.full((batch_size, num_tokens), task.vocab.pad_id, np.int32)
    for prompt, row in zip(prompts, rows):
        prompt[: len(row)] = row
    return prompts, np.array([len(row) for row in rows], np.int32)


def prompt_operators(num_tokens: int) -> int:
    """Guess how many operators an expression has whose prompt has so many tokens."""
    return max(1, int(num_tokens / _PROMPT_TOKENS_PER_OPERATOR))


def check_labels(num_ops: int, vocab: Vocab, num_tokens: int) -> None:
    """Raise UserError where a vocabulary has too few labels for an expression of so many operators."""
    if num_ops >= vocab.num_labels:
        raise UserError(f"{num_tokens} tokens are more than an expression of {vocab.num_labels - 1} operators has, one for each label")


def segment_prompts(
    shape: Shape, *, batch_size: int, num_tokens: int, attended_fraction: float, seed: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Draw prompts of labelled segments of random text, of which a response would attend to the given share; and their lengths.

    Raises: UserError for a share that segments cannot give.
    """
    segment = max(2.0, attended_fraction * num_tokens / _NAMED_SHARE)
    num_segments = int((num_tokens - 2) // segment)
    if not 1 <= num_segments < shape.vocab.num_labels - 1:
        raise UserError(
            f"attended_fraction is {attended_fraction}: in a prompt of {num_tokens} tokens that takes {num_segments} segments of "
            f"{segment:.1f} tokens; allowed: 1 segment to {shape.vocab.num_labels - 2}"
        )
    rng, text_ids = np.random.default_rng(seed), _text_ids(shape)
    prompts = rng.choice(text_ids, (batch_size, num_tokens)).astype(np.int32)
    for prompt in prompts:
        _write_segments(rng, shape.vocab, prompt, segment, num_segments)
    return prompts, np.full(batch_size, num_tokens, np.int32)


def segment_tokens(
    shape: Shape, *, batch_size: int, num_tokens: int, steps: int, attended_fraction: float, named_again: int = 0, seed: int
) -> Int[np.ndarray, "B T"]:
    """Draw sequences whose last `steps` tokens attend to a given share of their context on average, span tokens included.

    The prompt is labelled segments of random text; the response consists of steps of 32 tokens: `<seg>`, four `<ref>` that name
    segments of the prompt, random text. Segments are as long as the share requires, give or take a quarter. The named
    segments are drawn so that the mean stays on course; `named_again` of the four are of those that the step before named.
    Sequences are at different places of their steps at the same time.

    Raises: UserError for a share that segments cannot give.
    """
    vocab, rng, text_ids = shape.vocab, np.random.default_rng(seed), _text_ids(shape)
    wanted = attended_fraction * (num_tokens - (steps - 1) / 2)  # tokens that the timed ones attend to, on average
    segment = (wanted - 2 - (STEP_TOKENS + 1) / 2) / _NAMED_SHARE
    longest_response = 2 * STEP_TOKENS + steps
    num_segments = int((num_tokens - longest_response - 2) // max(segment, 1))
    num_labels = num_segments + 1 + longest_response // STEP_TOKENS + 2
    if segment < 2 or num_segments < 2 * REFS_PER_STEP or num_labels > vocab.num_labels:
        raise UserError(
            f"attended_fraction is {attended_fraction}: in a context of {num_tokens} tokens that takes {max(num_segments, 0)} segments "
            f"of {segment:.1f} tokens; allowed: {2 * REFS_PER_STEP} segments and more, 2 tokens and more, {vocab.num_labels} labels in all"
        )
    sizes = (num_tokens, steps, segment, num_segments, named_again)
    return np.stack([_segment_row(rng, vocab, text_ids, *sizes) for _ in range(batch_size)])


# A token at place i of its step sees <bos> and <solve>, i + 1 tokens of its own, and the min(i, refs) segments named so far.
_NAMED_SHARE = np.minimum(np.arange(STEP_TOKENS), REFS_PER_STEP).mean()


def _text_ids(shape: Shape) -> np.ndarray:
    vocab, labels = shape.vocab, np.arange(shape.vocab.num_labels)
    control = [vocab.pad_id, vocab.bos_id, vocab.eos_id, vocab.solve_id, *(vocab.seg_base + labels), *(vocab.ref_base + labels)]
    return np.setdiff1d(np.arange(shape.vocab_size), control)


def _write_segments(
    rng: np.random.Generator, vocab: SpanVocab, prompt: Int[np.ndarray, "T"], segment: float, num_segments: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write the control tokens of a prompt over its text; return where segments start and end, and which have text."""
    prompt[0], prompt[-1] = vocab.bos_id, vocab.solve_id
    ends = 1 + np.cumsum(segment * rng.uniform(0.75, 1.25, num_segments)).round().astype(int)
    starts = np.concatenate([[1], ends[:-1]])
    ends = np.minimum(ends, len(prompt) - 1)
    usable = np.flatnonzero(ends - starts >= 2)
    prompt[starts[usable]] = vocab.seg_base + 1 + usable
    if len(usable) and ends[usable[-1]] < len(prompt) - 1:  # the rest of the prompt has a label that no step names
        prompt[ends[usable[-1]]] = vocab.seg_base + 1 + num_segments
    return starts, ends, usable


def _segment_row(
    rng: np.random.Generator,
    vocab: SpanVocab,
    text_ids: np.ndarray,
    num_tokens: int,
    steps: int,
    segment: float,
    num_segments: int,
    named_again: int,
) -> Int[np.ndarray, "T"]:
    before = STEP_TOKENS + int(rng.integers(STEP_TOKENS))  # response tokens before the timed ones
    prompt_tokens = num_tokens - steps - before
    row = rng.choice(text_ids, num_tokens).astype(np.int32)
    starts, ends, usable = _write_segments(rng, vocab, row[:prompt_tokens], segment, num_segments)
    ahead, named = 0.0, usable[:0]  # tokens named so far beyond what was wanted; what the step before named
    for number, start in enumerate(range(prompt_tokens, num_tokens, STEP_TOKENS)):
        again = rng.permutation(named)[:named_again]
        others = np.setdiff1d(usable, named if named_again else again)
        choices = [np.concatenate([again, rng.choice(others, REFS_PER_STEP - len(again), replace=False)]) for _ in range(32)]
        sizes = [(ends[names] - starts[names]).sum() - REFS_PER_STEP * segment for names in choices]
        best = int(np.argmin(np.abs(ahead + np.array(sizes))))
        ahead, named = ahead + sizes[best], choices[best]
        header = [vocab.seg_base + num_segments + 2 + number, *(vocab.ref_base + 1 + choices[best])]
        row[start : start + len(header)] = header[: num_tokens - start]
    return row
