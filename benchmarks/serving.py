"""Put a server of OpenAI's API under load, and say what its clients see at each arrival rate.

    python -m benchmarks.serving http://127.0.0.1:8000 --rates 1,2,4,8 --num-requests 200 --json FILE

Open loop: arrivals are a Poisson process, whether the server keeps up or not, and a request's time counts from its arrival, not from
when the client got round to it. Prompts are expressions of mixed lengths, or the lines of a file. Any server of this API can be
asked; one of this project's also says which answers are right. What is timed on its way here: the network and this client included.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx2
from tyro.conf import Positional, arg

from benchmarks.arrivals import Sent, arrivals, summary, table
from benchmarks.timing import run_command
from data import arithmetic, commandline, rows
from data.errors import UserError, check_range
from data.workers import end_with_parent
from selfspan_jax import files

MAX_EVENTS = 8  # that a client has read when it goes away
HELD = ("vllm:num_requests_running", "vllm:num_requests_waiting", "selfspan:pages_in_use", "selfspan:pages_cached", "selfspan:pages_free")
MAX_BUSY = 0.8  # of a processor, that a client may take before its own speed is what is measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Send requests at several arrival rates, and print throughput and latencies."""

    url: Annotated[Positional[str], arg(metavar="URL")]
    """Of the server, as in http://127.0.0.1:8000."""
    rates: Annotated[tuple[float, ...], commandline.commas(float)] = (1.0, 2.0, 4.0, 8.0)
    """Arrivals per second on average, one measurement each."""
    num_requests: Annotated[tuple[int, ...], commandline.commas(int)] = (100,)
    """Requests at each rate: one number for all rates, or one for each. Few at a high rate measure how it begins and ends."""
    min_ops: int = 2
    """Fewest operators of an expression; their number is uniform between the bounds."""
    max_ops: int = 200
    """Most operators of an expression."""
    prompts: Path | None = None
    """A file of prompts in place of expressions: one a line, or .jsonl: objects with a "prompt" each. They are sent in turn."""
    max_tokens: int | None = None
    """Tokens of a response at most; by default the server's own limit."""
    temperature: float = 0.0
    """Of the draws."""
    seed: int = 0
    """Of arrivals and expressions."""
    processes: int = 1
    """That send and read, each its share of the requests: one reads some ten thousand events a second."""
    leave: float = 0.0
    """Share of the clients that go away before the end, after up to 8 events or before any; says at the end what the server still holds."""
    api_key: str | None = None
    """What the server asks for."""
    json: Path | None = None
    """Write the figures into this file; - is standard output."""

    def __post_init__(self) -> None:
        check_range(self, "processes", "min_ops", low=1)
        if len(self.num_requests) not in (1, len(self.rates)) or min(self.num_requests) < 1:
            raise UserError(f"--num-requests is {self.num_requests}; allowed: one number of at least 1, or one for each of --rates")
        if not self.rates or min(self.rates) <= 0:
            raise UserError(f"--rates is {self.rates}; allowed: numbers above 0")
        if not 0 <= self.leave <= 1:
            raise UserError(f"--leave is {self.leave}; allowed: 0 to 1")
        if self.max_ops < self.min_ops:
            raise UserError(f"--max-ops is {self.max_ops}, less than --min-ops {self.min_ops}")

    def run(self) -> None:
        measure(self)

    def settings(self) -> dict[str, Any]:
        """Return what is sent, and when."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in ("url", "api_key", "json")}

    def command(self) -> str:
        """Write the command line, without the server's address and key, and the file of results."""
        words = ["python -m benchmarks.serving URL"]
        for name, value in self.settings().items():
            if value != getattr(Load, name):
                text = ",".join(f"{each:g}" for each in value) if isinstance(value, tuple) else getattr(value, "name", value)
                words.append(f"--{name.replace('_', '-')} {text}")
        return " ".join(words)

    def texts(self) -> list[str]:
        """Return as many prompts as there are requests at a rate at most."""
        if self.prompts:
            return list(itertools.islice(itertools.cycle(rows.read_prompts(self.prompts).values()), max(self.num_requests)))
        task = arithmetic.ArithmeticTask()
        drawn = task.corpus(min_ops=self.min_ops, max_ops=self.max_ops).stream(seed=self.seed, split="test", vocab=task.vocab)
        return [example.prompt for example in itertools.islice(drawn, max(self.num_requests))]

    def connection(self) -> dict[str, Any]:
        """Return the options of a client of the server."""
        headers = {"Authorization": f"Bearer {self.api_key}".encode()} if self.api_key else {}
        return {"base_url": self.url, "headers": headers, "trust_env": False}


async def send_all(load: Load, model: str, prompts: Sequence[str], times: Sequence[float], begin: float) -> list[Sent]:
    """Send each prompt at its time after `begin`, and wait for all responses."""
    async with httpx2.AsyncClient(**load.connection(), timeout=None, limits=httpx2.Limits(max_connections=None)) as client:
        rng = random.Random(f"{load.seed} {times[0]}" if len(times) else None)
        stays = [rng.randint(0, MAX_EVENTS) if rng.random() < load.leave else None for _ in times]
        return await asyncio.gather(*(_send(client, model, *each, begin, load) for each in zip(prompts, times, stays)))


def share(load: Load, model: str, prompts: Sequence[str], times: Sequence[float], begin: float) -> tuple[list[Sent], float]:
    """Do the part of one process; return what became of it, and which share of the time it took a processor."""
    started, used = time.perf_counter(), time.process_time()
    sent = asyncio.run(send_all(load, model, prompts, times, begin))
    return sent, (time.process_time() - used) / (time.perf_counter() - max(started, begin))


async def _send(client: httpx2.AsyncClient, model: str, prompt: str, arrival: float, stays: int | None, begin: float, load: Load) -> Sent:
    """Send a request at its time, and read its response; with `stays` go away after so many events."""
    sent = Sent(arrival, left=stays == 0)
    body: dict[str, Any] = {"model": model, "prompt": prompt, "temperature": load.temperature, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | ({} if load.max_tokens is None else {"max_tokens": load.max_tokens})
    await asyncio.sleep(max(0.0, begin + arrival - time.perf_counter()))
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                sent.failed = f"status {response.status_code}"
                return sent
            lines = response.aiter_lines()
            while not sent.left and (line := await anext(lines, None)) is not None:
                if line.startswith("data: {"):
                    _take(sent, json.loads(line[6:]), time.perf_counter() - begin)
                sent.left = len(sent.events) == stays
    except httpx2.HTTPError as error:
        sent.failed = type(error).__name__
    return sent


def _take(sent: Sent, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        sent.failed = event["error"]["message"]
    if event.get("usage"):
        sent.tokens = event["usage"]["completion_tokens"]
    for choice in event.get("choices", ()):
        if choice["text"]:
            sent.events.append(now)
        if verdict := (choice.get("selfspan") or {}).get("verdict"):
            sent.right = verdict["answer_right"]


def afterwards(load: Load) -> dict[str, float]:
    """Return what a server of this project says that it still has, once that rests, or after ten seconds."""
    for _ in range(100):
        with httpx2.Client(**load.connection()) as client:
            said = [line.rpartition(" ") for line in client.get("/metrics").text.splitlines()]
        found = {name: float(value) for label, _, value in said if (name := label.partition("{")[0]) in HELD}
        if not any(found.get(name) for name in HELD[:2]):
            break
        time.sleep(0.1)
    return found


def measure(load: Load) -> None:
    """Measure at each rate, one after the other; printed and written as it comes."""
    try:
        with httpx2.Client(**load.connection()) as client:
            found = client.get("/v1/models").raise_for_status()
        card = found.json()["data"][0]
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, LookupError) as error:
        if isinstance(error, httpx2.HTTPStatusError) and error.response.status_code == 401:
            raise UserError(f"{load.url} wants another API key: give it with --api-key") from None
        raise UserError(f"{load.url}: no server of OpenAI's API ({error or type(error).__name__})") from None
    rows: list[dict[str, Any]] = []
    device = {name: told[name] for told in [card.get("selfspan") or {}] for name in ("device", "jax") if name in told}
    prompts = load.texts()
    with contextlib.ExitStack() as stack:
        run_share: Callable[..., Iterable[tuple[list[Sent], float]]] = map
        if load.processes > 1:
            context = multiprocessing.get_context("spawn")
            run_share = stack.enter_context(concurrent.futures.ProcessPoolExecutor(load.processes, context, end_with_parent)).map
            list(run_share(time.sleep, [1.0] * load.processes))  # all have begun
        for rate, number in zip(load.rates, itertools.cycle(load.num_requests)):
            times, begin = arrivals(rate, number, load.seed).tolist(), time.perf_counter() + 0.1  # this clock is that of all processes
            parts = [slice(part, number, load.processes) for part in range(load.processes)]
            of_each = ([load] * len(parts), [card["id"]] * len(parts), [prompts[part] for part in parts], [times[part] for part in parts])
            done = list(run_share(share, *of_each, [begin] * len(parts)))
            sent, busy = [one for own, _ in done for one in own], max(busy for _, busy in done)
            rows.append(summary(rate, sent) | {"client_busy": busy})
            notes = [f"failed: {failure}" for failure in rows[-1]["failures"]]
            if busy > MAX_BUSY:
                notes.append(f"this client took {busy:.0%} of a processor and may be what is slow; more --processes help")
            print("\n".join([*table(rows).splitlines()[(len(rows) > 1) * -1 :], *notes]), flush=True)
            report = {"command": load.command(), **device, "model": card, **load.settings(), "rows": rows}
            report["prompts"] = load.prompts and load.prompts.name
            if load.leave and len(rows) == len(load.rates):
                report["afterwards"] = afterwards(load)
                print(f"afterwards: {report['afterwards']}", flush=True)
            files.write_rows(load.json, report, complete=len(rows) == len(load.rates))


def main() -> None:
    run_command(Load, description=__doc__)


if __name__ == "__main__":
    main()
