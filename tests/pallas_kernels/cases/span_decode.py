"""Named problems of decode attention, each with the reason it is here."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: shapes, how many slots each sequence uses, and why it is here."""

    name: str
    why: str
    counts: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    capacity: int = 96
    num_rows: int = 256
    scale: float | None = None


TILE_EDGES = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96)

CASES = (
    Case("tile_edges", "counts around every tile size, none, one and all", TILE_EDGES),
    Case("all_empty", "no slot anywhere is in use", (0,) * len(TILE_EDGES)),
    Case("mha_head_256", "one query head per kv head: the matrix unit runs mostly empty; the largest head size", (40, 7), 3, 3, 256),
    Case("gqa_3", "a group that is no power of two (SmolLM2 has 9 heads on 3)", (33, 50), 9, 3),
    Case("gqa_8_head_128", "the group of Llama-3-70B; the usual head size", (64, 21), 8, 1, 128),
    Case("mqa_16_head_32", "the widest group that fills the matrix unit's 16 rows; the smallest head size", (90, 3), 16, 1, 32),
    Case("batch_1", "one sequence, so its rows are split over programs", (96,), 8, 2),
    Case("ragged", "one long sequence beside short ones", (96, 2, 0, 5, 1, 3, 2), 2, 2),
    Case("kv_8", "a whole block of kv heads, which Mosaic needs", (19, 0, 8), 16, 8, 64),
    Case("kv_16", "two such blocks, and several splits of each sequence", (9, 33), 16, 16, 128, capacity=33),
    Case("odd_capacity_scale", "a capacity that no tile divides; a scale other than 1/sqrt(H)", (37, 36, 1), capacity=37, scale=0.3),
)
CASE = {case.name: case for case in CASES}


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
    """Draw a problem. Slots beyond counts are far out of range, and rows in no slot hold NaN."""
    rng = np.random.default_rng(seed)
    batch, capacity = len(case.counts), case.capacity
    counts = np.asarray(case.counts, np.int32)
    slots = rng.choice(np.asarray([-(2**31), -1, 10**6, 2**31 - 1]), (batch, capacity))
    used = np.zeros(case.num_rows, bool)
    usable = rng.permutation(case.num_rows)[: case.num_rows - 8]  # some rows are in no slot
    for b, count in enumerate(counts):
        slots[b, :count] = rng.choice(usable, count, replace=False)
        used[slots[b, :count]] = True
    pool_shape = (case.num_rows, case.num_kv_heads, case.head_size)
    k_pool, v_pool = rng.normal(size=pool_shape), rng.normal(size=pool_shape)
    k_pool[~used] = np.nan
    v_pool[~used] = np.nan
    q = rng.normal(size=(batch, case.num_heads, case.head_size))
    return Problem(q, k_pool, v_pool, slots.astype(np.int32), counts, case.scale)
