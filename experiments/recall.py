"""Key retrieval: models of one size trained from scratch to name the value of a key that stood far back, under spans and its neighbours.

    python -m experiments.recall train --system delta --json FILE
    python -m experiments.neighbours page docs/neighbours

A context is pieces of 16 tokens of noise, some of which hold an item: one token that is a key and one of its 16 values. Each key has
one item at most, and its value changes from example to example. Then keys are asked for, one after another; the answer is the item. The
text of spans has a label at the beginning and end of each piece, and a step names the piece that it reads; other systems have noise in
the place of these tokens, so that all texts are as long. An answer counts as right where the item is the likeliest token, with spans the
named piece too, each after the right tokens before: as in greedy decoding. Who knows the key alone is right once in 16 times.

Pairs of a key token and a value token after it, in place of items, taught no system to match keys in 2,000 steps, dense attention included.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data import commandline
from data.errors import check_range
from data.packing import Batch
from experiments import pages
from experiments.pages import Reports
from experiments.prefill import device_header
from selfspan_jax import files, training
from selfspan_jax.attention.sequences import attend_in_training
from selfspan_jax.config import COMPUTE_DTYPES, ModelConfig, TrainConfig
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab

System = Literal["spans", "dense", "window", "delta", "linear"]
PIECE, STEP, SEGMENT = 16, 5, 128  # tokens
PIECES = SEGMENT // PIECE
KEYS, VALUES, NOISE = 32, 16, 64
_KEY, _ITEM, _NOISE = 4, 4 + KEYS, 4 + KEYS + KEYS * VALUES
_SEG = _NOISE + NOISE
LABELS = 1024
VOCAB = SpanVocab(pad_id=0, bos_id=1, eos_id=2, solve_id=3, seg_base=_SEG, ref_base=_SEG + LABELS, num_labels=LABELS)
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "head_size": 64}
KINDS = ((1, 5), (3, 2), (8, 1))  # of a row of training: segments of an example's context, examples


@dataclasses.dataclass(frozen=True)
class Corpus:
    """How much an example holds."""

    items: int = 32
    """Items of an example, where it has so many pieces; at most one a piece. Those of training have any power of two up to that."""
    queries: int = 16
    """Questions. Where there are fewer items, they are asked for again, in another order; what is scored is the first time."""
    unnamed: float = 0.0
    """Share of the batches of spans whose steps name no piece: answers then come from what label tokens have read."""

    def __post_init__(self):
        check_range(self, "items", low=2, high=KEYS)
        check_range(self, "queries", low=1, high=256)
        check_range(self, "unnamed", low=0, high=1)

    def make(
        self, rng: np.random.Generator, number: int, segments: int, *, spans: bool, scales: tuple[int, ...] = (0,), names: bool = True
    ) -> dict[str, Any]:
        """Make examples of one length: ids and positions [E, L], targets [E, L], and of queries their answer's place and distance [E, Q].

        Distances are in whole segments, from an item to the question. Positions jump between pieces, by up to twice a scale.
        """
        pieces = segments * PIECES
        items = min(self.items, pieces)
        queries, fresh = self.queries, min(self.queries, items)
        each = np.arange(number)[:, None]

        def some(count, of):  # different ones, for each example
            return np.argsort(rng.random((number, of)), axis=1)[:, :count]

        keys, piece = some(items, KEYS), some(items, pieces)
        answers = _ITEM + keys * VALUES + rng.integers(VALUES, size=(number, items))
        offset = rng.integers(1, PIECE - 1, size=(number, items))
        context = rng.integers(_NOISE, _NOISE + NOISE, size=(number, pieces, PIECE))
        context[each, piece, offset] = answers
        asked = np.concatenate([some(items, items) for _ in range(-(-queries // items))], axis=1)[:, :queries]
        steps = rng.integers(_NOISE, _NOISE + NOISE, size=(number, queries, STEP))
        first = rng.integers(1, LABELS - pieces - queries, size=(number, 1))
        key, answer = _KEY + np.take_along_axis(keys, asked, 1), np.take_along_axis(answers, asked, 1)
        named = np.take_along_axis(piece, asked, 1)
        if spans:
            context[:, :, 0] = context[:, :, -1] = VOCAB.seg_base + first + np.arange(pieces)
            own = VOCAB.seg_base + first + pieces + np.arange(queries)
            steps = np.stack([own, key, own, VOCAB.ref_base + first + named if names else own, answer], axis=2)
        else:
            steps[:, :, 3], steps[:, :, 4] = key, answer
        one = np.ones((number, 1), int)
        parts = [one * VOCAB.bos_id, context.reshape(number, -1), one * VOCAB.solve_id, steps.reshape(number, -1), one * VOCAB.eos_id]
        ids = np.concatenate(parts, axis=1).astype(np.int32)
        places = 2 + pieces * PIECE + np.arange(queries) * STEP + STEP - 1
        targets = np.zeros(ids.shape[1], bool)
        targets[places] = True
        targets[places - 1] |= spans and names
        jumps = np.zeros(ids.shape, np.int64)
        scale = rng.choice(np.array(scales), size=(number, 1))
        jumps[:, 1 : 1 + pieces * PIECE : PIECE] = rng.integers(0, 2 * scale + 1, size=(number, pieces))
        distance = (places - (1 + named * PIECE + np.take_along_axis(offset, asked, 1))) // SEGMENT
        return {
            "token_ids": ids,
            "positions": (np.arange(ids.shape[1]) + np.cumsum(jumps, axis=1)).astype(np.int32),
            "target_mask": np.broadcast_to(targets, ids.shape),
            "places": places[:fresh],
            "distance": distance[:, :fresh],
        }

    def batches(self, start: int, *, rows: int, seed: int, spans: bool, scales: tuple[int, ...], short: int = 0) -> Iterator[Batch]:
        """Yield batches from number `start` on, whose rows are examples of one length; the first `short` batches have the shortest."""
        tokens = self.row_tokens
        for number in range(start, 2**31):
            rng = np.random.default_rng((seed, number))
            segments, each = KINDS[rng.integers(len(KINDS))] if number >= short else KINDS[0]
            items = 2 ** rng.integers(1, min(self.items, segments * PIECES).bit_length())
            corpus = dataclasses.replace(self, items=int(items))
            made = corpus.make(rng, rows * each, segments, spans=spans, scales=scales, names=rng.random() >= self.unnamed)
            length = made["token_ids"].shape[1]
            ids, segment_ids, positions = (np.zeros((rows, tokens), np.int32) for _ in range(3))
            targets = np.zeros((rows, tokens), np.bool_)
            made["segment_ids"] = np.broadcast_to(np.tile(np.arange(1, each + 1), rows)[:, None], (rows * each, length))
            for array, name in zip((ids, segment_ids, positions, targets), ("token_ids", "segment_ids", "positions", "target_mask")):
                array[:, : each * length] = made[name].reshape(rows, each * length)
            yield Batch(ids, segment_ids, positions, targets, number + 1)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of training: the longest of its kinds, in whole tiles."""
        longest = max(each * (3 + segments * SEGMENT + STEP * self.queries) for segments, each in KINDS)
        return -(-longest // SEGMENT) * SEGMENT


def model_config(system: System, **sizes: Any) -> ModelConfig:
    """Return the config of a system's model; all have as many parameters, but for a gate for each head of a memory."""
    mask = {"spans": "span", "delta": "memory", "linear": "memory"}.get(system, system)
    options: dict[str, Any] = {"mask": mask, "prompt_view": "local", "header_view": "labels", "memory_segment_tokens": SEGMENT}
    if mask == "memory":
        options["attention_memory"] = system
    return ModelConfig(**{**options, **sizes})


# --------------------------------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train one system's model and score it at many lengths of the context."""

    system: System
    """spans; the window of 4 first and 128 recent tokens; everything (dense); a memory of segments of 128 by one of two rules."""
    json: Path
    """File of the result."""
    corpus: Corpus = Corpus()
    steps: int = 1_200
    """Optimizer steps."""
    rows: int = 16
    """Rows of a step, each of 1,152 tokens with the default corpus."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    short_steps: int = 0
    """So many first steps have contexts of one segment alone."""
    source_weight: float = 1.0
    """How often the choice of a piece counts in the loss of spans, where its value counts once."""
    header_view: Literal["labels", "all"] = "labels"
    """What span tokens see: the labels, or everything."""
    prompt_window_tokens: int = 16
    """Most recent tokens that a token of the context sees beside its own piece; 1 is the piece alone."""
    names_begin_as_labels: bool = False
    """What names a label begins with the embedding of the label, and a vector that all names share, in place of a random one."""
    gap_scales: Annotated[tuple[int, ...], commandline.commas(int)] = (0, 1, 4, 16, 64)
    """Rotary positions jump between pieces by up to twice one of these, so that those of long contexts are trained."""
    seed: int = 0
    """Of parameters and data."""
    segments: Annotated[tuple[int, ...], commandline.commas(int)] = (8, 64, 16, 32)
    """Segments of the contexts that are scored; training has 1, 3 and 8."""
    num_examples: int = 128
    """Examples of each length."""
    dtype: Literal["bf16", "f32"] = "bf16"
    """What activations and products are computed in."""

    def __post_init__(self):
        check_range(self, "steps", "rows", "num_examples", "prompt_window_tokens", low=1)
        check_range(self, "seed", "gap_scales", low=0)
        check_range(self, "segments", low=1, high=(LABELS - 2 - self.corpus.queries) // PIECES)

    def run(self) -> None:
        spans = self.system == "spans"
        views = {"header_view": self.header_view, "prompt_window_tokens": self.prompt_window_tokens}
        config = model_config(self.system, compute_dtype=COMPUTE_DTYPES[self.dtype], max_context_tokens=2**17, **SIZES, **views)
        model = Decoder(config, vocab=VOCAB, vocab_size=VOCAB.min_vocab_size, rngs=nnx.Rngs(self.seed))
        if self.names_begin_as_labels:
            begin_as_labels(model, self.seed)
        options: dict[str, Any] = {"eval_examples": 0, "checkpoint_every_steps": self.steps, "gap_scales": self.gap_scales}
        options |= {"learning_rate": self.learning_rate, "source_weight": self.source_weight}
        settings = TrainConfig(self.steps, self.seed, self.rows, self.corpus.row_tokens, **options)
        rows: dict[str, Any] = {"rows": self.rows, "seed": self.seed, "scales": self.gap_scales, "short": self.short_steps}
        batches = functools.partial(self.corpus.batches, spans=spans, **rows)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            model = training.train(model, settings, batches_from=batches, run_dir=Path(directory), progress=True)
            lines = [json.loads(line) for line in files.read_text(Path(directory) / "metrics.jsonl").splitlines()]
            losses = [{name: line[name] for name in ("step", "loss", "token_accuracy")} for line in lines if "loss" in line]
        report: dict[str, Any] = {**device_header(), "system": self.system, "parameters": model.num_parameters}
        report |= {"settings": _plain(self), "seconds": time.perf_counter() - began, "gates": gates(model), "losses": losses, "recall": []}
        for segments in self.segments:
            for row in self.score(model, segments, spans):
                report["recall"].append(row)
                files.write_rows(self.json, report, complete=False)
            found = {row["distance"]: round(row["right"], 3) for row in report["recall"] if row["segments"] == segments}
            print(f"{self.system}, {segments} segments: {found}", flush=True)
        files.write_rows(self.json, report, complete=True)

    def score(self, model: Decoder, segments: int, spans: bool) -> Iterator[dict[str, Any]]:
        """Yield the share of right answers of contexts of one length, by distance."""
        made = self.corpus.make(np.random.default_rng((self.seed, 2**31)), self.num_examples, segments, spans=spans)
        ids, places = made["token_ids"], made["places"]
        length = -(-ids.shape[1] // SEGMENT) * SEGMENT
        ids = np.pad(ids, ((0, 0), (0, length - ids.shape[1])))
        part = max(1, min(self.num_examples, 2**16 // length))
        graph, params = nnx.split(model)
        found = np.concatenate([np.asarray(predicted(graph, params, ids[i : i + part], places)) for i in range(0, len(ids), part)])
        right = found[:, :, 1] == ids[:, places]
        if spans:
            right &= found[:, :, 0] == ids[:, places - 1]
        for distance in np.unique(made["distance"]):
            own = right[made["distance"] == distance]
            yield {"segments": segments, "distance": int(distance), "queries": own.size, "right": float(own.mean())}


def begin_as_labels(model: Decoder, seed: int) -> None:
    """Let the embedding of each name begin as that of its label, and a random vector that all names share: copying a label names it."""
    table = model.embed_tokens.embedding[...]
    shared = jax.random.normal(jax.random.key(seed), table.shape[1:], table.dtype) * jnp.std(table)
    labels = table[VOCAB.seg_base : VOCAB.seg_base + LABELS]
    model.embed_tokens.embedding[...] = table.at[VOCAB.ref_base : VOCAB.ref_base + LABELS].set(labels + shared[None])


def _plain(settings: Any) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(settings).items() if name != "json"}


@functools.partial(jax.jit, static_argnames=("graph",))
def predicted(graph, params, token_ids, places):
    """Return the likeliest tokens before an answer's place and at it: [B, Q, 2]."""
    model = nnx.merge(graph, params)
    token_ids, places = jnp.asarray(token_ids, jnp.int32), jnp.asarray(places, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
    hidden, _ = model(token_ids, positions, attend_in_training(token_ids, model.vocab, model.config)[0])
    before = (places[:, None] + jnp.array([-2, -1], jnp.int32)[None]).reshape(-1)
    return jnp.argmax(model.logits(hidden[:, before]), axis=2).reshape(len(token_ids), -1, 2)


def gates(model: Decoder) -> list[list[float]] | None:
    """Return how much of each head's output comes from the memory, layer by layer; None without one."""
    memories = [layer.self_attn.memory for layer in model.layers]
    return [np.asarray(jax.nn.sigmoid(memory.gate[...])).round(4).tolist() for memory in memories if memory is not None] or None


# ------------------------------------------------------------------------------------------------------------------- page

SYSTEMS: tuple[System, ...] = ("spans", "dense", "window", "delta", "linear")
TRAINED = 8  # segments of the longest context of training
_FROM = 2  # segments, from which on an item is out of sight of a window and of the segment at hand


def sections(results: Path) -> dict[str, str]:
    """Write the sections of docs/neighbours-figures.md on models with a memory whose files are in a directory, and their plot."""
    writers = {"recall": ("recall_*.json", _recall), "memory expressions": ("expressions_*.json", _expressions)}
    return pages.sections_of(results, writers | {"memory steps": ("bench_*.json", _steps)})


def right(report: dict[str, Any], segments: int, first: int, last: int = 2**31) -> float | None:
    """Return the share of right answers of contexts of one length, of items from `first` to `last` segments back; None without any."""
    rows = [row for row in report["recall"] if row["segments"] == segments and first <= row["distance"] <= last]
    queries = sum(row["queries"] for row in rows)
    return sum(row["right"] * row["queries"] for row in rows) / queries if queries else None


def _recipe(report: dict[str, Any]) -> str:
    """Say how a model was trained: steps, and in which way."""
    settings = report["settings"]
    unnamed = settings["corpus"].get("unnamed", 0)
    more = {
        f"{settings.get('short_steps', 0):,} of them short": settings.get("short_steps"),
        f"{unnamed:.0%} of the batches without names": unnamed,
        "names begin as labels": settings.get("names_begin_as_labels"),
        "pieces see themselves alone": settings.get("prompt_window_tokens") == 1,
        "headers see all": settings.get("header_view") == "all",
    }
    return ", ".join([f"{settings['steps']:,}", *(text for text, is_so in more.items() if is_so)])


def _recall(found: Reports) -> str:
    results, reports = found[0][0].parent, [report for _, report in found]
    reports.sort(key=lambda report: (SYSTEMS.index(report["system"]), len(_recipe(report)), report["settings"]["seed"]))
    files.write_picture(results / "recall.png", draw(reports))
    lengths = sorted({row["segments"] for report in reports for row in report["recall"]})
    near = [(0, 0), (1, 1), (2, 3), (4, 6), (7, 8)]
    head = ["system", "steps", "seed", *(f"{a}" if a == b else f"{a} to {b}" for a, b in near), *(f"in {n}" for n in lengths if n > _FROM)]

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.1f}"

    rows = []
    for report in reports:
        shares = [right(report, TRAINED, *bounds) for bounds in near] + [right(report, n, _FROM) for n in lengths if n > _FROM]
        rows.append([f"`{report['system']}`", _recipe(report), str(report["settings"]["seed"]), *map(percent, shares)])
    devices = ", ".join(dict.fromkeys(report["device"] for report in reports))
    told = (
        f"{reports[0]['parameters']:,} parameters, steps of {reports[0]['settings']['rows']} rows; {devices}, JAX {reports[0]['jax']}. "
        f"Right answers, %: in contexts of {TRAINED} segments by the segments between item and question, then in longer ones, of items at "
        f"least {_FROM} segments back"
    )
    plot = f"![right answers by distance and by length](neighbours/{results.name}/recall.png)"
    return f"{told}:\n\n{pages.markdown_table(head, rows)}\n\n{plot}"


def draw(reports: list[dict[str, Any]]) -> Any:
    """Draw right answers against the distance in the longest contexts of training, and against the length of the context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 4.4), layout="constrained")
    left, other = figure.subplots(1, 2, sharey=True)
    recipes = list(dict.fromkeys((report["system"], _recipe(report)) for report in reports))
    for report in reports:
        own = report["system"], _recipe(report)
        several = sum(system == own[0] for system, _ in recipes) > 1
        color, label = f"C{recipes.index(own)}", None if report["settings"]["seed"] else ", ".join(own) if several else own[0]
        rows = sorted((row["distance"], 100 * row["right"]) for row in report["recall"] if row["segments"] == TRAINED)
        lengths = sorted({row["segments"] for row in report["recall"] if row["segments"] >= _FROM})
        options: dict[str, Any] = {"marker": "o", "markersize": 3, "color": color, "label": label}
        left.plot(*zip(*rows), **options) if rows else None
        other.plot(lengths, [100 * (right(report, n, _FROM) or 0) for n in lengths], **options) if lengths else None
    other.axvline(TRAINED, color="grey", linestyle="--", linewidth=1)
    left.set(
        title=f"contexts of {TRAINED} segments", xlabel="segments between item and question", ylabel="right answers, %", ylim=(-3, 103)
    )
    other.set(title=f"items at least {_FROM} segments back", xlabel="segments of the context (dashed: trained)", xscale="log")
    ticks = sorted({row["segments"] for report in reports for row in report["recall"] if row["segments"] >= _FROM})
    other.set_xticks(ticks, [*map(str, ticks)])
    other.set_xticks([], minor=True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", fontsize=7)
    return figure


def _expressions(found: Reports) -> str:
    rows, reports = [], {file.stem.split("_")[1]: report for file, report in found}
    for system in (name for name in SYSTEMS if name in reports):
        for ops, row in sorted((int(ops), row) for ops, row in reports[system]["sets"].items()):
            shares = row["answer_accuracy"], *row["answer_accuracy_interval"], row["step_accuracy"]
            shown = [*(f"{100 * share:.1f}" for share in shares), f"{row['attended_tokens']:,.1f}"]
            rows.append([f"`{system}`", str(ops), str(row["num_examples"]), *shown])
    head = ("system", "operators", "expressions", "right, %", "from, %", "to, %", "all steps right, %", "rows read")
    return pages.markdown_table(head, rows)


def _steps(found: Reports) -> str:
    rows = [row for _, report in found for row in report["rows"] if "ms_per_step" in row and not row.get("stream")]
    order = ("dense", "window", "span", "memory")
    rows.sort(key=lambda row: (row["batch_size"], row["context_tokens"], order.index(row["attention"])))
    cells = [
        [
            f"`{row['attention']}`", str(row["batch_size"]), f"{row['context_tokens']:,}", f"{row['attended_tokens']:,.0f}",
            f"{row['ms_per_step']:.3f}", f"{row['tokens_per_second']:,.0f}", f"{row['kv_memory_bytes'] / 2**20:,.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    head = ("attention", "sequences", "context", "rows read", "ms a step", "tokens/s", "kept of the context, MiB")
    return pages.markdown_table(head, cells)


COMMANDS: dict[str, Any] = {"train": Train}


def main(argv: list[str] | None = None) -> None:
    pages.run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    main()
