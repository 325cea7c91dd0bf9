"""What the commands of this project run in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from selfspan_jax import files
from selfspan_jax.parallel.memory import catch_out_of_memory

_RESULTS = ("json", "html", "plot")  # fields of commands


@contextlib.contextmanager
def running(command: Any) -> Iterator[None]:
    """Check that a command's files of results can be written before it runs; raise DoesNotFit where memory does not suffice."""
    with catch_out_of_memory(), files.outputs(**{name: getattr(command, name, None) for name in _RESULTS}):
        yield
