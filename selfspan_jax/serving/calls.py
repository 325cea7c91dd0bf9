"""Calls on their way: their prompts are encoded and submitted, and their responses read while tokens come.

A call's prompts are encoded in one thread, and its responses read back in another, so that a long prompt stops no stream, and waits for
no response that is read. Whatever fails one call is told to it alone.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from selfspan_jax.attention.policies import Policy
from selfspan_jax.config import MAX_SEED
from selfspan_jax.errors import UserError
from selfspan_jax.lm import Reader
from selfspan_jax.serving import live, protocol
from selfspan_jax.serving.http import Refused, dumps
from selfspan_jax.serving.metrics import Metrics
from selfspan_jax.serving.protocol import Call
from selfspan_jax.serving.requests import Request, Tokens, joined
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
    counted: int = 0
    """Tokens that the metrics have."""
    told: int = 0
    """Tokens whose log-probabilities are in events."""
    told_characters: int = 0
    finish_reason: str | None = None
    last: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(eq=False)
class Service:
    """What all calls of a server share: the model, what decodes, and the calls themselves."""

    lm: Reader
    scheduler: Scheduler | Workers
    model_name: str
    policy: Policy
    """What the scheduler decodes with."""
    metrics: Metrics
    calls: set[Running] = dataclasses.field(default_factory=set)
    arrived: collections.deque[tuple[Running, Choice, Tokens]] = dataclasses.field(default_factory=collections.deque)
    """Tokens that the scheduler's thread has left for the loop."""
    encoder: concurrent.futures.Executor = dataclasses.field(default_factory=lambda: concurrent.futures.ThreadPoolExecutor(1, "encoder"))
    reader: concurrent.futures.Executor = dataclasses.field(default_factory=lambda: concurrent.futures.ThreadPoolExecutor(1, "reader"))

    @property
    def max_tokens(self) -> int:
        """Tokens of a sequence at most."""
        return min(self.scheduler.context_tokens, self.scheduler.num_pages * self.scheduler.config.page_tokens)

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a response."""
        return frozenset(self.lm.end_ids)

    @property
    def task_name(self) -> str:
        """Name the task in errors."""
        return getattr(self.lm.task, "name", type(self.lm.task).__name__)

    def give_out(self) -> None:
        """Give calls what has arrived for them. In the loop."""
        while self.arrived:
            running, choice, tokens = self.arrived.popleft()
            running.put(choice, tokens)

    def encode(self, call: Call) -> list[tuple[str, Int[np.ndarray, "T"]]]:
        """Return the text and the ids of each prompt. Raises ValueError for what the task cannot read."""
        task = self.lm.task
        if call.tools:
            if not hasattr(task, "tool_prompt"):
                raise UserError(f"tools is not supported by a model of the task {self.task_name}; leave it out")
            texts, ids = self.lm.encode(task.tool_prompt(call.messages, call.tools))
            return list(zip(texts, ids))
        if call.declines_tools and hasattr(task, "tool_prompt"):
            raise UserError(f"tool_choice is 'none'; a model of the task {self.task_name} writes calls and no other text: allowed: 'auto'")
        if call.messages and hasattr(task, "encode_chat"):
            return [(call.prompts[0], task.encode_chat(call.messages))]
        if len(call.messages) > 1:
            raise UserError(f"messages are {len(call.messages)}; a model of the task {self.task_name} reads one, its prompt")
        texts, ids = self.lm.encode(call.prompts if len(call.prompts) > 1 else call.prompts[0])
        return list(zip(texts, ids))

    def submit(self, call: Call, prompts: Sequence[tuple[str, Int[np.ndarray, "T"]]]) -> Running:
        """Give the scheduler all that a call asks for, or nothing."""
        if (asked := call.n * len(prompts)) > (most := self.scheduler.config.max_requests):
            raise UserError(f"n is {call.n} for {len(prompts)} prompts, {asked} responses; this server takes {most} at once")
        limits = []
        for _, ids in prompts:
            if (left := self.max_tokens - len(ids)) < 1:
                raise UserError(f"the prompt is {len(ids)} tokens long, but a sequence has {self.max_tokens}, response included")
            if call.max_tokens is not None and call.max_tokens > left:
                raise UserError(f"max_tokens is {call.max_tokens}; the prompt's {len(ids)} tokens leave {left}")
            limits.append(left if call.max_tokens is None else call.max_tokens)
        running = Running(self, call)
        seed = secrets.randbelow(MAX_SEED + 1) if call.seed is None else call.seed
        try:
            for (text, ids), limit in zip(prompts, limits):
                for _ in range(call.n):
                    response = detokenize.Response(self._decode, call.stop, self.end_ids, by_token=call.logprobs is not None)
                    choice = Choice(len(running.choices), text, ids, response)
                    wanted = Request(ids, limit, call.sampling, seed, sample=choice.index, logprobs=call.logprobs is not None)
                    choice.ticket = self.scheduler.submit(wanted, running.deliver(choice))
                    running.choices.append(choice)
        except BaseException:  # it was never taken, and is not counted
            for choice in running.choices:
                self.scheduler.cancel(choice.ticket)
            raise
        self.calls.add(running)
        return running

    def _decode(self, token_ids: Sequence[int]) -> str:
        """Write tokens as clients want them, without what ends a response."""
        if not self.end_ids.isdisjoint(token_ids):
            token_ids = [token for token in token_ids if token not in self.end_ids]
        return self.lm.task.decode(token_ids)


class Running:
    """A call whose responses are being decoded. `close` cancels what has not ended, whoever has gone."""

    def __init__(self, service: Service, call: Call):
        self.service, self.call = service, call
        self.choices: list[Choice] = []
        self._arrived: list[tuple[Choice | None, Tokens]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._started = time.monotonic()

    def deliver(self, choice: Choice) -> Callable[[Tokens], None]:
        """Return what the scheduler's thread calls with the tokens of a choice."""
        return lambda tokens: self.service.arrived.append((self, choice, tokens))

    def put(self, choice: Choice | None, tokens: Tokens) -> None:
        """Leave tokens of a choice for `pieces`; None for all choices."""
        self._arrived.append((choice, tokens))
        self.wake()

    def wake(self) -> None:
        """Have `pieces` look for tokens, and say None where there are none."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def refuse(self) -> None:
        """End a call of which nothing is decoded yet."""
        if not any(choice.attended for choice in self.choices):
            self.put(None, Tokens.none("cancelled"))

    def close(self) -> None:
        """Cancel the choices that have not ended."""
        self.service.calls.discard(self)
        for choice in self.choices:
            if choice.finish_reason is None:
                self._end(choice, "abort")
                if choice.ticket is not None:
                    self.service.scheduler.cancel(choice.ticket)

    async def pieces(self) -> AsyncIterator[tuple[Choice, str] | None]:
        """Yield the text that arrivals add to a choice, None now and then where nothing arrives.

        Where the loop is behind, several chunks of a choice are one piece.

        Raises: Refused where the scheduler fails a choice.
        """
        while any(choice.finish_reason is None for choice in self.choices):
            if not self._arrived:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            arrived: dict[Choice | None, list[Tokens]] = {}
            for choice, tokens in self._arrived:
                arrived.setdefault(choice, []).append(tokens)
            self._arrived.clear()
            if not arrived:
                yield None
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
            self.service.metrics.arrived(count, now - choice.last, None if choice.attended else len(choice.prompt_ids))
            choice.attended.extend(tokens.num_attended.tolist())
            choice.last = now
            if tokens.logprobs is not None:
                choice.logprobs.extend(zip(*(x.tolist() for x in tokens.logprobs)))
        piece = response.push(tokens.token_ids)
        self._count(choice, response.num_sure)
        if response.done and tokens.finished is None:
            assert choice.ticket is not None
            self.service.scheduler.cancel(choice.ticket)
        if response.done or tokens.finished is not None:
            piece += response.finish()
            self._end(choice, "length" if tokens.finished == "length" and response.stopped_by is None else "stop")
        return piece

    def _count(self, choice: Choice, num_tokens: int) -> None:
        self.service.metrics.written(num_tokens - choice.counted)
        choice.counted = num_tokens

    def _end(self, choice: Choice, reason: str) -> None:
        self._count(choice, len(choice.response.token_ids))
        vocab, ids = self.service.lm.vocab, np.asarray(choice.response.token_ids, np.int64)
        spans = sum(int(np.sum((base <= ids) & (ids < base + vocab.num_labels))) for base in (vocab.seg_base, vocab.ref_base))
        choice.finish_reason = reason
        self.service.metrics.finished(reason, len(ids), spans, time.monotonic() - self._started)

    def _read(self, choice: Choice) -> dict[str, Any]:
        service = self.service
        attended = np.array(choice.attended, np.int32)
        out = service.lm.read_response(choice.prompt, choice.prompt_ids, choice.response, attended, service.policy)
        part = protocol.reading_part(out)
        if self.call.tools:
            task: Any = service.lm.task
            called = task.tool_calls(choice.prompt, choice.response.token_ids, self.call.tools)
            part["tool_calls"] = [{"id": f"call_{uuid.uuid4().hex}", **own} for own in called]
        return part

    async def read(self, choice: Choice) -> dict[str, Any]:
        """Say what a choice that has ended read."""
        return await asyncio.get_running_loop().run_in_executor(self.service.reader, self._read, choice)

    def usage(self) -> dict[str, int]:
        """Count the tokens of the prompts, each once, and of the responses."""
        prompts = sum(len(choice.prompt_ids) for choice in self.choices[:: self.call.n])
        return protocol.usage(prompts, sum(len(choice.response.token_ids) for choice in self.choices))

    def logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Say the log-probabilities of sure tokens that no event had yet, what ends a response left out; None where there are none."""
        if self.call.logprobs is None:
            return None
        scored, decode, response = [], self.service.lm.task.decode, choice.response
        start, choice.told = choice.told, response.num_sure
        for at, (text, (own, ids, values)) in enumerate(zip(response.token_texts(start), choice.logprobs[start:]), start):
            if (token_id := response.token_ids[at]) not in self.service.end_ids:
                likeliest, written = ids[: self.call.logprobs], response.token_ids
                texts = [text if other == token_id else detokenize.text_at(decode, written, at, other) for other in likeliest]
                scored.append((text, own, list(zip(texts, values))))
        offset = choice.told_characters
        choice.told_characters += sum(len(text) for text, *_ in scored)
        return protocol.logprobs_part(self.call, scored, offset) if scored else None

    def _all_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Say those of a whole response: empty lists where it has no text; None where the call asks for none."""
        return self.logprobs(choice) or protocol.logprobs_part(self.call, [])

    async def whole(self) -> dict[str, Any]:
        """Return the whole response."""
        async for _ in self.pieces():
            pass
        choices = [(own.response.text, str(own.finish_reason), await self.read(own), self._all_logprobs(own)) for own in self.choices]
        return protocol.response(self.call, self.service.model_name, choices, self.usage())

    async def events(self) -> AsyncGenerator[str | None, None]:
        """Yield the events of a stream as JSON, None now and then where there are none."""
        call, model, lm = self.call, self.service.model_name, self.service.lm
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
