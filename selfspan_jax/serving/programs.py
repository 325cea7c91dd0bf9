"""The running state of a scheduler, and the compiled programs that change it: their few shapes, and what the host hands them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Int

from selfspan_jax.config import MAX_LOGPROBS, DecodeConfig, SamplingFields, ServingConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.errors import UserError
from selfspan_jax.parallel import memory
from selfspan_jax.parallel.compiling import compile_all
from selfspan_jax.serving.host_pages import WRITTEN_AT_ONCE, PagedWorkingSets, write_pages
from selfspan_jax.serving.requests import Request
from selfspan_jax.serving.running import Decoded, Prompts, decode_chunk, empty_state, read_prompts
from selfspan_jax.tiers.engine import HostEngine, check_working_sets

NEUTRAL = SamplingFields(0.0, 0.0, 0, 0.0, 1.0)
# What a chunk computes: the first so many fields of sampling, and so many log-probabilities. Each costs more than the one before.
LEVELS = ((0, 0), (1, 0), (len(NEUTRAL), 0), (len(NEUTRAL), MAX_LOGPROBS))
_KEY_TOKENS = 64  # what numbers of queries and of keys are multiples of
_LARGE_TOKENS = 1024  # of one prompt at once: from here on sizes lie closer to each other
_CACHE_SHARE = 0.8  # of free memory; the rest is for what programs need meanwhile
_UNKNOWN_MEMORY_BYTES = 2**30  # taken for the cache where the device does not say what it has


class Prompt(Protocol):
    """A prompt to read: its tokens, the pages of its rows, and the place that its sequence takes once all of them are read."""

    request: Request
    token_ids: Int[np.ndarray, "T"]
    pages: list[int]
    place: int | None
    num_new: int  # of the tokens, those that were sampled


class Programs:
    """Read prompts into a running state, and decode chunks of it. Nothing here waits for the device.

    There are few shapes, so that few are compiled. A reading has up to `prefill_tokens` in all: one long prompt, or several shorter ones
    (`sizes_of_readings`). The first part of a prompt has itself as keys; those that follow have one of few numbers of them.

    Args:
      context_tokens: of each sequence.

    Raises: DoesNotFit where no page fits into memory.
    """

    def __init__(self, engine: Engine, config: ServingConfig, decode_config: DecodeConfig, context_tokens: int):
        self._engine, self._config, self._decode_config = engine, config, decode_config
        self.pages_each = -(-context_tokens // config.page_tokens)
        self._capacity = self.pages_each * config.page_tokens
        self._working_set = self._ring = 0  # rows of each sequence on the device, where pages lie in host memory
        if isinstance(engine, HostEngine):
            if config.prefill_tokens % config.page_tokens:
                raise UserError(f"prefill_tokens is {config.prefill_tokens}; allowed: multiples of the page's {config.page_tokens} tokens")
            page, least = config.page_tokens, config.page_tokens + config.chunk_tokens
            self._working_set = min(engine.working_set_tokens, self._capacity)
            self._ring = -(-max(least, self._working_set // 4) // page) * page
        if self._ring:
            left = self._left_bytes()
            left = int(_CACHE_SHARE * memory.free_host_memory_bytes()) if left is None else left  # of a CPU, which has no other
            check_working_sets(config.num_sequences, self._working_set, self._ring, engine.config.row_bytes, left)
        self.num_pages = self._pages_that_fit() if config.num_pages is None else config.num_pages
        if self._ring:
            rows = (self.num_pages + 1) * config.page_tokens
            memory.take_host_memory(rows * engine.config.row_bytes, f"{self.num_pages} pages of {config.page_tokens} tokens")
        self._query_sizes = sizes_of_readings(config.prefill_tokens, config.min_read_tokens)
        self._key_sizes = [-(-(self._capacity + config.prefill_tokens) // _KEY_TOKENS) * _KEY_TOKENS]
        while self._key_sizes[0] > 4 * config.prefill_tokens:
            self._key_sizes.insert(0, -(-self._key_sizes[0] // (4 * _KEY_TOKENS)) * _KEY_TOKENS)
        self.state: Any = None
        self.reset()

    def reset(self) -> None:
        """Begin with an empty state."""
        config, engine = self._config, self._engine
        self.state = None  # the memory of one that failed is free before the next one is allocated
        sizes = (self.num_pages * config.page_tokens, config.num_sequences, self._capacity)
        if not self._ring:
            self.state = empty_state(engine.graph, engine.params, self._decode_config, *sizes)
            return
        state = empty_state(engine.graph, engine.params, self._decode_config, config.page_tokens, *sizes[1:])
        table, widths = state.cache.slot_table, (self._working_set, self._ring)
        cache = PagedWorkingSets.allocated(engine.config, self.num_pages, config.page_tokens, table, *widths)
        self.state = dataclasses.replace(state, cache=cache)

    def part_tokens(self, left: int, *, responses: bool) -> int:
        """Choose how many tokens of a prompt are read at once: the size that what is left of it fits best."""
        return self._query_sizes[0] if responses else min(size for size in self._query_sizes if size >= min(left, self._query_sizes[0]))

    def prompts_at_once(self, num_queries: int, *, responses: bool) -> int:
        """Return how many prompts are read at once where so many tokens are read of each."""
        return 1 if responses else self._config.prefill_tokens // num_queries

    def read(self, prompts: Sequence[Prompt], first: int, num_queries: int, *, responses: bool) -> None:
        """Read so many tokens of prompts, from `first` on; those that end there take their places.

        Args:
          responses: they go on after `<solve>`.
        """
        keys = min(size for size in self._all_key_sizes(num_queries) if size >= first + num_queries)
        self.state = read_prompts(*self._read_arguments(prompts, first, num_queries, keys, responses))

    def decode(
        self,
        level: tuple[int, int],
        num_steps: int,
        table: Int[np.ndarray, "B A/page"],
        until: Int[np.ndarray, "B"],
        sampling: SamplingFields,
    ) -> Decoded:
        """Decode a chunk; see `decode_chunk`. The level is one of LEVELS; arrays may change afterwards."""
        self.state, decoded = decode_chunk(*self._chunk_arguments(level, num_steps, table, until, sampling))
        return decoded

    def write_pages(self, before: Int[np.ndarray, "B"], after: Int[np.ndarray, "B"], table: Int[np.ndarray, "B A/page"]) -> None:
        """Write pages to host memory that tokens of a chunk have filled; nothing where pages lie on the device.

        Args:
          before, after: tokens of each place before and after the chunk.
        """
        if not self._ring:
            return
        full = [before // self._config.page_tokens, after // self._config.page_tokens]
        places = np.flatnonzero(full[1] > full[0]).tolist()
        filled = [(place, number, table[place, number]) for place in places for number in range(full[0][place], full[1][place])]
        for start in range(0, len(filled), WRITTEN_AT_ONCE):
            self._write_pages(filled[start : start + WRITTEN_AT_ONCE])

    def _write_pages(self, filled: Sequence[tuple[int, int, int]]) -> None:
        self.state = dataclasses.replace(self.state, cache=write_pages(*self._write_arguments(filled)))

    def _write_arguments(self, filled: Sequence[tuple[int, int, int]]) -> tuple[Any, ...]:
        nothing = [(0, 0, self.num_pages)] * (WRITTEN_AT_ONCE - len(filled))  # the spare page
        return self.state.cache, *np.array([*filled, *nothing], np.int32).T.copy()

    def warm_up(self, *num_steps: int, draws: bool = True, on_progress: Callable[[int, int], None] = lambda done, of: None) -> None:
        """Compile every program, several at once, and run each on no request, so that none is compiled later.

        Programs run in this thread, once all are compiled: a GPU records some as graphs when they run, and fails where another thread
        loads one meanwhile. Arguments as for `lowering` and `compile_all`.
        """
        compile_all(self.lowering(*num_steps, draws=draws), on_progress)
        if jax.default_backend() == "cpu":  # which records nothing, and takes as long for the first time as for each
            return
        for steps in num_steps:
            for level in LEVELS if draws else LEVELS[:1]:
                self.decode(level, steps, *self._nothing())
        for sizes in self._read_sizes():
            self.state = read_prompts(*self._read_arguments([], 0, *sizes))
        if self._ring:
            self._write_pages([])
        jax.block_until_ready(self.state)

    def lowering(self, *num_steps: int, draws: bool = True) -> list[Callable[[], Callable[[], Any]]]:
        """Return the programs for `compile_all`, those first that take long; nothing is run.

        Args:
          num_steps: of chunks.
          draws: False: only those of greedy decoding.
        """
        found = [functools.partial(read_prompts.lower, *self._read_arguments([], 0, *sizes)) for sizes in self._read_sizes()]
        for steps in num_steps:
            for level in LEVELS if draws else LEVELS[:1]:
                found.append(functools.partial(decode_chunk.lower, *self._chunk_arguments(level, steps, *self._nothing())))
        found += [functools.partial(write_pages.lower, *self._write_arguments([]))] if self._ring else []
        return [functools.partial(_compiler, lower) for lower in found]

    def _nothing(self) -> tuple[Int[np.ndarray, "B A/page"], Int[np.ndarray, "B"], SamplingFields]:
        size = self._config.num_sequences
        return np.full((size, self.pages_each), -1, np.int32), np.zeros(size, np.int32), neutral_sampling(size)

    def _all_key_sizes(self, queries: int) -> list[int]:
        return [queries, *(size for size in self._key_sizes if size > queries)]

    def _read_sizes(self) -> list[tuple[int, int, bool]]:
        reads = [(queries, keys, False) for queries in self._query_sizes for keys in self._all_key_sizes(queries)]
        return reads + [(self._query_sizes[0], keys, True) for keys in self._all_key_sizes(self._query_sizes[0])]

    def _read_arguments(self, group: Sequence[Prompt], first: int, num_queries: int, num_keys: int, responses: bool) -> tuple[Any, ...]:
        size, rows = self._config.num_sequences, self.prompts_at_once(num_queries, responses=responses)
        prompts = Prompts(
            token_ids=np.full((rows, num_keys), self._engine.vocab.pad_id, np.int32),
            first=np.array(first, np.int32),
            lengths=np.zeros(rows, np.int32),
            pages=np.full((rows, self.pages_each), -1, np.int32),
            sources=np.full(size, -1, np.int32),
            num_new=np.zeros(rows, np.int32),
            seeds=np.zeros((rows, 3), np.uint32),
        )
        for row, prompt in enumerate(group):
            end = min(first + num_queries, len(prompt.token_ids))
            prompts.token_ids[row, :end] = prompt.token_ids[:end]
            prompts.lengths[row] = end
            prompts.pages[row, : len(prompt.pages)] = prompt.pages
            if end == len(prompt.token_ids):
                prompts.sources[prompt.place] = row
            prompts.num_new[row] = prompt.num_new
            prompts.seeds[row] = (*divmod(int(prompt.request.seed), 2**32), prompt.request.sample)
        options = (self._decode_config, self._config.page_tokens, num_queries, responses)
        return (self._engine.graph, self._engine.params, self.state, prompts, *options)

    def _chunk_arguments(self, level, num_steps, table, until, sampling) -> tuple[Any, ...]:
        # Copies, because the device may read them after they have changed.
        num_fields, num_logprobs = level
        fields = SamplingFields(*(field.copy() if i < num_fields else None for i, field in enumerate(sampling)))
        options = (self._decode_config, self._config.page_tokens, num_steps, min(num_logprobs, self._engine.vocab_size))
        return (self._engine.graph, self._engine.params, self.state, table.copy(), until.copy(), fields, *options)

    def _left_bytes(self) -> int | None:
        """Return what the rest of the state, and what programs need meanwhile, leave of free memory; None where the device does not say."""
        config, engine = self._config, self._engine
        sizes = (config.page_tokens, config.num_sequences, self._capacity)
        state = jax.eval_shape(lambda params: empty_state(engine.graph, params, self._decode_config, *sizes), engine.params)
        rest, free = memory.bytes_of(dataclasses.replace(state, cache=state.cache.slot_table)), memory.free_memory_bytes()
        return None if free is None else int(_CACHE_SHARE * (free - rest))

    def _pages_that_fit(self) -> int:
        """Count the pages that free memory has room for."""
        config, page_bytes = self._config, self._config.page_tokens * self._engine.shard.config.row_bytes
        if self._ring:
            beside, left = "host memory leaves", int(_CACHE_SHARE * memory.free_host_memory_bytes()) - page_bytes  # one page is nobody's
        else:
            beside, free = "the state leaves", self._left_bytes()
            left = _UNKNOWN_MEMORY_BYTES if free is None else free
        if left < page_bytes:
            raise memory.DoesNotFit(f"does not fit: {beside} no room for the cache")
        return min(config.num_sequences * self.pages_each, left // page_bytes)


def sizes_of_readings(prefill_tokens: int, min_read_tokens: int) -> list[int]:
    """List how many tokens may be read of one prompt at once, the most first.

    They are all of a reading's, a half, a third, a quarter, a sixth and so on. Between two large ones stands their mean, because a prompt
    is read as if it had as many tokens as the next size.
    """
    shares = {prefill_tokens // (n << i) // _KEY_TOKENS * _KEY_TOKENS for i in range(24) for n in (2, 3)}
    sizes = [prefill_tokens, *sorted((size for size in shares if size >= min_read_tokens), reverse=True)]
    means = {(more + less) // 2 // _KEY_TOKENS * _KEY_TOKENS for more, less in itertools.pairwise(sizes) if less >= _LARGE_TOKENS}
    return sorted({*sizes, *means}, reverse=True)


def neutral_sampling(num_sequences: int) -> SamplingFields:
    """Return what changes nothing of any sequence's logits."""
    return SamplingFields(*(np.full(num_sequences, value, np.array(value, f"{type(value).__name__}32").dtype) for value in NEUTRAL))


def level_of(request: Request) -> tuple[int, int]:
    """Return the first of LEVELS that has what a request asks for."""
    asked = [number for number, value in enumerate(SamplingFields.of(request.sampling), 1) if value is not None]
    return next(level for level in LEVELS if level[0] >= max(asked, default=0) and (level[1] > 0 or not request.logprobs))


def _compiler(lower: Callable[[], jax.stages.Lowered]) -> Callable[[], Any]:
    return lower().compile
