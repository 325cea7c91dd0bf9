"""Draw arithmetic expressions: the distributions of trees, operands, operators and labels."""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

from data import task
from data.arithmetic.expressions import MAX_DIGITS, Expression, evaluate
from data.arithmetic.oracle import Example, Labelling, encode, relabel
from data.errors import UserError, check_choice, check_range
from data.streams import GeneratedCorpus, Split, split_of
from data.vocab import Vocab

JumpsAt = Literal["any", "leaves"]


@dataclasses.dataclass(frozen=True)
class Corpus(GeneratedCorpus[Example]):
    """Distributions that expressions are drawn from, and how they are written.

    Attributes:
      min_ops: Fewest operators; their number is uniform between the two bounds.
      max_ops: Most operators.
      uniform_weight: Relative frequency of trees drawn from all binary trees with the same probability.
      balanced_weight: Relative frequency of trees whose operators are halved at every node.
      left_comb_weight: Relative frequency of trees in which every right operand is a leaf.
      max_digits: Most digits of a leaf; their number is uniform from 1 on, and the leaf among those that have it.
      negative_fraction: Share of the leaves other than 0 that get a minus.
      max_value: No intermediate value is larger in magnitude; every operator is uniform among those that keep to this.
      labelling: "tree" tags the prompt with labels, "none" leaves it in the sink, "plain" has no span tokens at all.
      num_labels: Labels of the vocabulary; an example uses consecutive ones from a random offset.
      label_jumps: Most steps at which the labels of an example jump ahead, near or far, so that children are named over
        distances that only longer expressions have. The label after a jump is no training target. 0 for none.
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
    label_jumps: int = 3
    jumps_at: JumpsAt = "leaves"
    names_first_step: bool = True

    chunk_examples: ClassVar[int] = 512

    def __post_init__(self) -> None:
        Vocab(self.num_labels)
        if not 1 <= self.min_ops <= self.max_ops:
            raise UserError(f"min_ops is {self.min_ops} and max_ops {self.max_ops}; allowed: 1 <= min_ops <= max_ops")
        if self.max_ops >= self.num_labels:
            raise UserError(f"max_ops is {self.max_ops}: {self.num_labels} labels allow at most {self.num_labels - 1}")
        check_range(self, "uniform_weight", "balanced_weight", "left_comb_weight", low=0)
        check_range(self, "label_jumps", low=0, high=self.num_labels)
        if not self.uniform_weight + self.balanced_weight + self.left_comb_weight:
            raise UserError("every shape weight is 0; allowed: one above 0")
        check_range(self, "negative_fraction", low=0, high=1)
        check_range(self, "max_digits", low=1, high=100)
        if not 10**self.max_digits <= self.max_value + 1 <= 10**MAX_DIGITS:
            raise UserError(
                f"max_value is {self.max_value}; allowed: from the largest operand on, {10**self.max_digits - 1}, "
                f"and at most {MAX_DIGITS} digits"
            )
        check_choice("jumps_at", self.jumps_at, JumpsAt)
        check_choice("labelling", self.labelling, Labelling)

    @property
    def vocab(self) -> Vocab:
        return Vocab(self.num_labels)

    @property
    def description(self) -> str:
        return f"expressions of {self.min_ops} to {self.max_ops} operators"

    @property
    def limits(self) -> str:
        digits = {1: "one digit", 2: "one or two digits"}.get(self.max_digits, f"up to {self.max_digits} digits")
        return (
            f"Operands had {digits}, and no value on the way was above {self.max_value} in magnitude: "
            "beyond that its answers are wrong. It knows +, - and *, whole numbers, and no words."
        )

    def largest(self) -> "Corpus":
        return dataclasses.replace(self, min_ops=self.max_ops)

    def chunk(self, vocab: Vocab, seed: int, split: Split, number: int) -> Iterator[Example]:
        # random.Random: Python promises the same random() from the same text for all versions, and it is many times
        # faster than numpy for one number at a time. Nothing but random() is used.
        uniform = random.Random(f"arithmetic/{seed}/{split}/{number}").random
        jumping = random.Random(f"arithmetic/jumps/{seed}/{split}/{number}").random  # apart, so that expressions do not depend on jumps
        for _ in range(self.chunk_examples):
            num_ops = self.min_ops + int(uniform() * (self.max_ops - self.min_ops + 1))
            expression = _draw(self, num_ops, uniform)
            while split_of(expression.text) != split:
                expression = _draw(self, num_ops, uniform)
            labels = _draw_labels(self, vocab, expression, uniform, jumping)
            names = self.names_first_step
            example = encode(expression, vocab=vocab, labelling=self.labelling, first_label=labels[0], names_first_step=names)
            yield example if labels[-1] - labels[0] == num_ops - 1 else relabel(example, labels, vocab)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand(task.WriteCommand):
    """Write examples of arithmetic (prompts and gold responses) as a datasets.load_from_disk directory."""

    split: Split = "train"
    corpus: Corpus = dataclasses.field(default_factory=Corpus)


def _draw_labels(
    corpus: Corpus, vocab: Vocab, expression: Expression, uniform: Callable[[], float], jumping: Callable[[], float]
) -> Sequence[int]:
    """Draw the labels of an example's operations: one after the other but for jumps, whose sizes are log-uniform.

    Their begin is drawn by `uniform`, which is called once whatever jumps; jumps are drawn by `jumping`.
    """
    num_ops = expression.num_ops
    places: Sequence[int] = range(1, num_ops) if corpus.label_jumps else ()
    if places and corpus.jumps_at == "leaves":
        operations = evaluate(expression)
        places = [number for number in places if operations[number].left_step is operations[number].right_step is None]
    ahead = [0] * num_ops  # what a label is further than the one before, beyond one
    left = vocab.num_labels - 1 - num_ops
    for _ in range(int(jumping() * (corpus.label_jumps + 1)) if places else 0):
        size = min(left, int((left + 1) ** jumping()))
        ahead[places[int(jumping() * len(places))]] += size
        left -= size
    first_label = vocab.first_label(num_ops + sum(ahead), uniform())
    return [first_label + number + jumped for number, jumped in enumerate(itertools.accumulate(ahead))]


def _draw(corpus: Corpus, num_ops: int, uniform: Callable[[], float]) -> Expression:
    """Draw an expression of `num_ops` operators; `uniform` draws from [0, 1)."""
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
    """Draw a tree in postfix order: False for a leaf, True for an operation."""
    threshold = uniform() * (corpus.uniform_weight + corpus.balanced_weight + corpus.left_comb_weight)
    if threshold < corpus.uniform_weight:
        return _uniform_shape(num_ops, uniform)
    if threshold < corpus.uniform_weight + corpus.balanced_weight:
        return _balanced_shape(num_ops)
    return [False, *[False, True] * num_ops]  # a left comb


def _uniform_shape(num_ops: int, uniform: Callable[[], float]) -> list[bool]:
    """Draw a tree from all binary trees of `num_ops` operations with the same probability.

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
