"""The parts of the benchmark that need no GPU: which settings it tries, and what it tells a user."""

import pytest

from benchmarks import linear as bench
from pallas_kernels.common import MULTIPROCESSORS
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


@pytest.mark.parametrize(
    "arguments, message", [(["--matrices", "7b-q"], "unknown matrix '7b-q', choose from 7b-qkv"), (["--layers", "x"], "unknown layer")]
)
def test_benchmark_names_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
