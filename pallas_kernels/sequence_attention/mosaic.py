"""Attention under a mask of packed causal rows as Pallas Mosaic-GPU kernels (Hopper and newer), forward and backward.

The formulas and the numerics are those of the Triton kernels (triton.py); the mask is two positions, not bits.

How: a program owns 128 queries of one head, or 128 keys of one kv head. Two warpgroups take 64 of them each and multiply with wgmma;
a third issues the TMA copies of the other side's tiles into a ring of stages. The forward kernel is that of prompts
(`prompt_attention/mosaic.py`). The gradient of the queries goes through the list of its key tiles, that of keys and values through its
query tiles, all G query heads of each; both products of a tile that need no softmax are waited for at once.

Measured alone (JAX 0.11.2, bf16; 16 rows of 4,096 tokens, one sequence each, N 9, K 3, H 64), microseconds by stages, on one H100 and
one H200; Triton's kernels take 1,018 and 1,008 forward, 2,934 and 2,954 backward:

    stages                                           2      3      4             2      3      4
    forward                                        985    814      -           832    823  1,113
    gradient of the queries                        926    907      -         1,023    946    953
    gradients of keys and values, 128 queries    1,129      -      -         1,151  1,253  1,255
    with 64 queries in a tile                    1,299  1,335  1,369             -  1,607      -
    128, scores waited for apart                 1,362  1,345      -             -      -      -

Seen on JAX 0.10.2, 0.11.2 and 0.12.0.1 (lowering), 0.11.2 (runs).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import LOG2_E
from pallas_kernels.prompt_attention.heuristics import MosaicConfig
from pallas_kernels.prompt_attention.mask import PromptMask
from pallas_kernels.prompt_attention.mosaic import WARPGROUP_QUERIES, load, mosaic_prompt_attention, smem_tiles
from pallas_kernels.sequence_attention.mask import PACKED_BLOCK, PackedMask

ROWS = WARPGROUP_QUERIES  # of a warpgroup's matrix product
FORWARD_STAGES, QUERIES_STAGES, KEYS_STAGES = 3, 3, 2  # tiles in flight


@functools.partial(jax.jit, static_argnames=("scale",))
def forward(q, k, v, mask: PackedMask, *, scale: float) -> list[jax.Array]:
    """Run the forward kernel on q [B, T, N, H], k and v [B, T, K, H].

    Returns `out` [B, T, N, H] and `lse`, float32 [B, N, T], L in units of log 2.
    """
    batch, num_tokens, *heads = k.shape
    k_pool, v_pool = (x.reshape(batch * num_tokens, *heads) for x in (k, v))
    lists = mask.key_tiles[:, None], mask.key_counts[:, None]
    lengths = jnp.full(batch, num_tokens, jnp.int32)
    tiles = PromptMask(jnp.int32(0), lengths, None, None, *lists, num_tokens, 0, (PACKED_BLOCK, PACKED_BLOCK))
    config = MosaicConfig(PACKED_BLOCK, FORWARD_STAGES)
    return mosaic_prompt_attention(q, k_pool, v_pool, tiles, scale=scale, config=config, first_keys=mask.first_keys)


@functools.partial(jax.jit, static_argnames=("scale",))
def backward(q, k, v, mask: PackedMask, out, lse, grad, *, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the backward kernels: gradients of q, k and v from that of `out`; shapes as in `forward`."""
    dq, delta = _run(
        functools.partial(_queries_kernel, scale=scale),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, lse.dtype)),
        own_tiles=3,
        stages=QUERIES_STAGES,
        numbers=(2, ROWS),
        arrivals=(5, 2),
    )(q, k, v, mask.first_keys, mask.key_tiles, mask.key_counts, out, lse, grad)
    dk, dv = _run(
        functools.partial(_keys_kernel, scale=scale),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        own_tiles=2,
        stages=KEYS_STAGES,
        numbers=(KEYS_STAGES, PACKED_BLOCK),
        arrivals=(2, 5),
    )(q, k, v, mask.first_keys, mask.query_tiles, mask.query_counts, lse, delta, grad)
    return dq, dk, dv


def _run(kernel, out_type, *, own_tiles: int, stages: int, numbers: tuple[int, int], arrivals: tuple[int, int]):
    """Make a kernel of a gradient, whose first result has the side that programs own.

    In shared memory it has `own_tiles` of each warpgroup, two tiles of the other side a stage, and three arrays of shape `numbers`:
    log-sum-exp, D and first keys. `arrivals` are copies that a barrier waits for: of a warpgroup's own rows, and of a stage.
    """
    batch, num_tokens, num_heads, _ = out_type[0].shape
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(batch, num_tokens // PACKED_BLOCK, num_heads),
        grid_names=("row", "tile", "head"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=(
            *[smem_tiles(out_type[0], 2, ROWS)] * own_tiles,
            *[smem_tiles(out_type[0], stages, PACKED_BLOCK)] * 2,
            *[plgpu.SMEM(numbers, dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32)],
            plgpu.Barrier(num_barriers=2, num_arrivals=arrivals[0]),
            plgpu.Barrier(num_barriers=stages, num_arrivals=arrivals[1]),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _spread(numbers, shape, axis: int):
    return jax.lax.broadcast_in_dim(numbers, shape, [axis])


def _allowed(shape, first_key, first_query, first_keys, query_axis: int):
    """Compute the bool of a tile: queries at `first_query` on, on `query_axis`, keys at `first_key` on; `first_keys` of the queries."""
    query, key = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (query_axis, 1 - query_axis))
    key = key + first_key
    return (key <= query + first_query) & (key >= _spread(first_keys, shape, query_axis))


def _two_products(a, b, c, d):
    """Multiply a b^T and c d^T, and wait for both."""
    shape = a.shape[0], b.shape[0]

    def multiply(first, second):
        plgpu.wgmma(first, a, b.transpose((1, 0)))
        plgpu.wgmma(second, c, d.transpose((1, 0)))
        return first[...], second[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))


def _copy_tiles(copy_tile, needed, free, stages: int):
    """Copy tiles one after the other, each into the stage that it has, as soon as both warpgroups have left that."""
    plgpu.set_max_registers(40, action="decrease")

    def step(index, _):
        stage = jax.lax.rem(index, stages)

        @pl.when(index >= stages)
        def wait_until_free():
            plgpu.barrier_wait(free.at[stage])

        copy_tile(index, stage)

    jax.lax.fori_loop(0, needed, step, None)


def _queries_kernel(
    q_ref,  # [B, T, N, H]
    k_ref,  # [B, T, K, H]
    v_ref,  # [B, T, K, H]
    first_keys_ref,  # int32 [B, T]
    tiles_ref,  # int32 [B, query tiles, key tiles]
    counts_ref,  # int32 [B, query tiles, 2]
    forward_ref,  # [B, T, N, H], what the forward kernel gave
    lse_ref,  # float32 [B, N, T]
    grad_ref,  # [B, T, N, H]
    dq_ref,  # [B, T, N, H]
    delta_ref,  # float32 [B, N, T], D
    q_smem, grad_smem, out_smem, k_smem, v_smem, lse_smem, delta_smem, first_keys_smem, own_ready, ready, free,
    *,
    scale: float,
):  # fmt: skip
    stages, shape = k_smem.shape[0], (ROWS, PACKED_BLOCK)
    b, head, warpgroup = (jax.lax.axis_index(name) for name in ("row", "head", "warpgroup"))
    tile = tiles_ref.shape[1] - 1 - jax.lax.axis_index("tile")  # the last tiles of queries have the most keys: they begin first
    partial, needed = counts_ref[b, tile, 0], counts_ref[b, tile, 1]

    @pl.when(warpgroup == 2)
    def copy():
        kv_head = jax.lax.div(head, q_ref.shape[2] // k_ref.shape[2])

        def copy_tile(index, stage):
            rows = pl.ds(tiles_ref[b, tile, index] * PACKED_BLOCK, PACKED_BLOCK)
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, kv_head], k_smem.at[stage], ready.at[stage])
            plgpu.copy_gmem_to_smem(v_ref.at[b, rows, kv_head], v_smem.at[stage], ready.at[stage])

        _copy_tiles(copy_tile, needed, free, stages)

    @pl.when(warpgroup < 2)
    def add_up():
        plgpu.set_max_registers(232, action="increase")
        first = tile * PACKED_BLOCK + warpgroup * ROWS
        rows, own = pl.ds(first, ROWS), own_ready.at[warpgroup]
        q, grad, out = (smem.at[warpgroup] for smem in (q_smem, grad_smem, out_smem))
        for ref, smem in ((q_ref, q), (grad_ref, grad), (forward_ref, out)):
            plgpu.copy_gmem_to_smem(ref.at[b, rows, head], smem, own)
        plgpu.copy_gmem_to_smem(lse_ref.at[b, head, rows], lse_smem.at[warpgroup], own)
        plgpu.copy_gmem_to_smem(first_keys_ref.at[b, rows], first_keys_smem.at[warpgroup], own)
        plgpu.barrier_wait(own)
        by_query = plgpu.Layout.WGMMA.reduce(1)
        lse = load(lse_smem.at[warpgroup], by_query)
        delta = jnp.sum(jnp.multiply(*(load(smem, plgpu.Layout.WGMMA).astype(jnp.float32) for smem in (grad, out))), axis=1)
        delta_smem.at[warpgroup][...] = delta

        def step(index, dq, masked):
            stage = jax.lax.rem(index, stages)
            plgpu.barrier_wait(ready.at[stage])
            scores, dweights = _two_products(q, k_smem.at[stage], grad, v_smem.at[stage])
            weights = jnp.exp2(scores * (scale * LOG2_E) - _spread(lse, shape, 0))
            if masked:
                first_keys = load(first_keys_smem.at[warpgroup], by_query)
                allowed = _allowed(shape, tiles_ref[b, tile, index] * PACKED_BLOCK, first, first_keys, query_axis=0)
                weights = jnp.where(allowed, weights, 0.0)
            dscores = (weights * (dweights - _spread(delta, shape, 0))).astype(q_ref.dtype)
            dq = pl.run_state(lambda acc: plgpu.wgmma(acc, dscores, k_smem.at[stage]))(plgpu.ACC.init(dq))
            plgpu.barrier_arrive(free.at[stage])
            return dq

        dq = plgpu.layout_cast(jnp.zeros(q.shape, jnp.float32), plgpu.Layout.WGMMA)
        dq = jax.lax.fori_loop(0, partial, functools.partial(step, masked=True), dq)
        dq = jax.lax.fori_loop(partial, needed, functools.partial(step, masked=False), dq)
        out[...] = (dq * scale).astype(q_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, dq_ref.at[b, rows, head])
        plgpu.copy_smem_to_gmem(delta_smem.at[warpgroup], delta_ref.at[b, head, rows])
        plgpu.wait_smem_to_gmem(0)


def _keys_kernel(
    q_ref,  # [B, T, N, H]
    k_ref,  # [B, T, K, H]
    v_ref,  # [B, T, K, H]
    first_keys_ref,  # int32 [B, T]
    tiles_ref,  # int32 [B, key tiles, query tiles]
    counts_ref,  # int32 [B, key tiles, 2]
    lse_ref,  # float32 [B, N, T]
    delta_ref,  # float32 [B, N, T]
    grad_ref,  # [B, T, N, H]
    dk_ref,  # [B, T, K, H]
    dv_ref,  # [B, T, K, H]
    k_smem, v_smem, q_smem, grad_smem, lse_smem, delta_smem, first_keys_smem, own_ready, ready, free,
    *,
    scale: float,
):  # fmt: skip
    stages, shape, group = q_smem.shape[0], (ROWS, PACKED_BLOCK), q_ref.shape[2] // k_ref.shape[2]
    b, kv_head, tile, warpgroup = (jax.lax.axis_index(name) for name in ("row", "head", "tile", "warpgroup"))
    partial, needed = counts_ref[b, tile, 0] * group, counts_ref[b, tile, 1] * group

    @pl.when(warpgroup == 2)
    def copy():
        def copy_tile(index, stage):
            head = kv_head * group + jax.lax.rem(index, group)
            rows = pl.ds(tiles_ref[b, tile, jax.lax.div(index, group)] * PACKED_BLOCK, PACKED_BLOCK)
            for ref, smem in ((q_ref.at[b, rows, head], q_smem), (grad_ref.at[b, rows, head], grad_smem)):
                plgpu.copy_gmem_to_smem(ref, smem.at[stage], ready.at[stage])
            for ref, smem in ((lse_ref.at[b, head, rows], lse_smem), (delta_ref.at[b, head, rows], delta_smem)):
                plgpu.copy_gmem_to_smem(ref, smem.at[stage], ready.at[stage])
            plgpu.copy_gmem_to_smem(first_keys_ref.at[b, rows], first_keys_smem.at[stage], ready.at[stage])

        _copy_tiles(copy_tile, needed, free, stages)

    @pl.when(warpgroup < 2)
    def add_up():
        plgpu.set_max_registers(232, action="increase")
        first = tile * PACKED_BLOCK + warpgroup * ROWS
        rows, own = pl.ds(first, ROWS), own_ready.at[warpgroup]
        k, v = k_smem.at[warpgroup], v_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_ref.at[b, rows, kv_head], k, own)
        plgpu.copy_gmem_to_smem(v_ref.at[b, rows, kv_head], v, own)
        plgpu.barrier_wait(own)
        by_query = plgpu.Layout.WGMMA.reduce(0)

        def step(index, carry, masked):
            stage = jax.lax.rem(index, stages)
            plgpu.barrier_wait(ready.at[stage])
            scores, dweights = _two_products(k, q_smem.at[stage], v, grad_smem.at[stage])
            weights = jnp.exp2(scores * (scale * LOG2_E) - _spread(load(lse_smem.at[stage], by_query), shape, 1))
            if masked:
                first_query = tiles_ref[b, tile, jax.lax.div(index, group)] * PACKED_BLOCK
                allowed = _allowed(shape, first, first_query, load(first_keys_smem.at[stage], by_query), query_axis=1)
                weights = jnp.where(allowed, weights, 0.0)
            dscores = weights * (dweights - _spread(load(delta_smem.at[stage], by_query), shape, 1))
            weights, dscores = weights.astype(q_ref.dtype), dscores.astype(q_ref.dtype)

            def add(accs):
                plgpu.wgmma(accs[1], weights, grad_smem.at[stage])
                plgpu.wgmma(accs[0], dscores, q_smem.at[stage])

            carry = pl.run_state(add)(tuple(map(plgpu.ACC.init, carry)))
            plgpu.barrier_arrive(free.at[stage])
            return carry

        zeros = plgpu.layout_cast(jnp.zeros(k.shape, jnp.float32), plgpu.Layout.WGMMA)
        carry = jax.lax.fori_loop(0, partial, functools.partial(step, masked=True), (zeros, zeros))
        dk, dv = jax.lax.fori_loop(partial, needed, functools.partial(step, masked=False), carry)
        k[...], v[...] = (dk * scale).astype(k_ref.dtype), dv.astype(v_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k, dk_ref.at[b, rows, kv_head])
        plgpu.copy_smem_to_gmem(v, dv_ref.at[b, rows, kv_head])
        plgpu.wait_smem_to_gmem(0)
