"""The parts of the benchmarks that need no GPU: which settings they try, what they compare, and what they tell a user."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import linear as bench
from benchmarks import many_rows
from pallas_kernels.common import MULTIPROCESSORS
from pallas_kernels.linear import mosaic
from tests.pallas_kernels.cases.linear import shared_memory_bytes


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("matrix", bench.MATRICES[:5], ids=lambda matrix: matrix.name)
def test_benchmark_tries_settings_that_can_run(matrix, int8):
    for batch in (1, 8, 32):
        configs = bench.settings(matrix, batch, int8)
        assert configs
        for config in configs:
            assert matrix.num_inputs % (config.segments * config.segment_inputs) == 0
            # The tuner fills the multiprocessor with as many programs as it asks for.
            programs = config.programs // MULTIPROCESSORS
            used = shared_memory_bytes(config, batch, 1 if int8 else 2, 2, matrix.gated) * config.num_stages // (config.num_stages + 1)
            assert programs * used < 227 * 1024


def test_many_rows_stand_beside_xla(monkeypatch, tmp_path):
    """With a kernel written down in JAX: each map gets the same from it, and its operations are those of its product."""

    def kernel(x, weight, residual, *, gated, config, keep_products):
        wide, matrix = x.astype(jnp.float32), weight.astype(jnp.float32)
        products = jnp.einsum("bd,md->bm", wide, matrix)
        gate, up = jnp.split(products, 2, axis=1)
        out = jax.nn.silu(gate) * up if gated else products if residual is None else products + residual.astype(jnp.float32)
        found = [a.astype(x.dtype) for a in (out, products)]
        return found if keep_products else found[0]

    sizes = {"o": (64, 128), "gate-up": (256, 64), "down": (64, 128)}
    monkeypatch.setattr(many_rows, "matrix_sizes", lambda shape: sizes)
    monkeypatch.setattr(many_rows, "report_header", lambda: {"device": "cpu"})
    monkeypatch.setattr(mosaic, "mosaic_linear", kernel)
    many_rows.main(["--rows", "128", "--shape", "llama3-8b", "--bands", "1", "--json", str(tmp_path / "rows.json")])
    cases = json.loads((tmp_path / "rows.json").read_text())["cases"]
    assert [(case["map"], case["variant"]) for case in cases] == [
        (each.name, variant) for each in many_rows.MAPS for variant in ("xla", "mosaic, bands of 1")
    ]
    assert all(case["difference_from_xla"] < 0.01 for case in cases) and any(case["difference_from_xla"] > 0 for case in cases)
    operations = [round(case["flops_per_second"] * case["microseconds"] / 1e6) for case in cases[::2]]
    assert operations == [2 * 128 * outputs * inputs for outputs, inputs in (sizes[each.matrix] for each in many_rows.MAPS)]
