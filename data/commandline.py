"""Command lines whose errors are one plain line and exit status 2, without boxes and tracebacks."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import tyro

from data.errors import UserError

T = TypeVar("T")


def fail(message: str) -> NoReturn:
    """End the program with status 2 and one line on stderr."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def parse(parser: Callable[..., T], /, *arguments: Any, user_error: type[Exception] = UserError, **options: Any) -> T:
    """Call one of tyro's parsers (`tyro.cli`, `tyro.extras...`); what it prints on wrong arguments becomes one line.

    A UserError or `user_error` of a `__post_init__` is said in its own words.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return parser(*arguments, **options)
    except SystemExit as end:
        if end.code != 2:
            sys.stderr.write(captured.getvalue())
            raise
        cause = end.__context__
        while cause is not None:
            if isinstance(cause, UserError | user_error):
                fail(str(cause))
            cause = cause.__context__
    _, *lines = captured.getvalue().splitlines()  # the first is the title
    sections: list[list[str]] = [[]]  # rules stand between them
    for line in lines:
        words = [word for word in line.split() if word.strip("─│╭╮╰╯-•")]
        sections[-1].extend(words)
        if not words:
            sections.append([])
    message = "; ".join(" ".join(section).rstrip(".") for section in sections if section)
    fail(message.partition(" error: ")[2] or message)  # argparse begins with the program's name


@contextlib.contextmanager
def exit_on_user_error(*errors: type[Exception]) -> Iterator[None]:
    """Turn what a user can get wrong into status 2 and one line; for the body of a `main`.

    That is UserError, `errors`, and files that are missing, in the way, not directories or not permitted. An interrupt from
    the keyboard ends with status 130 and one line.
    """
    user_errors: tuple[type[Exception], ...] = (UserError, *errors)
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        fail(f"{error.filename}: {error.strerror}" if error.strerror else str(error))
    except user_errors as error:
        fail(str(error))


def commas(*kinds: Any) -> Any:
    """Read values in one word, with commas between them: `Annotated[tuple[...], commas(int)]` or `commas("this", "that")`."""
    convert, metavar = (int, "N,N,...") if kinds == (int,) else (str, ",".join(kinds))

    def read(words: list[str]) -> tuple[Any, ...]:
        values = tuple(convert(value) for value in words[0].split(","))
        if convert is str and (wrong := sorted(set(values) - set(kinds))):
            raise UserError(f"{wrong[0]!r} is none of {', '.join(kinds)}")
        return values

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [",".join(map(str, values))],
    )
