"""A scheduler in place of static batches, for requests that are all there and that nobody watches: when it is faster, how it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from selfspan_jax.config import DecodeConfig, ServingConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.state import bucket
from selfspan_jax.serving.pages import page_keys
from selfspan_jax.serving.requests import Request, Tokens
from selfspan_jax.serving.scheduler import Scheduler
from selfspan_jax.tiers.engine import HostEngine

# Places for each sequence of a static batch on the same rows of cache, because few are at their full length;
# and from how many batches, and how many times fewer steps, on that is taken to be faster: 1.77 times fewer gave 1.17 times the answers
# between two runs on H100s; where it begins to pay was not measured.
PLACES_PER_SEQUENCE, MIN_BATCHES, MIN_SAVING = 2, 4, 1.65
# From what share of all prompts' tokens on, that an earlier prompt begins with too, a scheduler is taken to be faster: it reads these once.
MIN_SHARED = 0.5
THROUGHPUT_PREFILL_TOKENS = 4096


def shared_beginning(prompts: Sequence[Int[np.ndarray, "T"]]) -> float:
    """Return what share of the prompts' tokens stands in pages that an earlier prompt begins with too."""
    keys = [key for prompt in prompts for key in page_keys(prompt, ServingConfig.page_tokens)]
    return (len(keys) - len(set(keys))) * ServingConfig.page_tokens / max(1, sum(map(len, prompts)))


def is_faster(
    engine: Engine, config: DecodeConfig, prompt_tokens: Sequence[int], new_tokens: Sequence[int], batch_size: int, shared: float = 0.0
) -> bool:
    """Tell whether requests that are all there take far fewer decode steps here, or far less reading, than in static batches in this order.

    On a GPU, that is, where a step of more sequences takes little longer, and where nothing is asked for that a scheduler cannot do.
    `new_tokens` may be guesses; only their ratios to each other and to the prompts count. `shared` is what `shared_beginning` says.
    """
    prompts, new = np.array(prompt_tokens), np.array(new_tokens)
    # Against static batches a scheduler was timed with all rows on one GPU; of layers with a memory it has no pages.
    one_device = not isinstance(engine, HostEngine) and engine.config.mask != "memory" and (engine.mesh is None or engine.mesh.size == 1)
    if not one_device or config.prefill != "dense" or jax.default_backend() == "cpu":
        return False
    if shared >= MIN_SHARED:
        return True
    if len(new) < MIN_BATCHES * batch_size:
        return False
    static = sum(int(new[start : start + batch_size].max()) for start in range(0, len(new), batch_size))
    rows = batch_size * (prompts.max() + new.max())
    together = min(PLACES_PER_SEQUENCE * batch_size, rows / np.mean(prompts + new / 2))
    lost = 1.5 * ServingConfig.chunk_tokens  # after the end of a response, until its place is free
    return static >= MIN_SAVING * ((new + lost).sum() / together + new.max() / 2)


def throughput_scheduler(
    engine: Engine, config: DecodeConfig, batch_size: int, prompt_tokens: int, context_tokens: int, **changes: Any
) -> Scheduler:
    """Make what runs requests that are all there, on as many rows of cache as a static batch of prompts of up to so many tokens has.

    Its prompts have all been read before a chunk begins. `changes` are fields of `ServingConfig`.
    """
    page = ServingConfig.page_tokens
    rows = max(batch_size * (bucket(prompt_tokens) + config.max_new_tokens), context_tokens + page)
    sizes = {"num_pages": rows // page, "prefill_tokens": THROUGHPUT_PREFILL_TOKENS}
    serving = ServingConfig(PLACES_PER_SEQUENCE * batch_size, context_tokens, reads_per_chunk=None, **sizes)
    options: dict[str, Any] = {"attention": config.attention, "stop_ids": config.stop_ids, "implementation": config.implementation}
    return Scheduler(engine, dataclasses.replace(serving, **changes), **options)


def longest_first(prompts: Sequence[Int[np.ndarray, "T"]]) -> list[int]:
    """Order prompts that are all there by their length: the responses to the longest are likely to be the longest.

    Prompts about one document have about the same length. So what follows it, which begins at the same token, is read together.

    Returns: the numbers of the prompts.
    """
    return sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))


def run_together(scheduler: Scheduler, requests: Sequence[Request], on_end: Callable[[], None] = lambda: None) -> list[Tokens]:
    """Run requests to their ends, those with the longest prompts first; call `on_end` at each.

    Raises: JaxRuntimeError where the device fails.
    """
    order = longest_first([request.prompt_ids for request in requests])
    found = dict(zip(order, scheduler.generate([requests[number] for number in order], on_end)))
    if failed := next((tokens.error for tokens in found.values() if tokens.error), None):
        raise jax.errors.JaxRuntimeError(failed)
    return [found[number] for number in range(len(requests))]
