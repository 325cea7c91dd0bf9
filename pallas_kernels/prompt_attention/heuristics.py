"""Choose the settings of the kernel that reads prompts."""

from typing import NamedTuple


class TritonConfig(NamedTuple):
    """Static settings of the Triton kernel."""

    num_warps: int
    num_stages: int  # of the software pipeline: tiles in flight plus one


def prompt_config(block_q: int, head_size: int, item_bytes: int) -> TritonConfig:
    """Choose settings for a static shape.

    One H100, JAX 0.11.2, bf16, causal prompts, TFLOP/s of warps and stages; tiles of queries by keys:

                                        64 x 64          128 x 64                      128 x 128
                                        4, 2   4, 3      4, 2   4, 3   8, 2   8, 3     8, 2
        8,192 tokens, N 32, K 8, H 128   350    376       401    366    324    363      385
        16,384 tokens, N 9, K 3, H 64    278    288       249    270    276    282      255
    """
    if item_bytes == 4:
        return TritonConfig(num_warps=4, num_stages=1)
    if block_q * head_size > 64 * 128:
        return TritonConfig(num_warps=4, num_stages=2)
    return TritonConfig(num_warps=8 if block_q > 64 else 4, num_stages=3)
