"""Keep compiled programs on disk, so that the next process with the same model and sizes need not compile them."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

import jax

MAX_BYTES = 2 * 2**30


def default_directory() -> Path:
    """Return `selfspan/compiled` in the user's directory of caches: XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "selfspan" / "compiled"


def keep_programs(directory: Path | None = None) -> Path | None:
    """Keep the programs of this process in a directory, small ones too, and take from it those that are there.

    It changes JAX's settings for the process: command lines call it, the library does not. JAX's own environment variables are
    obeyed: JAX_COMPILATION_CACHE_DIR names another directory, JAX_ENABLE_COMPILATION_CACHE=0 keeps none. Of more than 2 GiB the
    oldest programs are removed.

    Args:
      directory: by default `default_directory()`.

    Returns: the directory; None where programs are not kept, also where it cannot be written to. A full disk costs nothing but
      what is not kept.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]  # it is one of its settings
        return None
    if not (named := os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        directory = directory or default_directory()
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            return None
        if not os.access(directory, os.W_OK | os.X_OK):
            return None
        _remove_oldest(directory, MAX_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # JAX leaves out what compiles within a second
    # What it cannot read or write it compiles again, and warns at every program.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    return Path(named) if named else directory


def _remove_oldest(directory: Path, max_bytes: int) -> None:
    """Remove the oldest files of a directory that holds more, down to half of that; another process may do the same."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        files = sorted(((entry.stat(), entry.path) for entry in entries if entry.is_file()), key=lambda file: file[0].st_mtime)
        total = sum(status.st_size for status, _ in files)
        if total <= max_bytes:
            return
        for status, path in files:
            if total <= max_bytes // 2:
                break
            os.unlink(path)
            total -= status.st_size
