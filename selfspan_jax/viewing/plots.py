"""Pictures of spans."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_UNREAD, _READ_BY_PROMPT, _READ_BY_RESPONSE, _DENSE = "#f3f4f6", "#9fb3c8", "#d1495b", "#52606d"
_MAX_LABELLED_TOKENS = 120


def plot_mask(mask: Bool[np.ndarray, "T T"], token_texts: Sequence[str], prompt_tokens: int) -> Figure:
    """The attention mask of one sequence: a row is a token, its coloured cells are the tokens that it attends to.

    Args:
      token_texts: the written form of each token; shown along the edges of sequences of up to 120 tokens.
      prompt_tokens: where the response begins.
    """
    side = _mask_inches(len(token_texts))
    figure = _figure(side, side)
    _draw_mask(figure.subplots(), mask, token_texts, prompt_tokens)
    return figure


def plot_reading(
    mask: Bool[np.ndarray, "T T"], token_texts: Sequence[str], prompt_tokens: int, steps: Sequence[Int[np.ndarray, "I"]]
) -> Figure:
    """What a response read, in three pictures: its mask, tokens attended to by position, and KV rows read by each step.

    Args:
      token_texts, prompt_tokens: as for `plot_mask`.
      steps: indices of each step's tokens in the sequence.
    """
    side = _mask_inches(len(token_texts))
    figure = _figure(side + 5.0, side)
    axes = figure.subplot_mosaic([["mask", "positions"], ["mask", "steps"]], width_ratios=[side, 5.0])
    _draw_mask(axes["mask"], mask, token_texts, prompt_tokens)
    _draw_positions(axes["positions"], mask, prompt_tokens)
    _draw_steps(axes["steps"], mask, steps)
    return figure


class Picture(Figure):
    """A figure that a notebook shows, whatever its matplotlib is set to. It is not pyplot's, so nothing keeps it open."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=70)
        return file.getvalue()


def _figure(width: float, height: float) -> Picture:
    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _mask_inches(num_tokens: int) -> float:
    return min(14.0, 4.0 + 0.12 * num_tokens)


def _draw_mask(axes: Axes, mask: Bool[np.ndarray, "T T"], token_texts: Sequence[str], prompt_tokens: int) -> None:
    num_tokens = len(token_texts)
    if mask.shape != (num_tokens, num_tokens):
        raise ValueError(f"a mask of shape {mask.shape} for {num_tokens} tokens")
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
        texts = [text.replace("$", r"\$") for text in token_texts]  # a dollar would begin a formula
        axes.set_xticks(range(num_tokens), texts, rotation=90, fontsize=6, family="monospace")
        axes.set_yticks(range(num_tokens), texts, fontsize=6, family="monospace")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def _draw_positions(axes: Axes, mask: Bool[np.ndarray, "T T"], prompt_tokens: int) -> None:
    num_tokens = len(mask)
    positions, attended = np.arange(num_tokens), mask.sum(axis=1)
    axes.plot(positions, positions + 1, color=_DENSE, linestyle="--", linewidth=1, label="dense")
    parts = (("prompt", _READ_BY_PROMPT, slice(None, prompt_tokens)), ("response", _READ_BY_RESPONSE, slice(prompt_tokens, None)))
    for name, color, part in parts:
        axes.plot(positions[part], attended[part], color=color, marker=".", markersize=3, linewidth=1, label=name)
    axes.set(title="tokens attended to", xlabel="position", ylim=(0, None))
    _finish(axes)


def _draw_steps(axes: Axes, mask: Bool[np.ndarray, "T T"], steps: Sequence[Int[np.ndarray, "I"]]) -> None:
    numbers = np.arange(1, len(steps) + 1)
    read = np.array([mask[step].sum() for step in steps], float)
    dense = np.array([(step + 1).sum() for step in steps], float)
    axes.bar(numbers, dense, width=0.8, color=_UNREAD, edgecolor=_DENSE, linewidth=0.5, label="dense")
    axes.bar(numbers, read, width=0.6, color=_READ_BY_RESPONSE, label="read")
    share = f": {read.sum() / dense.sum():.0%} of dense" if len(steps) else ""
    axes.set(title=f"KV rows read per step{share}", xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
