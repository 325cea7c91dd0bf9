"""Read text and JSON, and write files and directories atomically: others see them whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfspan_jax.errors import UserError


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: UserError if the file is not JSON, or not an object; FileNotFoundError.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected an object, found {type(value).__name__}")
    return value


def read_text(file: Path) -> str:
    """Read a text file.

    Raises: UserError if the file is not text in UTF-8; FileNotFoundError.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from None


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, in place of an older one, and the directories that it lies in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def write_json(file: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(file, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Create a directory atomically.

    Yields: a directory to write to, which takes its name at the end of the block, and is removed if the block fails.
    Raises: FileExistsError if the directory exists.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists: choose another, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
