"""Scheduler: many requests through one running decode state (continuous batching, Orca, OSDI 2022).

Each round it frees the places of what has ended, admits requests that wait, has a bounded part of their prompts read, and has a chunk
of tokens decoded for all that run. The device is one round ahead: while it works, the host hands out the tokens of the round before.

Memory is given in pages (PagedAttention, 2309.06180), to a sequence as it grows. Prompts that begin alike share the pages of their
beginning. Where no page is left, the youngest sequence gives its pages back and waits to be read again, what it has written included.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from selfspan_jax.attention.policies import Policy, get_policy
from selfspan_jax.config import DecodeConfig, Implementation, SamplingFields, ServingConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.errors import UserError
from selfspan_jax.neighbours.query_driven import check_keys
from selfspan_jax.parallel.mesh import num_data_shards
from selfspan_jax.serving.host_pages import WRITTEN_AT_ONCE
from selfspan_jax.serving.pages import Forecast, Pages, page_keys
from selfspan_jax.serving.programs import NEUTRAL, Programs, level_of, neutral_sampling
from selfspan_jax.serving.requests import Closed, Finished, QueueFull, Request, Stats, Tokens, joined
from selfspan_jax.serving.running import Decoded, LogProbs
from selfspan_jax.tiers.engine import HostEngine

ADMITTED_SHARE = 16  # of the places: one in so many is free before requests are admitted where `reads_per_chunk` is None
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request in the scheduler's hands: what `Scheduler.cancel` takes. Its fields are the scheduler's own."""

    request: Request
    deliver: Callable[[Tokens], None]
    number: int  # in the order of arrival
    token_ids: Int[np.ndarray, "T"]  # to be read: the prompt; for a sequence that lost its pages also what it has written
    keys: list[bytes]
    goes_on: bool  # after `<solve>`
    pages: list[int] = dataclasses.field(default_factory=list)
    num_read: int = 0
    num_shared: int = 0  # of those, in pages that others had read
    place: int | None = None
    num_new: int = 0  # tokens that it had sampled when it was admitted
    written: list[Int[np.ndarray, "C"]] = dataclasses.field(default_factory=list)
    num_written: int = 0
    finished: Finished | None = None

    def __post_init__(self):
        self.prompt_tokens = len(self.token_ids)
        self.level = level_of(self.request)

    def outlook(self, num_new: int, num_shared: int) -> tuple[int, int]:
        """Return how many tokens have pages of its own once it has sampled `num_new`, and how many are expected to follow."""
        return self.prompt_tokens + num_new - num_shared, max((self.request.expected_tokens or 0) - num_new, 0)


class _Chunk(NamedTuple):
    """A chunk that was dispatched, and who has each place of it."""

    decoded: Decoded
    tickets: dict[int, Ticket]


class Scheduler:
    """Run requests of one model, each as if it were alone: the same tokens, the same attended tokens.

    One thread drives it, by `run` or `run_once`; `submit`, `cancel`, `close` and `stats` are for any thread.

    Args:
      engine: the model, on one device or divided over `tensor`.
      attention: a policy or its name, for all requests; by default what the model was trained with.
      stop_ids: that end a sequence beside `<eos>`.

    Raises: UserError for a context beyond the model's and a mesh that divides sequences; DoesNotFit where no page fits into memory.
    """

    def __init__(
        self,
        engine: Engine,
        config: ServingConfig | None = None,
        *,
        attention: str | Policy | None = None,
        stop_ids: tuple[int, ...] = (),
        implementation: Implementation | None = None,
    ):
        config = ServingConfig() if config is None else config
        context = engine.config.max_context_tokens
        self.context_tokens = context if config.context_tokens is None else config.context_tokens
        if self.context_tokens > context:
            raise UserError(f"context_tokens is {self.context_tokens}; the model's context has {context}")
        if engine.config.mask == "memory":
            raise UserError("the model's layers have a memory, of which a server keeps no pages")
        if engine.mesh is not None and num_data_shards(engine.mesh) * engine.mesh.shape["context"] > 1:
            raise UserError("mesh: a scheduler takes tensor (decode.py serve: data too), no context: its sequences share one cache")
        if isinstance(engine, HostEngine):  # each page of a prompt is one write of the program that reads it: fewer, larger ones
            config = dataclasses.replace(config, page_tokens=max(config.page_tokens, config.prefill_tokens // WRITTEN_AT_ONCE))
        self.engine, self.config = engine, config
        policy = get_policy(engine.config.mask if attention is None else attention)
        check_keys(policy, "kv_memory='host'" if isinstance(engine, HostEngine) else None)
        self.decode_config = DecodeConfig(policy, max_new_tokens=1, implementation=implementation, stop_ids=stop_ids)
        self.programs = Programs(engine, config, self.decode_config, self.context_tokens)
        self.num_pages = self.programs.num_pages
        self._lock = threading.Condition()
        self._incoming: collections.deque[Ticket] = collections.deque()
        self._cancelled: collections.deque[Ticket] = collections.deque()
        self._closing = self._closed = False
        self._num_submitted = 0
        self._waiting: list[Ticket] = []  # in the order of arrival
        self._counts: collections.Counter[str] = collections.Counter()
        self._ended: collections.Counter[str] = collections.Counter()
        self._clear()

    def _clear(self) -> None:
        """Have nothing admitted."""
        size = self.config.num_sequences
        self.pages = Pages(self.num_pages)
        self._reading: list[Ticket] = []
        self._running: dict[int, Ticket] = {}
        self._places = list(range(size - 1, -1, -1))  # free ones
        self._being_read: set[bytes] = set()
        self._in_flight: collections.deque[_Chunk] = collections.deque()
        self._table = np.full((size, self.programs.pages_each), -1, np.int32)
        self._sampling = neutral_sampling(size)
        # Of each place: tokens of the prompt, those that have been sampled when all that was dispatched is done, unless it ends, and
        # how many it takes at most; tokens that its pages have room for. A round touches the places that change, and no others.
        self._prompt_tokens, self._until, self._limit, self._room = (np.zeros(size, np.int32) for _ in range(4))

    # ------------------------------------------------------------------------------------------------- for any thread

    def submit(self, request: Request, deliver: Callable[[Tokens], None]) -> Ticket:
        """Take a request; `deliver` gets its tokens as they come, in the scheduler's thread. What it raises ends the request.

        Raises: UserError for a request that can never run, QueueFull, Closed.
        """
        return self._submit(request, deliver, self.config.max_requests)

    def cancel(self, ticket: Ticket) -> None:
        """End a request at the next chunk; one that has ended stays as it is."""
        with self._lock:
            self._cancelled.append(ticket)
            self._lock.notify()

    def close(self, *, drain: bool) -> None:
        """Take no more requests and let `run` return: once all have ended, or, without `drain`, once they are cancelled."""
        with self._lock:
            self._closing = True
            self._closed = self._closed or not drain
            self._lock.notify()

    @property
    def stats(self) -> Stats:
        """Count what there is."""
        pages = self.pages
        return Stats(
            running=len(self._running),
            reading=len(self._reading),
            waiting=len(self._waiting) + len(self._incoming),
            pages_used=pages.num_used,
            pages_cached=pages.num_cached,
            pages_free=pages.num_free,
            finished=self._ended.copy(),
            **self._counts,  # type: ignore[arg-type]
        )

    def _submit(self, request: Request, deliver: Callable[[Tokens], None], max_requests: int | None) -> Ticket:
        request.check(self.engine.vocab_size, self.context_tokens, self.num_pages * self.config.page_tokens)
        token_ids = np.asarray(request.prompt_ids).astype(np.int32)
        keys, goes_on = page_keys(token_ids, self.config.page_tokens), self._goes_on(token_ids)
        with self._lock:
            if self._closing:
                raise Closed("the scheduler takes no more requests")
            placed = self.config.num_sequences - len(self._places)
            if max_requests is not None and placed + len(self._waiting) + len(self._incoming) >= max_requests:
                raise QueueFull(f"{self.config.max_queue} requests wait already")
            ticket = Ticket(request, deliver, self._num_submitted, token_ids, keys, goes_on)
            self._num_submitted += 1
            self._incoming.append(ticket)
            self._lock.notify()
        return ticket

    # --------------------------------------------------------------------------------------------- for the one thread

    def run(self, after_round: Callable[[], None] = lambda: None) -> None:
        """Run rounds until the scheduler is closed, and call `after_round` after each; wait while there is nothing to do."""
        while True:
            more = self.run_once()
            after_round()
            if more:
                continue
            with self._lock:
                while not (self._incoming or self._cancelled or self._closing):
                    self._lock.wait()
                if self._closing and not self._incoming:
                    return

    def run_once(self) -> bool:
        """Run one round; return whether there is more to do.

        Where the device fails, the requests that were admitted end with its error; those that wait go on.
        """
        self._take()
        try:
            self._admit()
            num_read = 0
            while self._reading and num_read != self.config.reads_per_chunk:
                self._read()
                num_read += 1
            ahead = int(self._decode())
            while len(self._in_flight) > ahead:
                self._collect()
        except jax.errors.JaxRuntimeError as error:
            self._fail(str(error))
        return bool(self._waiting or self._reading or self._running or self._in_flight)

    def generate(self, requests: Sequence[Request], on_end: Callable[[], None] = lambda: None) -> list[Tokens]:
        """Run requests to their ends, call `on_end` at each, and return all tokens of each. Not beside `run`."""
        parts: list[list[Tokens]] = [[] for _ in requests]

        def deliver(part: list[Tokens], tokens: Tokens) -> None:
            part.append(tokens)
            if tokens.finished:
                on_end()

        tickets = [self._submit(request, functools.partial(deliver, part), None) for request, part in zip(requests, parts)]
        try:
            while self.run_once():
                pass
        finally:  # interrupted, nothing of them is left behind
            for ticket in tickets:
                self.cancel(ticket)
        return [joined(part) for part in parts]

    def warm_up(self, **options: Any) -> None:
        """Compile every program, several at once, so that none is compiled later. Options are those of `Programs.warm_up`."""
        self.programs.warm_up(self.config.chunk_tokens, **options)

    def _take(self) -> None:
        """Take what other threads have left."""
        with self._lock:
            incoming, self._incoming = self._incoming, collections.deque()
            cancelled, self._cancelled = self._cancelled, collections.deque()
            closed = self._closed
        self._waiting.extend(incoming)
        for ticket in [*cancelled, *((*self._running.values(), *self._reading, *self._waiting) if closed else ())]:
            if not ticket.finished:
                self._finish(ticket, Tokens.none("cancelled"))

    def _admit(self) -> None:
        """Give waiting requests places and pages, in the order of arrival.

        One waits on, and does not hold up those behind it, while another prompt that begins alike is read: it shares the pages then.
        One that is admitted leaves a page for each sequence that is there, so that few lose theirs; one of an expected length leaves what
        all are expected to need, or waits on and does not hold up those behind it. Where all that wait are read before a chunk begins,
        several are admitted at once: a reading takes about as long for one prompt as for those that fill it.
        """
        several = min(len(self._waiting), self.config.num_sequences // ADMITTED_SHARE)
        if self.config.reads_per_chunk is None and self._running and len(self._places) < several:
            return
        at, forecast = 0, None
        while self._places and at < min(len(self._waiting), 2 * self.config.num_sequences):
            ticket = self._waiting[at]
            shareable = ticket.keys[: (len(ticket.token_ids) - 1) // self.config.page_tokens]  # the last token is read in any case
            pages = self.pages.share(shareable)
            waits = len(pages) < len(shareable) and shareable[len(pages)] in self._being_read
            if not waits and ticket.request.expected_tokens is not None:
                forecast = forecast or self._forecast()
                waits = not forecast.admit(*ticket.outlook(ticket.num_new, len(pages) * self.config.page_tokens))
            if waits:
                self.pages.release(pages)
                at += 1
                continue
            first_chunk = min(self.config.chunk_tokens, ticket.request.max_new_tokens - ticket.num_new)
            missing = self._num_pages(len(ticket.token_ids) + first_chunk) - len(pages)
            reserve = len(self._running) + len(self._reading)
            new = self.pages.allocate(missing) if missing + reserve <= self.pages.num_available else None
            if new is None:
                self.pages.release(pages)
                return
            del self._waiting[at]
            ticket.pages, ticket.place = pages + new, self._places.pop()
            ticket.num_read = ticket.num_shared = len(pages) * self.config.page_tokens
            self._being_read.update(ticket.keys[len(pages) :])
            self._counts["prefix_hit_tokens"] += ticket.num_read
            self._reading.append(ticket)

    def _forecast(self) -> Forecast:
        """Forecast the pages of what runs and is read."""
        until, sizes = self._until.tolist(), (self.num_pages, self.config.page_tokens, self.config.chunk_tokens, self.context_tokens)
        there = [ticket.outlook(until[place], ticket.num_shared) for place, ticket in self._running.items()]
        there += [ticket.outlook(ticket.num_new, ticket.num_shared) for ticket in self._reading]
        return Forecast(np.array(there, np.int64).reshape(-1, 2), *sizes)

    def _read(self) -> None:
        """Have the next part of prompts read: of the first one, and of others that are as far.

        Where all are read before a chunk begins, the least advanced come first, and of these the longest: so the last parts of prompts,
        which are shorter, are read together.
        """
        head = self._reading[0]
        if self.config.reads_per_chunk is None:
            head = min(self._reading, key=lambda ticket: (ticket.num_read, -self._part_tokens(ticket)))
        first, queries = head.num_read, self._part_tokens(head)
        alike = [ticket for ticket in self._reading if ticket.num_read == first and ticket.goes_on == head.goes_on]
        alike.sort(key=lambda ticket: abs(self._part_tokens(ticket) - queries))  # the head stays first: it is among the nearest
        group = alike[: self.programs.prompts_at_once(queries, responses=head.goes_on)]
        self.programs.read(group, first, queries, responses=head.goes_on)
        for ticket in group:
            end = min(first + queries, len(ticket.token_ids))
            self._counts["prompt_tokens"] += end - first
            for page in range(first // self.config.page_tokens, end // self.config.page_tokens):
                self.pages.name(ticket.pages[page], ticket.keys[page])
                self._being_read.discard(ticket.keys[page])
            ticket.num_read = end
            if end == len(ticket.token_ids):
                self._reading.remove(ticket)
                self._start(ticket)

    def _part_tokens(self, ticket: Ticket) -> int:
        return self.programs.part_tokens(len(ticket.token_ids) - ticket.num_read, responses=ticket.goes_on)

    def _start(self, ticket: Ticket) -> None:
        """Let a sequence run whose prompt is read."""
        place, request = ticket.place, ticket.request
        assert place is not None
        self._running[place] = ticket
        self._prompt_tokens[place], self._until[place], self._limit[place] = ticket.prompt_tokens, ticket.num_new, request.max_new_tokens
        self._set_pages(ticket, [])
        for own, value, neutral in zip(self._sampling, SamplingFields.of(request.sampling), NEUTRAL):
            own[place] = neutral if value is None else value

    def _set_pages(self, ticket: Ticket, new: list[int]) -> None:
        """Give a running sequence new pages, and write those that its place does not have yet where the next chunk finds them."""
        place, ticket.pages = ticket.place, [*ticket.pages, *new]
        written = self._room[place] // self.config.page_tokens
        self._table[place, written : len(ticket.pages)] = ticket.pages[written:]
        self._room[place] = len(ticket.pages) * self.config.page_tokens

    def _decode(self) -> bool:
        """Have a chunk decoded for all that run, if any does; places that are full afterwards are free from then on."""
        ends = self._prompt_tokens + self._next_until()
        for ticket in sorted((self._running[place] for place in np.flatnonzero(ends > self._room).tolist()), key=_number):
            if ticket.place is not None:  # it may have lost its pages to another one
                self._grow(ticket, int(ends[ticket.place]))
        if not self._running:
            return False
        before, self._until = self._until, self._next_until()
        tickets = self._running.copy()
        level = max(ticket.level for ticket in tickets.values())
        decoded = self.programs.decode(level, self.config.chunk_tokens, self._table, self._until, self._sampling)
        self.programs.write_pages(self._prompt_tokens + before, self._prompt_tokens + self._until, self._table)
        for array in jax.tree.leaves(decoded):
            array.copy_to_host_async()
        for place in np.flatnonzero((self._until == self._limit) & (self._limit > 0)).tolist():
            self._vacate(tickets[place])
        self._in_flight.append(_Chunk(decoded, tickets))
        return True

    def _next_until(self) -> Int[np.ndarray, "B"]:
        """Count the tokens that each place will have sampled after the next chunk at most."""
        return np.minimum(self._until + self.config.chunk_tokens, self._limit)

    def _collect(self) -> None:
        """Wait for the oldest chunk in flight and hand out its tokens."""
        chunk = self._in_flight[0]
        began = time.perf_counter()
        token_ids, num_attended, done, logprobs, host_rows = jax.tree.map(np.asarray, chunk.decoded)
        self._counts["waited_seconds"] += time.perf_counter() - began  # type: ignore[assignment]
        self._in_flight.popleft()
        counts, sums, done = np.count_nonzero(num_attended, axis=1).tolist(), num_attended.sum(axis=1).tolist(), done.tolist()
        chosen = [(place, ticket) for place, ticket in chunk.tickets.items() if not ticket.finished]
        self._counts["generated_tokens"] += sum(counts[place] for place, _ in chosen)
        self._counts["attended_tokens"] += sum(sums[place] for place, _ in chosen)
        if host_rows is not None:
            self._counts.update(copied_rows=int(host_rows[0]), missed_rows=int(host_rows[1]))
        for place, ticket in chosen:
            count, length = counts[place], ticket.prompt_tokens + ticket.num_written
            tokens, attended = token_ids[place, :count], num_attended[place, :count]
            self._counts["context_tokens"] += count * length + count * (count + 1) // 2
            ticket.written.append(tokens)
            ticket.num_written += count
            full = ticket.num_written == ticket.request.max_new_tokens
            finished: Finished | None = "stop" if done[place] else "length" if full else None
            scores = LogProbs(*(x[:count, place] for x in logprobs)) if ticket.request.logprobs else None
            if finished:
                self._finish(ticket, Tokens(tokens, attended, finished, logprobs=scores))
            elif count:
                self._deliver(ticket, Tokens(tokens, attended, logprobs=scores))

    def _deliver(self, ticket: Ticket, tokens: Tokens) -> None:
        try:
            ticket.deliver(tokens)
        except Exception:  # whatever its own function raises ends this request, and no other
            _LOG.exception("request %d takes no more tokens", ticket.number)
            if not ticket.finished:
                self._release(ticket, "error")

    def _finish(self, ticket: Ticket, tokens: Tokens) -> None:
        assert tokens.finished
        self._release(ticket, tokens.finished)
        self._deliver(ticket, tokens)

    def _release(self, ticket: Ticket, finished: Finished) -> None:
        """Take everything from a request, wherever it is. Pages of what it has read and written are kept for others."""
        if finished in ("stop", "length"):
            keys = page_keys(self._all_tokens(ticket), self.config.page_tokens, ticket.keys)
            for page, key in zip(ticket.pages, keys):
                self.pages.name(page, key)
        ticket.finished = finished
        self._ended[finished] += 1
        if not ticket.pages:  # only those that wait have none
            self._waiting.remove(ticket)
        self._withdraw(ticket)

    def _withdraw(self, ticket: Ticket) -> None:
        """Take place and pages from a request, if it has any."""
        if ticket in self._reading:
            self._reading.remove(ticket)
            self._being_read.difference_update(ticket.keys[ticket.num_read // self.config.page_tokens :])
        self._vacate(ticket)
        self.pages.release(ticket.pages)
        ticket.pages = []

    def _vacate(self, ticket: Ticket) -> None:
        if (place := ticket.place) is not None:
            self._running.pop(place, None)
            self._places.append(place)
            ticket.place = None
            self._table[place] = -1
            self._prompt_tokens[place] = self._until[place] = self._limit[place] = self._room[place] = 0

    def _grow(self, ticket: Ticket, num_tokens: int) -> None:
        """Give a running sequence the pages of its next chunk; where there is none, the youngest sequence loses its own."""
        while ticket.place is not None and not ticket.finished:
            new = self.pages.allocate(self._num_pages(num_tokens) - len(ticket.pages))
            if new is not None:
                self._set_pages(ticket, new)
                return
            if self._in_flight:  # whose tokens are needed to read a sequence again; and some may have ended
                self._collect()
            else:
                self._preempt(max((*self._running.values(), *self._reading), key=_number))

    def _preempt(self, ticket: Ticket) -> None:
        """Take a sequence's pages; it waits until all its tokens can be read again."""
        self._withdraw(ticket)
        ticket.token_ids, ticket.num_read, ticket.num_new = self._all_tokens(ticket), 0, ticket.num_written
        ticket.keys, ticket.goes_on = page_keys(ticket.token_ids, self.config.page_tokens, ticket.keys), self._goes_on(ticket.token_ids)
        bisect.insort(self._waiting, ticket, key=_number)
        self._counts["preemptions"] += 1

    def _fail(self, error: str) -> None:
        """End the requests that were admitted with an error, and begin with an empty state."""
        tickets = {*self._running.values(), *self._reading, *(ticket for chunk in self._in_flight for ticket in chunk.tickets.values())}
        for ticket in sorted(tickets, key=_number):
            if not ticket.finished:
                self._finish(ticket, Tokens.none("error", error))
        self._clear()
        self.programs.reset()

    def _all_tokens(self, ticket: Ticket) -> Int[np.ndarray, "T"]:
        return np.concatenate([ticket.token_ids[: ticket.prompt_tokens], *ticket.written])

    def _goes_on(self, token_ids: Int[np.ndarray, "T"]) -> bool:
        return self.engine.goes_on(token_ids[None], np.array([len(token_ids)]))

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_tokens)


def _number(ticket: Ticket) -> int:
    return ticket.number
