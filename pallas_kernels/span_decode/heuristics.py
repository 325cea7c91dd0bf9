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
    return TritonConfig(tile_rows, num_warps=2, num_stages=3, splits=splits)


class MosaicConfig(NamedTuple):
    """Static settings of the Mosaic-GPU kernel."""

    tile_rows: int  # rows of 8 kv heads that a program copies at once
    num_stages: int  # tiles in flight
    splits: int  # parts that every sequence is divided into


def mosaic_config(batch: int, num_kv_heads: int, head_size: int, capacity: int) -> MosaicConfig:
    """Settings for a static shape."""
    wanted = MULTIPROCESSORS * (128 // head_size) // (batch * num_kv_heads // 8)
    return MosaicConfig(tile_rows=8, num_stages=5, splits=max(1, min(wanted, capacity // 64)))
