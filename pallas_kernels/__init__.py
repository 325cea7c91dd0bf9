"""Accelerator kernels of selfspan. Depends on JAX only; knows nothing of spans or models.

Each op is a folder: `api` (the public function), `reference` (plain JAX), `triton`, `mosaic` or `jax_triton` (kernels), `heuristics`
(their measured settings). What an op cannot do and how many bytes it must move: `pallas_kernels.span_decode.unsupported_reason`,
`pallas_kernels.linear.expected_bytes` and so on.
"""

from pallas_kernels.linear import QuantizedWeight, fused_linear, quantize_weight
from pallas_kernels.rotary import rotate_and_write, rotate_heads
from pallas_kernels.sequence_attention import TileMask, masked_attention
from pallas_kernels.slots import update_slots
from pallas_kernels.span_decode import QuantizedPool, quantize_pool, span_decode_attention
from pallas_kernels.swiglu import silu_and_mul

__all__ = [
    "QuantizedPool",
    "QuantizedWeight",
    "TileMask",
    "fused_linear",
    "masked_attention",
    "quantize_pool",
    "quantize_weight",
    "rotate_and_write",
    "rotate_heads",
    "silu_and_mul",
    "span_decode_attention",
    "update_slots",
]
