"""Attention of causal prompts as a Pallas Mosaic-GPU kernel (Hopper and newer).

The formula and the numerics are those of the Triton kernel (triton.py); masks by labels are only there.

How: a program owns 128 queries of one head. Two warpgroups take 64 of them each and multiply with wgmma; a third issues the TMA
copies of key and value tiles into a ring of stages (FlashAttention-3, 2407.08608, section 3.1). The two multiply in turns: while
one has the matrix unit, the other computes its softmax. Both go through the same list of tiles, those first that the mask cuts.

Seen on JAX 0.10.2 and 0.11.2 (lowering), 0.11.2 (runs).
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import LOG2_E, head_size_reason
from pallas_kernels.prompt_attention.heuristics import MosaicConfig
from pallas_kernels.prompt_attention.mask import PromptMask
from pallas_kernels.tiles import causal_counts, until_end

WARPGROUP_QUERIES = 64  # rows of a warpgroup's matrix product
BLOCK_Q = 2 * WARPGROUP_QUERIES
TILING_ROWS = 8  # of the tiles that TMA copies are cut into
NO_MAX = -1e30  # of queries without keys so far: finite, so that differences are numbers


def unsupported_reason(q: jax.Array, k_pool: jax.Array, mask: PromptMask) -> str | None:
    """Say why this kernel cannot run on such arrays; None when it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype must be bfloat16 or float16, got {q.dtype}"
    if reason := head_size_reason(q.shape[3], (64, 128)):
        return reason
    if mask.query_labels is not None:
        return "masks by labels are only in triton"
    if k_pool.shape[0] % TILING_ROWS:
        return f"the number of pool rows must be a multiple of {TILING_ROWS}, got {k_pool.shape[0]}"
    if q.shape[1] % BLOCK_Q:
        return f"the number of queries must be a multiple of {BLOCK_Q}, got {q.shape[1]}"
    allowed = [(BLOCK_Q, 64), (BLOCK_Q, 128)]
    return None if mask.blocks is None or mask.blocks in allowed else f"tiles must be of {allowed}, got {mask.blocks}"


@functools.partial(jax.jit, static_argnames=("scale", "config"))
def mosaic_prompt_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    mask: PromptMask,
    *,
    scale: float,
    config: MosaicConfig,
    first_keys: jax.Array | None = None,
) -> Any:
    """Run the kernel; arrays as in `prompt_attention`, already checked.

    With `first_keys`, int32 [B, T], query t attends to keys from `first_keys[b, t]` on, of the tiles that the mask lists. Then the
    logarithms of the sums, float32 [B, N, T] in units of log 2, come beside the output: what gradients need.
    """
    batch, num_queries, num_heads, _ = q.shape
    tiles = [] if mask.key_tiles is None or mask.key_counts is None else [mask.key_tiles, mask.key_counts]
    firsts = [] if first_keys is None else [first_keys]
    outs = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32)]

    # With lists of their own heads read other keys: what runs at once shares them in the cache if it is of one head. A chunk of 16,384
    # queries at the end of 131,072 tokens took 20.8 ms with the heads within the tiles, 16.3 so, at 28% of the tiles (one H100; N 32, K 8).
    grid = [("prompt", batch), ("tile", num_queries // BLOCK_Q), ("head", num_heads)]
    grid = [grid[0], grid[2], grid[1]] if tiles and tiles[0].shape[1] > 1 else grid
    stages = config.num_stages
    return plgpu.kernel(
        functools.partial(_kernel, scale=scale, block_k=config.block_k, num_keys=mask.num_keys, inputs=(len(tiles), len(firsts))),
        out_type=outs if firsts else outs[0],
        grid=tuple(size for _, size in grid),
        grid_names=tuple(name for name, _ in grid),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=(
            smem_tiles(q, 2, WARPGROUP_QUERIES),
            smem_tiles(q, stages, config.block_k),
            smem_tiles(q, stages, config.block_k),
            plgpu.Barrier(num_arrivals=1 + len(firsts), num_barriers=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
            *([plgpu.SMEM((2, WARPGROUP_QUERIES), dtype) for dtype in (jnp.int32, jnp.float32)] if firsts else []),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k_pool, v_pool, mask.first_query.reshape(1), mask.lengths, *tiles, *firsts)


def smem_tiles(like, *shape):
    """Describe tiles of rows in shared memory as wgmma reads them, rows and dtype as of `like` `[B, T, N, H]`."""
    transforms = (plgpu.TilingTransform((TILING_ROWS, 128 // like.dtype.itemsize)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((*shape, like.shape[3]), like.dtype, transforms=transforms)


def load(ref, layout):
    """Load numbers from shared memory into registers of a layout, on each JAX: the function asked for an index until 0.11."""
    parameters = inspect.signature(plgpu.load).parameters.values()
    required = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD and each.default is each.empty]
    return plgpu.load(ref, *[()] * (len(required) - 1), layout=layout)


def _kernel(
    q_ref,  # [B, T, N, H]
    k_ref,  # [P, K, H]
    v_ref,  # [P, K, H]
    first_query_ref,  # int32 [1]
    lengths_ref,  # int32 [B]
    *refs,  # int32 lists [B, N or 1, query tiles, C], counts [B, N or 1, query tiles, 2], first keys [B, T]; the outputs; scratch
    scale: float,
    block_k: int,
    num_keys: int,
    inputs: tuple[int, int],  # lists and counts; first keys
):
    num_lists, packed = inputs
    first_keys_refs, rest = refs[num_lists : sum(inputs)], refs[sum(inputs) :]
    out_ref, lse_refs, scratch = rest[0], rest[1 : 1 + packed], rest[1 + packed :]
    q_smem, k_smem, v_smem, q_ready, k_ready, v_ready, k_free, v_free, turn, *numbers = scratch
    head_size, stages = q_ref.shape[3], k_smem.shape[0]
    b, head, warpgroup = (jax.lax.axis_index(name) for name in ("prompt", "head", "warpgroup"))
    # The last tiles of queries have the most keys: they begin first.
    tile = q_ref.shape[1] // BLOCK_Q - 1 - jax.lax.axis_index("tile")
    first = first_query_ref[0] + tile * BLOCK_Q
    if num_lists:
        tiles_ref, counts_ref = refs[:num_lists]
        at = b, head if tiles_ref.shape[1] > 1 else 0, tile
        partial, needed = counts_ref[*at, 0], counts_ref[*at, 1]
    else:
        partial, needed = causal_counts(first, BLOCK_Q, block_k)
    partial, needed = until_end(partial, needed, first, lengths_ref[b])

    def key_tile(index):
        return tiles_ref[*at, index] if num_lists else needed - 1 - index

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup == 2)
    def copy():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = jax.lax.div(head, q_ref.shape[2] // k_ref.shape[1])

        def copy_tile(index, _):
            stage = jax.lax.rem(index, stages)
            rows = pl.ds(b * num_keys + key_tile(index) * block_k, block_k)
            for pool_ref, smem, ready, free in ((k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)):

                @pl.when(index >= stages)
                def wait_until_free(free=free):
                    plgpu.barrier_wait(free.at[stage])

                plgpu.copy_gmem_to_smem(pool_ref.at[rows, kv_head], smem.at[stage], ready.at[stage])

        jax.lax.fori_loop(0, needed, copy_tile, None)

    @pl.when(warpgroup < 2)
    def attend():
        plgpu.set_max_registers(232, action="increase")
        own_q = q_smem.at[warpgroup]
        queries = pl.ds(tile * BLOCK_Q + warpgroup * WARPGROUP_QUERIES, WARPGROUP_QUERIES)
        plgpu.copy_gmem_to_smem(q_ref.at[b, queries, head], own_q, q_ready.at[warpgroup])
        first_keys, lse = (smem.at[warpgroup] for smem in numbers) if packed else (None, None)
        for ref in first_keys_refs:
            plgpu.copy_gmem_to_smem(ref.at[b, queries], first_keys, q_ready.at[warpgroup])
        plgpu.barrier_wait(q_ready.at[warpgroup])
        factor = scale * LOG2_E
        by_query = plgpu.Layout.WGMMA.reduce(1)
        own_first = first + warpgroup * WARPGROUP_QUERIES

        @pl.when(needed > 0)
        def wait_for_first():
            plgpu.barrier_wait(k_ready.at[0])

        pl.when(warpgroup == 1)(take_turns)

        def step(index, carry, masked):
            running_max, running_sum, acc = carry
            stage = jax.lax.rem(index, stages)

            def multiply_keys(scores_ref):
                plgpu.wgmma(scores_ref, own_q, k_smem.at[stage].transpose((1, 0)))
                take_turns()
                return scores_ref[...]

            scores = pl.run_scoped(multiply_keys, plgpu.ACC((WARPGROUP_QUERIES, block_k), jnp.float32))
            plgpu.barrier_arrive(k_free.at[stage])
            if masked:
                query, key = (plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
                allowed = query + own_first >= key + key_tile(index) * block_k
                if packed:
                    own = load(first_keys, by_query)
                    allowed &= key + key_tile(index) * block_k >= jax.lax.broadcast_in_dim(own, scores.shape, [0])
                scores = jnp.where(allowed, scores, -jnp.inf)
            new_max = jnp.maximum(running_max, jnp.max(scores, axis=1) * factor)
            decay = jnp.exp2(running_max - new_max)
            weights = jnp.exp2(scores * factor - jax.lax.broadcast_in_dim(new_max, scores.shape, [0]))
            acc *= jax.lax.broadcast_in_dim(decay, acc.shape, [0])
            running_sum = running_sum * decay + jnp.sum(weights, axis=1)
            # What follows must not move above the softmax: the other warpgroup has the matrix unit until then.
            acc, running_sum, new_max, rounded = jax.lax.optimization_barrier((acc, running_sum, new_max, weights.astype(q_ref.dtype)))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[stage])
            plgpu.barrier_wait(turn)

            def multiply_values(acc_ref):
                plgpu.wgmma(acc_ref, rounded, v_smem.at[stage])

                @pl.when(index + 1 < needed)
                def wait_for_next():
                    plgpu.barrier_wait(k_ready.at[jax.lax.rem(index + 1, stages)])

            acc = pl.run_state(multiply_values)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[stage])
            return new_max, running_sum, acc

        carry = (
            plgpu.layout_cast(jnp.full((WARPGROUP_QUERIES,), NO_MAX, jnp.float32), by_query),
            plgpu.layout_cast(jnp.zeros((WARPGROUP_QUERIES,), jnp.float32), by_query),
            plgpu.layout_cast(jnp.zeros((WARPGROUP_QUERIES, head_size), jnp.float32), plgpu.Layout.WGMMA),
        )
        carry = jax.lax.fori_loop(0, partial, functools.partial(step, masked=True), carry)
        top, total, acc = jax.lax.fori_loop(partial, needed, functools.partial(step, masked=False), carry)
        pl.when(warpgroup == 0)(take_turns)
        total = jnp.where(total > 0, total, 1.0)  # no key: 0 / 1
        own_q[...] = (acc / jax.lax.broadcast_in_dim(total, acc.shape, [0])).astype(q_ref.dtype)
        if packed:
            lse[...] = top + jnp.log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_q, out_ref.at[b, queries, head])
        for ref in lse_refs:
            plgpu.copy_smem_to_gmem(lse, ref.at[b, head, queries])
        plgpu.wait_smem_to_gmem(0)
