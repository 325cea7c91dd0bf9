"""SwiGLU of linear maps of many rows as a Pallas Mosaic-GPU kernel (Hopper and newer).

    out = silu(x W_gate^T) * (x W_up^T)

Why it exists: XLA writes gate and up outputs of many rows to memory, and reads them again to multiply them: 4 F numbers of a row beside
the F that are wanted. Here the gate is computed before the sums leave the registers.

How: a program is persistent and owns every so-many-th tile of rows and outputs. One warpgroup issues the TMA copies of the inputs of
a tile, 64 at a time, into a ring of stages, and runs ahead over the ends of tiles. Two warpgroups multiply with wgmma, 64 rows each;
two halves of an accumulator are the gate and the up outputs. What a tile has beyond the last row is read as zero and not written.

Numerics: rows are normalised beforehand, by XLA, rounded as Llama does; sums and gate are float32, and the result is rounded once.

Seen on JAX 0.10.2 (lowering), 0.11.2 (runs), 0.12.0 (lowering, interpreter).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import LOG2_E, MULTIPROCESSORS

WARPGROUP_ROWS = 64  # of a warpgroup's matrix product
BLOCK_ROWS = 2 * WARPGROUP_ROWS
STEP_INPUTS = 64  # that a stage holds: 128 bytes, as wide as a swizzled tile
TILING_ROWS = 8  # of the tiles that TMA copies are cut into
LINE = 64  # results that leave at once, 128 bytes
RESULTS = 2 * LINE  # of a tile, so that a warpgroup's product has 256 columns
NUM_STAGES = 4  # of the ring of inputs: as many as fit beside the results


def unsupported_reason(x: jax.Array, weight: jax.Array) -> str | None:
    """Say why the kernel cannot run on rows `[B, D]` and a weight `[2 F, D]`; None when it can."""
    if not x.dtype == weight.dtype == jnp.bfloat16:  # float16 was not run
        return f"rows and weight must both be bfloat16, got {x.dtype} and {weight.dtype}"
    (num_outputs, num_inputs), num_rows = weight.shape, x.shape[0]
    if num_inputs % STEP_INPUTS or num_outputs % (2 * RESULTS):
        return f"inputs and results must be multiples of {STEP_INPUTS} and {RESULTS}, got {num_inputs} and {num_outputs // 2}"
    return None if num_rows % TILING_ROWS == 0 and num_rows >= BLOCK_ROWS else f"rows must be a multiple of 8 from 128, got {num_rows}"


def mosaic_swiglu_linear(x: jax.Array, weight: jax.Array, *, band_tiles: int) -> jax.Array:
    """Run the kernel on normalised rows `[B, D]` and a weight `[2 F, D]`, all gates, then all ups; returns `[B, F]`.

    `band_tiles` tiles of rows are computed for some results before the next results.
    """
    num_rows, num_results = x.shape[0], weight.shape[0] // 2

    def tiled(*shape):
        transforms = (plgpu.TilingTransform((TILING_ROWS, shape[-1])), plgpu.SwizzleTransform(shape[-1] * x.dtype.itemsize))
        return plgpu.SMEM(shape, x.dtype, transforms=transforms)

    body = functools.partial(fused_linear_swiglu, band_tiles=band_tiles)
    return plgpu.kernel(
        functools.update_wrapper(body, fused_linear_swiglu),  # the kernel's name
        out_type=jax.ShapeDtypeStruct((num_rows, num_results), x.dtype),
        grid=(MULTIPROCESSORS,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=(
            tiled(NUM_STAGES, BLOCK_ROWS, STEP_INPUTS),
            tiled(NUM_STAGES, 2 * RESULTS, STEP_INPUTS),
            tiled(2, RESULTS // LINE, WARPGROUP_ROWS, LINE),
            plgpu.Barrier(num_arrivals=3, num_barriers=NUM_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=NUM_STAGES),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, weight)


def fused_linear_swiglu(
    x_ref,  # [B, D]
    weight_ref,  # [2 F, D]
    out_ref,  # [B, F]
    x_smem,  # [stages, 128, 64]
    weight_smem,  # [stages, 256, 64], gates and ups
    out_smem,  # [2, 2, 64, 64]
    ready,  # barriers, one of each stage
    free,
    *,
    band_tiles: int,
):
    num_rows, num_inputs = x_ref.shape
    num_results = out_ref.shape[1]
    row_tiles, result_tiles, steps = pl.cdiv(num_rows, BLOCK_ROWS), num_results // RESULTS, num_inputs // STEP_INPUTS
    program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")
    own_tiles = jax.lax.div(jnp.maximum(row_tiles * result_tiles - program + (MULTIPROCESSORS - 1), 0), MULTIPROCESSORS)

    def origin(tile):
        """The first row and the first output of a tile: all rows of a band, then the next outputs."""
        index = program + tile * MULTIPROCESSORS
        band, within = jax.lax.div(index, band_tiles * result_tiles), jax.lax.rem(index, band_tiles * result_tiles)
        rows = jnp.minimum(band_tiles, row_tiles - band * band_tiles)
        row_tile = band * band_tiles + jax.lax.rem(within, rows)
        return row_tile * BLOCK_ROWS, jax.lax.div(within, rows) * RESULTS

    @pl.when(warpgroup == 2)
    def copy():
        plgpu.set_max_registers(40, action="decrease")

        def copy_step(index, _):
            row, result = origin(jax.lax.div(index, steps))
            stage, inputs = jax.lax.rem(index, NUM_STAGES), pl.ds(jax.lax.rem(index, steps) * STEP_INPUTS, STEP_INPUTS)

            @pl.when(index >= NUM_STAGES)
            def wait_until_free():
                plgpu.barrier_wait(free.at[stage])

            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, BLOCK_ROWS), inputs], x_smem.at[stage], ready.at[stage])
            for half in range(2):
                weights = weight_ref.at[pl.ds(half * num_results + result, RESULTS), inputs]
                plgpu.copy_gmem_to_smem(weights, weight_smem.at[stage, pl.ds(half * RESULTS, RESULTS)], ready.at[stage])

        jax.lax.fori_loop(0, own_tiles * steps, copy_step, None)

    @pl.when(warpgroup < 2)
    def multiply():
        plgpu.set_max_registers(232, action="increase")
        own_rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def compute_tile(tile, _):
            row, result = origin(tile)
            rows = pl.ds(row + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def accumulate(acc_ref):
                def step(k, _):
                    index = tile * steps + k
                    stage = jax.lax.rem(index, NUM_STAGES)
                    plgpu.barrier_wait(ready.at[stage])
                    plgpu.wgmma(acc_ref, x_smem.at[stage, own_rows], weight_smem.at[stage].transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # the one before this has read its stage

                    @pl.when(k > 0)
                    def release():
                        plgpu.barrier_arrive(free.at[jax.lax.rem(index - 1, NUM_STAGES)])

                jax.lax.fori_loop(0, steps, step, None)
                return acc_ref[...]

            sums = pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, 2 * RESULTS), jnp.float32))
            plgpu.barrier_arrive(free.at[jax.lax.rem(tile * steps + (steps - 1), NUM_STAGES)])

            for index in range(RESULTS // LINE):
                gate, up = (sums[:, first + index * LINE : first + (index + 1) * LINE] for first in (0, RESULTS))
                root = jax.lax.rsqrt(1.0 + jnp.exp2(gate * -LOG2_E))  # its square is the sigmoid: a division is slower
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # of the two buffers, the one that was filled before the last
                out_smem[warpgroup, index] = (gate * (root * root * up)).astype(out_ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, index], out_ref.at[rows, pl.ds(result + index * LINE, LINE)])

        jax.lax.fori_loop(0, own_tiles, compute_tile, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
