"""Draw attention masks and what a response read."""

from __future__ import annotations

import dataclasses
import io
import warnings
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from selfspan_jax.viewing.reading import Reading, attention_mask

_UNREAD, _PROMPT, _DENSE = "#eef1f4", "#9fb3c8", "#52606d"
# What a response token reads, and why; by name where span attention gives the reason.
_RESPONSE = "#c92a2a"
_SINK, _OWN, _NAMED = "#7b8794", "#1971c2", "#e8590c"
_WIDER = "beyond that, by a span token"  # header_view
_REASONS = {"label 0, which every token reads": _SINK, "its own label": _OWN, "labels that it names by <ref>": _NAMED}
_MAX_LABELLED_TOKENS, _MAX_TICK = 120, 12
_CELL_INCHES = 0.125  # of a mask whose tokens are written beside it


def plot_mask(reading: Reading) -> Figure:
    """Draw the attention mask of a sequence: a row is a token, its coloured cells are the tokens that it reads, by why it does.

    The written form of the tokens stands along the edges of sequences of up to 120 tokens.
    """
    side = min(14.0, 1.2 + max(4.0, _CELL_INCHES * len(reading.token_ids)))
    figure = Picture(side, side)
    _draw_mask(figure.subplots(), reading)
    return figure


def plot_reading(reading: Reading) -> Figure:
    """Draw what a response read, in three pictures: its rows of the mask, tokens attended to by position, and KV rows read by each step."""
    num_tokens, first = len(reading.token_ids), reading.prompt_tokens if len(reading.response_ids) else 0
    width = min(14.0, max(8.0, 1.2 + _CELL_INCHES * num_tokens))
    height = max(2.5, (width - 1.2) * (num_tokens - first) / num_tokens + 1.2)
    figure = Picture(width, height + 2.6)
    axes = figure.subplot_mosaic([["mask", "mask"], ["positions", "steps"]], height_ratios=[height, 2.6])
    _draw_mask(axes["mask"], reading, first)
    _draw_positions(axes["positions"], reading)
    _draw_steps(axes["steps"], reading)
    return figure


class Picture(Figure):
    """Show itself in a notebook, whatever matplotlib's backend. It is not pyplot's, so nothing keeps it open."""

    def __init__(self, width: float, height: float):
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def draw(self, renderer: RendererBase) -> None:
        """Draw, with a box for each character that no font here has, and no warning."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=70)
        return file.getvalue()


def _draw_mask(axes: Axes, reading: Reading, first: int = 0) -> None:
    """Draw the rows of the mask from token `first` on."""
    mask, prompt_tokens, num_tokens = reading.mask, reading.prompt_tokens, len(reading.token_ids)
    labels, rows = reading.roles.labels, np.arange(num_tokens)[:, None]
    narrow = dataclasses.replace(reading.config, header_view="span")
    span = attention_mask(reading.token_ids, reading.vocab, narrow, reading.policy) & (reading.attention == "span")
    why = np.where(span, np.where(labels[None] == 0, 3, np.where(labels[None] == labels[:, None], 4, 5)), 2)
    cells = np.where(mask, np.where(rows < prompt_tokens, 1, why), 0).astype(float)
    cells[np.triu_indices(num_tokens, 1)] = np.nan  # the future
    colors = ListedColormap([_UNREAD, _PROMPT, _RESPONSE, *_REASONS.values()])
    extent = (-0.5, num_tokens - 0.5, num_tokens - 0.5, first - 0.5)
    axes.imshow(cells[first:], cmap=colors, vmin=0, vmax=5, interpolation="nearest", extent=extent)
    shares = mask.sum(axis=1) / np.arange(1, num_tokens + 1)
    if prompt_tokens < num_tokens:
        wider = reading.attention == "span" and reading.config != narrow  # one more reason, and two rows of them
        title = f"What each token of the response reads: {shares[prompt_tokens:].mean():.0%} of its context"
        axes.set_title(title, fontsize=11, pad=42 if wider else 26)
        lines: dict[str, Any] = {"color": _DENSE, "linewidth": 0.8, "linestyle": "--"}
        axes.axvline(prompt_tokens - 0.5, **lines)
        if first < prompt_tokens:
            axes.axhline(prompt_tokens - 0.5, **lines)
        reasons = _REASONS | ({_WIDER: _RESPONSE} if wider else {})
        shown = reasons if reading.attention == "span" else {f"{reading.attention} attention": _RESPONSE}
        shown = ({"prompt": _PROMPT} if first < prompt_tokens else {}) | shown | {"not read": _UNREAD}
        style: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "borderaxespad": 0.3, "frameon": False, "fontsize": 9}
        axes.legend([Patch(facecolor=color) for color in shown.values()], shown, ncols=-(-len(shown) // (1 + wider)), **style)
    else:
        axes.set_title(f"a prompt that reads {shares.mean():.0%} of its context", fontsize=11)
    axes.set_xlabel("token that is read: the prompt, then the response" if first else "token that is read")
    axes.set_ylabel("token that reads")
    if num_tokens <= _MAX_LABELLED_TOKENS:
        texts = list(map(_tick, reading.token_texts))
        style = {"fontsize": 8, "family": ["DejaVu Sans Mono", "DejaVu Sans"]}  # the second has more scripts
        axes.set_xticks(range(num_tokens), texts, rotation=90, **style)
        axes.set_yticks(range(first, num_tokens), texts[first:], **style)
        for step in reading.steps[1:] if first else ():  # where one begins
            axes.axhline(step.indices[0] - 0.5, color="white", linewidth=1.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=1)


def _tick(text: str) -> str:
    """Write a token in the little room beside a mask; a dollar sign would begin a formula."""
    text = text.replace("\n", "↵")
    return (text if len(text) <= _MAX_TICK else f"{text[: _MAX_TICK - 1]}…").replace("$", r"\$")


def _draw_positions(axes: Axes, reading: Reading) -> None:
    positions, attended = np.arange(len(reading.token_ids)), reading.mask.sum(axis=1)
    axes.plot(positions, positions + 1, color=_DENSE, linestyle="--", linewidth=1, label="dense")
    prompt, response = np.split(positions, [reading.prompt_tokens])
    for name, color, part in (("prompt", _PROMPT, prompt), ("response", _RESPONSE, response)):
        axes.plot(part, attended[part], color=color, marker=".", markersize=3, linewidth=1, label=name)
    axes.set_title("tokens attended to", fontsize=11)
    axes.set(xlabel="position", ylim=(0, None))
    _finish(axes)


def _draw_steps(axes: Axes, reading: Reading) -> None:
    steps = reading.parts
    numbers = np.arange(1, len(steps) + 1)
    read = np.array([reading.mask[step.indices].sum() for step in steps], float)
    dense = np.array([(step.indices + 1).sum() for step in steps], float)
    axes.bar(numbers, dense, width=0.8, color=_UNREAD, edgecolor=_DENSE, linewidth=0.5, label="dense")
    axes.bar(numbers, read, width=0.6, color=_RESPONSE, label="read")
    share = f": {read.sum() / dense.sum():.0%} of dense" if len(steps) else ""
    axes.set_title(f"KV rows read per step{share}", fontsize=11)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
