"""Functions and messages of OpenAI's chat API as a catalogue and a dialogue, and a model's calls as theirs.

https://platform.openai.com/docs/guides/function-calling. A function `SERVICE-METHOD` is a method of a service; one without a hyphen
is a service of its own. Values are text in the corpus: those of numbers and truth values are read by their JSON schema.
"""

import collections
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data.documents.corpus import Document
from data.errors import UserError
from data.pieces import Written
from data.tools.catalogue import Method, Service, Slot, field, line
from data.tools.source import RESULT, SPEAKERS, Call, read_call
from data.vocab import Vocab

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ANY = "dontcare"  # what the corpus has where a parameter may be anything
_TRUTH = {"True": True, "False": False}


def prompt(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
    """Write the text of a prompt: the catalogue, what was said and what calls found, without what they asked for.

    What the system says is seen by all steps. UserError: a tool or a message is not what it should be; names it.
    """
    about, said, asked = [], [], dict[str, frozenset[str]]()
    for number, message in enumerate(messages, 1):
        where, role = f"message {number}", field(f"message {number}", message, "role", str)
        content = line(message.get("content") or "")
        if role == "tool":
            names = asked.get(field(where, message, "tool_call_id", str))
            if names is None:
                raise UserError(f"{where}: no call before it has the id {message['tool_call_id'][:80]!r}")
            said += [f"{RESULT} {row}" for row in _rows(message.get("content") or "", names)]
            continue
        for called in field(where, message, "tool_calls", list, []):
            asked[field(where, called, "id", str)] = _asked(where, called)
        if content and role == "system":
            about.append(content)
        elif content:
            said.append(f"{SPEAKERS['USER' if role == 'user' else 'SYSTEM']} {content}")
    return Document(" ".join(about), (*(own.write(described=True) for own in services(tools)), *said), ()).prompt


def _asked(where: str, called: Any) -> frozenset[str]:
    """Return the names of the arguments of a call."""
    arguments = field(where, field(where, called, "function", dict), "arguments", str)
    try:
        return frozenset(json.loads(arguments))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{where}: the arguments of a call are no JSON object: {arguments[:80]!r}") from None


def _rows(content: str, asked: frozenset[str]) -> Iterator[str]:
    """Write what a call found, a row for each object; text that is no JSON as it is."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = content
    for row in found if isinstance(found, list) else [found]:
        if not isinstance(row, dict):
            yield line(row)
        elif own := {name: _text(value) for name, value in row.items() if name not in asked}:
            yield json.dumps(own, ensure_ascii=False)


def services(tools: Sequence[Mapping[str, Any]]) -> list[Service]:
    """Read functions as services, in their order. UserError: one is not what it should be."""
    found: dict[str, Service] = {}
    for number, tool in enumerate(tools, 1):
        where = f"tool {number}"
        function = field(where, tool, "function", dict)
        name, described = field(where, function, "name", str), line(field(where, function, "description", str, "")) or "A function"
        if not _NAME.fullmatch(name):
            raise UserError(f"{where}: the name is {name[:80]!r}; allowed: up to 64 letters, digits, _ and -")
        schema = field(where, function, "parameters", dict, {})
        properties = field(where, schema, "properties", dict, {})
        required = tuple(map(line, field(where, schema, "required", list, [])))
        slots = {slot: _slot(where, slot, field(where, properties, slot, dict)) for slot in properties}
        if unknown := [own for own in required if own not in slots]:
            raise UserError(f"{where}: {unknown[0][:80]!r} is required, but none of its properties")
        optional = ((slot, _text(own.get("default", _ANY))) for slot, own in properties.items() if slot not in required)
        service, method = _names(name)
        before = found.get(service, Service(service, 0, service, described.removesuffix("."), (), ()))
        methods = (*before.methods, Method(method, described.removesuffix("."), required, tuple(optional)))
        known = {slot.name for slot in before.slots}
        found[service] = before._replace(methods=methods, slots=(*before.slots, *(slots[slot] for slot in slots if slot not in known)))
    return [*found.values()]


def _slot(where: str, name: str, fields: Mapping[str, Any]) -> Slot:
    if not name or line(name) != name or " " in name:
        raise UserError(f"{where}: the property {name[:80]!r} has white space")
    values = field(f"{where}, {name}", fields, "enum", list, [])
    values = [True, False] if fields.get("type") == "boolean" else values
    return Slot(name, line(fields.get("description") or name), tuple(map(_text, values)))


def _text(value: Any) -> str:
    return str(value) if isinstance(value, bool) else line(value)


def _names(function: str) -> tuple[str, str]:
    """Return service and method of a function."""
    service, _, method = function.partition("-")
    return (service, method) if service and method else (function, function)


def value_labels(response_ids: Iterable[int], vocab: Vocab) -> dict[int, list[int]]:
    """Read what is named right before each value, by the label of the call: labels, each after the `<ref:k>` of the call's own."""
    found: dict[int, list[int]] = {}
    before = own = -1
    for token in response_ids:
        label = token - vocab.ref_base if vocab.ref_base <= token < vocab.ref_base + vocab.num_labels else -1
        if vocab.seg_base <= token < vocab.seg_base + vocab.num_labels:
            own = token - vocab.seg_base
        elif label >= 0 and before == own:
            found.setdefault(own, []).append(label)
        before = label
    return found


def calls(
    steps: Iterable[Written], pieces: Sequence[str], tools: Sequence[Mapping[str, Any]], values: Mapping[int, Sequence[int]]
) -> list[dict[str, Any]]:
    """Return the calls of functions that there are.

    Each has `name`, `arguments` (JSON), the `pieces` of the prompt that it names, and, where its text says it, in `values` the label of
    the piece in which each argument stands.

    Args:
      values: what `value_labels` returned.
    """
    functions = {_names(tool["function"]["name"]): tool["function"] for tool in tools}
    found, folded = [], _folded(functions)
    for step in steps:
        call = read_call(step.text)
        function = functions.get(call[:2], folded.get(_fold(call[:2]))) if call else None
        if call and function:
            named = [{"label": 1 + piece, "text": pieces[piece]} for piece in sorted(step.named) if piece < len(pieces)]
            arguments, labels = _typed(call, function), values.get(step.label, ())
            stand = zip(call.parameters, labels) if len(labels) == len(call.parameters) else ()
            found.append(
                {
                    "name": function["name"],
                    "arguments": json.dumps(arguments, ensure_ascii=False),
                    "pieces": named,
                    "values": {name: label for name, label in stand if name in arguments},
                }
            )
    return found


def _folded(functions: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Name functions without regard to case, which models write as they have learnt; those that then have the name of another left out."""
    counts = collections.Counter(map(_fold, functions))
    return {_fold(names): function for names, function in functions.items() if counts[_fold(names)] == 1}


def _fold(names: tuple[str, str]) -> tuple[str, str]:
    return names[0].casefold(), names[1].casefold()


def _typed(call: Call, function: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's parameters with values of the types that the schema says; without those that may be anything."""
    properties = (function.get("parameters") or {}).get("properties") or {}
    kept = {name: value for name, value in call.parameters.items() if value != _ANY or _ANY in properties.get(name, {}).get("enum", ())}
    return {name: _value(value, properties.get(name, {}).get("type")) for name, value in kept.items()}


def _value(value: Any, kind: Any) -> Any:
    if not isinstance(value, str):
        return value
    if kind == "boolean":
        return _TRUTH.get(value.capitalize(), value)
    try:
        number = int(value) if kind == "integer" else float(value) if kind == "number" else None
    except ValueError:
        return value
    return value if number is None or not math.isfinite(number) else number
