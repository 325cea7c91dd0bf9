"""Check responses step by step, with Python integers."""

import dataclasses
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from data.arithmetic.expressions import MAX_DIGITS, Expression, evaluate, quoted
from data.arithmetic.oracle import Labelling, check_expression
from data.spans import cut_steps
from data.vocab import DEFAULT_VOCAB, Vocab

_ANSWER = re.compile(rf"=(-?[0-9]{{1,{MAX_DIGITS}}})\Z")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of checking a response.

    answer: the value that the last step ends in, None where there is none.
    answer_right: it is the value of the expression.
    steps_right: every operation evaluated, in order, with the right operands, operator, value and label, nothing
      else written, and `<eos>` at the end.
    spans_right: one step per operation, and each names exactly the operands that are operations (in plain text: nothing).
    first_wrong_step: index (from 0) of the first step that is wrong, missing or one too many. None where there is
      none: `steps_right`, or nothing but `<eos>` is missing.
    num_steps: steps that the response opens.
    message: the first fault, or that there is none, in one line.
    """

    answer: int | None
    answer_right: bool
    steps_right: bool
    spans_right: bool
    first_wrong_step: int | None
    num_steps: int
    message: str


class _Response(NamedTuple):
    """A response as it is written: what stands before the first step, and of each step its label, the labels that it names, and the rest.

    Texts are written token by token; `shown` writes that of a step, or None for what stands before, as a tokenizer's bytes make it.
    """

    before: str
    labels: list[int | None]  # None in plain text
    named: list[set[int]]
    bodies: list[str]
    ended: bool
    shown: Callable[[int | None], str]


def verify(
    expression: Expression | str,
    response: str | Iterable[int],
    *,
    vocab: Vocab = DEFAULT_VOCAB,
    labelling: Labelling = "tree",
    first_label: int = 1,
) -> Verdict:
    """Check a response step by step.

    `response` is text or token ids; whatever follows `<eos>`, and padding without one, is ignored. No response is
    malformed enough to raise: what cannot be read is a wrong step.

    Raises:
      UserError: the expression itself is not one that `encode` takes.
    """
    expression, first_label = check_expression(expression, vocab, labelling, first_label)
    written = _read_response(response, vocab)
    answer_text = _answer_text(written)
    answer_value = None if answer_text is None else int(answer_text)

    # Compared as text: that refuses leading zeros and a negative zero, and never converts an endless number.
    operations = evaluate(expression)
    bodies, num_ops = list(map(str, operations)), len(operations)
    labels: Sequence[int | None] = range(first_label, first_label + num_ops)
    spans = [{first_label + k for k in operation[2:5:2] if k is not None} for operation in operations]
    if labelling == "plain":
        written, labels, spans = _plain_steps(written), [None] * num_ops, [set()] * num_ops
    num_steps = len(written.labels)
    pairs = zip(zip(written.labels, written.bodies), zip(labels, bodies))
    differs = next((index for index, (found, gold) in enumerate(pairs) if found != gold), None)
    wrong_span = next((index for index, (found, gold) in enumerate(zip(written.named, spans)) if found != gold), None)

    first_wrong_step = (
        0 if written.before else differs if differs is not None else min(num_steps, num_ops) if num_steps != num_ops else None
    )
    if written.before:
        message = f"step 1: {quoted(written.shown(None))} stands before the first step"
    elif differs is not None and written.labels[differs] != labels[differs]:
        message = f"step {differs + 1}: carries label {written.labels[differs]}, expected {labels[differs]}"
    elif differs is not None:
        message = f"step {differs + 1}: expected {quoted(bodies[differs])}, found {quoted(written.shown(differs))}"
    elif num_steps < num_ops:
        message = f"step {num_steps + 1}: missing"
    elif num_steps > num_ops:
        message = f"step {num_ops + 1}: one too many: the expression has {num_ops}"
    elif not written.ended:
        message = "every step is right, but <eos> is missing"
    elif wrong_span is not None:
        found, minimal = _labels(written.named[wrong_span]), _labels(spans[wrong_span])
        message = f"every step is right, but step {wrong_span + 1}: names {found}, the minimal span is {minimal}"
    else:
        message = f"all {num_ops} steps and spans are right" if num_ops > 1 else "the step and its span are right"
    return Verdict(
        answer=answer_value,
        answer_right=answer_value == operations[-1].value,
        steps_right=first_wrong_step is None and written.ended,
        spans_right=num_steps == num_ops and wrong_span is None,
        first_wrong_step=first_wrong_step,
        num_steps=num_steps,
        message=message,
    )


def answer(response: str | Iterable[int], *, vocab: Vocab = DEFAULT_VOCAB) -> str | None:
    """Read the value that a response (text or ids) ends in, as written: what follows the last step's `=`, or None."""
    return _answer_text(_read_response(response, vocab))


def _answer_text(written: _Response) -> str | None:
    match = _ANSWER.search(written.bodies[-1] if written.bodies else written.before)
    return match[1] if match else None


def _read_response(response: str | Iterable[int], vocab: Vocab) -> _Response:
    strangers: list[str] = []  # what is no token of the vocabulary gets an id beyond it

    def stranger(token: str) -> int:
        strangers.append(token)
        return vocab.size + len(strangers) - 1

    ids: Iterable[int]
    if isinstance(response, str):
        ids = [vocab.ids[token] if token in vocab.ids else stranger(token) for _, token in vocab.split(response)]
    elif isinstance(response, np.ndarray) and np.all((response >= 0) & (response < vocab.size)):
        ids = response
    else:
        ids = [i if 0 <= i < vocab.size else stranger(f"<id:{i:#x}>") for i in map(operator.index, response)]
    cut = cut_steps(ids, vocab)
    texts = list(map(((*vocab.tokens, *strangers) if strangers else vocab.tokens).__getitem__, cut.body))

    def shown(step: int | None) -> str:
        start, end = (0, cut.bounds[0]) if step is None else cut.bounds[step : step + 2]
        known = max(cut.body[start:end], default=0) < vocab.size
        return vocab.decode(cut.body[start:end]) if known else "".join(texts[start:end])

    bodies = ["".join(texts[start:end]) for start, end in itertools.pairwise(cut.bounds)]
    return _Response("".join(texts[: cut.bounds[0]]), list(cut.labels), cut.named, bodies, cut.ended, shown)


def _plain_steps(written: _Response) -> _Response:
    """Cut a response without span tokens at its `<solve>` tokens. A span token is text like any other, and wrong."""
    bodies = written.before.split("<solve>")
    bodies[-1] += "".join(f"<seg:{label}>{body}" for label, body in zip(written.labels, written.bodies))
    bodies = [body for body in bodies if body or len(bodies) > 1]
    return _Response(
        "", [None] * len(bodies), [set()] * len(bodies), bodies, written.ended, lambda step: "" if step is None else bodies[step]
    )


def _labels(labels: Iterable[int]) -> str:
    shown = sorted(labels)
    return "nothing" if not shown else ", ".join(map(str, shown[:8])) + (", ..." if len(shown) > 8 else "")
