"""Strict JAX for every test, and GPU tests only where there is a GPU."""

import gc

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32 on a GPU too, not TF32
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; whatever asks for none sees the first

# The same examples in every run: a test that fails in CI fails here.
hypothesis.settings.register_profile("selfspan", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("selfspan")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_of_one_file():
    """They go when a file is done: each holds several memory maps, and a process that has kept 65,530 of them crashes in XLA."""
    yield
    jax.clear_caches()
    gc.collect()


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and jax.default_backend() != "gpu":
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
