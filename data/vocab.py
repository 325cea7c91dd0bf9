"""Vocabularies: the small built-in one of structural tokens, sixteen characters and labels, and those of tokenizers."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import UserError

CHARACTERS = "0123456789+-*()="
MAX_LABELS = 65_536
MIN_TOKENIZER_TOKENS = 300  # the 256 bytes are among them

_STRUCTURAL = ("<pad>", "<bos>", "<eos>", "<solve>")
_TOKEN = re.compile(r"<[a-z]+(?::[0-9]+)?>|\S")
_JSON_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Vocab:
    """Token ids of the arithmetic corpus: structural tokens, characters, `<seg:k>`, then `<ref:k>`.

    The characters' ids do not depend on `num_labels`, and each label family is contiguous, so a
    label is `id - base` (span protocol, section 1).
    """

    num_labels: int = 512

    def __post_init__(self) -> None:
        if type(self.num_labels) is not int or not 2 <= self.num_labels <= MAX_LABELS:
            raise UserError(f"num_labels is {self.num_labels!r}: expected an integer from 2 to {MAX_LABELS}")

    @property
    def pad_id(self) -> int:
        return 0

    @property
    def bos_id(self) -> int:
        return 1

    @property
    def eos_id(self) -> int:
        return 2

    @property
    def solve_id(self) -> int:
        return 3

    @property
    def seg_base(self) -> int:
        return len(_STRUCTURAL) + len(CHARACTERS)

    @property
    def ref_base(self) -> int:
        return self.seg_base + self.num_labels

    @property
    def size(self) -> int:
        return self.ref_base + self.num_labels

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        """The text of every token; the index is the id."""
        labels = range(self.num_labels)
        return (*_STRUCTURAL, *CHARACTERS, *(f"<seg:{k}>" for k in labels), *(f"<ref:{k}>" for k in labels))

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """The id of every token's text."""
        return {token: i for i, token in enumerate(self.tokens)}

    def span_ids(self) -> dict[str, int]:
        """Return the keyword arguments of `selfspan_jax.spans.SpanVocab`."""
        return {
            "pad_id": self.pad_id,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "solve_id": self.solve_id,
            "seg_base": self.seg_base,
            "ref_base": self.ref_base,
            "num_labels": self.num_labels,
        }

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
        token_ids = [int(i) for i in token_ids]
        for position, i in enumerate(token_ids):
            if not 0 <= i < self.size:
                raise UserError(f"id {i} at position {position} is outside the vocabulary of {self.size} tokens")
        return "".join(self.tokens[i] for i in token_ids)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict for `from_json`."""
        return {"kind": "characters", "version": _JSON_VERSION, "num_labels": self.num_labels}

    @classmethod
    def from_json(cls, fields: object) -> "Vocab":
        """Read what `to_json` returned.

        Raises:
          UserError: an unknown or missing key, or another version.
        """
        if isinstance(fields, Mapping) and fields.get("kind") == "tokenizer":
            return TokenizerVocab.from_json(fields)
        checked = check_json(fields, "vocabulary", {"kind": "characters", "version": _JSON_VERSION}, ("num_labels",))
        return cls(num_labels=checked["num_labels"])


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
    """The ids of `<pad> <bos> <eos> <solve> <seg:0> <ref:0>`."""
    num_tokens: int = 0
    """Rows of the model's embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = self.structural_ids
        if len(ids) != 6 or not all(type(i) is int and i >= 0 for i in ids) or type(self.num_tokens) is not int:
            raise UserError(f"structural_ids are {ids}: expected those of <pad> <bos> <eos> <solve> <seg:0> <ref:0>")
        if max(*ids[:4], *(base + self.num_labels - 1 for base in ids[4:])) >= self.num_tokens:
            raise UserError(f"structural_ids are {ids}, with {self.num_labels} labels: beyond the {self.num_tokens} tokens")
        if absent := [c for c in CHARACTERS if c not in self.ids]:
            raise UserError(f"the tokenizer has no token of its own for {absent[0]!r}: expressions cannot be written with it")

    @classmethod
    def of(cls, tokenizer_json: str, span_ids: Mapping[str, int], num_tokens: int) -> "TokenizerVocab":
        """Make the vocabulary of a tokenizer whose structural tokens have the ids that `span_ids()` returns."""
        structural = tuple(span_ids[f"{name}_id"] for name in ("pad", "bos", "eos", "solve"))
        return cls(span_ids["num_labels"], tokenizer_json, (*structural, span_ids["seg_base"], span_ids["ref_base"]), num_tokens)

    def __getstate__(self) -> dict[str, Any]:  # without what was cached: `tokenizers` pickles slowly
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_str(self.tokenizer_json)
        except Exception as error:  # that is what the library raises
            raise UserError(f"not a tokenizer: {error}") from error

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
        return self.num_tokens

    @functools.cached_property
    def structural(self) -> frozenset[int]:
        """The ids of all structural tokens."""
        families = (range(base, base + self.num_labels) for base in self.structural_ids[4:])
        return frozenset(itertools.chain(self.structural_ids[:4], *families))

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        written = [self._tokenizer.id_to_token(i) or f"<id:{i}>" for i in range(self.num_tokens)]
        for i, token in zip(self.structural_ids, _STRUCTURAL):
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

    def decode(self, token_ids: Iterable[int]) -> str:
        pieces: list[str] = []
        text: list[int] = []  # ids whose bytes may make characters together
        for i in map(int, token_ids):
            if not 0 <= i < self.size:
                raise UserError(f"id {i} is outside the vocabulary of {self.size} tokens")
            if i in self.structural:
                pieces += [self._tokenizer.decode(text, skip_special_tokens=False), self.tokens[i]]
                text = []
            else:
                text.append(i)
        return "".join([*pieces, self._tokenizer.decode(text, skip_special_tokens=False)])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "tokenizer", "version": _JSON_VERSION, **self.__getstate__(), "structural_ids": list(self.structural_ids)}

    @classmethod
    def from_json(cls, fields: object) -> "TokenizerVocab":
        names = [field.name for field in dataclasses.fields(cls)]
        checked = check_json(fields, "vocabulary", {"kind": "tokenizer", "version": _JSON_VERSION}, names)
        values = {name: checked[name] for name in names}
        if not isinstance(values["tokenizer_json"], str) or not isinstance(values["structural_ids"], list):
            raise UserError("vocabulary: expected text for tokenizer_json and a list for structural_ids")
        return cls(**values | {"structural_ids": tuple(values["structural_ids"])})


def train_vocab(texts: Iterable[str], *, vocab_tokens: int, num_labels: int) -> TokenizerVocab:
    """Train a byte-pair vocabulary of at most `vocab_tokens` tokens, digits apart, and add the structural tokens after them.

    The tokenizer knows nothing of the structural tokens, so no text can contain one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_tokens < MIN_TOKENIZER_TOKENS:
        raise UserError(f"vocab_tokens is {vocab_tokens}: expected at least {MIN_TOKENIZER_TOKENS} (the 256 bytes are among them)")
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_tokens, initial_alphabet=alphabet, show_progress=False))
    first = tokenizer.get_vocab_size()
    single = {"pad_id": first, "bos_id": first + 1, "eos_id": first + 2, "solve_id": first + 3}
    families = {"seg_base": first + 4, "ref_base": first + 4 + num_labels, "num_labels": num_labels}
    return TokenizerVocab.of(tokenizer.to_str(), single | families, first + 4 + 2 * num_labels)


def check_json(fields: object, what: str, fixed: Mapping[str, Any], free: Iterable[str]) -> Mapping[str, Any]:
    """Check that a JSON object has exactly the keys expected, and the fixed ones the values expected; return it.

    Raises:
      UserError: names `what`, the offending key or value, and what is allowed.
    """
    if not isinstance(fields, Mapping):
        raise UserError(f"{what}: expected a JSON object, found {type(fields).__name__}")
    allowed = {*fixed, *free}
    if wrong := sorted(map(str, set(fields) ^ allowed)):
        state = "unknown" if wrong[0] not in allowed else "missing"
        raise UserError(f"{what}: {state} key {wrong[0]!r}; expected exactly {', '.join(sorted(allowed))}")
    for key, value in fixed.items():
        if type(fields[key]) is not type(value) or fields[key] != value:
            raise UserError(f"{what}: {key} is {fields[key]!r}; this version of selfspan reads {value!r}")
    return fields
