"""Read text files, and write files and directories whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a temporary directory beside `path` that takes its place when the body ends well, and vanishes when it does not.

    Raises:
      FileExistsError, NotADirectoryError: `path` exists and is not an empty directory, or lies below a file.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory: choose another, or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f"{error.filename} is a file: expected a directory to write {path.name} in") from None
    temporary = path.absolute().with_name(f".{path.absolute().name}.{os.getpid()}.partial")
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)  # replaces an empty directory, refuses any other
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file, and the directories that it lies in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def write_json(file: Path, values: Any) -> None:
    """Write a JSON file, and the directories that it lies in."""
    write_text(file, json.dumps(values, indent=2) + "\n")


def read_text(file: Path) -> str:
    """Read a text file. FileNotFoundError, UserError: there is none, or it is not text in UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from None
