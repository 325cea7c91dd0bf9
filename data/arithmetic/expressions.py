"""Arithmetic expressions: postfix tuples, their parser, and their exact evaluation."""

import dataclasses
import functools
import itertools
import operator
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data.errors import UserError

MAX_DIGITS = 640  # the longest integer that every setting of Python converts to and from text
_TOO_LARGE = 10**MAX_DIGITS

_APPLY: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "negate": 3}
_LEXEME = re.compile(r"[0-9]+|\S")


class ExpressionError(UserError):
    """Text that is not an expression; `column` (from 1) is where reading stopped."""

    def __init__(self, column: int, problem: str) -> None:
        super().__init__(f"column {column}: {problem}")
        self.column = column


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
                raise UserError(f"not a postfix expression at {node!r}: expected integers and + - * of two operands")
        if depth != 1:
            raise UserError(f"a postfix expression of {depth} values: expected one")

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
        stack: list[str] = []
        for node in self.postfix:
            if type(node) is int:
                stack.append(str(node))
            else:
                right = stack.pop()
                stack[-1] = f"({stack[-1]}{node}{right})"
        return stack[0]

    @property
    def value(self) -> int:
        """The exact value. UserError where an intermediate value has more than `MAX_DIGITS` digits."""
        return evaluate(self)[-1].value if self.num_ops else int(self.postfix[0])


@functools.lru_cache(maxsize=512)  # a prompt is read for its ids, for its warnings and for the verdict
def parse(text: str) -> Expression:
    """Parse ordinary infix: `+ - *`, precedence, left associativity, parentheses, unary minus, spaces.

    A minus before a number makes a negative leaf; before anything else, `-x` is `0-x`. Numbers are integers of at
    most `MAX_DIGITS` digits. Takes any depth and length (a shunting yard, no recursion).

    Raises:
      ExpressionError: the text is not an expression; has the column (from 1) at which it stops being one.
    """
    output: list[int | str] = []
    waiting: list[tuple[str, int, int]] = []  # (operator or parenthesis, number of its lexeme, where its operand starts in output)

    def apply_waiting(precedence: int) -> None:
        while waiting and _PRECEDENCE[waiting[-1][0]] >= precedence:
            symbol, _, start = waiting.pop()
            if symbol != "negate":
                output.append(symbol)
            elif len(output) == start + 1:
                output[start] = -int(output[start])
            else:
                output.insert(start, 0)
                output.append("-")

    def error(number: int, problem: str) -> ExpressionError:
        return ExpressionError(next(itertools.islice(_LEXEME.finditer(text), number, None)).start() + 1, problem)

    operand_expected = True
    for number, lexeme in enumerate(_LEXEME.findall(text)):
        if operand_expected:
            if lexeme in ("(", "-"):
                waiting.append(("negate" if lexeme == "-" else "(", number, len(output)))
                continue
            if not ("0" <= lexeme[0] <= "9"):
                raise error(number, f'expected a number or "(", found {quoted(lexeme)}')
            if len(lexeme) > MAX_DIGITS:
                raise error(number, f"a number of {len(lexeme)} digits; at most {MAX_DIGITS} are read")
            output.append(int(lexeme))
            operand_expected = False
        elif lexeme in _APPLY:
            apply_waiting(_PRECEDENCE[lexeme])
            waiting.append((lexeme, number, len(output)))
            operand_expected = True
        elif lexeme == ")":
            apply_waiting(1)
            if not waiting:
                raise error(number, 'found ")" without "("')
            waiting.pop()
        else:
            raise error(number, f"expected an operator (+ - *), found {quoted(lexeme)}")
    if operand_expected:
        raise ExpressionError(len(text) + 1, 'expected a number or "(", found the end')
    apply_waiting(1)
    if waiting:
        raise error(waiting[-1][1], 'found "(" that is never closed')
    return Expression(tuple(output))


def quoted(lexeme: str) -> str:
    """Quote text for an error message, shortened where it is long."""
    shown = lexeme if len(lexeme) <= 24 else lexeme[:21] + "..."
    return f'"{shown}"' if shown.isprintable() else ascii(shown)


class Operation(NamedTuple):
    """An operation with the values of its operands; `left_step` and `right_step` are the numbers of the operations they come from."""

    symbol: str
    left: int
    left_step: int | None
    right: int
    right_step: int | None
    value: int

    def __str__(self) -> str:
        """Write the operation and its value, as a step does."""
        return f"{self.left}{self.symbol}{self.right}={self.value}"


def evaluate(expression: Expression) -> list[Operation]:
    """Evaluate an expression: its operations in post-order. UserError where a value has more than `MAX_DIGITS` digits."""
    steps: list[Operation] = []
    stack: list[tuple[int, int | None]] = []
    for node in expression.postfix:
        if type(node) is int:
            stack.append((node, None))
            continue
        right, right_step = stack.pop()
        left, left_step = stack.pop()
        value = _APPLY[str(node)](left, right)
        if abs(value) >= _TOO_LARGE:
            raise UserError(f"operation {len(steps) + 1} has a value of more than {MAX_DIGITS} digits")
        stack.append((value, len(steps)))
        steps.append(Operation(str(node), left, left_step, right, right_step, value))
    return steps
