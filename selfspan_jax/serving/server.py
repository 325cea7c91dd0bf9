"""Run a server: the socket, the signals, the workers that decode, and the application over them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import h11
import jax
import uvicorn
from tqdm import tqdm
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from selfspan_jax.attention.policies import Policy
from selfspan_jax.config import ServerConfig
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM
from selfspan_jax.serving import protocol
from selfspan_jax.serving.application import Server
from selfspan_jax.serving.http import DIRECT, dumps
from selfspan_jax.serving.workers import Workers

LINGER_SECONDS = 30.0  # after a signal, for clients to read what is written when nothing is decoded any more
# After so long a thread takes the interpreter from another. With Python's 5 ms, what a worker sends waits for tens of them to be received
# while the loop and the reader are busy, and the worker and its device wait with it.
SWITCH_SECONDS = 0.001


class Http(H11Protocol):
    """Answers what is no HTTP, such as a Content-Length that is no number, with an error as clients read it."""

    def send_400_response(self, msg: str) -> None:
        body = dumps(
            protocol.error(400, "the request is no HTTP that can be read: see its first line, its headers, its Content-Length")
        ).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        for event in (
            h11.Response(status_code=400, reason=b"Bad Request", headers=list(headers.items())),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def with_direct_writes(app: Any) -> Any:
    """Leave an application, in the scope of a request, what writes parts of a body that has begun to the connection: HTTP's chunks."""

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        cycle = getattr(send, "__self__", None)
        if isinstance(cycle, RequestResponseCycle) and scope["http_version"] == "1.1":

            async def write(part: bytes) -> None:
                if cycle.flow.write_paused and not cycle.disconnected:  # the client reads slowly
                    await cycle.flow.drain()
                if not cycle.disconnected:
                    cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))

            scope[DIRECT] = write
        await app(scope, receive, send)

    return wrapped


class Uvicorn(uvicorn.Server):
    """A signal lets running requests finish, and the program end as if asked to; a second one drops their clients, which cancels them.

    No client keeps it from ending: one that does not read its stream, or has sent half a body, is dropped `LINGER_SECONDS` after the last
    request has finished.
    """

    should_exit: bool

    def __init__(self, server: Server):
        # Clients' prompts are in no log; what uvicorn says below a warning is not shown.
        quiet: Any = {"log_config": None, "access_log": False, "server_header": False, "proxy_headers": False}
        super().__init__(uvicorn.Config(with_direct_writes(server.app), http=Http, ws="none", loop="asyncio", lifespan="on", **quiet))
        self._server = server

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        host, port = (sockets or [])[0].getsockname()[:2]
        try:
            await super().startup(sockets)
        except OSError as error:  # two servers took the address before either listened
            await self.lifespan.shutdown()
            raise _not_listened_on(host, port, error) from None
        self._loop = asyncio.get_running_loop()
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{self._server.model_name} is served at {url} (a page), {url}/v1 (OpenAI's API), {url}/metrics", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        lingering = asyncio.ensure_future(self._linger())
        await super().shutdown(sockets)
        lingering.cancel()

    async def _linger(self) -> None:
        while self._server.decodes:
            await asyncio.sleep(0.1)
        await asyncio.sleep(LINGER_SECONDS)
        self._drop_connections()

    def _drop_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: Any) -> None:
        # Not `force_exit`: uvicorn then leaves what runs to be cancelled, each with a traceback.
        then = self._drop_connections if self.should_exit else lambda: asyncio.ensure_future(self._server.drain())
        self.should_exit = True
        self._loop.call_soon_threadsafe(then)


@contextlib.contextmanager
def _switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def _compiling() -> Iterator[Callable[[int, int], None]]:
    """Show how many programs are compiled, and of how many: a bar on a terminal, else a line for each quarter; then what follows."""
    quarters, loading = -1, False
    with tqdm(desc="compiling", unit=" programs", leave=False, disable=None) as bar:

        def on_progress(done: int, of: int) -> None:
            nonlocal quarters, loading
            if bar.disable and 4 * done // of > quarters:
                quarters = 4 * done // of
                print(f"compiling: {done} of {of} programs", flush=True)
            bar.total = of
            bar.update(done - bar.n)
            if done == of and not loading:
                loading = True
                bar.write("loading: on a GPU each program runs once before the server listens", file=sys.stdout)
                sys.stdout.flush()

        yield on_progress


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Bind a TCP socket. Raises UserError where the address is in use, or none of this machine."""
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            # By its protocol asyncio knows it as TCP and sends what is written at once; else an event waits 40 ms for the client.
            bound = stack.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            raise _not_listened_on(host, port, error) from None
        yield bound


def _not_listened_on(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"--host {host} --port {port} cannot be listened on: {error.strerror}")


def serve(
    load: Callable[..., SpanLM], name: str, config: ServerConfig, mesh: str | None = None, attention: str | Policy | None = None
) -> None:
    """Serve a model until SIGTERM or SIGINT: then what runs is finished, and the rest refused.

    Args:
      load: makes the model, as for `Workers`; called once the address is taken, because it may take minutes.
      name: what clients call the model, unless the config says it.

    Raises: UserError for an address that cannot be listened on, and as `Workers`; DoesNotFit.
    """
    jax.config.update("jax_platforms", "cpu")  # devices are the workers'
    options: dict[str, Any] = {"on_cpu": config.serving_on_cpu, "mesh": mesh, "attention": attention}
    with listening(config.host, config.port) as bound, Workers(load, config.serving, **options) as workers:
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each piece for a client that has just gone away
        if (room := workers.num_pages * workers.config.page_tokens) < workers.context_tokens:
            print(f"--num-pages {workers.num_pages} have room for {room} of the {workers.context_tokens} tokens of a sequence", flush=True)
        with _compiling() as on_progress:
            workers.warm_up(on_progress)
        gc.collect()
        gc.freeze()  # what stays is not looked at again
        key = os.environ.get("SELFSPAN_API_KEY", "").strip() or None if config.api_key is None else config.api_key
        options = {"attention": attention, "api_key": key, "examples": _examples(workers.reader.task)}
        options["device"] = workers.device
        with _switching():
            Uvicorn(Server(workers.reader, workers, config.model_name or name, **options)).run([bound])


def _examples(task: Any) -> list[str]:
    """Return a few prompts that a model of a task was not trained on, for the page; none of a task that draws none."""
    if not hasattr(task, "held_out") or not getattr(task, "is_generated", True):
        return []
    return [example.prompt for examples in task.held_out(5, seed=1).values() for example in examples]
