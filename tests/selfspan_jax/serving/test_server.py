"""The server over real sockets: OpenAI's own client, what is refused, clients that go away, and the end.

They have a scheduler that deals out a script, so that they decide when tokens come; the real one is in test_workers.
"""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
from flax import nnx

from data.tools import ToolTask
from data.vocab import train_vocab
from selfspan_jax.attention.policies import get_policy
from selfspan_jax.config import ModelConfig, ServerConfig, ServingConfig
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM
from selfspan_jax.model import Decoder
from selfspan_jax.serving import metrics, protocol
from selfspan_jax.serving.requests import QueueFull, Stats, Tokens
from selfspan_jax.serving.running import LogProbs
from selfspan_jax.spans import SpanVocab
from selfspan_jax.viewing.output import Output
from tests import browser
from tests.selfspan_jax.models import TINY, Words, random_model
from tests.selfspan_jax.streams import VOCAB
from tests.selfspan_jax.viewing.test_html import HOSTILE_TASK

_S, _R = VOCAB.seg_base, VOCAB.ref_base
RESPONSE = [_S + 1, 4, 5, _S + 2, _R + 1, 6, VOCAB.eos_id]
ATTENDED = [1, 4, 5, 2, 6, 7, 8]
TEXT = "<11>45<12><16>6"  # as the task writes it, without <eos>
NONE = np.zeros(0, np.int32)
SCORES = LogProbs(-np.arange(7.0), np.stack([RESPONSE, [4] * 7, [5] * 7], axis=1), -np.arange(7.0)[:, None] - np.array([0, 1, np.inf]))


class Named(Words):
    """The task of the page's tests, with a verifier and a warning."""

    name = "words"

    def warnings(self, prompt):
        return ["long"] if len(prompt) > 2 else []

    def verify(self, prompt, response_ids):
        return SimpleNamespace(answer_right=True, steps_right=True, spans_right=False, message=f"{len(response_ids)} tokens")


class Scripted:
    """A scheduler that writes RESPONSE to any prompt, two tokens at a time; but "9" fails, "8" waits after 400 tokens, "7" at once."""

    context_tokens, num_pages, device = 64, 8, "scripted"
    config = ServingConfig(num_sequences=40, page_tokens=8, max_queue=60)

    def __init__(self, max_queue=64):
        self.requests, self.cancelled, self.max_queue = [], [], max_queue
        self._closing = threading.Event()
        self._active = []

    def submit(self, request, deliver):
        if len(self._active) >= self.max_queue:
            raise QueueFull(f"{self.max_queue} requests wait already")
        ticket = [request, deliver, 0]
        self.requests.append(request)
        self._active.append(ticket)
        return ticket

    def cancel(self, ticket):
        self.cancelled.append(ticket)
        self._drop(ticket)

    def _drop(self, ticket):
        self._active = [other for other in self._active if other is not ticket]

    def _advance(self, ticket):
        request, deliver, start = ticket
        kind, ticket[2] = int(request.prompt_ids[1]), start + 2
        if kind == 9:
            found = Tokens(NONE, NONE, "error", "the device is on fire")
        elif kind == 7 or (kind == 8 and start == 400):
            ticket[2] = start
            return
        elif kind == 8:
            found = Tokens(np.array([4, 5]), np.array([2, 2]))
        else:
            limit = min(request.max_new_tokens, len(RESPONSE))
            ids, attended = (np.array(x[:limit][start : start + 2]) for x in (RESPONSE, ATTENDED))
            finished = None if start + 2 < limit else "stop" if limit == len(RESPONSE) else "length"
            scores = LogProbs(*(x[:limit][start : start + 2] for x in SCORES)) if request.logprobs else None
            found = Tokens(ids, attended, finished, logprobs=scores)
        if found.finished:
            self._drop(ticket)
        deliver(found)

    def run(self, after_round):
        while not self._closing.is_set() or self._active:
            for ticket in list(self._active):
                self._advance(ticket)
            after_round()
            time.sleep(0.002)

    def close(self, *, drain):
        self._closing.set()

    @property
    def stats(self):
        return Stats(2, 1, len(self._active), 3, 1, 4, 100, 20, 50, 250, 1000, preemptions=6)


@contextlib.contextmanager
def serving(scheduler, task=None, lm=None, **options):
    """A server in a thread: its address."""
    from selfspan_jax.serving import server as module

    lm = lm or SpanLM(MODEL, task or Named())
    with module.listening("127.0.0.1", 0) as bound:
        running = module.Uvicorn(module.Server(lm, scheduler, "tiny", **options))
        thread = threading.Thread(target=running.run, args=([bound],))
        thread.start()
        try:
            while not running.started:
                time.sleep(0.005)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


MODEL = random_model()


@pytest.fixture(scope="module")
def scripted():
    return Scripted()


@pytest.fixture(scope="module")
def address(scripted):
    with serving(scripted) as address:
        yield address


def post(address, body, path="/v1/completions", **options):
    return httpx2.post(f"{address}{path}", json=body, timeout=20, trust_env=False, **options)


def events(response):
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def expected_reading(prompt, response=RESPONSE, attended=ATTENDED):
    task = Named()
    ids = task.encode_prompt(prompt)
    out = Output(task, np.array([*ids, *response]), len(ids), np.array(attended), get_policy("span"), MODEL.config, VOCAB, prompt)
    steps = [(step.label, list(step.refs), step.text, step.attended_tokens, step.attended_fraction) for step in out.steps]
    return steps, out.attended_fraction


def check_reading(part, prompt):
    steps, fraction = expected_reading(prompt)
    keys = ("label", "refs", "text", "attended_tokens", "attended_fraction")
    assert [tuple(step[key] for key in keys) for step in part["steps"]] == steps
    assert part["attended_fraction"] == fraction and part["attended_tokens"] == np.mean(ATTENDED)
    assert part["verdict"] == {"answer_right": True, "steps_right": True, "spans_right": False, "message": "7 tokens"}
    assert part["warnings"] == (["long"] if len(prompt) > 2 else [])


# ------------------------------------------------------------------------------------------------ OpenAI's client


def test_openais_client_reads_whole_responses_and_streams(address, scripted):
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", http_client=httpx2.Client(trust_env=False), max_retries=0) as client:
        use(client, openai, scripted)


def use(client, openai, scripted):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").max_model_len == 64
    whole = client.completions.create(model="tiny", prompt=["45", "456"], n=2, seed=5, temperature=0.5)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in whole.choices] == [(i, TEXT, "stop") for i in range(4)]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4 + 5, 4 * len(RESPONSE))
    assert [(r.seed, r.sample, r.sampling.temperature) for r in scripted.requests[-4:]] == [(5, i, 0.5) for i in range(4)]
    check_reading(whole.choices[0].selfspan, "45")
    check_reading(whole.choices[3].selfspan, "456")

    messages = [{"role": "user", "content": "45"}]
    chat = client.chat.completions.create(model="tiny", messages=messages)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == (TEXT, "stop")
    check_reading(chat.choices[0].selfspan, "45")

    chunks = list(client.chat.completions.create(model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}))
    *told, usage = chunks
    assert told[0].choices[0].delta.role == "assistant" and len(told) >= 3  # pieces that come together are one
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in told] == [None] * (len(told) - 1) + ["stop"]
    check_reading(told[-1].choices[0].selfspan, "45")
    assert usage.choices == [] and usage.usage.total_tokens == 4 + len(RESPONSE)

    pieces = {0: "", 1: ""}
    for chunk in client.completions.create(model="tiny", prompt="45", n=2, stream=True, stop="<16>"):
        assert chunk.usage is None
        for choice in chunk.choices:
            pieces[choice.index] += choice.text
    assert pieces == {0: "<11>45<12>", 1: "<11>45<12>"}  # a stop string that comes in the middle of a chunk
    cut = client.completions.create(model="tiny", prompt="45", max_tokens=3)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("<11>45", "length")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; there is 'tiny'"):
        client.completions.create(model="gpt", prompt="45")
    with pytest.raises(openai.APIError, match="the device is on fire"):
        list(client.completions.create(model="tiny", prompt="9", stream=True))
    with pytest.raises(openai.InternalServerError, match="the device is on fire"):
        client.completions.create(model="tiny", prompt="9")
    assert client.completions.create(model="tiny", prompt="45").choices[0].text == TEXT  # another request is not concerned


def test_log_probabilities_are_in_openais_form(address):
    """Of the tokens of the text, all of them in a stream too; minus infinity is no JSON."""
    texts, offsets = ["<11>", "4", "5", "<12>", "<16>", "6"], [0, 4, 5, 6, 10, 14]
    asked = {"prompt": "45", "logprobs": 3}
    whole = post(address, asked).json()["choices"][0]["logprobs"]
    assert (whole["tokens"], whole["text_offset"], whole["token_logprobs"]) == (texts, offsets, [0, -1, -2, -3, -4, -5])
    assert list(whole["top_logprobs"][0].items()) == [("<11>", 0), ("4", -1), ("5", -9999)]  # the likeliest first, as they are written
    assert list(whole["top_logprobs"][1].items()) == [("4", -1), ("5", -9999)]  # and of two that are written alike the likelier
    assert post(address, {"prompt": "45", "logprobs": 0}).json()["choices"][0]["logprobs"]["top_logprobs"] is None
    chat = post(address, _CHAT | {"logprobs": True, "top_logprobs": 2}, "/v1/chat/completions").json()["choices"][0]["logprobs"]
    assert [entry["token"] for entry in chat["content"]] == texts and chat["content"][1]["bytes"] == [ord("4")]
    assert [other["logprob"] for other in chat["content"][2]["top_logprobs"]] == [-2, -3]
    drawn = protocol.logprobs_part(
        protocol.read_call("text_completion", json.dumps(asked).encode()), [("c", -3.0, [("a", -1.0), ("b", -2.0)])]
    )
    assert list(drawn["top_logprobs"][0].items()) == [("a", -1.0), ("b", -2.0), ("c", -3.0)]  # the token itself, where it is not among them
    for body in ({"prompt": "45"}, {"prompt": "45", "logprobs": False}):
        assert post(address, body).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    "stop, texts",
    [
        (None, ["<11>", "4", "5", "<12>", "<16>", "6"]),
        ("<16>", ["<11>", "4", "5", "<12>"]),  # in the middle of a chunk
        ("45<", ["<11>"]),  # over two chunks
        ("6>6", ["<11>", "4", "5", "<12>", "<1"]),  # begins within a token, which is cut
        ("11>45<12", ["<"]),
        ("<", []),
    ],
)
def test_tokens_with_log_probabilities_are_the_text(address, stop, texts):
    """With stop strings too, of a chat, and in a stream, which tells no token of which it is not sure."""
    ids = {"logprobs": 1, "prompt": "45", "stop": stop}
    text, own, offsets = "".join(texts), [-float(i) for i in range(len(texts))], [len("".join(texts[:i])) for i in range(len(texts))]
    whole = post(address, ids).json()["choices"][0]
    part = whole["logprobs"]
    assert (whole["text"], part["tokens"], part["token_logprobs"], part["text_offset"]) == (text, texts, own, offsets)
    assert part["top_logprobs"] == [{token: logprob} for token, logprob in zip(texts, own)]
    chat = _CHAT | {"logprobs": True, "stop": stop}
    said = post(address, chat, "/v1/chat/completions").json()["choices"][0]
    entries = said["logprobs"]["content"]
    assert said["message"]["content"] == text and b"".join(bytes(entry["bytes"]) for entry in entries) == text.encode()
    so_far = {"text": "", **{name: [] for name in part}}
    for event in events(post(address, ids | {"stream": True})):
        (choice,) = event["choices"]
        so_far = {"text": so_far["text"] + choice["text"]} | {
            name: so_far[name] + (choice["logprobs"] or {}).get(name, []) for name in part
        }
        assert so_far["text"].startswith("".join(so_far["tokens"]))
    assert so_far == {"text": text} | part
    told = [event["choices"][0]["logprobs"] for event in events(post(address, chat | {"stream": True}, "/v1/chat/completions"))]
    assert [entry for part in told if part for entry in part["content"]] == entries


def test_a_response_without_text_has_empty_lists_of_log_probabilities():
    with serving(Answering([VOCAB.eos_id])) as address:
        whole = post(address, {"prompt": "45", "logprobs": 1}).json()["choices"][0]
        chat = post(address, _CHAT | {"logprobs": True}, "/v1/chat/completions").json()["choices"][0]
    assert whole["text"] == "" and set(map(str, whole["logprobs"].values())) == {"[]"}
    assert chat["logprobs"] == {"content": [], "refusal": None}


class Hasty(Scripted):
    """A scheduler whose chunks are all there before the loop looks."""

    def _advance(self, ticket):
        while any(own is ticket for own in self._active):
            super()._advance(ticket)


def test_chunks_that_have_come_meanwhile_are_one_event():
    with serving(Hasty()) as address:
        told = events(post(address, {"prompt": ["45", "456"], "logprobs": 1, "stream": True}))
        plain = events(post(address, {"prompt": "45", "stream": True}))
    for index, prompt in enumerate(("45", "456")):
        piece, end = (choice for event in told for choice in event["choices"] if choice["index"] == index)
        assert (piece["text"], piece["logprobs"]["token_logprobs"]) == (TEXT, [0, -1, -2, -3, -4, -5])
        check_reading(end["selfspan"], prompt)
    assert [event["choices"][0]["text"] for event in plain] == [TEXT, ""]
    assert [event.keys() for event in plain] == [event.keys() for event in told[:2]] and len({event["id"] for event in plain}) == 1


def test_of_a_chat_all_messages_are_read_where_the_tokenizer_has_a_template():
    class Chats(Named):
        def encode_chat(self, messages):
            return self.encode_prompt("".join(message["content"] for message in messages))

    said = [("developer", "4"), ("user", "5"), ("assistant", "6"), ("user", [{"type": "text", "text": "7"}, {"type": "text", "text": "8"}])]
    scripted = Scripted()
    with serving(scripted, Chats()) as address:
        messages = [{"role": role, "content": content} for role, content in said]
        assert post(address, {"messages": messages}, "/v1/chat/completions").status_code == 200
    assert scripted.requests[0].prompt_ids.tolist() == [1, 4, 5, 6, 7, 8, 3]


class Answering(Scripted):
    """A scheduler that writes one response to any prompt."""

    context_tokens, num_pages = 1024, 128

    def __init__(self, response):
        super().__init__()
        self.response = response

    def submit(self, request, deliver):
        self.requests.append(request)
        self._active.append(ticket := [request, deliver, 0])
        return ticket

    def _advance(self, ticket):
        part = self.response[ticket[2] : ticket[2] + 5]
        ticket[2] += 5
        finished = "stop" if ticket[2] >= len(self.response) else None
        if finished:
            self._drop(ticket)
        ticket[1](Tokens(np.array(part), np.full(len(part), 3), finished))


TOOLS = [{"type": "function", "function": {"name": "get_time", "parameters": {"properties": {"hours": {"type": "integer"}}}}}]
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The time?"}]
TOLD = [
    {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "a", "content": '{"now": "7:30"}'},
]


def test_openais_client_gives_tools_and_reads_calls():
    """The task of tools reads functions; what a call names comes in our own part. Text that is no call is text."""
    import openai

    vocab = train_vocab(["call the services"], vocab_tokens=300, num_labels=16)
    task = ToolTask(vocab)
    config = ModelConfig(**{**TINY, "max_context_tokens": 1024}, header_view="labels", prompt_view="causal")
    spans = SpanVocab(**vocab.span_ids())
    lm = SpanLM(Decoder(config, vocab=spans, vocab_size=vocab.size, rngs=nnx.Rngs(0)), task)
    text = '{"service": "get_time", "method": "get_time", "parameters": {"hours": "24"}}'
    for said, calls in ((text, True), ("Half past seven.", False)):
        response = [spans.seg_base + 4, spans.ref_base + 1, spans.ref_base + 2, *vocab.plain_text_ids(f" {said}"), spans.eos_id]
        scripted = Answering(response)
        with serving(scripted, lm=lm) as address:
            http = httpx2.Client(trust_env=False)
            with openai.OpenAI(base_url=f"{address}/v1", api_key="any", http_client=http, max_retries=0) as client:
                whole = client.chat.completions.create(model="tiny", messages=ASKED + TOLD, tools=TOOLS, tool_choice="auto").choices[0]
                streamed = [
                    own.choices[0] for own in client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS, stream=True)
                ]
                with pytest.raises(openai.BadRequestError, match="tool_choice is 'none'; a model of the task tools writes calls"):
                    client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS, tool_choice="none")
        pieces = ["Service get_time: A function. get_time(hours=", "User: The time?", 'Result: {"now": "7:30"}']
        written = task.decode(scripted.requests[0].prompt_ids)
        assert written.startswith("<bos> Call the services: Be brief.<seg:1> ")
        assert [part.lstrip().startswith(own) for part, own in zip(re.split("<seg:.>", written)[1::2], pieces, strict=True)] == [True] * 3
        assert [choice.finish_reason for choice in streamed] == [None] * (len(streamed) - 1) + [whole.finish_reason]
        if not calls:
            assert (whole.message.content, whole.message.tool_calls, whole.finish_reason) == (f"<seg:4><ref:1><ref:2> {said}", None, "stop")
            assert "".join(choice.delta.content or "" for choice in streamed) == whole.message.content
            continue
        assert (whole.message.content, whole.finish_reason) == (None, "tool_calls") and not any(c.delta.content for c in streamed)
        for (called,), part in ((whole.message.tool_calls, whole.selfspan), (streamed[-1].delta.tool_calls, streamed[-1].selfspan)):
            assert (called.type, called.function.name, called.function.arguments) == ("function", "get_time", '{"hours": 24}')
            (own,) = part["tool_calls"]
            assert own["id"] == called.id and [piece["label"] for piece in own["pieces"]] == [1, 2]
            assert all(piece["text"].startswith(start) for piece, start in zip(own["pieces"], pieces))
        assert streamed[-1].delta.tool_calls[0].index == 0


# ------------------------------------------------------------------------------------------------------- refusals

_CHAT = {"messages": [{"role": "user", "content": "45"}]}
REFUSED = {
    "no JSON": (b"{", 400, "the body is not JSON"),
    "bytes that are no text": (b'{"prompt": "\xff"}', 400, "the body is not JSON"),
    "nested without end": (b"[" * 100_000, 400, "the body is not JSON"),
    "a number of many digits": (b'{"prompt": "4", "seed": ' + b"9" * 5000 + b"}", 400, "the body is not JSON"),
    "no object": (b"[]", 400, "the body is a list; expected a JSON object"),
    "no prompt": ({}, 400, "prompt: expected text"),
    "token ids": ({"prompt": [4, 5]}, 400, "token ids are not supported"),
    "a prompt that the task cannot read": ({"prompt": "x"}, 400, "invalid literal"),
    "one of several": ({"prompt": ["45", "x"]}, 400, "prompt 2, 'x'"),
    "a long prompt": ({"prompt": "4" * 70}, 400, "the prompt is 72 tokens long, but the model's context is 64"),
    "many new tokens": ({"prompt": "4", "max_tokens": 62}, 400, "max_tokens is 62; the prompt's 3 tokens leave 61"),
    "no tokens": ({"prompt": "4", "max_tokens": 0}, 400, "max_tokens is 0"),
    "an unknown field": ({"prompt": "4", "tempreature": 1}, 400, "'tempreature' is not supported"),
    "a penalty": ({"prompt": "4", "presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
    "many log probabilities": ({"prompt": "4", "logprobs": 21}, 400, "logprobs is 21; allowed: 0 to 20"),
    "log probabilities of a chat": (_CHAT | {"top_logprobs": 2}, 400, "top_logprobs is for logprobs: true"),
    "log probabilities of calls": (_CHAT | {"logprobs": True, "tools": [{}], "stream": True}, 400, "without tools"),
    "tools": (_CHAT | {"tools": [{"type": "function"}]}, 400, "tools is not supported by a model of the task words; leave it out"),
    "an object as tools": (_CHAT | {"tools": {"type": "function"}}, 400, "tools is an object; expected a list"),
    "tools of a prompt": ({"prompt": "4", "tools": []}, 400, "'tools' is not supported"),
    "a call that must be made": (
        _CHAT | {"tools": TOOLS, "tool_choice": "required"},
        400,
        'tool_choice is not supported but as "none" or "auto"',
    ),
    "a result without tools": ({"messages": ASKED + TOLD}, 400, "message 3 is of a tool, or calls one"),
    "not a number": (b'{"prompt": "4", "temperature": NaN}', 400, "temperature is nan"),
    "a number that is no float": (b'{"prompt": "4", "temperature": 1' + b"0" * 400 + b"}", 400, "temperature is 1000"),
    "a wrong type": ({"prompt": "4", "n": "2"}, 400, "n is text; expected a whole number"),
    "a truth as a number": ({"prompt": "4", "n": True}, 400, "n is true or false; expected a whole number"),
    "too many": ({"prompt": "4", "n": 129}, 400, "allowed: 1 to 128"),
    "more than may ever wait": ({"prompt": ["4"] * 64, "n": 2}, 400, "128 responses; this server takes 100 at once"),
    "a negative seed": ({"prompt": "4", "seed": -1}, 400, "seed is -1"),
    "an empty stop string": ({"prompt": "4", "stop": ""}, 400, "stop is ''"),
    "many stop strings": ({"prompt": "4", "stop": ["a"] * 17}, 400, "stop has 17 texts"),
    "usage of no stream": ({"prompt": "4", "stream_options": {"include_usage": True}}, 400, "stream_options is for stream"),
    "several messages": ({"messages": _CHAT["messages"] * 2}, 400, "reads one, its prompt"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "expected text, or a list of parts of type text",
    ),
    "an unknown role": ({"messages": [{"role": "robot", "content": "4"}]}, 400, "role is 'robot'"),
    "the assistant last": ({"messages": [{"role": "assistant", "content": "4"}]}, 400, "expected one of the user"),
    "another model": ({"prompt": "4", "model": "gpt"}, 404, "there is no model 'gpt'"),
    "a large body": (b" " * (4 * 2**20 + 1), 413, "larger than 4,194,304 bytes"),
}


@pytest.mark.parametrize(("body", "status", "message"), [pytest.param(*case, id=name) for name, case in REFUSED.items()])
def test_what_is_wrong_is_refused_by_name(address, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    path = "/v1/chat/completions" if b'"messages"' in content else "/v1/completions"
    found = httpx2.post(f"{address}{path}", content=content, headers={"Content-Type": "application/json"}, timeout=20, trust_env=False)
    assert found.status_code == status and message in found.json()["error"]["message"]


def test_other_paths_methods_and_kinds_of_bodies_are_refused(address):
    for path in ("/v1/embeddings", "/../../etc/passwd", "/live.py", "/v1/models/%2e%2e%2fetc%2fpasswd"):
        assert httpx2.get(address + path, trust_env=False).json()["error"]["type"] == "not_found_error"
    told = httpx2.get(f"{address}/v1/responses", trust_env=False).json()["error"]["message"]
    assert told.startswith("there is no '/v1/responses'; there are /, /health,") and told.endswith("/v1/completions, /v1/chat/completions")
    refused = httpx2.get(f"{address}/v1/completions", trust_env=False)
    assert refused.status_code == 405 and refused.json()["error"]["message"] == "GET is not for '/v1/completions'; allowed: POST"
    for length in ("many", "-1", "4, 5"):
        with socket.create_connection(address.removeprefix("http://").rsplit(":", 1), timeout=20) as client:
            client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{{}}".encode())
            head, _, body = b"".join(iter(lambda: client.recv(4096), b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request") and json.loads(body)["error"]["message"].startswith("the request is no HTTP")
    assert httpx2.post(f"{address}/v1/completions", data={"prompt": "4"}, trust_env=False).status_code == 415  # as a form of another site

    def chunks():  # a body that does not say how long it is
        for _ in range(70):
            yield b" " * 2**16

    headers = {"Content-Type": "application/json"}
    assert httpx2.post(f"{address}/v1/completions", content=chunks(), headers=headers, trust_env=False).status_code == 413
    for kind, status in (("application/json", 413), ("text/plain", 415)):  # a client that writes all before it reads is answered too
        request = urllib.request.Request(f"{address}/v1/completions", b" " * 2**23, {"Content-Type": kind})
        with pytest.raises(urllib.error.HTTPError, match=str(status)):
            urllib.request.urlopen(request, timeout=20)
    waiting = http.client.HTTPConnection(address.removeprefix("http://"), timeout=2)  # one that says how much it has, and sends nothing
    waiting.putrequest("POST", "/v1/completions")
    for name, value in (headers | {"Content-Length": str(2**40)}).items():
        waiting.putheader(name, value)
    waiting.endheaders()
    with contextlib.closing(waiting), waiting.getresponse() as told_at_once:
        assert told_at_once.status == 413 and told_at_once.headers["Connection"] == "close" and b"is larger than" in told_at_once.read()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_events_are_sent_when_they_are_written(host):
    """Without Nagle's algorithm, by which the second of two small writes waits for the client's acknowledgement of the first."""
    from selfspan_jax.serving.server import listening

    async def no_delay(bound):
        found = asyncio.get_running_loop().create_future()

        def connected(_, client):
            found.set_result(client.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            client.close()

        async with await asyncio.start_server(connected, sock=bound):
            with socket.create_connection(bound.getsockname()[:2]):
                return await asyncio.wait_for(found, 20)

    with listening(host, 0) as bound:
        assert asyncio.run(no_delay(bound))


def test_of_two_servers_that_took_an_address_before_either_listened_one_says_so():
    from selfspan_jax.serving import server as module

    with module.listening("127.0.0.1", 0) as first, module.listening("127.0.0.1", first.getsockname()[1]) as second:
        first.listen()
        running = module.Uvicorn(module.Server(SpanLM(MODEL, Named()), Scripted(), "tiny"))
        with pytest.raises(UserError, match=r"--port \d+ cannot be listened on: .*in use"):
            running.run([second])
        assert not running._server.decodes


def test_a_key_is_asked_for_and_a_full_queue_says_when_to_come_again():
    with serving(Scripted(max_queue=2), api_key=" sécret\n") as address:  # as read from a file: a header carries no such spaces
        for given in (None, "Bearer wrong", "Basic sécret", "sécret"):
            headers = {} if given is None else {"Authorization": given.encode()}
            for found in (
                post(address, {"prompt": "4"}, headers=headers),
                httpx2.get(f"{address}/v1/models", headers=headers, trust_env=False),
            ):
                assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
        headers = {"Authorization": "Bearer sécret".encode()}
        assert post(address, {"prompt": "4"}, headers=headers).status_code == 200
        assert httpx2.get(f"{address}/health", trust_env=False).json() == {"status": "ok"}
        found = post(address, {"prompt": "7", "n": 3}, headers=headers)  # two have room, and are taken back
        assert (found.status_code, found.headers["Retry-After"]) == (429, "1")
        assert post(address, {"prompt": "4", "n": 2}, headers=headers).status_code == 200
        assert 'finished_reason="abort"' not in httpx2.get(f"{address}/metrics", trust_env=False).text


# ------------------------------------------------------------------------------------------- clients that go away


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("prompt", "stream"), [("8", True), ("7", True), ("8", False), ("7", False)])
def test_a_client_that_goes_away_frees_its_places(address, scripted, prompt, stream):
    """Whether tokens come or none, streamed or not."""
    before, submitted = len(scripted.cancelled), len(scripted.requests)
    body = {"prompt": prompt, "n": 2, "stream": stream}
    with (
        contextlib.suppress(httpx2.ReadTimeout),
        httpx2.Client(trust_env=False, timeout=0.3) as client,
        client.stream("POST", f"{address}/v1/completions", json=body) as response,
    ):
        next(response.iter_text())
    until(lambda: len(scripted.cancelled) == before + 2)
    assert len(scripted.requests) == submitted + 2 and not scripted._active


def test_metrics_have_the_names_that_dashboards_know(address):
    from prometheus_client.parser import text_string_to_metric_families

    def read():
        text = httpx2.get(f"{address}/metrics", trust_env=False).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return text, {(sample.name, sample.labels.get("finished_reason")): sample.value for sample in samples}

    # Tokens of responses, of clients that went away too: the last two end before their chunk does, within a token and before one.
    tokens, (_, before) = ("vllm:generation_tokens_total", "vllm:request_generation_tokens_sum"), read()
    for body in ({}, {"stop": "1>4"}, {"stop": "5<", "stream": True}):
        post(address, {"prompt": "45"} | body)
    prompts, ended = ("vllm:prompt_tokens_total", "vllm:request_prompt_tokens_sum"), "vllm:e2e_request_latency_seconds_count"
    assert post(address, {"prompt": ["45", "4" * 70]}).status_code == 400  # all or nothing: the first is not counted
    text, found = read()
    assert [found[name, None] - before[name, None] for name in (*prompts, ended)] == [3 * 4, 3 * 4, 3]
    assert found[prompts[0], None] == found[prompts[1], None]
    assert [found[name, None] - before[name, None] for name in tokens] == [len(RESPONSE) + 1 + 2] * 2
    assert found[tokens[0], None] == found[tokens[1], None]
    expected = {
        **{"vllm:num_requests_running": 3, "vllm:num_requests_waiting": 0, "vllm:kv_cache_usage_perc": 3 / 8},
        **{"vllm:prefix_cache_queries_total": 120, "vllm:prefix_cache_hits_total": 20},
        **{"vllm:num_preemptions_total": 6, "selfspan:attended_tokens_total": 250, "selfspan:context_tokens_total": 1000},
        **{"selfspan:pages_in_use": 3, "selfspan:pages_cached": 1, "selfspan:pages_free": 4},
    }
    assert {name: found[name, None] for name in expected} == expected
    assert found["vllm:request_success_total", "stop"] >= 1 and found["selfspan:span_tokens_total", None] >= 3
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert found[f"vllm:{name}_count", None] >= 1
    assert 'model_name="tiny"' in text


def test_the_time_between_tokens_is_averaged_over_those_that_come_together():
    from prometheus_client import CollectorRegistry, Histogram, generate_latest

    registry, ours = CollectorRegistry(), metrics.Metrics("tiny", Stats)
    says = "Between tokens, averaged over those that come together."
    oracle = Histogram("vllm:inter_token_latency_seconds", says, ["model_name"], buckets=metrics._SECONDS, registry=registry).labels("tiny")
    for value in (*metrics._SECONDS, 0.0, 0.0015, 0.4, 100.0):  # bounds are of the bucket below them
        ours.arrived(2, 2 * value)
        oracle.observe(value)
    expected = [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]
    assert len(expected) > 18 and set(expected) <= {*ours.text().decode().splitlines()}


# ------------------------------------------------------------------------------------------------------- the page


@pytest.mark.skipif(browser.installed() is None, reason="no browser is installed")
def test_the_live_page_shows_steps_and_what_they_read_and_asks_nobody_else(tmp_path):
    """In a real browser: what lights up is what `Output.to_html` says; whatever the model writes is text."""
    from tests.selfspan_jax.viewing.test_html import read_back

    prompt_ids = HOSTILE_TASK.encode_prompt("4")
    out = read_back(np.array([*prompt_ids, *RESPONSE]), len(prompt_ids), np.array(ATTENDED), task=HOSTILE_TASK)
    with serving(Scripted(), HOSTILE_TASK, examples=["4", "<b>"]) as address, browser.Browser(tmp_path) as page:
        page.look(width=390, height=844, touch=True)
        page.call("Page.navigate", url=address)
        until(lambda: page.run("document.readyState") == "complete")
        page.run("document.querySelector('[name=example]').click()")
        page.run("document.querySelector('form').requestSubmit(); document.querySelector('form').requestSubmit()")  # two at once
        until(lambda: page.run("[...document.querySelectorAll('.state')].map(e => e.textContent).join()") == "finished,finished")
        reads = page.run("[...document.querySelectorAll('.run:first-child .step')].map(e => e.dataset.reads)")
        texts = page.run("[...document.querySelectorAll('.run:first-child .t:not(.seg, .ref)')].map(e => e.textContent)")
        shown = out.to_html()
        assert len(reads) == 2 and all(f'data-reads="{read}"' in shown for read in reads)
        counts = page.run("document.querySelector('.run:first-child .counts').textContent")
        assert counts.startswith(f"attended: {out.attended_tokens:.1f} tokens, {out.attended_fraction:.1%} of the context")
        assert HOSTILE_TASK.words[0] in texts and HOSTILE_TASK.words[2] in texts
        assert page.run("document.documentElement.scrollWidth") == 390 and page.run("window.broken") is None
        page.run("document.querySelector('textarea').value = '8'; document.querySelector('form').requestSubmit()")
        until(lambda: page.run("document.querySelectorAll('.run:first-child .t').length") > 8)
        state = "document.querySelector('.run:first-child .state').textContent"

        def stopped():  # text that comes meanwhile may move the button from under the mouse: then it is pressed again
            if page.run("document.querySelector('.run:first-child .stop').textContent") == "Stop":  # afterwards it removes the run
                page.point(".run:first-child .stop", click=True)
            return any(page.run(state) == "stopped" or time.sleep(0.01) for _ in range(200))

        until(stopped)
        assert "default-src 'none'" in (policy := httpx2.get(address, trust_env=False).headers["Content-Security-Policy"])
        assert "frame-ancestors 'none'" in policy and "unsafe-eval" not in policy
        assert page.errors == [] and {url.removeprefix(address) for url in page.requests} == {"/", "/v1/completions"}
        page.run("new Image().src = 'http://127.0.0.1:1/'")
        until(lambda: page.run("1") and page.errors)  # what the policy refuses would have shown
        assert "Content Security Policy" in page.errors[0]


# --------------------------------------------------------------------------------------------------------- the end


def test_on_a_cpu_fewer_run_together_and_prompts_are_read_one_by_one():
    default, own = ServerConfig(), ServerConfig(slots=3, prefill_tokens=64)
    on_cpu = ServingConfig(num_sequences=2, chunk_tokens=4, prefill_tokens=256, min_read_tokens=256)
    assert (default.serving, default.serving_on_cpu) == (ServingConfig(), on_cpu)
    assert own.serving == ServingConfig(num_sequences=3, prefill_tokens=64)
    assert own.serving_on_cpu == dataclasses.replace(on_cpu, num_sequences=3, prefill_tokens=64, min_read_tokens=64)


def serve_here(monkeypatch, capsys, scripted, client):
    """Call `serve` as the command does, in this process: signals are the main thread's. What it said; `client` gets the address."""
    from selfspan_jax.serving import server as module

    scripted.warm_up, scripted.reader = lambda on_progress: [on_progress(done, 9) for done in range(10)], SpanLM(random_model(), Named())
    monkeypatch.setattr(module, "Workers", lambda *arguments, **options: contextlib.nullcontext(scripted))
    said = []

    def announced():
        said.append(capsys.readouterr().out)
        return "served at http" in "".join(said)

    def run_client():
        try:
            until(announced)
            client("".join(said).split("served at ")[1].split()[0])
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # ends the server where the client failed; after its end nothing is left to do

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    thread = threading.Thread(target=run_client)
    thread.start()
    module.serve(None, "words", ServerConfig(port=0, slots=2))
    thread.join()
    signal.signal(signal.SIGTERM, before)
    return "".join(said)


def test_sigterm_finishes_what_runs_and_refuses_the_rest(monkeypatch, capsys):
    scripted, release, found = Scripted(), threading.Event(), {}
    advance = scripted._advance
    monkeypatch.setattr(scripted, "_advance", lambda ticket: advance(ticket) if ticket[2] == 0 or release.is_set() else None)

    def client(address):
        with (
            contextlib.ExitStack() as stack,
            httpx2.Client(base_url=address, trust_env=False, timeout=20) as http,
            http.stream("POST", "/v1/completions", json={"prompt": "45", "stream": True}) as response,
        ):
            stack.callback(release.set)
            lines = response.iter_lines()
            first = next(lines)
            waiting = threading.Thread(target=lambda: found.update(waiting=post(address, {"prompt": "7"})))
            waiting.start()
            until(lambda: len(scripted.requests) == 2)
            os.kill(os.getpid(), signal.SIGTERM)
            waiting.join()
            with contextlib.suppress(httpx2.TransportError):
                found["late"] = post(address, {"prompt": "45"}).status_code
            release.set()
            pieces = [line for line in (first, *lines) if line.startswith("data: {")]
            found["text"] = "".join(json.loads(line[6:])["choices"][0]["text"] for line in pieces)

    said = serve_here(monkeypatch, capsys, scripted, client)
    assert found["text"] == TEXT
    assert re.findall(r"compiling: (\d+) of 9", said) == ["0", "3", "5", "7", "9"]  # where a quarter is through
    assert said.count("loading: ") == 1 and said.index("9 of 9") < said.index("loading") < said.index("served")
    assert (found["waiting"].status_code, found["waiting"].headers["Retry-After"]) == (503, "1")
    assert found.get("late", 503) == 503


@pytest.mark.parametrize("signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_drops_clients_without_a_traceback(monkeypatch, capsys, caplog, signals):
    """A stream that has no end, a whole response that may have been refused before it began, and half a body."""
    scripted, dropped = Scripted(), []
    monkeypatch.setattr(scripted, "_advance", lambda ticket: ticket[1](Tokens(np.array([4]), np.array([2]))))

    def ask(address):
        with contextlib.suppress(httpx2.TransportError):
            post(address, {"prompt": "8"})

    def client(address):
        asking = threading.Thread(target=ask, args=(address,))
        asking.start()
        with (
            socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as half,
            httpx2.stream("POST", f"{address}/v1/completions", json={"prompt": "8", "stream": True}, trust_env=False) as response,
        ):
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{")
            lines = response.iter_lines()
            until(lambda: next(lines).startswith("data: {") and len(scripted.requests) == 2)
            for number in signals:
                os.kill(os.getpid(), number)
                until(scripted._closing.is_set)  # two at once may be one: the kernel keeps no count
            with pytest.raises(httpx2.TransportError):
                dropped.extend(lines)
        asking.join()

    serve_here(monkeypatch, capsys, scripted, client)
    assert dropped and scripted.cancelled and not scripted._active
    assert caplog.records == [] and capsys.readouterr().err == ""


def test_a_client_that_sends_half_a_body_or_does_not_read_keeps_no_server_from_ending(monkeypatch):
    from selfspan_jax.serving import server as module

    monkeypatch.setattr(module, "LINGER_SECONDS", 0.2)
    scripted = Scripted()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    body = json.dumps({"prompt": "8", "stream": True}).encode()
    with contextlib.ExitStack() as stack:
        clients = []
        with serving(scripted) as address:  # whose end asks it to, and waits for it
            for _ in range(2):
                clients.append(stack.enter_context(socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))))
            clients[0].sendall(head % 500 + b'{"prompt":')
            clients[1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            clients[1].sendall(head % len(body) + body)
            until(lambda: scripted.requests)
            time.sleep(0.1)
            scripted._active.clear()
            scripted.close(drain=True)
