"""Check responses step by step, with Python integers."""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from data import spans
from data.arithmetic.expressions import MAX_DIGITS, Expression, evaluate, quoted
from data.arithmetic.oracle import Labelling, check_expression
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


class _Written(NamedTuple):
    """A step as a response writes it: its label (None in plain text), the labels that it names, and the rest, token by token and as ids."""

    label: int | None
    named: set[int]
    body: str
    ids: list[int]


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
    stray, written, ended, shown = _read_response(response, vocab)
    answer_text = _answer_text(stray, written)
    if labelling == "plain":
        stray, written, shown = _Written(None, set(), "", []), _plain_steps(stray.body, written), lambda step: step.body
    answer_value = None if answer_text is None else int(answer_text)

    operations = evaluate(expression)
    problems: dict[int, str] = {}  # of evaluation, by step
    wrong_spans: dict[int, str] = {}
    if stray.body:
        problems[0] = f"{quoted(shown(stray))} stands before the first step"
    for index, (operation, step) in enumerate(zip(operations, written)):
        label, minimal = None, set()
        if labelling != "plain":
            label, minimal = first_label + index, {first_label + k for k in (operation.left_step, operation.right_step) if k is not None}
        # Compared as text: that refuses leading zeros and a negative zero, and never converts an endless number.
        if step.label != label:
            problems.setdefault(index, f"carries label {step.label}, expected {label}")
        elif step.body != (expected := str(operation)):
            problems.setdefault(index, f"expected {quoted(expected)}, found {quoted(shown(step))}")
        if step.named != minimal:
            wrong_spans[index] = f"names {_labels(step.named)}, the minimal span is {_labels(minimal)}"
    if len(written) < len(operations):
        problems.setdefault(len(written), "missing")
    elif len(written) > len(operations):
        problems.setdefault(len(operations), f"one too many: the expression has {len(operations)}")

    first_wrong_step = min(problems, default=None)
    if first_wrong_step is not None:
        message = f"step {first_wrong_step + 1}: {problems[first_wrong_step]}"
    elif not ended:
        message = "every step is right, but <eos> is missing"
    elif wrong_spans:
        message = f"every step is right, but step {min(wrong_spans) + 1}: {wrong_spans[min(wrong_spans)]}"
    else:
        message = f"all {len(operations)} steps and spans are right"
    return Verdict(
        answer=answer_value,
        answer_right=answer_value == operations[-1].value,
        steps_right=first_wrong_step is None and ended,
        spans_right=len(written) == len(operations) and not wrong_spans,
        first_wrong_step=first_wrong_step,
        num_steps=len(written),
        message=message,
    )


def answer(response: str | Iterable[int], *, vocab: Vocab = DEFAULT_VOCAB) -> str | None:
    """Read the value that a response (text or ids) ends in, as written: what follows the last step's `=`, or None."""
    stray, written, *_ = _read_response(response, vocab)
    return _answer_text(stray, written)


def _answer_text(stray: _Written, written: list[_Written]) -> str | None:
    match = _ANSWER.search((written[-1] if written else stray).body)
    return match[1] if match else None


def _read_response(response: str | Iterable[int], vocab: Vocab) -> tuple[_Written, list[_Written], bool, Callable[[_Written], str]]:
    """Cut a response into (tokens before the first step, steps, whether `<eos>` ends it); and say how a step's text is shown."""
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
    before, steps, ended = spans.read_steps(ids, vocab)
    tokens = (*vocab.tokens, *strangers) if strangers else vocab.tokens

    def shown(step: _Written) -> str:  # as a tokenizer's bytes make it
        return vocab.decode(step.ids) if max(step.ids, default=0) < vocab.size else step.body

    def written(label: int | None, named: set[int], ids: list[int]) -> _Written:
        return _Written(label, named, "".join(map(tokens.__getitem__, ids)), ids)

    return written(None, set(), before), [written(*step) for step in steps], ended, shown


def _plain_steps(stray: str, written: list[_Written]) -> list[_Written]:
    """Cut a response without span tokens at its `<solve>` tokens. A span token is text like any other, and wrong."""
    bodies = stray.split("<solve>")
    bodies[-1] += "".join(f"<seg:{step.label}>{step.body}" for step in written)
    return [_Written(None, set(), body, []) for body in bodies if body or len(bodies) > 1]


def _labels(labels: Iterable[int]) -> str:
    shown = sorted(labels)
    return "nothing" if not shown else ", ".join(map(str, shown[:8])) + (", ..." if len(shown) > 8 else "")
