"""Command lines whose errors are for people: exit status 2 and one plain line, never a box, never a traceback."""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro

# Where a ValueError is an input check of ours. From anywhere else it is a bug, and keeps its traceback.
_OURS = ("__main__", "data", "decode", "pallas_kernels", "selfspan_jax", "train")


# tyro's boxes: borders at both ends of a line, rules between the sections and around the title; where the encoding has
# no lines to draw with there are no borders, and the rules are dashes.
_BORDER = re.compile(r"^[│ ]+|[│ ]+$", re.MULTILINE)
_RULE = re.compile(r"^╭─+|─+╮$|^╰?(?:─{3,}|-{3,})╯?$", re.MULTILINE)


def fail(message: str) -> NoReturn:
    """Ends the program with status 2 and one line on stderr."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def parse(config_type: Any, argv: Sequence[str] | None = None, /, **tyro_options: Any) -> Any:
    """`tyro.cli` with one-line errors: an instance of `config_type`, from `argv` (the process's own by default).

    `config_type` is a dataclass, a union of them (subcommands), or a callable that does no work of its own. Wrong
    arguments, a ValueError of a `__post_init__` among them, end the program with status 2 and one line on stderr;
    `--help` prints and ends it with 0.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(config_type, args=argv, **tyro_options)
    except SystemExit as end:
        if end.code != 2:
            sys.stderr.write(captured.getvalue())
            raise
    except ValueError as error:
        fail(str(error))
    fail(_unboxed(captured.getvalue()))


def _unboxed(box: str) -> str:
    """The message in one of tyro's boxes: a title, the problem, sections of advice, and where the help is."""
    title, *sections = [" ".join(section.split()) for section in _RULE.split(_BORDER.sub("", box)) if section.strip()]
    problem, *advice = sections or [title]
    problem = problem.rstrip(".")
    if title != "Value error" and not problem.lower().startswith(title.lower().split()[0]):
        problem = f"{title}: {problem}"
    close = [section for section in advice if section.startswith(("Arguments similar to", "Perhaps you meant"))]
    options = {option for section in close for option in re.findall(r" (--[\w-]+)", section.partition(":")[2])} - {"--help"}
    hints = [f"did you mean {' or '.join(sorted(options))}?"] if options else []
    hints += [section[0].lower() + section[1:] for section in advice if section.startswith(("For full helptext", "Available"))]
    return "; ".join([problem, *hints])


def commas(*kinds: Any) -> Any:
    """For `Annotated[tuple[...], commas(int)]` or `commas("this", "that")`: values in one word, with commas between them."""
    convert, metavar = (int, "N,N,...") if kinds == (int,) else (str, ",".join(kinds))

    def read(words: list[str]) -> tuple[Any, ...]:
        values = tuple(convert(value) for value in words[0].split(","))
        if convert is str and (wrong := sorted(set(values) - set(kinds))):
            raise ValueError(f"{wrong[0]!r} is none of {', '.join(kinds)}")
        return values

    def write(values: tuple[Any, ...]) -> list[str]:
        return [",".join(map(str, values))]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar=metavar, instance_from_str=read, is_instance=lambda value: isinstance(value, tuple), str_from_instance=write
    )


def check_least(least: int, options: Any, *names: str) -> None:
    """Raises ValueError for an option, a number or a tuple of numbers, below the least that is allowed."""
    for name in names:
        value = getattr(options, name)
        if min(value if isinstance(value, tuple) else (value,), default=least) < least:
            raise ValueError(f"{name} is {value}; allowed: {least} and above")


def check_picture(file: Path | None) -> None:
    """Raises ValueError for a file that a plot cannot be written into."""
    if file and file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"plot is {file}; allowed: names that end in .png, .svg or .pdf")


def read_text(file: Path) -> str:
    """Reads a text file. FileNotFoundError or ValueError: there is none, or it is not text in UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from None


def write_json(file: Path, values: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(file, json.dumps(values, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


@contextlib.contextmanager
def errors_for_people() -> Iterator[None]:
    """Turns what a user can get wrong into status 2 and one line; for the body of a `main`.

    That is: a ValueError or NotImplementedError that our own code raises, and files that are missing, in the way, not
    directories or not permitted. An interrupt from the keyboard ends with status 130 and one line.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        fail(f"{error.filename}: {error.strerror}" if error.strerror else str(error))
    except (ValueError, NotImplementedError) as error:
        traceback = error.__traceback__
        while traceback and traceback.tb_next:
            traceback = traceback.tb_next
        module = traceback.tb_frame.f_globals.get("__name__", "") if traceback else ""
        if module.partition(".")[0] not in _OURS or type(error).__module__.partition(".")[0] not in (*_OURS, "builtins"):
            raise
        fail(str(error))
