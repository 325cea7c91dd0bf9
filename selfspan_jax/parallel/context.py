"""Rows of a sequence divided over the devices of the mesh axis `context`, as one device sees them.

Of C devices the one with index c has the rows of the tokens t with t % C == c. So each has its share of any run of tokens, to one row:
of the whole context, which dense attention reads, and of each piece that a span names. Functions are called within `shard_map`; where no
mesh is, or C is 1, they return what they are given.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import ELSEWHERE

MIN_PART_TOKENS = 128  # of a chunk of prompts: a tile of queries in the fastest kernels


def context_size() -> int:
    """Return C, the number of devices that share the rows of each sequence."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


def part_of(chunk_tokens: int) -> tuple[int | Array, int]:
    """Return where this device's part of a chunk of prompts begins, and its size: all of it, where parts were smaller than kernels take."""
    size = context_size()
    if size == 1 or chunk_tokens % (size * MIN_PART_TOKENS):
        return 0, chunk_tokens
    return jax.lax.axis_index("context") * (chunk_tokens // size), chunk_tokens // size


def share(num_tokens: int) -> int:
    """Return the largest number of rows that a device has of so many tokens in a row."""
    return -(-num_tokens // context_size())


def num_own(num_tokens: Any) -> Any:
    """Return how many of a sequence's first `num_tokens` tokens this device has the rows of."""
    size = context_size()
    return num_tokens if size == 1 else (num_tokens - jax.lax.axis_index("context") + size - 1) // size


def own_sizes(num_tokens: Any, *capacities: int) -> tuple[Any, ...]:
    """Return `num_own` of so many tokens, and the `share` of each capacity."""
    return num_own(num_tokens), *map(share, capacities)


def take_own(x: Array) -> Array:
    """Take what [B, A, ...] has of this device's tokens: [B, share(A), ...]."""
    size = context_size()
    if size == 1:
        return x
    rest = x.shape[2:]
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0) for _ in rest)))
    return jax.lax.dynamic_index_in_dim(x.reshape(len(x), -1, size, *rest), jax.lax.axis_index("context"), axis=2, keepdims=False)


def spread(table: Int[Array, "B S"], capacity: int) -> Int[Array, "B A"]:
    """Make a table of all tokens from that of this device's: the inverse of `take_own`; other tokens are `ELSEWHERE`."""
    if (size := context_size()) == 1:
        return table
    token = jnp.arange(capacity, dtype=jnp.int32)
    return jnp.where(token % size == jax.lax.axis_index("context"), table[:, token // size], ELSEWHERE)


def list_own(rows: Int[Array, "B A"], counts: Int[Array, "B"]) -> tuple[Int[Array, "B A"], Int[Array, "B"]]:
    """Move those of the first `counts[b]` rows that this device has to the beginning, in their order; return them and their number."""
    if context_size() == 1:
        return rows, counts
    here = (jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1) < counts[:, None]) & (rows != ELSEWHERE)
    return jnp.take_along_axis(rows, jnp.argsort(~here, axis=1, stable=True), axis=1), jnp.sum(here, axis=1, dtype=jnp.int32)
