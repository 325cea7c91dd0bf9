"""What becomes of a dense model whose decoding is cut to few rows, by spans' neighbours; and the tables of docs/neighbours.md.

    python -m experiments.neighbours arithmetic DENSE SPAN --ops 20,50 --json FILE
    python -m experiments.neighbours text MODEL TEXTS... --tokens 8192 --json FILE
    python -m experiments.neighbours page docs/neighbours

All prompts are read densely, whatever cuts the decoding after them; every layer is cut. Arithmetic: the dense model's right answers at
shares of the context, and at the count of rows that the span model reads of the same expressions. Text: the loss of a continuation.
The counts of one neighbour are decoded together, as samples of each prompt, so that they share its rows of the cache.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tyro.conf import Positional

from data import commandline, examples
from data.errors import check_range
from data.tasks import TASKS
from experiments import neighbours_tables, pages, recall
from experiments.prefill import ModelAndTexts, check_texts, concatenated, device_header, losses_of, summary
from experiments.presses import ModelAndCorpus, Presses, chosen
from experiments.rebalancing import Rebalancing
from selfspan_jax import files
from selfspan_jax.attention.policies import Policy, Window, get_policy
from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.state import DecodeState
from selfspan_jax.errors import UserError
from selfspan_jax.evaluation import MARGIN_TOKENS, wilson
from selfspan_jax.lm import SpanLM
from selfspan_jax.neighbours.query_driven import Oracle, QueryDriven, Quest

T = TypeVar("T")
SIDE_BY_SIDE = 3  # kinds that are compiled and decoded at the same time; each has a state of its own


def shown(row: Mapping[str, Any]) -> str:
    """Write a row of a report in a line."""
    return "  ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items())


# ---------------------------------------------------------------------------------------------------------------- policies


@dataclasses.dataclass(frozen=True)
class Recent(QueryDriven):
    """Read the first tokens and the most recent ones, as `Window` does, after a prompt that was read densely."""

    name: ClassVar[str] = "window"
    description: ClassVar[str] = "first and recent tokens"

    def choose(self, q, k_pool, summaries, slots):
        """Choose the first tokens, then the others from the newest on."""
        place = jnp.arange(min(self.tokens, slots.slots.shape[1]), dtype=jnp.int32)[None, None]
        newest = jnp.maximum(slots.num_tokens - 1, 0)[:, None, None]
        token = jnp.where(place < Window.sink_tokens, place, newest - (place - Window.sink_tokens))
        return jnp.broadcast_to(jnp.maximum(token, 0), (*q.shape[:2], place.shape[2]))


@dataclasses.dataclass(frozen=True)
class InTurn(QueryDriven):
    """Let sequences read as several policies of one kind do, in turn: sequence b as number b % len(policies)."""

    policies: tuple[QueryDriven, ...] = ()

    name: ClassVar[str] = "in turn"
    description: ClassVar[str] = "several counts, in turn"

    @property
    def widest(self) -> QueryDriven:
        """The policy whose choices begin with those of all others."""
        return max(self.policies, key=lambda policy: policy.tokens)

    def count(self, num_tokens):
        """Return each sequence's own count."""
        counts, sequence = jnp.stack([policy.count(num_tokens) for policy in self.policies]), jnp.arange(len(num_tokens))
        return counts[sequence % len(self.policies), sequence]

    def summarize(self, *arguments):
        """Compute those of the widest policy."""
        return self.widest.summarize(*arguments)

    def update(self, *arguments):
        """Compute those of the widest policy."""
        return self.widest.update(*arguments)

    def choose(self, *arguments):
        """Choose as the widest policy does; others read fewer of these."""
        return self.widest.choose(*arguments)


KINDS: dict[str, QueryDriven] = {"window": Recent(), "quest": Quest(), "quest-4": Quest(page_tokens=4), "oracle": Oracle()}


def policy_of(kind: str, counts: Sequence[int]) -> Policy:
    """Return the policy under which sequences read so many rows, in turn; fewer than a page, or than a window has, become that many."""
    if kind not in KINDS:
        return get_policy(kind)
    least = Window.sink_tokens + 1 if kind == "window" else getattr(KINDS[kind], "page_tokens", 1)
    return InTurn(policies=tuple(dataclasses.replace(KINDS[kind], tokens=max(least, count)) for count in counts))


def under_each(
    kinds: Sequence[str], counts: Sequence[int], state: DecodeState, go_on: Callable[[DecodeState, Policy], T]
) -> Iterator[tuple[str, T]]:
    """Go on from a state after prompts, of `len(counts)` samples each, under each kind, some side by side: all must compile."""

    def one(kind: str) -> T:
        policy, own = policy_of(kind, counts), jax.tree.map(jnp.copy, state)  # states are donated
        slots = jax.tree.map(jnp.copy, policy.initial_slots(own.cache.slot_table))
        return go_on(dataclasses.replace(own, slots=slots, cache=slots.prepared(own.cache)), policy)

    with concurrent.futures.ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield from zip(kinds, pool.map(one, kinds))


def by_count(kind: str, counts: Sequence[int], values: Sequence[T]) -> Iterator[tuple[int | None, T]]:
    """Yield what was found at each count of rows, of counts that became the same once; None is all of them."""
    policy = policy_of(kind, counts)
    own = [each.tokens for each in policy.policies] if isinstance(policy, InTurn) else [None]
    yield from ((count, value) for number, (count, value) in enumerate(zip(own, values)) if count not in own[:number])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What comparisons have: counts of cache rows, policies, and the file of results."""

    shares: Annotated[tuple[float, ...], commandline.commas(float)] = (1, 2, 5, 10, 20, 50)
    """Of the context, in percent."""
    neighbours: Annotated[tuple[str, ...], commandline.commas(*KINDS)] = (*KINDS,)
    """Policies that choose the rows."""
    json: Path | None = None
    """Write the rows into this file, each as soon as it is there."""

    kind: ClassVar[str]
    """What the rows are called in a report."""

    def __post_init__(self):
        check_range(self, "shares", low=0.01, high=1000)

    def counts(self, context_tokens: float) -> list[int]:
        """Return the rows of each share of a context."""
        return [max(1, round(share / 100 * context_tokens)) for share in self.shares]

    def add(self, report: dict[str, Any], row: dict[str, Any]) -> None:
        """Add a row to the report, write and print it."""
        report[self.kind].append(row)
        files.write_rows(self.json, report, complete=False)
        print(shown(row), flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding(Sweep):
    """What comparisons of decoded responses have: how many of them are decoded together."""

    batch_size: int = 100
    """Examples that are decoded together, under several counts each."""

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "num_examples", "batch_size", low=1)

    def decoded(
        self, lm: SpanLM, some: Sequence[Any], kinds: Sequence[str], counts: Sequence[int], score: Callable[[list[Any]], dict[str, Any]]
    ) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Decode examples under each kind, and yield the scores at each count."""
        found: dict[str, list[list[Any]]] = {}
        sizes = max(len(lm.task.encode_prompt(example.prompt)) for example in some), max(len(example.response_ids) for example in some)
        for start in range(0, len(some), self.batch_size):
            for kind, outputs in decoded(lm, some[start : start + self.batch_size], kinds, counts, *sizes):
                found.setdefault(kind, [[] for _ in outputs])
                for own, more in zip(found[kind], outputs):
                    own += more
        yield from ((kind, [*map(score, outputs)]) for kind, outputs in found.items())


# -------------------------------------------------------------------------------------------------------------- arithmetic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic(Decoding):
    """Count a dense model's right answers when each decoded token reads few rows, beside a span model on the same expressions."""

    dense: Positional[Path]
    """A finished model that was trained under the dense mask, on the text of spans."""
    span: Positional[Path]
    """A finished span model."""
    ops: Annotated[tuple[int, ...], commandline.commas(int)] = (20, 50, 100, 200)
    """Operators of the expressions."""
    num_examples: int = 300
    """Fresh expressions of each number of operators."""
    seed: int = 1
    """Of the expressions."""

    kind: ClassVar[str] = "arithmetic"

    def run(self) -> None:
        models = {name: SpanLM.load(getattr(self, name), TASKS) for name in ("dense", "span")}
        for name, lm in models.items():
            if lm.model.config.mask != name:
                raise UserError(f"{getattr(self, name)} was trained under the mask {lm.model.config.mask!r}; expected {name!r}")
        names = {name: files.model_name(getattr(self, name)) for name in models}
        report: dict[str, Any] = {**device_header(), **names, "seed": self.seed, "arithmetic": []}
        for ops in self.ops:
            (some,) = examples.held_out(models["span"].task, self.num_examples, seed=self.seed, ops=(ops,))[0].values()
            prompt_tokens = [len(models["dense"].task.encode_prompt(example.prompt)) for example in some]
            context = float(np.mean([own + len(example.response_ids) for own, example in zip(prompt_tokens, some)]))
            settings = {"ops": ops, "context_tokens": context}
            ((_, (spans,)),) = self.decoded(models["span"], some, ("span",), [0], _scores)
            as_spans = round(spans["attended_tokens"])
            counts = sorted([as_spans, *self.counts(context)])
            self.add(report, settings | {"neighbour": "span", "tokens": None} | spans)
            for kind, scores in self.decoded(models["dense"], some, ("dense", *self.neighbours), counts, _scores):
                for count, own in by_count(kind, counts, scores):
                    self.add(report, settings | {"neighbour": kind, "tokens": count, "as_spans": count == as_spans} | own)
        files.write_rows(self.json, report, complete=True)


def decoded(
    lm: SpanLM, some: Sequence[Any], kinds: Sequence[str], counts: Sequence[int], prompt_tokens: int, response_tokens: int
) -> Iterator[tuple[str, list[list[Any]]]]:
    """Decode a batch of examples of at most so many tokens, and yield each kind's outputs at each count; at one where there is no count."""
    ids, own = [lm.task.encode_prompt(example.prompt) for example in some], get_policy(lm.model.config.mask)
    token_ids, lengths = lm.pad(ids)
    token_ids = np.pad(token_ids, ((0, 0), (0, prompt_tokens - token_ids.shape[1])))
    config = DecodeConfig(own, min(response_tokens + MARGIN_TOKENS, lm.model.config.max_context_tokens - prompt_tokens))

    def go_on(state: DecodeState, policy: Policy) -> list[list[Any]]:
        each = len(state.done) // len(some)
        prompts = [example.prompt for example in some for _ in range(each)]
        prompt_ids = [own_ids for own_ids in ids for _ in range(each)]
        outputs = lm.outputs(prompts, prompt_ids, lm.engine.run(state, dataclasses.replace(config, attention=policy)), own)
        return [outputs[first::each] for first in range(each)]

    several = [kind for kind in kinds if kind in KINDS]
    yield from ((kind, go_on(lm.engine.prefill(token_ids, lengths, config), own)) for kind in kinds if kind not in KINDS)
    if several:
        state = lm.engine.prefill(token_ids, lengths, config, num_samples=len(counts))
        yield from under_each(several, counts, state, go_on)


def _scores(outputs: Sequence[Any]) -> dict[str, Any]:
    right = [out.verdict.answer_right for out in outputs]
    accuracy = {"answer_accuracy": float(np.mean(right)), "answer_accuracy_interval": wilson(float(np.mean(right)), len(outputs))}
    return {"num_examples": len(outputs), "right": sum(right), **accuracy, **_read(outputs)}


def _read(outputs: Sequence[Any]) -> dict[str, float]:
    context = np.concatenate([np.arange(len(out.token_ids) - len(out.num_attended), len(out.token_ids)) + 1 for out in outputs])
    attended = np.concatenate([out.num_attended for out in outputs])
    return {"attended_tokens": float(attended.mean()), "attended_fraction": float((attended / context).mean())}


# --------------------------------------------------------------------------------------------------------------- documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents(ModelAndCorpus, Decoding):
    """Score a dense model's responses to documents when each decoded token reads few rows; or a span model's, which reads its spans."""

    timed_tokens: int = 0
    """Time so many decode steps of one batch under each kind in place of scoring, at the middle one of the shares; 0 for none."""

    kind: ClassVar[str] = "documents"

    def run(self) -> None:
        lm = SpanLM.load(self.model, TASKS, base=self.base)
        lm.task, some = chosen(lm, self)
        context = float(np.mean([len(lm.task.encode_prompt(example.prompt)) + len(example.response_ids) for example in some]))
        sizes = {"num_examples": len(some), "context_tokens": context}
        report: dict[str, Any] = {**device_header(), "model": files.model_name(self.model), "data": self.data.name}
        report |= {**sizes, "documents": []}
        kinds = ("span",) if lm.model.config.mask == "span" else ("dense", *self.neighbours)
        counts = [0] if kinds == ("span",) else self.counts(context)
        if self.timed_tokens:
            for row in timed(lm, some[: self.batch_size], kinds, counts[len(counts) // 2], self.timed_tokens):
                self.add(report, row)
            return files.write_rows(self.json, report, complete=True)

        def score(outputs: Sequence[Any]) -> dict[str, Any]:
            scores = lm.task.scores(some, [out.response_ids for out in outputs])  # type: ignore[attr-defined]
            return {"num_examples": len(outputs), **_read(outputs), **scores}

        for kind, scores in self.decoded(lm, some, kinds, counts, score):
            for count, own in by_count(kind, counts, scores):
                self.add(report, {"neighbour": kind, "tokens": count} | own)
        files.write_rows(self.json, report, complete=True)


def timed(lm: SpanLM, some: Sequence[Any], kinds: Sequence[str], count: int, num_tokens: int) -> Iterator[dict[str, Any]]:
    """Time decode steps of a batch, the sequences' gold responses fed again and again; three times, the median."""
    token_ids, lengths = lm.pad([lm.task.encode_prompt(example.prompt) for example in some])
    forced = np.stack([np.resize(example.response_ids[:-1], num_tokens) for example in some]).astype(np.int32)
    for kind in kinds:
        policy = get_policy(kind) if kind not in KINDS else dataclasses.replace(KINDS[kind], tokens=count)
        config = DecodeConfig(policy, num_tokens)
        seconds, state = [], None
        for _ in range(4):
            state = None  # the next one needs its memory
            state = jax.block_until_ready(lm.engine.prefill(token_ids, lengths, config))
            began = time.perf_counter()
            state = jax.block_until_ready(lm.engine.run(state, config, forced_tokens=forced))
            seconds.append(time.perf_counter() - began)
        step = float(np.median(seconds[1:])) / num_tokens
        read = float(np.asarray(state.num_attended).mean())  # type: ignore[union-attr]
        pools = [pool for layer in state.cache.pools for pool in layer]  # type: ignore[union-attr]
        kept = sum(pool.nbytes for pool in pools) / len(pools[0]) * (int(lengths.sum()) + num_tokens * len(some))
        found = {"attended_tokens": read, "ms_per_step": 1e3 * step, "tokens_per_second": len(some) / step, "batch_size": len(some)}
        found |= {"cache_bytes": kept}
        yield {"neighbour": kind, "tokens": None if kind not in KINDS else count, **found}


# -------------------------------------------------------------------------------------------------------------------- text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(ModelAndTexts, Sweep):
    """Score the continuation of real text when each of its tokens reads few rows; all texts are read in one batch."""

    tokens: int = 8192
    """Of each text, continuation included."""

    kind: ClassVar[str] = "text"

    def __post_init__(self):
        super().__post_init__()
        check_texts(self)

    def run(self) -> None:
        lm = SpanLM.load(self.model, TASKS, dtype=self.dtype)
        texts = concatenated(lm, self.texts, self.tokens, self.num_texts)
        settings = {"tokens": self.tokens, "continuation_tokens": self.continuation, "num_texts": self.num_texts}
        report: dict[str, Any] = {**device_header(), "model": files.model_name(self.model), "dtype": lm.model.config.compute_dtype}
        report |= {**settings, "text": []}
        counts, dense = self.counts(self.tokens), None
        for kind, own in losses(lm, texts, self.continuation, ("dense", *self.neighbours), counts):
            for count, (each, read) in by_count(kind, counts, own):
                dense = each if dense is None else dense
                self.add(report, {"neighbour": kind, "tokens": count, "attended_tokens": read} | summary(each, dense))
        files.write_rows(self.json, report, complete=True)


def losses(
    lm: SpanLM, texts: Int[np.ndarray, "b T"], continuation: int, kinds: Sequence[str], counts: Sequence[int]
) -> Iterator[tuple[str, list[tuple[np.ndarray, float]]]]:
    """Yield for each kind, at each count, the losses [b, C] of continuations and the mean of the rows that were read."""
    prompts, config = texts[:, :-continuation], DecodeConfig("dense", continuation)
    state = lm.engine.prefill(prompts, np.full(len(texts), prompts.shape[1], np.int32), config, num_samples=len(counts))

    def go_on(state: DecodeState, policy: Policy) -> list[tuple[np.ndarray, float]]:
        found, read = [], []
        for tokens in np.repeat(texts[:, -continuation:], len(counts), axis=0).T:
            found.append(losses_of(state.logits, jnp.asarray(tokens)))
            state = lm.engine.step(state, tokens, dataclasses.replace(config, attention=policy))
            read.append(state.slots.counts + 0)  # a copy: the state is donated
        each, rows = (np.stack(jax.device_get(x), axis=1) for x in (found, read))
        return [(each[first :: len(counts)], float(rows[first :: len(counts)].mean())) for first in range(len(counts))]

    return under_each(kinds, counts, state, go_on)


def sections(results: Path) -> dict[str, str]:
    """Write each section of the pages whose files there are, by its name; and the pictures."""
    return neighbours_tables.sections(results) | recall.sections(results / "memory")


COMMANDS: dict[str, Any] = {
    "arithmetic": Arithmetic,
    "documents": Documents,
    "text": Text,
    "presses": Presses,
    "rebalance": Rebalancing,
    "page": pages.tables_page("docs/neighbours", sections),
}


def main(argv: list[str] | None = None) -> None:
    pages.run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    main()
