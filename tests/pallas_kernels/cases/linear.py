"""Named skinny GEMMs, each with the reason it is here."""

import dataclasses

import numpy as np

from pallas_kernels.linear.heuristics import LinearConfig
from pallas_kernels.linear.triton import padded_rows


@dataclasses.dataclass(frozen=True)
class Case:
    """One product: its shape, what is fused into it, and why it is here. `num_outputs` counts gate and up."""

    name: str
    why: str
    batch: int
    num_outputs: int
    num_inputs: int
    norm: bool = False
    residual: bool = False
    gated: bool = False
    bias: bool = False

    @property
    def num_results(self) -> int:
        return self.num_outputs // 2 if self.gated else self.num_outputs


CASES = (
    Case("batch_1", "one row, whose inputs are divided into segments to fill the matrix unit", 1, 128, 512),
    Case("batch_3", "a batch that is no power of two", 3, 64, 256, residual=True),
    Case("batch_8", "as many rows as the matrix unit's short side has", 8, 96, 256, norm=True),
    Case("batch_9", "one more", 9, 64, 128, norm=True, residual=True),
    Case("batch_33", "just beyond a power of two", 33, 64, 64, gated=True),
    Case("batch_64", "the most rows of the streaming kernel", 64, 64, 64, residual=True),
    Case("batch_100", "several tiles of rows, the last one cut", 100, 80, 192, norm=True, residual=True),
    Case("qkv", "norm before, bias after (Qwen 2)", 2, 192, 256, norm=True, bias=True),
    Case("o", "residual after", 2, 64, 256, residual=True),
    Case("gate_up", "norm before, gate after", 2, 160, 256, norm=True, gated=True),
    Case("all_of_it", "norm, bias, gate and residual", 4, 96, 256, norm=True, residual=True, gated=True, bias=True),
    Case("odd_outputs", "outputs that no tile divides: the last tile is moved back", 1, 141, 256, norm=True),
    Case("odd_gate", "the same with a gate: the tile moves in both halves", 5, 2 * 37, 128, gated=True),
    Case("few_outputs", "fewer outputs than a usual tile", 1, 16, 128),
    Case("inputs_11008", "inputs with an odd factor of 43, as Llama-2-7B's down projection", 1, 16, 11008),
    Case("inputs_576", "SmolLM2-135M's width, nine times 64", 2, 64, 576, norm=True),
    Case("inputs_48", "inputs with a power of two as low as 16", 1, 32, 48, norm=True),
)
MANY_ROWS = (
    Case("rows_304", "the last tile of rows is not full", 304, 2 * 128, 256, gated=True),
    Case("bands", "more tiles than programs; wide weights, in bands of tiles, the last not full", 2200, 2 * 2176, 1024, gated=True),
    Case("inputs_576_gated", "nine steps, for four stages", 16384, 2 * 256, 576, gated=True),
    Case("gates_64", "gates and ups in tiles of 64 and 64", 304, 2 * 320, 512, gated=True),
    Case("added", "a residual; more tiles than programs", 2200, 4096, 128, residual=True),
    Case("added_192", "a residual, outputs in tiles of 192", 304, 576, 1536, residual=True),
)
CASE = {case.name: case for case in (*CASES, *MANY_ROWS)}


@dataclasses.dataclass
class Problem:
    """Concrete arrays of a case, float64."""

    x: np.ndarray  # [B, D]
    weight: np.ndarray  # [M, D]
    norm: np.ndarray | None  # [D]
    residual: np.ndarray | None  # [B, M or F]
    gated: bool
    bias: np.ndarray | None = None  # [M]
    norm_eps: float = 1e-5


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Draw a problem of unit gain, with rows of very different size, so that each needs its own norm."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(case.batch, case.num_inputs))
    if case.norm:
        x *= 2.0 ** rng.integers(-4, 5, (case.batch, 1))
    weight = rng.normal(size=(case.num_outputs, case.num_inputs)) / np.sqrt(case.num_inputs)
    weight *= 2.0 ** rng.integers(-2, 3, (case.num_outputs, 1))
    norm = 1.0 + 0.3 * rng.normal(size=case.num_inputs) if case.norm else None
    residual = rng.normal(size=(case.batch, case.num_results)) if case.residual else None
    bias = rng.normal(size=case.num_outputs) if case.bias else None
    return Problem(x, weight, norm, residual, case.gated, bias)


def shared_memory_bytes(config: LinearConfig, batch: int, item_bytes: int, x_bytes: int, gated: bool) -> int:
    """What a program of the kernel keeps in shared memory."""
    rows = config.tile_outputs * (2 if gated else 1) * item_bytes + padded_rows(batch, config.segments) * x_bytes
    return rows * config.segments * config.segment_inputs * (config.num_stages + 1)
