"""Checks of user input."""

from typing import Any, get_args


class UserError(ValueError):
    """Unusable options, files or text: what every check of user input in this package raises, with a message of one line."""


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise UserError where a value is none of a `Literal`'s."""
    if value not in get_args(choices):
        raise UserError(f"{name} is {value!r}: expected one of {', '.join(get_args(choices))}")
