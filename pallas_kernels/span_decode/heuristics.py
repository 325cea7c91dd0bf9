"""Which settings the kernels run with, and why."""

from typing import NamedTuple

MULTIPROCESSORS = 132  # of an H100 or H200; another number costs a little balance, nothing else


class TritonConfig(NamedTuple):
    """Static settings of the Triton kernels."""

    tile_rows: int  # K and V rows that a program gathers at once
    num_warps: int
    num_stages: int  # of the software pipeline: tiles in flight plus one
    splits: int  # parts that a sequence of mean length is divided into


def triton_config(batch: int, num_kv_heads: int, head_bytes: int, capacity: int) -> TritonConfig:
    """Settings for a static shape; `head_bytes` is what one head of a row takes up."""
    tile_rows = max(16, min(64, 16384 // head_bytes))
    wanted = (2 * MULTIPROCESSORS) // (batch * num_kv_heads)
    splits = max(1, min(wanted, capacity // tile_rows))
    return TritonConfig(tile_rows, num_warps=4, num_stages=3, splits=splits)
