"""The error of checks of user input, and the check that all who take token ids make."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


class UserError(ValueError):
    """What a user gave cannot be used: an option, a file, a config, a prompt. The message names the value and what is allowed.

    A plain ValueError that comes out of this package is a bug.
    """


def check_ids(token_ids: Int[np.ndarray, "..."], vocab_size: int) -> None:
    """Raise UserError for ids outside a vocabulary."""
    if token_ids.size and not (0 <= token_ids.min() and token_ids.max() < vocab_size):
        raise UserError(f"token ids from {token_ids.min()} to {token_ids.max()}; the model knows 0 to {vocab_size - 1}")
