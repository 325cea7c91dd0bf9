"""Put a server of OpenAI's API under load, and say what its clients see at each arrival rate.

    python -m benchmarks.serving http://127.0.0.1:8000 --rates 1,2,4,8 --num-requests 200 --json FILE

Open loop: arrivals are a Poisson process, whether the server keeps up or not, and a request's time counts from its arrival, not from
when the client got round to it. Prompts are expressions of mixed lengths, or the lines of a file. Any server of this API can be
asked; one of this project's also says which answers are right. What is timed on its way here: the network and this client included.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import httpx2
from tyro.conf import Positional, arg

from benchmarks.arrivals import Sent, arrivals, summary, table
from data import arithmetic, commandline
from data.errors import UserError, check_range
from selfspan_jax import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Send requests at several arrival rates, and print throughput and latencies."""

    url: Annotated[Positional[str], arg(metavar="URL")]
    """Of the server, as in http://127.0.0.1:8000."""
    rates: Annotated[tuple[float, ...], commandline.commas(float)] = (1.0, 2.0, 4.0, 8.0)
    """Arrivals per second on average, one measurement each."""
    num_requests: int = 100
    """Requests at each rate."""
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
    api_key: str | None = None
    """What the server asks for."""
    json: Path | None = None
    """Write the figures into this file; - is standard output."""

    def __post_init__(self) -> None:
        check_range(self, "num_requests", "min_ops", low=1)
        if not self.rates or min(self.rates) <= 0:
            raise UserError(f"--rates is {self.rates}; allowed: numbers above 0")
        if self.max_ops < self.min_ops:
            raise UserError(f"--max-ops is {self.max_ops}, less than --min-ops {self.min_ops}")

    def texts(self) -> list[str]:
        """Return as many prompts as there are requests at a rate."""
        if self.prompts:
            return list(itertools.islice(itertools.cycle(files.read_prompts(self.prompts)), self.num_requests))
        task = arithmetic.ArithmeticTask()
        drawn = task.corpus(min_ops=self.min_ops, max_ops=self.max_ops).stream(seed=self.seed, split="test", vocab=task.vocab)
        return [example.prompt for example in itertools.islice(drawn, self.num_requests)]


async def send_all(client: httpx2.AsyncClient, model: str, prompts: list[str], rate: float, load: Load) -> list[Sent]:
    """Send each prompt at its time, and wait for all responses."""
    times = arrivals(rate, len(prompts), load.seed)
    begin = time.perf_counter()
    requests = (_send(client, model, text, begin, float(at), load) for text, at in zip(prompts, times))
    return await asyncio.gather(*requests)


async def _send(client: httpx2.AsyncClient, model: str, prompt: str, begin: float, arrival: float, load: Load) -> Sent:
    sent = Sent(arrival)
    body: dict[str, Any] = {"model": model, "prompt": prompt, "temperature": load.temperature, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | ({} if load.max_tokens is None else {"max_tokens": load.max_tokens})
    await asyncio.sleep(max(0.0, begin + arrival - time.perf_counter()))
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                sent.failed = f"status {response.status_code}"
                return sent
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _take(sent, json.loads(line[6:]), time.perf_counter() - begin)
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


async def run(load: Load) -> dict[str, Any]:
    """Measure at each rate, one after the other."""
    prompts, rows = load.texts(), []
    settings = {field.name: getattr(load, field.name) for field in dataclasses.fields(load) if field.name not in ("json", "api_key", "url")}
    headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=load.url, headers=headers, timeout=None, limits=limits, trust_env=False) as client:
        try:
            found = await client.get("/v1/models")
            found.raise_for_status()
            card = found.json()["data"][0]
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, LookupError) as error:
            raise UserError(f"{load.url}: no server of OpenAI's API ({error or type(error).__name__})") from None
        for rate in load.rates:
            rows.append(summary(rate, await send_all(client, card["id"], prompts, rate, load)))
            failures = [f"failed: {failure}" for failure in rows[-1]["failures"]]
            print("\n".join([*table(rows).splitlines()[(len(rows) > 1) * -1 :], *failures]), flush=True)
            report = {"model": card, **settings, "prompts": load.prompts and load.prompts.name, "rows": rows}
            files.write_rows(load.json, report, complete=len(rows) == len(load.rates))
    return report


def main() -> None:
    with commandline.exit_on_user_error(UserError):
        load = commandline.parse(Load, "benchmarks.serving", sys.argv[1:], description=__doc__)
        with files.outputs(json=load.json):
            asyncio.run(run(load))


if __name__ == "__main__":
    main()
