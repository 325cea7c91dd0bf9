"""Read the rows of files (JSONL, CSV, Parquet) and of Hugging Face data sets: some of their columns, and no others."""

import contextlib
import csv
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data.alignment import UNREADABLE
from data.errors import UserError
from data.streams import SPLITS

T = TypeVar("T")

_BATCH_ROWS = 64
_UNDECODED = re.compile("[\ud800-\udfff]")

_SPELLINGS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev", "devel", "development", "valset", "devset"), "validation"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
}

Choose = Callable[[Collection[str]], tuple[str, ...]]
"""Choose columns among those that there are."""
Values = tuple[Any, ...]
Reader = Callable[[Path, Choose], Iterator[Values]]


def read(source: str, choose: Choose, *, split: str | None = None) -> Iterator[tuple[str | None, Values]]:
    """Yield the rows of a source, each with the split that it belongs to by the source; None where that does not say.

    Args:
      source: a .jsonl, .csv or .parquet file, a directory of some, or the name of a Hugging Face data set, its configuration
        after a colon.
      choose: the columns to read; None for a value that a row does not have.
      split: of a Hugging Face data set the one to read, also one of its own name; None and "all" read all.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: a file that is not what its name says, or without rows; names the line. Files of which some are splits.
    """
    path = Path(source)
    if _is_local(source):
        found = ((own, str(file), READERS[file.suffix.lower()](file, choose)) for own, file in _files(path, READERS, split))
    else:
        found = ((own, f"{source}, split {name}", _hub_rows(source, name, choose)) for own, name in _hub_splits(source, split))
    return _some(source, split, found)


def read_objects(source: str, *, split: str | None = None) -> Iterator[tuple[str | None, tuple[str, dict[str, Any]]]]:
    """Yield the objects of a .jsonl file, or of a directory of some, with their splits as `read` does, each after words on where it stands.

    Raises: as `read`; UserError also for text with NUL or half of a surrogate pair.
    """
    files = _files(Path(source), (".jsonl",), split)
    return _some(source, split, ((own, str(file), _placed_objects(file)) for own, file in files))


def _placed_objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in _json_objects(file):
        if found := next(filter(None, map(UNREADABLE.search, _strings(row))), None):
            raise UserError(f"{file}: line {number}: \\u{ord(found[0]):04x} is no character: expected text without NUL and lone surrogates")
        yield f"{file}: line {number}", row


def read_prompts(file: Path) -> dict[str, str]:
    """Read prompts, one a line, without empty lines; of a .jsonl file the "prompt" of each object. `-` is standard input, one a line.

    Returns: them by the places at which they stand, for messages on one of them.
    Raises: UserError for a file without prompts, and for a line that is no text or no such object; FileNotFoundError.
    """
    if file.suffix == ".jsonl":
        found = {number: _prompt(file, number, row) for number, row in _json_objects(file)}
    else:
        is_file = str(file) != "-"
        with open(file if is_file else 0, encoding="utf-8-sig", errors="surrogateescape", closefd=is_file) as lines:
            found = {number: line.removesuffix("\n") for number, line in enumerate(_text_lines(file, lines), 1) if line.strip()}
    if not found:
        raise UserError(f"{file}: no prompts")
    return {f"{file}: line {number}": prompt for number, prompt in found.items()}


def _prompt(file: Path, number: int, row: Mapping[str, Any]) -> str:
    if not isinstance(prompt := row.get("prompt"), str):
        raise UserError(f'{file}: line {number}: expected an object with a "prompt", which is text')
    return prompt


def own_splits(source: str, suffixes: Collection[str] | None = None) -> tuple[str, ...]:
    """Name the splits that a source says that it has, see `split_named`; none where its rows are to be divided.

    What says "train" alone is to be divided: there is nothing that it would have to be kept apart from.

    Args:
      suffixes: the kinds of files; by default all that there are readers of, and data sets.
    """
    is_local = suffixes is not None or _is_local(source)
    found = _files(Path(source), suffixes or READERS, None) if is_local else _hub_splits(source, None)
    return tuple(dict.fromkeys(own for own, _ in found if own))


def entries(directory: Path) -> list[Path]:
    """List what a directory has, in order, without what is hidden, as are the files that macOS leaves beside others."""
    return sorted(path for path in directory.iterdir() if not path.name.startswith("."))


def split_named(name: str) -> str | None:
    """Return the split that a name says: train, validation or test, in one of the usual spellings, is one of its words; None if not one."""
    found = {_SPELLINGS[word] for word in re.findall("[a-z]+", name.lower()) if word in _SPELLINGS}
    return found.pop() if len(found) == 1 else None


def _is_local(source: str) -> bool:
    path = Path(source)
    return path.exists() or path.suffix.lower() in READERS


def _some(source: str, split: str | None, parts: Iterable[tuple[str | None, str, Iterable[T]]]) -> Iterator[tuple[str | None, T]]:
    """Yield what is in the parts (split, name, rows), each row with its part's split. UserError: nothing is.

    Warns of those of the split that is asked for that have no rows, beside others that do.
    """
    is_empty, without = True, list[str]()
    for own, name, rows in parts:
        has_rows = False
        for row in rows:
            is_empty, has_rows = False, True
            yield own, row
        if not has_rows and (own is None or split in (None, "all", own)):
            without.append(name)
    if is_empty:
        raise UserError(f"{source}: no rows")
    for name in without:
        _warn(f"{name}: no rows")


def _files(path: Path, suffixes: Collection[str], split: str | None) -> list[tuple[str | None, Path]]:
    """Return a file, or those of a directory, with the splits that they say, in the order of these. UserError: only some say one."""
    files = [file for file in (entries(path) if path.is_dir() else [path]) if file.suffix.lower() in suffixes]
    if not files:
        absent = "" if path.exists() else "there is no such file or directory; "
        raise UserError(f"{path}: {absent}expected a file that ends in {', '.join(suffixes)}, or a directory of some")
    if special := [file for file in files if file.exists() and not file.is_file()]:
        raise UserError(f"{special[0]} is no regular file: expected one, as a source is read twice")
    named = {file: split_named(file.stem) for file in files}
    others = [file for file, own in named.items() if own is None]
    if split == "all" or len(others) == len(files) or {*named.values()} == {"train"}:
        return [(None, file) for file in files]
    if others:
        (one, own), *_ = ((file, own) for file, own in named.items() if own)
        raise UserError(
            f"{others[0]}: its name says no split, but {one.name} is of {own}: name all files after their splits (train, validation, test) "
            "or none; --split all writes them undivided"
        )
    return [(own, file) for own in SPLITS for file in files if named[file] == own]


def named(path: Path, *names: str) -> Choose:
    """Return the choice of columns by their names. UserError: (on reading) there is none of a name."""

    def choose(there: Collection[str]) -> tuple[str, ...]:
        if absent := [name for name in names if name not in there]:
            raise UserError(f"{path}: no column {absent[0]}; there are {', '.join(there) or 'none'}")
        return names

    return choose


def _json_lines(path: Path, choose: Choose) -> Iterator[Values]:
    """Read JSONL; the columns are those of the first object."""
    columns = None
    for _, row in _json_objects(path):
        columns = columns or choose(row)
        yield tuple(row.get(name) for name in columns)


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read JSONL, an object a line, with the numbers of the lines."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(_text_lines(path, file), 1):
            if not line.strip():
                continue
            if line.lstrip().startswith("["):
                raise UserError(f"{path}: line {number}: expected a JSON object a line, not an array")
            try:
                row = json.loads(line.rstrip("\r\n"), object_pairs_hook=_with_each_key_once)
            except UserError as error:
                raise UserError(f"{path}: line {number}: {error}") from None
            except (ValueError, RecursionError) as error:
                why = f"{error.msg} at column {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
                raise UserError(f"{path}: line {number} {not_read(error, why)}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number}: expected a JSON object")
            yield number, row


def not_read(error: ValueError | RecursionError, why: str) -> str:
    """Say, after what was read, that it is not JSON, and `why`; or that it is JSON that Python does not take."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return f"has a number of more than {sys.get_int_max_str_digits():,} digits" if type(error) is ValueError else f"is not JSON: {why}"


def _strings(value: Any) -> Iterator[str]:
    """Yield the texts of a JSON value, names of fields among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        parts = itertools.chain.from_iterable(value.items()) if isinstance(value, dict) else value
        yield from itertools.chain.from_iterable(map(_strings, parts))


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name in fields if sum(name == own for own, _ in pairs) > 1)
        raise UserError(f"the key {twice} stands twice in an object")
    return fields


def csv_rows(path: Path, choose: Choose) -> Iterator[Values]:
    """Read CSV strictly: a quote that is not closed, and a row of more or fewer fields than the header, are errors.

    A quote that is not closed and meets a stray one later makes a text of the rows between them. Where at least half of the texts of
    several lines look so, a warning names their lines.
    """
    csv.field_size_limit(2**27)
    several_lines, like_rows = 0, list[int]()
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(_text_lines(path, file), strict=True)
        header: list[str] = []
        begin = 1  # line of the row that is read
        try:
            for fields in reader:
                if any(map(str.strip, fields)) and not header:
                    header = [name.strip() for name in fields]
                    columns = [*map(header.index, choose(header))]
                elif any(map(str.strip, fields)):
                    if len(fields) != len(header):
                        raise UserError(f"{path}: line {begin}: {len(fields)} fields, but the header has {len(header)} columns")
                    several_lines += begin != reader.line_num
                    if any(_has_rows(text, column, len(header)) for column, text in enumerate(fields)):
                        like_rows.append(begin)
                    yield tuple(fields[i] for i in columns)
                begin = reader.line_num + 1
            if like_rows and 2 * len(like_rows) >= several_lines:
                lines = first_places([f"line {number}" for number in like_rows])
                _warn(
                    f"{path}: a text in the row that begins in {lines} is of several lines that "
                    "look like rows of their own: a quote too many or too few?"
                )
        except csv.Error as error:
            is_open = "unexpected end" in str(error)
            why = "a quote is opened there and never closed" if is_open else f"{error} (a quote inside a text is written twice)"
            raise UserError(f"{path}: the row that begins in line {begin}: {why}") from None


def first_places(places: Sequence[str]) -> str:
    """Name the first three of some places and count the others: "own.jsonl: line 7, 12, 30 and 4 more"."""
    numbers: dict[str, list[str]] = {}
    for place in places[:3]:
        before, space, number = place.rpartition(" ")
        numbers.setdefault(before + space, []).append(number)
    more = f" and {len(places) - 3:,} more" if len(places) > 3 else ""
    return "; ".join(before + ", ".join(own) for before, own in numbers.items()) + more


def _has_rows(text: str, column: int, num_columns: int) -> bool:
    """Tell whether a text of a column is the end of a row, whole rows, and the beginning of another up to that column."""
    first, *whole, last = lines if len(lines := text.splitlines()) > 1 else ("", "")
    commas = [line.count(",") for line in (first, *whole, last)]
    return len(lines) > 1 and commas == [num_columns - 1 - column, *[num_columns - 1] * len(whole), column]


@functools.cache  # a file may be read for its vocabulary, and again for its examples
def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _text_lines(path: Path, file: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if "\0" in line or (not line.isascii() and _UNDECODED.search(line)):
            raise UserError(f"{path}: line {number} is not text in UTF-8")
        yield line


def _parquet_rows(path: Path, choose: Choose) -> Iterator[Values]:
    import pyarrow
    from pyarrow import parquet, types

    def values(column: pyarrow.Array) -> list[str | None]:
        found = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()  # bytes need not be UTF-8
        return [None if text is None else text.decode("utf-8", "surrogateescape") for text in found]

    with path.open("rb") as file:
        try:
            reader = parquet.ParquetFile(file)
            columns = choose(reader.schema_arrow.names)
            for name in columns:
                kind = reader.schema_arrow.field(name).type
                kind = kind.value_type if types.is_dictionary(kind) else kind
                if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)):
                    raise UserError(f"{path}: column {name} holds {kind}: expected text")
            for batch in reader.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
                yield from zip(*(values(batch.column(name)) for name in columns), strict=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not Parquet, or damaged: {str(error).splitlines()[0]}") from None


READERS: dict[str, Reader] = {".jsonl": _json_lines, ".csv": csv_rows, ".parquet": _parquet_rows}


def _hub_splits(source: str, split: str | None) -> list[tuple[str | None, str]]:
    """Return the own splits of a data set that are to be read, each after what it says; see `own_splits`."""
    names = _hub_split_names(source)
    if split not in (None, "all", *SPLITS):
        if split not in names:
            raise UserError(f"{source}: there is no split {split}, only {', '.join(names)}")
        return [(split, split)]
    own: list[tuple[str | None, str]] = [(found, name) for found in SPLITS for name in names if split_named(name) == found]
    if {found for found, _ in own} <= {"train"}:
        return [(None, name) for _, name in own] or [(None, name) for name in names]
    if not (wanted := [(found, name) for found, name in own if split in (None, "all", found)]):
        raise UserError(f"{source}: there is no split {split}, only {', '.join(names)}")
    return wanted


@functools.cache  # asked for its card, its vocabulary and its examples
def _hub_split_names(source: str) -> list[str]:
    import datasets

    with _hub_errors(source):
        return datasets.get_dataset_split_names(*_hub_path(source))


def _hub_path(source: str) -> list[str | None]:
    return [part or None for part in source.split(":", 1)]


def _hub_rows(source: str, split: str, choose: Choose) -> Iterator[Values]:
    import datasets

    with _hub_errors(source):
        rows = datasets.load_dataset(*_hub_path(source), split=split, streaming=True)
        columns = choose(rows.column_names or list(next(iter(rows), {})))
        for row in rows.select_columns(list(columns)):
            yield tuple(row[name] for name in columns)


@contextlib.contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source}: neither a file nor a data set that could be loaded: {str(error).splitlines()[0]}") from error
