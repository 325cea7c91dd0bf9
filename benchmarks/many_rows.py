"""Time linear maps of many rows, as prompts and training have them, with what is fused with them, beside XLA's programs for the same.

    python -m benchmarks.many_rows --json FILE

Each program runs alone, ten calls queued; bfloat16. Kernels are those of `pallas_kernels.linear.mosaic`, in bands of tiles.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from benchmarks.shapes import ShapeName, matrix_sizes
from benchmarks.timing import compile_those_that_can, median_and_spread, relative_error, report_header, run_command, run_seconds
from data import commandline
from data.errors import check_range
from pallas_kernels.linear.heuristics import MosaicConfig, mosaic_config
from pallas_kernels.linear.product import plain_product
from pallas_kernels.swiglu import silu_and_mul
from selfspan_jax import files
from selfspan_jax.errors import UserError

SHAPES: tuple[ShapeName, ...] = ("arithmetic-small", "arithmetic-base", "smollm2-135m", "llama3-8b")
MAX_NUMBERS = 2**27  # of the rows of an input: those of a wide model are fewer


@dataclasses.dataclass(frozen=True)
class Map:
    """A linear map and what is fused with it."""

    name: str
    matrix: str
    gated: bool = False
    added: bool = False
    keep_products: bool = False

    def plain(self, x, weight, residual):
        """Compute it as XLA does."""
        products = plain_product(x, weight, x.dtype)
        out = silu_and_mul(products) if self.gated else products + residual if self.added else products
        return (out, products) if self.keep_products else out

    def config(self, weight: jax.Array) -> MosaicConfig:
        """Return the kernel's settings as models take them."""
        num_results = weight.shape[0] // 2 if self.gated else weight.shape[0]
        return mosaic_config(num_results, weight.shape[1], gated=self.gated, added=self.added)

    def kernel(self, band_tiles: int, x, weight, residual):
        """Compute it in one kernel."""
        from pallas_kernels.linear.mosaic import mosaic_linear

        config = self.config(weight)._replace(band_tiles=band_tiles)
        added = residual if self.added else None
        return mosaic_linear(x, weight, added, gated=self.gated, config=config, keep_products=self.keep_products)


MAPS = (
    Map("SwiGLU", "gate-up", gated=True),
    Map("SwiGLU, products kept", "gate-up", gated=True, keep_products=True),
    Map("attention's output and residual", "o", added=True),
    Map("down and residual", "down", added=True),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyRows:
    """Time linear maps of many rows beside XLA."""

    shape: Annotated[tuple[str, ...], commandline.commas(*SHAPES)] = SHAPES
    """Models whose matrices are taken."""
    rows: Annotated[tuple[int, ...], commandline.commas(int)] = (16_384, 65_536)
    """Tokens, multiples of 8 from 128."""
    bands: Annotated[tuple[int, ...], commandline.commas(int)] = (1, 8)
    """Tiles of rows that a kernel computes for some results before the next results."""
    seed: int = 0
    json: Path | None = None
    """Write the figures into this file; - is standard output."""

    def __post_init__(self):
        check_range(self, "rows", low=128)
        check_range(self, "bands", low=1)
        check_range(self, "seed", low=0)
        if wrong := [rows for rows in self.rows if rows % 8]:
            raise UserError(f"rows is {wrong[0]}; allowed: multiples of 8")

    def run(self) -> None:
        programs = list(self.programs())
        compiled = compile_those_that_can((function, arguments) for _, function, arguments, _ in programs)
        report: dict[str, Any] = {**report_header(), "seed": self.seed, "cases": []}
        plain = None
        for (settings, _, arguments, flops), program in zip(programs, compiled):
            if isinstance(program, Exception):
                print(f"{_words(settings)} not run: {program}", flush=True)
                continue
            out = jax.tree.leaves(program(*arguments))
            plain = out if settings["variant"] == "xla" else plain
            errors = [relative_error(one, other) for one, other in zip(out, plain or out)]
            seconds = run_seconds(functools.partial(program, *arguments), queued=10, warm_ups=1)
            microseconds, spread = median_and_spread([1e6 * each for each in seconds])
            row = settings | {"microseconds": microseconds, "spread_microseconds": spread, "flops_per_second": 1e6 * flops / microseconds}
            report["cases"].append(row | {"difference_from_xla": max(errors)})
            print(f"{_words(settings)}{microseconds:10.1f} us{flops / microseconds / 1e6:8.0f} TFLOP/s{max(errors):10.1e}", flush=True)
            files.write_rows(self.json, report, complete=False)
        files.write_rows(self.json, report, complete=True)

    def programs(self) -> Iterator[tuple[dict[str, Any], Callable, tuple[jax.Array, ...], float]]:
        """Yield what to time: settings, the function, its arguments, the operations of its product."""
        draw = jax.jit(lambda seed, *size: jax.random.normal(jax.random.key(seed), size, jnp.bfloat16), static_argnums=(1, 2))
        for shape in self.shape:
            sizes = matrix_sizes(shape)  # type: ignore[arg-type]
            for rows in self.rows:
                for each in MAPS:
                    num_outputs, num_inputs = sizes[each.matrix]
                    if rows * num_inputs > MAX_NUMBERS:
                        continue
                    weight = draw(self.seed, num_outputs, num_inputs) * jnp.bfloat16(num_inputs**-0.5)
                    residual = draw(self.seed + 2, rows, num_outputs if each.added else 1)  # else it is not read
                    arguments = draw(self.seed + 3, rows, num_inputs), weight, residual
                    settings = {"shape": shape, "rows": rows, "map": each.name}
                    flops = 2.0 * rows * num_outputs * num_inputs
                    yield settings | {"variant": "xla"}, each.plain, arguments, flops
                    for band in self.bands:
                        taken = {"variant": f"mosaic, bands of {band}", "taken": band == each.config(weight).band_tiles}
                        yield settings | taken, functools.partial(each.kernel, band), arguments, flops


def _words(settings: dict[str, Any]) -> str:
    return f"{settings['shape']:18}{settings['rows']:>8,}  {settings['map']:34}{settings['variant']:20}"


def main(argv: list[str] | None = None) -> None:
    run_command(ManyRows, argv)


if __name__ == "__main__":
    main()
