"""Named problems, each with the reason it is here, for tests on the CPU and on the GPU."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: shapes, how many rows each sequence names, and why it is here."""

    name: str
    why: str
    counts: tuple[int, ...]  # rows that each sequence names
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    capacity: int = 96
    num_rows: int = 256
    scale: float | None = None


TILE_EDGES = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96)

CASES = (
    Case("tile_edges", "counts around every tile size, none, one and all", TILE_EDGES),
    Case("all_empty", "nothing is named anywhere", (0, 0)),
    Case("mha", "one query head per kv head: the matrix unit runs mostly empty", (40, 7), 3, 3),
    Case("gqa_3", "a group that is no power of two (SmolLM2 has 9 heads on 3)", (33, 50), 9, 3),
    Case("gqa_8", "the group of Llama-3-70B", (64, 21), 8, 1),
    Case("mqa_16", "the widest group that fills the matrix unit's 16 rows", (90, 3), 16, 1),
    Case("head_128", "the usual head size", (70, 5), 4, 2, 128),
    Case("head_32", "the smallest head size", (70, 5), 4, 2, 32),
    Case("head_256", "the largest head size", (18, 40), 2, 1, 256),
    Case("batch_1", "one sequence, so its rows are split over programs", (96,), 8, 2),
    Case("ragged", "one long sequence beside short ones", (96, 2, 0, 5, 1, 3, 2), 2, 2),
    Case("kv_8", "a whole block of kv heads, which Mosaic needs", (19, 0, 8), 16, 8, 64),
    Case("kv_16", "two such blocks, and several parts of each sequence", (9, 33), 16, 16, 128, capacity=33),
    Case("odd_capacity", "a capacity that no tile divides", (37, 36, 1), capacity=37),
    Case("scale", "a scale other than 1/sqrt(H)", (40, 20), scale=0.3),
)


@dataclasses.dataclass
class Problem:
    """Concrete arrays of a case, float64 or int; garbage wherever garbage is allowed."""

    q: np.ndarray  # [B, N, H]
    k_pool: np.ndarray  # [P, K, H]
    v_pool: np.ndarray  # [P, K, H]
    slots: np.ndarray  # int32 [B, A]
    counts: np.ndarray  # int32 [B]
    scale: float | None


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Draw a problem. Slots beyond counts hold ids far out of range, unnamed rows hold NaN."""
    rng = np.random.default_rng(seed)
    batch, capacity = len(case.counts), case.capacity
    counts = np.asarray(case.counts, np.int32)
    slots = rng.choice(np.asarray([-(2**31), -1, 10**6, 2**31 - 1]), (batch, capacity))
    named = np.zeros(case.num_rows, bool)
    usable = rng.permutation(case.num_rows)[: case.num_rows - 8]  # some rows stay unnamed
    for b, count in enumerate(counts):
        slots[b, :count] = rng.choice(usable, count, replace=False)
        named[slots[b, :count]] = True
    pool_shape = (case.num_rows, case.num_kv_heads, case.head_size)
    k_pool, v_pool = rng.normal(size=pool_shape), rng.normal(size=pool_shape)
    k_pool[~named] = np.nan
    v_pool[~named] = np.nan
    q = rng.normal(size=(batch, case.num_heads, case.head_size))
    return Problem(q, k_pool, v_pool, slots.astype(np.int32), counts, case.scale)
