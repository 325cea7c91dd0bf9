"""Detokenize as tokens come: text in pieces, one for each token, none of which ends within a character or within a stop string."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from selfspan_jax.errors import UserError

Decode = Callable[[list[int]], str]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are not a character yet
_CONTEXT_TOKENS = 8


class Detokenizer:
    """Write tokens as text, one by one or several at once: joined, the pieces are the text of all.

    The bytes of several tokens may make one character, so a piece never ends within one: it waits for the rest, and the last of
    the tokens gets it. What a token adds is the difference of two decoded windows of tokens, because decoders treat the first
    token of a text in their own way. Windows begin where a character does and are short, so that a token of a long text takes no
    longer than one of a short text.
    """

    def __init__(self, decode: Decode):
        self._decode = decode
        self._window: list[int] = []
        self._begins = [0]  # where in the window a character begins
        self._written = 0  # characters of the window's text
        self.waits = False  # a character, for the rest of its bytes

    def push(self, *token_ids: int) -> str:
        """Return what more tokens add. Several at once take hardly longer than one."""
        self._window += map(int, token_ids)
        text = self._decode(self._window)
        whole = text.rstrip(_UNFINISHED)
        piece, self.waits = self._take(whole), whole != text
        if not self.waits:
            begin = self._begins[max(0, bisect.bisect(self._begins, len(self._window) - _CONTEXT_TOKENS) - 1)]
            self._begins.append(len(self._window))
            if len(self._window) >= 4 * max(_CONTEXT_TOKENS, len(token_ids)) and begin:
                self._window, self._begins = self._window[begin:], [i - begin for i in self._begins if i >= begin]
                self._written = len(self._decode(self._window))
        return piece

    def flush(self) -> str:
        """Return what waits for tokens that will not come."""
        return self._take(self._decode(self._window)) if self._window else ""

    def _take(self, text: str) -> str:
        piece, self._written = text[self._written :], max(self._written, len(text))
        return piece


def token_texts(decode: Decode, token_ids: Iterable[int]) -> tuple[str, ...]:
    """Return the piece of text of each token; joined they are the text. See `Detokenizer`."""
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    if pieces:
        pieces[-1] += detokenizer.flush()
    return tuple(pieces)


def text_at(decode: Decode, token_ids: Sequence[int], at: int, token_id: int) -> str:
    """Return what a token in the place of `token_ids[at]` would add to the text of those before, of which the last few tell it."""
    before = token_ids[max(0, at - _CONTEXT_TOKENS) : at]
    written = decode(list(before)).rstrip(_UNFINISHED) if before else ""
    return decode([*before, token_id])[len(written) :]


class StopStrings:
    """Cut text that comes in pieces before the first stop string that is complete; of several that end at once, the longest."""

    def __init__(self, strings: Sequence[str]):
        self.strings = strings
        self._waiting = ""  # may be the beginning of a stop string
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Return the text that is sure to be before a stop string; what begins like one waits. Sets `found` at a stop string."""
        if self.found is not None:
            return ""
        text = self._waiting + piece
        ends = [(text.find(string) + len(string), -len(string), string) for string in self.strings if string in text]
        if ends:
            end, _, self.found = min(ends)
            self._waiting = ""
            return text[: end - len(self.found)]
        waiting = max((_overlap(text, string) for string in self.strings), default=0)
        self._waiting = text[len(text) - waiting :]
        return text[: len(text) - waiting]

    def flush(self) -> str:
        """Return what waits for text that will not come."""
        text, self._waiting = self._waiting, ""
        return text


class Response:
    """Collect the tokens of one response as they are decoded, up to an end of text or a stop string, and their text.

    Tokens that only a stop string needs are left out. One that begins before it stays; `surplus` characters of its text do not.

    Args:
      by_token: keep the text of each token, for `token_texts`; with stop strings they are kept in any case.
    """

    def __init__(self, decode: Decode, stop: Sequence[str], end_ids: Collection[int], *, by_token: bool = False):
        self._detokenizer, self._stops, self._end_ids = Detokenizer(decode), StopStrings(stop), frozenset(end_ids)
        self._by_token = by_token or bool(stop)
        self._lengths = [0]  # of the text after each push, stop strings included
        self.token_ids: list[int] = []
        self.text = ""
        self.done = False
        self.surplus = 0

    @property
    def stopped_by(self) -> str | None:
        return self._stops.found

    @property
    def num_sure(self) -> int:
        """Count the tokens that stay whatever comes, and whose text is whole in `text`."""
        if self.done or not self._by_token:
            return len(self.token_ids)
        sure = bisect.bisect_left(self._lengths, len(self.text))
        grows = self._lengths[sure] > len(self.text) or (0 < sure == len(self.token_ids) and self._detokenizer.waits)
        return sure - grows

    def token_texts(self, start: int = 0) -> list[str]:
        """Return what each sure token adds to the text, from token `start` on: joined, all of them are the text."""
        ends = [min(end, len(self.text)) for end in self._lengths[start : self.num_sure + 1]]
        return [self.text[begin:end] for begin, end in itertools.pairwise(ends)]

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens until the response is done; return the text that is sure by now."""
        before, new = len(self.text), token_ids.tolist() if isinstance(token_ids, np.ndarray) else list(map(int, token_ids))
        if not self._end_ids.isdisjoint(new):
            new = new[: 1 + min(new.index(token_id) for token_id in self._end_ids if token_id in new)]
        size = 1 if self._by_token else len(new)  # a stop string is looked for after each token
        for part in (new[start : start + size] for start in range(0, len(new), size or 1)):
            if self.done:
                break
            self.token_ids += part
            self._lengths.append(self._lengths[-1])
            self._add(self._detokenizer.push(*part))
            if not self.done and part[-1] in self._end_ids:
                self.finish()
        return self.text[before:]

    def finish(self) -> str:
        """End the response; return the text that waited for more."""
        before = len(self.text)
        if not self.done:
            piece = self._detokenizer.flush()
            if piece and self.token_ids[-1] in self._end_ids:
                self._lengths[-2] += len(piece)  # of the token before the end
            self._add(piece)
            self.text += self._stops.flush()
            self.done = True
        return self.text[before:]

    def _add(self, piece: str) -> None:
        self._lengths[-1] += len(piece)
        self.text += self._stops.push(piece)
        if self._stops.found is not None:
            self.done = True
            kept = next(i for i, length in enumerate(self._lengths) if length >= len(self.text))
            self.token_ids, self.surplus = self.token_ids[:kept], self._lengths[kept] - len(self.text)


def check_stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return stop strings as a tuple. Raises UserError for what is no text, or empty."""
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) and string for string in strings):
        raise UserError(f"stop is {stop!r}; allowed: a text of at least one character, or several in a list")
    return tuple(strings)


def _overlap(text: str, string: str) -> int:
    """Return the length of the longest end of a text with which a longer string begins."""
    return next((size for size in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:size])), 0)
