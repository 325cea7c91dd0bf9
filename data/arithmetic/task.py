"""The arithmetic task: expressions in, token ids out, and back."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from data import task
from data.arithmetic import card, corpus, oracle, verifier
from data.arithmetic.expressions import Expression, evaluate, parse
from data.arithmetic.oracle import Example, Labelling
from data.arithmetic.verifier import Verdict
from data.errors import UserError, check_choice
from data.vocab import DEFAULT_VOCAB, Vocab


@dataclasses.dataclass(frozen=True)
class ArithmeticTask(task.Task):
    """Turn expressions into ids and responses into text.

    `max_digits` and `max_value` bound operands and values in its corpus: what its models know.
    """

    vocab: Vocab = DEFAULT_VOCAB
    labelling: Labelling = "tree"
    names_first_step: bool = False
    max_digits: int = corpus.Corpus.max_digits
    max_value: int = corpus.Corpus.max_value

    name: ClassVar[str] = "arithmetic"
    version: ClassVar[int] = 3
    unit: ClassVar[str] = "problems"
    group_by: ClassVar[str] = "ops"
    group_title: ClassVar[str] = "operators"
    Corpus: ClassVar[type] = corpus.Corpus
    WriteCommand: ClassVar[type] = corpus.WriteCommand
    columns: ClassVar[Mapping[str, Any]] = {
        "expression": "string",
        "answer": "string",
        "num_ops": "int32",
        "first_label": "int32",
        "prompt_tokens": "int32",
        "token_ids": ["int32"],
    }

    def __post_init__(self) -> None:
        check_choice("labelling", self.labelling, Labelling)
        if type(self.names_first_step) is not bool:
            raise UserError(f"names_first_step is {self.names_first_step!r}; allowed: true, false")
        for name, value in (("max_digits", self.max_digits), ("max_value", self.max_value)):
            if type(value) is not int or value < 1:
                raise UserError(f"{name} is {value!r}; allowed: whole numbers from 1")

    @property
    def step_ids(self) -> frozenset[int]:
        """The tokens at which a piece of the text begins: tags; without tags in the prompt its parentheses; `<solve>` in plain text."""
        pieces = {self.vocab.solve_id} if self.labelling == "plain" else super().step_ids
        return frozenset(pieces if self.labelling == "tree" else {self.vocab.ids["("], self.vocab.ids[")"], *pieces})

    def corpus(self, *, min_ops: int, max_ops: int) -> corpus.Corpus:
        """Return the corpus of expressions of so many operators, otherwise drawn by default, as this task writes them."""
        return corpus.Corpus(min_ops=min_ops, max_ops=max_ops, num_labels=self.vocab.num_labels, **self.settings())

    def encode(self, expression: Expression | str, first_label: int = 1) -> Example:
        """Write the prompt and the gold response of an expression. UserError: see `arithmetic.encode`."""
        style: dict[str, Any] = {"labelling": self.labelling, "names_first_step": self.names_first_step}
        return oracle.encode(expression, vocab=self.vocab, first_label=first_label, **style)

    def encode_prompt(self, text: str) -> npt.NDArray[np.int32]:
        """Write the prompt of `encode(text)` alone, int32 [n]."""
        return oracle.encode_prompt(text, vocab=self.vocab, labelling=self.labelling, names_first_step=self.names_first_step)

    def warnings(self, text: str) -> list[str]:
        """Say which operands and values of an expression are larger than any that the models of this task were trained on.

        UserError: see `arithmetic.encode`.
        """
        expression, found = parse(text), []
        operands = [abs(node) for node in expression if type(node) is int]
        if (largest := max(operands)) >= 10**self.max_digits:
            known = f"what the model was trained on, operands of up to {self.max_digits} digits"
            found.append(f"{_shown(largest)} is beyond {known}: do not trust the answer.")
        values = [abs(operation.value) for operation in evaluate(expression)]
        if (largest := max(values, default=0)) > self.max_value:
            known = f"what the model was trained on, values up to {self.max_value}"
            found.append(f"The value of a step is {_shown(largest)}, beyond {known}: do not trust the answer.")
        return found

    def answer(self, response_ids: Iterable[int]) -> str | None:
        """Read the value that a response ends in; None where it ends in none."""
        return verifier.answer(response_ids, vocab=self.vocab)

    def verify(self, text: str, response_ids: Iterable[int]) -> Verdict:
        """Check a response to `encode_prompt(text)` step by step."""
        return verifier.verify(text, response_ids, vocab=self.vocab, labelling=self.labelling)

    def held_out(self, num_examples: int, *, seed: int, ops: Iterable[tuple[int, int]] = ((2, 12),)) -> dict[str, list[Example]]:
        """Draw examples of the test split, labels from 1 on, for each range of numbers of operators by its name ("2-12", "20")."""
        sets = {}
        for low, high in ops:
            drawn = self.corpus(min_ops=low, max_ops=high).stream(seed=seed, split="test", vocab=self.vocab)
            sets[str(low) if low == high else f"{low}-{high}"] = [self.encode(x.prompt) for x in itertools.islice(drawn, num_examples)]
        return sets

    def renumber(self, example: Example, uniform: float | None = None) -> Example | None:
        """Write an example again, labels from 1 on, as `encode_prompt` does, or from where `uniform` says; None without the labels."""
        if (num_ops := example.expression.num_ops) >= self.vocab.num_labels:
            return None
        return self.encode(example.expression, 1 if uniform is None else self.vocab.first_label(num_ops, uniform))

    def group(self, prompt: str) -> str:
        """Name the group that an expression is evaluated in: its number of operators."""
        return str(parse(prompt).num_ops)

    def to_row(self, example: Example) -> dict[str, Any]:
        """Return the columns of an example in a corpus directory."""
        return {
            "expression": example.expression.text,
            "answer": str(example.expression.value),
            "num_ops": example.expression.num_ops,
            "first_label": example.first_label,
        }

    def from_row(self, row: Mapping[str, Any]) -> Example:
        """Read what `to_row` returned."""
        ids, prompt_tokens = row["token_ids"], row["prompt_tokens"]
        jumps = oracle.find_label_jumps(ids, prompt_tokens, self.vocab)
        return Example(ids, prompt_tokens, parse(row["expression"]), row["first_label"], self.labelling, jumps)

    def statistics(self) -> card.Statistics:
        """Return the empty statistics of a corpus."""
        return card.Statistics(self.vocab)


def _shown(number: int) -> str:
    text = str(number)
    return text if len(text) <= 24 else f"{text[:12]}... ({len(text)} digits)"
