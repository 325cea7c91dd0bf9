"""The error that every check of user input in this package raises."""

from typing import Any, get_args


class UserError(ValueError):
    """Options, files or text that cannot be used; the message is one line that names the value and what is allowed."""


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises UserError where a value is none of a `Literal`'s."""
    if value not in get_args(choices):
        raise UserError(f"{name} is {value!r}: expected one of {', '.join(get_args(choices))}")
