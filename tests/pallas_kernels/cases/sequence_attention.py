"""Named problems of masked attention, each with the reason it is here."""

import dataclasses
from collections.abc import Callable

import numpy as np


def causal(rng: np.random.Generator, num_queries: int, num_keys: int) -> np.ndarray:
    return np.tri(num_queries, num_keys, dtype=bool)


def spotted(rng: np.random.Generator, num_queries: int, num_keys: int) -> np.ndarray:
    """A tenth of the pairs, alone and anywhere."""
    return rng.random((num_queries, num_keys)) < 0.1


def blocks(rng: np.random.Generator, num_queries: int, num_keys: int) -> np.ndarray:
    """Packed sequences: causal within runs of 10 to 90 tokens, nothing between them."""
    starts = np.cumsum(rng.integers(10, 90, max(num_queries, num_keys)))
    run = np.searchsorted(starts, np.arange(max(num_queries, num_keys)), side="right")
    return (run[:num_queries, None] == run[None, :num_keys]) & np.tri(num_queries, num_keys, dtype=bool)


def gaps(rng: np.random.Generator, num_queries: int, num_keys: int) -> np.ndarray:
    """Tiles of every kind: full ones, empty ones, and queries and keys without any pair."""
    mask = np.tri(num_queries, num_keys, dtype=bool)
    mask[:, 64:130] = False
    mask[3] = mask[70:140] = False
    return mask


def nothing(rng: np.random.Generator, num_queries: int, num_keys: int) -> np.ndarray:
    return np.zeros((num_queries, num_keys), bool)


def everything(rng: np.random.Generator, num_queries: int, num_keys: int) -> np.ndarray:
    return np.ones((num_queries, num_keys), bool)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: shapes, which pairs are allowed in each sequence, and why it is here."""

    name: str
    why: str
    masks: tuple[Callable[[np.random.Generator, int, int], np.ndarray], ...]
    num_queries: int = 192
    num_keys: int | None = None  # as many as queries
    num_heads: int = 2
    num_kv_heads: int = 2
    head_size: int = 64
    scale: float | None = None


CASES = (
    Case("spotted", "single pairs in every tile; partial tiles on the diagonal, full ones below", (spotted, causal)),
    Case("blocks_gaps", "several sequences packed in a row; empty tiles between others, queries and keys without pairs", (blocks, gaps)),
    Case("nothing", "no pair at all beside another sequence; one less than a tile", (nothing, causal), 127),
    Case("odd_length", "lengths that no tile divides", (spotted,), 133, 97),
    Case("edge_above", "one more than a tile", (causal,), 129),
    Case("one_token", "the shortest sequence", (everything,), 1),
    Case("few_queries", "fewer queries than keys, as in chunks of a prompt", (everything,), 16, 200),
    Case("gqa_3", "a group that is no power of two (SmolLM2 has 9 heads on 3)", (blocks,), 128, None, 6, 2),
    Case("mqa_scale", "one kv head for all; a scale other than 1/sqrt(H)", (spotted,), 128, None, 4, 1, scale=0.3),
    Case("head_32", "the smallest head size", (blocks,), 128, None, 2, 1, 32),
    Case("head_128", "the usual head size", (spotted,), 128, None, 2, 1, 128),
)
CASE = {case.name: case for case in CASES}
PACKED = Case(
    "packed_gqa_3",
    "rows of packed sequences, tiles of 128: documents of some tokens, and one of the whole row",
    (blocks, causal),
    384,
    None,
    6,
    2,
)


@dataclasses.dataclass
class Problem:
    """Concrete arrays of a case, float64 and bool; `grad` is that of the output."""

    q: np.ndarray  # [B, T, N, H]
    k: np.ndarray  # [B, S, K, H]
    v: np.ndarray  # [B, S, K, H]
    mask: np.ndarray  # [B, T, S]
    grad: np.ndarray  # [B, T, N, H]
    scale: float | None


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Draw a problem."""
    rng = np.random.default_rng(seed)
    num_keys = case.num_queries if case.num_keys is None else case.num_keys
    mask = np.stack([draw(rng, case.num_queries, num_keys) for draw in case.masks])
    queries = (len(case.masks), case.num_queries, case.num_heads, case.head_size)
    keys = (len(case.masks), num_keys, case.num_kv_heads, case.head_size)
    q, k, v, grad = (rng.normal(size=shape) for shape in (queries, keys, keys, queries))
    return Problem(q, k, v, mask, grad, case.scale)
