"""Checks of user input."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args


class UserError(ValueError):
    """Unusable options, files or text: what every check of user input in this package raises, with a message of one line."""


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise UserError where a value is none of a `Literal`'s."""
    if value not in get_args(choices):
        raise UserError(f"{name} is {value!r}; allowed: {', '.join(get_args(choices))}")


def check_range(settings: object, *names: str, low: float, high: float = math.inf) -> None:
    """Raise UserError for a setting, a number or a tuple of numbers, that is infinite or not within [low, high]."""
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not (low <= number <= high and number < math.inf):
                raise UserError(f"{name} is {number}; allowed: {low} " + ("and above" if high == math.inf else f"to {high}"))


def check_json(fields: object, what: str, fixed: Mapping[str, Any], free: Iterable[str]) -> dict[str, Any]:
    """Check that a JSON object has exactly the keys expected, and the fixed ones the values expected; return the free ones.

    Raises:
      UserError: names `what`, the offending key or value, and what is allowed.
    """
    if not isinstance(fields, Mapping):
        raise UserError(f"{what}: expected a JSON object, found {type(fields).__name__}")
    allowed = {*fixed, *free}
    if wrong := sorted(map(str, set(fields) ^ allowed)):
        state = "unknown" if wrong[0] not in allowed else "missing"
        raise UserError(f"{what}: {state} key {wrong[0]!r}; expected exactly {', '.join(sorted(allowed))}")
    for key, value in fixed.items():
        if type(fields[key]) is not type(value) or fields[key] != value:
            raise UserError(f"{what}: {key} is {fields[key]!r}; this version of selfspan reads {value!r}")
    return {key: value for key, value in fields.items() if key not in fixed}
