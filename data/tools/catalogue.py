"""Services in several wordings: the schemas of the Schema-Guided Dialogue data set (Rastogi et al. 2020) and SGD-X's paraphrases (Lee et
al. 2022), `train/schema.json` and `sgd_x/data/v1/train/schema.json`, and catalogues that are drawn of them.
"""

import dataclasses
import itertools
import json
import random
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from data import rows
from data.alignment import readable
from data.errors import UserError

SERVICE = "Service"  # what the piece of a service begins with
PARAMETERS = "Parameters:"  # what they are stands after this
VERSIONS = 5  # of SGD-X; version 0 is the original wording
FOLDERS = {"train": "train", "validation": "dev", "test": "test"}

T = TypeVar("T")


class Method(NamedTuple):
    """A method of a service; optional parameters have the values that they take by default."""

    name: str
    description: str
    required: tuple[str, ...]
    optional: tuple[tuple[str, str], ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*self.required, *(name for name, _ in self.optional))


class Slot(NamedTuple):
    """What a value of a service is: of a call, of a result, or of both; `values` are all that there are, where that is known."""

    name: str
    description: str
    values: tuple[str, ...]


class Service(NamedTuple):
    """A service in one wording: `origin` is its name in the original one. Methods and slots stand in the same order in all of them."""

    origin: str
    version: int
    name: str
    description: str
    methods: tuple[Method, ...]
    slots: tuple[Slot, ...]

    @property
    def domain(self) -> str:
        """What its kind is: buses for `Buses_1` and `Buses_2` alike."""
        return self.origin.rpartition("_")[0]

    @property
    def is_held_out(self) -> bool:
        """Whether this wording is in no example to train on: one of the five paraphrases of each service, by a hash of its name."""
        return self.version == 1 + zlib.crc32(self.origin.encode()) % VERSIONS

    def write(self, *, described: bool) -> str:
        """Write its piece, in one line: with descriptions, defaults and allowed values, or the names of methods and parameters alone."""
        if not described:
            marked = ((own.name, [*own.required, *(f"{name}?" for name, _ in own.optional)]) for own in self.methods)
            return f"{SERVICE} {self.name}: " + " ".join(f"{name}({', '.join(names)})" for name, names in marked)
        methods = []
        for own in self.methods:
            defaults = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in own.optional)
            methods.append(f"{own.name}({', '.join((*own.required, *defaults))}): {own.description}.")
        used = {name for own in self.methods for name in own.parameters}
        told = ((slot, f" ({', '.join(slot.values)})" if slot.values else "") for slot in self.slots if slot.name in used)
        slots = "; ".join(f"{slot.name}{allowed}: {slot.description}" for slot, allowed in told)
        return f"{SERVICE} {self.name}: {self.description}. {' '.join(methods)}" + (f" {PARAMETERS} {slots}" if slots else "")


Wordings = Mapping[str, Sequence[Service]]
"""All wordings of each service, by its original name: version n at n."""


def read_json(file: Path) -> Any:
    """Read a file of JSON. UserError: it is none."""
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} {rows.not_read(error, str(error))}") from None


def field(where: object, fields: Any, name: str, kind: type[T], default: T | None = None) -> T:
    """Return a value of a JSON object, or the default where it has none of the name. UserError: it is none of the kind."""
    found = fields.get(name, default) if isinstance(fields, dict) else None
    if not isinstance(found, kind):
        raise UserError(f"{where}: expected a {kind.__name__} as {name!r}")
    return found


def line(text: Any) -> str:
    """Write a text in one line; of something else what JSON would."""
    return " ".join(readable(text if isinstance(text, str) else json.dumps(text)).split())


def schema_file(source: str, split: str, version: int = 0) -> Path:
    """Return the file that has the services of a split in a wording."""
    root = Path(source, "sgd_x", "data", f"v{version}") if version else Path(source)
    return root / FOLDERS[split] / "schema.json"


def read(source: str, split: str) -> dict[str, tuple[Service, ...]]:
    """Read the services of a split in all wordings.

    Raises:
      FileNotFoundError: a schema is not there.
      UserError: it is none, or a paraphrase of other services, methods or slots.
    """
    original = _schema(schema_file(source, split), 0, {})
    found = {service.origin: [service] for service in original}
    for version in range(1, VERSIONS + 1):
        file = schema_file(source, split, version)
        paraphrases = {own.origin: own for own in _schema(file, version, {f"{name}{version}": name for name in found})}
        for name, (first, *_) in found.items():
            own = paraphrases.get(name)
            if own is None or [len(x.parameters) for x in own.methods] != [len(x.parameters) for x in first.methods]:
                raise UserError(f"{file}: expected {name}{version}, with the methods and slots of {name} in their order")
            if len(own.slots) != len(first.slots):
                raise UserError(f"{file}: {own.name} has {len(own.slots)} slots, but {name} {len(first.slots)}")
            found[name].append(own)
    return {name: tuple(wordings) for name, wordings in found.items()}


def _schema(file: Path, version: int, origins: Mapping[str, str]) -> list[Service]:
    services = read_json(file)
    if not isinstance(services, list) or not services:
        raise UserError(f"{file}: expected a list of services")
    return [_service(file, own, version, origins) for own in services]


def _service(file: Path, fields: Any, version: int, origins: Mapping[str, str]) -> Service:
    name = field(file, fields, "service_name", str)
    where = f"{file}: {name}"
    slots = []
    for own in field(where, fields, "slots", list):
        values = field(where, own, "possible_values", list) if field(where, own, "is_categorical", bool) else ()
        slots.append(Slot(field(where, own, "name", str), line(field(where, own, "description", str)), tuple(map(line, values))))
    methods = []
    for own in field(where, fields, "intents", list):
        optional = ((key, line(value)) for key, value in field(where, own, "optional_slots", dict).items())
        required = map(line, field(where, own, "required_slots", list))
        described = line(field(where, own, "description", str))
        methods.append(Method(field(where, own, "name", str), described, tuple(required), tuple(optional)))
    return Service(origins.get(name, name), version, name, line(field(where, fields, "description", str)), tuple(methods), tuple(slots))


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How a catalogue is drawn.

    Attributes:
      size: Services, at least those that the dialogue uses.
      original: Share of services in their original wording; the others are in one of the five paraphrases.
      is_training: Whether the wordings that are held out are left out.
    """

    size: int
    original: float
    is_training: bool

    def draw(self, services: Wordings, used: Collection[str], uniform: random.Random) -> list[Service]:
        """Draw a shuffled catalogue: the services used in one wording each, and distractors.

        A distractor's domain is none of those used: of two bus companies a dialogue would not say which is meant. Each is there
        in one wording before any is in a second one.
        """
        domains = {services[name][0].domain for name in used}
        others = [name for name in sorted(services) if services[name][0].domain not in domains]
        orders = {name: self._order(services[name], uniform) for name in (*sorted(used), *others)}
        uniform.shuffle(others)
        distractors = (orders[name][k] for k in range(1 + VERSIONS) for name in others if k < len(orders[name]))
        found = [orders[name][0] for name in sorted(used)]
        found += itertools.islice(distractors, max(self.size - len(found), 0))
        uniform.shuffle(found)
        return found

    def _order(self, wordings: Iterable[Service], uniform: random.Random) -> list[Service]:
        original, *others = (own for own in wordings if not (self.is_training and own.is_held_out))
        uniform.shuffle(others)
        return [original, *others] if uniform.random() < self.original else [*others[:1], original, *others[1:]]
