"""Pages of the KV cache, on the host: which are free, which sequences hold, and which are kept for prompts that begin alike."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int


def page_keys(token_ids: Int[np.ndarray, "T"], page_tokens: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """Hash each full page of a sequence together with all tokens before it (chained BLAKE2b), since its rows depend on them.

    `known` are those of its first pages.
    """
    keys, key = [*known], known[-1] if known else b""
    for end in range((len(known) + 1) * page_tokens, len(token_ids) + 1, page_tokens):
        page = np.ascontiguousarray(token_ids[end - page_tokens : end], "<i4")
        key = hashlib.blake2b(page.tobytes(), key=key, digest_size=32).digest()
        keys.append(key)
    return keys


class Pages:
    """The pages of a cache. Each is free, held by sequences (shared ones by several), or kept: held by none, its content known by a key.

    A page with a key is never written again. Kept pages are evicted when no page is free, those first that were given back first.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._num_held = 0
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages with nothing in them."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that no sequence holds, kept for prompts to come."""
        return len(self._kept)

    @property
    def num_used(self) -> int:
        """Pages that sequences hold; a shared one counts once."""
        return self._num_held

    @property
    def num_available(self) -> int:
        """Pages that can be allocated."""
        return len(self._free) + len(self._kept)

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """Hold the pages of the longest known beginning of `keys`."""
        found = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            self._num_held += not self._holders[page]
            self._holders[page] += 1
            self._kept.pop(page, None)
            found.append(page)
        return found

    def allocate(self, num_pages: int) -> list[int] | None:
        """Hold so many pages with nothing in them, evicting kept ones; None where there are not so many."""
        if num_pages > self.num_available:
            return None
        for _ in range(num_pages - len(self._free)):
            page, _ = self._kept.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            self._free.append(page)
        found = [self._free.pop() for _ in range(num_pages)]
        for page in found:
            self._holders[page] = 1
        self._num_held += num_pages
        return found

    def name(self, page: int, key: bytes) -> None:
        """Make a full page known by its key; where another page has that key, this one stays unknown."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Give pages of one sequence back: known ones are kept, the last first to be evicted, because nobody finds it without the first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            self._num_held -= 1
            if page in self._key_of:
                self._kept[page] = None
            else:
                self._free.append(page)


class Forecast:
    """Pages that sequences will hold in each of the chunks to come, if their responses are as long as they are taken to be.

    A sequence holds its pages for one chunk more than it needs, because its end is seen when the next one runs.

    Args:
      sequences: of each: tokens that it has, and those that it is still to write.
      max_tokens: of a sequence.
    """

    def __init__(self, sequences: Int[np.ndarray, "N 2"], num_pages: int, page_tokens: int, chunk_tokens: int, max_tokens: int):
        self._num_pages, self._page_tokens, self._chunk_tokens = num_pages, page_tokens, chunk_tokens
        self._written = chunk_tokens * np.arange(1, -(-max_tokens // chunk_tokens) + 2)  # by the end of each chunk
        num_tokens, num_left = sequences[:, :1], sequences[:, 1:]
        held = self._pages(num_tokens + np.minimum(self._written, num_left))
        self._held = np.sum(held * (self._written < num_left + 2 * chunk_tokens), axis=0)

    def admit(self, num_tokens: int, num_left: int) -> bool:
        """Count in one more sequence, if it finds room until its end, or is alone; tell whether it does."""
        chunks = min(-(-num_left // self._chunk_tokens) + 1, len(self._held))
        alone = not self._held[0]
        if not alone and self._held[chunks - 1] + self._pages(num_tokens + num_left) > self._num_pages:
            return False  # this one sum refuses most
        held = self._held[:chunks] + self._pages(num_tokens + np.minimum(self._written[:chunks], num_left))
        if not alone and held.max() > self._num_pages:
            return False
        self._held[:chunks] = held
        return True

    def _pages(self, num_tokens: Any) -> Any:
        return -(-num_tokens // self._page_tokens)
