"""The KV cache: per layer a pool of keys and values, and a table of which pool row holds whose token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import PromptMask, norm_heads, prompt_attention, rotate_and_write
from pallas_kernels.prompt_attention import prompt_rows
from pallas_kernels.prompt_attention import unsupported_reason as prompt_kernel_reason
from pallas_kernels.rotary import RUN_TOKENS
from selfspan_jax.attention.policies import AnySlots
from selfspan_jax.attention.selectors import Mask
from selfspan_jax.attention.sequences import dot_product_attention
from selfspan_jax.config import Implementation, ModelConfig
from selfspan_jax.model import Attend
from selfspan_jax.parallel import collectives, context

ROW_MULTIPLE = 8  # of a pool: what the copy engine moves is cut into so many rows
LayerPools = tuple[Float[Array, "P K H"], ...]  # keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of B sequences with room for A tokens each.

    `slot_table[b, t]` is the pool row of token t of sequence b, or `ELSEWHERE`; nothing else says whose row a row is. Samples of one
    prompt share the prompt's rows and own the rows that they write.
    """

    pools: tuple[LayerPools, ...]
    slot_table: Int[Array, "B A"]
    is_resident: ClassVar[bool] = True  # all rows are in the pools, whatever is named

    @classmethod
    def empty(
        cls, config: ModelConfig, prompt_lengths: Int[Array, "b"], prompt_capacity: int, num_samples: int, new_capacity: int
    ) -> KVCache:
        """Allocate b * prompt_capacity rows for the prompts, then b * num_samples * new_capacity for the tokens that follow them.

        Sequence b * num_samples + i is sample i of prompt b.
        """
        batch, capacity = prompt_lengths.shape[0], prompt_capacity + new_capacity
        prompt_lengths, prompt_capacity, new_capacity = context.own_sizes(prompt_lengths, prompt_capacity, new_capacity)
        rows = batch * (prompt_capacity + num_samples * new_capacity)
        shape = (-(-rows // ROW_MULTIPLE) * ROW_MULTIPLE, config.num_kv_heads, config.head_size)
        pool = jnp.zeros(shape, jnp.dtype(config.compute_dtype))
        sequence = jnp.arange(batch * num_samples, dtype=jnp.int32)[:, None]
        token = jnp.arange(prompt_capacity + new_capacity, dtype=jnp.int32)[None, :]
        new_token = token - jnp.repeat(prompt_lengths, num_samples)[:, None]
        prompt_slot = sequence // num_samples * prompt_capacity + token
        own_slot = batch * prompt_capacity + sequence * new_capacity + jnp.minimum(new_token, new_capacity - 1)
        return cls(((pool, pool),) * config.num_layers, context.spread(jnp.where(new_token < 0, prompt_slot, own_slot), capacity))

    def extended(self, num_tokens: Int[Array, "B"], new_capacity: int) -> KVCache:
        """Allocate B * new_capacity more rows, for the tokens of each sequence from number `num_tokens[b]` on."""
        table, num_tokens, added = context.take_own(self.slot_table), context.num_own(num_tokens), new_capacity
        (batch, capacity), new_capacity = table.shape, context.share(new_capacity)
        pools = tuple(tuple(jnp.pad(pool, ((0, batch * new_capacity), (0, 0), (0, 0))) for pool in layer[:2]) for layer in self.pools)
        first = self.pools[0][0].shape[0] + new_capacity * jnp.arange(batch, dtype=jnp.int32)[:, None]
        new_token = jnp.arange(capacity + new_capacity, dtype=jnp.int32)[None, :] - num_tokens[:, None]
        own_slot = first + jnp.clip(new_token, 0, new_capacity - 1)
        table = jnp.where(new_token < 0, jnp.pad(table, ((0, 0), (0, new_capacity))), own_slot)
        return KVCache(pools, context.spread(table, self.slot_table.shape[1] + added))

    def choose_slots(self, step_slots: Callable[..., AnySlots], slots: AnySlots, _: Any = None, **now: Any) -> tuple[KVCache, AnySlots]:
        """Compute what the newest tokens attend to, by a policy's `step_slots`; return the cache from which they can."""
        return self, step_slots(slots, self.slot_table, **now)

    def attend(self, own: Int[Array, "B"], slots: AnySlots, implementation: Implementation | None) -> Attend:
        """Make the attention of one new token per sequence, as `Slots.attend`."""
        return slots.attend(own, implementation)


def attend_prompts(slots: Int[Array, "B Q"], mask_of: Callable[[Array, Array, Array], Mask], whole: bool = True) -> Attend:
    """Make the attention of Q tokens of each prompt: write them to their slots, then attend to the prompt's rows under a mask.

    Args:
      slots: of the Q tokens, a multiple of `RUN_TOKENS`. Token t of prompt b is in slot b * T + t.
      mask_of: the mask, as a function of queries [B, Q, N, H] and pools. A `Retained` after a layer's pools measures what it keeps.
      whole: False where the devices of `context` have Q tokens each; their rows are gathered.
    """
    first_slots = slots[:, ::RUN_TOKENS].reshape(-1)

    def attend(qkv, norms, angles, cache):
        qkv, (batch, num_tokens, *_) = norm_heads(qkv, **norms), qkv.shape
        cos, sin = (angle.reshape(batch * num_tokens, -1) for angle in angles)
        q, *pools = rotate_and_write(qkv.reshape(batch * num_tokens, *qkv.shape[2:]), cos, sin, first_slots, *cache[:2])
        q, pools = q.reshape(batch, num_tokens, *q.shape[1:]), pools if whole else collectives.gather_prompt_rows(pools, slots)
        mask = mask_of(q, *pools)
        after = (*pools, *(retained.after(q, pools[0], mask) for retained in cache[2:]))
        if isinstance(mask, PromptMask) and prompt_kernel_reason("triton", q, pools[0], mask) is None:
            return prompt_attention(q, *pools, mask), after
        k, v = (prompt_rows(pool, batch, mask.shape[-1] if isinstance(mask, Array) else mask.num_keys) for pool in pools)
        return dot_product_attention(q, k, v, mask.pairs(num_tokens) if isinstance(mask, PromptMask) else mask), after

    return attend
