"""Split text into sentences, and find the sentences of an article that a sentence of its summary was written from.

Splitting is `sentencex`'s. Alignment grows a set of article sentences greedily by ROUGE-1 recall of the summary sentence
(Lin, 2004: the share of its words, counted, that the set has), function words left out, ROUGE-2 recall deciding between
equals; a sentence that others made needless is taken out again, so that the set stays the smallest.
"""

import collections
import dataclasses
import itertools
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencex

from data.errors import UserError, check_range

# Letters and digits of all scripts with the marks that belong to them, which `\w` leaves out (vowel signs of Devanagari, say).
_MARKS = "".join(chr(i) for i in range(0x300, 0x1F000) if unicodedata.category(chr(i)).startswith("M"))
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # each character is a word
)
_LETTERS = rf"[^\W_{_UNSPACED}]+(?:[{_MARKS}]+[^\W_{_UNSPACED}]*)*"
_WORD = re.compile(rf"{_LETTERS}(?:[.,'’]{_LETTERS})*|[{_UNSPACED}][{_MARKS}]*")
_ASCII_WORD = re.compile(r"[^\W_]+(?:[.,'][^\W_]+)*")  # the same for most sentences, in half the time
_PLAIN_WORD = re.compile(rf"{_LETTERS}|[{_UNSPACED}][{_MARKS}]*")
WORD_LISTS = {
    name: frozenset(words.split())
    for name, words in tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8")).items()
}
FUNCTION_WORDS = WORD_LISTS["function"]

UNREADABLE = re.compile("[\ud800-\udfff\0]")  # what no tokenizer takes: halves of surrogate pairs, NUL
_BLANK_LINES = re.compile(r"\n *\n")
_OTHER_SPACES = re.compile(r"[^\S\n]")
_ENUMERATOR = re.compile(r"\W*(?:[0-9]{1,3}|[ivxlc]{1,5}|[A-Za-z])[.)]\W*")


def readable(text: str) -> str:
    """Take byte-order marks out, and put U+FFFD for what is UNREADABLE."""
    return UNREADABLE.sub("\ufffd", text.replace("\ufeff", ""))


def split_sentences(text: str) -> list[str]:
    """Split an English text into sentences, each on one line; what has no letter or digit is left out.

    A blank line ends a sentence. Sentences joined by blank lines are split into these sentences again, so that a prompt's text
    and its ids say the same: each is split until none can be split any further.
    """
    lines = readable(text).replace("\r\n", "\n").replace("\r", "\n")
    sentences = _BLANK_LINES.split(_OTHER_SPACES.sub(" ", lines))  # `sentencex` fails at white space of several bytes
    while (pieces := [piece for sentence in sentences for piece in _pieces(sentence)]) != sentences:
        sentences = pieces
    return sentences


def _pieces(text: str) -> list[str]:
    """Split a paragraph into sentences. The number of a list's item ("1.", "(b)") is no sentence, but begins the next one."""
    lines: list[str] = []
    number = ""
    for sentence in sentencex.segment("en", text):
        line = f"{number} {' '.join(sentence.split())}".strip()
        number = line if _ENUMERATOR.fullmatch(line) else ""
        if not number:
            lines.append(line)
    return [line for line in (*lines, number) if any(character.isalnum() for character in line)]


def words(text: str) -> list[str]:
    """Split text into lower-case words and numbers; `1,200`, `3.5` and `it's` are one each, and so is a Chinese character."""
    text = text.lower().replace("’s", "").replace("'s", "")
    return (_ASCII_WORD if text.isascii() else _WORD).findall(text)


def plain_words(text: str) -> list[str]:
    """Split text into lower-case runs of letters and of digits, as ROUGE does for English, in all scripts."""
    return _PLAIN_WORD.findall(unicodedata.normalize("NFC", text.lower()))


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How the sources of summary sentences are found.

    Attributes:
      min_gain: Smallest share of a summary sentence's content words that an article sentence must add to be a source.
      max_sources: Most sources of a summary sentence.
    """

    min_gain: float = 0.12
    max_sources: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.min_gain <= 1:
            raise UserError(f"min_gain is {self.min_gain}; allowed: above 0, up to 1")
        check_range(self, "max_sources", low=1)

    def align(self, article: Sequence[str], summary: Sequence[str]) -> list[tuple[int, ...]]:
        """Find the sources of each summary sentence: indices in ascending order, none where no sentence gains enough."""
        counted = [_Counts.of(sentence) for sentence in article]
        return [self._sources(counted, _Counts.of(sentence)) for sentence in summary]

    def _sources(self, article: Sequence["_Counts"], wanted: "_Counts") -> tuple[int, ...]:
        # Only what could be wanted is counted, so the work is that of one pass over the article and a few over what is shared.
        shared = {i: common for i, own in enumerate(article) if (common := {w: own.words[w] for w in wanted.words if w in own.words})}
        least = max(self.min_gain * wanted.words.total() - 1e-9, 1)

        def has(members: Iterable[int]) -> collections.Counter[str]:
            """Count the words that members have together, as far as they are wanted."""
            counts: collections.Counter[str] = collections.Counter()
            for i in members:
                counts.update(shared[i])
            return counts & wanted.words

        chosen: list[int] = []
        tried: set[int] = set()
        while len(chosen) < self.max_sources:
            missing = wanted.words - has(chosen)
            gains = {i: sum(min(missing[word], n) for word, n in own.items()) for i, own in shared.items() if i not in tried}
            keys = [(gain, (article[i].pairs & wanted.pairs).total(), -i) for i, gain in gains.items() if gain >= least]
            if not keys:
                break
            best = -max(keys)[2]
            chosen.append(best)
            tried.add(best)
            for i in chosen[:-1]:
                without = [j for j in chosen if j != i]
                if has(chosen).total() - has(without).total() < least:
                    chosen = without
        return tuple(sorted(chosen))


class _Counts(NamedTuple):
    """How often a sentence has each word that is no function word, and each pair of words."""

    words: collections.Counter[str]
    pairs: collections.Counter[tuple[str, str]]

    @classmethod
    def of(cls, sentence: str) -> "_Counts":
        every = words(sentence)
        return cls(collections.Counter(w for w in every if w not in FUNCTION_WORDS), collections.Counter(itertools.pairwise(every)))
