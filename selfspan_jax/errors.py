"""The errors that are for users: what they gave cannot be used, or the device has too little memory for it."""

import contextlib
from collections.abc import Iterator

from jax.errors import JaxRuntimeError


class UserError(ValueError):
    """What a user gave cannot be used: an option, a file, a config, a prompt. The message names the value and what is allowed.

    A plain ValueError that comes out of this package is a bug.
    """


class DoesNotFit(UserError):
    """What was asked for needs more memory than the device has."""


@contextlib.contextmanager
def catch_out_of_memory() -> Iterator[None]:
    """Raise DoesNotFit in place of JAX's error where the device runs out of memory."""
    try:
        yield
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        raise DoesNotFit("does not fit: the device ran out of memory") from None
