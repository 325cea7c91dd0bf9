"""Write the prompt and the gold response of an expression."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data import streams
from data.arithmetic.expressions import Expression, evaluate, parse, quoted
from data.errors import UserError, check_choice
from data.spans import is_label
from data.vocab import DEFAULT_VOCAB, Vocab

Labelling = Literal["tree", "none", "plain"]


@dataclasses.dataclass(frozen=True, eq=False)
class Example(streams.Example):
    """A prompt and its gold response.

    The operations carry the labels `first_label`, `first_label + 1`, ... in post-order; where labels jump they are larger.
    `unpredictable` has the positions of the `<seg:k>` tokens of the response that open a label after a jump: nothing before
    them says which.
    """

    expression: Expression
    first_label: int
    labelling: Labelling
    unpredictable: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def prompt(self) -> str:
        """The text that `ArithmeticTask.encode_prompt` takes."""
        return self.expression.text


def encode(
    expression: Expression | str,
    *,
    vocab: Vocab = DEFAULT_VOCAB,
    labelling: Labelling = "tree",
    first_label: int = 1,
    names_first_step: bool = False,
) -> Example:
    """Write the prompt and the gold response of an expression (parsed first where it is text).

    `labelling="tree"` tags each operation's own tokens in the prompt with its label; `"none"` leaves the whole
    expression in the sink. The response is the same for both: a step per operation, in post-order, that names the
    operands which are themselves operations. `"plain"` has no span tokens at all: its steps are told apart by `<solve>`,
    and `first_label` and `names_first_step` change nothing.

    `names_first_step` puts `<ref:k>` before the prompt's `<solve>`, k the label of the first step.

    Raises:
      UserError: not an expression, an expression without operators, more operations than labels from
        `first_label` on, or a value of more than `MAX_DIGITS` digits.
    """
    expression, first_label = check_expression(expression, vocab, labelling, first_label)
    style: dict[str, Any] = {"labelling": labelling, "first_label": first_label, "names_first_step": names_first_step}
    prompt = encode_prompt(expression, vocab=vocab, **style)
    token_ids: list[int] = []
    ids, first_seg, first_ref = vocab.ids, vocab.seg_base + first_label, vocab.ref_base + first_label
    for number, step in enumerate(evaluate(expression)):
        if labelling == "plain":
            token_ids += [vocab.solve_id] if number else []
        else:
            token_ids += [first_seg + number, *(first_ref + k for k in (step.left_step, step.right_step) if k is not None)]
        token_ids += [ids[c] for c in str(step)]
    response = np.array([*token_ids, vocab.eos_id], np.int32)
    return Example(np.concatenate([prompt, response]), len(prompt), expression, first_label, labelling)


def encode_prompt(
    expression: Expression | str,
    *,
    vocab: Vocab = DEFAULT_VOCAB,
    labelling: Labelling = "tree",
    first_label: int = 1,
    names_first_step: bool = False,
) -> npt.NDArray[np.int32]:
    """Write the prompt of `encode` alone, int32 [n], ending in `<solve>`; raises the same errors, but for large values."""
    expression, first_label = check_expression(expression, vocab, labelling, first_label)
    ids, seg_base = vocab.ids, vocab.seg_base
    names = [vocab.ref_base + first_label] if names_first_step and labelling != "plain" else []
    if labelling != "tree":
        return np.array([vocab.bos_id, *(ids[c] for c in expression.text), *names, vocab.solve_id], np.int32)
    # Read backwards: parentheses close in post-order, so the k-th ")" from the left belongs to operation k, and
    # every other token to the innermost open one. A tag goes wherever the owner changes.
    reversed_ids = [vocab.solve_id, *names]
    label = first_label + expression.num_ops
    owners: list[int] = []
    tagged = 0  # the owner of the run of tokens that is still to get its tag
    for character in reversed(expression.text):
        if character == ")":
            label -= 1
            owners.append(label)
        if owners[-1] != tagged:
            if tagged:
                reversed_ids.append(seg_base + tagged)
            tagged = owners[-1]
        reversed_ids.append(ids[character])
        if character == "(":
            owners.pop()
    reversed_ids += [seg_base + tagged, vocab.bos_id]
    return np.array(reversed_ids[::-1], np.int32)


def relabel(example: Example, labels: Sequence[int], vocab: Vocab) -> Example:
    """Replace the labels of an example's operations, in post-order, by others that grow.

    Raises:
      UserError: labels that do not grow, that are not in the vocabulary, or too few.
    """
    new = np.array([0, *labels])
    if len(labels) != example.expression.num_ops or (np.diff(new) < 1).any() or new[-1] >= vocab.num_labels:
        raise UserError(f"labels are {list(labels)}: expected {example.expression.num_ops} that grow, from 1 to {vocab.num_labels - 1}")
    ids = example.token_ids.copy()
    for base in (vocab.seg_base, vocab.ref_base):
        own = is_label(ids, base, vocab)
        ids[own] = base + new[ids[own] - base - example.first_label + 1]
    jumps = find_label_jumps(ids, example.prompt_tokens, vocab)
    return dataclasses.replace(example, token_ids=ids, first_label=int(new[1]), unpredictable=jumps)


def find_label_jumps(token_ids: npt.NDArray[np.int32], prompt_tokens: int, vocab: Vocab) -> npt.NDArray[np.int64]:
    """Find the steps of a response whose label is not one more than the previous step's: positions of their `<seg:k>` tokens."""
    places = np.flatnonzero(is_label(token_ids[prompt_tokens:], vocab.seg_base, vocab)) + prompt_tokens
    return places[1:][np.diff(token_ids[places]) != 1]


def check_expression(expression: Expression | str, vocab: Vocab, labelling: Labelling, first_label: int) -> tuple[Expression, int]:
    """Parse text and check that the expression can be written; UserError says why it cannot."""
    if isinstance(expression, str):
        expression = parse(expression)
    check_choice("labelling", labelling, Labelling)
    if not expression.num_ops:
        raise UserError(f"nothing to evaluate: {quoted(expression.text)} has no operator")
    first_label = operator.index(first_label)
    if first_label < 1:
        raise UserError(f"first_label is {first_label}; allowed: 1 and above (label 0 is the sink)")
    if expression.num_ops > (allowed := max(vocab.num_labels - first_label, 0)):
        labels = f"from {first_label} on there are {allowed} labels for their steps"
        raise UserError(f"{expression.num_ops} operators; allowed: at most {allowed} ({labels})")
    return expression, first_label
