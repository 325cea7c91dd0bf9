"""Sparse prefill on real text and on trained tasks, and the tables of docs/prefill-figures.md.

    python -m experiments.prefill quality MODEL TEXTS... --tokens 2048,8192 --json FILE
    python -m experiments.prefill tasks MODEL --ops 200 --json FILE
    python -m experiments.prefill page docs/prefill

Quality: documents are put one after another until they have so many tokens. All but the last tokens are read by prefill, dense or
sparse; the last ones, the continuation, are then scored one at a time, each reading everything. So what differs is only what prefill
left in the cache. Tasks: prompts of fresh examples are read by prefill, responses are decoded as ever and scored by the task. Beside
each selector stands a window of first and recent tiles with as many tiles in all (just as many or a few more).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tyro.conf import Positional

from data import commandline, examples
from data.errors import check_range
from data.tasks import TASKS
from experiments import pages, prefill_tables
from experiments.prefill_tables import quality_cells, task_cells
from selfspan_jax import evaluation, files
from selfspan_jax.attention.policies import get_policy
from selfspan_jax.attention.selectors import BLOCK, BlockMeans, SampleAttention, Selector, WindowTiles
from selfspan_jax.config import DecodeConfig, Dtype
from selfspan_jax.decoding.state import DecodeState
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM
from selfspan_jax.viewing import retention

KINDS = ("sample 1", "sample 2", "blocks")

# ---------------------------------------------------------------------------------------------------------------- quality


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What is compared with dense prefill."""

    selectors: Annotated[tuple[str, ...], commandline.commas(*KINDS)] = KINDS
    """Which of them, beside dense prefill."""
    sample_1: Annotated[tuple[float, ...], commandline.commas(float)] = (0.8, 0.95)
    """Shares of the columns, SampleAttention's first version."""
    sample_2: Annotated[tuple[float, ...], commandline.commas(float)] = (0.6, 0.8, 0.95)
    """Shares of columns and of diagonals, its second version."""
    blocks: Annotated[tuple[float, ...], commandline.commas(float)] = (0.3, 0.1, 0.01)
    """Of the largest score in a row, block means."""
    json: Path | None = None
    """Write the rows into this file, each as soon as it is there."""

    def variants(self, rows: list[dict[str, Any]], num_tiles: int) -> Iterator[tuple[str, float | None, str | Selector]]:
        """Yield dense prefill, each selector, and after each, where there is none yet, the window of as many tiles.

        Args:
          rows: those so far; the last is that of the variant before.
          num_tiles: of the longest prompt.
        """
        always = {"dense_below_tokens": 0}
        yield "dense", None, "dense"
        chosen: list[tuple[str, float, Selector]] = [
            *(("sample 1", x, SampleAttention(version=1, share=x, **always)) for x in self.sample_1),
            *(("sample 2", x, SampleAttention(version=2, share=x, diagonal_share=x, **always)) for x in self.sample_2),
            *(("blocks", x, BlockMeans(alpha=x, **always)) for x in self.blocks),
        ]
        windows = set()
        for each in (each for each in chosen if each[0] in self.selectors):
            yield each
            near = window_of(rows[-1]["tiles_kept"], num_tiles)
            if near not in windows:
                windows.add(near)
                yield "window", near, WindowTiles(first_tiles=1, near_tiles=near, **always)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelAndTexts:
    """What comparisons on real text have: a model, and the continuations that it is scored on."""

    model: Positional[Path]
    """As `decode.py` takes it: its prompts must be read causally."""
    texts: Positional[tuple[Path, ...]]
    """Text files, or directories of them (*.txt)."""
    continuation: int = 256
    """Last tokens, which are scored."""
    num_texts: int = 8
    """Texts of each length, no document in two of them."""
    dtype: Dtype | None = None
    """What activations and products are computed in; by default as the model is stored."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality(ModelAndTexts, Thresholds):
    """Score the continuation of real text after dense and sparse prefill, at several thresholds."""

    tokens: Annotated[tuple[int, ...], commandline.commas(int)] = (2048, 8192)
    """Lengths, continuation included."""
    batch_size: int = 4
    """Texts that are read together."""
    prefill_tokens: int = DecodeConfig.prefill_tokens
    """Tokens over the batch that go through the model at once."""

    def __post_init__(self):
        check_texts(self)
        check_range(self, "batch_size", low=1)

    def run(self) -> None:
        lm = SpanLM.load(self.model, TASKS, dtype=self.dtype)
        settings = {"dtype": lm.model.config.compute_dtype, "num_texts": self.num_texts, "continuation_tokens": self.continuation}
        report: dict[str, Any] = {**_header(self.model), **settings, "quality": []}
        for tokens in self.tokens:
            texts = concatenated(lm, self.texts, tokens, self.num_texts)
            dense = None
            for kind, threshold, selector in self.variants(report["quality"], -(-(tokens - self.continuation) // BLOCK)):
                losses, kept = self.score(lm, texts, selector)
                dense = losses if dense is None else dense
                row = {"tokens": tokens, "selector": kind, "threshold": threshold, **summary(losses, dense), **kept}
                report["quality"].append(row)
                print("  ".join(quality_cells(row)), flush=True)
                files.write_rows(self.json, report, complete=False)
        files.write_rows(self.json, report, complete=True)

    def score(self, lm: SpanLM, texts: Int[np.ndarray, "b T"], prefill: str | Selector) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the loss of each token of the continuations, [b, C], and what prefill kept."""
        losses, kept = [], []
        reading = DecodeConfig("dense", self.continuation, prefill=prefill, prefill_tokens=self.prefill_tokens)
        config = dataclasses.replace(reading, prefill="dense")  # one step for all
        for start in range(0, len(texts), self.batch_size):
            some = texts[start : start + self.batch_size]
            prompts, rest = some[:, : -self.continuation], some[:, -self.continuation :]
            state, retained = retention.measured_prefill(lm.engine, prompts, np.full(len(some), prompts.shape[1], np.int32), reading)
            kept.append(retained)
            losses.append(continued(lm, state, rest, config))
        return np.concatenate(losses), _summed(kept)


def device_header() -> dict[str, Any]:
    """Name the device and the version of JAX that a report is of."""
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def _header(model: Path) -> dict[str, Any]:
    return device_header() | {"model": files.model_name(model)}


def _summed(kept: list[Any]) -> dict[str, Any]:
    return retention.to_json(jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *kept))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks(Thresholds):
    """Score a model on its own task after dense and sparse prefill of the prompts, at several thresholds."""

    model: Positional[Path]
    """A finished model or an adapter whose prompts are read causally."""
    base: Path | None = None
    """For an adapter: the model that it was trained on."""
    num_examples: int = 256
    """Fresh examples, as many in every batch."""
    ops: int | None = None
    """Expressions: operators of each."""
    data: Path | None = None
    """A corpus directory written by `python -m data`, in place of fresh examples: all those whose prompts the model has room for."""
    split: str | None = None
    """Of --data; by default its test split."""
    batch_size: int = 8
    """Prompts that are read together."""
    prefill_tokens: int = DecodeConfig.prefill_tokens
    """Tokens over the batch that go through the model at once: short chunks have fewer tiles to choose from."""
    seed: int = 1
    """Of the examples."""

    def __post_init__(self):
        check_range(self, "num_examples", "batch_size", low=1)
        if self.num_examples % self.batch_size:
            raise UserError(f"num_examples is {self.num_examples}; allowed: multiples of batch_size={self.batch_size}")

    def run(self) -> None:
        lm = SpanLM.load(self.model, TASKS, base=self.base)
        if lm.model.config.mask == "span" and lm.model.config.prompt_view == "local":
            raise UserError(f"{self.model} reads its prompts by labels, not causally: there is nothing to choose")
        some, drawn = self.drawn(lm)
        task: Any = lm.task
        ids = [task.encode_prompt(example.prompt) for example in some]
        mean, longest = float(np.mean([len(prompt) for prompt in ids])), max(map(len, ids))
        settings = {"task": task.name, **drawn, "prompt_tokens": mean, "longest_prompt_tokens": longest}
        report: dict[str, Any] = {**_header(self.model), **settings, "tasks": []}
        for kind, threshold, selector in self.variants(report["tasks"], -(-longest // BLOCK)):
            scores, kept = self.score(lm, some, ids, selector)
            row = {"tokens": round(mean), "selector": kind, "threshold": threshold, **scores, **kept}
            report["tasks"].append(row)
            print("  ".join(task_cells(row)), flush=True)
            files.write_rows(self.json, report, complete=False)
        files.write_rows(self.json, report, complete=True)

    def drawn(self, lm: SpanLM) -> tuple[list[Any], dict[str, Any]]:
        """Return the examples, in whole batches, and how they were drawn; the model's task becomes the one that scores them."""
        if self.data is None:
            (some,) = examples.held_out(lm.task, self.num_examples, seed=self.seed, ops=() if self.ops is None else (self.ops,))[0].values()
            return some, {"seed": self.seed, "ops": self.ops}
        lm.task, sets, drawn = examples.stored(self.data, lm.task, TASKS, self.num_examples, self.split)
        (some,) = sets.values()
        context = lm.model.config.max_context_tokens
        some = [each for each in some if len(lm.task.encode_prompt(each.prompt)) + len(each.response_ids) < context]
        if not (whole := len(some) // self.batch_size * self.batch_size):
            raise UserError(f"--batch-size is {self.batch_size}: of {self.data} only {len(some)} examples fit into {context} tokens")
        return some[:whole], {"data": drawn["data"], "split": drawn["split"]}

    def score(
        self, lm: SpanLM, some: Sequence[Any], ids: Sequence[Int[np.ndarray, "T"]], prefill: str | Selector
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the task's scores of responses that are decoded after a prefill, and what the prefill kept."""
        token_ids, lengths = lm.pad(ids)
        token_ids = np.pad(token_ids, ((0, 0), (0, -token_ids.shape[1] % BLOCK)), constant_values=lm.model.vocab.pad_id)  # whole tiles
        policy = get_policy(lm.model.config.mask)
        room = max(len(example.response_ids) for example in some) + evaluation.MARGIN_TOKENS
        room = min(room, lm.model.config.max_context_tokens - int(lengths.max()))
        reading = DecodeConfig(policy, room, prefill=prefill, prefill_tokens=self.prefill_tokens)
        config = dataclasses.replace(reading, prefill="dense")  # one loop for all
        outputs, kept = [], []
        for rows in np.arange(len(ids)).reshape(-1, self.batch_size):
            state, retained = retention.measured_prefill(lm.engine, token_ids[rows], lengths[rows], reading)
            kept.append(retained)
            outputs += lm.outputs([some[i].prompt for i in rows], [ids[i] for i in rows], lm.engine.run(state, config), policy)
        found = evaluation.Evaluation(lm.task, tuple(some), tuple(outputs), self.batch_size, 0.0, 0.0)
        return found.scores_json(), _summed(kept)


@jax.jit
def losses_of(logits: Array, tokens: Array) -> Array:
    """Compute the losses [B] of tokens [B] under logits [B, V]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]


def continued(lm: SpanLM, state: DecodeState, rest: Int[np.ndarray, "b C"], config: DecodeConfig) -> np.ndarray:
    """Return the losses [b, C] of tokens that are fed one after the other."""
    found = []
    for tokens in rest.T:
        found.append(losses_of(state.logits, jnp.asarray(tokens)))
        state = lm.engine.step(state, tokens, config)
    return np.stack(jax.device_get(found), axis=1)


def check_texts(settings: Any) -> None:
    """Raise UserError for no texts, and for `tokens` of which none is left before the `continuation`."""
    check_range(settings, "continuation", "num_texts", low=1)
    for tokens in settings.tokens if isinstance(settings.tokens, tuple) else (settings.tokens,):
        if tokens <= settings.continuation:
            raise UserError(f"tokens is {tokens}; allowed: above the {settings.continuation} of the continuation")


def concatenated(lm: SpanLM, sources: Iterable[Path], num_tokens: int, num_texts: int) -> Int[np.ndarray, "b T"]:
    """Put documents one after another until each text has its tokens."""
    paths = [path for source in sources for path in (sorted(source.glob("*.txt")) if source.is_dir() else [source])]
    documents = iter(paths)
    texts: list[list[int]] = []
    while len(texts) < num_texts:
        ids: list[int] = []
        while len(ids) < num_tokens:
            if (path := next(documents, None)) is None:
                raise UserError(f"--num-texts is {num_texts}: {len(paths)} documents give only {len(texts)} texts of {num_tokens} tokens")
            found = lm.task.encode_prompt(files.read_text(path))
            ids += found.tolist()
        texts.append(ids[:num_tokens])
    return np.array(texts, np.int32)


def summary(losses: np.ndarray, dense: np.ndarray) -> dict[str, float]:
    """Return the perplexity of all tokens, and the difference of the loss to dense prefill, with its standard error over texts."""
    difference = (losses - dense).mean(axis=1)
    error = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else math.nan
    return {"perplexity": float(np.exp(losses.mean())), "loss_more": float(difference.mean()), "loss_more_error": error}


def window_of(share: float, num_tiles: int) -> int:
    """Return the nearest tiles of a window, with the first tile beside them, that keeps at least this share of the causal tiles."""
    own = np.arange(1, num_tiles + 1)  # tiles up to each row's own
    return next(near for near in range(1, num_tiles + 1) if np.minimum(own, near + 1).sum() >= share * own.sum() - 1e-6)


COMMANDS: dict[str, Any] = {"quality": Quality, "tasks": Tasks, "page": pages.tables_page("docs/prefill", prefill_tables.sections)}


def main(argv: list[str] | None = None) -> None:
    pages.run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    main()
