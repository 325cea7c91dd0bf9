"""Sparse prefill on real text, and the sections of docs/prefill.md about that and about speed (benchmarks.sparse_prefill).

    python -m experiments.prefill quality MODEL TEXTS... --tokens 2048,8192 --json FILE
    python -m experiments.prefill page FILE...

Quality: documents are put one after another until they have so many tokens. All but the last tokens are read by prefill, dense or
sparse; the last ones, the continuation, are then scored one at a time, each reading everything. So what differs is only what prefill
left in the cache. Beside each selector stands a window of first and recent tiles with as many tiles in all (just as many or a few more).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tyro.conf import Positional

from data import commandline
from data.tasks import TASKS
from experiments import pages
from selfspan_jax import files, retention
from selfspan_jax.config import DecodeConfig, Dtype
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM
from selfspan_jax.memory import catch_out_of_memory
from selfspan_jax.selectors import BLOCK, BlockMeans, SampleAttention, Selector, WindowTiles

PAGE = Path("docs/prefill.md")
PLOT = "prefill_sparse.png"
KINDS = ("sample 1", "sample 2", "blocks")

# ---------------------------------------------------------------------------------------------------------------- quality


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """Score the continuation of real text after dense and sparse prefill, at several thresholds."""

    model: Positional[Path]
    """As `decode.py` takes it: its prompts must be read causally."""
    texts: Positional[tuple[Path, ...]]
    """Text files, or directories of them (*.txt)."""
    tokens: Annotated[tuple[int, ...], commandline.commas(int)] = (2048, 8192)
    """Lengths, continuation included."""
    continuation: int = 256
    """Last tokens, which are scored."""
    num_texts: int = 8
    """Texts of each length, no document in two of them."""
    batch_size: int = 4
    """Texts that are read together."""
    selectors: Annotated[tuple[str, ...], commandline.commas(*KINDS)] = KINDS
    """Which of them, beside dense prefill."""
    sample_1: Annotated[tuple[float, ...], commandline.commas(float)] = (0.8, 0.95)
    """Shares of the columns, SampleAttention's first version."""
    sample_2: Annotated[tuple[float, ...], commandline.commas(float)] = (0.6, 0.8, 0.95)
    """Shares of columns and of diagonals, its second version."""
    blocks: Annotated[tuple[float, ...], commandline.commas(float)] = (0.3, 0.1, 0.01)
    """Of the largest score in a row, block means."""
    prefill_tokens: int = DecodeConfig.prefill_tokens
    """Tokens over the batch that go through the model at once."""
    dtype: Dtype | None = None
    """What activations and products are computed in; by default as the model is stored."""
    json: Path | None = None
    """Write the rows into this file, each as soon as it is there."""

    def run(self) -> None:
        lm = SpanLM.load(self.model, TASKS, dtype=self.dtype)
        device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        settings = {"model": self.model.name, "dtype": lm.model.config.compute_dtype, "num_texts": self.num_texts}
        report: dict[str, Any] = {**device, **settings, "continuation_tokens": self.continuation, "quality": []}
        for tokens in self.tokens:
            texts = concatenated(lm, self.texts, tokens, self.num_texts)
            dense = None
            for kind, threshold, selector in self.variants(report["quality"], tokens):
                losses, kept = self.score(lm, texts, selector)
                dense = losses if dense is None else dense
                row = {"tokens": tokens, "selector": kind, "threshold": threshold, **summary(losses, dense), **kept}
                report["quality"].append(row)
                print("  ".join(quality_cells(row)), flush=True)
                files.write_rows(self.json, report, complete=False)
        files.write_rows(self.json, report, complete=True)

    def variants(self, rows: list[dict[str, Any]], tokens: int) -> Iterator[tuple[str, float | None, str | Selector]]:
        """Yield dense prefill, each selector, and after each, where there is none yet, the window of as many tiles."""
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
            near = window_of(rows[-1]["tiles_kept"], -(-(tokens - self.continuation) // BLOCK))
            if near not in windows:
                windows.add(near)
                yield "window", near, WindowTiles(first_tiles=1, near_tiles=near, **always)

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
            found = []
            for tokens in rest.T:
                found.append(_losses(state.logits, jnp.asarray(tokens)))
                state = lm.engine.step(state, tokens, config)
            losses.append(np.stack(jax.device_get(found), axis=1))
        whole = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *kept)
        return np.concatenate(losses), retention.to_json(whole)


@jax.jit
def _losses(logits, tokens):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]


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


# ------------------------------------------------------------------------------------------------------------------- page

QUALITY_HEAD = ("tokens", "prefill", "threshold", "tiles read", "retained mass, mean", "least", "perplexity", "loss above dense")
SPEED_HEAD = ("tokens", "prefill", "tiles read", "first token, ms", "times dense", "attention of a layer's last chunk, ms", "choice, ms")


def quality_cells(row: dict[str, Any]) -> list[str]:
    threshold = "" if row["threshold"] is None else f"{row['threshold']:g}{' tiles' if row['selector'] == 'window' else ''}"
    mass = f"{row['retained_mass_mean']:.1%}", f"{row['retained_mass_min']:.2%}"
    loss = "" if row["selector"] == "dense" else f"{row['loss_more']:+.4f} ± {row['loss_more_error']:.4f}"
    return [f"{row['tokens']:,}", row["selector"], threshold, f"{row['tiles_kept']:.1%}", *mass, f"{row['perplexity']:.3f}", loss]


def speed_cells(row: dict[str, Any]) -> list[str]:
    first = [f"{row['tokens']:,}", row["selector"], f"{row['kept']:.0%}"]
    if "not_run" in row:
        return [*first, f"not run: {row['not_run']}", "", "", ""]
    times = "" if row["times_dense"] is None else f"{row['times_dense']:.2f}"
    choice = f"{row['choice_ms']:.2f}" if "choice_ms" in row else ""
    return [*first, f"{row['first_token_ms']:,.0f}", times, f"{row['attention_ms']:.2f}", choice]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """Write the tables and the plot of docs/prefill.md from JSON."""

    results: Positional[tuple[Path, ...]]
    """Files of `quality` and of `benchmarks.sparse_prefill`."""
    page: Path = PAGE
    """Has the lines <!-- sparse quality --> and <!-- sparse speed -->, each with an <!-- end --> after it."""

    def run(self) -> None:
        reports = [files.read_json(path) for path in self.results]
        quality, speed = (_rows(reports, name) for name in ("quality", "speed"))
        sections = {
            "sparse quality": _section(quality, QUALITY_HEAD, quality_cells),
            "sparse speed": _section(speed, SPEED_HEAD, speed_cells),
        }
        if quality:
            files.write_picture(self.page.with_name(PLOT), draw([row for _, row in quality]))
            sections["sparse quality"] += f"\n\n![Loss above dense prefill against the share of tiles read]({PLOT})"
        files.write_text(self.page, pages.fill(files.read_text(self.page), sections))


def _rows(reports: list[dict[str, Any]], name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the rows of all reports, each with its report; of rows of the same settings, as dense prefill has in each, the first."""
    found = ((report, row) for report in reports for row in report.get(name, []))
    unique: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
    for report, row in found:
        unique.setdefault((row["tokens"], row["selector"], row.get("threshold", row.get("kept"))), (report, row))
    return list(unique.values())


def _section(rows: list[tuple[dict[str, Any], dict[str, Any]]], head: tuple[str, ...], cells: Any) -> str:
    told = dict.fromkeys(f"{report.get('model', report.get('shape'))}, {report['device']}, JAX {report['jax']}" for report, _ in rows)
    return "\n\n".join([*(f"{line}." for line in told), pages.markdown_table(head, [cells(row) for _, row in rows])])


def draw(rows: list[dict[str, Any]]) -> Any:
    """Draw the loss above dense prefill against the share of tiles read, a panel for each length."""
    from matplotlib.figure import Figure

    lengths = sorted({row["tokens"] for row in rows})
    figure = Figure(figsize=(4.2 * len(lengths), 3.2), layout="constrained")
    for axes, tokens in zip(np.ravel(figure.subplots(1, len(lengths), squeeze=False)), lengths):
        for number, kind in enumerate((*KINDS, "window")):
            own = sorted((row for row in rows if (row["tokens"], row["selector"]) == (tokens, kind)), key=lambda row: row["tiles_kept"])
            kept, loss, error = ([row[key] for row in own] for key in ("tiles_kept", "loss_more", "loss_more_error"))
            axes.errorbar(100 * np.array(kept), loss, yerr=np.nan_to_num(error), marker="o", color=f"C{number}", label=kind)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set(xlabel="tiles read, % of dense", ylabel="loss above dense", title=f"{tokens:,} tokens")
        axes.legend(fontsize=8)
    return figure


COMMANDS: dict[str, Any] = {"quality": Quality, "page": Page}


def main(argv: list[str] | None = None) -> None:
    with commandline.exit_on_user_error(UserError, NotImplementedError), catch_out_of_memory():
        _, command = commandline.parse_one_of(COMMANDS, __doc__, argv, user_error=UserError)
        with files.outputs(json=getattr(command, "json", None)):
            command.run()


if __name__ == "__main__":
    main()
