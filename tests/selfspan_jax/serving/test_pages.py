"""Pages: none is lost or given twice, content is found by all tokens up to it, what is oldest goes first."""

import numpy as np

from selfspan_jax.serving.pages import Forecast, Pages, page_keys


def test_keys_are_of_all_tokens_up_to_the_end_of_a_page():
    rows = np.array([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 9, 7], [9, 2, 3, 4, 5, 6, 7]], np.int32)
    (a, b, c), (d, e, f), (g, h, i) = (page_keys(row, 2) for row in rows)
    assert (a, b) == (d, e) and len({a, b, c, f, g, h, i}) == 7  # the same two tokens after others have another key
    assert page_keys(rows[0].astype(np.int64), 2) == [a, b, c] and page_keys(rows[0, :1], 2) == []


def test_pages_are_shared_kept_and_evicted_by_age():
    pages, keys = Pages(4), [b"a", b"b", b"c"]
    first = pages.allocate(3)
    for page, key in zip(first, keys):
        pages.name(page, key)
    assert pages.share([b"a", b"b", b"x"]) == first[:2] and pages.share([b"x", b"a"]) == []
    pages.release(first)
    assert (pages.num_free, pages.num_used, pages.num_cached) == (1, 2, 1)
    pages.release(first[:2])
    assert (pages.num_free, pages.num_used, pages.num_cached) == (1, 0, 3)
    assert pages.allocate(5) is None and len(set(pages.allocate(2))) == 2
    assert pages.share(keys) == first[:2]  # the page that was given back first is gone
    assert pages.allocate(1) is None


def test_a_sequence_is_counted_in_where_all_have_room_until_their_ends():
    """Against a count of each step; a sequence keeps its pages for up to a chunk after the one in which it ends."""
    rng, told = np.random.default_rng(2), set()
    for _ in range(40):
        sequences = [(int(rng.integers(1, 60)), int(rng.integers(0, 50))) for _ in range(rng.integers(0, 6))]
        num_pages = int(rng.integers(10, 60))
        forecast = Forecast(np.array(sequences, np.int64).reshape(-1, 2), num_pages, page_tokens=8, chunk_tokens=4, max_tokens=120)
        for _ in range(6):
            size, left = int(rng.integers(1, 60)), int(rng.integers(0, 50))
            held = [
                sum(-(-(own + min(4 * chunk + 4, more)) // 8) for own, more in [*sequences, (size, left)] if 4 * chunk < more + 4)
                for chunk in range(14)
                if 4 * chunk < left + 4
            ]
            fits = not sequences or max(held) <= num_pages
            assert forecast.admit(size, left) == fits
            sequences += [(size, left)] * fits
            told.add((fits, len(sequences) > 2))
    assert len(told) == 4
