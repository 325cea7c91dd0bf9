"""Sparse decode attention as a Pallas Mosaic-GPU kernel (Hopper and newer).

The formula, the bytes and the numerics are those of the Triton kernel (triton.py).

How: a program owns 8 kv heads and a split of one sequence's slots. The 8 heads of a row stand
next to each other in the pool, so one TMA copy moves a row: 2 KiB at H 128, where one head
alone would be 256 bytes and the copy engine would be the limit. In shared memory the (row, head)
pairs of a tile are the keys of an ordinary flash-attention step, and all query heads of the 8 kv
heads are its 64 queries (unused ones are garbage that is never stored); a mask keeps the pairs of
a query's own kv head. That wastes seven eighths of the matrix unit, which a decode step
leaves idle anyway, and in return single rows land in swizzled tiles: 8 rows are the
least that such a tile can be cut into. A warpgroup issues copies, a warpgroup computes.

Balance: the batch is split by `counts` as in triton.py, but by plain JAX, into a table with a row
for each program: Mosaic has no cumulative sum. The layers of a model share `slots` and `counts`, so
XLA makes the table once for all of them. The splits of a sequence are combined by the kernel of
triton.py.

The keys are on the wide side N of the product and not on M, so that the softmax of a query stays
inside a warp. The weights go through shared memory although wgmma would take them from registers:
the interpreter of JAX 0.11.2 would not.

Seen on JAX 0.10.2 and 0.11.2 (lowering), 0.11.2 (runs).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import LOG2_E, head_size_reason
from pallas_kernels.quantized import Quantized, Rows
from pallas_kernels.span_decode import triton
from pallas_kernels.span_decode.heuristics import MosaicConfig

KV_HEADS = 8  # of a program: swizzled tiles are cut at multiples of 8 rows
QUERIES = 64  # the fewest rows of a warpgroup's matrix product


def unsupported_reason(q: jax.Array, k_pool: Rows, interpret: bool) -> str | None:
    """Say why this kernel cannot run on such arrays; None when it can."""
    if interpret and not hasattr(plgpu, "InterpretGPUParams"):
        return f"JAX {jax.__version__} cannot interpret it, 0.11 can"
    if isinstance(k_pool, Quantized):
        return "int8 pools are only in triton"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype must be bfloat16 or float16, got {q.dtype}"
    if reason := head_size_reason(q.shape[2], (64, 128)):
        return reason
    if k_pool.shape[1] % KV_HEADS:
        return f"the number of kv heads must be a multiple of {KV_HEADS}, got {k_pool.shape[1]}"
    if (group := q.shape[1] // k_pool.shape[1]) > QUERIES // KV_HEADS:
        return f"at most {QUERIES // KV_HEADS} query heads per kv head, got {group}"
    return None


def mosaic_attention(q, k_pool, v_pool, slots, counts, *, scale: float, config: MosaicConfig, interpret: bool = False) -> jax.Array:
    """Run the kernel; arrays as in `span_decode_attention`, already checked."""
    batch, _, head_size = q.shape
    keys = config.tile_rows * KV_HEADS
    num_splits = triton.max_splits(batch, config.splits)
    counts = jnp.clip(counts, 0, slots.shape[1])
    split_table = _split_table(counts, slots.shape[1], config)

    def tiled(shape, dtype):
        transforms = (plgpu.TilingTransform((8, 128 // dtype.itemsize)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    kernel = plgpu.kernel(
        functools.partial(_kernel, scale=scale, config=config),
        out_type=triton.split_results(q, num_splits),
        grid=(k_pool.shape[1] // KV_HEADS, num_splits),
        grid_names=("head_block", "split"),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=(
            tiled((QUERIES, head_size), q.dtype),
            tiled((config.num_stages, keys, head_size), q.dtype),
            tiled((config.num_stages, keys, head_size), q.dtype),
            tiled((QUERIES, keys), q.dtype),
            tiled((QUERIES, head_size), jnp.dtype(jnp.float32)),
            plgpu.SMEM((QUERIES,), jnp.float32),
            plgpu.SMEM((QUERIES,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=config.tile_rows, num_barriers=config.num_stages),
            plgpu.Barrier(num_arrivals=config.tile_rows, num_barriers=config.num_stages),
            plgpu.Barrier(num_barriers=config.num_stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else False,  # type: ignore[attr-defined]  # JAX 0.11
    )
    out, *partial = kernel(q, k_pool, v_pool, slots, split_table)
    return triton.combine(out, None, partial, counts, slots.shape[1], config, interpret)[0]


def _split_table(counts: jax.Array, capacity: int, config: MosaicConfig) -> jax.Array:
    """Make int32 `[splits, 4]`: sequence, first and last + 1 of its slots, and how many splits it has, 0 for spare programs."""
    batch = counts.shape[0]
    _, _, splits = triton.split_sequences(counts, batch, capacity, config)
    split = jnp.arange(triton.max_splits(batch, config.splits), dtype=jnp.int32)
    ends = jnp.cumsum(splits)[:batch]
    b = jnp.sum(ends[None, :] <= split[:, None], axis=1, dtype=jnp.int32)
    spare, b = b == batch, jnp.minimum(b, batch - 1)
    start, stop = triton.rows_of_split(counts[b], splits[b], split - (ends - splits[:batch])[b])
    return jnp.stack([b, jnp.where(spare, 0, start), jnp.where(spare, 0, stop), jnp.where(spare, 0, splits[b])], axis=1)


def _kernel(
    q_ref,  # [B, N, H]
    k_ref,  # [P, K, H]
    v_ref,  # [P, K, H]
    slots_ref,  # int32 [B, A]
    split_table_ref,  # int32 [splits, 4]
    out_ref,  # [B, N, H]
    split_out_ref,  # float32 [splits, N, H]
    split_max_ref,  # float32 [splits, N]
    split_sum_ref,  # float32 [splits, N]
    q_smem,  # [64, H]
    k_smem,  # [stages, tile * 8, H]
    v_smem,  # [stages, tile * 8, H]
    weights_smem,  # [64, tile * 8]
    out_smem,  # float32 [64, H]
    max_smem,  # float32 [64]
    sum_smem,  # float32 [64]
    q_ready,
    k_ready,  # [stages]
    v_ready,  # [stages]
    consumed,  # [stages]
    *,
    scale: float,
    config: MosaicConfig,
):
    num_rows, num_kv_heads, head_size = k_ref.shape
    group = q_ref.shape[1] // num_kv_heads
    heads, keys, stages = KV_HEADS * group, config.tile_rows * KV_HEADS, config.num_stages
    split = jax.lax.axis_index("split")
    b, start, stop, num_splits = (split_table_ref[split, i] for i in range(4))
    first_head = jax.lax.axis_index("head_block") * heads
    first_kv_head = jax.lax.axis_index("head_block") * KV_HEADS
    num_tiles = jax.lax.div(stop - start + (config.tile_rows - 1), config.tile_rows)

    @pl.when(jax.lax.axis_index("warpgroup") == 1)
    def copy():
        plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(first_head, heads)], q_smem.at[pl.ds(0, heads)], q_ready)

        def tile_slots(tile):
            # Past the end the last named row is copied again, so nothing unnamed is ever touched.
            positions = [jnp.minimum(start + tile * config.tile_rows + i, stop - 1) for i in range(config.tile_rows)]
            return tuple(jnp.clip(slots_ref[b, jnp.maximum(position, 0)], 0, num_rows - 1) for position in positions)

        def copy_tile(tile, rows):
            stage = jax.lax.rem(tile, stages)
            next_rows = tile_slots(tile + 1)  # on their way while this tile's copies are issued

            @pl.when(tile >= stages)
            def wait_until_free():
                plgpu.barrier_wait(consumed.at[stage])

            for pool_ref, smem, ready in ((k_ref, k_smem, k_ready), (v_ref, v_smem, v_ready)):
                for i, row in enumerate(rows):
                    plgpu.copy_gmem_to_smem(
                        pool_ref.at[row, pl.ds(first_kv_head, KV_HEADS)], smem.at[stage, pl.ds(i * KV_HEADS, KV_HEADS)], ready.at[stage]
                    )
            return next_rows

        jax.lax.fori_loop(0, num_tiles, copy_tile, tile_slots(0))

    @pl.when(jax.lax.axis_index("warpgroup") == 0)
    def attend():
        plgpu.barrier_wait(q_ready)
        by_query = plgpu.Layout.WGMMA.reduce(1)
        query = plgpu.broadcasted_iota(jnp.int32, (QUERIES, keys), 0, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, (QUERIES, keys), 1, layout=plgpu.Layout.WGMMA)
        own_head = jax.lax.div(query, group) == jax.lax.rem(key, KV_HEADS)
        row = jax.lax.div(key, KV_HEADS)

        def step(tile, carry):
            running_max, running_sum, acc = carry
            stage = jax.lax.rem(tile, stages)
            plgpu.barrier_wait(k_ready.at[stage])

            def multiply_keys(scores_ref):
                plgpu.wgmma(scores_ref, q_smem, k_smem.at[stage].transpose((1, 0)))
                return scores_ref[...]

            scores = pl.run_scoped(multiply_keys, plgpu.ACC((QUERIES, keys), jnp.float32)) * (scale * LOG2_E)
            named = row < stop - start - tile * config.tile_rows
            scores = jnp.where(own_head & named, scores, -jnp.inf)
            new_max = jnp.maximum(running_max, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - jax.lax.broadcast_in_dim(new_max, scores.shape, [0]))
            decay = jnp.exp2(running_max - new_max)
            running_sum = running_sum * decay + jnp.sum(weights, axis=1)
            acc *= jax.lax.broadcast_in_dim(decay, acc.shape, [0])
            weights_smem[...] = weights.astype(q_ref.dtype)
            plgpu.commit_smem()
            plgpu.barrier_wait(v_ready.at[stage])

            def multiply_values(acc_ref):
                plgpu.wgmma(acc_ref, weights_smem, v_smem.at[stage])
                return acc_ref[...]

            acc += pl.run_scoped(multiply_values, plgpu.ACC((QUERIES, head_size), jnp.float32))
            plgpu.barrier_arrive(consumed.at[stage])
            return new_max, running_sum, acc

        init = (
            plgpu.layout_cast(jnp.full((QUERIES,), -jnp.inf, jnp.float32), by_query),
            plgpu.layout_cast(jnp.zeros((QUERIES,), jnp.float32), by_query),
            plgpu.layout_cast(jnp.zeros((QUERIES, head_size), jnp.float32), plgpu.Layout.WGMMA),
        )
        peak, total, acc = jax.lax.fori_loop(0, num_tiles, step, init)

        @pl.when(num_splits == 1)
        def finish():
            divisor = jnp.where(total > 0, total, 1.0)  # nothing named: 0 / 1
            q_smem[...] = (acc / jax.lax.broadcast_in_dim(divisor, acc.shape, [0])).astype(q_smem.dtype)  # read for good by now
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[pl.ds(0, heads)], out_ref.at[b, pl.ds(first_head, heads)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(num_splits > 1)
        def hand_over():
            out_smem[...] = acc
            max_smem[...] = peak
            sum_smem[...] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, heads)], split_out_ref.at[split, pl.ds(first_head, heads)])
            plgpu.copy_smem_to_gmem(max_smem.at[pl.ds(0, heads)], split_max_ref.at[split, pl.ds(first_head, heads)])
            plgpu.copy_smem_to_gmem(sum_smem.at[pl.ds(0, heads)], split_sum_ref.at[split, pl.ds(first_head, heads)])
            plgpu.wait_smem_to_gmem(0)
