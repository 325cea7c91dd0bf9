"""Answer a long queue of a corpus' prompts by a scheduler, at several numbers of places: responses a second, and what they read.

    python -m benchmarks.throughput runs/labels-0/model --data corpora/papers --split validation,train --min-prompt-tokens 4096 --json FILE

All prompts are there at once, and all that have places are read before a chunk of tokens is decoded. A response ends by
itself, or with as many tokens as the longest gold one of the first part has, and 16 more; prompts without room for these are left out.
Programs are compiled and have run before. At the end places are empty while the last responses are written, which costs the more the
shorter a queue is and the more places there are: `--rounds` makes it longer than the corpus is. All rounds have one order, so that in a
cache with room for fewer prompts than a round has, most have been evicted before they return; each figure says what was found in it.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

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
from selfspan_jax.serving.throughput import longest_first
from selfspan_jax.viewing.text import warning_lines

_ALL = 10**9  # examples of a corpus
_WARM_UPS = 12  # requests of the queue
# Of a row, what is said elsewhere or is of no use here.
_LEFT_OUT = ("num_requests", "requests_per_second", "right_answers_per_second", "tokens", "num_left", "num_failed", "failures")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput(AtOnce):
    """Answer a long queue of a corpus' prompts, and print how many a second at each number of places."""

    data: Path
    """A corpus directory that python -m data wrote."""
    split: Annotated[tuple[str, ...], commandline.commas("train", "validation", "test")] = ("validation",)
    """Its parts, the first ones first; several with commas."""
    num_requests: int = 1000
    """Most prompts of a round of the queue."""
    rounds: int = 1
    """How often they are all asked, one round after the other."""
    min_prompt_tokens: int = 1
    """Fewest tokens of a prompt."""
    max_new_tokens: int | None = None
    """Most tokens of a response, 1 to read prompts alone. Default: 16 more than the longest gold one of the first part."""
    places: Annotated[tuple[int, ...], commandline.commas(int)] = (64, 128, 256)
    """Sequences that are decoded at the same time, one measurement each; several with commas."""
    order: Literal["random", "longest"] = "random"
    """Of the queue: random, or the longest prompts first, as decode.py eval and SpanLM.generate have them."""
    seed: int = 0
    """Of a random order."""
    json: Path | None = None
    """Write the figures into this file, after each of them; - is standard output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_requests", "rounds", "min_prompt_tokens", "places", low=1)
        if self.max_new_tokens is not None:
            check_range(self, "max_new_tokens", low=1)
        check_range(self, "seed", low=0)
        if len(set(self.split)) < len(self.split):
            raise UserError(f"--split is {','.join(self.split)}; allowed: each part once")

    def run(self) -> None:
        lm = self.load()
        work, drawn = queue(self, lm)
        if (most := max(self.places)) > len(work):
            raise UserError(f"--places has {most}; allowed: up to the {len(work)} prompts of the queue")
        prompts = [len(item.prompt_ids) for item in work]
        described = self.described(lm)
        del described["places"]  # rows have theirs
        report: dict[str, Any] = {
            **described,
            **drawn,
            "num_requests": len(work) // self.rounds,
            "mean_prompt_tokens": float(np.mean(prompts)),
            "most_prompt_tokens": max(prompts),
            "max_new_tokens": work[0].new_tokens,
            "rows": [],
        }
        told = warning_lines(drawn["warnings"])
        print(header_line(report), *told, f"{len(work):,} prompts of {np.mean(prompts):,.0f} tokens", sep="\n", flush=True)
        for number in self.places:
            report["rows"].append(measure(self, lm, work, number))
            files.write_rows(self.json, report, complete=False)
        files.write_rows(self.json, report, complete=True)


def queue(settings: Throughput, lm: SpanLM) -> tuple[list[Work], dict[str, Any]]:
    """Draw the requests of a queue, in their order; say of which corpus, and how many each of its parts gave.

    Raises: UserError where no prompt is long enough, or none leaves room for the longest gold response.
    """
    warnings: list[str] = []

    def long_enough(split: str) -> Iterator[tuple[str, Any, int]]:
        task, sets, drawn = examples.stored(settings.data, lm.task, TASKS, _ALL, split)
        warnings.extend(drawn["warnings"])
        for example in itertools.chain.from_iterable(sets.values()):
            ids = task.encode_prompt(example.prompt)
            if len(ids) >= settings.min_prompt_tokens:
                yield split, ids, len(example.response_ids)

    first, *others = settings.split
    own = list(long_enough(first))
    new_tokens = settings.max_new_tokens or MARGIN_TOKENS + max((length for _, _, length in own), default=0)
    every = itertools.chain(own, itertools.chain.from_iterable(map(long_enough, others)))
    with_room = (prompt for prompt in every if len(prompt[1]) + new_tokens <= lm.model.config.max_context_tokens)
    found = list(itertools.islice(with_room, settings.num_requests))
    if not found:
        raise UserError(f"{settings.data}: no prompt of {settings.min_prompt_tokens} tokens or more leaves room for {new_tokens} new ones")
    random = settings.order == "random"
    order = np.random.default_rng(settings.seed).permutation(len(found)).tolist() if random else longest_first([own[1] for own in found])
    counts = {f"of_{split}": sum(own[0] == split for own in found) for split in settings.split}
    drawn = {"data": settings.data.resolve().name, "warnings": warnings, **counts}
    return [Work(found[i][1], new_tokens) for i in order] * settings.rounds, drawn


def measure(settings: Throughput, lm: SpanLM, work: list[Work], places: int) -> dict[str, Any]:
    """Answer the queue with so many places, after a few of its requests."""
    gc.collect()  # the memory of the one before
    scheduler = settings.scheduler(lm, work, places)
    run_at_once(scheduler, work[:_WARM_UPS])
    scheduler.pages = Pages(scheduler.num_pages)  # forgets what it has read
    row = run_at_once(scheduler, work)
    rates = {
        "responses_per_second": len(work) / row["seconds"],
        "mean_response_tokens": row["generated_tokens"] / len(work),
        "mean_attended_tokens": row["attended_tokens"] / row["generated_tokens"],
        "ended_fraction": row["finished"].get("stop", 0) / len(work),
        "prefix_hit_fraction": row["prefix_hit_tokens"] / (row["prompt_tokens"] + row["prefix_hit_tokens"]),
    }
    told = "{:7.1f} responses/s, of {:.0f} tokens that read {:,.0f} each, {:.1%} ended, {:.1%} of the prompts' tokens found in the cache"
    print(f"{places:5} places:", told.format(*rates.values()), flush=True)
    size = {"places": places, "cache_tokens": scheduler.num_pages * scheduler.config.page_tokens}
    return {**size, **rates, **{name: value for name, value in row.items() if name not in _LEFT_OUT}}


def main() -> None:
    run_command(Throughput, description=__doc__)


if __name__ == "__main__":
    main()
