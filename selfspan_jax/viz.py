"""Pictures of spans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

_UNREAD, _READ_BY_PROMPT, _READ_BY_RESPONSE = "#f3f4f6", "#9fb3c8", "#d1495b"
_MAX_LABELLED_TOKENS = 120


def plot_mask(mask: Bool[np.ndarray, "T T"], token_texts: Sequence[str], prompt_tokens: int) -> Figure:
    """The attention mask of one sequence: a row is a token, its coloured cells are the tokens that it attends to.

    Args:
      token_texts: the written form of each token; shown along the edges of sequences of up to 120 tokens.
      prompt_tokens: where the response begins.
    """
    num_tokens = len(token_texts)
    if mask.shape != (num_tokens, num_tokens):
        raise ValueError(f"a mask of shape {mask.shape} for {num_tokens} tokens")
    cells = np.where(mask, np.where(np.arange(num_tokens) < prompt_tokens, 1, 2)[:, None], 0).astype(float)
    cells[np.triu_indices(num_tokens, 1)] = np.nan  # the future
    size = min(14.0, 3.0 + 0.15 * num_tokens)
    figure = Figure(figsize=(size, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(cells, cmap=ListedColormap([_UNREAD, _READ_BY_PROMPT, _READ_BY_RESPONSE]), vmin=0, vmax=2, interpolation="nearest")
    axes.axhline(prompt_tokens - 0.5, color="#52606d", linewidth=0.8, linestyle="--")
    shares = mask.sum(axis=1) / np.arange(1, num_tokens + 1)
    read = f": it reads {shares[prompt_tokens:].mean():.0%} of its context" if prompt_tokens < num_tokens else ""
    axes.set_title(f"prompt (blue) and response (red){read}")
    axes.set_xlabel("token attended to")
    axes.set_ylabel("token")
    if num_tokens <= _MAX_LABELLED_TOKENS:
        axes.set_xticks(range(num_tokens), token_texts, rotation=90, fontsize=6, family="monospace")
        axes.set_yticks(range(num_tokens), token_texts, fontsize=6, family="monospace")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    return figure
