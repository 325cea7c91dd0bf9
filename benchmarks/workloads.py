"""Token sequences for decode benchmarks to replay: what a trained model of that size would have read and written."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
from jaxtyping import Int

from benchmarks.shapes import Shape
from data import arithmetic
from selfspan_jax.errors import UserError
from selfspan_jax.spans import SpanVocab

WorkloadName = Literal["arithmetic", "segments"]
REFS_PER_STEP, STEP_TOKENS = 4, 32  # of responses to segments
_TOKENS_PER_OPERATOR = 18  # a little below what the corpus has, so that the first guess is seldom too few operators


def arithmetic_tokens(
    task: arithmetic.ArithmeticTask, *, batch_size: int, num_tokens: int, steps: int, seed: int
) -> Int[np.ndarray, "B T"]:
    """Draw oracle examples, cut off within their responses: the last `steps` tokens belong to the response.

    The expressions are the shortest that are long enough, at numbers of operators a sixteenth apart.

    Raises: UserError where the vocabulary has too few labels for so long an expression.
    """
    vocab = task.vocab
    num_ops = max(2, num_tokens // _TOKENS_PER_OPERATOR)
    rows: list[Int[np.ndarray, "T"]] = []
    while len(rows) < batch_size:
        if num_ops >= vocab.num_labels:
            raise UserError(f"{num_tokens} tokens are more than an expression of {vocab.num_labels - 1} operators has, one for each label")
        corpus = task.corpus(min_ops=num_ops, max_ops=num_ops)
        examples = itertools.islice(arithmetic.stream(corpus, seed=seed, split="test"), corpus.chunk_examples)
        fitting = [x.token_ids for x in examples if len(x.token_ids) > num_tokens and x.prompt_tokens <= num_tokens - steps]
        rows += fitting[: batch_size - len(rows)]
        num_ops = num_ops + max(1, num_ops // 16)
    return np.stack([row[:num_tokens] for row in rows])


def segment_tokens(
    shape: Shape, *, batch_size: int, num_tokens: int, steps: int, attended_fraction: float, seed: int
) -> Int[np.ndarray, "B T"]:
    """Draw sequences whose last `steps` tokens attend to a given share of their context on average, span tokens included.

    The prompt is labelled segments of random text; the response consists of steps of 32 tokens: `<seg>`, four `<ref>` that name
    segments of the prompt, random text. Segments are as long as the share requires, give or take a quarter. The named
    segments are drawn so that the mean stays on course. Sequences are at different places of their steps at the same time.

    Raises: UserError for a share that segments cannot give.
    """
    vocab, rng = shape.vocab, np.random.default_rng(seed)
    labels = np.arange(vocab.num_labels)
    control = [vocab.pad_id, vocab.bos_id, vocab.eos_id, vocab.solve_id, *(vocab.seg_base + labels), *(vocab.ref_base + labels)]
    text_ids = np.setdiff1d(np.arange(shape.vocab_size), control)
    # A token at place i of its step sees <bos> and <solve>, i + 1 tokens of its own, and the min(i, refs) segments named so far.
    named_share = np.minimum(np.arange(STEP_TOKENS), REFS_PER_STEP).mean()
    wanted = attended_fraction * (num_tokens - (steps - 1) / 2)  # tokens that the timed ones attend to, on average
    segment = (wanted - 2 - (STEP_TOKENS + 1) / 2) / named_share
    longest_response = 2 * STEP_TOKENS + steps
    num_segments = int((num_tokens - longest_response - 2) // max(segment, 1))
    num_labels = num_segments + 1 + longest_response // STEP_TOKENS + 2
    if segment < 2 or num_segments < 2 * REFS_PER_STEP or num_labels > vocab.num_labels:
        raise UserError(
            f"attended_fraction is {attended_fraction}: in a context of {num_tokens} tokens that takes {max(num_segments, 0)} segments "
            f"of {segment:.1f} tokens; allowed: {2 * REFS_PER_STEP} segments and more, 2 tokens and more, {vocab.num_labels} labels in all"
        )
    return np.stack([_segment_row(rng, vocab, text_ids, num_tokens, steps, segment, num_segments) for _ in range(batch_size)])


def _segment_row(
    rng: np.random.Generator, vocab: SpanVocab, text_ids: np.ndarray, num_tokens: int, steps: int, segment: float, num_segments: int
) -> Int[np.ndarray, "T"]:
    before = STEP_TOKENS + int(rng.integers(STEP_TOKENS))  # response tokens before the timed ones
    prompt_tokens = num_tokens - steps - before
    row = rng.choice(text_ids, num_tokens).astype(np.int32)
    row[0], row[prompt_tokens - 1] = vocab.bos_id, vocab.solve_id
    ends = 1 + np.cumsum(segment * rng.uniform(0.75, 1.25, num_segments)).round().astype(int)
    starts = np.concatenate([[1], ends[:-1]])
    ends = np.minimum(ends, prompt_tokens - 1)
    usable = np.flatnonzero(ends - starts >= 2)
    row[starts[usable]] = vocab.seg_base + 1 + usable
    if ends[usable[-1]] < prompt_tokens - 1:  # the rest of the prompt has a label that no step names
        row[ends[usable[-1]]] = vocab.seg_base + 1 + num_segments
    ahead = 0.0  # tokens named so far beyond what was wanted
    for number, start in enumerate(range(prompt_tokens, num_tokens, STEP_TOKENS)):
        choices = [rng.choice(usable, REFS_PER_STEP, replace=False) for _ in range(32)]
        sizes = [(ends[names] - starts[names]).sum() - REFS_PER_STEP * segment for names in choices]
        best = int(np.argmin(np.abs(ahead + np.array(sizes))))
        ahead += sizes[best]
        header = [vocab.seg_base + num_segments + 2 + number, *(vocab.ref_base + 1 + choices[best])]
        row[start : start + len(header)] = header[: num_tokens - start]
    return row
