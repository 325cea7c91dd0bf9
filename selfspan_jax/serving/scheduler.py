"""Scheduler: many requests through one running decode state (continuous batching, Orca, OSDI 2022).

Each round it frees the places of what has ended, admits requests that wait, has a bounded part of their prompts read, and has a chunk
of tokens decoded for all that run. The device is one round ahead: while it works, the host hands out the tokens of the round before.

Memory is given in pages (PagedAttention, 2309.06180), to a sequence as it grows. Prompts that begin alike share the pages of their
beginning. Where no page is left, the youngest sequence gives its pages back and waits to be read again, what it has written included.
"""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import dataclasses
import functools
import logging
import os
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
from selfspan_jax.parallel import memory
from selfspan_jax.parallel.mesh import num_data_shards
from selfspan_jax.serving.pages import Pages, page_keys
from selfspan_jax.serving.requests import Closed, Finished, QueueFull, Request, Stats, Tokens, joined
from selfspan_jax.serving.running import Decoded, LogProbs, Prompts, decode_chunk, empty_state, read_prompts
from selfspan_jax.tiers import HostEngine

MAX_LOGPROBS = 20  # most likely tokens whose log-probabilities a request may ask for
_NEUTRAL = SamplingFields(0.0, 0.0, 0, 0.0, 1.0)
# What a chunk computes: the first so many fields of sampling, and so many log-probabilities. Each costs more than the one before.
_LEVELS = ((0, 0), (1, 0), (len(_NEUTRAL), 0), (len(_NEUTRAL), MAX_LOGPROBS))
_KEY_TOKENS = 64  # what numbers of keys are multiples of
_CACHE_SHARE = 0.8  # of free memory; the rest is for what programs need meanwhile
_UNKNOWN_MEMORY_BYTES = 2**30  # taken for the cache where the device does not say what it has
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
    place: int | None = None
    num_new: int = 0  # tokens that it had sampled when it was admitted
    written: list[Int[np.ndarray, "C"]] = dataclasses.field(default_factory=list)
    num_written: int = 0
    finished: Finished | None = None

    def __post_init__(self):
        self.prompt_tokens = len(self.token_ids)
        self.level = _level(self.request)


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
        if isinstance(engine, HostEngine):
            raise UserError("kv_memory is 'host'; a server's pages lie on the device, allowed: 'device'")
        if engine.mesh is not None and num_data_shards(engine.mesh) > 1:
            raise UserError("a mesh for serving has data=1: all sequences share one cache")
        self.engine, self.config = engine, config
        policy = get_policy(engine.config.mask if attention is None else attention)
        self.decode_config = DecodeConfig(policy, max_new_tokens=1, implementation=implementation, stop_ids=stop_ids)
        self._pages_each = -(-self.context_tokens // config.page_tokens)
        self._capacity = self._pages_each * config.page_tokens
        self.num_pages = self._pages_that_fit() if config.num_pages is None else config.num_pages
        # Few shapes: many short prompts or one long one, always `prefill_tokens` in all. The first part of a prompt has itself as keys;
        # those that follow have one of few numbers of them.
        self._query_sizes = [config.prefill_tokens]
        self._query_sizes += [size for size in (config.min_read_tokens * 2**i for i in range(24)) if size < config.prefill_tokens][::-1]
        last = -(-(self._capacity + config.prefill_tokens) // _KEY_TOKENS) * _KEY_TOKENS
        self._key_sizes = [last]
        while self._key_sizes[0] > 4 * config.prefill_tokens:
            self._key_sizes.insert(0, -(-self._key_sizes[0] // (4 * _KEY_TOKENS)) * _KEY_TOKENS)
        self._lock = threading.Condition()
        self._incoming: collections.deque[Ticket] = collections.deque()
        self._cancelled: collections.deque[Ticket] = collections.deque()
        self._closing = self._closed = False
        self._num_submitted = 0
        self._waiting: list[Ticket] = []  # in the order of arrival
        self._counts: collections.Counter[str] = collections.Counter()
        self._ended: collections.Counter[str] = collections.Counter()
        self._reset()

    def _reset(self) -> None:
        """Begin with an empty state, nothing admitted."""
        size = self.config.num_sequences
        self.pages = Pages(self.num_pages)
        self._reading: list[Ticket] = []
        self._running: dict[int, Ticket] = {}
        self._places = list(range(size - 1, -1, -1))  # free ones
        self._being_read: set[bytes] = set()
        self._in_flight: collections.deque[_Chunk] = collections.deque()
        self._table = np.full((size, self._pages_each), -1, np.int32)
        self._sampling = SamplingFields(*(np.full(size, value, np.array(value, f"{type(value).__name__}32").dtype) for value in _NEUTRAL))
        # Of each place: tokens of the prompt, those that have been sampled when all that was dispatched is done, unless it ends, and
        # how many it takes at most; tokens that its pages have room for. A round touches the places that change, and no others.
        self._prompt_tokens, self._until, self._limit, self._room = (np.zeros(size, np.int32) for _ in range(4))
        self._state: Any = None  # the memory of one that failed is free before the next one is allocated
        self._state = empty_state(
            self.engine.graph, self.engine.params, self.decode_config, self.num_pages * self.config.page_tokens, size, self._capacity
        )

    # ------------------------------------------------------------------------------------------------- for any thread

    def submit(self, request: Request, deliver: Callable[[Tokens], None]) -> Ticket:
        """Take a request; `deliver` gets its tokens as they come, in the scheduler's thread. What it raises ends the request.

        Raises: UserError for a request that can never run, QueueFull, Closed.
        """
        return self._submit(request, deliver, self.config.max_queue)

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
            submitted=self._num_submitted,
            finished=self._ended.copy(),
            **self._counts,  # type: ignore[arg-type]
        )

    def _submit(self, request: Request, deliver: Callable[[Tokens], None], max_queue: int | None) -> Ticket:
        request.check(self.engine.vocab_size, self.context_tokens, self.num_pages * self.config.page_tokens)
        token_ids = np.asarray(request.prompt_ids).astype(np.int32)
        keys, goes_on = page_keys(token_ids, self.config.page_tokens), self._goes_on(token_ids)
        with self._lock:
            if self._closing:
                raise Closed("the scheduler takes no more requests")
            if max_queue is not None and len(self._waiting) + len(self._incoming) >= max_queue:
                raise QueueFull(f"{max_queue} requests wait already")
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

    def generate(self, requests: Sequence[Request]) -> list[Tokens]:
        """Run requests to their ends and return all tokens of each. Not beside `run`."""
        parts: list[list[Tokens]] = [[] for _ in requests]
        tickets = [self._submit(request, part.append, None) for request, part in zip(requests, parts)]
        try:
            while self.run_once():
                pass
        finally:  # interrupted, nothing of them is left behind
            for ticket in tickets:
                self.cancel(ticket)
        return [joined(part) for part in parts]

    def warm_up(self, *, draws: bool = True) -> None:
        """Compile every program, several at once, and run each on no request, so that none is compiled later.

        Without `draws` only those of greedy decoding. Programs run in this thread, once all are compiled: a GPU records some as graphs when
        they run, and fails where another thread loads one meanwhile.
        """
        compile_all(self.programs(draws=draws))
        for level in _LEVELS if draws else _LEVELS[:1]:
            self._dispatch_chunk(level)
        for sizes in self._read_sizes():
            self._dispatch_read([], 0, *sizes)
        jax.block_until_ready(self._state)

    def programs(self, *, draws: bool = True) -> list[Callable[[], Callable[[], Any]]]:
        """Return what makes each program ready to compile, those first that take long, and runs nothing: for `compile_all`."""
        levels = _LEVELS if draws else _LEVELS[:1]
        lowering = [functools.partial(read_prompts.lower, *self._read_arguments([], 0, *sizes)) for sizes in self._read_sizes()]
        lowering += [functools.partial(decode_chunk.lower, *self._chunk_arguments(level)) for level in levels]
        return [functools.partial(_compiler, lower) for lower in lowering]

    def _read_sizes(self) -> list[tuple[int, int, bool]]:
        reads = [(queries, keys, False) for queries in self._query_sizes for keys in self._all_key_sizes(queries)]
        return reads + [(self._query_sizes[0], keys, True) for keys in self._all_key_sizes(self._query_sizes[0])]

    def _take(self) -> None:
        """Take what other threads have left."""
        with self._lock:
            incoming, self._incoming = self._incoming, collections.deque()
            cancelled, self._cancelled = self._cancelled, collections.deque()
            closed = self._closed
        self._waiting.extend(incoming)
        for ticket in [*cancelled, *((*self._running.values(), *self._reading, *self._waiting) if closed else ())]:
            if not ticket.finished:
                self._finish(ticket, Tokens(_NONE, _NONE, "cancelled"))

    def _admit(self) -> None:
        """Give waiting requests places and pages, in the order of arrival.

        One waits on, and does not hold up those behind it, while another prompt that begins alike is read: it shares the pages then.
        One that is admitted leaves a page for each sequence that is there, so that few lose theirs. Where all that wait are read before a
        chunk begins, several are admitted at once: a reading takes about as long for one prompt as for those that fill it.
        """
        several = min(len(self._waiting), self.config.num_sequences // ADMITTED_SHARE)
        if self.config.reads_per_chunk is None and self._running and len(self._places) < several:
            return
        at = 0
        while self._places and at < min(len(self._waiting), 2 * self.config.num_sequences):
            ticket = self._waiting[at]
            shareable = ticket.keys[: (len(ticket.token_ids) - 1) // self.config.page_tokens]  # the last token is read in any case
            pages = self.pages.share(shareable)
            if len(pages) < len(shareable) and shareable[len(pages)] in self._being_read:
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
            ticket.num_read = len(pages) * self.config.page_tokens
            self._being_read.update(ticket.keys[len(pages) :])
            self._counts["prefix_hit_tokens"] += ticket.num_read
            self._reading.append(ticket)

    def _read(self) -> None:
        """Have the next part of prompts read: of the first one, and of others that are as far."""
        head = self._reading[0]
        first, queries = head.num_read, self._queries(head)
        alike = [ticket for ticket in self._reading if ticket.num_read == first and ticket.goes_on == head.goes_on]
        alike.sort(key=lambda ticket: abs(self._queries(ticket) - queries))  # the head stays first: it is among the nearest
        group = alike[: 1 if head.goes_on else self.config.prefill_tokens // queries]
        keys = min(size for size in self._all_key_sizes(queries) if size >= first + queries)
        self._dispatch_read(group, first, queries, keys, head.goes_on)
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

    def _queries(self, ticket: Ticket) -> int:
        """Choose how many tokens of a prompt are read at once: the size that its rest fits best."""
        if ticket.goes_on:
            return self._query_sizes[0]
        left = min(len(ticket.token_ids) - ticket.num_read, self._query_sizes[0])
        return min(size for size in self._query_sizes if size >= left)

    def _all_key_sizes(self, queries: int) -> list[int]:
        return [queries, *(size for size in self._key_sizes if size > queries)]

    def _start(self, ticket: Ticket) -> None:
        """Let a sequence run whose prompt is read."""
        place, request = ticket.place, ticket.request
        assert place is not None
        self._running[place] = ticket
        self._prompt_tokens[place], self._until[place], self._limit[place] = ticket.prompt_tokens, ticket.num_new, request.max_new_tokens
        self._set_pages(ticket, [])
        for own, value, neutral in zip(self._sampling, SamplingFields.of(request.sampling), _NEUTRAL):
            own[place] = neutral if value is None else value

    def _set_pages(self, ticket: Ticket, new: list[int]) -> None:
        """Give a running sequence new pages, and write those that its place does not have yet where the next chunk finds them."""
        place, ticket.pages = ticket.place, [*ticket.pages, *new]
        written = self._room[place] // self.config.page_tokens
        self._table[place, written : len(ticket.pages)] = ticket.pages[written:]
        self._room[place] = len(ticket.pages) * self.config.page_tokens

    def _dispatch_read(self, *sizes: Any) -> None:
        self._state = read_prompts(*self._read_arguments(*sizes))

    def _read_arguments(self, group: list[Ticket], first: int, num_queries: int, num_keys: int, responses: bool) -> tuple[Any, ...]:
        size, rows = self.config.num_sequences, 1 if responses else self.config.prefill_tokens // num_queries
        prompts = Prompts(
            token_ids=np.full((rows, num_keys), self.engine.vocab.pad_id, np.int32),
            first=np.array(first, np.int32),
            lengths=np.zeros(rows, np.int32),
            pages=np.full((rows, self._pages_each), -1, np.int32),
            sources=np.full(size, -1, np.int32),
            num_new=np.zeros(rows, np.int32),
            seeds=np.zeros((rows, 3), np.uint32),
        )
        for row, ticket in enumerate(group):
            end = min(first + num_queries, len(ticket.token_ids))
            prompts.token_ids[row, :end] = ticket.token_ids[:end]
            prompts.lengths[row] = end
            prompts.pages[row, : len(ticket.pages)] = ticket.pages
            if end == len(ticket.token_ids):
                prompts.sources[ticket.place] = row
            prompts.num_new[row] = ticket.num_new
            prompts.seeds[row] = (*divmod(int(ticket.request.seed), 2**32), ticket.request.sample)
        options = (self.decode_config, self.config.page_tokens, num_queries, responses)
        return (self.engine.graph, self.engine.params, self._state, prompts, *options)

    def _decode(self) -> bool:
        """Have a chunk decoded for all that run, if any does; places that are full afterwards are free from then on."""
        ends = self._prompt_tokens + self._next_until()
        for ticket in sorted((self._running[place] for place in np.flatnonzero(ends > self._room).tolist()), key=_number):
            if ticket.place is not None:  # it may have lost its pages to another one
                self._grow(ticket, int(ends[ticket.place]))
        if not self._running:
            return False
        self._until = self._next_until()
        tickets = self._running.copy()
        decoded = self._dispatch_chunk(max(ticket.level for ticket in tickets.values()))
        for array in jax.tree.leaves(decoded):
            array.copy_to_host_async()
        for place in np.flatnonzero((self._until == self._limit) & (self._limit > 0)).tolist():
            self._vacate(tickets[place])
        self._in_flight.append(_Chunk(decoded, tickets))
        return True

    def _next_until(self) -> Int[np.ndarray, "B"]:
        """Count the tokens that each place will have sampled after the next chunk at most."""
        return np.minimum(self._until + self.config.chunk_tokens, self._limit)

    def _dispatch_chunk(self, level: tuple[int, int]) -> Decoded:
        self._state, decoded = decode_chunk(*self._chunk_arguments(level))
        return decoded

    def _chunk_arguments(self, level: tuple[int, int]) -> tuple[Any, ...]:
        # Copies, because the device may read them after they have changed.
        num_fields, num_logprobs = level
        sampling = SamplingFields(*(field.copy() if i < num_fields else None for i, field in enumerate(self._sampling)))
        options = (self.decode_config, self.config.page_tokens, self.config.chunk_tokens, min(num_logprobs, self.engine.vocab_size))
        return (self.engine.graph, self.engine.params, self._state, self._table.copy(), self._until.copy(), sampling, *options)

    def _collect(self) -> None:
        """Wait for the oldest chunk in flight and hand out its tokens."""
        chunk = self._in_flight[0]
        began = time.perf_counter()
        token_ids, num_attended, done, logprobs = jax.tree.map(np.asarray, chunk.decoded)
        self._counts["waited_seconds"] += time.perf_counter() - began  # type: ignore[assignment]
        self._in_flight.popleft()
        counts, sums, done = np.count_nonzero(num_attended, axis=1).tolist(), num_attended.sum(axis=1).tolist(), done.tolist()
        chosen = [(place, ticket) for place, ticket in chunk.tickets.items() if not ticket.finished]
        self._counts["generated_tokens"] += sum(counts[place] for place, _ in chosen)
        self._counts["attended_tokens"] += sum(sums[place] for place, _ in chosen)
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
                self._finish(ticket, Tokens(_NONE, _NONE, "error", error))
        self._reset()

    def _all_tokens(self, ticket: Ticket) -> Int[np.ndarray, "T"]:
        return np.concatenate([ticket.token_ids[: ticket.prompt_tokens], *ticket.written])

    def _goes_on(self, token_ids: Int[np.ndarray, "T"]) -> bool:
        return self.engine.goes_on(token_ids[None], np.array([len(token_ids)]))

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_tokens)

    def _pages_that_fit(self) -> int:
        """Count the pages that free memory has room for, beside the rest of the state and what programs need meanwhile."""
        config, engine, model = self.config, self.engine, self.engine.shard.config
        sizes = (config.page_tokens, config.num_sequences, self._capacity)
        state = jax.eval_shape(lambda params: empty_state(engine.graph, params, self.decode_config, *sizes), engine.params)
        rest = memory.bytes_of(dataclasses.replace(state, cache=state.cache.slot_table))
        row_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_size * np.dtype(model.compute_dtype).itemsize
        free = memory.free_memory_bytes()
        left = _UNKNOWN_MEMORY_BYTES if free is None else int(_CACHE_SHARE * (free - rest))
        if left < config.page_tokens * row_bytes:
            raise memory.DoesNotFit(f"does not fit: {rest / 2**30:.1f} GiB of state leave no room for the cache")
        return min(config.num_sequences * self._pages_each, left // (config.page_tokens * row_bytes))


_NONE = np.zeros(0, np.int32)


def _compiler(lower: Callable[[], jax.stages.Lowered]) -> Callable[[], Any]:
    return lower().compile


def compile_all(programs: Sequence[Callable[[], Callable[[], Any]]]) -> None:
    """Compile programs, each while the next ones are made ready.

    A program is a function that makes it ready and returns what compiles it. The first is Python, which only one thread runs at a time;
    the second is the compiler, which is called in several.
    """
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for compiled in [pool.submit(program()) for program in programs]:
            compiled.result()


def _number(ticket: Ticket) -> int:
    return ticket.number


def _level(request: Request) -> tuple[int, int]:
    """Return the first of `_LEVELS` that has what a request asks for."""
    asked = [number for number, value in enumerate(SamplingFields.of(request.sampling), 1) if value is not None]
    return next(level for level in _LEVELS if level[0] >= max(asked, default=0) and (level[1] > 0 or not request.logprobs))
