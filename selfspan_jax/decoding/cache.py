"""The KV cache: per layer a pool of keys and values, and a table of which pool row holds whose token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import rotate_and_write, span_decode_attention
from selfspan_jax.attention.policies import Slots
from selfspan_jax.config import Implementation, ModelConfig
from selfspan_jax.model import Attend

LayerPools = tuple[Float[Array, "P K H"], Float[Array, "P K H"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of B sequences with room for A tokens each.

    `slot_table[b, t]` is the pool row of token t of sequence b; nothing else says whose row a row is. Samples of one prompt
    share the prompt's rows and own the rows that they write.
    """

    pools: tuple[LayerPools, ...]
    slot_table: Int[Array, "B A"]

    @classmethod
    def empty(
        cls, config: ModelConfig, prompt_lengths: Int[Array, "b"], prompt_capacity: int, num_samples: int, new_capacity: int
    ) -> KVCache:
        """Allocate b * prompt_capacity rows for the prompts, then b * num_samples * new_capacity for the tokens that follow them.

        Sequence b * num_samples + i is sample i of prompt b.
        """
        batch = prompt_lengths.shape[0]
        shape = (batch * (prompt_capacity + num_samples * new_capacity), config.num_kv_heads, config.head_size)
        dtype = jnp.dtype(config.compute_dtype)
        pools = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
        sequence = jnp.arange(batch * num_samples, dtype=jnp.int32)[:, None]
        token = jnp.arange(prompt_capacity + new_capacity, dtype=jnp.int32)[None, :]
        new_token = token - jnp.repeat(prompt_lengths, num_samples)[:, None]
        prompt_slot = sequence // num_samples * prompt_capacity + token
        own_slot = batch * prompt_capacity + sequence * new_capacity + jnp.minimum(new_token, new_capacity - 1)
        return cls(pools, jnp.where(new_token < 0, prompt_slot, own_slot))


def attend_cached(own: Int[Array, "B"], slots: Slots, implementation: Implementation | None) -> Attend:
    """Make the attention of one new token per sequence: write it to slot `own`, then attend to `slots`.

    A slot outside the pool writes nothing.
    """

    def attend(qkv, angles, pools):
        q, k_pool, v_pool = rotate_and_write(qkv[:, 0], angles[0][:, 0], angles[1][:, 0], own, *pools)
        out = span_decode_attention(q, k_pool, v_pool, slots.slots, slots.counts, implementation=implementation)
        return out[:, None], (k_pool, v_pool)

    return attend
