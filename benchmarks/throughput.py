"""Answer a long queue of a corpus' prompts by a scheduler, at several numbers of places: responses a second, and what they read.

    python -m benchmarks.throughput runs/labels-0/model --data corpora/papers --split validation,train --min-prompt-tokens 4096 --json FILE

All prompts are there at once, in random order, and all that have places are read before a chunk of tokens is decoded. A response ends by
itself, or with as many tokens as the longest gold one of the first part has, and 16 more. Programs are compiled and have run before.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks.systems import AtOnce, Work, run_at_once
from benchmarks.timing import header_line, run_command
from data import commandline, examples
from data.errors import check_range
from data.tasks import TASKS
from selfspan_jax import files
from selfspan_jax.errors import UserError
from selfspan_jax.evaluation import MARGIN_TOKENS
from selfspan_jax.lm import SpanLM
from selfspan_jax.serving.pages import Pages

_ALL = 10**9  # examples of a corpus
_WARM_UPS = 12  # requests of the queue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput(AtOnce):
    """Answer a long queue of a corpus' prompts, and print how many a second at each number of places."""

    data: Path
    """A corpus directory that python -m data wrote."""
    split: Annotated[tuple[str, ...], commandline.commas("train", "validation", "test")] = ("validation",)
    """Its parts, the first ones first; several with commas."""
    num_requests: int = 1000
    """Most prompts of the queue."""
    min_prompt_tokens: int = 1
    """Fewest tokens of a prompt."""
    places: Annotated[tuple[int, ...], commandline.commas(int)] = (64, 128, 256)
    """Sequences that are decoded at the same time, one measurement each; several with commas."""
    min_read_tokens: int = 1024
    """Fewest prompt tokens that are read of one prompt at once; more need fewer programs, and so does their compiling."""
    seed: int = 0
    """Of the order."""
    json: Path | None = None
    """Write the figures into this file, after each of them; - is standard output."""

    def __post_init__(self) -> None:
        check_range(self, "num_requests", "min_prompt_tokens", low=1)
        if min(self.places, default=0) < 1:
            raise UserError(f"--places is {self.places}; allowed: numbers from 1 on")

    def run(self) -> None:
        lm = self.load()
        work, drawn = queue(self, lm)
        prompts = [len(item.prompt_ids) for item in work]
        described = self.described(lm)
        del described["places"]  # rows have theirs
        report: dict[str, Any] = {
            **described,
            **drawn,
            "num_requests": len(work),
            "mean_prompt_tokens": float(np.mean(prompts)),
            "most_prompt_tokens": max(prompts),
            "max_new_tokens": work[0].new_tokens,
            "rows": [],
        }
        print(header_line(report), f"{len(work):,} prompts of {np.mean(prompts):,.0f} tokens", sep="\n", flush=True)
        for number in self.places:
            report["rows"].append(measure(self, lm, work, number))
            files.write_rows(self.json, report, complete=number == self.places[-1])


def queue(settings: Throughput, lm: SpanLM) -> tuple[list[Work], dict[str, Any]]:
    """Draw the requests of a queue, in random order; say of which corpus, and how many each of its parts gave.

    Raises: UserError where no prompt is long enough, or none leaves room for the longest gold response.
    """

    def long_enough() -> Iterator[tuple[str, Any, int]]:
        for split in settings.split:
            task, sets, _ = examples.stored(settings.data, lm.task, TASKS, _ALL, split)
            for example in itertools.chain.from_iterable(sets.values()):
                ids = task.encode_prompt(example.prompt)
                if len(ids) >= settings.min_prompt_tokens:
                    yield split, ids, len(example.response_ids)

    found = list(itertools.islice(long_enough(), settings.num_requests))
    new_tokens = MARGIN_TOKENS + max((length for split, _, length in found if split == found[0][0]), default=0)
    found = [own for own in found if len(own[1]) + new_tokens <= lm.model.config.max_context_tokens]
    if not found:
        raise UserError(f"{settings.data}: no prompt of {settings.min_prompt_tokens} tokens or more that leaves room for a response")
    order = np.random.default_rng(settings.seed).permutation(len(found)).tolist()
    drawn = {"data": settings.data.resolve().name} | {f"of_{split}": sum(own[0] == split for own in found) for split in settings.split}
    return [Work(found[i][1], new_tokens) for i in order], drawn


def measure(settings: Throughput, lm: SpanLM, work: list[Work], places: int) -> dict[str, Any]:
    """Answer the queue with so many places, after a few of its requests."""
    gc.collect()  # the memory of the one before
    scheduler = settings.scheduler(lm, work, places)
    run_at_once(scheduler, work[:_WARM_UPS])
    scheduler.pages = Pages(scheduler.num_pages)  # forgets what it has read
    row = run_at_once(scheduler, work)
    per_second, tokens = len(work) / row["seconds"], row["generated_tokens"] / len(work)
    ended = row["finished"].get("stop", 0) / len(work)
    print(f"{places:5} places: {per_second:7.1f} responses/s of {tokens:.0f} tokens, {ended:.1%} ended", flush=True)
    more = {"cache_tokens": scheduler.num_pages * scheduler.config.page_tokens, "responses_per_second": per_second}
    return {"places": places, **more, "mean_response_tokens": tokens, "ended_fraction": ended, **row}


def main() -> None:
    run_command(Throughput, description=__doc__)


if __name__ == "__main__":
    main()
