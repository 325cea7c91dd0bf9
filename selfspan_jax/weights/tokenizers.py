"""Tokenizers of pretrained models: the structural tokens are added to them, and plain text is a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from selfspan_jax.errors import UserError
from selfspan_jax.spans import SpanVocab

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face directory; no code of the directory runs."""
    from transformers import AutoTokenizer  # takes seconds to import, and only pretrained models need it

    if not any((directory / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"{directory}: tokenizer.json is missing")
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def add_span_tokens(tokenizer: PreTrainedTokenizerBase, num_labels: int) -> SpanVocab:
    """Add the structural tokens to a tokenizer, as special tokens with consecutive ids.

    `<pad>` and `<bos>` are added too unless the tokenizer has its own, different from its end of text.

    Raises: UserError if the tokenizer has no end of text, or has tokens of these names already.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no end of text")
    bos, pad = tokenizer.bos_token, tokenizer.pad_token
    bos = bos if bos is not None and bos != tokenizer.eos_token else "<bos>"
    pad = pad if pad is not None and pad not in (tokenizer.eos_token, bos) else "<pad>"
    labels = range(num_labels)
    new = ["<solve>", *(f"<seg:{k}>" for k in labels), *(f"<ref:{k}>" for k in labels)]
    known = tokenizer.get_vocab()
    if taken := [token for token in new if token in known]:
        raise UserError(f"the tokenizer has {taken[0]} already")
    tokenizer.add_special_tokens({"bos_token": bos, "pad_token": pad, "additional_special_tokens": new})
    known = tokenizer.get_vocab()
    pad_id, bos_id, solve_id, *label_ids = (known[token] for token in (pad, bos, *new))
    if label_ids != list(range(solve_id + 1, solve_id + len(new))):
        raise UserError("the tokenizer gave the span tokens ids that are not consecutive")
    return SpanVocab(pad_id, bos_id, tokenizer.eos_token_id, solve_id, solve_id + 1, solve_id + 1 + num_labels, num_labels)


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Plain text, encoded and decoded by a pretrained model's tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def encode_prompt(self, text: str) -> Int[np.ndarray, "T"]:
        """Encode text, with the beginning of text if the tokenizer adds one. Raises UserError for an empty prompt."""
        if not (ids := self.tokenizer(text)["input_ids"]):
            raise UserError("the prompt is empty")
        return np.array(ids, np.int32)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Decode ids, structural tokens included."""
        return str(self.tokenizer.decode(list(map(int, token_ids)), clean_up_tokenization_spaces=False))

    def answer(self, response_ids: Iterable[int]) -> str:
        """Decode ids without structural tokens."""
        return str(self.tokenizer.decode(list(map(int, response_ids)), skip_special_tokens=True))

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer in the format of the library `tokenizers`. Raises UserError for one of another library."""
        if (backend := getattr(self.tokenizer, "backend_tokenizer", None)) is None:
            raise UserError("the tokenizer is not one of the library tokenizers (tokenizer.json)")
        return str(backend.to_str())

    def to_json(self) -> dict[str, Any]:
        """Refuse: see `huggingface.export`, which writes the tokenizer's own files."""
        raise NotImplementedError("a text task is stored as its tokenizer's own files: see huggingface.export")

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TextTask:
        """Refuse: see `importing.load`, which reads the tokenizer's own files."""
        raise NotImplementedError("a text task is stored as its tokenizer's own files: see importing.load")
