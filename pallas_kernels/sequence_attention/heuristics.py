"""Choose the kernels' settings."""

from typing import NamedTuple


class KernelConfig(NamedTuple):
    """Static settings of one kernel."""

    num_warps: int
    num_stages: int  # of the software pipeline: tiles in flight plus one


class TritonConfig(NamedTuple):
    """Static settings of the three kernels; the tiles are the mask's."""

    forward: KernelConfig
    queries: KernelConfig  # gradient of the queries
    keys: KernelConfig  # gradient of keys and values


TILE = (64, 64)  # queries by keys: what one warp group (4 warps) multiplies at once, without spilled registers in any kernel


def triton_config(head_size: int, item_bytes: int) -> TritonConfig:
    """Choose settings for a static shape."""
    if item_bytes == 4:
        return TritonConfig(KernelConfig(4, 1), KernelConfig(4, 1), KernelConfig(8, 1))
    wide = head_size > 64  # two accumulators of 128 columns do not fit in the registers of 4 warps
    return TritonConfig(KernelConfig(4, 2), KernelConfig(4, 2), KernelConfig(8 if wide else 4, 2))
