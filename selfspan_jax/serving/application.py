"""The application of a server: OpenAI's API (`protocol`), `/health`, `/metrics`, and a live page.

Schedulers have processes of their own (`workers`). Here a thread takes what they give, one event loop has the connections. A request's
prompts are encoded, and its responses read back, in a third thread, so that a long prompt stops no stream.

No request reaches the file system: the page is read when the server starts, and there are no other files. A client that goes
away frees its places at the next chunk; whatever fails one request is told to it alone.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import hmac
import secrets
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from selfspan_jax.attention.policies import Policy, get_policy
from selfspan_jax.config import MAX_SEED
from selfspan_jax.errors import UserError
from selfspan_jax.lm import Reader
from selfspan_jax.serving import live, protocol
from selfspan_jax.serving.http import EventStream, Refused, answer_http_error, answer_refused, as_json, dumps, read_body, unless_gone
from selfspan_jax.serving.metrics import Metrics
from selfspan_jax.serving.protocol import Call
from selfspan_jax.serving.requests import Closed, QueueFull, Request, Tokens, joined
from selfspan_jax.serving.scheduler import Scheduler
from selfspan_jax.serving.workers import Workers
from selfspan_jax.viewing import detokenize

KEEP_ALIVE_SECONDS = 15.0  # between comments in a stream that has nothing to say


@dataclasses.dataclass(eq=False)
class Choice:
    """One response on its way."""

    index: int
    prompt: str
    prompt_ids: Int[np.ndarray, "T"]
    response: detokenize.Response
    ticket: Any = None
    attended: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[tuple[float, list[int], list[float]]] = dataclasses.field(default_factory=list)
    """Of each token: its own, and the likeliest ids with theirs."""
    told: int = 0
    """Tokens whose log-probabilities are in events."""
    told_characters: int = 0
    finish_reason: str | None = None
    last: float = dataclasses.field(default_factory=time.monotonic)


class Server:
    """The application: what encodes and reads texts, the scheduler that decodes, or several in other processes, and what is on its way.

    Args:
      lm: of the model that the scheduler has.
      scheduler: is run in a thread, until `drain`.
      model_name: what clients call the model.
      attention: the policy that the scheduler decodes with; by default what the model was trained with.
      examples: prompts that the live page offers.
      api_key: what requests to /v1 must bear; None: nothing.
    """

    def __init__(
        self,
        lm: Reader,
        scheduler: Scheduler | Workers,
        model_name: str,
        *,
        attention: str | Policy | None = None,
        api_key: str | None = None,
        examples: Sequence[str] = (),
    ):
        self.lm, self.scheduler, self.model_name = lm, scheduler, model_name
        self.max_tokens = min(scheduler.context_tokens, scheduler.num_pages * scheduler.config.page_tokens)  # of a sequence
        self.metrics = Metrics(model_name, lambda: scheduler.stats)
        self.state = "starting"
        self._key = None if api_key is None else _digest(api_key.encode("utf-8", "surrogateescape"))
        self.policy = get_policy(lm.config.mask if attention is None else attention)
        self._task_name = getattr(lm.task, "name", type(lm.task).__name__)
        self._page = live.page(model_name, self._task_name, self.policy.name, examples)
        self._calls: set[Running] = set()
        self._arrived: collections.deque[tuple[Running, Choice, Tokens]] = collections.deque()
        self._end_ids = frozenset(lm.end_ids)
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "reader")
        self._thread = threading.Thread(target=self._drive, name="scheduler", daemon=True)
        self._created = int(time.time())
        routes = [
            Route("/", self._root),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: answer_http_error, Refused: answer_refused}
        self.app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    # --------------------------------------------------------------------------------------------------- life

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self.state = "ok"
        try:
            yield
        finally:
            await self.drain()
            await self._loop.run_in_executor(None, self._thread.join)
            self._reader.shutdown()

    async def drain(self) -> None:
        """Finish what runs, refuse the rest."""
        if self.state == "ok":
            self.state = "draining"
        self.scheduler.close(drain=True)
        for running in self._calls:
            running.refuse()

    def _drive(self) -> None:
        try:
            self.scheduler.run(self._wake)
        finally:
            if self.state == "ok":  # an error, which is reported: what waits for tokens waits in vain
                self.state = "failed"
                self._loop.call_soon_threadsafe(self._fail_all)

    def _wake(self) -> None:
        """Have what has arrived given out by the loop: once for a round, because the loop takes the interpreter's lock with each call."""
        if self._arrived:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                self._loop.call_soon_threadsafe(self._give_out)

    def _give_out(self) -> None:
        while self._arrived:
            running, choice, tokens = self._arrived.popleft()
            running.put(choice, tokens)

    def _fail_all(self) -> None:
        for running in self._calls:
            running.put(None, Tokens.none("error", "the scheduler has ended"))

    # ------------------------------------------------------------------------------------------------ small answers

    async def _root(self, request: HttpRequest) -> Response:
        headers = {"X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return HTMLResponse(self._page, headers=headers)

    async def _health(self, request: HttpRequest) -> Response:
        return as_json({"status": self.state}, 200 if self.state == "ok" else 503)

    async def _metrics(self, request: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: HttpRequest) -> Response:
        self._check_key(request)
        return as_json({"object": "list", "data": [self._card()]})

    async def _model(self, request: HttpRequest) -> Response:
        self._check_key(request)
        self._check_model(request.path_params["name"])
        return as_json(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "selfspan",
            "max_model_len": self.max_tokens,
            "selfspan": {"task": self._task_name, "attention": self.policy.name},
        }

    # ------------------------------------------------------------------------------------------------ completions

    async def _completions(self, request: HttpRequest) -> Response:
        return await self._answer(request, "text_completion")

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, "chat.completion")

    async def _answer(self, request: HttpRequest, kind: Any) -> Response:
        self._check_key(request)
        if self.state != "ok":
            raise Refused(503, f"the server is {self.state}")
        if (request.headers.get("content-type") or "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "expected the header Content-Type: application/json")
        body = await read_body(request)
        try:
            call = protocol.read_call(kind, body)
            self._check_model(call.model)
            prompts = await self._loop.run_in_executor(self._reader, self._encode, call)
            running = self._submit(call, prompts)
        except ValueError as error:  # UserError, and what tasks raise
            raise Refused(400, " ".join(str(error).split())) from error
        except QueueFull as error:
            raise Refused(429, f"{error}; try again later") from error
        except Closed as error:
            raise Refused(503, "the server is shutting down") from error
        if call.stream:
            return EventStream(running.events(), running.close)
        with contextlib.closing(running):
            answered = await unless_gone(request.receive, running.whole())
        return Response(status_code=499) if answered is None else as_json(answered)

    def _encode(self, call: Call) -> list[tuple[str, Int[np.ndarray, "T"]]]:
        """Return the text and the ids of each prompt. Raises ValueError for what the task cannot read."""
        task = self.lm.task
        if call.tools:
            if not hasattr(task, "tool_prompt"):
                raise UserError(f"tools is not supported by a model of the task {self._task_name}; leave it out")
            texts, ids = self.lm.encode(task.tool_prompt(call.messages, call.tools))
            return list(zip(texts, ids))
        if call.declines_tools and hasattr(task, "tool_prompt"):
            raise UserError(f"tool_choice is 'none'; a model of the task {self._task_name} writes calls and no other text: allowed: 'auto'")
        if call.messages and hasattr(task, "encode_chat"):
            return [(call.prompts[0], task.encode_chat(call.messages))]
        if len(call.messages) > 1:
            raise UserError(f"messages are {len(call.messages)}; a model of the task {self._task_name} reads one, its prompt")
        texts, ids = self.lm.encode(call.prompts if len(call.prompts) > 1 else call.prompts[0])
        return list(zip(texts, ids))

    def _submit(self, call: Call, prompts: Sequence[tuple[str, Int[np.ndarray, "T"]]]) -> Running:
        """Give the scheduler all that a call asks for, or nothing."""
        if (asked := call.n * len(prompts)) > (most := self.scheduler.config.max_queue):
            raise UserError(f"n is {call.n} for {len(prompts)} prompts, {asked} responses; this server queues {most} at most")
        running = Running(self, call)
        seed = secrets.randbelow(MAX_SEED + 1) if call.seed is None else call.seed
        try:
            for text, ids in prompts:
                if (left := self.max_tokens - len(ids)) < 1:
                    raise UserError(f"the prompt is {len(ids)} tokens long, but a sequence has {self.max_tokens}, response included")
                if call.max_tokens is not None and call.max_tokens > left:
                    raise UserError(f"max_tokens is {call.max_tokens}; the prompt's {len(ids)} tokens leave {left}")
                for _ in range(call.n):
                    response = detokenize.Response(self._decode, call.stop, self._end_ids)
                    choice = Choice(len(running.choices), text, ids, response)
                    limit = left if call.max_tokens is None else call.max_tokens
                    wanted = Request(ids, limit, call.sampling, seed, sample=choice.index, logprobs=call.logprobs is not None)
                    choice.ticket = self.scheduler.submit(wanted, running.deliver(choice))
                    running.choices.append(choice)
        except BaseException:
            running.close()
            raise
        self._calls.add(running)
        return running

    def _decode(self, token_ids: Sequence[int]) -> str:
        """Write tokens as clients want them, without what ends a response."""
        return self.lm.task.decode([token for token in token_ids if token not in self._end_ids])

    def _check_key(self, request: HttpRequest) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if self._key is not None and not (
            hmac.compare_digest(_digest(given.strip().encode("latin-1")), self._key) and scheme.lower() == "bearer"
        ):
            raise Refused(401, "wrong or missing API key: expected the header Authorization: Bearer KEY", "invalid_api_key")

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.model_name):
            raise Refused(404, f"there is no model {name[:80]!r}; there is {self.model_name!r}", "model_not_found")


class Running:
    """A call whose responses are being decoded. `close` cancels what has not ended, whoever has gone."""

    def __init__(self, server: Server, call: Call):
        self.server, self.call = server, call
        self.choices: list[Choice] = []
        self._queue: asyncio.Queue[tuple[Choice | None, Tokens]] = asyncio.Queue()
        self._started = time.monotonic()

    def deliver(self, choice: Choice) -> Callable[[Tokens], None]:
        """Return what the scheduler's thread calls with the tokens of a choice."""
        return lambda tokens: self.server._arrived.append((self, choice, tokens))

    def put(self, choice: Choice | None, tokens: Tokens) -> None:
        self._queue.put_nowait((choice, tokens))

    def refuse(self) -> None:
        """End a call of which nothing is decoded yet."""
        if not any(choice.attended for choice in self.choices):
            self.put(None, Tokens.none("cancelled"))

    def close(self) -> None:
        """Cancel the choices that have not ended."""
        self.server._calls.discard(self)
        for choice in self.choices:
            if choice.finish_reason is None:
                self._end(choice, "abort")
                if choice.ticket is not None:
                    self.server.scheduler.cancel(choice.ticket)

    async def pieces(self) -> AsyncIterator[tuple[Choice, str] | None]:
        """Yield the text that arrivals add to a choice, None now and then where nothing arrives.

        Where the loop is behind, several chunks of a choice are one piece.

        Raises: Refused where the scheduler fails a choice.
        """
        while any(choice.finish_reason is None for choice in self.choices):
            arrived: dict[Choice | None, list[Tokens]] = {}
            try:
                async with asyncio.timeout(KEEP_ALIVE_SECONDS):  # Python 3.11's wait_for swallows cancellations
                    choice, tokens = await self._queue.get()
                arrived[choice] = [tokens]
            except TimeoutError:
                yield None
            while not self._queue.empty():
                choice, tokens = self._queue.get_nowait()
                arrived.setdefault(choice, []).append(tokens)
            for choice, parts in arrived.items():
                tokens = parts[0] if len(parts) == 1 else joined(parts)
                if choice is not None and choice.finish_reason is not None:  # of a chunk that ran ahead
                    continue
                if tokens.finished == "cancelled":
                    raise Refused(503, "the server is shutting down")
                if choice is None or tokens.finished == "error":
                    if choice is not None:
                        self._end(choice, "error")
                    raise Refused(500, f"decoding failed: {tokens.error}")
                yield choice, self._add(choice, tokens)

    def _add(self, choice: Choice, tokens: Tokens) -> str:
        response, now = choice.response, time.monotonic()
        if count := len(tokens.token_ids):
            self.server.metrics.arrived(count, now - choice.last, first=not choice.attended)
            choice.attended.extend(tokens.num_attended.tolist())
            choice.last = now
            if tokens.logprobs is not None:
                choice.logprobs.extend(zip(*(x.tolist() for x in tokens.logprobs)))
        piece = response.push(tokens.token_ids)
        if response.done and tokens.finished is None:
            assert choice.ticket is not None
            self.server.scheduler.cancel(choice.ticket)
        if response.done or tokens.finished is not None:
            piece += response.finish()
            self._end(choice, "length" if tokens.finished == "length" and response.stopped_by is None else "stop")
        return piece

    def _end(self, choice: Choice, reason: str) -> None:
        vocab, ids = self.server.lm.vocab, np.asarray(choice.response.token_ids, np.int64)
        spans = sum(int(np.sum((base <= ids) & (ids < base + vocab.num_labels))) for base in (vocab.seg_base, vocab.ref_base))
        choice.finish_reason = reason
        self.server.metrics.finished(reason, len(choice.prompt_ids), len(ids), spans, time.monotonic() - self._started)

    def _read(self, choice: Choice) -> dict[str, Any]:
        server = self.server
        attended = np.array(choice.attended, np.int32)
        out = server.lm.read_response(choice.prompt, choice.prompt_ids, choice.response, attended, server.policy)
        part = protocol.reading_part(out)
        if self.call.tools:
            task: Any = server.lm.task
            called = task.tool_calls(choice.prompt, choice.response.token_ids, self.call.tools)
            part["tool_calls"] = [{"id": f"call_{uuid.uuid4().hex}", **own} for own in called]
        return part

    async def read(self, choice: Choice) -> dict[str, Any]:
        """Say what a choice that has ended read."""
        return await self.server._loop.run_in_executor(self.server._reader, self._read, choice)

    def usage(self) -> dict[str, int]:
        """Count the tokens of the prompts, each once, and of the responses."""
        prompts = sum(len(choice.prompt_ids) for choice in self.choices[:: self.call.n])
        return protocol.usage(prompts, sum(len(choice.response.token_ids) for choice in self.choices))

    def logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Say the log-probabilities of the tokens that no event had yet, what ends a response left out; None where there are none."""
        if self.call.logprobs is None:
            return None
        scored, decode = [], self.server.lm.task.decode
        start, choice.told = choice.told, len(choice.response.token_ids)
        for token_id, (own, ids, values) in zip(choice.response.token_ids[start:], choice.logprobs[start:]):
            if token_id not in self.server.lm.end_ids:
                likeliest = [(decode([other]), value) for other, value in zip(ids, values)]
                scored.append((decode([token_id]), own, likeliest[: self.call.logprobs]))
        offset = choice.told_characters
        choice.told_characters += sum(len(text) for text, *_ in scored)
        return protocol.logprobs_part(self.call, scored, offset) if scored else None

    async def whole(self) -> dict[str, Any]:
        """Return the whole response."""
        async for _ in self.pieces():
            pass
        choices = [(own.response.text, str(own.finish_reason), await self.read(own), self.logprobs(own)) for own in self.choices]
        return protocol.response(self.call, self.server.model_name, choices, self.usage())

    async def events(self) -> AsyncGenerator[str | None, None]:
        """Yield the events of a stream as JSON, None now and then where there are none."""
        call, model, lm = self.call, self.server.model_name, self.server.lm
        # Most events are a piece of text and nothing else: what is around it is written once.
        around = [dumps(protocol.event(call, model, choice.index, call.id)).split(dumps(call.id)) for choice in self.choices]
        watches = [live.Watch(lm.task, lm.vocab, choice.prompt_ids) for choice in self.choices] if call.tokens else []
        for watch, choice in zip(watches, self.choices):
            yield dumps(protocol.event(call, model, choice.index, "", part=watch.prompt()))
        if call.kind == "chat.completion":
            for choice in self.choices:
                yield dumps(protocol.event(call, model, choice.index, None))
        async for arrived in self.pieces():
            if arrived is None:
                yield None
                continue
            choice, piece = arrived
            seen = watches[choice.index].add(choice.response.token_ids, choice.attended) if watches else None
            if call.tools:
                piece = ""  # calls come whole, at the end, and so does text that is none
            scores = self.logprobs(choice)
            if scores or (seen and seen["tokens"]):
                yield dumps(protocol.event(call, model, choice.index, piece, part=seen, logprobs=scores))
            elif piece:
                yield dumps(piece).join(around[choice.index])
            if choice.finish_reason is not None:
                rest = choice.response.text if call.tools else ""
                yield dumps(protocol.event(call, model, choice.index, rest, choice.finish_reason, await self.read(choice)))
        if call.include_usage:
            yield dumps(protocol.usage_event(call, model, self.usage()))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # of one length, so that comparing them tells none
