"""Schedulers in processes of their own, each with a model on its own devices, under the interface of one scheduler.

Python runs one thread of a process at a time. A server that writes events in the scheduler's process makes it wait, and the device with
it. So a worker does nothing but decode: requests come to it through a pipe, and what a round gave goes back as one message. With `data=N`
in a mesh there are N workers, each with a whole model, and a request goes to the one that has the fewest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from selfspan_jax.attention.policies import Policy
from selfspan_jax.config import ServingConfig
from selfspan_jax.errors import UserError
from selfspan_jax.lm import Reader, SpanLM
from selfspan_jax.parallel import memory
from selfspan_jax.parallel.mesh import axis_sizes
from selfspan_jax.serving.requests import Closed, Finished, QueueFull, Request, Stats, Tokens
from selfspan_jax.serving.running import LogProbs
from selfspan_jax.serving.scheduler import Scheduler, Ticket

_NO_QUEUE = 2**31 - 1  # a worker takes what it is given: who gives it counts what waits
_LOG = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What a worker says when its model is loaded: what encodes and reads texts, how its scheduler was made, and on what device."""

    reader: Reader
    vocab_size: int
    context_tokens: int
    num_pages: int
    device: str
    keeps_programs: bool
    """Whether what it compiles is there for others."""
    config: ServingConfig


class Compiled(NamedTuple):
    """What a worker says while it compiles: how many programs it has, and of how many."""

    done: int
    of: int


class Round(NamedTuple):
    """What a round gave the requests of a worker, those of all of them one after the other, and what it counts afterwards."""

    numbers: list[int]
    sizes: list[int]
    token_ids: Int[np.ndarray, "C"]
    num_attended: Int[np.ndarray, "C"]
    others: dict[int, tuple[Finished | None, str | None, LogProbs | None]]
    """By the place in `numbers`, where there is any."""
    stats: Stats

    @classmethod
    def of(cls, given: Sequence[tuple[int, Tokens]], stats: Stats) -> Round:
        """Put together what was given to requests."""
        tokens = [own for _, own in given]
        token_ids, num_attended = (np.concatenate([own[i] for own in (Tokens.none(), *tokens)]) for i in range(2))
        others = {at: own[2:] for at, own in enumerate(tokens) if own.finished or own.logprobs is not None}
        sizes = [len(own.token_ids) for own in tokens]
        return cls([number for number, _ in given], sizes, token_ids, num_attended, others, stats)

    def given(self) -> Iterator[tuple[int, Tokens]]:
        """Take it apart again."""
        end = 0
        for at, (number, size) in enumerate(zip(self.numbers, self.sizes)):
            start, end = end, end + size
            yield number, Tokens(self.token_ids[start:end], self.num_attended[start:end], *self.others.get(at, ()))


# -------------------------------------------------------------------------------------------------------- in a worker


def work(
    connection: Connection,
    load: Callable[..., SpanLM],
    mesh: str | None,
    devices: str | None,
    num_workers: int,
    config: ServingConfig,
    on_cpu: ServingConfig | None,
    attention: str | Policy | None,
) -> None:
    """Load a model, say so; compile when told, say so; run a scheduler until the other end says to close. If that is gone, end at once."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a command, and for the one that serves to answer
        signal.signal(number, signal.SIG_IGN)
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    memory.share_host_memory(num_workers)
    given: list[tuple[int, Tokens]] = []
    tickets: dict[int, Ticket] = {}
    scheduler: Scheduler
    may_compile = threading.Event()

    def keep(number: int) -> Callable[[Tokens], None]:
        return lambda tokens: given.append((number, tokens))

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                name, argument, request = connection.recv()
                if name == "submit":
                    tickets[argument] = scheduler.submit(request, keep(argument))
                elif name == "close":
                    scheduler.close(drain=argument)
                elif name == "compile":
                    may_compile.set()
                elif argument in tickets:
                    scheduler.cancel(tickets[argument])
        os._exit(1)

    def tell() -> None:
        connection.send(Round.of(given, scheduler.stats))
        for number, tokens in given:
            if tokens.finished:
                del tickets[number]
        given.clear()

    threading.Thread(target=listen, name="listener", daemon=True).start()
    try:
        with memory.catch_out_of_memory():
            lm = load(mesh=mesh)
            chosen = on_cpu if on_cpu and jax.default_backend() == "cpu" else config
            unbounded = dataclasses.replace(chosen, max_queue=_NO_QUEUE)
            scheduler = Scheduler(lm.engine, unbounded, attention=attention, stop_ids=lm.end_ids[1:])
            kind, reader = jax.devices()[0].device_kind, Reader(lm.task, lm.config, lm.vocab)
            kept = bool(jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
            sizes = lm.engine.vocab_size, scheduler.context_tokens, scheduler.num_pages
            connection.send(Loaded(reader, *sizes, kind, kept, dataclasses.replace(chosen, page_tokens=scheduler.config.page_tokens)))
            may_compile.wait()
            scheduler.warm_up(on_progress=lambda *numbers: connection.send(Compiled(*numbers)))
    except (UserError, NotImplementedError, OSError) as error:
        connection.send(error)
        return
    gc.collect()
    gc.freeze()  # what stays is not looked at again between chunks
    connection.send(scheduler.stats)
    scheduler.run(tell)
    connection.send(None)


# ------------------------------------------------------------------------------------------- in the process that serves


def shares(mesh: str | None, visible: str | None) -> list[tuple[str | None, str | None]]:
    """Divide a mesh into those of its workers: the mesh of each, and which of CUDA's devices it sees; None: all.

    Args:
      visible: what CUDA_VISIBLE_DEVICES says, if it is set.

    Raises: UserError for a wrong mesh, and one of more devices than are visible.
    """
    sizes = axis_sizes(mesh) if mesh else {}
    if (number := sizes.pop("data", 1)) == 1:
        return [(mesh, None)]
    own, each = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or None, math.prod(sizes.values())
    devices = [str(i) for i in range(number * each)] if visible is None else visible.split(",")
    if len(devices) < number * each:
        raise UserError(f"mesh is {mesh!r}: takes {number * each} devices, CUDA_VISIBLE_DEVICES has {len(devices)}")
    return [(own, ",".join(devices[i * each : (i + 1) * each])) for i in range(number)]


@dataclasses.dataclass(eq=False)
class _Worker:
    process: Any
    connection: Connection
    stats: Stats = dataclasses.field(default_factory=Stats)
    open: dict[int, Callable[[Tokens], None]] = dataclasses.field(default_factory=dict)
    """Who gets the tokens of the requests that have not ended, by their numbers."""
    ended: bool = False

    def send(self, name: str, argument: Any = None, request: Request | None = None) -> None:
        with contextlib.suppress(OSError):  # it has ended, as `Workers.run` finds
            self.connection.send((name, argument, request))

    def receive(self, meanwhile: str, on_progress: Callable[[int, int], None] = lambda done, of: None) -> Any:
        """Wait for a word of its preparation; raise what it raised, and ChildProcessError where it has ended."""
        try:
            while isinstance(said := self.connection.recv(), Compiled):
                on_progress(*said)
        except EOFError:
            raise ChildProcessError(f"the process that decodes {self.how_it_ended()} while {meanwhile}") from None
        if isinstance(said, BaseException):
            raise said
        return said

    def how_it_ended(self) -> str:
        """Wait for its end, and say how it ended."""
        self.process.join()
        code = self.process.exitcode
        return f"ended with status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


class Workers:
    """Run requests in other processes, each as if it were alone. A context manager, at whose end they end.

    `submit`, `cancel`, `close` and `stats` are for any thread, `run` for one; see `Scheduler`.

    Args:
      load: makes the model, given its `mesh`; it travels to the workers, so it is a function of a module, a method, or a partial of these.
      on_cpu: in place of `config` where the devices are CPUs.
      mesh: as in data=2,tensor=2: how many workers, and how many devices each has.

    Raises: UserError for a mesh that there are no devices for, and what `load` and `Scheduler` raise.
    """

    def __init__(
        self,
        load: Callable[..., SpanLM],
        config: ServingConfig,
        *,
        on_cpu: ServingConfig | None = None,
        mesh: str | None = None,
        attention: str | Policy | None = None,
    ):
        self._lock = threading.Lock()
        self._closing = False
        self._numbers = itertools.count()
        self._workers: list[_Worker] = []
        context = multiprocessing.get_context("spawn")
        try:
            each = shares(mesh, os.environ.get("CUDA_VISIBLE_DEVICES"))
            for own_mesh, devices in each:
                ours, theirs = context.Pipe()
                arguments = (theirs, load, own_mesh, devices, len(each), config, on_cpu, attention)
                process = context.Process(target=work, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))
            loaded: list[Loaded] = [worker.receive("its model was loaded") for worker in self._workers]
            if len(kinds := dict.fromkeys(own.device for own in loaded)) > 1:
                raise UserError(f"mesh is {mesh!r}: there are not so many devices alike; workers have {', '.join(kinds)}")
        except BaseException:
            self.__exit__()
            raise
        self.reader, self.vocab_size, self.context_tokens = loaded[0][:3]
        self.device = f"{math.prod(axis_sizes(mesh).values())} x {loaded[0].device} ({mesh})" if mesh else loaded[0].device
        self.num_pages = min(own.num_pages for own in loaded)
        self.config = loaded[0].config
        self._keeps_programs = loaded[0].keeps_programs

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()

    def warm_up(self, on_progress: Callable[[int, int], None] = lambda done, of: None) -> None:
        """Have all programs compiled: by the first worker, whose programs the others take where they are kept, else by each.

        Args:
          on_progress: called now and then, with how many programs the first one has compiled, and of how many.
        """
        alone = 1 if self._keeps_programs else len(self._workers)
        for group in (self._workers[:alone], self._workers[alone:]):
            for worker in group:
                worker.send("compile")
            for worker in group:
                worker.stats = worker.receive("its programs were compiled", *([on_progress] if worker is self._workers[0] else []))

    def submit(self, request: Request, deliver: Callable[[Tokens], None]) -> tuple[_Worker, int]:
        """Take a request; `deliver`, which raises nothing, gets its tokens as they come, in the thread of `run`.

        Raises: UserError for a request that can never run, QueueFull, Closed.
        """
        request.check(self.vocab_size, self.context_tokens, self.num_pages * self.config.page_tokens)
        with self._lock:
            left = [worker for worker in self._workers if not worker.ended]
            if self._closing or not left:
                raise Closed("the workers take no more requests")
            worker = min(left, key=lambda own: len(own.open))
            if len(worker.open) >= self.config.max_requests:  # no matter what its last round knew of
                raise QueueFull(f"{self.config.max_queue} requests wait already")
            number = next(self._numbers)
            worker.open[number] = deliver
            worker.send("submit", number, request)
        return worker, number

    def cancel(self, ticket: tuple[_Worker, int]) -> None:
        """End a request at the next chunk; one that has ended stays as it is."""
        worker, number = ticket
        with self._lock:
            worker.send("cancel", number)

    def close(self, *, drain: bool) -> None:
        """Take no more requests and let `run` return: once all have ended, or, without `drain`, once they are cancelled."""
        with self._lock:
            self._closing = True
            for worker in self._workers:
                worker.send("close", drain)

    @property
    def stats(self) -> Stats:
        """Add up what the workers counted after their last rounds."""
        return Stats.sum([worker.stats for worker in self._workers])

    def run(self, after_round: Callable[[], None] = lambda: None) -> None:
        """Hand out what workers give, and call `after_round` after each message, until all have ended.

        Where one ends that was not closed, its requests fail, and others go on.
        """
        while left := {worker.connection: worker for worker in self._workers if not worker.ended}:
            for connection in wait(list(left)) if len(left) > 1 else list(left):
                self._hand_out(left[connection])  # type: ignore[index]
                after_round()

    def _hand_out(self, worker: _Worker) -> None:
        try:
            said: Round | None = worker.connection.recv()
        except (EOFError, OSError):
            said = None
        if said is not None:
            worker.stats = said.stats
            for number, tokens in said.given():
                (worker.open.pop if tokens.finished else worker.open.__getitem__)(number)(tokens)
            return
        with self._lock:
            worker.ended, worker.stats = True, worker.stats.ended()
        if not self._closing:
            _LOG.error("a process that decodes %s, and %d requests with it", worker.how_it_ended(), len(worker.open))
        for number in list(worker.open):
            worker.open.pop(number)(Tokens.none("error", "the process that decodes has ended"))
