"""Speak HTTP: bodies that are read up to a limit, JSON, server-sent events, errors as clients know them, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from selfspan_jax.serving import protocol

MAX_BODY_BYTES = 4 * 2**20
MAX_DISCARDED_BYTES, DISCARD_SECONDS = 16 * MAX_BODY_BYTES, 5.0
RETRY_AFTER_SECONDS = 1
DIRECT = "selfspan.direct"


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class EventStream(Response):
    """Server-sent events, until their end or until the client goes away; then, in either case, `close` is called.

    Args:
      events: JSON of each; None where there is none for a while.

    A stream has hundreds of events a second, each a few tokens. So what a server leaves under `DIRECT` in the scope, if it does, writes
    them: past the layers of the application and of HTTP that have nothing more to say.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str | None, None], close: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await unless_gone(receive, self._send(send, scope.get(DIRECT)))
        finally:
            self._close()

    async def _send(self, send: Any, direct: Callable[[bytes], Awaitable[None]] | None) -> None:
        async def through_layers(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        write = direct or through_layers
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    await write(b": waiting\n\n" if event is None else f"data: {event}\n\n".encode())
        except Refused as error:
            await write(f"data: {dumps(protocol.error(error.status, str(error), error.code))}\n\n".encode())
        await through_layers(b"data: [DONE]\n\n", more=False)


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine does, or None where the client goes away first: then it is cancelled."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0] in done else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def discard_body(request: HttpRequest) -> None:
    """Read what a refused client still sends, up to a limit: one that writes while its connection is closed sees no answer."""
    if "expect" in request.headers:  # it asks before it sends
        return
    left = MAX_DISCARDED_BYTES
    with contextlib.suppress(ClientDisconnect, TimeoutError, RuntimeError):  # the last where all of it was read
        async with asyncio.timeout(DISCARD_SECONDS):
            async for chunk in request.stream():
                left -= len(chunk)
                if left < 0:
                    break


async def read_body(request: HttpRequest) -> bytes:
    """Read a body. Raises Refused for one that is too large, as soon as that shows."""
    too_large = Refused(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal() and len(length) < 20) or int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise too_large
    except ClientDisconnect:
        raise Refused(400, "the client went away before the body was whole") from None
    return bytes(body)


dumps = json.JSONEncoder(allow_nan=False).encode  # in ASCII: models and clients may write halves of surrogate pairs


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, "application/json")


class Refusal(Response):
    """An error that is told at once; then what the client still sends is read, up to a limit, before the connection may be closed."""

    media_type = "application/json"

    def __init__(self, request: HttpRequest, error: Refused):
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.status in (429, 503) else {}
        headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        headers |= {"Connection": "close"} if error.status == 413 else {}  # the rest of the body may never come
        super().__init__(dumps(protocol.error(error.status, str(error), error.code)), error.status, headers)
        self._request = request

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        await discard_body(self._request)
        await send({"type": "http.response.body", "body": b""})


async def answer_refused(request: HttpRequest, error: Refused) -> Response:
    return Refusal(request, error)


def answer_http_error(request: HttpRequest, error: HTTPException) -> Response:
    """Answer what no route takes, and say what there is."""
    path, headers = repr(request.url.path[:80]), dict(error.headers or {})
    paths = ", ".join(route.path for route in request.app.routes if "{" not in route.path)
    told = {404: f"there is no {path}; there are {paths}", 405: f"{request.method} is not for {path}; allowed: {headers.get('Allow')}"}
    message = told.get(error.status_code, error.detail)
    return as_json(protocol.error(error.status_code, message), error.status_code, headers)
