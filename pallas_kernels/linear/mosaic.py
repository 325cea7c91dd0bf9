"""Linear maps of many rows as a Pallas Mosaic-GPU kernel (Hopper and newer).

    out = x W^T + residual          or, gated,          out = silu(x W_gate^T) * (x W_up^T)

Why it exists: XLA writes gate and up outputs of many rows to memory and reads them again to multiply them, 4 F numbers of a row beside
the F that are wanted; a residual that is needed elsewhere too gets a pass of its own. Here both are computed before the sums leave
the registers. Training, whose gradient needs gate and up, has them written on the way.

How: a program is persistent and owns every so-many-th tile of rows and outputs. One warpgroup issues the TMA copies of the inputs of
a tile, 64 at a time, into a ring of stages, and runs ahead over the ends of tiles. Two warpgroups multiply with wgmma, 64 rows each.
Two halves of an accumulator are the gate and the up outputs. A residual comes by TMA into the buffers from which the results leave.
What a tile has beyond the last row is read as zero and not written.

Numerics: sums, gate and residual are float32, and the result is rounded once.

Seen on JAX 0.10.2 (lowering), 0.11.2 (runs), 0.12.0 (lowering, interpreter).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import LOG2_E, MULTIPROCESSORS
from pallas_kernels.linear.heuristics import MosaicConfig, mosaic_slots

WARPGROUP_ROWS = 64  # of a warpgroup's matrix product
BLOCK_ROWS = 2 * WARPGROUP_ROWS
STEP_INPUTS = 64  # that a stage holds: 128 bytes, as wide as a swizzled tile
TILING_ROWS = 8  # of the tiles that TMA copies are cut into
LINE = 64  # results that leave at once: 128 bytes


def unsupported_reason(x: jax.Array, weight: jax.Array, gated: bool) -> str | None:
    """Say why the kernel cannot run on rows `[B, D]` and a weight `[M, D]`, M = 2 F if gated; None when it can."""
    if not x.dtype == weight.dtype == jnp.bfloat16:  # float16 was not run
        return f"rows and weight must both be bfloat16, got {x.dtype} and {weight.dtype}"
    (num_outputs, num_inputs), num_rows = weight.shape, x.shape[0]
    if num_inputs % STEP_INPUTS or num_outputs % (2 * LINE if gated else LINE):
        return f"inputs and results must be multiples of {LINE}, got {num_inputs} and {num_outputs // (2 if gated else 1)}"
    return None if num_rows % TILING_ROWS == 0 and num_rows >= BLOCK_ROWS else f"rows must be a multiple of 8 from 128, got {num_rows}"


@functools.partial(jax.jit, static_argnames=("gated", "config", "keep_products"))
def mosaic_linear(x, weight, residual=None, *, gated: bool, config: MosaicConfig, keep_products: bool = False):
    """Run the kernel on normalised rows `[B, D]`, a weight `[M, D]` (gated: all gates, then all ups) and, not gated, a residual `[B, M]`.

    Returns the result, `[B, M]` or `[B, F]`; with `keep_products` the products `[B, 2 F]` before the gate too.
    """
    num_rows, residuals = x.shape[0], [] if residual is None else [residual]
    num_results = weight.shape[0] // 2 if gated else weight.shape[0]
    stages, line, slots = config.num_stages, LINE, mosaic_slots(config, residual is not None)

    def tiled(*shape):
        transforms = (plgpu.TilingTransform((TILING_ROWS, shape[-1])), plgpu.SwizzleTransform(shape[-1] * x.dtype.itemsize))
        return plgpu.SMEM(shape, x.dtype, transforms=transforms)

    widths = [num_results, *([2 * num_results] if keep_products else [])]
    body = functools.partial(fused_linear_kernel, added=bool(residuals), gated=gated, config=config)
    out = plgpu.kernel(
        functools.update_wrapper(body, fused_linear_kernel),
        out_type=[jax.ShapeDtypeStruct((num_rows, width), x.dtype) for width in widths],
        grid=(MULTIPROCESSORS,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=(
            tiled(stages, BLOCK_ROWS, STEP_INPUTS),
            tiled(stages, config.outputs, STEP_INPUTS),
            tiled(2, slots, WARPGROUP_ROWS, line),
            plgpu.Barrier(num_arrivals=3 if gated else 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=2 * slots),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, weight, *residuals)
    return out if keep_products else out[0]


def fused_linear_kernel(
    x_ref,  # [B, D]
    weight_ref,  # [M, D], M = 2 F if gated
    *refs,  # the residual [B, M], where one is `added`; the output [B, M or F]; the products [B, 2 F], where they are kept; scratch
    added: bool,
    gated: bool,
    config: MosaicConfig,
):
    out_ref, *products, x_smem, weight_smem, out_smem, ready, free, residual_ready = refs[added:]
    num_rows, num_inputs = x_ref.shape
    num_results = out_ref.shape[1]
    stages = weight_smem.shape[0]
    _, slots, _, line = out_smem.shape
    halves = 2 if gated else 1
    results = config.outputs // halves  # of a tile
    row_tiles, result_tiles, steps = pl.cdiv(num_rows, BLOCK_ROWS), num_results // results, num_inputs // STEP_INPUTS
    program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")
    own_tiles = jax.lax.div(jnp.maximum(row_tiles * result_tiles - program + (MULTIPROCESSORS - 1), 0), MULTIPROCESSORS)

    def origin(tile):
        """The first row and the first output of a tile: all rows of a band, then the next outputs."""
        index = program + tile * MULTIPROCESSORS
        band, within = jax.lax.div(index, config.band_tiles * result_tiles), jax.lax.rem(index, config.band_tiles * result_tiles)
        rows = jnp.minimum(config.band_tiles, row_tiles - band * config.band_tiles)
        row_tile = band * config.band_tiles + jax.lax.rem(within, rows)
        return row_tile * BLOCK_ROWS, jax.lax.div(within, rows) * results

    @pl.when(warpgroup == 2)
    def copy():
        plgpu.set_max_registers(40, action="decrease")

        def copy_step(index, _):
            row, result = origin(jax.lax.div(index, steps))
            stage, inputs = jax.lax.rem(index, stages), pl.ds(jax.lax.rem(index, steps) * STEP_INPUTS, STEP_INPUTS)

            @pl.when(index >= stages)
            def wait_until_free():
                plgpu.barrier_wait(free.at[stage])

            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, BLOCK_ROWS), inputs], x_smem.at[stage], ready.at[stage])
            for half in range(halves):
                weights = weight_ref.at[pl.ds(half * num_results + result, results), inputs]
                plgpu.copy_gmem_to_smem(weights, weight_smem.at[stage, pl.ds(half * results, results)], ready.at[stage])

        jax.lax.fori_loop(0, own_tiles * steps, copy_step, None)

    @pl.when(warpgroup < 2)
    def multiply():
        plgpu.set_max_registers(232, action="increase")
        own_rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def compute_tile(tile, _):
            row, result = origin(tile)
            rows, leaving = pl.ds(row + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), itertools.count()

            def columns(index):
                return pl.ds(result + index * line, line)

            def leave(numbers, to_ref, at):
                slot = next(leaving) % slots
                if not added:
                    plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                out_smem[warpgroup, slot] = numbers.astype(to_ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, slot], to_ref.at[rows, at])

            def accumulate(acc_ref):
                def step(k, _):
                    index = tile * steps + k
                    stage = jax.lax.rem(index, stages)
                    plgpu.barrier_wait(ready.at[stage])
                    plgpu.wgmma(acc_ref, x_smem.at[stage, own_rows], weight_smem.at[stage].transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # the one before this has read its stage

                    @pl.when(k > 0)
                    def release():
                        plgpu.barrier_arrive(free.at[jax.lax.rem(index - 1, stages)])

                    if added:

                        @pl.when(k == 0)
                        def fetch_residual():
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            for slot in range(slots):
                                residual, own = refs[0].at[rows, columns(slot)], warpgroup * slots + slot
                                plgpu.copy_gmem_to_smem(residual, out_smem.at[warpgroup, slot], residual_ready.at[own])

                jax.lax.fori_loop(0, steps, step, None)
                return acc_ref[...]

            sums = pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, config.outputs), jnp.float32))
            plgpu.barrier_arrive(free.at[jax.lax.rem(tile * steps + (steps - 1), stages)])

            for index in range(results // line):
                out = sums[:, index * line : (index + 1) * line]
                if gated:
                    up = sums[:, results + index * line : results + (index + 1) * line]
                    for products_ref in products:
                        leave(out, products_ref, columns(index))
                        leave(up, products_ref, pl.ds(num_results + result + index * line, line))
                    root = jax.lax.rsqrt(1.0 + jnp.exp2(out * -LOG2_E))  # its square is the sigmoid: a division is slower
                    out *= root * root * up
                if added:
                    plgpu.barrier_wait(residual_ready.at[warpgroup * slots + index])
                    out += out_smem[warpgroup, index].astype(jnp.float32)
                leave(out, out_ref, columns(index))

        jax.lax.fori_loop(0, own_tiles, compute_tile, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
