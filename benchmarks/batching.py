"""Compare continuous batching with static batches, and with transformers' own, on the same requests in the same run.

    python -m benchmarks.batching checkpoints/arithmetic-small --json FILE
    python -m benchmarks.batching --shape smollm2-135m --peers --json FILE

A checkpoint of arithmetic decodes expressions of 2 to 200 operators, and its answers are judged. A shape has random weights, prompts of
random tokens, and responses of given lengths, both log-uniform. Requests arrive in random order, all at once or as a Poisson process (open
loop), and their times count from the arrival. The systems:

- scheduler: `selfspan_jax.serving.scheduler`, no HTTP; its pages are as many rows as the static batch has. Where all requests are there at
  once, all prompts that have places are read before the next chunk; at a rate, one part between two chunks. With the longest prompts first
  it is told how long responses become, as `decode.py eval` tells it from the task's own responses.
- static: as many of those that wait as a batch has, in the order of arrival, each batch until its longest response has ended.
- sorted: the same, when all are there at once: of prompts of about the same length.
- transformers: `generate_batch`'s manager, in a process of its own: the same lengths and rows of cache, dense attention, random weights.

Beside these parts, `mixed` and `rates`: `equal`, throughput while requests of equal lengths wait, and of one static batch of them, with as
many places as above and with a server's defaults; `stalls`, the time between two deliveries to streams while prompts of about 2,000 tokens
arrive, and without these; `first`, from a short request to its first tokens while nothing else runs. `equal` and `stalls` have random
weights, so that no response ends early. `equal` is measured from the end of the first responses to when none waits any more, `stalls` while
all streams run. A server's defaults are `ServingConfig`'s. All programs are compiled first, several at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float
from tyro.conf import Positional, arg

from benchmarks import peers as hf
from benchmarks.arrivals import Sent, arrivals, summary, table
from benchmarks.shapes import ShapeName
from benchmarks.systems import (
    EQUAL_NEW_TOKENS,
    EQUAL_PROMPT_TOKENS,
    LONG_PROMPT_TOKENS,
    MIN_PROMPT_TOKENS,
    Model,
    Work,
    run_scheduler,
    run_static,
    set_chunk_tokens,
)
from benchmarks.timing import header_line, report_header, run_command, timed
from data import commandline
from data.errors import check_range
from selfspan_jax import files
from selfspan_jax.config import ServingConfig
from selfspan_jax.errors import UserError
from selfspan_jax.serving.pages import Pages
from selfspan_jax.serving.requests import Request, Tokens
from selfspan_jax.serving.throughput import THROUGHPUT_PREFILL_TOKENS
from selfspan_jax.weights.huggingface import to_hugging_face

EQUAL_ROUNDS = 5
STREAM_TOKENS, STREAM_PASSES, LONG_PROMPT_OPERATORS, LONG_EVERY_CHUNKS = 1500, 4, 300, 3
PARTS = ("mixed", "equal", "stalls", "first", "rates")  # in the order in which they are measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
    """Run the same requests through a scheduler, through static batches and through transformers, and print what each gives."""

    checkpoint: Annotated[Positional[Path | None], arg(metavar="[CHECKPOINT]")] = None
    """Directory of a finished model of arithmetic; or give --shape."""
    shape: ShapeName | None = None
    """A model's sizes, filled with random weights; attention is dense."""
    num_requests: int = 1024
    """Requests that are there at once, and most requests of a rate."""
    rates: Annotated[tuple[float, ...], commandline.commas(float)] = ()
    """Of `rates`: arrivals per second on average, one measurement each."""
    seconds: float = 8.0
    """How long requests arrive at a rate."""
    max_ops: int = 200
    """Most operators of an expression; their number is uniform from 2."""
    max_prompt_tokens: int = LONG_PROMPT_TOKENS
    """Most tokens of a shape's prompts; the fewest are 32."""
    response_tokens: Annotated[tuple[int, ...], commandline.commas(int)] = (32, 512)
    """Fewest and most tokens of a shape's responses."""
    batch_size: int = 128
    """Sequences of a static batch."""
    slots: int = 256
    """Sequences that the scheduler decodes at the same time, on as many rows of cache as the static batch has; of `equal` both's."""
    chunk_tokens: Annotated[tuple[int, ...], commandline.commas(int)] = (ServingConfig.chunk_tokens, 64, 16)
    """Decode steps between two looks of the scheduler where it has no server's defaults; `mixed` and `equal` are measured with each."""
    prefill_tokens: int = THROUGHPUT_PREFILL_TOKENS
    """Most prompt tokens that the scheduler reads at once, where it has no server's defaults."""
    min_read_tokens: int = ServingConfig.min_read_tokens
    """Fewest tokens that the scheduler reads of one prompt at once; more need fewer programs, and so does their compiling."""
    streams: int = 32
    """Of `stalls`: sequences that decode while prompts arrive."""
    parts: Annotated[tuple[str, ...], commandline.commas(*PARTS)] = PARTS
    """What is measured; several with commas."""
    peers: bool = False
    """Run transformers too, where it and PyTorch are installed."""
    peer_requests: int = 128
    """Requests that are there at once for transformers, which is slower."""
    seed: int = 0
    """Of requests, arrivals and weights."""
    json: Path | None = None
    """Write the figures into this file, after each of them; - is standard output."""

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.shape is None):
            raise UserError("give either a checkpoint or --shape")
        check_range(self, "num_requests", "max_ops", "batch_size", "slots", "streams", "peer_requests", low=1)
        check_range(self, "max_prompt_tokens", low=MIN_PROMPT_TOKENS)
        if len(self.response_tokens) != 2 or not 1 <= self.response_tokens[0] <= self.response_tokens[1]:
            raise UserError(f"--response-tokens is {self.response_tokens}; allowed: two numbers from 1 on, the fewest and the most")
        if self.rates and min(self.rates) <= 0:
            raise UserError(f"--rates is {self.rates}; allowed: numbers above 0")

    def run(self) -> None:
        if self.peers and (reason := hf.missing_reason()):
            raise UserError(f"--peers: {reason}")
        if self.peers:  # they share the device with this process
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        measure(self)


def mixed(model: Model) -> Iterator[dict[str, Any]]:
    """Measure requests of mixed lengths that are all there at once."""
    work, times = model.work, arrivals(None, len(model.work), model.settings.seed)
    similar = sorted(work, key=lambda item: len(item.prompt_ids))
    scheduler = model.scheduler(model.engine)
    orders = {"scheduler": work, "scheduler, longest first": similar[::-1]}
    for chunk, system in itertools.product(model.settings.chunk_tokens, orders):
        set_chunk_tokens(scheduler, chunk)
        scheduler.pages = Pages(scheduler.num_pages)  # forgets what it has read
        before = scheduler.stats
        sent = run_scheduler(scheduler, orders[system], times, expected=system != "scheduler")
        row = {"system": system, "chunk_tokens": chunk, **summary(None, sent)}
        yield row | {name: getattr(scheduler.stats, name) - getattr(before, name) for name in ("preemptions", "waited_seconds")}
    del scheduler
    warm_static(model, np.zeros(model.settings.batch_size))
    for system, own in (("static", work), ("sorted", similar)):
        yield {"system": system, **summary(None, run_static(model, own, times))}


def rates(model: Model) -> Iterator[dict[str, Any]]:
    """Measure requests of mixed lengths at each rate."""
    settings, drawn = model.settings, rates_of(model)
    scheduler = model.scheduler(model.engine)
    scheduler.config = dataclasses.replace(scheduler.config, reads_per_chunk=1)  # and the first of the chunks
    for rate, times in drawn:
        scheduler.pages = Pages(scheduler.num_pages)
        yield {"system": "scheduler", **summary(rate, run_scheduler(scheduler, model.work[: len(times)], times))}
    del scheduler
    warm_static(model, np.full(settings.batch_size, 1e-9))
    for rate, times in drawn:
        yield {"system": "static", **summary(rate, run_static(model, model.work[: len(times)], times))}


def rates_of(model: Model) -> list[tuple[float, Float[np.ndarray, "R"]]]:
    """Draw the arrivals of each rate, in seconds."""
    settings = model.settings
    numbers = [min(len(model.work), max(1, round(rate * settings.seconds))) for rate in settings.rates]
    return [(rate, arrivals(rate, number, settings.seed)) for rate, number in zip(settings.rates, numbers)]


def warm_static(model: Model, times: Float[np.ndarray, "R"]) -> None:
    """Run a static batch of the longest prompts once, so that its programs are compiled and loaded."""
    longest = sorted(model.work, key=lambda item: len(item.prompt_ids))[-len(times) :]
    run_static(model, [dataclasses.replace(item, is_right=None, new_tokens=2) for item in longest], times[: len(longest)])


# ------------------------------------------------------------------------------------------------------ one thing at a time


def equal(model: Model) -> Iterator[dict[str, Any]]:
    """Measure requests of equal lengths: while some wait, and one static batch of them."""
    prompt, new, config = EQUAL_PROMPT_TOKENS, EQUAL_NEW_TOKENS, model.equal_config()
    for batch, defaults in zip(model.equal_sizes(), (False, True)):
        ids = np.stack([model.tokens(prompt) for _ in range(batch * EQUAL_ROUNDS)])
        lengths = np.full(batch, prompt, np.int32)

        def static() -> Any:
            return model.endless.generate(ids[:batch], lengths, config).new_tokens  # noqa: B023

        static()
        seconds = min(timed(static)[1] for _ in range(3))
        scheduler = model.scheduler(model.endless, defaults=defaults)
        for chunk in (ServingConfig.chunk_tokens,) if defaults else model.settings.chunk_tokens:
            set_chunk_tokens(scheduler, chunk)
            scheduler.pages, start = Pages(scheduler.num_pages), scheduler.stats
            for row in ids:
                scheduler.submit(Request(row, new), lambda tokens: None)
            marks: list[tuple[float, int, float]] = []
            while scheduler.run_once():
                stats = scheduler.stats
                written = stats.generated_tokens - start.generated_tokens
                if written >= batch * new and (stats.waiting or len(marks) < 2):  # since then, places become free
                    marks.append((time.perf_counter(), written, stats.waited_seconds))
            (began, before, waited), (ended, after, waited_then) = marks[0], marks[-1]
            rate, static_rate = (after - before) / (ended - began), batch * new / seconds
            yield {
                "batch_size": batch,
                "defaults": defaults,
                "prompt_tokens": prompt,
                "new_tokens": new,
                "chunk_tokens": chunk,
                "prefill_tokens": scheduler.config.prefill_tokens,
                "static_tokens_per_second": static_rate,
                "tokens_per_second": rate,
                "of_static": rate / static_rate,
                "host_waits": (waited_then - waited) / (ended - began),
                "preemptions": scheduler.stats.preemptions - start.preemptions,
            }
        del scheduler


def stalls(model: Model) -> Iterator[dict[str, Any]]:
    """Measure the time between two deliveries to streams, without long prompts and while they arrive.

    Counted while all streams run; `with_ramp` has the gaps before and after. `host` is a round's time less what it waited for the
    device, `host_cpu` the processor time of that: where it is much less, other programs had the processor.
    """
    streams, chunk = model.settings.streams, ServingConfig.chunk_tokens
    short = [model.tokens(64) for _ in range(streams)]
    texts = model.expressions(40, *(2 * (LONG_PROMPT_OPERATORS,))) if model.lm else []
    longs = itertools.cycle([item.prompt_ids for item in texts] or [model.tokens(LONG_PROMPT_TOKENS) for _ in range(40)])
    scheduler = model.scheduler(model.endless, defaults=True)
    new_tokens = min(STREAM_TOKENS, scheduler.context_tokens - len(short[0]))
    for with_long, passes in ((True, 0), (False, STREAM_PASSES), (True, STREAM_PASSES)):  # what the first one finds is not counted
        inside, every, host, cpu, given = [], [], [], [], 0
        for _ in range(max(1, passes)):
            stamps: list[list[float]] = [[] for _ in short]
            for own, ids in zip(stamps, short):
                scheduler.submit(Request(ids, new_tokens), _stamping(own))
            rounds, more, waited = 0, True, scheduler.stats.waited_seconds
            while more:
                began, began_cpu, waited_before = time.perf_counter(), time.thread_time(), waited
                more = scheduler.run_once()
                waited = scheduler.stats.waited_seconds
                host.append(time.perf_counter() - began - (waited - waited_before))
                cpu.append(time.thread_time() - began_cpu)
                rounds += 1
                if with_long and rounds > 10 and rounds % LONG_EVERY_CHUNKS == 0 and rounds < 0.8 * new_tokens / chunk:
                    scheduler.submit(Request(next(longs), chunk), lambda tokens: None)
                    given += 1
            first, last = max(own[min(2, len(own) - 1)] for own in stamps), min(own[-1] for own in stamps)
            every += [np.diff(own) for own in stamps]
            inside += [np.diff([stamp for stamp in own if first <= stamp <= last]) for own in stamps]
        if not passes:
            continue
        gaps, all_gaps, of_host, of_cpu = (1e3 * np.concatenate(found) for found in (inside, every, [host], [cpu]))
        p50, p99 = (float(x) for x in np.percentile(gaps, [50, 99]))
        yield {
            "streams": streams,
            "long_prompts": given,
            "chunk_tokens": chunk,
            "prefill_tokens": scheduler.config.prefill_tokens,
            "rounds": len(host),
            "ms_p50": p50,
            "ms_p99": p99,
            "ms_most": float(gaps.max()),
            "p99_of_p50": p99 / p50,
            "with_ramp_ms_p99": float(np.percentile(all_gaps, 99)),
            "host_ms_p50": float(np.median(of_host)),
            "host_ms_p99": float(np.percentile(of_host, 99)),
            "host_cpu_ms_p50": float(np.median(of_cpu)),
            "host_cpu_ms_p99": float(np.percentile(of_cpu, 99)),
        }


def _stamping(stamps: list[float]) -> Callable[[Tokens], None]:
    return lambda tokens: stamps.append(time.perf_counter())


def first(model: Model) -> dict[str, Any]:
    """Measure the time from a short request to its first tokens, and to its end, nothing else running."""
    scheduler = model.scheduler(model.engine, defaults=True)
    work = model.expressions(20, 2, 4) if model.lm else [Work(model.tokens(32), 64) for _ in range(20)]
    sent = [run_scheduler(scheduler, [item], np.zeros(1))[0] for item in work]
    times = [[1e3 * (own.events[at] - own.arrival) for own in sent] for at in (0, -1)]
    return {
        "first_token_ms_p50": float(np.median(times[0])),
        "first_token_ms_most": max(times[0]),
        "whole_ms_p50": float(np.median(times[1])),
    }


# ------------------------------------------------------------------------------------------------------------- the whole


def peer_case(model: Model) -> dict[str, Any]:
    """Describe the same requests for transformers: lengths, arrivals, rows of cache."""
    settings = model.settings
    times: dict[float | None, Any] = {}
    if "mixed" in settings.parts:
        times[None] = arrivals(None, min(settings.peer_requests, len(model.work)), settings.seed)
    if "rates" in settings.parts:
        times |= dict(rates_of(model))
    return {
        "peer": "hf-continuous",
        "rows": model.rows,
        "slots": settings.slots,
        "prompt_tokens": [len(item.prompt_ids) for item in model.work],
        "new_tokens": [item.new_tokens - 16 * (item.is_right is not None) for item in model.work],
        "rates": [[rate, own.tolist()] for rate, own in times.items()],
    }


def measure(settings: Batching) -> dict[str, Any]:
    """Measure all parts; written as they come."""
    model = Model(settings)
    header = report_header()
    print(header_line(header), flush=True)
    own = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.name not in ("json", "checkpoint")}
    sizes = {"prompt_tokens": [len(item.prompt_ids) for item in model.work], "new_tokens": [item.new_tokens for item in model.work]}
    report: dict[str, Any] = {
        **header,
        "checkpoint": settings.checkpoint and files.model_name(settings.checkpoint),
        **own,
        "attention": model.attention,
        "rows_of_cache": model.rows,
        **{f"{kind}_{name}": float(f(values)) for name, values in sizes.items() for kind, f in (("mean", np.mean), ("most", np.max))},
        "rows": [],
    }

    def save(complete: bool = False) -> None:
        files.write_rows(settings.json, report, complete=complete)

    with contextlib.ExitStack() as stack:
        process = None
        if settings.peers:
            config = to_hugging_face(model.engine.config, model.engine.vocab, model.engine.vocab_size)
            process = stack.enter_context(hf.Peers(config, [peer_case(model)], settings.seed))  # which builds its model meanwhile
        _measure(model, report, save, process)
    print(table(report["rows"]) if report["rows"] else "", flush=True)
    save(complete=True)
    return report


def _measure(model: Model, report: dict[str, Any], save: Callable[[], None], process: hf.Peers | None) -> None:
    began = time.perf_counter()
    model.compile()
    report["compile_seconds"] = time.perf_counter() - began
    print(f"compiled in {report['compile_seconds']:.0f} s", flush=True)
    measured: dict[str, Callable[[Model], Iterator[dict[str, Any]]]] = {"equal": equal, "stalls": stalls}

    def add(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        print(table([row]), flush=True)
        save()

    for name in PARTS:
        if name not in model.settings.parts:
            continue
        if name == "first":
            report[name] = first(model)
            print(f"{name}: {report[name]}", flush=True)
        for row in measured.get(name, lambda _: iter(()))(model):
            report.setdefault(name, []).append(row)
            print(f"{name}: {row}", flush=True)
            save()
        for row in {"mixed": mixed, "rates": rates}.get(name, lambda _: iter(()))(model):
            add(row)
        save()
    for found in process.rows() if process else ():
        for (rate, times), requests in zip(found["rates"], found["events"]):
            done = [Sent(arrival, events, len(events)) for arrival, events in zip(times, requests)]
            add({"system": "transformers", **summary(rate, done), "versions": found["versions"]})


def main() -> None:
    run_command(Batching, description=__doc__)


if __name__ == "__main__":
    main()
