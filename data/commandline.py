"""Command lines whose errors are one plain line and exit status 2, without boxes and tracebacks."""

import _thread
import argparse
import contextlib
import dataclasses
import difflib
import inspect
import io
import logging
import math
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from data.errors import UserError

_NUMBERS = tyro.constructors.ConstructorRegistry()
_UNSET = tyro.conf.arg(help_behavior_hint="(optional)")
_READING: list[Any] = []  # the dataclasses whose own rule is being asked for


def fail(message: str) -> NoReturn:
    """End the program with status 2 and one line on stderr."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def similar(word: str, known: Iterable[str]) -> str:
    """Write which known words a misspelt one may stand for, as in "; perhaps --steps"; "" where none is near, whatever dashes it has."""
    names = {name.lstrip("-"): name for name in sorted(known)}
    near = [names[name] for name in difflib.get_close_matches(word.lstrip("-"), names, n=3, cutoff=0.75)]
    return f"; perhaps {' or '.join(near)}" if near else ""


def _program() -> str:
    """Name the program as it was started: `decode.py`, or `python -m data` for a module, whose own path no user wrote."""
    main = sys.modules["__main__"]
    if main.__spec__ is not None and sys.argv[0] == main.__file__:
        return f"python -m {main.__spec__.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name


def choose(commands: Mapping[str, str], description: str, argv: list[str] | None = None) -> tuple[str, list[str]]:
    """Return the sub-command that a command line begins with, and the words after it.

    Args:
      commands: what each of them does, in a sentence.
      description: what `--help` says above them, as it is written.
      argv: the words; by default those of the process.
    """
    name, *words = (sys.argv[1:] if argv is None else argv) or [""]
    program = _program()
    if name in commands:
        return name, words
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        rows = [f"  {command:<{width}}  {summary}" for command, summary in commands.items()]
        usage = f"usage: {program} [-h] COMMAND ..."
        print("\n".join([usage, "", description.strip(), "", f"commands, with their options in {program} COMMAND --help:", *rows]))
        raise SystemExit(0)
    found = f"{name!r} is no command of {program}{similar(name, commands)}" if name else f"{program} takes a command"
    fail(f"{found}; allowed: {', '.join(commands)}")


def parse_one_of(commands: Mapping[str, type], description: str | None, argv: list[str] | None = None, **options: Any) -> tuple[str, Any]:
    """Return the name of the sub-command that a command line begins with, and its dataclass with the options that follow.

    `--help` says the first paragraph of each class's docstring. Arguments are those of `choose`, options those of `parse`.
    """
    summaries = {name: " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split()) for name, kind in commands.items()}
    name, words = choose(summaries, description or "", argv)
    return name, parse(commands[name], name, words, **options)


def look_ahead(words: list[str], option: str, choices: Collection[str] | None = None) -> str | None:
    """Return the value of an option that decides which others there are, None without it; `parse` reads it again among them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(option, dest="value")
    try:
        value = parser.parse_known_args(words)[0].value
    except argparse.ArgumentError as error:
        fail(str(error))
    if choices is not None and value is not None and value not in choices:
        fail(f"{option} is {value!r}; allowed: {', '.join(choices)}")
    return value


def parse(command: Any, name: str, words: list[str], *, user_error: type[Exception] = UserError, **options: Any) -> Any:
    """Read the options of a sub-command into its dataclass; what is wrong with them becomes one line.

    Args:
      command: the dataclass, or an instance of it that holds the defaults.
      name: of the sub-command; "" where a program has none.
      words: those after the name.
      user_error: said in its own words, as UserError is, where a `__post_init__` raises it; with options in place of fields.
      options: of `tyro.cli`.
    """
    program = f"{_program()} {name}".strip()
    kind, given = (command, {}) if isinstance(command, type) else (type(command), {"default": command})
    options |= {"prog": program, "config": (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands), "registry": _NUMBERS, **given}
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, args=words, **options)
    except SystemExit as end:
        if end.code != 2:
            sys.stderr.write(captured.getvalue())
            raise
        cause = end.__context__
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], **options)
    known = re.findall(r"--[a-z][\w-]*", text.getvalue())
    while cause is not None:
        if isinstance(cause, UserError | user_error):
            fail(as_options(str(cause), (option[2:].replace("-", "_") for option in known)))
        cause = cause.__context__
    for word in (word.partition("=")[0] for word in words if word.startswith("--")):
        if word.replace("_", "-") not in known:
            fail(f"{word} is no option of {program}{similar(word, known)}; see {program} --help")
    fail(_without_box(captured.getvalue()))


def _without_box(text: str) -> str:
    """Write what tyro prints about wrong arguments, a title and sections between rules, as clauses of one line, without help."""
    if absent := re.findall(r"^\W? {5}(--[\w-]+|[A-Z_]+)\b", text, re.MULTILINE) if "Missing from " in text else []:
        return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} required; --help says what for"
    _, *lines = text.splitlines()
    sections: list[list[str]] = [[]]
    for line in lines:
        words = [word for word in line.split() if word == "-" or word.strip("─│╭╮╰╯-•+|")]
        sections[-1].extend(words)
        if not words:
            sections.append([])
    clauses = [" ".join(section).rstrip(".").removeprefix("Error parsing ") for section in sections if section]
    found = "; ".join(clause for clause in clauses if not clause.startswith(("Argument helptext:", "For full helptext,")))
    if choice := re.fullmatch(r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*?),?\)", found):
        value, option, allowed = choice[1], choice[2], choice[3].replace("'", "")
        return f"{option} is {value}; allowed: {allowed}"
    return found


@_NUMBERS.primitive_rule
def _number(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Read whole numbers of 64 bits, one of them the sign, and finite ones: all that NumPy and JAX take."""
    if info.type not in (int, float):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=info.type.__name__.upper(),
        instance_from_str=lambda words: read_number(info.type, words[0]),
        is_instance=lambda value: isinstance(value, int | info.type) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


@_NUMBERS.primitive_rule
def _optional(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Read `X | None` as X: an option is left out where it is not wanted, there is no word for None."""
    kinds = typing.get_args(info.type)
    if type(None) not in kinds or len(kinds) != 2:
        return None
    (kind,) = (kind for kind in kinds if kind is not type(None))
    spec = tyro.constructors.ConstructorRegistry.get_primitive_spec(tyro.constructors.PrimitiveTypeInfo.make(kind, info.markers))
    if not isinstance(spec, tyro.constructors.PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: [] if value is None else spec.str_from_instance(value),
    )


@_NUMBERS.struct_rule
def _dataclass(info: tyro.constructors.StructTypeInfo) -> Any:
    """Let help say "(optional)" in place of a default that is None or empty; else read a dataclass as tyro does."""
    if not dataclasses.is_dataclass(info.type) or info.type in _READING:
        return None
    _READING.append(info.type)
    try:
        spec = tyro.constructors.ConstructorRegistry.get_struct_spec(info)
    finally:
        _READING.remove(info.type)
    if not isinstance(spec, tyro.constructors.StructConstructorSpec):
        return spec
    unset: list[Any] = [Annotated[field.type, _UNSET] if field.default in (None, ()) else field.type for field in spec.fields]
    fields = [dataclasses.replace(field, type=kind) for field, kind in zip(spec.fields, unset)]
    return dataclasses.replace(spec, fields=tuple(fields))


def read_number(kind: type, word: str) -> Any:
    """Read an int from -2**63 to 2**63 - 1 or a finite float. ValueError: it is none."""
    try:
        value = kind(word)
    except ValueError:
        raise ValueError(f"{word!r} is no {'whole ' if kind is int else ''}number") from None
    if not math.isfinite(value):
        raise ValueError(f"{word!r} is not finite")
    if kind is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{word!r} is beyond what whole numbers may be, -2**63 to 2**63 - 1")
    return value


def as_options(message: str, settings: Iterable[str]) -> str:
    """Write the names of settings in a message as the options that they are: `batch_size is 0` as `--batch-size is 0`.

    Names of one word are options where the message begins with them, as in `json is a.txt`.
    """
    names = [*settings]
    anywhere, begin = "|".join(name for name in names if "_" in name), "|".join(names)
    pattern = rf"(?<![\w./'\"-])({anywhere or '$.'})(?![\w./'\"])|^({begin})(?= (is|has) )"
    return re.sub(pattern, lambda name: "--" + name[0].replace("_", "-"), message)


@contextlib.contextmanager
def naming(command: Any, *errors: type[ValueError]) -> Iterator[None]:
    """Let errors that come out of a command name its options, see `as_options`."""
    user_errors: tuple[type[ValueError], ...] = (UserError, *errors)
    try:
        yield
    except user_errors as error:
        named = as_options(str(error), (field.name for field in dataclasses.fields(command)))
        if named == str(error):
            raise
        raise UserError(named) from error


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """Show on a terminal what takes time meanwhile, on the line that is free for the result afterwards."""
    shown = sys.stderr.isatty()
    if shown:
        print(message, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def commas(*kinds: Any) -> Any:
    """Read values in one word, with commas between them: `Annotated[tuple[...], commas(int)]`, or float, or `commas("this", "that")`.

    An empty word is no value, where "" is among the kinds.
    """
    number = kinds[0] if kinds in ((int,), (float,)) else None
    metavar = "N,N,..." if number else ",".join(filter(None, kinds))

    def read(words: list[str]) -> tuple[Any, ...]:
        values = words[0].split(",")
        if number:
            return tuple(read_number(number, value) for value in values)
        if wrong := sorted(set(values) - set(kinds)):
            raise ValueError(f"{wrong[0]!r} is none of {', '.join(filter(None, kinds))}")
        return tuple(filter(None, values))

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [",".join(map(str, values))],
    )


@contextlib.contextmanager
def exit_on_user_error(*errors: type[Exception]) -> Iterator[None]:
    """Turn what a user can get wrong, and what the machine refuses, into status 2 and one line; for the body of a `main`.

    That is UserError, `errors`, files and directories that cannot be read or written (OSError), and too little memory.
    An interrupt from the keyboard ends with status 130 and one line; a reader that closed the pipe of our output quietly
    with status 141, as SIGPIPE does. What the output's encoding lacks is written as escapes.
    """
    user_errors: tuple[type[Exception], ...] = (UserError, *errors)
    logging.basicConfig()
    for handler in logging.getLogger().handlers:  # what libraries log, this one's too, reads as other warnings
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter("warning: %(message)s"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            with _interrupts(), _signals_again():
                yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _drop_broken_output():
            raise SystemExit(141) from None
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        fail(": ".join(filter(None, [names, error.strerror])) or str(error))
    except MemoryError as error:
        fail(f"memory does not suffice: {error}")
    except UnicodeEncodeError as error:  # a path in bytes that the locale's encoding does not decode
        if error.reason != "surrogates not allowed":
            raise
        fail(f"{error.object!a} is not text in the locale's encoding: set LC_ALL=C.UTF-8, or choose a name in ASCII")
    except user_errors as error:
        fail(str(error))


def run_command(
    commands: Mapping[str, type] | type,
    argv: Sequence[str] | None = None,
    description: str | None = None,
    *,
    user_error: type[ValueError] = UserError,
    within: Callable[[Any], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Run a command, or the sub-command that a command line names; what a user gets wrong becomes one line.

    Args:
      commands: a dataclass with `run`, or several by the names of sub-commands.
      argv: the words; by default those of the process.
      description: what `--help` says above the options or the sub-commands; by default the docstring of the one command.
      user_error: as for `parse`.
      within: makes what a command runs in.
    """
    words = [*(sys.argv[1:] if argv is None else argv)]
    with exit_on_user_error(user_error, NotImplementedError):
        if isinstance(commands, type):
            command = parse(commands, "", words, user_error=user_error, **({"description": description} if description else {}))
        else:
            _, command = parse_one_of(commands, description, words, user_error=user_error)
        with naming(command, user_error), within(command):
            command.run()


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt where `data.interrupts` has let it end the program, as it does again afterwards."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def _signals_again() -> Iterator[None]:
    """Send a signal again whose exception Python drops, as it does where one arrives in a callback of the garbage collector, say JAX's."""
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if issubclass(dropped.exc_type, (KeyboardInterrupt, SystemExit)):
            number = signal.SIGINT if issubclass(dropped.exc_type, KeyboardInterrupt) else signal.SIGTERM
            threading.Timer(0.05, _thread.interrupt_main, [number]).start()  # when the callback has ended
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _drop_broken_output() -> bool:
    """Say whether nobody reads our output any more; then let what is still to be written, when Python ends, go nowhere."""
    try:
        print(flush=True)  # what failed is not always tried again by a flush alone
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


@contextlib.contextmanager
def exit_on_termination() -> Iterator[None]:
    """Let SIGTERM end the program as an exit does, with status 143 and one line, so that what is half written is removed."""
    status = 128 + signal.SIGTERM
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
    try:
        yield
    except SystemExit as end:
        if end.code == status:
            print("interrupted", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
