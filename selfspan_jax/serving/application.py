"""The application of a server: OpenAI's API (`protocol`), `/health`, `/metrics`, and a live page.

Schedulers have processes of their own (`workers`). Here a thread takes what they give, and one event loop has the connections.

No request reaches the file system: the page is read when the server starts, and there are no other files. A client that goes
away frees its places at the next chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import jax
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from selfspan_jax.attention.policies import Policy, get_policy
from selfspan_jax.lm import Reader
from selfspan_jax.serving import live, protocol
from selfspan_jax.serving.calls import KEEP_ALIVE_SECONDS, Service
from selfspan_jax.serving.http import EventStream, Refused, answer_http_error, answer_refused, as_json, read_body, unless_gone
from selfspan_jax.serving.metrics import Metrics
from selfspan_jax.serving.requests import Closed, QueueFull, Tokens
from selfspan_jax.serving.scheduler import Scheduler
from selfspan_jax.serving.workers import Workers


class Server:
    """The application: what encodes and reads texts, the scheduler that decodes, or several in other processes, and what is on its way.

    Args:
      lm: of the model that the scheduler has.
      scheduler: is run in a thread, until `drain`.
      model_name: what clients call the model.
      attention: the policy that the scheduler decodes with; by default what the model was trained with.
      examples: prompts that the live page offers.
      api_key: what requests to /v1 must bear; None: nothing.
      device: what decodes, as /v1/models says it.
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
        device: str | None = None,
    ):
        policy = get_policy(lm.config.mask if attention is None else attention)
        self.service = Service(lm, scheduler, model_name, policy, Metrics(model_name, lambda: scheduler.stats))
        self.model_name, self.state = model_name, "starting"
        self._key = None if api_key is None else _digest(api_key.strip().encode("utf-8", "surrogateescape"))
        self._page = live.page(model_name, self.service.task_name, policy.name, examples)
        self._thread = threading.Thread(target=self._drive, name="scheduler", daemon=True)
        self._created, self._device = int(time.time()), {"device": device, "jax": jax.__version__} if device else {}
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
        beat = asyncio.ensure_future(self._beat())
        try:
            yield
        finally:
            beat.cancel()
            await self.drain()
            await self._loop.run_in_executor(None, self._thread.join)
            self.service.encoder.shutdown()
            self.service.reader.shutdown()

    @property
    def decodes(self) -> bool:
        """Whether the scheduler runs: after `drain`, until the last request has finished."""
        return self._thread.is_alive()

    async def drain(self) -> None:
        """Finish what runs, refuse the rest."""
        if self.state == "ok":
            self.state = "draining"
        self.service.scheduler.close(drain=True)
        for running in self.service.calls:
            running.refuse()

    def _drive(self) -> None:
        try:
            self.service.scheduler.run(self._wake)
        finally:
            if self.state == "ok":  # an error, which is reported: what waits for tokens waits in vain
                self.state = "failed"
                self._loop.call_soon_threadsafe(self._fail_all)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            for running in self.service.calls:
                running.wake()

    def _wake(self) -> None:
        """Have what has arrived given out by the loop: once for a round, because the loop takes the interpreter's lock with each call."""
        if self.service.arrived:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                self._loop.call_soon_threadsafe(self.service.give_out)

    def _fail_all(self) -> None:
        for running in self.service.calls:
            running.put(None, Tokens.none("error", "the scheduler has ended"))

    # ------------------------------------------------------------------------------------------------ small answers

    async def _root(self, request: HttpRequest) -> Response:
        headers = {"X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        headers["Content-Security-Policy"] = live.content_policy()
        return HTMLResponse(self._page, headers=headers)

    async def _health(self, request: HttpRequest) -> Response:
        return as_json({"status": self.state}, 200 if self.state == "ok" else 503)

    async def _metrics(self, request: HttpRequest) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4")

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
            "max_model_len": self.service.max_tokens,
            "selfspan": {
                "task": self.service.task_name,
                "attention": self.service.policy.name,
                **self._device,
                "serving": dataclasses.asdict(self.service.scheduler.config),
            },
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
            prompts = await self._loop.run_in_executor(self.service.encoder, self.service.encode, call)
            running = self.service.submit(call, prompts)
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

    def _check_key(self, request: HttpRequest) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if self._key is not None and not (
            hmac.compare_digest(_digest(given.strip().encode("latin-1")), self._key) and scheme.lower() == "bearer"
        ):
            raise Refused(401, "wrong or missing API key: expected the header Authorization: Bearer KEY", "invalid_api_key")

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.model_name):
            raise Refused(404, f"there is no model {name[:80]!r}; there is {self.model_name!r}", "model_not_found")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # of one length, so that comparing them tells none
