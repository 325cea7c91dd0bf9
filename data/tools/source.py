"""Read dialogues and their service calls as google-research-datasets/dstc8-schema-guided-dialogue has them, and make documents of them.

`{train,dev,test}/schema.json`, `{train,dev,test}/dialogues_*.json`, and the schemas in five paraphrases in `sgd_x/data/v{1..5}`.
"""

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from data.documents import corpus, own
from data.documents.corpus import Document, Step
from data.documents.own import Draft
from data.errors import UserError, check_choice, check_range
from data.pieces import Part
from data.sources import ALIGNING, Made
from data.streams import SPLITS
from data.tools import catalogue
from data.tools.catalogue import Drawing, Service, Wordings, field, line

SPEAKERS = {"USER": "User:", "SYSTEM": "System:"}
RESULT = "Result:"
SEEN, REWORDED, UNSEEN = KINDS = ("seen", "reworded", "unseen")
"""Of a call's service: in training with its wording, in training in other wordings alone, not in training."""


class Call(NamedTuple):
    """A call of a method: what a step writes as JSON."""

    service: str
    method: str
    parameters: Mapping[str, Any]

    def write(self) -> str:
        return json.dumps(self._asdict(), ensure_ascii=False)

    def parts(self) -> list[str]:
        """Cut what `write` returns before each value: spaces join the parts."""
        found = [Call(self.service, self.method, {}).write().removesuffix("}}")]
        for number, (name, value) in enumerate(self.parameters.items()):
            found[-1] += f"{', ' if number else ''}{json.dumps(name, ensure_ascii=False)}:"
            found.append(json.dumps(value, ensure_ascii=False))
        return [*found[:-1], f"{found[-1]}}}}}"]


def parts(
    document: Document,
    number: int,
    *,
    value_sources: bool,
    recent_turns: int = 0,
    late_sources: float = 0,
    extra_sources: float = 0,
    uniform: float | None = None,
) -> list[Part]:
    """Return what a call names and writes, in turn.

    Args:
      value_sources: each value is a part, which names what it stands in, of calls whose sources are the service, the turn that it
        answers to, and one for each value.
      recent_turns: so many turns, up to that one, are named in any case.
      late_sources: share of the other turns that are named with their values alone, drawn by `uniform`.
      extra_sources: share of the calls that also name one of the turns and rows between those, which no value stands in.
    """
    step = document.steps[number]
    service, *others = step.sources
    call = read_call(step.text) if value_sources else None
    texts = call.parts() if call and 1 + len(call.parameters) == len(others) else [step.text]
    draw = random.Random(f"tools/{uniform}").random
    late = {turn for turn in sorted({*others[1:]} - {others[0]}) if draw() < late_sources} if len(texts) > 1 else set()
    turns = [i for i, piece in enumerate(document.pieces[: 1 + max(others[:1], default=-1)]) if piece.startswith((*SPEAKERS.values(),))]
    recent = {*turns[max(len(turns) - recent_turns, 0) :]}
    told = {*others} - {service} | recent
    between = [piece for piece in range(min(told, default=0), max(told, default=0)) if piece not in told]
    extra = {random.Random(f"tools/extra/{uniform}").choice(between)} if between and extra_sources and draw() < extra_sources else set()
    first = (service, *sorted(told - late | recent | extra))
    return [(first, texts[0]), *(((source,), text) for source, text in zip(others[1:], texts[1:]))]


def read_call(text: str) -> Call | None:
    """Read what `Call.write` wrote; None where a text is something else, whatever it is."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = {"service": str, "method": str, "parameters": dict}
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        return None
    return Call(**fields) if all(isinstance(fields[name], kind) for name, kind in kinds.items()) else None


class Turn(NamedTuple):
    """What one of the two says, the values that its annotation has, as (service, slot, value), and the calls made before it is said."""

    speaker: str
    text: str
    values: tuple[tuple[str, str, str], ...]
    calls: tuple[tuple[Call, tuple[dict[str, str], ...]], ...]
    """Each with the rows that it found."""


class Dialogue(NamedTuple):
    """A record of the repository; services, methods and slots have their original names."""

    name: str
    split: str
    services: tuple[str, ...]
    turns: tuple[Turn, ...]

    @property
    def where(self) -> str:
        return self.name


def read(source: str, split: str) -> Iterator[Dialogue]:
    """Yield the dialogues of a split, file by file. UserError: a file is not what it should be."""
    folder = Path(source, catalogue.FOLDERS[split])
    files = sorted(folder.glob("dialogues_*.json"))
    if not files:
        raise UserError(f"{folder}: expected files dialogues_*.json")
    for file in files:
        dialogues = catalogue.read_json(file)
        if not isinstance(dialogues, list):
            raise UserError(f"{file}: expected a list of dialogues")
        for fields in dialogues:
            name = field(file, fields, "dialogue_id", str)
            where = f"{file}: {name}"
            turns = tuple(_turn(where, turn) for turn in field(where, fields, "turns", list))
            yield Dialogue(name, split, tuple(map(line, field(where, fields, "services", list))), turns)


def _turn(where: str, fields: Any) -> Turn:
    speaker = field(where, fields, "speaker", str)
    if speaker not in SPEAKERS:
        raise UserError(f"{where}: the speaker is {speaker!r}; allowed: {', '.join(SPEAKERS)}")
    values, calls = [], []
    for frame in field(where, fields, "frames", list):
        service = field(where, frame, "service", str)
        for act in field(where, frame, "actions", list, []):
            slot = field(where, act, "slot", str, "")
            values += [(service, slot, line(value)) for value in field(where, act, "canonical_values", list, [])]
        if "service_call" in frame:
            called = field(where, frame, "service_call", dict)
            call = Call(service, field(where, called, "method", str), _lines(field(where, called, "parameters", dict)))
            calls.append((call, tuple(map(_lines, field(where, frame, "service_results", list, [])))))
    return Turn(speaker, line(field(where, fields, "utterance", str)), tuple(values), tuple(calls))


def _lines(fields: Mapping[str, Any]) -> dict[str, str]:
    return {name: line(value) for name, value in fields.items()}


@dataclasses.dataclass(frozen=True)
class Corpus(corpus.Corpus):
    """How dialogues with services are written.

    Attributes:
      num_labels: Labels of the vocabulary; each service, turn, result row and call of an example takes one.
      piece_sentences: Of documents of your own: sentences to a piece (label); 0: whole paragraphs.
      services: Services in a catalogue, those that the dialogue uses among them; several wordings of distractors where there are fewer.
      min_services: Fewest services, where catalogues are of different sizes: log-uniform up to services. 0: all are of one size.
      original: Share of services in their original wording; the others are in one of SGD-X's five.
      described: Services have descriptions, defaults and allowed values; otherwise the names of methods and parameters alone.
      example: all calls of a dialogue, or those of one turn after what was said before it.
      value_sources: Name before each value of a call what it stands in, whether it was named before or not.
      recent_turns: Turns, up to the one that a call answers to, which it names whether a value stands in them or not.
      late_sources: With value_sources, share of the turns that calls name with their values alone, to train on; the one that a call answers
        to is named first.
      extra_sources: With value_sources, share of the calls that name one turn or row too many, to train on: no value stands in it.
      bare: Share of the catalogues, to train on, of names alone, as if described were False, with up to bare_services.
      bare_services: Most services in these: log-uniform from services on.
    """

    num_labels: int = 256
    piece_sentences: int = 0
    services: int = 26
    min_services: int = 0
    original: float = 0.25
    described: bool = True
    example: Literal["dialogue", "turn"] = "dialogue"
    value_sources: bool = False
    recent_turns: int = 0
    late_sources: float = 0.0
    extra_sources: float = 0.0
    bare: float = 0.0
    bare_services: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "services", low=1)
        check_range(self, "min_services", low=0, high=self.services)
        check_range(self, "original", "late_sources", "extra_sources", "bare", low=0, high=1)
        check_range(self, "bare_services", low=1)
        check_range(self, "recent_turns", low=0)
        for name in ("late_sources", "extra_sources"):
            if getattr(self, name) and not self.value_sources:
                raise UserError(
                    f"{name} is {getattr(self, name)} where value_sources is False; allowed: 0, as no value names its source then"
                )
        check_choice("example", self.example, Literal["dialogue", "turn"])
        if self.too_long != "drop":
            raise UserError(f"too_long is {self.too_long!r}; allowed: drop: what a dialogue ends with is what its calls rest on")

    def parts(self, document: Document, number: int, uniform: float | None) -> list[Part]:
        shares = {"late_sources": self.late_sources, "extra_sources": self.extra_sources}
        return parts(document, number, value_sources=self.value_sources, recent_turns=self.recent_turns, **shares, uniform=uniform)


@dataclasses.dataclass(frozen=True)
class Drafts:
    """The documents of a dialogue: one of all its calls, or one for each turn that has some; pickles.

    Attributes:
      known: the services of each split, in all wordings.
      seen: those of training.
    """

    known: Mapping[str, Wordings]
    seen: frozenset[str]
    corpus: Corpus
    seed: int

    def __call__(self, dialogue: Dialogue) -> Iterator[Draft | Made]:
        calling = [number for number, turn in enumerate(dialogue.turns) if turn.calls]
        if not calling:
            yield Made(dialogue.split, None, ("without a call",))
        elif self.corpus.example == "dialogue":
            yield self._draft(dialogue, None)
        else:
            yield from (self._draft(dialogue, number) for number in calling)

    def _draft(self, dialogue: Dialogue, only: int | None) -> Draft | Made:
        """Make the document of a dialogue and its calls; of those of one turn alone, with what was said before it."""
        number = dialogue.name if only is None else f"{dialogue.name}/{only}"
        uniform, most = random.Random(f"tools/{self.seed}/{dialogue.split}/{number}"), self.corpus.services
        least = self.corpus.min_services or most
        described = self.corpus.described and not (self.corpus.bare and uniform.random() < self.corpus.bare)
        if self.corpus.described and not described:
            least, most = self.corpus.services, self.corpus.bare_services
        size = int(least * ((most + 1) / least) ** uniform.random()) if least < most else most
        known = self.known[dialogue.split]
        services = Drawing(size, self.corpus.original, dialogue.split == "train").draw(known, dialogue.services, uniform)
        places = {own.origin: place for place, own in enumerate(services)}  # other wordings are of distractors alone
        transcript = Transcript([own.write(described=described) for own in services])
        steps = []
        for i, turn in enumerate(dialogue.turns[: None if only is None else only + 1]):
            for call, rows in turn.calls:
                if call.service not in dialogue.services:
                    raise UserError(f"dialogue {dialogue.name}: a call of {call.service}, which is none of its services")
                place = places[call.service]
                service, original = services[place], known[call.service][0]
                if only in (None, i):
                    origins = transcript.origins(call, original, place, described=described)
                    if origins is None:
                        return Made(dialogue.split, None, ("with a value that stands nowhere",))
                    steps.append(Step(reworded(call, original, service).write(), (place, *origins), (), self._kind(service)))
                if only is None or i < only:
                    names = dict(zip((slot.name for slot in original.slots), (slot.name for slot in service.slots)))
                    transcript.find(call, rows, names)
            transcript.say(turn)
        pieces = transcript.pieces if only is None else transcript.pieces[:-1]  # the turn that calls is said afterwards
        return Draft(number, dialogue.split, Document("", tuple(pieces), tuple(steps)))

    def _kind(self, service: Service) -> str:
        return UNSEEN if service.origin not in self.seen else REWORDED if service.is_held_out else SEEN


class Transcript:
    """The pieces of a dialogue after those of its catalogue, and where values stand in them."""

    def __init__(self, catalogue: Iterable[str]) -> None:
        self.pieces = [*catalogue]
        self._last: int | None = None  # what was said last
        self._said: list[tuple[int, tuple[str, str, str]]] = []  # piece, and service, slot and value
        self._found: list[tuple[int, str]] = []  # piece and value

    def say(self, turn: Turn) -> None:
        """Add a turn."""
        self._last = len(self.pieces)
        self.pieces.append(f"{SPEAKERS[turn.speaker]} {turn.text}")
        self._said += [(self._last, value) for value in turn.values]

    def find(self, call: Call, rows: Iterable[Mapping[str, str]], names: Mapping[str, str]) -> None:
        """Add the rows that a call found, without what it asked for: turns say that, in words."""
        for row in rows:
            if own := {names.get(slot, slot): value for slot, value in row.items() if slot not in call.parameters}:
                self._found += [(len(self.pieces), value) for value in own.values()]
                self.pieces.append(f"{RESULT} {json.dumps(own, ensure_ascii=False)}")

    def origins(self, call: Call, original: Service, place: int, *, described: bool) -> tuple[int, ...] | None:
        """Return the pieces that a call rests on beside its service, the one at `place`.

        First what was said last, then, in the order of the method's parameters, where each value stands: in the latest turn whose
        annotation has it for the same slot of the same service; else, if it is the method's default, in the piece of the service, where
        that says it; else in the latest turn that has it for any slot of any; else in the latest row. None where one stands nowhere, or
        nothing was said.
        """
        if self._last is None:
            return None
        own = next((own for own in original.methods if own.name == call.method), None)
        defaults = {*own.optional} if own and described else set()
        pieces = [self._last]
        for slot in own.parameters if own else ():
            if (value := call.parameters.get(slot)) is None:
                continue
            same = [piece for piece, own in self._said if own == (call.service, slot, value)]
            stands = (
                same
                or [place] * ((slot, value) in defaults)
                or [piece for piece, own in self._said if own[2] == value]
                or [piece for piece, own in self._found if own == value]
            )
            if not stands:
                return None
            pieces.append(stands[-1])
        return tuple(pieces)


def reworded(call: Call, original: Service, service: Service) -> Call:
    """Write a call in another wording of its service, parameters in the method's order.

    UserError: there is no such method or parameter.
    """
    method = next((i for i, own in enumerate(original.methods) if own.name == call.method), None)
    if method is None:
        raise UserError(f"{original.name} has no method {call.method}, only {', '.join(own.name for own in original.methods)}")
    before, after = original.methods[method], service.methods[method]
    if unknown := sorted(call.parameters.keys() - {*before.parameters}):
        raise UserError(f"{original.name}: {call.method} has no parameter {unknown[0]}, only {', '.join(before.parameters)}")
    pairs = zip(before.parameters, after.parameters, strict=True)
    return Call(service.name, after.name, {new: call.parameters[old] for old, new in pairs if old in call.parameters})


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand(own.WriteCommand):
    """Write dialogues with a catalogue of services, and their service calls with the turns the values come from, as a datasets directory.

    Attributes:
      source: A clone of github.com/google-research-datasets/dstc8-schema-guided-dialogue, or documents of your own, whose steps are calls:
        see python -m data documents --help.
      split: train, validation or test: that part alone; all: everything, undivided. Default: all parts that there are, beside each other.
    """

    corpus: Corpus = dataclasses.field(default_factory=Corpus)

    unit: ClassVar[str] = "examples"
    instruction: ClassVar[str] = "Call the services:"
    repository: ClassVar[str] = "google-research-datasets/dstc8-schema-guided-dialogue"
    licence: ClassVar[str] = "CC BY-SA 4.0 (Rastogi et al. 2020; wordings: Lee et al. 2022)"
    of_repository: ClassVar[tuple[str, ...]] = ("services", "min_services", "original", "described", "example", "bare", "bare_services")
    of_own: ClassVar[tuple[str, ...]] = ("piece_sentences", *ALIGNING)

    def unused(self) -> dict[str, str]:
        bare = {} if self.corpus.described else {"bare": "all services are bare with --no-described"}
        return super().unused() | bare | ({} if self.corpus.bare else {"bare_services": "--bare is 0"})

    def part(self, split: str) -> Path:
        return catalogue.schema_file(self.source, split)

    def read_part(self, split: str) -> Iterator[Any]:
        dialogues = [*read(self.source, split)]
        random.Random(f"tools/{self.seed}/{split}").shuffle(
            dialogues
        )  # files are by kind of service, and evaluations take the first examples
        for dialogue in dialogues:
            if unknown := [name for name in dialogue.services if name not in self.known[split]]:
                raise UserError(f"{self.part(split)}: has no {unknown[0]}, a service of dialogue {dialogue.name}")
            yield dialogue

    def read(self, split: str | None) -> Iterator[Any]:
        for record in super().read(split):
            for number, step in enumerate(record.document.steps if isinstance(record, Draft) else (), 1):
                if read_call(step.text) is None:
                    wanted = Call("...", "...", {}).write()
                    raise UserError(f"{record.where}, step {number}: {step.text[:40]!r} is no call: expected {wanted}")
            yield record

    @functools.cached_property
    def known(self) -> dict[str, Wordings]:
        """The services of each split that there is, in all wordings; those of training say which services are seen."""
        there = [split for split in SPLITS if split == "train" or self.part(split).exists()]
        with self.complete():
            return {split: catalogue.read(self.source, split) for split in there}

    def texts(self, record: Any) -> Iterable[str]:
        if isinstance(record, Draft):
            return record.texts
        wordings = (service for name in record.services for service in self.known[record.split][name])
        calls = (found for turn in record.turns for found in turn.calls)
        rows = (json.dumps(row, ensure_ascii=False) for call, found in calls for row in ({**call.parameters}, *found))
        return [*(own.write(described=True) for own in wordings), *(turn.text for turn in record.turns), *rows]

    def drafts(self) -> Callable[[Any], Iterable[Draft | Made]]:
        if self.is_own:
            return super().drafts()
        return Drafts(self.known, frozenset(self.known["train"]), self.corpus, self.seed)
