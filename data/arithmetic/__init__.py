"""Arithmetic expressions: parser, oracle of gold responses, verifier, and the endless streams of examples.

The grammar of prompts and responses is the span protocol's, section 5:

    ((51+75)-(95*3))
    <bos><seg:3>(<seg:1>(51+75)<seg:3>-<seg:2>(95*3)<seg:3>)<solve>
    <seg:1>51+75=126<seg:2>95*3=285<seg:3><ref:1><ref:2>126-285=-159<eos>

Two things are ours. `names_first_step` ends the prompt in `<ref:1><solve>`: where the first step's label stands in a prompt
is arbitrary, so a model whose prompt tokens see only their surroundings cannot know it (docs/protocol.md). And
`labelling="plain"` is text without span tokens, for models that are to be compared:

    <bos>((51+75)-(95*3))<solve>51+75=126<solve>95*3=285<solve>126-285=-159<eos>
"""

import dataclasses
import functools
import itertools
import operator
import random
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from data import streams
from data.streams import Split
from data.vocab import DEFAULT_VOCAB, Vocab, check_json

Labelling = Literal["tree", "none", "plain"]
JumpsAt = Literal["any", "leaves"]

MAX_DIGITS = 640  # the longest integer that every setting of Python converts to and from text
CHUNK_EXAMPLES = 512  # the unit of random state, and of a worker's work

_APPLY: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "negate": 3}
_TOO_LARGE = 10**MAX_DIGITS
_LEXEME = re.compile(r"[0-9]+|\S")
_ANSWER = re.compile(rf"=(-?[0-9]{{1,{MAX_DIGITS}}})\Z")


class ExpressionError(ValueError):
    """Text that is not an expression; `column` (from 1) is where reading stopped."""

    def __init__(self, column: int, problem: str) -> None:
        super().__init__(f"column {column}: {problem}")
        self.column = column


# ---------------------------------------------------------------------------------------------- expressions


@dataclasses.dataclass(frozen=True)
class Expression:
    """A binary expression in postfix order: leaves are integers, operations are `+`, `-` or `*`.

    `((51+75)-(95*3))` is `(51, 75, "+", 95, 3, "*", "-")`. Iterating gives the nodes in post-order, the
    order in which the protocol numbers operations; no depth is too deep.
    """

    postfix: tuple[int | str, ...]

    def __post_init__(self) -> None:
        depth = 0
        for node in self.postfix:
            depth += 1 if type(node) is int else -1
            if depth < 1 or (type(node) is not int and node not in _APPLY):
                raise ValueError(f"not a postfix expression at {node!r}: expected integers and + - * of two operands")
        if depth != 1:
            raise ValueError(f"a postfix expression of {depth} values: expected one")

    def __iter__(self) -> Iterator[int | str]:
        return iter(self.postfix)

    def __str__(self) -> str:
        return self.text

    @property
    def num_ops(self) -> int:
        return len(self.postfix) // 2

    @functools.cached_property
    def text(self) -> str:
        """The canonical text: every operation in parentheses, no spaces."""
        return _infix(self.postfix)

    @property
    def value(self) -> int:
        """The exact value. ValueError where a value on the way has more than `MAX_DIGITS` digits."""
        return _steps(self)[-1].value if self.num_ops else int(self.postfix[0])


def _infix(postfix: Iterable[int | str]) -> str:
    stack: list[str] = []
    for node in postfix:
        if type(node) is int:
            stack.append(str(node))
        else:
            right = stack.pop()
            stack[-1] = f"({stack[-1]}{node}{right})"
    return stack[0]


def parse(text: str) -> Expression:
    """Reads ordinary infix: `+ - *`, precedence, left associativity, parentheses, unary minus, spaces.

    A minus before a number makes a negative leaf; before anything else, `-x` is `0-x`. Numbers are integers of at
    most `MAX_DIGITS` digits. Takes any depth and length (a shunting yard, no recursion).

    Raises:
      ExpressionError: a ValueError with the column (from 1) at which the text stops being an expression.
    """
    output: list[int | str] = []
    waiting: list[tuple[str, int, int]] = []  # (operator or parenthesis, column, where its operand starts in output)

    def apply_waiting(precedence: int) -> None:
        while waiting and _PRECEDENCE.get(waiting[-1][0], 0) >= precedence:
            symbol, _, start = waiting.pop()
            if symbol != "negate":
                output.append(symbol)
            elif len(output) == start + 1:
                output[start] = -int(output[start])
            else:
                output.insert(start, 0)
                output.append("-")

    operand_expected = True
    for match in _LEXEME.finditer(text):
        lexeme, column = match.group(), match.start() + 1
        if operand_expected:
            if lexeme in ("(", "-"):
                waiting.append(("negate" if lexeme == "-" else "(", column, len(output)))
                continue
            if not ("0" <= lexeme[0] <= "9"):
                raise ExpressionError(column, f'expected a number or "(", found {_quoted(lexeme)}')
            if len(lexeme) > MAX_DIGITS:
                raise ExpressionError(column, f"a number of {len(lexeme)} digits; at most {MAX_DIGITS} are read")
            output.append(int(lexeme))
            operand_expected = False
        elif lexeme in _APPLY:
            apply_waiting(_PRECEDENCE[lexeme])
            waiting.append((lexeme, column, len(output)))
            operand_expected = True
        elif lexeme == ")":
            apply_waiting(1)
            if not waiting:
                raise ExpressionError(column, 'found ")" without "("')
            waiting.pop()
        else:
            raise ExpressionError(column, f"expected an operator (+ - *), found {_quoted(lexeme)}")
    if operand_expected:
        raise ExpressionError(len(text) + 1, 'expected a number or "(", found the end')
    apply_waiting(1)
    if waiting:
        raise ExpressionError(waiting[-1][1], 'found "(" that is never closed')
    return Expression(tuple(output))


def _quoted(lexeme: str) -> str:
    shown = lexeme if len(lexeme) <= 24 else lexeme[:21] + "..."
    return f'"{shown}"' if shown.isprintable() else ascii(shown)


# --------------------------------------------------------------------------------------------------- oracle


class _Step(NamedTuple):
    """One operation with the values of its operands; `left_step` and `right_step` index the steps they come from."""

    symbol: str
    left: int
    left_step: int | None
    right: int
    right_step: int | None
    value: int


def _steps(expression: Expression) -> list[_Step]:
    steps: list[_Step] = []
    stack: list[tuple[int, int | None]] = []
    for node in expression.postfix:
        if type(node) is int:
            stack.append((node, None))
            continue
        right, right_step = stack.pop()
        left, left_step = stack.pop()
        value = _APPLY[node](left, right)  # type: ignore[index]
        if not -_TOO_LARGE < value < _TOO_LARGE:
            raise ValueError(f"operation {len(steps) + 1} has a value of more than {MAX_DIGITS} digits")
        stack.append((value, len(steps)))
        steps.append(_Step(node, left, left_step, right, right_step, value))  # type: ignore[arg-type]
    return steps


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A prompt and its gold response.

    `token_ids` is int32 [n]; the first `prompt_tokens` of them, `<solve>` included, are the prompt. The operations
    carry the labels `first_label`, `first_label + 1`, ... in post-order; where labels jump they are larger. `unpredictable`
    has the places of the `<seg:k>` tokens of the response before which they do: nothing tells how far.
    """

    expression: Expression
    token_ids: npt.NDArray[np.int32]
    prompt_tokens: int
    first_label: int
    labelling: Labelling
    unpredictable: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def prompt(self) -> str:
        """What `ArithmeticTask.encode_prompt` takes."""
        return self.expression.text

    @property
    def prompt_ids(self) -> npt.NDArray[np.int32]:
        return self.token_ids[: self.prompt_tokens]

    @property
    def response_ids(self) -> npt.NDArray[np.int32]:
        return self.token_ids[self.prompt_tokens :]


def encode(
    expression: Expression | str,
    *,
    vocab: Vocab = DEFAULT_VOCAB,
    labelling: Labelling = "tree",
    first_label: int = 1,
    names_first_step: bool = False,
) -> Example:
    """The oracle: prompt and gold response of an expression (parsed first when it is text).

    `labelling="tree"` tags each operation's own tokens in the prompt with its label; `"none"` leaves the whole
    expression in the sink. The response is the same for both: a step per operation, in post-order, that names the
    operands which are themselves operations. `"plain"` has no span tokens at all: its steps are told apart by `<solve>`,
    and `first_label` and `names_first_step` change nothing.

    `names_first_step` puts `<ref:k>` before the prompt's `<solve>`, k the label of the first step.

    Raises:
      ValueError: not an expression, an expression without operators, more operations than labels from
        `first_label` on, or a value of more than `MAX_DIGITS` digits.
    """
    expression, first_label = _checked(expression, vocab, labelling, first_label)
    token_ids = _prompt(expression, vocab, labelling, first_label, names_first_step)
    prompt_tokens = len(token_ids)
    ids, first_seg, first_ref = vocab.ids, vocab.seg_base + first_label, vocab.ref_base + first_label
    for number, step in enumerate(_steps(expression)):
        if labelling == "plain":
            token_ids += [vocab.solve_id] if number else []
        else:
            token_ids.append(first_seg + number)
            if step.left_step is not None:
                token_ids.append(first_ref + step.left_step)
            if step.right_step is not None:
                token_ids.append(first_ref + step.right_step)
        token_ids += [ids[c] for c in f"{step.left}{step.symbol}{step.right}={step.value}"]
    token_ids.append(vocab.eos_id)
    return Example(expression, np.array(token_ids, np.int32), prompt_tokens, first_label, labelling)


def encode_prompt(
    expression: Expression | str,
    *,
    vocab: Vocab = DEFAULT_VOCAB,
    labelling: Labelling = "tree",
    first_label: int = 1,
    names_first_step: bool = False,
) -> npt.NDArray[np.int32]:
    """The prompt of `encode` alone, int32 [n], ending in `<solve>`; the same errors, but for large values."""
    expression, first_label = _checked(expression, vocab, labelling, first_label)
    return np.array(_prompt(expression, vocab, labelling, first_label, names_first_step), np.int32)


def relabelled(example: Example, labels: Sequence[int], vocab: Vocab) -> Example:
    """An example with other labels for its operations, in post-order; they grow.

    Raises: ValueError for labels that do not grow, that the vocabulary has not, or too few.
    """
    new = np.array([0, *labels])
    if len(labels) != example.expression.num_ops or (np.diff(new) < 1).any() or new[-1] >= vocab.num_labels:
        raise ValueError(f"labels are {list(labels)}: expected {example.expression.num_ops} that grow, from 1 to {vocab.num_labels - 1}")
    ids = example.token_ids.copy()
    for base in (vocab.seg_base, vocab.ref_base):
        own = (ids >= base) & (ids < base + vocab.num_labels)
        ids[own] = base + new[ids[own] - base - example.first_label + 1]
    jumps = jumps_of(ids, example.prompt_tokens, vocab)
    return dataclasses.replace(example, token_ids=ids, first_label=int(new[1]), unpredictable=jumps)


def jumps_of(token_ids: npt.NDArray[np.int32], prompt_tokens: int, vocab: Vocab) -> npt.NDArray[np.int64]:
    """Where the steps of a response, the first apart, carry a label that is not one more than the step's before."""
    places = np.flatnonzero((token_ids >= vocab.seg_base) & (token_ids < vocab.seg_base + vocab.num_labels))
    places = places[places >= prompt_tokens]
    return places[1:][np.diff(token_ids[places]) != 1]


def _checked(expression: Expression | str, vocab: Vocab, labelling: Labelling, first_label: int) -> tuple[Expression, int]:
    if isinstance(expression, str):
        expression = parse(expression)
    _check_one_of(Labelling, "labelling", labelling)
    if not expression.num_ops:
        raise ValueError(f"nothing to evaluate: {_quoted(expression.text)} has no operator")
    first_label = operator.index(first_label)
    if first_label < 1:
        raise ValueError(f"first_label is {first_label}: expected at least 1 (label 0 is the sink)")
    if first_label + expression.num_ops > vocab.num_labels:
        raise ValueError(
            f"{expression.num_ops} operators from label {first_label} on need labels up to "
            f"{first_label + expression.num_ops - 1}, but the last one is {vocab.num_labels - 1}"
        )
    return expression, first_label


def _check_one_of(choices: Any, name: str, value: str) -> None:
    """Raises ValueError for a value that is none of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(get_args(choices))}")


def _prompt(expression: Expression, vocab: Vocab, labelling: Labelling, first_label: int, names_first_step: bool) -> list[int]:
    ids, seg_base = vocab.ids, vocab.seg_base
    names = [vocab.ref_base + first_label] if names_first_step and labelling != "plain" else []
    if labelling != "tree":
        return [vocab.bos_id, *(ids[c] for c in expression.text), *names, vocab.solve_id]
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
    reversed_ids.reverse()
    return reversed_ids


# ------------------------------------------------------------------------------------------------- verifier


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is right and wrong with a response.

    answer: the value that the last step ends in, None where there is none.
    answer_right: it is the value of the expression.
    steps_right: every operation evaluated, in order, with the right operands, operator, value and label, nothing
      else written, and `<eos>` at the end.
    spans_right: one step per operation, and each names exactly the operands that are operations (in plain text: nothing).
    first_wrong_step: index (from 0) of the first step that is wrong, missing or one too many. None where there is
      none: `steps_right`, or nothing but `<eos>` is missing.
    num_steps: steps that the response opens.
    message: one line for people.
    """

    answer: int | None
    answer_right: bool
    steps_right: bool
    spans_right: bool
    first_wrong_step: int | None
    num_steps: int
    message: str


class _Written(NamedTuple):
    """A step as read in a response: its label (None in plain text), the labels it names, and all its other tokens."""

    label: int | None
    named: set[int]
    body: list[str]


def verify(
    expression: Expression | str,
    response: str | Iterable[int],
    *,
    vocab: Vocab = DEFAULT_VOCAB,
    labelling: Labelling = "tree",
    first_label: int = 1,
) -> Verdict:
    """Checks a response, step by step, with Python integers.

    `response` is text or token ids; whatever follows `<eos>`, and padding without one, is ignored. No response is
    malformed enough to raise: what cannot be read is a wrong step.

    Raises:
      ValueError: the expression itself is not one that `encode` takes.
    """
    expression, first_label = _checked(expression, vocab, labelling, first_label)
    stray, written, ended = _read_response(response, vocab)
    answer_text = _answer_text(stray, written)
    if labelling == "plain":
        stray, written = [], _plain_steps(stray, written, vocab)
    answer_value = None if answer_text is None else int(answer_text)

    problems: dict[int, str] = {}  # of evaluation, by step
    wrong_spans: dict[int, str] = {}
    if stray:
        problems[0] = f"{_quoted(''.join(stray))} stands before the first step"
    operands: list[tuple[int, int | None]] = []  # (value, label) of what the next operations consume
    index = 0
    for node in expression:
        if type(node) is int:
            operands.append((node, None))
            continue
        right, left = operands.pop(), operands.pop()
        label = None if labelling == "plain" else first_label + index
        value = left[0] + right[0] if node == "+" else left[0] - right[0] if node == "-" else left[0] * right[0]
        if abs(value) >= _TOO_LARGE:
            raise ValueError(f"operation {index + 1} has a value of more than {MAX_DIGITS} digits")
        operands.append((value, label))
        if index < len(written):
            step = written[index]
            if problem := _problem(step, label, left[0], str(node), right[0], value):
                problems.setdefault(index, problem)
            minimal = {child for child in (left[1], right[1]) if child is not None}
            if step.named != minimal:
                wrong_spans[index] = f"names {_labels(step.named)}, the minimal span is {_labels(minimal)}"
        else:
            problems.setdefault(index, "missing")
        index += 1
    if len(written) > index:
        problems.setdefault(index, f"one too many: the expression has {index}")

    first_wrong_step = min(problems, default=None)
    if first_wrong_step is not None:
        message = f"step {first_wrong_step + 1}: {problems[first_wrong_step]}"
    elif not ended:
        message = "every step is right, but <eos> is missing"
    elif wrong_spans:
        message = f"every step is right, but step {min(wrong_spans) + 1}: {wrong_spans[min(wrong_spans)]}"
    else:
        message = f"all {index} steps and spans are right"
    return Verdict(
        answer=answer_value,
        answer_right=answer_value == operands[0][0],
        steps_right=first_wrong_step is None and ended,
        spans_right=len(written) == index and not wrong_spans,
        first_wrong_step=first_wrong_step,
        num_steps=len(written),
        message=message,
    )


def answer(response: str | Iterable[int], *, vocab: Vocab = DEFAULT_VOCAB) -> str | None:
    """The value that a response (text or ids) ends in, as written: what follows the last step's `=`, or None."""
    stray, written, _ = _read_response(response, vocab)
    return _answer_text(stray, written)


def _answer_text(stray: list[str], written: list[_Written]) -> str | None:
    match = _ANSWER.search("".join(written[-1].body if written else stray))
    return match[1] if match else None


def _read_response(response: str | Iterable[int], vocab: Vocab) -> tuple[list[str], list[_Written], bool]:
    """Cuts a response into (tokens before the first step, steps, whether `<eos>` ends it)."""
    if isinstance(response, str):
        tokens = [token for _, token in vocab.split(response)]
    else:
        ids = map(operator.index, response)
        tokens = [vocab.tokens[i] if 0 <= i < vocab.size else f"<id:{i:#x}>" for i in ids]
    ended = "<eos>" in tokens
    if ended:
        del tokens[tokens.index("<eos>") :]
    while not ended and tokens and tokens[-1] == "<pad>":
        tokens.pop()

    stray: list[str] = []
    written: list[_Written] = []
    for token in tokens:
        if (label := _label(token, "<seg:", vocab)) is not None:
            written.append(_Written(label, set(), []))
        elif not written:
            stray.append(token)
        elif (ref := _label(token, "<ref:", vocab)) is not None:
            written[-1].named.add(ref)
        else:
            written[-1].body.append(token)
    return stray, written, ended


def _plain_steps(stray: list[str], written: list[_Written], vocab: Vocab) -> list[_Written]:
    """The steps of a response without span tokens, `<solve>` between them. A span token is text like any other, and wrong."""
    bodies: list[list[str]] = [[]]
    for token in stray:
        if token == vocab.tokens[vocab.solve_id]:
            bodies.append([])
        else:
            bodies[-1].append(token)
    for step in written:
        bodies[-1] += [f"<seg:{step.label}>", *step.body]
    return [_Written(None, set(), body) for body in bodies if body or len(bodies) > 1]


def _label(token: str, family: str, vocab: Vocab) -> int | None:
    if not token.startswith(family) or token not in vocab.ids:
        return None
    return (vocab.ids[token] - vocab.seg_base) % vocab.num_labels


def _problem(step: _Written, label: int | None, left: int, symbol: str, right: int, value: int) -> str | None:
    """What is wrong with the evaluation that a step writes, or None."""
    if step.label != label:
        return f"carries label {step.label}, expected {label}"
    # Compared as text: that refuses leading zeros and a negative zero, and never converts an endless number.
    expected, found = f"{left}{symbol}{right}={value}", "".join(step.body)
    return None if found == expected else f"expected {_quoted(expected)}, found {_quoted(found)}"


def _labels(labels: Iterable[int]) -> str:
    shown = sorted(labels)
    return "nothing" if not shown else ", ".join(map(str, shown[:8])) + (", ..." if len(shown) > 8 else "")


# -------------------------------------------------------------------------------------------------- streams


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The distributions of a corpus.

    Attributes:
      min_ops: Fewest operators; their number is uniform between the two bounds.
      max_ops: Most operators.
      uniform_weight: Relative frequency of trees drawn from all binary trees with the same probability.
      balanced_weight: Relative frequency of trees whose operators are halved at every node.
      left_comb_weight: Relative frequency of trees in which every right operand is a leaf.
      max_digits: Most digits of a leaf; their number is uniform from 1 on, and the leaf among those that have it.
      negative_fraction: Share of the leaves other than 0 that get a minus.
      max_value: No value on the way is larger in magnitude; every operator is uniform among those that keep to this.
      labelling: "tree" tags the prompt with labels, "none" leaves it in the sink, "plain" has no span tokens at all.
      num_labels: Labels of the vocabulary; an example uses consecutive ones from a random offset.
      label_jumps: Most places at which the labels of an example jump ahead, near or far, so that children are named over
        distances that only longer expressions have. The label after a jump is not to be predicted. 0 for none.
      jumps_at: Before which steps: "any", or "leaves", those that name nothing, so that a right child's label stays the one
        before its parent's.
      names_first_step: The prompt ends in a <ref:k> that says which label the first step has.
    """

    min_ops: int = 2
    max_ops: int = 22
    uniform_weight: float = 0.6
    balanced_weight: float = 0.2
    left_comb_weight: float = 0.2
    max_digits: int = 2
    negative_fraction: float = 0.1
    max_value: int = 999
    labelling: Labelling = "tree"
    num_labels: int = 512
    label_jumps: int = 0
    jumps_at: JumpsAt = "any"
    names_first_step: bool = False

    name: ClassVar[str] = "arithmetic"

    def __post_init__(self) -> None:
        Vocab(self.num_labels)
        if not 1 <= self.min_ops <= self.max_ops:
            raise ValueError(f"min_ops is {self.min_ops} and max_ops {self.max_ops}: expected 1 <= min_ops <= max_ops")
        if self.max_ops >= self.num_labels:
            raise ValueError(f"max_ops is {self.max_ops}: {self.num_labels} labels allow at most {self.num_labels - 1}")
        for name in ("uniform_weight", "balanced_weight", "left_comb_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 0")
        if not any(self.shape_weights):
            raise ValueError("every shape weight is 0: expected one above 0")
        if not 0 <= self.negative_fraction <= 1:
            raise ValueError(f"negative_fraction is {self.negative_fraction}: expected 0 to 1")
        if not 1 <= self.max_digits <= 100:
            raise ValueError(f"max_digits is {self.max_digits}: expected 1 to 100")
        if not 10**self.max_digits <= self.max_value + 1 <= 10**MAX_DIGITS:
            raise ValueError(
                f"max_value is {self.max_value}: expected at least the largest operand, {10**self.max_digits - 1}, "
                f"and at most {MAX_DIGITS} digits"
            )
        if self.label_jumps < 0:
            raise ValueError(f"label_jumps is {self.label_jumps}: expected at least 0")
        _check_one_of(JumpsAt, "jumps_at", self.jumps_at)
        _check_one_of(Labelling, "labelling", self.labelling)

    @property
    def shape_weights(self) -> tuple[float, float, float]:
        """Relative frequency of uniform, balanced and left comb trees."""
        return (self.uniform_weight, self.balanced_weight, self.left_comb_weight)

    @property
    def vocab(self) -> Vocab:
        return Vocab(self.num_labels)

    @property
    def task(self) -> "ArithmeticTask":
        """What a model that is trained on this corpus needs to know of it."""
        return self.task_in(self.vocab)

    @property
    def description(self) -> str:
        """For people: what a prompt is."""
        return f"expressions of {self.min_ops} to {self.max_ops} operators"

    def task_in(self, vocab: Vocab) -> "ArithmeticTask":
        """`task`, written in another vocabulary."""
        return ArithmeticTask(vocab, self.labelling, self.names_first_step)

    def stream(
        self,
        task: "ArithmeticTask",
        *,
        seed: int,
        split: Split = "train",
        start: int = 0,
        num_workers: int = 0,
        part: streams.Part = streams.ALL,
    ) -> Generator["Example", None, None]:
        """Endless examples in the vocabulary of a task of this corpus; see the function `stream`."""
        return stream(self, seed=seed, split=split, start=start, num_workers=num_workers, part=part, vocab=task.vocab)

    def check_rows(self, task: "ArithmeticTask", sequence_tokens: int) -> None:
        """Raises ValueError where the largest expressions would hardly fit into rows of so many tokens."""
        if (longest := likely_longest_tokens(self, task.vocab)) > sequence_tokens:
            raise ValueError(f"expressions of {self.max_ops} operators take up to {longest} tokens, a row only {sequence_tokens}")


def likely_longest_tokens(corpus: Corpus, vocab: Vocab | None = None, num_examples: int = 256) -> int:
    """A length, in tokens, that hardly any example of a corpus exceeds."""
    largest = dataclasses.replace(corpus, min_ops=corpus.max_ops)
    lengths = [len(example.token_ids) for example in itertools.islice(stream(largest, seed=0, vocab=vocab), num_examples)]
    return streams.likely_longest(lengths)


def split_of(expression: Expression) -> Split:
    """The split that an expression belongs to, by a hash of its text: an eighth of all expressions is "test"."""
    return streams.split_of(expression.text)


def stream(
    corpus: Corpus,
    *,
    seed: int,
    split: Split = "train",
    start: int = 0,
    num_workers: int = 0,
    part: streams.Part = streams.ALL,
    vocab: Vocab | None = None,
) -> Generator[Example, None, None]:
    """Endless examples of a corpus, from number `start` on, in its own vocabulary or the one given.

    Example i depends on (corpus, seed, split, i) alone, and the splits share no expression. With `num_workers`
    processes the examples are the same; closing the iterator ends the processes. `part` is as for `streams.stream`.

    Raises:
      ValueError: a split, start or number of workers that there is not.
    """
    chunk = functools.partial(_chunk, corpus, vocab or corpus.vocab, seed, split)
    return streams.stream(chunk, CHUNK_EXAMPLES, split=split, start=start, num_workers=num_workers, part=part)


def _chunk(corpus: Corpus, vocab: Vocab, seed: int, split: Split, number: int) -> list[Example]:
    # random.Random: Python promises the same random() from the same text for all versions, and it is many times
    # faster than numpy for one number at a time. Nothing but random() is used.
    uniform = random.Random(f"arithmetic/{seed}/{split}/{number}").random
    jumping = random.Random(f"arithmetic/jumps/{seed}/{split}/{number}").random  # apart, so that expressions do not depend on jumps
    examples = []
    for _ in range(CHUNK_EXAMPLES):
        num_ops = corpus.min_ops + int(uniform() * (corpus.max_ops - corpus.min_ops + 1))
        expression = _draw(corpus, num_ops, uniform)
        while split_of(expression) != split:
            expression = _draw(corpus, num_ops, uniform)
        labels = _draw_labels(corpus, vocab, expression, uniform, jumping)
        names = corpus.names_first_step
        example = encode(expression, vocab=vocab, labelling=corpus.labelling, first_label=labels[0], names_first_step=names)
        examples.append(example if labels[-1] - labels[0] == num_ops - 1 else relabelled(example, labels, vocab))
    return examples


def _draw_labels(
    corpus: Corpus, vocab: Vocab, expression: Expression, uniform: Callable[[], float], jumping: Callable[[], float]
) -> Sequence[int]:
    """Labels of the operations of an example: one after the other but for jumps, whose sizes are log-uniform.

    Where they begin is drawn by `uniform`, which is called once whatever jumps; jumps are drawn by `jumping`.
    """
    num_ops = expression.num_ops
    places: Sequence[int] = range(1, num_ops) if corpus.label_jumps else ()
    if places and corpus.jumps_at == "leaves":
        steps = _steps(expression)
        places = [number for number in places if steps[number].left_step is steps[number].right_step is None]
    ahead = [0] * num_ops  # what a label is further than the one before, beyond one
    left = vocab.num_labels - 1 - num_ops
    for _ in range(int(jumping() * (corpus.label_jumps + 1)) if places else 0):
        size = min(left, int((left + 1) ** jumping()))
        ahead[places[int(jumping() * len(places))]] += size
        left -= size
    first_label = vocab.first_label(num_ops + sum(ahead), uniform())
    return [first_label + number + jumped for number, jumped in enumerate(itertools.accumulate(ahead))]


def _draw(corpus: Corpus, num_ops: int, uniform: Callable[[], float]) -> Expression:
    """A random expression of `num_ops` operators; `uniform` draws from [0, 1)."""
    bound = corpus.max_value
    postfix: list[int | str] = []
    values: list[int] = []
    for is_operation in _draw_shape(corpus, num_ops, uniform):
        if not is_operation:
            digits = 1 + int(uniform() * corpus.max_digits)
            smallest = 10 ** (digits - 1) if digits > 1 else 0
            leaf = smallest + int(uniform() * (10**digits - smallest))
            if uniform() < corpus.negative_fraction:
                leaf = -leaf
            postfix.append(leaf)
            values.append(leaf)
            continue
        right, left = values.pop(), values.pop()
        # Of two values within the bound, either the sum or the difference is within it too.
        allowed = [
            (symbol, value) for symbol, value in (("+", left + right), ("-", left - right), ("*", left * right)) if -bound <= value <= bound
        ]
        symbol, value = allowed[int(uniform() * len(allowed))]
        postfix.append(symbol)
        values.append(value)
    return Expression(tuple(postfix))


def _draw_shape(corpus: Corpus, num_ops: int, uniform: Callable[[], float]) -> Sequence[bool]:
    """A tree in postfix order: False for a leaf, True for an operation."""
    uniform_weight, balanced_weight, left_comb_weight = corpus.shape_weights
    threshold = uniform() * (uniform_weight + balanced_weight + left_comb_weight)
    if threshold < uniform_weight:
        return _uniform_shape(num_ops, uniform)
    if threshold < uniform_weight + balanced_weight:
        return _balanced_shape(num_ops)
    return _left_comb_shape(num_ops)


def _uniform_shape(num_ops: int, uniform: Callable[[], float]) -> list[bool]:
    """Every binary tree of `num_ops` operations with the same probability.

    Cycle lemma (Dvoretzky and Motzkin, 1947): of the rotations of a sequence of n operations and n + 1 leaves,
    exactly one is a tree in postfix order, so a uniform sequence gives a uniform tree.
    """
    operations, leaves = num_ops, num_ops + 1
    sequence: list[bool] = []
    depth = lowest = start = 0
    while operations or leaves:
        is_operation = uniform() * (operations + leaves) < operations
        sequence.append(is_operation)
        if is_operation:
            operations -= 1
            depth -= 1
            if depth <= lowest:
                lowest, start = depth, len(sequence)
        else:
            leaves -= 1
            depth += 1
    return sequence[start:] + sequence[:start]


@functools.lru_cache(maxsize=1024)
def _balanced_shape(num_ops: int) -> tuple[bool, ...]:
    if num_ops == 0:
        return (False,)
    return (*_balanced_shape(num_ops // 2), *_balanced_shape((num_ops - 1) // 2), True)


def _left_comb_shape(num_ops: int) -> list[bool]:
    return [False, *[False, True] * num_ops]


# ----------------------------------------------------------------------------------------------------- task

_TASK_VERSION = 2


@dataclasses.dataclass(frozen=True)
class ArithmeticTask:
    """What a model directory needs to know of this corpus to turn an expression into ids and a response into words."""

    vocab: Vocab = DEFAULT_VOCAB
    labelling: Labelling = "tree"
    names_first_step: bool = False

    name = "arithmetic"

    def __post_init__(self) -> None:
        _check_one_of(Labelling, "labelling", self.labelling)
        if type(self.names_first_step) is not bool:
            raise ValueError(f"names_first_step is {self.names_first_step!r}: expected true or false")

    @property
    def step_ids(self) -> frozenset[int]:
        """The tokens at which a piece of the text begins: tags; without tags in the prompt its parentheses; `<solve>` in plain text."""
        tags = range(self.vocab.seg_base, self.vocab.seg_base + self.vocab.num_labels)
        parentheses = (self.vocab.ids["("], self.vocab.ids[")"])
        return frozenset({"tree": (*tags,), "none": (*parentheses, *tags), "plain": (*parentheses, self.vocab.solve_id)}[self.labelling])

    def corpus(self, *, min_ops: int, max_ops: int) -> Corpus:
        """Expressions of so many operators, otherwise drawn as by default, as this task writes them."""
        writing = {"labelling": self.labelling, "num_labels": self.vocab.num_labels, "names_first_step": self.names_first_step}
        return Corpus(min_ops=min_ops, max_ops=max_ops, **writing)  # type: ignore[arg-type]

    def encode_prompt(self, text: str) -> npt.NDArray[np.int32]:
        """Expression -> prompt, int32 [n], labels from 1 on. ValueError: not an expression, or too few labels."""
        return encode_prompt(text, vocab=self.vocab, labelling=self.labelling, names_first_step=self.names_first_step)

    def gold(self, text: str) -> npt.NDArray[np.int32]:
        """The gold response to `encode_prompt(text)`, int32 [n]. The same errors, and values that are too large."""
        return encode(text, vocab=self.vocab, labelling=self.labelling).response_ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """Ids [n] -> their written form."""
        return self.vocab.decode(token_ids)

    def answer(self, response_ids: Iterable[int]) -> str | None:
        """The value that a response ends in, or None."""
        return answer(response_ids, vocab=self.vocab)

    def verify(self, text: str, response_ids: Iterable[int]) -> Verdict:
        """What is right and wrong with a response to `encode_prompt(text)`."""
        return verify(text, response_ids, vocab=self.vocab, labelling=self.labelling)

    def scores(self, examples: Sequence[Example], responses: Sequence[Iterable[int]]) -> dict[str, float]:
        """Of responses to the examples' prompts: the shares whose answer, whose every step and whose spans are right."""
        verdicts = [self.verify(example.prompt, response) for example, response in zip(examples, responses, strict=True)]
        judged = {"answer": "answer_right", "step": "steps_right", "span": "spans_right"}
        return {f"{what}_accuracy": float(np.mean([getattr(verdict, name) for verdict in verdicts])) for what, name in judged.items()}

    def to_json(self) -> dict[str, Any]:
        """A plain dict for `from_json`."""
        return {
            "task": self.name,
            "version": _TASK_VERSION,
            "labelling": self.labelling,
            "names_first_step": self.names_first_step,
            "vocab": self.vocab.to_json(),
        }

    @classmethod
    def from_json(cls, fields: object) -> "ArithmeticTask":
        """The inverse of `to_json`, also of version 1, whose prompts do not name the first step.

        Raises:
          ValueError: unknown or missing keys, another task or version.
        """
        if isinstance(fields, Mapping) and fields.get("version") == 1 and "names_first_step" not in fields:
            fields = {**fields, "version": _TASK_VERSION, "names_first_step": False}
        checked = check_json(fields, "task", {"task": cls.name, "version": _TASK_VERSION}, ("labelling", "names_first_step", "vocab"))
        return cls(Vocab.from_json(checked["vocab"]), checked["labelling"], checked["names_first_step"])


def held_out(task: ArithmeticTask, ranges: Iterable[tuple[int, int]], num_examples: int, *, seed: int) -> dict[str, list[str]]:
    """Expressions of the test stream, so many for each range of numbers of operators, by its name ("2-12", "20")."""
    sets = {}
    for low, high in ranges:
        examples = stream(task.corpus(min_ops=low, max_ops=high), seed=seed, split="test")
        sets[str(low) if low == high else f"{low}-{high}"] = [x.expression.text for x in itertools.islice(examples, num_examples)]
    return sets
