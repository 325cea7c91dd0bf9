"""OpenAI's API as data: bodies of requests are read into a `Call`, and responses and events written. No HTTP, no model.

https://platform.openai.com/docs/api-reference/completions and .../chat. What a body asks for and this server cannot do is
refused by name, never passed over. Beyond OpenAI's there are `top_k`, `min_p` and `repetition_penalty`, as other servers have them,
and `selfspan`, under which a response says what it read.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from selfspan_jax.config import MAX_LOGPROBS, MAX_SEED, Sampling
from selfspan_jax.errors import UserError
from selfspan_jax.viewing.detokenize import check_stop_strings
from selfspan_jax.viewing.output import Output

MAX_CHOICES = 128  # responses that one request may ask for
MAX_STOP_STRINGS = 16
_LEAST_LOGPROB = -9999.0  # OpenAI's, in place of minus infinity

_SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
_READ = ("model", "n", "max_tokens", "stop", "seed", "stream", "stream_options", "logprobs", "selfspan", *_SAMPLING)
_OWN = {"text_completion": ("prompt",), "chat.completion": ("messages", "max_completion_tokens", "top_logprobs", "tools")}
# Say nothing of what a response is to be: who asks, and what is kept of it (nothing is).
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# Not supported, but clients send the value at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), (0, 0.0)),
    "echo": (False,),
    **dict.fromkeys(("suffix", "functions", "logit_bias"), ("", [], {})),
    "best_of": (1,),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


@dataclasses.dataclass(frozen=True)
class Call:
    """What a request asks for, checked as far as it can be without a model."""

    kind: Literal["text_completion", "chat.completion"]
    prompts: tuple[str, ...]
    """Of a chat its last message."""
    messages: tuple[dict[str, Any], ...]
    """Of a chat, each with a `role` and its `content`; with tools, also `tool_calls` and `tool_call_id` as they were given."""
    sampling: Sampling
    model: str | None = None
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    """How many likely tokens to name beside each token, with log-probabilities; None: not even that of the token itself."""
    tools: tuple[dict[str, Any], ...] = ()
    """Of a chat, functions as they were given; none where `tool_choice` is "none"."""
    declines_tools: bool = False
    """Whether it gives tools, and `tool_choice` "none": wants text."""
    tokens: bool = False
    """Whether events say of each token what it is, for a page that shows them."""
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


def read_call(kind: Literal["text_completion", "chat.completion"], body: bytes) -> Call:
    """Read the body of a request. Raises UserError that names the field that is wrong, and says what is allowed."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:  # ValueError also for bytes that are not UTF-8, and for numbers of many digits
        raise UserError(f"the body is not JSON: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(fields, dict):
        raise UserError(f"the body is {_kind(fields)}; expected a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    known = (*_READ, *_OWN[kind], *_IGNORED, *_NEUTRAL)
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"{name[:80]!r} is not supported; there are {', '.join((*_OWN[kind], *_READ))}")
        if name in _NEUTRAL and (type(value), value) not in [(type(neutral), neutral) for neutral in _NEUTRAL[name]]:
            raise UserError(f"{name} is not supported but as {' or '.join(map(json.dumps, _NEUTRAL[name]))}; leave it out")
    stream = _take(fields, "stream", bool, False)
    options = _take(fields, "stream_options", dict, {})
    ours = _take(fields, "selfspan", dict, {})
    if options and not stream:
        raise UserError("stream_options is for stream: true")
    if (tokens := _only(ours, "selfspan", "tokens")) and (not stream or "stop" in fields):
        raise UserError("selfspan.tokens is for stream: true without stop, because it shows every token")
    tools = tuple(_take(fields, "tools", list, ()))
    if declined := bool(tools) and fields.get("tool_choice") == "none":
        tools = ()
    if (logprobs := _logprobs(kind, fields)) is not None and stream and tools:
        raise UserError("logprobs of a stream are without tools, because calls come whole, at the end")
    limits = [_take(fields, name, int, None) for name in ("max_completion_tokens", "max_tokens")]
    limit = next((limit for limit in limits if limit is not None), None)
    n, seed = _take(fields, "n", int, 1), _take(fields, "seed", int, None)
    if limit is not None and limit < 1:
        raise UserError(f"max_tokens is {limit}; allowed: whole numbers from 1")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}; allowed: whole numbers from 0 to 2**63 - 1")
    stop = check_stop_strings(fields.get("stop", ()))
    if len(stop) > MAX_STOP_STRINGS:
        raise UserError(f"stop has {len(stop)} texts; allowed: up to {MAX_STOP_STRINGS}")
    messages = _messages(fields, with_tools=bool(tools)) if kind == "chat.completion" else ()
    prompts = (messages[-1]["content"],) if messages else _prompts(fields)
    if not 1 <= n or n * len(prompts) > MAX_CHOICES:
        raise UserError(f"n is {n} for {len(prompts)} prompts; allowed: 1 to {MAX_CHOICES} responses in all")
    sampling = Sampling(**{name: fields[name] for name in _SAMPLING if name in fields})
    usage = _only(options, "stream_options", "include_usage", also=("include_obfuscation",))
    model = _take(fields, "model", str, None)
    return Call(kind, prompts, messages, sampling, model, n, limit, stop, seed, stream, usage, logprobs, tools, declined, tokens)


def _logprobs(kind: str, fields: Mapping[str, Any]) -> int | None:
    """Read how many likely tokens are asked for: of a chat by two fields, else by one. None where no log-probability is."""
    if kind == "chat.completion":
        asked, name = _take(fields, "logprobs", bool, False), "top_logprobs"
        number = _take(fields, name, int, 0)
        if number and not asked:
            raise UserError("top_logprobs is for logprobs: true")
    else:
        name = "logprobs"
        asked = fields.get(name) is not None and fields[name] is not False
        number = _take(fields, name, int, 0) if asked else 0
    if not 0 <= number <= MAX_LOGPROBS:
        raise UserError(f"{name} is {number}; allowed: 0 to {MAX_LOGPROBS}")
    return number if asked else None


def _take(fields: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = fields.get(name, default)
    if value is not default and not (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        raise UserError(f"{name} is {_kind(value)}; expected {_KINDS[kind]}")
    return value


def _only(fields: Mapping[str, Any], where: str, name: str, also: tuple[str, ...] = ()) -> bool:
    if unknown := sorted(fields.keys() - {name, *also}):
        raise UserError(f"{where} has {unknown[0][:80]!r}; allowed: {name}")
    return bool(_take({name: fields[name]} if fields.get(name) is not None else {}, name, bool, False))


def _prompts(fields: Mapping[str, Any]) -> tuple[str, ...]:
    given = fields.get("prompt")
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError("prompt: expected text, or a list of at least one text; token ids are not supported")
    return tuple(prompts)


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _messages(fields: Mapping[str, Any], *, with_tools: bool) -> tuple[dict[str, Any], ...]:
    given, read = fields.get("messages"), []
    roles = _ROLES | ({"tool": "tool"} if with_tools else {})
    if not isinstance(given, list) or not given:
        raise UserError("messages: expected a list of at least one message")
    for number, message in enumerate(given, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not with_tools and isinstance(message, dict) and (role == "tool" or message.get("tool_calls") is not None):
            raise UserError(f"message {number} is of a tool, or calls one; allowed beside tools whose tool_choice is 'auto'")
        if not isinstance(role, str) or role not in roles:
            raise UserError(f"message {number}: role is {str(role)[:40]!r}; allowed: {', '.join(roles)}")
        calls = {name: message[name] for name in ("tool_calls", "tool_call_id") if with_tools and message.get(name) is not None}
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [] if content is None and calls else content
        if not isinstance(parts, list) or not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
        ):
            raise UserError(f"message {number}: content: expected text, or a list of parts of type text")
        read.append({"role": roles[role], "content": "".join(part["text"] for part in parts), **calls})
    if read[-1]["role"] not in ("user", "tool"):
        raise UserError(f"the last message is of the {read[-1]['role']}; expected one of the user")
    return tuple(read)


_KINDS = {bool: "true or false", int: "a whole number", str: "text", dict: "an object", list: "a list", float: "a number"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")


# ------------------------------------------------------------------------------------------------------- what is written


def reading_part(out: Output) -> dict[str, Any]:
    """Say what a response read: its steps, each with the labels that it names and the tokens that it attended to."""
    whole = out.to_json()
    part = {key: whole[key] for key in ("answer", "verdict", "warnings", "steps", "attention", "attended_fraction")}
    return {**part, "attended_tokens": out.attended_tokens}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Count tokens."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}


Scored = tuple[str, float, Sequence[tuple[str, float]]]
"""What a token adds to the text and its log-probability, and those of the likeliest tokens in its place, the likeliest first."""


def logprobs_part(call: Call, tokens: Sequence[Scored], offset: int = 0) -> dict[str, Any] | None:
    """Write the log-probabilities of tokens that begin after `offset` characters of the text; None where the call asks for none."""
    if call.logprobs is None:
        return None
    if call.kind == "chat.completion":

        def entry(text: str, logprob: float) -> dict[str, Any]:
            whole = "\N{REPLACEMENT CHARACTER}" not in text  # else a part of a character, which text cannot say
            return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(text.encode()) if whole else None}

        content = [entry(text, own) | {"top_logprobs": [entry(*other) for other in top]} for text, own, top in tokens]
        return {"content": content, "refusal": None}

    def by_text(token: Scored) -> dict[str, float]:
        found: dict[str, float] = {}
        for text, logprob in (*token[2], token[:2]):  # the token itself too; of those that are written alike the likeliest
            found.setdefault(text, max(logprob, _LEAST_LOGPROB))
        return found

    lengths = [len(text) for text, *_ in tokens]
    return {
        "tokens": [text for text, *_ in tokens],
        "token_logprobs": [max(own, _LEAST_LOGPROB) for _, own, _ in tokens],
        "top_logprobs": [by_text(token) for token in tokens] if call.logprobs else None,
        "text_offset": [offset + sum(lengths[:i]) for i in range(len(tokens))],
    }


Answered = tuple[str, str, dict[str, Any], dict[str, Any] | None]


def response(call: Call, model: str, choices: Sequence[Answered], used: dict[str, int]) -> dict[str, Any]:
    """Write a whole response; choices are texts, finish reasons, what each read (with `tool_calls` of tools), and log-probabilities."""

    def choice(index: int, text: str, reason: str, part: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        calls = _tool_calls(part)
        message = {"role": "assistant", **({"content": None, "tool_calls": calls} if calls else {"content": text})}
        said = {"text": text} if call.kind == "text_completion" else {"message": message}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": _reason(reason, part), "selfspan": part}

    return {**_head(call, model, call.kind), "choices": [choice(i, *each) for i, each in enumerate(choices)], "usage": used}


def event(
    call: Call,
    model: str,
    index: int,
    text: str | None,
    reason: str | None = None,
    part: dict[str, Any] | None = None,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an event of a stream: a piece of a choice's text, its end with the reason, or, of a chat, its beginning: text None.

    Calls of tools, which `part` has, come whole.
    """
    if call.kind == "text_completion":
        said: dict[str, Any] = {"text": text or ""}
    elif text is None:
        said = {"delta": {"role": "assistant", "content": ""}}
    elif calls := _tool_calls(part or {}):
        said = {"delta": {"tool_calls": [{"index": number, **own} for number, own in enumerate(calls)]}}
    else:
        said = {"delta": {"content": text} if text or reason is None else {}}
    choice = {
        "index": index,
        **said,
        "logprobs": logprobs,
        "finish_reason": reason and _reason(reason, part or {}),
        **({} if part is None else {"selfspan": part}),
    }
    return {**_head(call, model, _EVENT[call.kind]), "choices": [choice], **({"usage": None} if call.include_usage else {})}


def usage_event(call: Call, model: str, used: dict[str, int]) -> dict[str, Any]:
    """Write the event after the last choice's, for `include_usage`."""
    return {**_head(call, model, _EVENT[call.kind]), "choices": [], "usage": used}


def _tool_calls(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write the calls among what a response says of itself as OpenAI's clients read them."""
    return [
        {"id": own["id"], "type": "function", "function": {"name": own["name"], "arguments": own["arguments"]}}
        for own in part.get("tool_calls", ())
    ]


def _reason(reason: str, part: Mapping[str, Any]) -> str:
    return "tool_calls" if reason == "stop" and part.get("tool_calls") else reason


_EVENT = {"text_completion": "text_completion", "chat.completion": "chat.completion.chunk"}
_PREFIX = {"text_completion": "cmpl", "chat.completion": "chatcmpl"}


def _head(call: Call, model: str, kind: str) -> dict[str, Any]:
    return {"id": f"{_PREFIX[call.kind]}-{call.id}", "object": kind, "created": call.created, "model": model}


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """Write an error as OpenAI's clients read it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
