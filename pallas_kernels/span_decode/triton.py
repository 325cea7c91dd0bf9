"""Sparse decode attention as a Pallas kernel with the Triton lowering (Ampere and newer).

For query head `n` of sequence `b`, with kv head `k = n // G` and named rows `r_i = slots[b, i]`:

    out[b, n] = sum_i softmax_i(scale * q[b, n] . K[r_i, k]) V[r_i, k],   i < counts[b]

Why it exists: XLA gathers rows into a copy (each byte read, written, and read again, for all A
slots whatever `counts` says). Here every named row is read once, by the program that uses it, and
nothing else is: `expected_bytes()` in and out.

How: a program owns a kv head, or two neighbouring ones, and a run of one sequence's slots. It
gathers tiles of K and V rows through shared memory and keeps a running softmax in float32. The G
query heads of a kv head share the tile on the matrix unit, where they take up 16 rows, so K and V
are read once for all.

Balance (split-KV): the programs are assigned by `counts`, on the device. A sequence gets as many
programs as its share of the batch's slots, at least one, so a long sequence beside short ones is
spread over the machine. `counts` is read again by every program, which is cheaper than a kernel
that plans for them. The splits of a sequence are combined by a second kernel, by log-sum-exp; a
sequence of one split is finished by its only program.

Numerics: scores, softmax and sums in float32; the weights are rounded to the dtype of `q` for the
second product, as plain attention in that dtype does. float32 pools use IEEE products.
Int8 pools are widened to the dtype of `q` (which is exact), their scales multiply the scores and
the weights in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import LOG2_E, MULTIPROCESSORS, dot
from pallas_kernels.quantized import Quantized
from pallas_kernels.span_decode.heuristics import MosaicConfig, TritonConfig


def triton_attention(q, k_pool, v_pool, slots, counts, *, scale: float, config: TritonConfig, interpret: bool = False) -> jax.Array:
    """Run the kernels; arrays as in `span_decode_attention`, already checked."""
    scales = {}
    if isinstance(k_pool, Quantized) and isinstance(v_pool, Quantized):
        scales = {"k_scales": k_pool.scales, "v_scales": v_pool.scales}
        k_pool, v_pool = k_pool.values, v_pool.values
    arrays = {"q": q, "k_pool": k_pool, "v_pool": v_pool, "slots": slots, "counts": counts, **scales}
    return _attend(q, arrays, (), scale, 0.0, config, interpret)[0]


def triton_rotate_and_attend(
    qkv,
    cos,
    sin,
    own,
    k_pool,
    v_pool,
    slots,
    counts,
    norms,
    *,
    norm_eps: float,
    scale: float,
    config: TritonConfig,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the kernels; arrays as in `rotate_and_attend`, already checked."""
    batch, num_kv_heads, fused, head_size = qkv.shape
    out = jax.ShapeDtypeStruct((batch, num_kv_heads * (fused - 2), head_size), qkv.dtype)
    pools = {"k_pool": k_pool, "v_pool": v_pool}
    arrays = {"qkv": qkv.reshape(*qkv.shape[:3], 2, -1), "cos": cos, "sin": sin, "own": own, **pools, "slots": slots, "counts": counts}
    if norms is not None:
        arrays |= {name: norm.astype(qkv.dtype).reshape(2, -1) for name, norm in zip(("q_norm", "k_norm"), norms, strict=True)}
    return _attend(out, arrays, tuple(pools), scale, norm_eps, config, interpret)


def _attend(q, arrays: dict, written: tuple[str, ...], scale: float, norm_eps: float, config: TritonConfig, interpret: bool) -> tuple:
    """Launch the kernels on named arrays; returns the output, of the shape of `q`, and the arrays that are `written` in place."""
    (batch, _, _), (_, num_kv_heads, _) = q.shape, arrays["k_pool"].shape
    num_splits = max_splits(batch, config.splits)
    results = dict(zip(("out", "split_out", "split_max", "split_sum"), split_results(q, num_splits), strict=True))
    if num_splits == batch:
        results = {"out": results["out"]}
    num_partial = len(results) - 1
    results |= {name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in written}
    names = (*arrays, *results)
    outs = pl.pallas_call(
        functools.partial(_attend_kernel, names=names, scale=scale, norm_eps=norm_eps, config=config, interpret=interpret),
        grid=(num_kv_heads // config.kv_heads, num_splits),
        out_shape=tuple(results.values()),
        input_output_aliases={names.index(name): list(results).index(name) for name in written},
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="span_decode_attend",
    )(*arrays.values())
    out, partial, rest = outs[0], list(outs[1 : 1 + num_partial]), outs[1 + num_partial :]
    return combine(out, partial, arrays["counts"], arrays["slots"].shape[1], config, interpret), *rest


def split_results(q: jax.Array, num_splits: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Describe what an attending kernel returns: the output, and of each split the weighted sum, the maximum and the sum of weights."""
    of_head = jax.ShapeDtypeStruct((num_splits, q.shape[1]), jnp.float32)
    return jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((num_splits, *q.shape[1:]), jnp.float32), of_head, of_head


def combine(
    out: jax.Array, partial: list[jax.Array], counts: jax.Array, capacity: int, config: TritonConfig | MosaicConfig, interpret: bool
) -> jax.Array:
    """Fill in `out` the sequences that were split, from the partial results of their splits."""
    batch, num_heads, head_size = out.shape
    if max_splits(batch, config.splits) == batch:  # one split each: nothing to combine
        return out
    columns, read_splits = combine_tile(batch, num_heads, head_size)
    return pl.pallas_call(
        functools.partial(_combine_kernel, config=config, capacity=capacity, columns=columns, read_splits=read_splits),
        grid=(num_heads, batch, head_size // columns),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={0: 0},
        compiler_params=plt.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpret,
        name="span_decode_combine",
    )(out, *partial, counts)


def max_splits(batch: int, splits: int) -> int:
    """Bound the number of splits that `split_sequences` makes of a batch: sum(ceil(x_b)) < sum(x_b) + B; one each if `splits` is 0."""
    return batch * splits + batch - 1 if splits else batch


def group_rows(group: int) -> int:
    """Count the rows that a group of query heads takes up in matrix products: 16 are the fewest on the matrix unit."""
    return max(16, pl.next_power_of_2(group))


def combine_tile(batch: int, num_heads: int, head_size: int) -> tuple[int, int]:
    """Choose how many columns of a head a program of `_combine_kernel` owns, and how many splits it reads at once.

    With few sequences each has many splits, and narrow programs read them in one go; with many there
    are programs enough, and most find nothing to do.
    """
    columns = 32 if batch * num_heads < 2 * MULTIPROCESSORS else min(head_size, 128)
    return columns, 4096 // columns


def split_sequences(counts_ref, batch: int, capacity: int, config: TritonConfig | MosaicConfig):
    """Divide the slots of the batch into splits of about equal size.

    Returns how many slots a split may have, the sequences padded to a power of two, and how many splits
    each of them has: at least one, which may be empty. A sequence of mean length has `config.splits`.
    """
    sequences = jnp.arange(pl.next_power_of_2(batch), dtype=jnp.int32)
    counts = jnp.clip(counts_ref[jnp.minimum(sequences, batch - 1)], 0, capacity)
    counts = jnp.where(sequences < batch, counts, 0)
    split_rows = jnp.maximum(pl.cdiv(jnp.sum(counts), batch * config.splits), config.tile_rows)
    splits = jnp.where(sequences < batch, _num_splits(counts, split_rows), 0)
    return split_rows, sequences, splits


def _num_splits(count, split_rows):
    return jnp.maximum(pl.cdiv(count, split_rows), 1)


def rows_of_split(count, num_splits, index):
    """Find the first and last + 1 of the slots in split `index` of a sequence."""
    base, extra = count // num_splits, count % num_splits
    start = index * base + jnp.minimum(index, extra)
    return start, start + base + (index < extra).astype(jnp.int32)


def _attend_kernel(
    *refs,  # of the arrays that `names` says:
    # q [B, N, H], or qkv [B, K, G + 2, 2, H / 2] with cos, sin float32 [B, H / 2], own int32 [B] and maybe q_norm, k_norm [2, H / 2];
    # k_pool, v_pool [P, K, H], slots int32 [B, A], counts int32 [B] and, for int8 pools, k_scales, v_scales [P, K];
    # then the outputs: out [B, N, H]; where sequences are divided split_out [splits, N, H], split_max, split_sum [splits, N]; the pools
    names: tuple[str, ...],
    scale: float,
    norm_eps: float,
    config: TritonConfig,
    interpret: bool,
):
    ref_of = dict(zip(names, refs, strict=True))  # a pool that is written to is the output
    k_ref, v_ref, slots_ref, counts_ref, out_ref = (ref_of[name] for name in ("k_pool", "v_pool", "slots", "counts", "out"))
    batch, num_heads, head_size = out_ref.shape
    num_rows, num_kv_heads, _ = k_ref.shape
    group, capacity = num_heads // num_kv_heads, slots_ref.shape[1]
    divided = "split_out" in ref_of
    split = pl.program_id(1)
    kv_heads = [pl.program_id(0) * config.kv_heads + i for i in range(config.kv_heads)]

    b = split
    if divided:
        split_rows, _, splits = split_sequences(counts_ref, batch, capacity, config)
        ends = jnp.cumsum(splits)
        b = jnp.sum((ends <= split).astype(jnp.int32))

    @pl.when(b < batch)
    def attend():
        count = jnp.clip(counts_ref[b], 0, capacity)
        start, stop = jnp.int32(0), count
        if divided:
            num_splits = _num_splits(count, split_rows)
            index = split - jnp.max(jnp.where(ends <= split, ends, 0))  # of this split among those of its sequence
            start, stop = rows_of_split(count, num_splits, index)

        # The group fills up the matrix unit's rows with copies of its last head. They compute and
        # store what that head does, which saves masks where G is no power of two.
        head_of_group = jnp.minimum(jnp.arange(group_rows(group), dtype=jnp.int32), group - 1)
        heads = [kv_head * group + head_of_group for kv_head in kv_heads]

        def tile_slots(tile):
            # Past the end the last named row is read again, so nothing unnamed is ever touched.
            positions = start + tile * config.tile_rows + jnp.arange(config.tile_rows, dtype=jnp.int32)
            rows = slots_ref[b, jnp.maximum(jnp.minimum(positions, stop - 1), 0)]
            return jnp.clip(rows, 0, num_rows - 1)

        first_rows = tile_slots(0)
        if "q" in ref_of:
            queries = [ref_of["q"][b, own, :] for own in heads]  # [rows, H] each
        else:
            queries = [_rotate_and_write(ref_of, b, kv_head, head_of_group, norm_eps) for kv_head in kv_heads]
            if not interpret:  # which runs one program after the other, and knows no barrier
                plt.debug_barrier()  # the rows that were written are read below

        def step(tile, carry):
            # The ids are loaded a tile ahead: the compiler then treats the rows as plain loads and
            # keeps num_stages - 1 tiles of them in flight; of a chain of loads it keeps half as many.
            rows, states = carry
            next_rows = tile_slots(tile + 1)
            offsets = tile * config.tile_rows + jnp.arange(config.tile_rows, dtype=jnp.int32)
            named = start + offsets < stop
            return next_rows, tuple(attend_tile(*own, rows, named) for own in zip(kv_heads, queries, states, strict=True))

        def attend_tile(kv_head, q, state, rows, named):
            running_max, running_sum, acc = state
            keys = k_ref[rows, kv_head, :].astype(q.dtype)  # [tile, H]
            scores = dot(q, keys, ((1,), (1,))) * (scale * LOG2_E)  # [rows, tile]
            if "k_scales" in ref_of:
                scores *= ref_of["k_scales"][rows, kv_head][None, :]
            scores = jnp.where(named[None, :], scores, -jnp.inf)
            new_max = jnp.maximum(running_max, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - new_max[:, None])
            decay = jnp.exp2(running_max - new_max)
            running_sum = running_sum * decay + jnp.sum(weights, axis=1)
            if "v_scales" in ref_of:
                weights *= ref_of["v_scales"][rows, kv_head][None, :]
            values = v_ref[rows, kv_head, :].astype(q.dtype)  # [tile, H]
            return new_max, running_sum, acc * decay[:, None] + dot(weights.astype(q.dtype), values, ((1,), (0,)))

        nothing = (
            jnp.full(head_of_group.shape, -jnp.inf, jnp.float32),
            jnp.zeros(head_of_group.shape, jnp.float32),
            jnp.zeros((*head_of_group.shape, head_size), jnp.float32),
        )
        _, states = jax.lax.fori_loop(0, pl.cdiv(stop - start, config.tile_rows), step, (first_rows, (nothing,) * config.kv_heads))

        def finish():
            for own, (_, running_sum, acc) in zip(heads, states, strict=True):
                total = jnp.where(running_sum > 0, running_sum, 1.0)  # nothing named: 0 / 1
                out_ref[b, own, :] = (acc / total[:, None]).astype(out_ref.dtype)

        def hand_over():
            for own, (running_max, running_sum, acc) in zip(heads, states, strict=True):
                ref_of["split_out"][split, own, :] = acc
                ref_of["split_max"][split, own] = running_max
                ref_of["split_sum"][split, own] = running_sum

        if divided:
            pl.when(num_splits == 1)(finish)
            pl.when(num_splits > 1)(hand_over)
        else:
            finish()


def _rotate_and_write(ref_of: dict, b, kv_head, head_of_group, norm_eps: float):
    """Rotate the queries `[rows, H]` and the key of a kv head, and write key and value to their row of the pools.

    Programs of other splits of the sequence write the same bits there. The other half of a head comes by a second load, from the cache.
    """
    qkv_ref, k_ref, v_ref = ref_of["qkv"], ref_of["k_pool"], ref_of["v_pool"]
    group, half = qkv_ref.shape[2] - 2, qkv_ref.shape[4]
    halves = jnp.arange(2, dtype=jnp.int32)[None, :]
    cos = ref_of["cos"][b, :][None, None, :]
    sin = jnp.where(halves == 0, -1.0, 1.0)[:, :, None] * ref_of["sin"][b, :][None, None, :]

    def rotated(members, norm):  # [rows, 1] -> [rows, 2, H / 2]
        def read(halves):
            x = qkv_ref[b, kv_head, members, jnp.broadcast_to(halves, (members.shape[0], 2)), :]
            wide = x.astype(jnp.float32)
            if norm not in ref_of:
                return wide
            squares = jnp.sum(jnp.sum(jnp.square(wide), axis=2), axis=1)[:, None, None]
            normed = (wide * jax.lax.rsqrt(squares / (2 * half) + norm_eps)).astype(x.dtype)
            return (normed * ref_of[norm][halves, :]).astype(jnp.float32)

        return (read(halves) * cos + read(1 - halves) * sin).astype(qkv_ref.dtype).reshape(-1, 2 * half)

    own = ref_of["own"][b]
    key, value = rotated(jnp.full((1, 1), group, jnp.int32), "k_norm"), qkv_ref[b, kv_head, group + 1, :, :]

    @pl.when((own >= 0) & (own < k_ref.shape[0]))
    def write():
        k_ref[own, kv_head, :] = key.reshape(2 * half)
        v_ref[own, kv_head, :] = value.reshape(2 * half)

    return rotated(head_of_group[:, None], "q_norm")


def _combine_kernel(
    _,  # the output of _attend_kernel, which out_ref is
    split_out_ref,  # [splits, N, H]
    split_max_ref,  # [splits, N]
    split_sum_ref,  # [splits, N]
    counts_ref,  # int32 [B]
    out_ref,  # [B, N, H]
    *,
    config: TritonConfig | MosaicConfig,
    capacity: int,
    columns: int,
    read_splits: int,
):
    """Compute out = sum_i e^(m_i - m) acc_i / sum_i e^(m_i - m) l_i over the splits i of a sequence."""
    head, b = pl.program_id(0), pl.program_id(1)
    own = pl.ds(pl.program_id(2) * columns, columns)
    batch = out_ref.shape[0]
    split_rows, sequences, splits = split_sequences(counts_ref, batch, capacity, config)
    num_splits = _num_splits(jnp.clip(counts_ref[b], 0, capacity), split_rows)

    @pl.when(num_splits > 1)
    def combine():
        first = jnp.sum(jnp.where(sequences < b, splits, 0))

        def step(i, carry):
            running_max, running_sum, acc = carry
            index = i * read_splits + jnp.arange(read_splits, dtype=jnp.int32)
            rows = first + jnp.minimum(index, num_splits - 1)
            peaks = jnp.where(index < num_splits, split_max_ref[rows, head], -jnp.inf)
            new_max = jnp.maximum(running_max, jnp.max(peaks))
            weights, decay = jnp.exp2(peaks - new_max), jnp.exp2(running_max - new_max)
            acc = acc * decay + jnp.sum(weights[:, None] * split_out_ref[rows, head, own], axis=0)
            running_sum = running_sum * decay + jnp.sum(weights * split_sum_ref[rows, head])
            return new_max, running_sum, acc

        init = (jnp.float32(-jnp.inf), jnp.float32(0.0), jnp.zeros((columns,), jnp.float32))
        _, total, acc = jax.lax.fori_loop(0, pl.cdiv(num_splits, read_splits), step, init)
        out_ref[b, head, own] = (acc / total).astype(out_ref.dtype)
