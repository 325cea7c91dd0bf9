"""Products of many rows as a Pallas Mosaic-GPU kernel (Hopper and newer).

The formula is that of the Triton kernel (triton.py), which is for few rows.

Why it exists: XLA writes gate and up outputs of many rows to memory, and reads them again to multiply them: 4 F numbers of a row beside
the F that are wanted. Here gate, bias and residual are computed before the sums leave the registers.

How: a program is persistent and owns every so-many-th tile of rows and outputs. One warpgroup issues the TMA copies of the inputs of
a tile, 64 at a time, into a ring of stages, and runs ahead over the ends of tiles. Two warpgroups multiply with wgmma, 64 rows each
(or the same 64 rows with different outputs, where there are few). Two halves of an accumulator are the gate and the up outputs. A
residual comes by TMA into the buffers from which the results leave. What a tile has beyond the last row or output is read as zero and
not written.

Numerics: rows are normalised beforehand, by XLA, rounded as Llama does; sums, bias, gate and residual are float32, and the result is
rounded once.

Seen on JAX 0.10.2 (lowering), 0.11.2 (ran, with a norm that was taken out since), 0.12.0 (lowering, interpreter).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import LOG2_E, MULTIPROCESSORS
from pallas_kernels.linear.heuristics import MosaicConfig

WARPGROUP_ROWS = 64  # of a warpgroup's matrix product
STEP_INPUTS = 64  # that a stage holds: 128 bytes, as wide as a swizzled tile
TILING_ROWS = 8  # of the tiles that TMA copies are cut into
LINE_BYTES = 128


def mosaic_linear(x, weight, bias, residual, *, gated: bool, out_dtype: jnp.dtype, config: MosaicConfig) -> jax.Array:
    """Run the kernel; arrays as in `fused_linear`, `x` `[B, D]`, normalised, already checked."""
    num_rows = x.shape[0]
    num_results = weight.shape[0] // 2 if gated else weight.shape[0]
    optional = {
        "bias": None if bias is None else bias.astype(jnp.float32),
        "residual": None if residual is None else _whole_tiles(residual.astype(out_dtype)),
    }
    optional = {name: array for name, array in optional.items() if array is not None}
    x = _whole_tiles(x)
    output_groups = 2 // config.row_groups
    stages, results = config.num_stages, config.outputs // 2 if gated else config.outputs
    line = min(results, LINE_BYTES // out_dtype.itemsize)  # outputs that leave at once
    slots = results // line if residual is not None else min(2, results // line)

    def tiled(dtype, *shape):
        swizzle = min(LINE_BYTES, shape[-1] * dtype.itemsize)
        transforms = (plgpu.TilingTransform((TILING_ROWS, swizzle // dtype.itemsize)), plgpu.SwizzleTransform(swizzle))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    out = plgpu.kernel(
        functools.partial(_kernel, optional=tuple(optional), gated=gated, config=config),
        out_type=jax.ShapeDtypeStruct((x.shape[0], num_results), out_dtype),
        grid=(MULTIPROCESSORS,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=(
            tiled(x.dtype, stages, config.row_groups * WARPGROUP_ROWS, STEP_INPUTS),
            tiled(x.dtype, stages, output_groups, config.outputs, STEP_INPUTS),
            tiled(out_dtype, 2, slots, WARPGROUP_ROWS, line),
            *([] if bias is None else [plgpu.SMEM((2, config.outputs), jnp.float32)]),
            plgpu.Barrier(num_arrivals=1 + output_groups * (2 if gated else 1), num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=2 * slots),
            plgpu.Barrier(num_arrivals=2 if gated else 1, num_barriers=2),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, weight, *optional.values())
    return out[:num_rows]


def _whole_tiles(rows: jax.Array) -> jax.Array:
    """Append rows of zeros so that TMA can cut the array into tiles, at least one warpgroup's."""
    missing = max(-rows.shape[0] % TILING_ROWS, WARPGROUP_ROWS - rows.shape[0])
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _kernel(
    x_ref,  # [B, D]
    weight_ref,  # [M, D], M = 2 F if gated
    *refs,  # those of bias [M] and residual [B, M or F] that `optional` names; the output [B, M or F]; scratch
    optional: tuple[str, ...],
    gated: bool,
    config: MosaicConfig,
):
    ref_of = dict(zip(optional, refs))
    out_ref, x_smem, weight_smem, out_smem, *bias_smem, ready, free, residual_ready, bias_ready = refs[len(optional) :]
    num_rows, num_inputs = x_ref.shape
    num_results = out_ref.shape[1]
    stages, output_groups, _, _ = weight_smem.shape
    _, slots, _, line = out_smem.shape
    halves = 2 if gated else 1
    results = config.outputs // halves  # of a warpgroup
    block_rows, block_results = config.row_groups * WARPGROUP_ROWS, output_groups * results
    row_tiles, result_tiles, steps = pl.cdiv(num_rows, block_rows), pl.cdiv(num_results, block_results), num_inputs // STEP_INPUTS
    program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")
    own_tiles = jax.lax.div(jnp.maximum(row_tiles * result_tiles - program + (MULTIPROCESSORS - 1), 0), MULTIPROCESSORS)

    def origin(tile):
        """The first row and the first output of a tile: all rows of a band, then the next outputs."""
        index = program + tile * MULTIPROCESSORS
        band, within = jax.lax.div(index, config.band_tiles * result_tiles), jax.lax.rem(index, config.band_tiles * result_tiles)
        rows = jnp.minimum(config.band_tiles, row_tiles - band * config.band_tiles)
        row_tile = band * config.band_tiles + jax.lax.rem(within, rows)
        return row_tile * block_rows, jax.lax.div(within, rows) * block_results

    @pl.when(warpgroup == 2)
    def copy():
        plgpu.set_max_registers(40, action="decrease")

        def copy_step(index, _):
            row, result = origin(jax.lax.div(index, steps))
            stage, inputs = jax.lax.rem(index, stages), pl.ds(jax.lax.rem(index, steps) * STEP_INPUTS, STEP_INPUTS)

            @pl.when(index >= stages)
            def wait_until_free():
                plgpu.barrier_wait(free.at[stage])

            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, block_rows), inputs], x_smem.at[stage], ready.at[stage])
            for group in range(output_groups):
                for half in range(halves):
                    weights = weight_ref.at[pl.ds(half * num_results + result + group * results, results), inputs]
                    own = weight_smem.at[stage, group, pl.ds(half * results, results)]
                    plgpu.copy_gmem_to_smem(weights, own, ready.at[stage])

        jax.lax.fori_loop(0, own_tiles * steps, copy_step, None)

    @pl.when(warpgroup < 2)
    def multiply():
        plgpu.set_max_registers(232, action="increase")
        row_group, output_group = (warpgroup, 0) if config.row_groups == 2 else (0, warpgroup)
        own_rows = pl.ds(row_group * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def compute_tile(tile, _):
            row, result = origin(tile)
            rows = pl.ds(row + row_group * WARPGROUP_ROWS, WARPGROUP_ROWS)
            result += output_group * results

            def columns(index):
                return pl.ds(result + index * line, line)

            if "bias" in ref_of:
                for half in range(halves):
                    own, bias = pl.ds(half * results, results), ref_of["bias"].at[pl.ds(half * num_results + result, results)]
                    plgpu.copy_gmem_to_smem(bias, bias_smem[0].at[warpgroup, own], bias_ready.at[warpgroup])

            def accumulate(acc_ref):
                def step(k, _):
                    index = tile * steps + k
                    stage = jax.lax.rem(index, stages)
                    plgpu.barrier_wait(ready.at[stage])
                    plgpu.wgmma(acc_ref, x_smem.at[stage, own_rows], weight_smem.at[stage, output_group].transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # the one before this has read its stage

                    @pl.when(k > 0)
                    def release():
                        plgpu.barrier_arrive(free.at[jax.lax.rem(index - 1, stages)])

                    if "residual" in ref_of:

                        @pl.when(k == 0)
                        def fetch_residual():
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            for slot in range(slots):
                                residual, own = ref_of["residual"].at[rows, columns(slot)], warpgroup * slots + slot
                                plgpu.copy_gmem_to_smem(residual, out_smem.at[warpgroup, slot], residual_ready.at[own])

                jax.lax.fori_loop(0, steps, step, None)
                return acc_ref[...]

            sums = pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, config.outputs), jnp.float32))
            plgpu.barrier_arrive(free.at[jax.lax.rem(tile * steps + (steps - 1), stages)])

            def product(half, index):
                """A line of the product: of its gate or plain outputs, or of its up outputs."""
                first = half * results + index * line
                out = sums[:, first : first + line]
                if "bias" in ref_of:
                    bias = plgpu.layout_cast(bias_smem[0][warpgroup, pl.ds(first, line)], plgpu.Layout.WGMMA.reduce(0))
                    out += jax.lax.broadcast_in_dim(bias, out.shape, [1])
                return out

            if "bias" in ref_of:
                plgpu.barrier_wait(bias_ready.at[warpgroup])
            for index in range(results // line):
                slot = index % slots
                out = product(0, index)
                if gated:
                    root = jax.lax.rsqrt(1.0 + jnp.exp2(out * -LOG2_E))  # its square is the sigmoid: a division is slower
                    out *= root * root * product(1, index)
                if "residual" in ref_of:
                    plgpu.barrier_wait(residual_ready.at[warpgroup * slots + slot])
                    out += out_smem[warpgroup, slot].astype(jnp.float32)
                else:
                    plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                out_smem[warpgroup, slot] = out.astype(out_ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, slot], out_ref.at[rows, columns(index)])

        jax.lax.fori_loop(0, own_tiles, compute_tile, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
