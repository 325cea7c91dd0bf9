"""The kernels of triton.py written in Triton's own language, called through jax-triton.

The way on if Pallas drops its Triton lowering. Same formula, same splits, same settings, but one
kv head to a program; float pools only. Needs the package jax-triton 0.3.1, which needs the CUDA plugin of JAX.
"""

import jax
import jax_triton
import triton
import triton.language as tl

from pallas_kernels.common import LOG2_E
from pallas_kernels.span_decode.heuristics import TritonConfig
from pallas_kernels.span_decode.triton import combine_tile, group_rows, max_splits, split_results


def jax_triton_attention(q, k_pool, v_pool, slots, counts, *, scale: float, config: TritonConfig) -> jax.Array:
    """Run the kernels; arrays as in `span_decode_attention`, already checked."""
    batch, num_heads, head_size = q.shape
    num_rows, num_kv_heads, _ = k_pool.shape
    num_splits = max_splits(batch, config.splits)
    sizes = {
        "batch": batch,
        "padded_batch": triton.next_power_of_2(batch),
        "capacity": slots.shape[1],
        "num_heads": num_heads,
        "head_size": head_size,
        "tile_rows": config.tile_rows,
        "splits": config.splits,
    }
    out, *partial = jax_triton.triton_call(
        *(q, k_pool, v_pool, slots, counts),
        kernel=attend_kernel,
        out_shape=split_results(q, num_splits),
        grid=(num_kv_heads, num_splits),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        num_rows=num_rows,
        num_kv_heads=num_kv_heads,
        group_rows=group_rows(num_heads // num_kv_heads),
        scale=scale * LOG2_E,
        **sizes,
    )
    if num_splits == batch:  # one split each: nothing to combine
        return out
    columns, read_splits = combine_tile(batch, num_heads, head_size)
    return jax_triton.triton_call(
        *(out, *partial, counts),
        kernel=combine_kernel,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_heads, batch, head_size // columns),
        num_warps=2,
        num_stages=1,
        input_output_aliases={0: 0},
        own_columns=columns,
        read_splits=read_splits,
        **sizes,
    )


@triton.jit
def num_splits_of(count, split_rows):
    return tl.maximum(tl.cdiv(count, split_rows), 1)


@triton.jit
def split_sequences(counts_ptr, batch, padded_batch: tl.constexpr, capacity, tile_rows, mean_splits):
    sequences = tl.arange(0, padded_batch)
    counts = tl.load(counts_ptr + sequences, mask=sequences < batch, other=0)
    counts = tl.minimum(tl.maximum(counts, 0), capacity)
    split_rows = tl.maximum(tl.cdiv(tl.sum(counts), batch * mean_splits), tile_rows)
    splits_of = tl.where(sequences < batch, num_splits_of(counts, split_rows), 0)
    return split_rows, sequences, splits_of


@triton.jit
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    counts_ptr,
    out_ptr,
    split_out_ptr,
    split_max_ptr,
    split_sum_ptr,
    batch: tl.constexpr,
    padded_batch: tl.constexpr,
    capacity: tl.constexpr,
    num_rows: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_size: tl.constexpr,
    group_rows: tl.constexpr,
    tile_rows: tl.constexpr,
    splits: tl.constexpr,
    scale: tl.constexpr,
):
    kv_head, split = tl.program_id(0), tl.program_id(1)
    split_rows, sequences, splits_of = split_sequences(counts_ptr, batch, padded_batch, capacity, tile_rows, splits)
    b = tl.sum((tl.cumsum(splits_of) <= split).to(tl.int32))
    if b < batch:
        count = tl.minimum(tl.maximum(tl.load(counts_ptr + b), 0), capacity)
        num_splits = num_splits_of(count, split_rows)
        index = split - tl.sum(tl.where(sequences < b, splits_of, 0))
        base, extra = count // num_splits, count % num_splits
        start = index * base + tl.minimum(index, extra)
        stop = start + base + (index < extra).to(tl.int32)

        group: tl.constexpr = num_heads // num_kv_heads
        head_of_group = tl.arange(0, group_rows)
        heads = kv_head * group + head_of_group
        in_group = head_of_group < group
        columns = tl.arange(0, head_size)
        out_offsets = heads[:, None] * head_size + columns[None, :]
        q = tl.load(q_ptr + b * num_heads * head_size + out_offsets, mask=in_group[:, None], other=0.0)
        running_max = tl.full([group_rows], float("-inf"), tl.float32)
        running_sum = tl.zeros([group_rows], tl.float32)
        acc = tl.zeros([group_rows, head_size], tl.float32)

        slots_ptr += b.to(tl.int64) * capacity
        row_columns = kv_head * head_size + columns[None, :]
        rows = tl.load(slots_ptr + tl.maximum(tl.minimum(start + tl.arange(0, tile_rows), stop - 1), 0))
        for tile in range(0, tl.cdiv(stop - start, tile_rows)):
            positions = start + tile * tile_rows + tl.arange(0, tile_rows)
            next_rows = tl.load(slots_ptr + tl.maximum(tl.minimum(positions + tile_rows, stop - 1), 0))
            rows = tl.minimum(tl.maximum(rows, 0), num_rows - 1).to(tl.int64)
            offsets = rows[:, None] * (num_kv_heads * head_size) + row_columns
            keys = tl.load(k_ptr + offsets)
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
            scores = tl.where(positions[None, :] < stop, scores, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_max[:, None])
            decay = tl.exp2(running_max - new_max)
            running_sum = running_sum * decay + tl.sum(weights, axis=1)
            values = tl.load(v_ptr + offsets)
            acc = acc * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            running_max = new_max
            rows = next_rows

        if num_splits == 1:
            total = tl.where(running_sum > 0, running_sum, 1.0)
            out = (acc / total[:, None]).to(q.dtype)
            tl.store(out_ptr + b * num_heads * head_size + out_offsets, out, mask=in_group[:, None])
        else:
            tl.store(split_out_ptr + split * num_heads * head_size + out_offsets, acc, mask=in_group[:, None])
            tl.store(split_max_ptr + split * num_heads + heads, running_max, mask=in_group)
            tl.store(split_sum_ptr + split * num_heads + heads, running_sum, mask=in_group)


@triton.jit
def combine_kernel(
    _,
    split_out_ptr,
    split_max_ptr,
    split_sum_ptr,
    counts_ptr,
    out_ptr,
    batch: tl.constexpr,
    padded_batch: tl.constexpr,
    capacity: tl.constexpr,
    num_heads: tl.constexpr,
    head_size: tl.constexpr,
    tile_rows: tl.constexpr,
    splits: tl.constexpr,
    own_columns: tl.constexpr,
    read_splits: tl.constexpr,
):
    head, b = tl.program_id(0), tl.program_id(1)
    split_rows, sequences, splits_of = split_sequences(counts_ptr, batch, padded_batch, capacity, tile_rows, splits)
    count = tl.minimum(tl.maximum(tl.load(counts_ptr + b), 0), capacity)
    num_splits = num_splits_of(count, split_rows)
    if num_splits > 1:
        first = tl.sum(tl.where(sequences < b, splits_of, 0))
        columns = tl.program_id(2) * own_columns + tl.arange(0, own_columns)
        running_max = tl.full([1], float("-inf"), tl.float32)
        running_sum = tl.zeros([1], tl.float32)
        acc = tl.zeros([own_columns], tl.float32)
        for i in range(0, tl.cdiv(num_splits, read_splits)):
            index = i * read_splits + tl.arange(0, read_splits)
            valid = index < num_splits
            rows = (first + index) * num_heads + head
            peaks = tl.load(split_max_ptr + rows, mask=valid, other=float("-inf"))
            new_max = tl.maximum(running_max, tl.max(peaks, axis=0))
            weights, decay = tl.exp2(peaks - new_max), tl.exp2(running_max - new_max)
            outs = tl.load(split_out_ptr + rows[:, None] * head_size + columns[None, :], mask=valid[:, None], other=0.0)
            sums = tl.load(split_sum_ptr + rows, mask=valid, other=0.0)
            acc = acc * decay + tl.sum(weights[:, None] * outs, axis=0)
            running_sum = running_sum * decay + tl.sum(weights * sums, axis=0)
            running_max = new_max
        out = (acc / running_sum).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (b * num_heads + head) * head_size + columns, out)
