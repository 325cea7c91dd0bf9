"""One model, the requests to it, and two systems that run them: a scheduler, and static batches."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Int
from tyro.conf import Positional, arg

from benchmarks.arrivals import Sent, summary
from benchmarks.shapes import Shape, named_shape
from benchmarks.timing import report_header
from data import arithmetic
from data.tasks import TASKS
from selfspan_jax import files
from selfspan_jax.config import DecodeConfig, ServingConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.state import bucket
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM
from selfspan_jax.parallel.compiling import compile_all
from selfspan_jax.serving.requests import Request, Tokens
from selfspan_jax.serving.scheduler import Scheduler
from selfspan_jax.serving.throughput import THROUGHPUT_PREFILL_TOKENS, throughput_scheduler

EQUAL_PROMPT_TOKENS, EQUAL_NEW_TOKENS = 256, 512
MIN_PROMPT_TOKENS, LONG_PROMPT_TOKENS = 32, 2000
DEFAULT_CONTEXT, MAX_QUEUE = 4096, 10**6


@dataclasses.dataclass(frozen=True)
class Work:
    """A request: a prompt, how many tokens its response has at most, and what tells whether that is right."""

    prompt_ids: Int[np.ndarray, "T"]
    new_tokens: int
    is_right: Callable[[Int[np.ndarray, "T"]], bool] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtOnce:
    """What benchmarks of requests that are all there at once are told: the model, and how a scheduler runs them."""

    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")]
    """Directory of a finished model, or of its adapter."""
    base: Path | None = None
    """For an adapter, the pretrained model that it was trained on."""
    attention: Literal["span", "dense"] | None = None
    """What responses attend to; by default as the model was trained."""
    chunk_tokens: int = ServingConfig.chunk_tokens
    """Decode steps between two looks of the host."""
    prefill_tokens: int = THROUGHPUT_PREFILL_TOKENS
    """Most prompt tokens that are read at once; all prompts that have places are read before a chunk begins."""
    min_read_tokens: int = ServingConfig.min_read_tokens
    """Fewest prompt tokens that are read of one prompt at once; more need fewer programs, and so does their compiling."""

    def __post_init__(self) -> None:
        self._serving()  # refuses sizes that cannot be

    def load(self) -> SpanLM:
        """Load the model."""
        return SpanLM.load(self.checkpoint, TASKS, base=self.base)

    def scheduler(self, lm: SpanLM, work: Sequence[Work], places: int) -> Scheduler:
        """Make a scheduler of the requests, its programs ready."""
        context = min(max(len(item.prompt_ids) + item.new_tokens for item in work), lm.model.config.max_context_tokens)
        config = self._serving(num_sequences=places, context_tokens=context, max_queue=len(work))
        scheduler = Scheduler(lm.engine, config, attention=self.attention or lm.model.config.mask, stop_ids=lm.end_ids[1:])
        scheduler.warm_up(draws=False)
        return scheduler

    def _serving(self, **more: int) -> ServingConfig:
        sizes = {"chunk_tokens": self.chunk_tokens, "prefill_tokens": self.prefill_tokens, "min_read_tokens": self.min_read_tokens}
        return ServingConfig(reads_per_chunk=None, **sizes, **more)

    def described(self, lm: SpanLM) -> dict[str, Any]:
        """Describe the device, the settings and the model, for a report."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("json", "checkpoint", "base")}
        model = {"attention": self.attention or lm.model.config.mask, "num_parameters": lm.model.num_parameters}
        return {**report_header(), "checkpoint": files.model_name(self.checkpoint), **own, **model}


class Model:
    """What is measured: an engine, its attention, and requests to it. Settings are those of `benchmarks.batching`."""

    def __init__(self, settings: Any):
        self.settings, self.rng = settings, np.random.default_rng(settings.seed)
        self.lm = SpanLM.load(settings.checkpoint, TASKS) if settings.checkpoint else None
        if self.lm is not None:
            if not isinstance(self.lm.task, arithmetic.ArithmeticTask):
                raise UserError(f"{settings.checkpoint} is no model of arithmetic")
            self.engine, self.attention, self.stop_ids = self.lm.engine, self.lm.model.config.mask, self.lm.end_ids[1:]
            self.work = self.expressions(settings.num_requests, 2, settings.max_ops)
            model = self.lm.model
            self.endless = Engine(endless(Shape(model.config, model.vocab, self.engine.vocab_size), settings.seed))
        else:
            assert settings.shape is not None
            self.engine, self.attention, self.stop_ids = Engine(endless(named_shape(settings.shape), settings.seed)), "dense", ()
            self.endless = self.engine
            longest = min(settings.max_prompt_tokens, self.engine.config.max_context_tokens - settings.response_tokens[1])
            bounds = (MIN_PROMPT_TOKENS, longest), settings.response_tokens
            sizes = [np.exp(self.rng.uniform(np.log(few), np.log(most), settings.num_requests)).astype(int) for few, most in bounds]
            self.work = [Work(self.tokens(int(prompt)), int(new)) for prompt, new in zip(*sizes)]
        self.prompt_tokens, self.new_tokens = (max(sizes) for sizes in zip(*((len(w.prompt_ids), w.new_tokens) for w in self.work)))
        room = -(-self.new_tokens // ServingConfig.chunk_tokens) * ServingConfig.chunk_tokens
        self.rows = settings.batch_size * (bucket(self.prompt_tokens) + room)
        self.config = DecodeConfig(self.attention, room, stop_ids=self.stop_ids)

    def expressions(self, number: int, min_ops: int, max_ops: int) -> list[Work]:
        """Draw expressions; a response has room for 16 tokens more than the right one has."""
        assert self.lm is not None
        task: Any = self.lm.task
        seed = self.settings.seed + 1
        drawn = arithmetic.stream(task.corpus(min_ops=min_ops, max_ops=max_ops), seed=seed, split="test")

        def work(example: Any) -> Work:
            def is_right(tokens) -> bool:
                return np.array_equal(tokens, example.response_ids) or bool(task.verify(example.prompt, tokens).answer_right)

            return Work(task.encode_prompt(example.prompt), len(example.response_ids) + 16, is_right)

        return [work(example) for example in itertools.islice(drawn, number)]

    def tokens(self, number: int) -> Int[np.ndarray, "T"]:
        """Draw a prompt."""
        return self.rng.integers(self.engine.vocab_size // 2, self.engine.vocab_size, number, np.int32)

    def scheduler(self, engine: Engine, *, defaults: bool = False) -> Scheduler:
        """Make a scheduler, of many places or of a server's defaults."""
        settings, context = self.settings, max(self.prompt_tokens + self.new_tokens, EQUAL_PROMPT_TOKENS + EQUAL_NEW_TOKENS)
        if defaults:
            own = ServingConfig(context_tokens=min(DEFAULT_CONTEXT, engine.config.max_context_tokens), max_queue=MAX_QUEUE)
            return Scheduler(engine, own, attention=self.attention, stop_ids=self.stop_ids)
        options = {"num_sequences": settings.slots, "prefill_tokens": settings.prefill_tokens, "max_queue": MAX_QUEUE}
        options |= {"chunk_tokens": settings.chunk_tokens[0], "min_read_tokens": settings.min_read_tokens}
        return throughput_scheduler(engine, self.config, settings.batch_size, self.prompt_tokens, context, **options)

    def compile(self) -> None:
        """Compile what the parts need, several programs at once, and run those of schedulers; one that is made later finds them."""
        parts, settings = self.settings.parts, self.settings
        programs: list[Callable[[], Callable[[], Any]]] = []

        def add(*arguments: Any) -> None:  # an engine makes its programs ready in the thread that compiles them
            programs.append(lambda: functools.partial(self.engine.compile, *arguments))

        schedulers = []
        if {"mixed", "equal", "rates"} & {*parts}:
            schedulers.append((self.scheduler(self.engine), settings.chunk_tokens))
        if {"equal", "stalls", "first"} & {*parts}:
            schedulers.append((self.scheduler(self.engine, defaults=True), (ServingConfig.chunk_tokens,)))
        for scheduler, chunks in schedulers:
            programs += scheduler.programs.lowering(*chunks, draws=False)
        if "mixed" in parts:
            add(settings.batch_size, self.prompt_tokens, self.config)
        if "equal" in parts:
            for size in self.equal_sizes():
                add(size, EQUAL_PROMPT_TOKENS, self.equal_config())
        compile_all(programs)
        for scheduler, chunks in schedulers:
            scheduler.programs.warm_up(*chunks, draws=False)
        gc.collect()
        gc.freeze()  # as the server does

    def equal_sizes(self) -> tuple[int, int]:
        """Return the sequences of `equal`: of many places, and of a server's defaults."""
        return self.settings.slots, ServingConfig.num_sequences

    def equal_config(self) -> DecodeConfig:
        """Return what a static batch of equal lengths decodes with."""
        return DecodeConfig(self.attention, EQUAL_NEW_TOKENS, stop_ids=self.stop_ids)


def set_chunk_tokens(scheduler: Scheduler, chunk_tokens: int) -> None:
    """Set how many tokens the next chunks of an idle scheduler have."""
    scheduler.config = dataclasses.replace(scheduler.config, chunk_tokens=chunk_tokens)


def endless(shape: Shape, seed: int) -> Any:
    """Draw random weights whose greedy responses never end: the logit of `<eos>` is 0, and some other one is above."""
    model = shape.random(seed)
    table = model.embed_tokens.embedding if model.lm_head is None else model.lm_head.weight
    table[...] = table[...].at[shape.vocab.eos_id].set(0)
    return model


def run_scheduler(scheduler: Scheduler, work: Sequence[Work], times: Float[np.ndarray, "R"], *, expected: bool = False) -> list[Sent]:
    """Give each request to the scheduler when it arrives, and run until all have ended; `expected`: it is told how long they become."""
    sent = [Sent(float(at)) for at in times]
    parts: list[list[Tokens]] = [[] for _ in work]
    begin, given = time.perf_counter(), 0

    def deliver(number: int) -> Callable[[Tokens], None]:
        def take(tokens: Tokens) -> None:
            if len(tokens.token_ids):
                sent[number].events.append(time.perf_counter() - begin)
                sent[number].tokens += len(tokens.token_ids)
            parts[number].append(tokens)

        return take

    while True:
        now = time.perf_counter() - begin
        while given < len(work) and times[given] <= now:
            new = work[given].new_tokens
            scheduler.submit(Request(work[given].prompt_ids, new, expected_tokens=new if expected else None), deliver(given))
            given += 1
        if not scheduler.run_once():
            if given == len(work):
                break
            time.sleep(max(0.0, times[given] - (time.perf_counter() - begin)))
    for own, found, item in zip(sent, parts, work):
        own.failed = found[-1].error
        _judge(own, item, np.concatenate([tokens.token_ids for tokens in found]))
    return sent


def run_at_once(scheduler: Scheduler, work: Sequence[Work]) -> dict[str, Any]:
    """Run requests that are all there at once; count what they took, read and how they ended.

    Raises: JaxRuntimeError where the device fails.
    """
    before = scheduler.stats
    sent = run_scheduler(scheduler, work, np.zeros(len(work)))
    after = scheduler.stats
    if failed := next((own.failed for own in sent if own.failed), None):
        raise jax.errors.JaxRuntimeError(failed)
    ended = after.finished - before.finished
    names = ("prompt_tokens", "prefix_hit_tokens", "generated_tokens", "attended_tokens", "context_tokens", "preemptions", "waited_seconds")
    counts = {name: getattr(after, name) - getattr(before, name) for name in names}
    share = counts["attended_tokens"] / counts["context_tokens"]
    rows = (after.pages_used + after.pages_cached) * scheduler.config.page_tokens
    return {**summary(None, sent), **counts, "finished": dict(ended), "attended_fraction": share, "rows_kept": rows}


def run_static(model: Model, work: Sequence[Work], times: Float[np.ndarray, "R"]) -> list[Sent]:
    """Decode batches of what waits; where all is there at once in one loop each, else in chunks, so that clients see tokens come."""
    sent, size = [Sent(float(at)) for at in times], model.settings.batch_size
    responses: list[Int[np.ndarray, "T"]] = [np.zeros(0, np.int32)] * len(work)
    begin, done = time.perf_counter(), 0
    while done < len(work):
        time.sleep(max(0.0, times[done] - (time.perf_counter() - begin)))
        now = time.perf_counter() - begin
        chosen = list(range(done, min(done + size, int(np.searchsorted(times, now, side="right")))))
        done += len(chosen)
        filled = (chosen + chosen[:1] * size)[:size]  # one shape
        token_ids, lengths = np.zeros((size, model.prompt_tokens), np.int32), np.array([len(work[i].prompt_ids) for i in filled], np.int32)
        for row, i in zip(token_ids, filled):
            row[: len(work[i].prompt_ids)] = work[i].prompt_ids
        chunk = ServingConfig.chunk_tokens
        limit = -(-max(work[i].new_tokens for i in chosen) // chunk) * chunk
        pieces: Iterator[Any]
        if times[-1] > 0:
            pieces = model.engine.stream(token_ids, lengths, model.config, limit_tokens=limit, chunk_tokens=chunk)
        else:
            state = jax.block_until_ready(model.engine.generate(token_ids, lengths, model.config, limit_tokens=limit))
            pieces = iter([(np.asarray(state.new_tokens), np.asarray(state.num_attended))])
        for tokens, num_attended in pieces:
            now = time.perf_counter() - begin
            for row, i in enumerate(chosen):
                count = min(int(np.count_nonzero(num_attended[row])), work[i].new_tokens - sent[i].tokens)
                if count:
                    sent[i].events.append(now)
                    sent[i].tokens += count
                    responses[i] = np.concatenate([responses[i], tokens[row, :count]])
    for own, item, tokens in zip(sent, work, responses):
        _judge(own, item, tokens)
    return sent


def _judge(sent: Sent, work: Work, tokens: Int[np.ndarray, "T"]) -> None:
    sent.right = None if work.is_right is None else work.is_right(tokens)
