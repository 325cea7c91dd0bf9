"""Accelerator kernels of selfspan. Depends on JAX only; knows nothing of spans or models.

Each op is a folder: `api` (the public function), `reference` (what it computes, in plain JAX), `triton`, `mosaic` or `jax_triton`
(kernels), `heuristics` (their measured settings). What an op cannot do and how many bytes it must move:
`pallas_kernels.span_decode.unsupported_reason`, `pallas_kernels.linear.expected_bytes` and so on.

Every op takes

    implementation: how to compute, one of the op's `IMPLEMENTATIONS`; None for the best one that the default device supports
    interpret: run a Pallas implementation in its interpreter (tests on machines without a GPU)

and raises ValueError where the arguments do not fit together, and NotImplementedError where the named implementation cannot do this.

What launches a kernel is jitted by itself, so that a program traces and lowers it once for all layers of a model: a Mosaic-GPU kernel
takes 0.3 s. The Triton lowering of Pallas was seen to work on JAX 0.10.2 and 0.11.2; JAX 0.11 deprecates it.
"""

from pallas_kernels.copy_rows import SHARES, Copies, copy_rows
from pallas_kernels.linear import ScaledRows, SplitRows, copies_beside, fused_linear, look_up, may_launch_early, rms_norm
from pallas_kernels.norm import fork_rms_norm
from pallas_kernels.place_rows import Wanted, place_rows
from pallas_kernels.prompt_attention import PromptMask, prompt_attention
from pallas_kernels.quantized import QuantizedPool, QuantizedWeight, quantize_pool, quantize_weight
from pallas_kernels.rotary import norm_heads, rotate_and_write, rotate_heads
from pallas_kernels.sequence_attention import PackedMask, TileMask, masked_attention
from pallas_kernels.slots import ELSEWHERE, per_sequence, read_elements, read_largest, update_slots, write_elements
from pallas_kernels.span_decode import HostRows, rotate_and_attend, span_decode_attention
from pallas_kernels.swiglu import silu_and_mul

__all__ = [
    "ELSEWHERE",
    "SHARES",
    "Copies",
    "HostRows",
    "PackedMask",
    "PromptMask",
    "QuantizedPool",
    "QuantizedWeight",
    "ScaledRows",
    "SplitRows",
    "TileMask",
    "Wanted",
    "copies_beside",
    "copy_rows",
    "fork_rms_norm",
    "fused_linear",
    "look_up",
    "masked_attention",
    "may_launch_early",
    "norm_heads",
    "per_sequence",
    "place_rows",
    "prompt_attention",
    "quantize_pool",
    "quantize_weight",
    "read_elements",
    "read_largest",
    "rms_norm",
    "rotate_and_attend",
    "rotate_and_write",
    "rotate_heads",
    "silu_and_mul",
    "span_decode_attention",
    "update_slots",
    "write_elements",
]
