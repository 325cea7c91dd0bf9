"""The error of checks of user input."""


class UserError(ValueError):
    """What a user gave cannot be used: an option, a file, a config, a prompt. The message names the value and what is allowed.

    A plain ValueError that comes out of this package is a bug.
    """
