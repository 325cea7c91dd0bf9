"""Models of the Hugging Face Hub by their id, such as `HuggingFaceTB/SmolLM2-135M-Instruct`; what exists as a path is a path.

Only safetensors, tokenizers and configs are fetched, into the cache that all of Hugging Face's libraries share; code and pickles
never are. The package `huggingface_hub` comes with `transformers`; without a network its cache alone is asked.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from selfspan_jax.errors import UserError

FILES = [  # of a pretrained model, of a model or adapter of this project; from the top of a repository
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "vocab.json", "vocab.json.gz", "merges.txt", "adapter.json", "adapter.safetensors"),
]
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def locate(name: str | Path) -> Path:
    """Return the path of a model: the argument if it is one, else the directory that the Hub's files of this id lie in.

    A name whose first part is a directory here, or that ends in .gguf, is a path even if nothing is there.

    Raises: FileNotFoundError for a path with nothing at it; UserError for an id that cannot be fetched.
    """
    if not isinstance(name, str | Path):
        raise UserError(f"{name!r} is no model; expected a path or an id of the Hugging Face Hub")
    path = Path(name)
    if path.exists() or not _ID.fullmatch(path.as_posix()) or path.parent.exists() or path.suffix.lower() == ".gguf":
        return path
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise UserError(f"{name}: no such path, and ids of the Hugging Face Hub need the package huggingface_hub") from error
    http_error: Any = errors.HfHubHTTPError.__mro__[1]  # of the library that this version of the package speaks HTTP with
    try:
        return Path(snapshot_download(path.as_posix(), allow_patterns=FILES, ignore_patterns=["*/*"]))
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{name}: no such path, and no such model on the Hugging Face Hub, or one that asks for a login") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{name}: no such path; the Hugging Face Hub cannot be reached, and its cache here has no such model") from error
    except (http_error, OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 160)
        raise UserError(
            f"{name}: no such path, and not to be fetched from the Hugging Face Hub ({type(error).__name__}: {reason})"
        ) from error
