"""Attention-driven reasoning (2403.14932): later layers weigh more of what the first layer attends to.

    M   = (A_0 > 0.01), without the diagonal            per head and query, of the first layer's probabilities
    A_l = A_l * (1 + alpha * (1 - l / (L - 1)) * M)     in the layers l = 1 .. L - 1, not renormalised

as the paper's public repository computes it, whose alpha is 0.2. It changes what a model says, not how fast: every token reads
everything before it, in prompts and in decoding. Nothing is trained.

M follows from the first layer's queries, keys and sums of exponentials alone. So it is computed anew in each layer, a tile of keys at a
time: no weights of all pairs of tokens are stored, neither of the first layer nor of a later one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from selfspan_jax.attention.policies import Dense, Slots
from selfspan_jax.errors import UserError
from selfspan_jax.neighbours.attending import product, write_token
from selfspan_jax.neighbours.query_driven import check_keys

TILE_TOKENS = 512  # keys that are weighed at once, for many queries
_NEVER = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Rebalanced(Dense):
    """Attend to every token before; later layers weigh more of what the first one attends to."""

    alpha: float = 0.2
    """What is added to the weights of the tokens that the first layer attends to, in the second layer; it falls to 0 in the last."""
    threshold: float = 0.01
    """Probability above which the first layer attends to a token."""

    name: ClassVar[str] = "rebalanced"
    description: ClassVar[str] = "everything before, more of what the first layer attends to"
    looks_at_all_keys: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.alpha < math.inf:
            raise UserError(f"rebalance is {self.alpha}; allowed: from 0")
        if not 0 < self.threshold < 1:
            raise UserError(f"the threshold of rebalance is {self.threshold}; allowed: above 0, below 1")

    def gains(self, num_layers: int) -> list[float]:
        """Return what each layer adds to the weights; nothing in the first and in the last."""
        return [self.alpha * (1 - layer / (num_layers - 1)) if layer else 0.0 for layer in range(num_layers)]

    def mask(self, token_ids, vocab, views, *, first_query=0, **_):
        """Return the attention itself, in place of a mask, for whole sequences in a model of this config."""
        return Rebalancing(self, jnp.int32(first_query), token_ids.shape[1], views.num_layers)

    def prompt_masks(self, token_ids, lengths, vocab, views, *, responses):
        return lambda first, _: self.mask(token_ids, vocab, views, first_query=first)

    def initial_slots(self, slot_table):
        return RebalancedSlots(slot_table, jnp.zeros(slot_table.shape[0], jnp.int32), policy=self)

    def step_slots(self, slots, slot_table, *, span, active, **_):
        return dataclasses.replace(slots, counts=jnp.where(active, span.num_tokens, 0))


def rebalanced(attention: Any, alpha: float | None) -> Any:
    """Return dense attention rebalanced by so much, or a policy as it is. Raises UserError for another than dense with an alpha."""
    if alpha is not None and attention not in (None, "dense"):
        raise UserError(f"rebalance is for dense attention, not for {attention!r}")
    return attention if alpha is None else Rebalanced(alpha)


class Rebalancing:
    """The attention of some queries over the keys of their prompts, layer after layer, in one forward pass."""

    def __init__(self, policy: Rebalanced, first_query: Int[Array, ""], num_keys: int, num_layers: int):
        self.policy, self.first_query, self.num_keys = policy, first_query, num_keys
        self._gains = iter(policy.gains(num_layers))
        self._first: tuple[Array, Array, Array] | None = None

    def attend(self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"]) -> Float[Array, "B T N H"]:
        """Compute the next layer's outputs."""
        q, key = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3]), jnp.arange(self.num_keys, dtype=jnp.int32)
        query = self.first_query + jnp.arange(q.shape[1], dtype=jnp.int32)
        distance = (query[:, None] - key[None])[None]
        out, log_sum = rebalanced_attention(q, k, v, distance, next(self._gains), self.policy.threshold, self._first)
        self._first = self._first or (q, k, log_sum)
        return out.reshape(*q.shape[:2], -1, q.shape[4])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RebalancedSlots(Slots):
    """The pool rows of all tokens; a layer's cache has its gain [B, K] beside its pools, but for the first one's."""

    policy: Rebalanced = dataclasses.field(kw_only=True, metadata={"static": True})

    def prepared(self, cache: Any) -> Any:
        """Return the cache with each layer's gain. Raises UserError for prompts in host memory."""
        check_keys(self.policy, None if cache.is_resident else "kv_memory='host'")
        heads = self.slots.shape[0], cache.pools[0][0].shape[1]
        gains = ([jnp.full(heads, gain, jnp.float32)] if layer else [] for layer, gain in enumerate(self.policy.gains(len(cache.pools))))
        return dataclasses.replace(cache, pools=tuple((*layer[:2], *gain) for layer, gain in zip(cache.pools, gains)))

    def attend(self, own: Int[Array, "B"], implementation: Any) -> Any:
        """Make the attention of one new token per sequence: write it to slot `own`, unless that is outside the pool; read all rows."""
        first: list[Any] = []
        token = jnp.arange(self.slots.shape[1], dtype=jnp.int32)
        distance = (self.counts[:, None] - 1 - token[None])[:, None]

        def attend(qkv, options, angles, layer):
            q, *pools = write_token(qkv, options, angles, own, layer)
            k, v = (pool.at[self.slots].get(mode="clip") for pool in pools)
            q, gain = q.reshape(len(own), 1, k.shape[2], -1, q.shape[2]), layer[2][:, :, None, None, None] if first else 0.0
            out, log_sum = rebalanced_attention(q, k, v, distance, gain, self.policy.threshold, *first)
            first[:] = first or [(q, k, log_sum)]
            return out.reshape(len(own), 1, -1), (*pools, *layer[2:])

        return attend


def rebalanced_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    distance: Int[Array, "*B T S"],
    gain: Any,
    threshold: float,
    first: tuple[Float[Array, "B T K G H"], Float[Array, "B S K H"], Float[Array, "B K G T"]] | None = None,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B K G T"]]:
    """Compute attention to earlier tokens, a tile of keys at a time, with `1 + gain` times the weight of what the first layer attends to.

    Args:
      distance: tokens from key to query; below 0 for keys that a query does not read.
      gain: a number, or one for each [B, K, 1, 1, 1].
      first: queries, keys and logarithms of the first layer; None in that layer.

    Returns: outputs, in the type of `v`, and the logarithms of the sums of exponentials of the scaled scores, float32.
    """
    num_keys = k.shape[1]
    tile = num_keys if q.shape[1] == 1 else min(num_keys, TILE_TOKENS)
    padding = ((0, 0), (0, -num_keys % tile))
    k, v, *firsts = (jnp.pad(x, (*padding, (0, 0), (0, 0))) for x in (k, v, *([first[1]] if first else [])))
    distance = jnp.pad(distance, ((0, 0), *padding), constant_values=-1)

    def step(index, carry):
        largest, total, out = carry
        k_tile, v_tile, *firsts_tile = (jax.lax.dynamic_slice_in_dim(x, index * tile, tile, axis=1) for x in (k, v, *firsts))
        apart = jax.lax.dynamic_slice_in_dim(distance, index * tile, tile, axis=2)[:, None, None]
        scores = jnp.where(apart >= 0, _scores(q, k_tile), _NEVER)
        larger = jnp.maximum(largest, jnp.max(scores, axis=4))
        weights = jnp.where(apart >= 0, jnp.exp(scores - larger[..., None]), 0.0)
        scale = jnp.exp(largest - larger)
        total = total * scale + jnp.sum(weights, axis=4)
        if first:
            attended = (jnp.exp(_scores(first[0], firsts_tile[0]) - first[2][..., None]) > threshold) & (apart > 0)
            weights *= 1.0 + gain * attended.astype(jnp.float32)
        weights = weights.astype(v.dtype)
        return larger, total, out * scale[..., None] + product("bkgts,bskh->bkgth", weights, v_tile)

    shape = (q.shape[0], *q.shape[2:4], q.shape[1])
    carry = jnp.full(shape, _NEVER), jnp.zeros(shape), jnp.zeros((*shape, q.shape[4]))
    read = jnp.max(jnp.sum(distance >= 0, axis=2, dtype=jnp.int32), initial=0)  # the first ones
    carry = step(0, carry) if tile == num_keys else jax.lax.fori_loop(0, (read + tile - 1) // tile, step, carry)
    largest, total, out = carry
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # of sequences that take no token, which read nothing
    return jnp.moveaxis(out / total[..., None], 3, 1).astype(v.dtype), largest + jnp.log(total)


def _scores(q: Float[Array, "B T K G H"], k: Float[Array, "B S K H"]) -> Float[Array, "B K G T S"]:
    return product("btkgh,bskh->bkgts", q, k) / math.sqrt(q.shape[4])
