"""Schedulers in processes of their own: the server over them, what they give, and what becomes of requests whose process ends."""

import asyncio
import dataclasses
import functools
import multiprocessing
import os
import random
import signal
import threading

import httpx2
import numpy as np
import pytest

from selfspan_jax.config import ServingConfig
from selfspan_jax.errors import UserError
from selfspan_jax.serving.metrics import Metrics
from selfspan_jax.serving.requests import Closed, QueueFull, Request, Stats, Tokens
from selfspan_jax.serving.running import LogProbs
from selfspan_jax.serving.workers import Round, Workers, _Worker, shares, work
from tests.selfspan_jax.serving.loaded import load
from tests.selfspan_jax.serving.test_server import serving, until

CALLS = 100
CONFIG = ServingConfig(num_sequences=1, context_tokens=64, page_tokens=8, prefill_tokens=64, num_pages=12, chunk_tokens=2, max_queue=200)


def refuse(mesh=None):
    raise UserError(f"there is no such model, {mesh}")


async def ask(client, prompt, patience):
    """Read a stream, or go away after so many events; -1: never."""
    body = {"prompt": prompt, "max_tokens": 20, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        text, last = "", None
        if not patience:  # most have no place yet
            return None
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                last = httpx2.Response(200, content=line[6:]).json()["choices"][0]
                text += last["text"]
                patience -= 1
            if not patience:
                return None
    return prompt, text, last["selfspan"]["attended_tokens"]


def test_a_worker_behind_a_server_gives_each_what_it_would_get_alone_and_where_it_ends_its_requests_fail():
    """While clients go away at random, no page is lost and no other response touched."""
    rng = random.Random(0)
    prompts = ["".join(rng.choices("456789", k=size)) for size in (1, 5, 12, 20, 30)]
    alone = {out.prompt: out for out in load().generate(prompts, max_new_tokens=20)}

    async def ask_all(address):
        limits = httpx2.Limits(max_connections=40)
        async with httpx2.AsyncClient(base_url=address, timeout=100, trust_env=False, limits=limits) as client:
            return await asyncio.gather(*(ask(client, rng.choice(prompts), rng.choice((-1, -1, 0, 0, 1, 2))) for _ in range(CALLS)))

    with Workers(load, dataclasses.replace(CONFIG, num_sequences=40), on_cpu=CONFIG) as workers:
        assert workers.config == CONFIG
        told: list[tuple[int, int]] = []
        workers.warm_up(lambda *numbers: told.append(numbers))
        assert told[-1] == (told[0][1], told[0][1]) and told == sorted(told) and workers.device == "cpu"
        with serving(workers, lm=workers.reader) as address:
            found = [each for each in asyncio.run(ask_all(address)) if each]
            until(lambda: (workers.stats.running, workers.stats.reading, workers.stats.waiting) == (0, 0, 0))
            stats = workers.stats
            assert stats.pages_used == 0 and stats.pages_cached + stats.pages_free == 12 and stats.finished["cancelled"] > 3
            given = []
            for ids in (np.array([4, 99]), np.array([4, -1]), np.zeros(0, int), np.full(60, 4)):
                with pytest.raises(UserError):  # before it is sent
                    workers.submit(Request(ids, 20), given.append)
            (worker, _) = workers.submit(Request(np.array([1, 7, 3]), 50), given.append)  # it writes no end
            worker.process.kill()
            until(lambda: given and given[-1].finished)
            assert (given[-1].finished, given[-1].error) == ("error", "the process that decodes has ended")
            until(lambda: httpx2.get(f"{address}/health", trust_env=False).json() == {"status": "failed"})
            refused = httpx2.post(f"{address}/v1/completions", json={"prompt": "4"}, timeout=20, trust_env=False)
            assert refused.status_code == 503 and refused.json()["error"]["message"] == "the server is failed"
    assert 30 < len(found) < 85
    for prompt, text, attended in found:
        assert text == alone[prompt].text.removesuffix("<2>")
        assert attended == pytest.approx(alone[prompt].attended_tokens)


class Silent:
    """A connection to a worker that says nothing."""

    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)

    def recv(self):
        raise EOFError


def of_silent(config):
    """Two workers that say nothing."""
    workers = object.__new__(Workers)
    workers.config, workers._lock, workers._closing, workers._numbers = config, threading.Lock(), False, iter(range(9))
    workers.vocab_size, workers.context_tokens, workers.num_pages = 20, 64, 8
    workers._workers = [_Worker(None, Silent()), _Worker(None, Silent())]
    return workers, workers._workers


def test_what_is_open_is_counted_where_requests_are_given():
    """A worker takes as many as it has places, and `max_queue` that wait, whether it has told of them yet or not."""
    workers, (first, second) = of_silent(ServingConfig(num_sequences=1, max_queue=1))
    request = Request(np.array([4]), 1)
    for _ in range(4):
        workers.submit(request, print)
    assert len(first.open) == len(second.open) == 2  # the one with the fewest takes it
    with pytest.raises(QueueFull, match="1 requests wait already"):
        workers.submit(request, print)
    del first.open[0]
    workers.submit(request, print)
    first.open.clear()
    first.ended = True
    with pytest.raises(QueueFull):  # the other one takes none
        workers.submit(request, print)
    second.ended = True
    with pytest.raises(Closed):
        workers.submit(request, print)
    assert [message[:2] for message in first.connection.sent] == [("submit", 0), ("submit", 2), ("submit", 4)]


def test_of_a_worker_that_ended_only_what_there_has_been_is_counted():
    workers, all_workers = of_silent(CONFIG)
    workers._closing = True  # no process is asked how it ended
    for own in all_workers:
        own.stats = Stats(running=1, reading=2, waiting=3, pages_used=4, pages_cached=5, pages_free=6, generated_tokens=7)
    workers._hand_out(all_workers[0])
    assert workers.stats == dataclasses.replace(all_workers[1].stats, generated_tokens=14)
    workers._hand_out(all_workers[1])
    assert workers.stats == Stats(generated_tokens=14)
    assert b'kv_cache_usage_perc{model_name="tiny"} 0.0' in Metrics("tiny", lambda: workers.stats).text()


def test_a_round_is_taken_apart_as_it_was_put_together():
    scores = LogProbs(np.array([-1.0]), np.array([[4]]), np.array([[-1.0]]))
    given = [
        (7, Tokens(np.array([4, 5]), np.array([2, 3]))),
        (3, Tokens(np.array([6]), np.array([4]), "stop", None, scores)),
        (9, Tokens(np.zeros(0, np.int32), np.zeros(0, np.int32), "error", "on fire")),
        (8, Tokens(np.array([8]), np.array([9]))),
    ]
    for some in (given, []):
        back = list(Round.of(some, Stats(running=2)).given())
        assert [(number, tokens.finished, tokens.error) for number, tokens in back] == [(n, own.finished, own.error) for n, own in some]
        for (_, found), (_, own) in zip(back, some, strict=True):
            assert found[0].tolist() == own[0].tolist() and found[1].tolist() == own[1].tolist()
            assert (found.logprobs is None) == (own.logprobs is None)


@pytest.mark.parametrize(
    ("mesh", "visible", "expected"),
    [
        (None, None, [(None, None)]),
        ("tensor=2", "3,4", [("tensor=2", None)]),  # it takes the first that it sees
        ("data=2", None, [(None, "0"), (None, "1")]),
        ("data=2,tensor=2", "4,5,6,7", [("tensor=2", "4,5"), ("tensor=2", "6,7")]),
        ("tensor=1,data=3", "GPU-a,GPU-b,GPU-c", [(None, "GPU-a"), (None, "GPU-b"), (None, "GPU-c")]),
    ],
)
def test_a_mesh_is_divided_into_those_of_its_workers(mesh, visible, expected):
    assert shares(mesh, visible) == expected


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (functools.partial(signal.raise_signal, signal.SIGSEGV), "was ended by SIGSEGV"),
        (functools.partial(os._exit, 3), "ended with status 3"),
    ],
)
def test_a_worker_that_ends_while_it_is_prepared_is_told_in_one_line(end, message):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=end)
    process.start()
    theirs.close()
    with pytest.raises(ChildProcessError) as error:  # which a command line tells in one line
        _Worker(process, ours).receive("its programs were compiled")
    assert str(error.value) == f"the process that decodes {message} while its programs were compiled"


def test_what_cannot_be_divided_is_told_in_one_line():
    with pytest.raises(UserError, match="takes 4 devices, CUDA_VISIBLE_DEVICES has 2"):
        shares("data=2,tensor=2", "0,1")
    with pytest.raises(UserError, match="no axis 'dat'"):
        shares("dat=2", None)


def test_a_worker_tells_why_there_is_no_model_and_ends_with_the_process_that_serves(monkeypatch):
    ours, theirs = multiprocessing.Pipe()
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    work(theirs, refuse, "tensor=2", None, 1, CONFIG, None, None)
    with pytest.raises(UserError, match="there is no such model, tensor=2"):
        _Worker(None, ours).receive("its model was loaded")
    (listener,) = (thread for thread in threading.enumerate() if thread.name == "listener")
    ours.close()
    listener.join(20)
    assert exits == [1]
