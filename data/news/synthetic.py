"""Synthetic news: articles told from structured events, with summaries whose true sources and facts are known.

An article tells two to four events of different kinds, interleaved, among background, bystanders' quotes and earlier events
of the same kind elsewhere. Each event's facts are spread over up to three sentences: what happened where and to whom, a
number, and a cause or what an official says. The summary has a sentence for each event, the gravest kind first, wherever
the article tells it: an order that can be read in the text and not in its positions.
"""

import dataclasses
import functools
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data import alignment

_TEMPLATES = tomllib.loads((Path(__file__).parent / "templates.toml").read_text(encoding="utf-8"))
_FIRST_NAMES = {pronoun: _TEMPLATES["names"][pronoun].split() for pronoun in ("She", "He")}
_LAST_NAMES = _TEMPLATES["names"]["last"].split()
_PLACES = [start + end for start in _TEMPLATES["names"]["place_starts"].split() for end in _TEMPLATES["names"]["place_ends"].split()]
_PHRASES = _TEMPLATES["phrases"]
_ARTICLE = re.compile(r"\b([Aa]) (?=[AEIOU])")
_FIELD = re.compile(r"\{[a-z]+\}")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


_KINDS: list[dict[str, Any]] = _TEMPLATES["kinds"]
KINDS = tuple(kind["name"] for kind in _KINDS)
MAX_EVENTS = len(_KINDS)
MAX_DISTRACTORS = len(_PHRASES["background"])


class Fact(NamedTuple):
    """A name, number or place that a summary sentence states, as written there."""

    sentence: int
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Story:
    """An article and its summary, in sentences; the true sources of each summary sentence, ascending; the summary's facts."""

    article: tuple[str, ...]
    summary: tuple[str, ...]
    sources: tuple[tuple[int, ...], ...]
    facts: tuple[Fact, ...]


class _Names:
    """Random choices for one story, no name, place or number twice."""

    def __init__(self, uniform: Callable[[], float]) -> None:
        self._uniform = uniform
        self._used: set[str] = set()

    def chance(self, share: float) -> bool:
        return self._uniform() < share

    def pick(self, values: Sequence[str]) -> str:
        return values[int(self._uniform() * len(values))]

    def integer(self, low: int, high: int) -> int:
        return low + int(self._uniform() * (high - low + 1))

    def unused(self, draw: Callable[[], str]) -> str:
        for _ in range(1000):
            if (value := draw()) not in self._used:
                self._used.add(value)
                return value
        raise AssertionError("a story has more names or numbers than there are")

    def person(self) -> tuple[str, str]:
        """Draw a full name, first and last name both new, and its pronoun."""
        pronoun = "She" if self.chance(0.5) else "He"
        first = self.unused(lambda: self.pick(_FIRST_NAMES[pronoun]))
        return f"{first} {self.unused(lambda: self.pick(_LAST_NAMES))}", pronoun

    def place(self) -> str:
        return self.unused(lambda: self.pick(_PLACES))

    def number(self, low: int, high: int) -> str:
        return self.unused(lambda: str(self.integer(low, high)))

    def shuffled(self, values: Sequence[int]) -> list[int]:
        return sorted(values, key=lambda _: self._uniform())


class _Line(NamedTuple):
    """A sentence before its pronouns: of which event (-1: none), whether its event must be known by then, whether it is a source."""

    event: int
    text: str
    later: bool = True
    source: bool = True


def story(uniform: Callable[[], float], *, min_events: int = 2, max_events: int = 4, max_distractors: int = 8) -> Story:
    """Tell one story; `uniform` draws from [0, 1).

    Each event has one to five distractors of its own, and the story up to `max_distractors` that belong to none.
    """
    names = _Names(uniform)
    kinds = [_KINDS[i] for i in sorted(names.shuffled(range(len(_KINDS)))[: names.integer(min_events, max_events)])]
    lines: list[_Line] = []
    summary: list[str] = []
    facts: list[Fact] = []
    pronouns: list[str] = []
    for event, kind in enumerate(kinds):
        who, pronoun = names.person()
        place, count = names.place(), names.number(*kind["numbers"])
        fields = {"who": who, "place": place, "n": count, "day": names.pick(_DAYS), "thing": kind["thing"], "it": "{it}", "she": "{she}"}
        pronouns.append(pronoun)
        facts += [Fact(event, "name", who), Fact(event, "place", place), Fact(event, "number", count)]
        if names.chance(0.2):
            lines.append(_Line(event, names.pick(kind["both"]).format(**fields), later=False))
        else:
            lines.append(_Line(event, names.pick(kind["happened"]).format(**fields), later=False))
            lines.append(_Line(event, names.pick(kind["number"]).format(**fields)))
        choice, ending = names.integer(0, 2), "."
        if choice == 0:
            fields["why"] = names.pick(kind["causes"])
            lines.append(_Line(event, names.pick(_PHRASES["causes"]).format(**fields)))
            ending = names.pick(_PHRASES["because"])
        elif choice == 1:
            whom, _ = names.person()
            sentence = kind["quotes"][0]
            fields |= {"official": kind["official"], "whom": whom, "quote": sentence[:-1] + ",", "sentence": sentence}
            lines.append(_Line(event, names.pick(_PHRASES["said"]).format(**fields)))
            ending = names.pick(_PHRASES["according"])
            facts.append(Fact(event, "name", whom))
        summary.append(_capital((names.pick(kind["summary"]) + ending).format(**fields)))
        own = [*kind["details"], kind["earlier"], '"{quote}" said {bystander} {whom}.']
        for index in names.shuffled(range(len(own)))[: names.integer(1, 5)]:
            whom, _ = names.person()
            other = {"quote": kind["quotes"][1][:-1] + ",", "bystander": kind["bystander"], "whom": whom, "place": names.place()}
            other |= {"n": names.number(*kind["numbers"]), "year": str(names.integer(1950, 2020)), "it": "{it}", "she": "{she}"}
            lines.append(_Line(event, own[index].format(**other), source=False))
    for index in names.shuffled(range(len(_PHRASES["background"])))[: names.integer(0, max_distractors)]:
        whom, _ = names.person()
        other = {"place": names.place(), "n": names.number(2, 990), "year": str(names.integer(1200, 1900)), "who": whom}
        lines.append(_Line(-1, _PHRASES["background"][index].format(**other), later=False, source=False))
    ordered = _interleaved(names, lines)
    article: list[str] = []
    for before, line in zip([None, *ordered], ordered):
        near = before is not None and before.event == line.event
        it = "it" if near else kinds[line.event]["thing"]
        she = pronouns[line.event].lower() if near else kinds[line.event]["title"]
        article.append(_capital(line.text.format(it=it, she=she)))
    sources = [tuple(i for i, line in enumerate(ordered) if line.source and line.event == event) for event in range(len(kinds))]
    return Story(tuple(article), tuple(summary), tuple(sources), tuple(facts))


def _interleaved(names: _Names, lines: list[_Line]) -> list[_Line]:
    """Draw an order in which an event is told before anything refers to it."""
    first = {line.event: line for line in lines if not line.later and line.event >= 0}
    ordered = [lines[i] for i in names.shuffled(range(len(lines)))]
    known: set[int] = set()
    result: list[_Line] = []
    for line in ordered:
        if line.event >= 0 and line.event not in known:
            known.add(line.event)
            result.append(first[line.event])
        if line is not first.get(line.event):
            result.append(line)
    return result


def _capital(sentence: str) -> str:
    sentence = _ARTICLE.sub(r"\1n ", sentence)
    start = 1 if sentence.startswith('"') else 0
    return sentence[:start] + sentence[start].upper() + sentence[start + 1 :]


@functools.cache
def words() -> frozenset[str]:
    """Return every word that stories and their summaries can have, in lower case, numbers left out."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield _FIELD.sub(" ", value)
        elif not isinstance(value, int):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from texts(inner)

    every = [*texts(_TEMPLATES), *_PLACES, *_DAYS, "an", *_FIRST_NAMES]
    return frozenset(word for word in alignment.words("\n".join(every)) if not word[0].isdigit())


def draw(seed: str) -> Story:
    """Tell the story of a seed: the same in all versions of Python (nothing but `random.Random(str).random` is used)."""
    return story(random.Random(seed).random)
