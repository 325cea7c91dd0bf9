"""How much of the softmax of causal prompts lies in which tile of keys: what selectors sample, and what a selection retains."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import LOG2_E, choose_implementation, device_reason, dot, head_size_reason, require
from pallas_kernels.prompt_attention.mask import PromptMask, prompt_rows

BLOCK = 128  # queries and keys of a tile that is kept or left out: what the Mosaic kernel takes
BLOCK_ROWS = 64  # queries of a program of the kernel
MAX_SCORES = 2**26  # that are held at once: 256 MB of float32


@functools.partial(jax.jit, static_argnames=("implementation", "interpret"))
def tile_mass(q: jax.Array, k: jax.Array, positions: jax.Array, *, implementation: str | None = None, interpret: bool = False) -> jax.Array:
    """Compute the probability that each query's softmax puts on each tile of 128 keys.

    In one pass over the keys up to the last query: of each tile the logarithm of its sum, then the softmax of those. The scores of a
    tile are held in registers by "triton"; "xla" holds `MAX_SCORES` at once, writes and reads them several times.

    Args:
      q: `[B, R, N, H]`, some queries; head n attends to the keys of head `n // (N // K)`, scores are scaled by `1 / sqrt(H)`.
      k: `[B, S, K, H]`, keys at positions 0 on.
      positions: int32 `[B, R]` of the queries, from 0; each attends to the keys up to its own position.
      implementation, interpret: as `pallas_kernels` says.

    Returns: float32 `[B, N, R, S/128]`, rounded up; rows add up to 1.
    """
    if (missing := -k.shape[1] % BLOCK) > 0:
        k = jnp.pad(k, ((0, 0), (0, missing), (0, 0), (0, 0)))
    chosen = choose_implementation(implementation, ("triton", "xla"), lambda name: unsupported_reason(name, q, interpret))
    sums = _xla_sums(q, k, positions) if chosen == "xla" else _triton_sums(q, k, positions, interpret)
    tile = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 3)
    return jax.nn.softmax(jnp.where(tile * BLOCK <= positions[:, None, :, None], sums, -jnp.inf), axis=-1)


def unsupported_reason(implementation: str, q: jax.Array, interpret: bool) -> str | None:
    """Say why an implementation cannot run on such queries; None when it can."""
    if (reason := device_reason(implementation, ("xla", "triton"), interpret)) or interpret or implementation == "xla":
        return reason
    return head_size_reason(q.shape[3])


def _xla_sums(q, k, positions):
    """Compute the logarithms of the tiles' sums, `[B, N, R, S/128]`; arbitrary for tiles after a query."""
    batch, rows, num_heads, head_size = q.shape
    num_tiles, num_kv_heads = k.shape[1] // BLOCK, k.shape[2]
    fits = max(1, MAX_SCORES // (batch * num_heads * rows * BLOCK))
    step_tiles = math.gcd(num_tiles, 1 << (fits.bit_length() - 1))
    q = q.reshape(batch, rows, num_kv_heads, -1, head_size)
    wide = jnp.float32 if jax.default_backend() == "cpu" else q.dtype  # a CPU has no product of float16 that adds up in float32

    def step(index, found):
        first = index * (step_tiles * BLOCK)
        keys = jax.lax.dynamic_slice_in_dim(k, first, step_tiles * BLOCK, axis=1)
        scores = jnp.einsum("brkgh,bskh->bkgrs", q.astype(wide), keys.astype(wide), preferred_element_type=jnp.float32)
        seen = first + jnp.arange(step_tiles * BLOCK, dtype=jnp.int32)[None, None, :] <= positions[:, :, None]
        scores = jnp.where(seen[:, None, None], scores * head_size**-0.5, -jnp.inf)
        sums = jax.nn.logsumexp(scores.reshape(batch, num_heads, rows, step_tiles, BLOCK), axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(found, sums, index * step_tiles, axis=3)

    none = jnp.full((batch, num_heads, rows, num_tiles), -jnp.inf)
    return jax.lax.fori_loop(0, jnp.max(positions) // (step_tiles * BLOCK) + 1, step, none)


def _triton_sums(q, k, positions, interpret: bool):
    batch, rows, num_heads, _ = q.shape
    padding = -rows % BLOCK_ROWS
    q, positions = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0))), jnp.pad(positions, ((0, 0), (0, padding)))
    sums = pl.pallas_call(
        _sums_kernel,
        grid=(q.shape[1] // BLOCK_ROWS, num_heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, num_heads, q.shape[1], k.shape[1] // BLOCK), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="tile_mass",
    )(q, k, positions)
    return sums[:, :, :rows]


def _sums_kernel(
    q_ref,  # [B, R, N, H]
    k_ref,  # [B, S, K, H]
    positions_ref,  # int32 [B, R]
    sums_ref,  # float32 [B, N, R, S/128]
):
    head, b = pl.program_id(1), pl.program_id(2)
    rows = pl.ds(pl.program_id(0) * BLOCK_ROWS, BLOCK_ROWS)
    kv_head = head // (q_ref.shape[2] // k_ref.shape[2])
    q, positions = q_ref[b, rows, head, :], positions_ref[b, rows]
    factor = LOG2_E * q_ref.shape[3] ** -0.5

    def step(tile, _):
        scores = dot(q, k_ref[b, pl.ds(tile * BLOCK, BLOCK), kv_head, :], ((1,), (1,))) * factor
        seen = tile * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[None, :] <= positions[:, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        peak = jnp.max(scores, axis=1)
        peak = jnp.where(peak > -jnp.inf, peak, 0.0)
        sums_ref[b, head, rows, tile] = (peak + jnp.log2(jnp.sum(jnp.exp2(scores - peak[:, None]), axis=1))) * (1 / LOG2_E)

    jax.lax.fori_loop(0, jax.lax.div(jnp.max(positions), BLOCK) + 1, step, None)


def retained_mass(q: jax.Array, k: jax.Array, mask: PromptMask, queries: jax.Array | None = None) -> jax.Array:
    """Compute the probability of each query's dense softmax that the tiles of a causal mask hold.

    Args:
      q: `[B, T, N, H]`; k: `[B, S, K, H]`.
      mask: causal, with or without lists; those of tiles of 128 keys.
      queries: int32 `[R]`, which of the T are measured; all by default, for which T S / 128 numbers a head are held.

    Returns: float32 `[B, N, R]`; arbitrary for queries after the end of their prompt.
    """
    require(mask.query_labels is None, "the mask must be causal")
    queries = jnp.arange(q.shape[1], dtype=jnp.int32) if queries is None else queries
    positions = jnp.broadcast_to((mask.first_query + queries)[None], (q.shape[0], queries.shape[0]))
    mass = tile_mass(q[:, queries], k, positions)
    if mask.blocks is None:
        return jnp.sum(mass, axis=-1)
    require(mask.blocks[1] == BLOCK, f"the mask must list tiles of {BLOCK} keys", mask.blocks)
    return jnp.sum(jnp.where(mask.kept_tiles()[:, :, queries // mask.blocks[0]], mass, 0.0), axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Retained:
    """What the tiles of causal masks keep of the attention of B prompts, for each head, over chunks of queries; leaves [B, N]."""

    least: jax.Array
    """float32, the probability that the kept tiles hold of a query's dense softmax: the least over the queries measured."""
    total: jax.Array
    """float32, its sum."""
    queries: jax.Array
    """int32, how many were measured."""
    kept: jax.Array
    """int32, tiles."""
    tiles: jax.Array
    """int32, tiles of dense prefill."""
    every: int = dataclasses.field(metadata={"static": True})
    """Queries from one that is measured to the next."""

    @classmethod
    def nothing(cls, batch: int, num_heads: int, every: int) -> Retained:
        """Make that of no queries."""
        zeros = jnp.zeros((batch, num_heads), jnp.int32)
        return cls(jnp.ones(zeros.shape), jnp.zeros(zeros.shape), zeros, zeros, zeros, every)

    def after(self, q: jax.Array, k_pool: jax.Array, mask: PromptMask) -> Retained:
        """Add a chunk of queries [B, T, N, H] that are read under a mask. Raises ValueError for a mask that is not causal."""
        require(isinstance(mask, PromptMask) and mask.query_labels is None, "what is kept is measured of prompts that are read causally")
        batch, num_queries = q.shape[:2]
        k = prompt_rows(k_pool, batch, mask.num_keys)
        rows = jnp.arange(min(self.every, num_queries) - 1, num_queries, self.every, dtype=jnp.int32)
        inside = (mask.first_query + rows[None, :] < mask.lengths[:, None])[:, None, :]
        mass = retained_mass(q, k, mask, rows)
        first = mask.first_query + jnp.arange(0, num_queries, BLOCK, dtype=jnp.int32)[None, :]
        tiles = jnp.where(first < mask.lengths[:, None], first // BLOCK + 1, 0)
        kept = tiles[:, None] if mask.key_counts is None else jnp.where((tiles > 0)[:, None], mask.key_counts[..., 1], 0)
        return Retained(
            jnp.minimum(self.least, jnp.min(jnp.where(inside, mass, 1.0), axis=2)),
            self.total + jnp.sum(jnp.where(inside, mass, 0.0), axis=2),
            self.queries + jnp.sum(inside, axis=2, dtype=jnp.int32),
            self.kept + jnp.sum(kept, axis=2, dtype=jnp.int32),
            self.tiles + jnp.sum(tiles, axis=1, dtype=jnp.int32)[:, None],
            self.every,
        )
