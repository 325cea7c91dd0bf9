"""Vocabularies: the small built-in one of structural tokens, sixteen characters and labels, and those of tokenizers."""

import dataclasses
import functools
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from data.errors import UserError, check_json

CHARACTERS = "0123456789+-*()="
MAX_LABELS = 65_536
MIN_TOKENIZER_TOKENS = 300  # the 256 bytes are among them
MAX_TOKENIZER_TOKENS = 2**20  # of which the trainer takes memory at once

_SINGLE = ("<pad>", "<bos>", "<eos>", "<solve>")
_ID_NAMES = ("pad_id", "bos_id", "eos_id", "solve_id", "seg_base", "ref_base")
_TOKEN = re.compile(r"<[a-z]+(?::[0-9]+)?>|\S")
_STRUCTURAL = re.compile(r"<(pad|bos|solve|(seg|ref):[0-9]+)>")
_JSON_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Vocab:
    """Token ids of the arithmetic corpus: structural tokens, characters, `<seg:k>`, then `<ref:k>`.

    The characters' ids do not depend on `num_labels`, and each label family is contiguous, so a
    label is `id - base` (span protocol, section 1).
    """

    num_labels: int = 512

    kind: ClassVar[str] = "characters"

    def __post_init__(self) -> None:
        if type(self.num_labels) is not int or not 2 <= self.num_labels <= MAX_LABELS:
            raise UserError(f"num_labels is {self.num_labels!r}; allowed: whole numbers from 2 to {MAX_LABELS}")

    def __getstate__(self) -> dict[str, Any]:  # without what was cached: `tokenizers` pickles slowly
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def structural_ids(self) -> tuple[int, ...]:
        """The ids of `<pad> <bos> <eos> <solve> <seg:0> <ref:0>`."""
        seg_base = len(_SINGLE) + len(CHARACTERS)
        return (*range(len(_SINGLE)), seg_base, seg_base + self.num_labels)

    @property
    def pad_id(self) -> int:
        return self.structural_ids[0]

    @property
    def bos_id(self) -> int:
        return self.structural_ids[1]

    @property
    def eos_id(self) -> int:
        return self.structural_ids[2]

    @property
    def solve_id(self) -> int:
        return self.structural_ids[3]

    @property
    def seg_base(self) -> int:
        return self.structural_ids[4]

    @property
    def ref_base(self) -> int:
        return self.structural_ids[5]

    @property
    def size(self) -> int:
        return self.ref_base + self.num_labels

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        """The text of every token; the index is the id."""
        labels = range(self.num_labels)
        return (*_SINGLE, *CHARACTERS, *(f"<seg:{k}>" for k in labels), *(f"<ref:{k}>" for k in labels))

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """The id of every token's text."""
        return {token: i for i, token in enumerate(self.tokens)}

    def span_ids(self) -> dict[str, int]:
        """Return the keyword arguments of `selfspan_jax.spans.SpanVocab`."""
        return {**dict(zip(_ID_NAMES, self.structural_ids)), "num_labels": self.num_labels}

    def first_label(self, num_used: int, uniform: float) -> int:
        """Choose where `num_used` consecutive labels begin, by a number from [0, 1).

        Uniform over every place where they overlap the vocabulary, then moved inside: the outermost labels, 1 among them,
        are as frequent as the others (drawn inside at once, label 1 would be seen a twelfth as often).
        """
        first = 2 - num_used + int(uniform * (self.num_labels + num_used - 2))
        return min(max(first, 1), self.num_labels - num_used)

    def split(self, text: str) -> list[tuple[int, str]]:
        """Cut text into tokens: (0-based offset, token), known to the vocabulary or not; white space is dropped."""
        return [(match.start(), match.group()) for match in _TOKEN.finditer(text)]

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Encode tokens written one after the other (`<bos><seg:3>(51+75)`; spaces ignored): int32 [n].

        Raises:
          UserError: something is not a token of this vocabulary; names the column.
        """
        token_ids = []
        for offset, token in self.split(text):
            if token not in self.ids:
                raise UserError(f"column {offset + 1}: {token[:24]!r} is not a token of the vocabulary")
            token_ids.append(self.ids[token])
        return np.array(token_ids, np.int32)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Write ids [n] as text without spaces; the inverse of `encode`.

        Raises:
          UserError: an id lies outside the vocabulary.
        """
        ids, size = token_ids.tolist() if isinstance(token_ids, np.ndarray) else list(map(int, token_ids)), self.size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            position, i = next((position, i) for position, i in enumerate(ids) if not 0 <= i < size)
            raise UserError(f"id {i} at position {position} is outside the vocabulary of {size} tokens")
        return self._text(ids)

    def _text(self, ids: list[int]) -> str:
        return "".join(map(self.tokens.__getitem__, ids))

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict for `from_json`."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in self.__getstate__().items()}
        return {"kind": self.kind, "version": _JSON_VERSION, **fields}

    @classmethod
    def from_json(cls, fields: object) -> "Vocab":
        """Read what `to_json` of this class or of a subclass returned.

        Raises:
          UserError: an unknown or missing key, or another version.
        """
        is_tokenizer = isinstance(fields, Mapping) and fields.get("kind") == TokenizerVocab.kind
        kind: type[Vocab] = TokenizerVocab if is_tokenizer else cls
        names = [field.name for field in dataclasses.fields(kind)]
        values = check_json(fields, "vocabulary", {"kind": kind.kind, "version": _JSON_VERSION}, names)
        arguments: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return kind(**arguments)


DEFAULT_VOCAB = Vocab()


@dataclasses.dataclass(frozen=True)
class TokenizerVocab(Vocab):
    """The vocabulary of a tokenizer, to which the structural tokens were added.

    Its characters are the tokenizer's tokens of one character, so that a number is written digit by digit whatever the
    tokenizer would make of it. The structural tokens are written as in `Vocab`, whatever the tokenizer calls them.
    """

    tokenizer_json: str = dataclasses.field(default="", repr=False)
    """The tokenizer, as `tokenizers.Tokenizer.to_str` writes it."""
    structural_ids: tuple[int, ...] = ()
    num_tokens: int = 0
    """Rows of the model's embedding."""

    kind: ClassVar[str] = "tokenizer"

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = self.structural_ids
        if type(self.tokenizer_json) is not str or type(self.num_tokens) is not int:
            raise UserError("vocabulary: expected text for tokenizer_json and an integer for num_tokens")
        if type(ids) is not tuple or len(ids) != 6 or not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"structural_ids are {ids}: expected those of <pad> <bos> <eos> <solve> <seg:0> <ref:0>")
        if max(self.structural) >= self.num_tokens:
            raise UserError(f"structural_ids are {ids}, with {self.num_labels} labels: beyond the {self.num_tokens} tokens")
        if absent := [c for c in CHARACTERS if c not in self.ids]:
            raise UserError(f"the tokenizer has no token of its own for {absent[0]!r}: expressions cannot be written with it")

    @classmethod
    def of(cls, tokenizer_json: str, span_ids: Mapping[str, int], num_tokens: int) -> "TokenizerVocab":
        """Make the vocabulary of a tokenizer whose structural tokens have the ids that `span_ids()` returns."""
        return cls(span_ids["num_labels"], tokenizer_json, tuple(span_ids[name] for name in _ID_NAMES), num_tokens)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = tokenizer_from(self.tokenizer_json)
        # What it was last used with would cut, lengthen or vary texts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        return tokenizer

    @property
    def size(self) -> int:
        return self.num_tokens

    @functools.cached_property
    def structural(self) -> frozenset[int]:
        """The ids of all structural tokens."""
        families = (range(base, base + self.num_labels) for base in self.structural_ids[4:])
        return frozenset(itertools.chain(self.structural_ids[:4], *families))

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        written = [self._tokenizer.id_to_token(i) or f"<id:{i}>" for i in range(self.num_tokens)]
        for i, token in zip(self.structural_ids, _SINGLE):
            written[i] = token
        for label in range(self.num_labels):
            written[self.seg_base + label], written[self.ref_base + label] = f"<seg:{label}>", f"<ref:{label}>"
        return tuple(written)

    def text_ids(self, text: str) -> npt.NDArray[np.int32]:
        """Encode text as the tokenizer itself does, int32 [n], without special tokens at its ends."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def plain_text_ids(self, text: str) -> list[int]:
        """Encode text without the structural tokens that it may contain, so that no text can open or name anything."""
        return [i for i in self.text_ids(text).tolist() if i not in self.structural]

    @functools.cached_property
    def _writes(self) -> str:
        """What of the tokenizer decides how it writes text, as JSON."""
        fields = json.loads(self.tokenizer_json)
        fields["added_tokens"] = [token for token in fields["added_tokens"] if not _STRUCTURAL.fullmatch(token["content"])]
        return json.dumps({name: value for name, value in fields.items() if name not in ("truncation", "padding", "post_processor")})

    def _text(self, ids: list[int]) -> str:
        """Decode runs of other tokens as the tokenizer does: the bytes of several may make one character."""
        pieces = []
        for is_structural, group in itertools.groupby(ids, self.structural.__contains__):
            run = list(group)
            pieces.append(super()._text(run) if is_structural else self._tokenizer.decode(run, skip_special_tokens=False))
        return "".join(pieces)


def tokenizer_from(tokenizer_json: str) -> Any:
    """Return a tokenizer of the library `tokenizers`. UserError: it is none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # that is what the library raises
        raise UserError(f"not a tokenizer: {error}") from error


@functools.lru_cache(maxsize=8)
def translation(vocab: Vocab, other: Vocab) -> npt.NDArray[np.int32] | None:
    """Return the ids of another vocabulary by those of this one, int32 [size], where both write text alike; None where they do not.

    -1 stands for labels, and for text here that is structural there.
    """
    if not isinstance(vocab, TokenizerVocab) or not isinstance(other, TokenizerVocab) or vocab._writes != other._writes:
        return None
    table = np.arange(vocab.size, dtype=np.int32)
    table[table >= other.size] = -1
    table[[i for i in other.structural if i < vocab.size]] = -1
    table[list(vocab.structural)] = -1
    table[list(vocab.structural_ids[:4])] = other.structural_ids[:4]
    return table


def train_vocab(texts: Iterable[str], *, vocab_tokens: int, num_labels: int) -> TokenizerVocab:
    """Train a byte-pair vocabulary of at most `vocab_tokens` tokens, digits apart, and add the structural tokens after them.

    The tokenizer knows nothing of the structural tokens, so no text can contain one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not MIN_TOKENIZER_TOKENS <= vocab_tokens <= MAX_TOKENIZER_TOKENS:
        allowed = f"{MIN_TOKENIZER_TOKENS} to {MAX_TOKENIZER_TOKENS} (the 256 bytes are among them)"
        raise UserError(f"vocab_tokens is {vocab_tokens}; allowed: {allowed}")
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_tokens, initial_alphabet=alphabet, show_progress=False))
    return _with_structural(tokenizer.to_str(), tokenizer.get_vocab_size(), num_labels)


def _not_a_tokenizer(file: Path, why: str) -> UserError:
    return UserError(f"{file} is not a tokenizer of the kind of tokenizer.json: {why}")


def read_vocab(path: Path, num_labels: int) -> TokenizerVocab:
    """Read a tokenizer, and add the structural tokens after its own, so that no text can contain one.

    Args:
      path: a tokenizer.json, a directory that has one, or a model or an adapter of this project, which keeps its in vocab.json.gz.

    Raises:
      UserError: there is none, or it is not a tokenizer.
    """
    files = [path / name for name in ("tokenizer.json", "vocab.json.gz", "vocab.json")] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{path}: expected a tokenizer.json, or a directory with one or with a vocab.json.gz of this project")
    if file.suffix == ".gguf":
        raise _not_a_tokenizer(file, "a GGUF is none; a checkpoint's directory has one")
    try:
        content = file.read_bytes()
        fields = json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)
        if file.name.startswith("vocab.json"):
            vocab = fields.get("vocab") if isinstance(fields, dict) else None
            if not isinstance(vocab, dict) or "tokenizer_json" not in vocab:
                raise UserError("it has no text tokenizer; models of language of this project have one there")
            fields = json.loads(vocab["tokenizer_json"])
            # What it was given for another number of labels.
            fields["added_tokens"] = [token for token in fields["added_tokens"] if not _STRUCTURAL.fullmatch(token["content"])]
        tokenizer_json = json.dumps(fields)
        first = 1 + max(tokenizer_from(tokenizer_json).get_vocab(with_added_tokens=True).values())
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _not_a_tokenizer(file, " ".join(str(error).split())) from None
    return _with_structural(tokenizer_json, first, num_labels)


def _with_structural(tokenizer_json: str, first: int, num_labels: int) -> TokenizerVocab:
    """Add the structural tokens from an id on."""
    seg_base = first + len(_SINGLE)
    ids = (*range(first, seg_base), seg_base, seg_base + num_labels)
    return TokenizerVocab(num_labels, tokenizer_json, ids, seg_base + 2 * num_labels)
