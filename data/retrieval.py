"""Find the pieces of a text that a query is about, by words alone (BM25; Robertson and Zaragoza, 2009, with its usual constants)."""

import collections
import math
from collections.abc import Sequence

from data.alignment import FUNCTION_WORDS, words

_K1, _B = 1.2, 0.75


class BM25:
    """The pieces of one text, their words counted."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._counts = [collections.Counter(w for w in words(piece) if w not in FUNCTION_WORDS) for piece in pieces]
        self._lengths = [counts.total() for counts in self._counts]
        self._mean = max(sum(self._lengths) / max(len(pieces), 1), 1.0)
        having = collections.Counter(word for counts in self._counts for word in counts)
        self._weights = {word: math.log(1 + (len(pieces) - n + 0.5) / (n + 0.5)) for word, n in having.items()}

    def rank(self, query: str) -> list[int]:
        """Return the indices of all pieces, the best one first; of equals the earlier one."""
        wanted = [word for word in words(query) if word in self._weights]

        def score(piece: int) -> float:
            counts, norm = self._counts[piece], _K1 * (1 - _B + _B * self._lengths[piece] / self._mean)
            return sum(self._weights[w] * counts[w] * (_K1 + 1) / (counts[w] + norm) for w in wanted if w in counts)

        return sorted(range(len(self._counts)), key=lambda piece: -score(piece))
