"""Synthetic news: articles told from structured events, with summaries whose true sources and facts are known.

An article tells two to four events of different kinds, interleaved, among background, bystanders' quotes and earlier events
of the same kind elsewhere. Each event's facts are spread over up to three sentences: what happened where and to whom, a
number, and a cause or what an official says. The summary has a sentence for each event, the gravest kind first, wherever
the article tells it: an order that can be read in the text and not in its positions.
"""

# ruff: noqa: E501, SIM905  (tables of words and sentences)

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_FIRST_NAMES = {
    "She": (
        "Ada Alma Anna Beth Carla Clara Dana Edith Elena Emma Erin Eva Faye Gina Greta Hanna Ida Ines Iris Jana Joan "
        "Julia Karin Lena Lucy Mara Maya Mina Nadia Nora Olga Paula Petra Rita Rosa Ruth Sara Tara Vera Wanda"
    ).split(),
    "He": (
        "Adam Alan Arno Boris Bruno Carl Colin Daniel David Dirk Edgar Emil Erik Felix Frank Georg Hugo Ian Ivan Jack "
        "Jonas Karl Leon Lukas Mark Max Nils Oscar Otto Paul Peter Ralf Robert Simon Stefan Theo Tim Victor Walter Yuri"
    ).split(),
}
_LAST_NAMES = (
    "Abbot Adler Barlow Becker Benson Bishop Bowman Brandt Calder Carver Castle Chandler Coleman Conway Crane "
    "Dalton Decker Donner Draper Ellis Engel Farrow Fisher Foster Frost Gallo Garner Gibson Graves Gruber Hale "
    "Harper Hayes Holt Horn Hume Jarvis Keller Kemp Kessler Klein Lang Larkin Lorenz Lowell Maddox Mercer Meyer "
    "Moreno Moss Novak Olsen Osborn Parrish Pike Porter Quinn Ramsey Reeves Rossi Sadler Schmidt Sharp Silva "
    "Steiner Sutton Tanner Thorne Tucker Unger Vance Varga Vogel Wagner Walsh Weber Winter Wolfe Yates Zeller"
).split()
_PLACES = [
    start + end
    for start in (
        "Ash Black Brook Clay Cross Dun East Elm Fair Glen Green Haver Kings Lang Mill New North Oak Red Salt South Stan West Wood"
    ).split()
    for end in ("borough bridge burgh bury field ford haven holm mouth port stead ton wick").split()
]
_ARTICLE = re.compile(r"\b([Aa]) (?=[AEIOU])")
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How events of one kind are told. Fields in braces: who, she, place, day, n, it, why, whom; it and she are pronouns where they can be."""

    name: str
    thing: str
    """What the event is called once it is known."""
    title: str
    """What its person is called once they are known."""
    numbers: tuple[int, int]
    happened: tuple[str, ...]
    number: tuple[str, ...]
    causes: tuple[str, ...]
    official: str
    bystander: str
    quotes: tuple[str, ...]
    details: tuple[str, ...]
    """Sentences that a summary leaves out."""
    earlier: str
    """An event of the kind that is not this one."""
    summary: tuple[str, ...]
    both: tuple[str, ...]
    """What happened and the number, in one sentence."""


# The gravest first: the order of every summary.
_KINDS = (
    _Kind(
        "fire", "the blaze", "the owner", (3, 90),
        ("A fire broke out on {day} at a warehouse in {place} that belongs to {who}.",
         "A warehouse in {place} owned by {who} caught fire on {day}.",
         "Flames destroyed the {place} warehouse of {who} in a fire late on {day}."),
        ("{it} left {n} people injured.", "Doctors treated {n} people for burns and smoke.", "Hospitals took in {n} injured workers because of it."),
        ("a faulty cable", "a cigarette thrown away", "an overheated machine", "a lightning strike"),
        "fire chief", "neighbour",
        ("The roof came down before we could get in.", "We have never seen flames as high as these."),
        ("The smoke could be seen from far away.", "Roads around the site were closed until the morning.", "{she} had bought the building only recently.",
         "Schools nearby kept their windows shut."),
        "A similar fire in {place} had hurt {n} people in {year}.",
        ("A fire at the {place} warehouse of {who} injured {n} people", "{n} people were injured in a fire at a warehouse of {who} in {place}",
         "A blaze hurt {n} people at a warehouse in {place} owned by {who}"),
        ("A fire injured {n} people on {day} at the {place} warehouse of {who}.",),
    ),
    _Kind(
        "crash", "the accident", "the driver", (2, 60),
        ("A bus driven by {who} left the road near {place} on {day}.", "On {day} {who} lost control of a bus outside {place}.",
         "A bus with {who} at the wheel overturned near {place} early on {day}."),
        ("{n} passengers had to be freed from the wreck.", "Ambulances carried {n} passengers away.", "{it} left {n} passengers with broken bones."),
        ("black ice", "a burst tyre", "dense fog", "a deer on the road"),
        "police officer", "passenger",
        ("There was no time to brake.", "Everybody was shouting at once."),
        ("The road stayed shut for nine hours.", "A crane lifted the vehicle in the evening.", "{she} was not hurt.", "The company runs the line twice a day."),
        "A bus had crashed near {place} in {year}, with {n} passengers on board.",
        ("A bus driven by {who} crashed near {place}, hurting {n} passengers", "{n} passengers were hurt near {place} when a bus driven by {who} crashed",
         "{who} crashed a bus with {n} passengers near {place}"),
        ("A bus driven by {who} crashed near {place} on {day} and {n} passengers were hurt.",),
    ),
    _Kind(
        "trial", "the verdict", "the banker", (2, 19),
        ("A court in {place} found the banker {who} guilty of fraud on {day}.", "The banker {who} was convicted of fraud in {place} on {day}.",
         "Judges in {place} ruled on {day} that the banker {who} had committed fraud."),
        ("{she} must spend {n} years in prison.", "The sentence is {n} years in prison.", "A term of {n} years behind bars was handed down."),
        ("forged letters", "hidden accounts", "a secret recording", "invented customers"),
        "prosecutor", "former client",
        ("This was greed and nothing else.", "Not a cent has come back so far."),
        ("The hearing had been put off twice.", "{she} listened without a word.", "Cameras were not allowed in the room.", "An appeal can be filed within a month."),
        "Another banker had been sent to prison for {n} years by a court in {place} in {year}.",
        ("The banker {who} was jailed for {n} years for fraud by a court in {place}", "A court in {place} sent the banker {who} to prison for {n} years",
         "Fraud brings the banker {who} {n} years in a prison, a court in {place} decided"),
        ("A court in {place} sentenced the banker {who} to {n} years for fraud on {day}.",),
    ),
    _Kind(
        "strike", "the walkout", "the union leader", (110, 990),
        ("Workers at the steel plant in {place} went on strike on {day}, led by {who}.", "{who} led workers of the {place} steel plant into a strike on {day}.",
         "A strike that {who} called shut the steel plant in {place} on {day}."),
        ("{n} employees stayed at home.", "The plant's gates saw {n} employees gather.", "{it} was joined by {n} employees."),
        ("a cut in night pay", "a broken pension promise", "a ban on overtime", "a new shift plan"),
        "plant manager", "worker",
        ("The door is open for talks.", "We cannot live on what is left."),
        ("Drums and whistles could be heard all day.", "Deliveries were sent back.", "{she} has been with the union since school.", "A bakery brought bread to the pickets."),
        "The last strike in {place}, in {year}, had counted {n} employees.",
        ("{n} employees joined a strike of {who} at the steel plant in {place}", "{who} led {n} employees of the {place} steel plant in a strike",
         "A strike by {n} employees under {who} closed the steel plant in {place}"),
        ("{n} employees of the steel plant in {place} went on strike under {who} on {day}.",),
    ),
    _Kind(
        "election", "the vote", "the new mayor", (51, 79),
        ("{who} was elected mayor of {place} on {day}.", "Voters in {place} chose {who} as their mayor on {day}.", "{place} has a new mayor since {day}: {who}."),
        ("{she} won {n} percent of the ballots.", "The count gave {n} percent to the winner.", "{it} was decided with {n} percent."),
        ("anger about rents", "a promise of free buses", "a scandal at the town hall", "plans for a new school"),
        "election officer", "voter",
        ("Turnout was the highest in decades.", "It was time for a fresh face."),
        ("The square filled with people at night.", "{she} will move into the office in spring.", "The loser sent flowers.", "Two polling stations opened late."),
        "In {year} a mayor of {place} had been elected with {n} percent.",
        ("{who} was elected mayor of {place} with {n} percent", "{place} elected {who} mayor with {n} percent", "With {n} percent, {who} became mayor of {place}"),
        ("{who} was elected mayor of {place} on {day} with {n} percent.",),
    ),
    _Kind(
        "deal", "the takeover", "the investor", (12, 950),
        ("The investor {who} bought a brewery in {place} on {day}.", "A brewery in {place} was sold to the investor {who} on {day}.",
         "{who}, an investor, became the owner of a {place} brewery on {day}."),
        ("{she} paid {n} million dollars.", "The price is {n} million dollars.", "{it} cost {n} million dollars."),
        ("growing exports", "an old patent", "a search for cheap land", "falling grain prices"),
        "company lawyer", "shareholder",
        ("The papers were signed within an hour.", "The name of the beer will stay."),
        ("Banks had been asked for advice.", "{she} also owns two hotels.", "The brand is known for its dark ale.", "The staff was told by letter."),
        "A brewery in {place} had changed hands in {year} for {n} million dollars.",
        ("The investor {who} bought a brewery in {place} for {n} million dollars", "A {place} brewery went to the investor {who} for {n} million dollars",
         "For {n} million dollars, investor {who} took over a brewery in {place}"),
        ("On {day} the investor {who} bought a brewery in {place} for {n} million dollars.",),
    ),
    _Kind(
        "discovery", "the find", "the archaeologist", (4, 48),
        ("The archaeologist {who} uncovered a Roman villa near {place} on {day}.", "A Roman villa came to light near {place} on {day}, dug up by the archaeologist {who}.",
         "Near {place} the archaeologist {who} found a Roman villa on {day}."),
        ("{n} rooms have been counted.", "Walls of {n} rooms can be made out.", "{it} consists of {n} rooms."),
        ("a drained lake", "a new pipeline", "a farmer's tip", "pictures from a drone"),
        "museum director", "student",
        ("The colours look as if painted yesterday.", "I held my breath when the first stone was lifted."),
        ("A tent now covers the ground.", "{she} has worked in the area for a decade.", "Coins were found in a jar.", "Visitors will have to wait until summer."),
        "A smaller villa with {n} rooms had been found near {place} in {year}.",
        ("The archaeologist {who} found a Roman villa with {n} rooms near {place}", "A Roman villa of {n} rooms was found near {place} by the archaeologist {who}",
         "Near {place}, archaeologist {who} dug up a Roman villa that has {n} rooms"),
        ("The archaeologist {who} found a Roman villa of {n} rooms near {place} on {day}.",),
    ),
    _Kind(
        "match", "the match", "the striker", (21, 88),
        ("The striker {who} won the cup for {place} on {day}.", "{place} won the cup on {day} thanks to the striker {who}.",
         "On {day} the cup went to {place}, and the striker {who} was the hero."),
        ("The only goal fell in minute {n}.", "{she} scored in minute {n}.", "{it} was settled in minute {n}."),
        ("a corner kick", "a slip by the keeper", "a long free kick", "a quick counter"),
        "coach", "supporter",
        ("They ran until they could run no more.", "My grandchildren will hear of this."),
        ("Rain fell during the whole second half.", "{she} had come back from an injury in autumn.", "The stadium was sold out.", "Both benches were shown yellow cards."),
        "In {year} the cup had gone to {place} by a goal in minute {n}.",
        ("The striker {who} won {place} the cup in minute {n}", "{place} won the cup with a goal of the striker {who} in minute {n}",
         "A goal by striker {who} in minute {n} gave {place} the cup"),
        ("A goal of the striker {who} in minute {n} won {place} the cup on {day}.",),
    ),
)  # fmt: skip
MAX_EVENTS = len(_KINDS)
_CAUSES = (
    "Reports put it down to {why}: {thing}.",
    "Behind {thing}, it is said, was {why}.",
    "{why} led to {thing}, according to first reports.",
)
_BECAUSE = (", because of {why}.", ", with {why} as the reason.", "; the reason was {why}.")
_SAID = ('"{quote}" said {official} {whom}.', '{official} {whom} commented: "{sentence}"', '"{quote}" {official} {whom} put it.')
_ACCORDING = (", {official} {whom} said.", ", according to {official} {whom}.")
_BACKGROUND = (
    "The region has seen a dry year.",
    "{place} was founded in {year} and has {n} thousand inhabitants.",
    "Prices in shops rose by {n} percent over the last twelve months.",
    "The weather will stay mild, forecasters expect.",
    "Ministers meet in {place} at the end of the month.",
    "Trains to {place} ran with delays of {n} minutes.",
    "A survey of {n} households is due in autumn.",
    "{who} of the tourist board in {place} hopes for a busy season.",
)

MAX_DISTRACTORS = len(_BACKGROUND)


class Fact(NamedTuple):
    """A name, number or place that a summary sentence states, as it stands there."""

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
    """Draws for one story, no name, place or number twice."""

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
        """A full name whose parts are both new, and the pronoun."""
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
    later: bool
    source: bool


def story(uniform: Callable[[], float], *, min_events: int = 2, max_events: int = 4, max_distractors: int = 8) -> Story:
    """Tells one story; `uniform` draws from [0, 1).

    Each event has one to five distractors of its own, and the story up to `max_distractors` that belong to none.
    """
    names = _Names(uniform)
    kinds = sorted(names.shuffled(range(len(_KINDS)))[: names.integer(min_events, max_events)])
    lines: list[_Line] = []
    summary: list[str] = []
    facts: list[Fact] = []
    pronouns: list[str] = []
    for event, number in enumerate(kinds):
        kind = _KINDS[number]
        who, pronoun = names.person()
        place, count = names.place(), names.number(*kind.numbers)
        fields = {"who": who, "place": place, "n": count, "day": names.pick(_DAYS), "thing": kind.thing, "it": "{it}", "she": "{she}"}
        pronouns.append(pronoun)
        if names.chance(0.2):
            lines.append(_Line(event, names.pick(kind.both).format(**fields), False, True))
        else:
            lines.append(_Line(event, names.pick(kind.happened).format(**fields), False, True))
            lines.append(_Line(event, names.pick(kind.number).format(**fields), True, True))
        ending = "."
        told = [Fact(event, "name", who), Fact(event, "place", place), Fact(event, "number", count)]
        choice = names.integer(0, 2)
        if choice == 0:
            fields["why"] = names.pick(kind.causes)
            lines.append(_Line(event, names.pick(_CAUSES).format(**fields), True, True))
            ending = names.pick(_BECAUSE).format(**fields)
        elif choice == 1:
            whom, _ = names.person()
            said = {"official": kind.official, "whom": whom, "quote": kind.quotes[0][:-1] + ",", "sentence": kind.quotes[0]}
            lines.append(_Line(event, names.pick(_SAID).format(**said), True, True))
            ending = names.pick(_ACCORDING).format(**said)
            told.append(Fact(event, "name", whom))
        summary.append(_capital(names.pick(kind.summary).format(**fields) + ending))
        facts += told
        own = [*kind.details, kind.earlier, '"{quote}" said {bystander} {whom}.']
        for index in names.shuffled(range(len(own)))[: names.integer(1, 5)]:
            whom, _ = names.person()
            other = {"quote": kind.quotes[1][:-1] + ",", "bystander": kind.bystander, "whom": whom, "place": names.place(), "it": "{it}"}
            other |= {"n": names.number(*kind.numbers), "year": str(names.integer(1950, 2020)), "she": "{she}"}
            lines.append(_Line(event, own[index].format(**other), True, False))
    for index in names.shuffled(range(len(_BACKGROUND)))[: names.integer(0, max_distractors)]:
        whom, _ = names.person()
        other = {"place": names.place(), "n": names.number(2, 990), "year": str(names.integer(1200, 1900)), "who": whom}
        lines.append(_Line(-1, _BACKGROUND[index].format(**other), False, False))
    ordered = _interleaved(names, lines)
    article: list[str] = []
    previous = -1
    for line in ordered:
        near = previous == line.event
        it = "it" if near else _KINDS[kinds[line.event]].thing
        she = pronouns[line.event].lower() if near else _KINDS[kinds[line.event]].title
        article.append(_capital(line.text.format(it=it, she=she)))
        previous = line.event
    sources = [tuple(i for i, line in enumerate(ordered) if line.source and line.event == event) for event in range(len(kinds))]
    return Story(tuple(article), tuple(summary), tuple(sources), tuple(facts))


def _interleaved(names: _Names, lines: list[_Line]) -> list[_Line]:
    """A random order in which an event is told before anything refers to it."""
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


def draw(seed: str) -> Story:
    """The story of a seed: the same for all versions of Python (nothing but `random.Random(str).random` is used)."""
    return story(random.Random(seed).random)
