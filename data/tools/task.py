"""The task of tools: a catalogue and a dialogue in; service calls out, each of which names its service and the turns it rests on."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from data import scoring
from data.documents import Document, DocumentTask, Example
from data.pieces import Part
from data.tools import card, chat, source
from data.tools.catalogue import PARAMETERS, SERVICE
from data.tools.source import REWORDED, SEEN, SPEAKERS, UNSEEN, Call, read_call

SIZES = (5, 26, 100)  # of catalogues, that groups tell apart
_BY_KIND = {"seen_services": (SEEN, REWORDED), "unseen_services": (UNSEEN,), "seen_wording": (SEEN,), "unseen_wording": (REWORDED,)}


_METHOD = re.compile(r"(?<=[.:)] )(\w+)\(")  # after the service's description, or after another method


def services_of(pieces: Sequence[str]) -> range:
    """Return the pieces that are services: the first ones."""
    return range(sum(1 for _ in itertools.takewhile(lambda piece: piece.startswith(f"{SERVICE} "), pieces)))


@dataclasses.dataclass(frozen=True)
class ToolTask(DocumentTask):
    """Turn catalogues with dialogues into ids and responses into service calls; see `DocumentTask`.

    Attributes:
      value_sources: Before each value of a call stands the source that it has been found in.
      recent_turns: So many turns, up to the one that a call answers to, are named whether a value stands in them or not.

    A prompt's paragraphs are its pieces: first those that begin with "Service NAME:", then "User: ...", "System: ..." and "Result: ...".
    """

    name: ClassVar[str] = "tools"
    unit: ClassVar[str] = "responses"
    group_by: ClassVar[str] = "services"
    group_title: ClassVar[str] = "services"
    score_kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "calls": ("calls_right", "services_right", "methods_right", "parameters_right", "calls_readable", "dialogues_right"),
        "seen": tuple(f"calls_right_{kind}" for kind in _BY_KIND),
        "sources": ("service_named", "service_precision", "turn_precision", "turn_recall"),
    }
    Corpus: ClassVar[type[source.Corpus]] = source.Corpus
    WriteCommand: ClassVar[type[source.WriteCommand]] = source.WriteCommand
    Statistics: ClassVar[type[card.Statistics]] = card.Statistics
    piece_sentences: int = 0
    value_sources: bool = False
    recent_turns: int = 0

    @property
    def divided_into(self) -> str:
        return f"{super().divided_into} (services and turns)"

    def group(self, prompt: str) -> str:
        """Return how many services a prompt has: "5" for up to 5, "26", "100"."""
        count = len(services_of(self.split_prompt(prompt)[1]))
        return next((str(size) for size in SIZES if count <= size), f"above {SIZES[-1]}")

    def lacks(self, about: str, pieces: Sequence[str]) -> str | None:
        num_services = len(services_of(pieces))
        return SERVICE if not num_services else SPEAKERS["USER"] if num_services == len(pieces) else None

    def pools(self, document: Document, number: int) -> list[Sequence[int]]:
        """Return the services, and what was said and found before a call, up to what it answers to."""
        services = services_of(document.pieces)
        return [services, range(len(services), max(document.steps[number].sources) + 1)]

    def parts(self, document: Document, number: int, uniform: float | None) -> list[Part]:
        return source.parts(document, number, value_sources=self.value_sources, recent_turns=self.recent_turns)

    def query(self, document: Document, number: int) -> str:
        """Return what was said last before a call."""
        return document.pieces[max(document.steps[number].sources)]

    def tool_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        """Write messages and functions as OpenAI's chat API has them as the text of a prompt. UserError: they are something else."""
        return chat.prompt(messages, tools)

    def tool_calls(self, prompt: str, response_ids: Iterable[int], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Read the calls of functions in a response to such a prompt; see `chat.calls`."""
        ids = [*response_ids]
        return chat.calls(self.steps(ids), self.split_prompt(prompt)[1], tools, chat.value_labels(ids, self.vocab))

    def beginnings(self, prompt: str) -> list[list[int]]:
        """Return what the text of a step may begin with, as ids: a service of the prompt and one of its methods, up to its parameters."""
        pieces = self.split_prompt(prompt)[1]
        found = []
        for piece in services_of(pieces):
            head = pieces[piece].partition(f" {PARAMETERS} ")[0]
            name = head.removeprefix(f"{SERVICE} ").partition(":")[0]
            for method in _METHOD.findall(head):
                both = [self.vocab.plain_text_ids(f" {Call(name, method, own).write()}") for own in ({}, {"x": "x"})]
                found.append([token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*both))])
        return found

    def counts(self, example: Example, response: Iterable[int]) -> scoring.Counts:
        """Score calls, the n-th step against the n-th gold one.

        Of the gold calls, how many are exactly right (service, method and every parameter, with no other), in all and by what of
        their service was seen in training; have the right service; have its right method too. Of the gold parameters, how many have
        the right value. Of the steps written, how many are calls. How many responses are right in all and have no step more. Of the
        pieces: how often the gold service is named, the share of services named that are it, and precision and recall of the others.
        """
        document, written = example.document, self.steps(response)
        tally = scoring.Shares(*itertools.chain(*(self.score_kinds[kind] for kind in ("calls", "sources"))))
        services, all_right = {*services_of(document.pieces)}, len(written) == len(document.steps)
        for gold, step in itertools.zip_longest(document.steps, written):
            call, named = (read_call(step.text), step.named) if step else (None, frozenset[int]())
            sources = {*gold.sources} if gold else set[int]()
            tally.add("calls_readable", [call] if call else [], [step] if step else [])
            tally.add("service_precision", named & sources & services, named & services)
            tally.add("turn_precision", named & sources - services, named - services)
            tally.add("turn_recall", named & sources - services, sources - services)
            if gold is None:
                continue
            wanted = read_call(gold.text)
            service, method, is_right = (call is not None and wanted is not None and call[:n] == wanted[:n] for n in (1, 2, 3))
            all_right &= is_right
            told, asked = (own.parameters if own else {} for own in (call, wanted))
            found = {"services_right": service, "methods_right": method, "calls_right": is_right}
            found |= {f"calls_right_{name}": is_right for name, kinds in _BY_KIND.items() if gold.kind in kinds}
            for name, so in {**found, "service_named": bool(named & sources & services)}.items():
                tally.add(name, [gold] if so else [], [gold])
            tally.add("parameters_right", [name for name, value in asked.items() if name in told and told[name] == value], asked)
        tally.add("dialogues_right", [example] if all_right else [], [example])
        return tally.counts()
