"""Choose the kernels' settings.

Measured on one H100 (JAX 0.11.2, bf16). TFLOP/s of causal prompts; cuDNN's kernel in the same run:

                                                    8,192 tokens     4 of 2,048    32,768    8,192 at 24,576    16,384 tokens
                                                    N 32, K 8, H 128                                            N 9, K 3, H 64
    mosaic    128 x 128, 2 stages                   539              375           581       645                389
              128 x 128, 3 stages                   533              373           577       638                397
              128 x 64, 3 stages                    489              331           518       502                324
    triton    128 x 64, 4 warps, 2 stages           401              292           473       469                249
              128 x 64, 8 warps, 3 stages           363              274                                        282
              64 x 64, 4 warps, 3 stages            376              278                                        288
              128 x 128, 8 warps, 2 stages          385              277                                        255
    cuDNN                                           501              361           577       (no offset)        352

Prompts of 3,000 tokens that attend to their own labels and 16 recent tokens, 128 of them, N 8, K 8, H 64, ms of the Triton kernel:
64 x 64, 4 warps, 3 stages 1.30; 64 x 32 1.10; 64 x 16, 2 warps 0.96; 32 x 16, 2 warps 1.01; 16 x 16, 1 warp 0.78.
"""

from typing import NamedTuple

LOCAL_BLOCK = 16  # queries and keys of a tile of a local mask: few pairs of a larger one are needed


class TritonConfig(NamedTuple):
    """Static settings of the Triton kernel."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int  # of the software pipeline: tiles in flight plus one


class MosaicConfig(NamedTuple):
    """Static settings of the Mosaic-GPU kernel."""

    block_k: int
    num_stages: int  # tiles in flight


def triton_config(num_queries: int, head_size: int, item_bytes: int, blocks: tuple[int, int] | None) -> TritonConfig:
    """Choose settings for a static shape; `blocks` are those of a mask that lists its tiles."""
    if blocks is None:
        blocks = (128 if num_queries % 128 == 0 and head_size == 128 and item_bytes == 2 else 64), 64
    block_q, block_k = blocks
    if item_bytes == 4:
        return TritonConfig(block_q, block_k, num_warps=4, num_stages=1)
    num_warps = max(1, min(4, block_q * block_k // 1024))
    return TritonConfig(block_q, block_k, num_warps, num_stages=2 if block_q * head_size > 64 * 128 else 3)


def mosaic_config(num_keys: int, blocks: tuple[int, int] | None) -> MosaicConfig:
    """Choose settings for a static shape; `blocks` are those of a mask that lists its tiles."""
    block_k = (128 if num_keys % 128 == 0 else 64) if blocks is None else blocks[1]
    return MosaicConfig(block_k, num_stages=256 // block_k)
