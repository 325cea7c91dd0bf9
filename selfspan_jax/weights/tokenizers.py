"""Tokenizers of pretrained models: the structural tokens are added to them, and plain text is a task."""

from __future__ import annotations

import dataclasses
import itertools
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Int

from selfspan_jax.errors import UserError
from selfspan_jax.files import read_text, well_formed
from selfspan_jax.spans import SpanVocab

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

NUM_LABELS = 256  # added by default


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face directory; no code of the directory runs. Raises UserError for damaged files."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer  # takes seconds to import, and only pretrained models need it

    file = directory / "tokenizer.json"
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"{directory}: tokenizer.json is missing")
    if file.is_file():
        parse_tokenizer(file, read_text(file))
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RecursionError) as error:  # seen for damaged files
        raise UserError(f"{directory}: the tokenizer cannot be read ({type(error).__name__}: {_one_line(error)})") from error
    except StrictDataclassError as error:  # it reads the config too, and checks types
        raise UserError(f"{directory / 'config.json'}: {_one_line(error.__cause__ or error)}") from error
    switch_runtime_state_off(tokenizer)
    return tokenizer


def parse_tokenizer(where: Path, text: str) -> Tokenizer:
    """Read a tokenizer in the format of the library `tokenizers`. Raises UserError for text that is none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # that is what the library raises
        raise UserError(f"{where}: not a tokenizer ({_one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error), 160)


def is_tokenizer(value: Any) -> bool:
    """Return whether this is a tokenizer of transformers, by what is used of it."""
    return hasattr(value, "save_pretrained")


def switch_runtime_state_off(tokenizer: PreTrainedTokenizerBase) -> None:
    """Forget what a tokenizer was last used with: truncation, padding, and the random cuts of BPE dropout."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None


def special_tokens(num_labels: int) -> list[str]:
    """Return the structural tokens that no pretrained tokenizer has: `<solve>`, then both label families."""
    labels = range(num_labels)
    return ["<solve>", *(f"<seg:{k}>" for k in labels), *(f"<ref:{k}>" for k in labels)]


def find_span_tokens(tokenizer: PreTrainedTokenizerBase) -> SpanVocab | None:
    """Find the structural tokens of a tokenizer that `add_span_tokens` made; None where it has none of them.

    Raises: UserError if it has some of these names, but not as `add_span_tokens` gives them.
    """
    known = tokenizer.get_vocab()
    if not (taken := [token for token in special_tokens(2) if token in known]):
        return None
    num_labels = 0
    while f"<seg:{num_labels}>" in known:
        num_labels += 1
    names = special_tokens(num_labels)
    first = known.get("<solve>", -1)
    if num_labels < 2 or [known.get(name) for name in names] != list(range(first, first + len(names))):
        raise UserError(f"the tokenizer has {taken[0]} already, but not the span tokens as an export of this project has them")
    missing = [name for name in ("pad", "bos", "eos") if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise UserError(f"the tokenizer has span tokens, but no {missing[0]}_token")
    return SpanVocab(
        tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, first, first + 1, first + 1 + num_labels, num_labels
    )


def wrong_span_token(tokenizer: PreTrainedTokenizerBase, vocab: SpanVocab) -> str | None:
    """Return the first structural token that a tokenizer lacks or has under another id than the vocabulary; None where there is none."""
    known = tokenizer.get_vocab()
    return next((token for token, i in zip(special_tokens(vocab.num_labels), _span_ids(vocab)) if known.get(token) != i), None)


def _span_ids(vocab: SpanVocab) -> list[int]:
    """Return the ids of `special_tokens` in their order."""
    families = (range(base, base + vocab.num_labels) for base in (vocab.seg_base, vocab.ref_base))
    return [vocab.solve_id, *itertools.chain(*families)]


def add_span_tokens(tokenizer: PreTrainedTokenizerBase, num_labels: int = NUM_LABELS) -> SpanVocab:
    """Add the structural tokens to a tokenizer, as special tokens with consecutive ids above the highest in use.

    `<pad>` and `<bos>` are added too unless the tokenizer has its own, different from its end of text.

    Raises: UserError if the tokenizer has no end of text, or has tokens of these names already.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no end of text")
    bos, pad = tokenizer.bos_token, tokenizer.pad_token
    bos = bos if bos is not None and bos != tokenizer.eos_token else "<bos>"
    pad = pad if pad is not None and pad not in (tokenizer.eos_token, bos) else "<pad>"
    new = special_tokens(num_labels)
    known = tokenizer.get_vocab()
    if taken := [token for token in new if token in known]:
        raise UserError(f"the tokenizer has {taken[0]} already")
    first = 1 + max(known.values())
    if len(known) != first:
        _reserve(tokenizer, {token: first + i for i, token in enumerate(token for token in (bos, pad, *new) if token not in known)})
    tokenizer.add_special_tokens({"bos_token": bos, "pad_token": pad, "additional_special_tokens": new})
    after = tokenizer.get_vocab()
    pad_id, bos_id, solve_id, *label_ids = (after[token] for token in (pad, bos, *new))
    if label_ids != list(range(solve_id + 1, solve_id + len(new))) or min(after[token] for token in after.keys() - known.keys()) < first:
        raise UserError("the tokenizer gave the span tokens ids that are not consecutive, or in use")
    return SpanVocab(pad_id, bos_id, tokenizer.eos_token_id, solve_id, solve_id + 1, solve_id + 1 + num_labels, num_labels)


def _reserve(tokenizer: PreTrainedTokenizerBase, ids: Mapping[str, int]) -> None:
    """Give tokens their ids in a tokenizer whose ids have gaps.

    `tokenizers` numbers a new token by how many there are, which may be the id of another; a token that the model behind it
    knows already keeps its id.
    """
    from tokenizers import Tokenizer

    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise UserError("the tokenizer leaves ids free below its highest, and is not one of the library tokenizers (tokenizer.json)")
    state = json.loads(backend.to_str())
    if not isinstance(state["model"].get("vocab"), dict):
        raise UserError(f"the tokenizer leaves ids free below its highest, and its model ({state['model'].get('type')}) cannot skip them")
    state["model"]["vocab"] |= ids
    backend.model = Tokenizer.from_str(json.dumps({**state, "added_tokens": []})).model


def from_vocabulary(where: Path, fields: Mapping[str, Any], vocab: SpanVocab) -> PreTrainedTokenizerBase:
    """Build the tokenizer of a fine-tuned model from the vocabulary in its `vocab.json`, its structural tokens named.

    Raises: UserError for the built-in vocabulary, which has no tokenizer, or one whose tokens have other ids.
    """
    from transformers import PreTrainedTokenizerFast

    if not isinstance(text := fields.get("tokenizer_json"), str):
        raise UserError(f"{where}: its vocabulary is the built-in one, without a tokenizer for text")
    core = parse_tokenizer(where, text)
    ends = {name: core.id_to_token(i) or name for name, i in (("<pad>", vocab.pad_id), ("<bos>", vocab.bos_id), ("<eos>", vocab.eos_id))}
    numbers = [vocab.pad_id, vocab.bos_id, vocab.eos_id, *_span_ids(vocab)]
    ids = dict(zip([*ends.values(), *special_tokens(vocab.num_labels)], numbers))
    core.add_special_tokens(sorted((token for token in ids if core.token_to_id(token) is None), key=lambda token: ids[token]))
    if wrong := [token for token, i in ids.items() if core.token_to_id(token) != i]:
        raise UserError(f"{where}: its tokenizer has another id for {wrong[0]} than the model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=ends["<pad>"], bos_token=ends["<bos>"], eos_token=ends["<eos>"])
    switch_runtime_state_off(tokenizer)
    return tokenizer


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Plain text, encoded and decoded by a pretrained model's tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...] = ()
    """Ids that end a text beside the tokenizer's own."""

    name: ClassVar[str] = "text"

    def encode_prompt(self, text: str) -> Int[np.ndarray, "T"]:
        """Encode text, with the beginning of text if the tokenizer adds one. Raises UserError for an empty prompt."""
        if not (ids := self.tokenizer(well_formed(text))["input_ids"]):
            raise UserError("the prompt is empty")
        return np.array(ids, np.int32)

    def encode_chat(self, said: str | Sequence[Mapping[str, str]]) -> Int[np.ndarray, "T"]:
        """Encode a chat, as the tokenizer's chat template writes it, with the answer's opening.

        Args:
          said: messages, each with its `role` and `content`; text is the one message of a user.

        Templates run in the sandbox of `transformers`. Raises UserError for a tokenizer without a template, or one that fails.
        """
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template")
        try:
            from jinja2 import TemplateError
        except ImportError as error:
            raise UserError("chat templates need the package jinja2: pip install jinja2") from error
        given = [{"role": "user", "content": said}] if isinstance(said, str) else said
        messages = [{**message, "content": well_formed(message["content"])} for message in given]
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except (TemplateError, ImportError, ValueError, TypeError, LookupError) as error:  # a template may fail in any of these ways
            raise UserError(f"the chat template fails: {_one_line(error)}") from error
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
        switch_runtime_state_off(self.tokenizer)  # decoding in batches switches it on
        return str(backend.to_str())

    def to_json(self) -> dict[str, Any]:
        """Refuse: see `huggingface.export`, which writes the tokenizer's own files."""
        raise NotImplementedError("a text task is stored as its tokenizer's own files: see huggingface.export")

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TextTask:
        """Refuse: see `importing.load`, which reads the tokenizer's own files."""
        raise NotImplementedError("a text task is stored as its tokenizer's own files: see importing.load")
