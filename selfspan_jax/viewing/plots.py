"""Draw attention masks and what a response read."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfspan_jax.viewing.reading import Reading

_UNREAD, _READ_BY_PROMPT, _READ_BY_RESPONSE, _DENSE = "#f3f4f6", "#9fb3c8", "#d1495b", "#52606d"
_MAX_LABELLED_TOKENS = 120


def plot_mask(reading: Reading) -> Figure:
    """Draw the attention mask of a sequence: a row is a token, its coloured cells are the tokens that it attends to.

    The written form of the tokens stands along the edges of sequences of up to 120 tokens.
    """
    side = _mask_inches(reading)
    figure = Picture(side, side)
    _draw_mask(figure.subplots(), reading)
    return figure


def plot_reading(reading: Reading) -> Figure:
    """Draw what a response read, in three pictures: its mask, tokens attended to by position, and KV rows read by each step."""
    side = _mask_inches(reading)
    figure = Picture(side + 5.0, side)
    axes = figure.subplot_mosaic([["mask", "positions"], ["mask", "steps"]], width_ratios=[side, 5.0])
    _draw_mask(axes["mask"], reading)
    _draw_positions(axes["positions"], reading)
    _draw_steps(axes["steps"], reading)
    return figure


class Picture(Figure):
    """Show itself in a notebook, whatever matplotlib's backend. It is not pyplot's, so nothing keeps it open."""

    def __init__(self, width: float, height: float):
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=70)
        return file.getvalue()


def _mask_inches(reading: Reading) -> float:
    return min(14.0, 4.0 + 0.12 * len(reading.token_ids))


def _draw_mask(axes: Axes, reading: Reading) -> None:
    mask, prompt_tokens, num_tokens = reading.mask, reading.prompt_tokens, len(reading.token_ids)
    cells = np.where(mask, np.where(np.arange(num_tokens) < prompt_tokens, 1, 2)[:, None], 0).astype(float)
    cells[np.triu_indices(num_tokens, 1)] = np.nan  # the future
    axes.imshow(cells, cmap=ListedColormap([_UNREAD, _READ_BY_PROMPT, _READ_BY_RESPONSE]), vmin=0, vmax=2, interpolation="nearest")
    shares = mask.sum(axis=1) / np.arange(1, num_tokens + 1)
    if prompt_tokens < num_tokens:
        axes.axhline(prompt_tokens - 0.5, color=_DENSE, linewidth=0.8, linestyle="--")
        axes.set_title(f"prompt (blue) and response (red): it reads {shares[prompt_tokens:].mean():.0%} of its context")
    else:
        axes.set_title(f"a prompt that reads {shares.mean():.0%} of its context")
    axes.set_xlabel("token attended to")
    axes.set_ylabel("token")
    if num_tokens <= _MAX_LABELLED_TOKENS:
        texts = [text.replace("$", r"\$") for text in reading.token_texts]  # a dollar would begin a formula
        axes.set_xticks(range(num_tokens), texts, rotation=90, fontsize=6, family="monospace")
        axes.set_yticks(range(num_tokens), texts, fontsize=6, family="monospace")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def _draw_positions(axes: Axes, reading: Reading) -> None:
    positions, attended = np.arange(len(reading.token_ids)), reading.mask.sum(axis=1)
    axes.plot(positions, positions + 1, color=_DENSE, linestyle="--", linewidth=1, label="dense")
    prompt, response = np.split(positions, [reading.prompt_tokens])
    for name, color, part in (("prompt", _READ_BY_PROMPT, prompt), ("response", _READ_BY_RESPONSE, response)):
        axes.plot(part, attended[part], color=color, marker=".", markersize=3, linewidth=1, label=name)
    axes.set(title="tokens attended to", xlabel="position", ylim=(0, None))
    _finish(axes)


def _draw_steps(axes: Axes, reading: Reading) -> None:
    steps = reading.parts
    numbers = np.arange(1, len(steps) + 1)
    read = np.array([reading.mask[step.indices].sum() for step in steps], float)
    dense = np.array([(step.indices + 1).sum() for step in steps], float)
    axes.bar(numbers, dense, width=0.8, color=_UNREAD, edgecolor=_DENSE, linewidth=0.5, label="dense")
    axes.bar(numbers, read, width=0.6, color=_READ_BY_RESPONSE, label="read")
    share = f": {read.sum() / dense.sum():.0%} of dense" if len(steps) else ""
    axes.set(title=f"KV rows read per step{share}", xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
