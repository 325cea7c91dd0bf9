"""Read text and JSON, write results, keep compiled programs: files and directories whole or not at all, pipes and devices through."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import gzip
import io
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from selfspan_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STDIN, _STDOUT = 0, 1  # descriptors
_PICTURES = (".png", ".svg", ".pdf")
MAX_PROGRAM_BYTES = 2 * 2**30  # of compiled programs that are kept
MAX_JSON_BYTES = 2**28
_CANNOT_REPLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object, compressed where the file's name ends in .gz.

    Raises: UserError if the file is not JSON, or not an object, or has more than 256 MiB; FileNotFoundError.
    """
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            content = stream.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise UserError(f"{file}: more than {MAX_JSON_BYTES:,} bytes")
        value = json.loads(content.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected an object, found {type(value).__name__}")
    return value


def read_text(file: Path) -> str:
    """Read a text file, without a byte-order mark; `-` is standard input.

    Raises: UserError if the file is not text in UTF-8; FileNotFoundError.
    """
    is_file = str(file) != "-"
    try:
        with open(file if is_file else _STDIN, encoding="utf-8-sig", closefd=is_file) as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from None


_SURROGATES = re.compile("[\ud800-\udfff]")
_UNDECODED = re.compile("[\udc80-\udcff]+")  # bytes that were not decoded (PEP 383)


def well_formed(text: str) -> str:
    """Put U+FFFD for halves of surrogate pairs, which no tokenizer takes and no file holds.

    Bytes that the locale did not decode are decoded as UTF-8 first: so a command line argument arrives in an ASCII locale.
    """
    if not _SURROGATES.search(text):
        return text
    paired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    decoded = _UNDECODED.sub(lambda found: found[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace"), paired)
    return _SURROGATES.sub("\ufffd", decoded)


def shown_path(path: str | Path) -> str:
    """Write a path for readers on other machines: from the working directory where it lies below it, else .../NAME if it is absolute."""
    if not os.path.isabs(path):
        return str(path)
    below = os.path.relpath(path)
    return f".../{Path(path).name}" if below.split(os.sep)[0] == os.pardir else below


def model_name(directory: Path) -> str:
    """Name a model for reports: by its directory, or by that of its run, which has it as `model` and `adapter`."""
    directory = directory.absolute()
    return directory.parent.name if directory.name in ("model", "adapter") else directory.name


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file in place of an older one, and the directories that it lies in.

    A regular file is written atomically, and keeps its mode and owner; a link stays, what it points to is written. Pipes and
    devices are written through. `-` and /dev/stdout are standard output.

    Raises: UserError that says why the file cannot be written; nothing partial is left. BrokenPipeError where a reader has gone.
    """
    try:
        if _is_stdout(file):
            if sys.__stdout__:
                sys.__stdout__.flush()
            with os.fdopen(os.dup(_STDOUT), "wb") as stream:
                stream.write(content)
        elif (there := _status(file)) is None or stat.S_ISREG(there.st_mode):
            _replace(Path(os.path.realpath(file)), content, there)
        else:
            with file.open("wb") as stream:
                stream.write(content)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


def write_text(file: Path, text: str) -> None:
    """Write text in UTF-8, as `write_bytes` does."""
    write_bytes(file, text.encode())


def write_json(file: Path, value: Any) -> None:
    """Write a value as indented JSON, as `write_bytes` does."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def write_packed_json(file: Path, value: Any) -> None:
    """Write a value as compressed JSON, the same bytes each time, as `write_bytes` does."""
    write_bytes(file, gzip.compress(json.dumps(value).encode(), mtime=0))


def write_rows(file: Path | None, report: Any, *, complete: bool) -> None:
    """Write a report that grows row by row as JSON: a regular file after each row, pipes and devices when it is complete.

    A row that cannot be written is no reason to lose the next; the last call raises what `write_bytes` does.
    """
    if file is None or not (complete or _is_regular(file)):
        return
    with contextlib.nullcontext() if complete else contextlib.suppress(UserError):
        write_json(file, report)


def write_picture(file: Path, figure: Figure, *, dpi: int = 160) -> None:
    """Write a figure in the format that the file's name ends in, PNG for a pipe or device, as `write_bytes` does."""
    picture = io.BytesIO()
    figure.savefig(picture, format=_picture_format(file), dpi=dpi)
    write_bytes(file, picture.getvalue())


@contextlib.contextmanager
def outputs(**files: Path | None) -> Iterator[None]:
    """Check that files can be written, before the work whose results they are for: name=file, pictures under the name `plot`.

    Where one of them is standard output, what is printed in the block goes to standard error, so that the file is there alone.

    Raises: UserError that names the option.
    """
    given = {name: file for name, file in files.items() if file is not None}
    names: dict[str, str] = {}
    for name, file in given.items():
        if name == "plot":
            _picture_format(file)
        try:
            _check_writable(file)
        except OSError as error:
            raise UserError(f"{name} is {file}, which cannot be written: {error.strerror}") from None
        if not (_is_stdout(file) or _is_regular(file)):
            continue  # a pipe or device takes several
        if (other := names.setdefault("-" if _is_stdout(file) else os.path.realpath(file), name)) != name:
            raise UserError(f"{name} is {file}, as is {other}: give each a file of its own")
    with contextlib.redirect_stdout(sys.stderr) if "-" in names else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def new_directory(directory: Path, *, replace: bool = False) -> Iterator[Path]:
    """Create a directory atomically; with `replace`, in place of an older one, which stays until the new one is whole.

    On Linux the two change places in one step (renameat2), so that there is a whole one under the name at every moment. Elsewhere,
    and on file systems without that step, the older one is renamed first: a process that is killed between the two renames leaves it
    as `.NAME.PID.old`, and the next call puts it back. A link stays, the directory that it points to is replaced.

    Yields: a directory to write to, which takes its name at the end of the block, and is removed if the block fails.
    Raises: FileExistsError if the directory exists and is not to be replaced.
    """
    if directory.exists() and not replace:
        raise FileExistsError(f"{directory} exists: choose another, or remove it first")
    directory = Path(os.path.realpath(directory))
    for old in sorted(directory.parent.glob(f".{glob.escape(directory.name)}.*.old")) if replace else ():
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        if not directory.exists():
            os.rename(partial, directory)
        elif not _exchange(partial, directory):
            old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
            os.rename(directory, old)
            os.rename(partial, directory)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def keep_programs(directory: Path | None = None) -> Path | None:
    """Keep the programs of this process in a directory, small ones too, and take from it those that are there.

    It changes JAX's settings for the process: command lines call it, the library does not. JAX's own environment variables are
    obeyed: JAX_COMPILATION_CACHE_DIR names another directory, JAX_ENABLE_COMPILATION_CACHE=0 keeps none. Of more than 2 GiB the
    oldest programs are removed.

    Args:
      directory: by default `selfspan/compiled` in the user's directory of caches: XDG_CACHE_HOME, else ~/.cache.

    Returns: the directory; None where programs are not kept, also where it cannot be written to. A full disk costs nothing but
      what is not kept.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]  # it is one of its settings
        return None
    if not (named := os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        directory = directory or Path(caches).expanduser() / "selfspan" / "compiled"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            return None
        if not os.access(directory, os.W_OK | os.X_OK):
            return None
        _remove_oldest(directory)
        jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # JAX leaves out what compiles within a second
    # What it cannot read or write it compiles again, and warns at every program.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    return Path(named) if named else directory


def _remove_oldest(directory: Path) -> None:
    """Remove the oldest files of a directory that holds too much, down to half of that; another process may do the same."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        found = sorted(((entry.stat(), entry.path) for entry in entries if entry.is_file()), key=lambda file: file[0].st_mtime)
        total = sum(status.st_size for status, _ in found)
        for status, path in found if total > MAX_PROGRAM_BYTES else ():
            if total <= MAX_PROGRAM_BYTES // 2:
                break
            os.unlink(path)
            total -= status.st_size


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _status(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except FileNotFoundError:
        return None


def _is_stdout(file: Path) -> bool:
    return str(file) in ("-", "/dev/stdout")


def _replace(file: Path, content: bytes, there: os.stat_result | None) -> None:
    """Write a regular file that is no link: beside its place, then into it."""
    if there and not os.access(file, os.W_OK):  # a file that is to stay as it is
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name[:50]}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        if there:
            with contextlib.suppress(PermissionError, AttributeError):  # another's file; Windows has no owners
                os.chown(partial, there.st_uid, there.st_gid)
            os.chmod(partial, stat.S_IMODE(there.st_mode))
        os.replace(partial, file)
    except OSError as error:
        if there is None or error.errno not in _CANNOT_REPLACE:
            raise
        file.write_bytes(content)  # its directory is read-only, or it is mounted by itself: it can be written, not replaced
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _check_writable(file: Path) -> None:
    """Raise OSError for a file that cannot be written."""
    if _is_stdout(file):
        return
    there = _status(file)
    if there is None:
        directory = Path(os.path.realpath(file)).parent
        while _status(directory) is None:
            directory = directory.parent
        tempfile.TemporaryFile(dir=directory).close()  # permissions alone do not tell: a mount can be read-only
    elif stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    elif not os.access(file, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _picture_format(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix not in _PICTURES and (suffix or _is_regular(file)):
        raise UserError(f"plot is {file}; allowed: names that end in .png, .svg or .pdf")
    return suffix[1:] or "png"


def _is_regular(file: Path) -> bool:
    """Tell whether a path is, or would become, a regular file."""
    return not _is_stdout(file) and (file.is_file() or not file.exists())
