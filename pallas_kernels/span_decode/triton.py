"""Sparse decode attention as a Pallas kernel with the Triton lowering (Ampere and newer).

For query head `n` of sequence `b`, with kv head `k = n // G` and named rows `r_i = slots[b, i]`:

    out[b, n] = sum_i softmax_i(scale * q[b, n] . K[r_i, k]) V[r_i, k],   i < counts[b]

Why it exists: XLA gathers rows into a copy (each byte read, written, and read again, for all A
slots whatever `counts` says). Here every named row is read once, by the program that uses it, and
nothing else is: `expected_bytes()` in and out.

How: a program owns a kv head, or some neighbouring ones, and a run of one sequence's slots. It
gathers tiles of K and V rows through shared memory and keeps a running softmax in float32. The G
query heads of a kv head share the tile on the matrix unit, where they take up 16 rows, so K and V
are read once for all. Several kv heads stand next to each other in a row of the pool: each query has
zeros beside its own head, and of the sums that of its own head is kept, which fills up the 16 rows.

Balance (split-KV): the programs are assigned by `counts`, on the device. A sequence gets as many
programs as its share of the batch's slots, at least one, so a long sequence beside short ones is
spread over the machine. `counts` is read again by every program, which is cheaper than a kernel
that plans for them. The splits of a sequence are combined by a second kernel, by log-sum-exp; a
sequence of one split is finished by its only program. One or two sequences are divided into a fixed number of parts
instead, tile by tile in turns, which the output map combines as it reads them (`SplitRows`): a launch less. Many sequences have
`MAX_DIVIDED` programs each, which only those with more than `most_rows` share; no program looks at the others' `counts`.

Rows in host memory, where there are some (`HostRows`), are read in a second pass over the slots: of the tiles of the first what lies
on the device, of those of the second the rest, over the link. A sequence that has none there makes one pass.

Numerics: scores, softmax and sums in float32; the weights are rounded to the dtype of `q` for the
second product, as plain attention in that dtype does. float32 pools use IEEE products.
Int8 pools are widened to the dtype of `q` (which is exact), their scales multiply the scores and
the weights in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.common import LOG2_E, MULTIPROCESSORS, dot, launch_next
from pallas_kernels.copy_rows.triton import BESIDE_PROGRAMS, copy_share, flat_operands
from pallas_kernels.linear.reference import SplitRows
from pallas_kernels.quantized import Quantized
from pallas_kernels.span_decode.heuristics import MosaicConfig, TritonConfig

MAX_DIVIDED = 4  # parts of a sequence that has more than `most_rows`
SECTOR_BYTES = 32  # that the L2 cache fetches at once
COPIES = ("copy_k_host", "copy_v_host", "copy_k", "copy_v", "copy_sources", "copy_targets", "copy_counts", "copy_share")


def triton_attention(q, k_pool, v_pool, slots, counts, *, scale: float, config: TritonConfig, interpret: bool = False) -> jax.Array:
    """Run the kernels; arrays as in `span_decode_attention`, already checked."""
    scales = {}
    if isinstance(k_pool, Quantized) and isinstance(v_pool, Quantized):
        scales = {"k_scales": k_pool.scales, "v_scales": v_pool.scales}
        k_pool, v_pool = k_pool.values, v_pool.values
    k_pool, v_pool = (pool.reshape(pool.shape[0], -1) for pool in (k_pool, v_pool))
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
    ahead=(),
    host=None,
    copies=None,
    *,
    norm_eps: float,
    scale: float,
    config: TritonConfig,
    partial: bool = False,
    early: bool = False,
    interpret: bool = False,
) -> tuple[Any, jax.Array, jax.Array]:
    """Run the kernels; arrays as in `rotate_and_attend`, already checked."""
    batch, num_kv_heads, fused, head_size = qkv.shape
    out = jax.ShapeDtypeStruct((batch, num_kv_heads * (fused - 2), head_size), qkv.dtype)
    pools = {"k_pool": k_pool.reshape(k_pool.shape[0], -1), "v_pool": v_pool.reshape(v_pool.shape[0], -1)}
    arrays = {"qkv": qkv.reshape(*qkv.shape[:3], 2, -1), "cos": cos, "sin": sin, "own": own, **pools, "slots": slots, "counts": counts}
    if norms is not None:
        arrays |= {name: norm.astype(qkv.dtype).reshape(2, -1) for name, norm in zip(("q_norm", "k_norm"), norms, strict=True)}
    if host is not None:
        rows = [jax.device_put(pool, jax.memory.Space.Device) if interpret else pool for pool in host[:2]]
        arrays |= {name: pool.reshape(pool.shape[0], -1) for name, pool in zip(("k_host", "v_host"), rows, strict=True)}
        arrays["host_counts"] = host.counts
    if config.ahead:
        sectors = [array.reshape(-1, SECTOR_BYTES // array.dtype.itemsize) for array in ahead]
        arrays |= {f"ahead_{i}": array for i, array in enumerate(sectors)}
    written = tuple(pools)
    if copies is not None:
        arrays |= dict(zip(COPIES, flat_operands(copies, interpret), strict=True))
        written += COPIES[2:4]
    out, k_after, v_after, *copied = _attend(out, arrays, written, scale, norm_eps, config, interpret, early, partial)
    pools_after = k_after.reshape(k_pool.shape), v_after.reshape(v_pool.shape)
    return out, *pools_after, *(() if copies is None else (tuple(x.reshape(pool.shape) for x, pool in zip(copied, copies.pools)),))


def _attend(
    q,
    arrays: dict,
    written: tuple[str, ...],
    scale: float,
    norm_eps: float,
    config: TritonConfig,
    interpret: bool,
    early: bool = False,
    partial: bool = False,
) -> tuple:
    """Launch the kernels on named arrays; returns the output, of the shape of `q`, and the arrays that are `written` in place.

    Where it is divided into parts, or `partial`, the output is `SplitRows`.
    """
    batch, num_kv_heads = q.shape[0], arrays["k_pool"].shape[1] // q.shape[2]
    num_splits = batch * (config.parts or MAX_DIVIDED * bool(config.most_rows)) or max_splits(batch, config.splits)
    results = dict(zip(("out", "split_out", "split_max", "split_sum"), split_results(q, num_splits), strict=True))
    if config.parts:
        shapes = ((*q.shape, q.dtype), (*q.shape[:2], jnp.float32))
        results = {name: jax.ShapeDtypeStruct((config.parts, *shape), dtype) for name, (*shape, dtype) in zip(("parts", "lse"), shapes)}
    else:
        results = {"out": results["out"]} if num_splits == batch else results
        results |= {"lse": jax.ShapeDtypeStruct((1, *q.shape[:2]), jnp.float32)} if partial else {}
    num_partial = len(results) - 1
    results |= {name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in written}
    names, heads = (*arrays, *results), num_kv_heads // config.kv_heads
    others = (config.ahead if "ahead_0" in arrays else 0) + (pl.cdiv(BESIDE_PROGRAMS, heads) if COPIES[0] in arrays else 0)
    outs = pl.pallas_call(
        functools.partial(_attend_kernel, names=names, scale=scale, norm_eps=norm_eps, config=config, early=early, interpret=interpret),
        grid=(heads, num_splits + others),
        out_shape=tuple(results.values()),
        input_output_aliases={names.index(name): list(results).index(name) for name in written},
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="span_decode_attend",
    )(*arrays.values())
    out, of_splits, rest = outs[0], list(outs[1 : 1 + num_partial]), outs[1 + num_partial :]
    lse = of_splits.pop() if config.parts or partial else None
    if not config.parts:
        out, lse = combine(out, lse, of_splits, arrays["counts"], arrays["slots"].shape[1], config, interpret)
    if lse is None:
        return out, *rest
    return SplitRows(out.reshape(*lse.shape[:2], -1), lse), *rest


def split_results(q: jax.Array, num_splits: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Describe what an attending kernel returns: the output, and of each split the weighted sum, the maximum and the sum of weights."""
    of_head = jax.ShapeDtypeStruct((num_splits, q.shape[1]), jnp.float32)
    return jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((num_splits, *q.shape[1:]), jnp.float32), of_head, of_head


def combine(
    out: jax.Array,
    lse: jax.Array | None,
    of_splits: list[jax.Array],
    counts: jax.Array,
    capacity: int,
    config: TritonConfig | MosaicConfig,
    interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Fill in `out`, and `lse` [1, B, N] where it is wanted, the sequences that were split, from the results of their splits."""
    batch, num_heads, head_size = out.shape
    most_rows = config.most_rows if isinstance(config, TritonConfig) else 0
    if not most_rows and max_splits(batch, config.splits) == batch:  # one split each: nothing to combine
        return out, lse
    columns, read_splits = combine_tile(batch, num_heads, head_size)
    read_splits = min(read_splits, MAX_DIVIDED) if most_rows else read_splits
    filled = [out] if lse is None else [out, lse]
    out, *logs = pl.pallas_call(
        functools.partial(_combine_kernel, config=config, capacity=capacity, columns=columns, read_splits=read_splits, most_rows=most_rows),
        grid=(num_heads, batch, head_size // columns),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in filled),
        input_output_aliases={i: i for i in range(len(filled))},
        compiler_params=plt.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpret,
        name="span_decode_combine",
    )(*filled, *of_splits, counts)
    return out, logs[0] if logs else None


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


def _num_divided(count, most_rows: int):
    return jnp.minimum(_num_splits(count, most_rows), MAX_DIVIDED)


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
    # k_pool, v_pool [P, K H], slots int32 [B, A], counts int32 [B] and, for int8 pools, k_scales, v_scales [P, K];
    # for rows in host memory k_host, v_host [P', K H] and host_counts int32 [B]; for copies those of `COPIES`;
    # then the outputs: out [B, N, H]; where sequences are divided split_out [splits, N, H], split_max, split_sum [splits, N]; the pools.
    # Or, in place of out, parts [S, B, N, H] and lse float32 [S, B, N]. Beside out lse is [1, B, N], where it is wanted.
    names: tuple[str, ...],
    scale: float,
    norm_eps: float,
    config: TritonConfig,
    early: bool,
    interpret: bool,
):
    given, ref_of = dict(zip(names[::-1], refs[::-1], strict=True)), dict(zip(names, refs, strict=True))  # what is written to: the output
    k_ref, slots_ref, counts_ref = (ref_of[name] for name in ("k_pool", "slots", "counts"))
    out_ref = ref_of["lse" if config.parts else "out"]
    batch, num_heads, head_size = ref_of["parts" if config.parts else "out"].shape[-3:]
    num_rows, width = k_ref.shape
    group, capacity = num_heads // (width // head_size), slots_ref.shape[1]
    divided, has_host = "split_out" in ref_of, "k_host" in ref_of
    head_program, split = launch_next(pl.program_id(0)) if early else pl.program_id(0), pl.program_id(1)
    if COPIES[0] in ref_of:  # before all others, so that they begin first
        first = pl.cdiv(BESIDE_PROGRAMS, num_heads // group // config.kv_heads)

        @pl.when(split < first)
        def copy():
            own = split * pl.num_programs(0) + head_program
            copy_share([given[name] for name in COPIES], [ref_of[name] for name in COPIES[2:4]], own, first * pl.num_programs(0))

        split -= first

    # The heads fill up the matrix unit's rows with copies of the last one. They compute and store what
    # that head does, which saves masks where their number is no power of two.
    first_kv_head = head_program * config.kv_heads
    member = jnp.minimum(jnp.arange(group_rows(config.kv_heads * group), dtype=jnp.int32), config.kv_heads * group - 1)
    kv_head = jax.lax.div(member, jnp.full_like(member, group))  # of these
    heads = first_kv_head * group + member
    columns = pl.ds(first_kv_head * head_size, config.kv_heads * head_size)

    def blocks(x):  # [rows, H or kv heads H] -> [rows, kv heads, H], zero where the kv head is not that of the row
        x = x.reshape(x.shape[0], -1, head_size)
        mine = kv_head[:, None, None] == jnp.arange(config.kv_heads, dtype=jnp.int32)[None, :, None]
        return jnp.where(mine, x, jnp.zeros((1, 1, 1), x.dtype))

    b = split
    if config.parts:
        b, part = jax.lax.div(split, config.parts), jax.lax.rem(split, config.parts)
    elif config.most_rows:
        b, part = jax.lax.div(split, MAX_DIVIDED), jax.lax.rem(split, MAX_DIVIDED)
        num_divided = _num_divided(jnp.clip(counts_ref[jnp.clip(b, 0, batch - 1)], 0, capacity), config.most_rows)
        b = jnp.where(part < num_divided, b, batch)  # nothing to do
    elif divided:
        split_rows, _, splits = split_sequences(counts_ref, batch, capacity, config)
        ends = jnp.cumsum(splits)
        b = jnp.sum((ends <= split).astype(jnp.int32))

    if "ahead_0" in ref_of:
        own_programs = pl.num_programs(1) - config.ahead - (first if COPIES[0] in ref_of else 0)

        @pl.when(split >= own_programs)
        def fetch():
            number = config.ahead * (num_heads // group // config.kv_heads)
            index = head_program * config.ahead + split - own_programs
            read = []
            for ref in (ref for name, ref in ref_of.items() if name.startswith("ahead_")):
                share = pl.cdiv(ref.shape[0], number)
                sectors = index * share + jnp.arange(pl.next_power_of_2(share), dtype=jnp.int32)
                read.append(ref[jnp.minimum(sectors, ref.shape[0] - 1), 0])
            total = functools.reduce(jnp.add, [jnp.sum(each.astype(jnp.float32)) for each in read])

            @pl.when(total != total)  # of what holds NaN, as results then do anyway; without a use the compiler drops the reads
            def keep():
                out_ref[0, 0, 0] = total.astype(out_ref.dtype)

    @pl.when((split >= 0) & (b < batch) if COPIES[0] in ref_of else b < batch)
    def attend():
        count = jnp.clip(counts_ref[b], 0, capacity)
        start, stop, stride = jnp.int32(0), count, config.tile_rows
        if config.parts:  # in turns, so that the first slots need not wait for `counts`
            start, stride = part * config.tile_rows, config.parts * config.tile_rows
        elif config.most_rows:
            num_splits = num_divided
            start, stop = rows_of_split(count, num_splits, part)
        elif divided:
            num_splits = _num_splits(count, split_rows)
            index = split - jnp.max(jnp.where(ends <= split, ends, 0))  # of this split among those of its sequence
            start, stop = rows_of_split(count, num_splits, index)
        first_row = slots_ref[b, jnp.minimum(start, capacity - 1)]

        def positions_of(tile):
            return start + tile * stride + jnp.arange(config.tile_rows, dtype=jnp.int32)

        def tile_slots(tile):
            # Slots are read whatever `counts` says, so that they need not wait for it. Past the end stands
            # the first named row again, so that nothing unnamed is ever touched.
            positions = positions_of(tile)
            rows = jnp.where(positions < stop, slots_ref[b, jnp.minimum(positions, capacity - 1)], first_row)
            return rows if has_host else jnp.clip(rows, 0, num_rows - 1)

        first_rows = tile_slots(0)
        if "q" in ref_of:
            queries = ref_of["q"][b, heads, :]  # [rows, H]
        else:
            queries = _rotate_and_write(ref_of, b, first_kv_head, kv_head, member, columns, norm_eps)
            if not interpret:  # which runs one program after the other, and knows no barrier
                plt.debug_barrier()  # the rows that were written are read below
        if config.kv_heads > 1:
            queries = blocks(queries).reshape(queries.shape[0], -1)

        def of_heads(ref, rows):  # scales [rows, tile] of the rows' kv heads
            return ref[jnp.broadcast_to(rows[None, :], (member.size, rows.size)), (first_kv_head + kv_head)[:, None]]

        def read(name, place, rows, named):
            """Read the rows of a tile; where some lie in host memory, those that `place` has, zeros for the others."""
            if not has_host:
                return ref_of[f"{name}_pool"][rows, columns].astype(queries.dtype)
            ref = ref_of[f"{name}_{place}"]
            at = jnp.clip(rows if place == "pool" else -1 - rows, 0, ref.shape[0] - 1)
            mask = jnp.broadcast_to(named[:, None], (config.tile_rows, columns.size))
            each = columns.start + jnp.arange(columns.size, dtype=jnp.int32)[None, :]
            return plt.load(ref.at[at[:, None], each], mask=mask, other=0)

        def step(tile, carry, place="pool"):
            # The ids are loaded a tile ahead: the compiler then treats the rows as plain loads and
            # keeps num_stages - 1 tiles of them in flight; of a chain of loads it keeps half as many.
            rows, running_max, running_sum, acc = carry
            next_rows = tile_slots(tile + 1)
            named = positions_of(tile) < stop
            if has_host:
                named &= (rows >= 0) == (place == "pool")
            keys = read("k", place, rows, named)  # [tile, kv heads H]
            scores = dot(queries, keys, ((1,), (1,))) * (scale * LOG2_E)  # [rows, tile]
            if "k_scales" in ref_of:
                scores *= of_heads(ref_of["k_scales"], rows)
            scores = jnp.where(named[None, :], scores, -jnp.inf)
            new_max = jnp.maximum(running_max, jnp.max(scores, axis=1))
            base = jnp.where(new_max > -jnp.inf, new_max, 0.0) if has_host else new_max  # a tile may have no row that is in its place
            weights = jnp.exp2(scores - base[:, None])
            decay = jnp.exp2(running_max - base)
            running_sum = running_sum * decay + jnp.sum(weights, axis=1)
            if "v_scales" in ref_of:
                weights *= of_heads(ref_of["v_scales"], rows)
            values = read("v", place, rows, named)  # [tile, kv heads H]
            acc = acc * decay[:, None] + dot(weights.astype(queries.dtype), values, ((1,), (0,)))
            return next_rows, new_max, running_sum, acc

        nothing = jnp.full(member.shape, -jnp.inf, jnp.float32), jnp.zeros(member.shape, jnp.float32)
        acc = jnp.zeros((member.size, config.kv_heads * head_size), jnp.float32)
        num_tiles = pl.cdiv(stop - start, stride)
        carry = jax.lax.fori_loop(0, num_tiles, step, (first_rows, *nothing, acc))
        if has_host:
            num_tiles = jnp.where(ref_of["host_counts"][b] > 0, num_tiles, 0)
            carry = jax.lax.fori_loop(0, num_tiles, functools.partial(step, place="host"), (first_rows, *carry[1:]))
        _, running_max, running_sum, acc = carry
        if config.kv_heads > 1:
            acc = jnp.sum(blocks(acc), axis=1)

        total = jnp.where(running_sum > 0, running_sum, 1.0)  # nothing named: 0 / 1

        def finish():
            ref_of["out"][b, heads, :] = (acc / total[:, None]).astype(queries.dtype)
            if "lse" in ref_of:
                ref_of["lse"][0, b, heads] = running_max + jnp.log2(total)

        def hand_over():
            ref_of["split_out"][split, heads, :] = acc
            ref_of["split_max"][split, heads] = running_max
            ref_of["split_sum"][split, heads] = running_sum

        if config.parts:
            ref_of["parts"][part, b, heads, :] = (acc / total[:, None]).astype(queries.dtype)
            ref_of["lse"][part, b, heads] = running_max + jnp.log2(total)
        elif divided:
            pl.when(num_splits == 1)(finish)
            pl.when(num_splits > 1)(hand_over)
        else:
            finish()


def _rotate_and_write(ref_of: dict, b, first_kv_head, kv_head, member, columns, norm_eps: float):
    """Rotate the queries `[rows, H]` and the keys of a program's kv heads, and write keys and values to their row of the pools.

    Programs of other splits of the sequence write the same bits there. The other half of a head comes by a second load, from the cache.
    All loads come first, so that they are waited for once.
    """
    qkv_ref, k_ref, v_ref = ref_of["qkv"], ref_of["k_pool"], ref_of["v_pool"]
    group, half = qkv_ref.shape[2] - 2, qkv_ref.shape[4]
    own = ref_of["own"][b]
    halves = jnp.arange(2, dtype=jnp.int32)[None, :]
    cos = ref_of["cos"][b, :][None, None, :]
    sin = jnp.where(halves == 0, -1.0, 1.0)[:, :, None] * ref_of["sin"][b, :][None, None, :]
    of_kv_heads = first_kv_head + jnp.arange(columns.size // (2 * half), dtype=jnp.int32)[:, None]

    def load(kv_heads, members, halves):  # [rows, 1] -> [rows, 2, H / 2]
        shape = (kv_heads.shape[0], 2)
        return qkv_ref[b, jnp.broadcast_to(kv_heads, shape), jnp.broadcast_to(members, shape), jnp.broadcast_to(halves, shape), :]

    def load_both(kv_heads, members, norm):
        scales = [ref_of[norm][each, :] for each in (halves, 1 - halves)] if norm in ref_of else [None, None]
        return [(load(kv_heads, members, each), scale) for each, scale in zip((halves, 1 - halves), scales, strict=True)]

    def rotate(both):
        straight, swapped = (x.astype(jnp.float32) for x, _ in both)
        if both[0][1] is not None:
            squares = jnp.sum(jnp.sum(jnp.square(straight), axis=2), axis=1)[:, None, None]
            factor = jax.lax.rsqrt(squares / (2 * half) + norm_eps)
            straight, swapped = (
                ((x * factor).astype(scale.dtype) * scale).astype(jnp.float32) for (_, scale), x in zip(both, (straight, swapped))
            )
        return (straight * cos + swapped * sin).astype(qkv_ref.dtype).reshape(-1, 2 * half)

    key = load_both(of_kv_heads, jnp.full_like(of_kv_heads, group), "k_norm")
    value = load(of_kv_heads, jnp.full_like(of_kv_heads, group + 1), halves)
    queries = load_both((first_kv_head + kv_head)[:, None], jax.lax.rem(member, jnp.full_like(member, group))[:, None], "q_norm")
    key = rotate(key)

    @pl.when((own >= 0) & (own < k_ref.shape[0]))
    def write():
        k_ref[own, columns] = key.reshape(-1)
        v_ref[own, columns] = value.reshape(-1)

    return rotate(queries)


def _combine_kernel(
    *refs,  # out [B, N, H] and maybe lse [1, B, N] of _attend_kernel, split_out [splits, N, H], split_max and split_sum [splits, N],
    # counts int32 [B]; then the outputs, which are out and lse
    config: TritonConfig | MosaicConfig,
    capacity: int,
    columns: int,
    read_splits: int,
    most_rows: int,
):
    """Compute out = sum_i e^(m_i - m) acc_i / sum_i e^(m_i - m) l_i over the splits i of a sequence."""
    split_out_ref, split_max_ref, split_sum_ref, counts_ref, out_ref, *lse_refs = refs[(len(refs) - 4) // 2 :]
    head, b = pl.program_id(0), pl.program_id(1)
    own = pl.ds(pl.program_id(2) * columns, columns)
    batch = out_ref.shape[0]
    count = jnp.clip(counts_ref[b], 0, capacity)
    if most_rows:
        first, num_splits = b * MAX_DIVIDED, _num_divided(count, most_rows)
    else:
        split_rows, sequences, splits = split_sequences(counts_ref, batch, capacity, config)
        first, num_splits = jnp.sum(jnp.where(sequences < b, splits, 0)), _num_splits(count, split_rows)

    @pl.when(num_splits > 1)
    def combine():
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
        peak, total, acc = jax.lax.fori_loop(0, pl.cdiv(num_splits, read_splits), step, init)
        out_ref[b, head, own] = (acc / total).astype(out_ref.dtype)
        for lse_ref in lse_refs:  # the programs of other columns write the same
            lse_ref[0, b, head] = peak + jnp.log2(total)
