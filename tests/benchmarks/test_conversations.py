"""Which conversations share a catalogue, and what of them is reported."""

import types
from collections import Counter

import pytest

from benchmarks import systems
from benchmarks.arrivals import Sent
from benchmarks.conversations import over_one_catalogue
from data.documents import Document, Step
from selfspan_jax.errors import UserError


def dialogue(said, services, used):
    return Document("", (*(f"Service {name}: {name}()" for name in services), f"User: {said}"), (Step("{}", (used, len(services))),))


def names(document):
    return "".join(piece.split()[1][0] if piece.startswith("Service") else f" {piece[6:]}" for piece in document.pieces)


DIALOGUES = [dialogue("one", "ab", 0), dialogue("two", "xyz", 2), dialogue("three", "cd", 1), dialogue("four", "az", 1)]
CATALOGUES = {  # size, number -> the catalogue and what is said of each
    "as many as are used": ((2, 3), ["az one", "az two", "az four"]),
    "others beside": ((5, 3), ["azdbx one", "azdbx two", "azdbx three"]),
    "fewer than there are": ((1, 1), ["a one"]),
}


@pytest.mark.parametrize("case", CATALOGUES)
def test_conversations_whose_services_fit_get_one_catalogue(case):
    arguments, expected = CATALOGUES[case]
    assert [names(document) for document in over_one_catalogue(DIALOGUES, *arguments)] == expected


def test_too_few_conversations_are_refused():
    with pytest.raises(UserError, match="1 conversations fit into one catalogue of 1 services, but 2 are wanted"):
        over_one_catalogue(DIALOGUES, 1, 2)


def test_counts_are_of_one_run(monkeypatch):
    """What was read before it, as by those that shared the catalogue, is not its own; what is kept is all that there is."""
    counts = dict.fromkeys(("prompt_tokens", "prefix_hit_tokens", "generated_tokens", "preemptions", "waited_seconds"), 0)
    before, after = (
        types.SimpleNamespace(**counts, attended_tokens=a, context_tokens=c, pages_used=1, pages_cached=4, finished=Counter(stop=n))
        for a, c, n in ((5, 10, 2), (8, 40, 5))
    )
    monkeypatch.setattr(systems, "run_scheduler", lambda scheduler, work, times: setattr(scheduler, "stats", after) or [Sent(0.0, [0.5])])
    monkeypatch.setattr(systems, "summary", lambda rate, sent: {"seconds": 1.0})
    scheduler = types.SimpleNamespace(stats=before, config=types.SimpleNamespace(page_tokens=64))
    found = systems.run_at_once(scheduler, [])
    assert (found["attended_fraction"], found["rows_kept"], found["attended_tokens"], found["finished"]) == (0.1, 320, 3, {"stop": 3})
