"""Pages: none is lost or given twice, content is found by all tokens up to it, what is oldest goes first."""

import numpy as np

from selfspan_jax.serving.pages import Pages, page_keys


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
