"""Named problems of the attention of prompts, each with the reason it is here."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Some queries of each prompt, at positions `first_query` on, over a pool with room for `num_keys` tokens of each."""

    name: str
    why: str
    lengths: tuple[int, ...]
    first_query: int = 0
    num_queries: int = 128
    num_keys: int = 128
    window_tokens: int | None = None  # None: everything before
    num_labels: int = 12
    num_heads: int = 2
    num_kv_heads: int = 2
    head_size: int = 64
    scale: float | None = None


CASES = (
    Case("causal", "one whole prompt", (128,)),
    Case("causal_chunk", "queries at an offset, which is no multiple of their tile of 128", (320, 256), 192, 128, 320),
    Case("causal_ragged", "prompts that end before, in and after the chunk", (1, 70, 128, 64), 64, 64),
    Case("one_tile", "the smallest chunk of the smallest room", (64,), 0, 64, 64),
    Case("local", "labels that come again far away; a window that crosses tiles", (256, 200), 0, 256, 256, 16),
    Case("local_chunk", "the same at an offset", (256, 193, 130), 128, 128, 256, 16),
    Case("window", "a window wider than a tile and no label shared", (256,), 64, 192, 256, 100, num_labels=1),
    Case("own_only", "a window of the token itself", (192,), 0, 192, 192, 1, num_labels=3),
    Case("gqa_3_scale", "a group that is no power of two; a scale other than 1/sqrt(H)", (128,), 0, 128, 128, None, 12, 6, 2, scale=0.3),
    Case("head_128", "the usual head size, grouped heads", (192,), 64, 128, 192, 16, 12, 4, 1, 128),
    Case("causal_128", "the usual head size, all keys, an offset of half a tile", (320,), 64, 256, 320, None, 12, 4, 1, 128),
    Case("head_32", "the smallest head size", (128,), 0, 128, 128, None, 12, 2, 1, 32),
)
CASE = {case.name: case for case in CASES}


@dataclasses.dataclass
class Problem:
    """Concrete arrays of a case, float64 and int; rows of the pools that hold no token of a prompt are garbage."""

    q: np.ndarray  # [B, T, N, H]
    k: np.ndarray  # [P, K, H]
    v: np.ndarray  # [P, K, H]
    lengths: np.ndarray  # [B]
    labels: np.ndarray  # [B, S]
    mask: np.ndarray  # [B, T, S]
    case: Case


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Draw a problem; the mask is written down pair by pair."""
    rng = np.random.default_rng(seed)
    batch, rows = len(case.lengths), len(case.lengths) * case.num_keys + 40
    runs = np.cumsum(rng.random((batch, case.num_keys)) < 0.1, axis=1)  # labels change every ten tokens
    labels = rng.integers(0, case.num_labels, (batch, case.num_keys + 1))
    labels = np.take_along_axis(labels, runs, axis=1) if case.num_labels > 1 else np.full((batch, case.num_keys), -1)
    mask = np.zeros((batch, case.num_queries, case.num_keys), bool)
    for b, t, s in np.ndindex(mask.shape):
        position = case.first_query + t
        if s <= position:
            named = labels[b, s] == 0 or labels[b, s] == labels[b, position] >= 0
            mask[b, t, s] = case.window_tokens is None or named or position - s < case.window_tokens
    q = rng.normal(size=(batch, case.num_queries, case.num_heads, case.head_size))
    k, v = (rng.normal(size=(rows, case.num_kv_heads, case.head_size)) for _ in range(2))
    return Problem(q, k, v, np.array(case.lengths), labels, mask, case)
