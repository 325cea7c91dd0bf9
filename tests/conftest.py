"""Strict JAX for every test, programs compiled once for all processes of a run, and GPU tests only where there is a GPU."""

import gc
import os
import shutil
import tempfile

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32 on a GPU too, not TF32
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; whatever asks for none sees the first

# Without a GPU: what tests compile runs for moments, and to make it fast takes longer. Read when the first program is compiled.
if not shutil.which("nvidia-smi"):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

# What one process of the tests has compiled the others read: those that they start, and those that run beside them. The first
# makes the directory, empty; the others inherit its name. A bound on its size is what makes JAX lock it: else a program may be
# read while it is written.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="selfspan-compiled-", ignore_cleanup_errors=True)  # gone with this process
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": compiled.name, "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**31)}
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])  # JAX was imported before they were set
for name in ("jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs"):
    if value := os.environ.get(name.upper()):
        jax.config.update(name, float(value) if name.endswith("secs") else int(value))

# The same examples in every run: a test that fails in CI fails here.
hypothesis.settings.register_profile("selfspan", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("selfspan")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_of_one_file():
    """They go when a file is done: each holds several memory maps, and a process that has kept 65,530 of them crashes in XLA."""
    yield
    jax.clear_caches()
    gc.collect()


# Files that take minutes, the longest first: begun last, one would leave the other processors idle. They count with
# `--no-loadscope-reorder`; without it those of few tests come last, which are the longest.
LONGEST = ["test_hosts", "test_commands", "test_sharding", "test_decoding", "test_lora", "test_huggingface", "test_docs", "test_training"]
LONGEST += ["test_notebooks", "test_readme", "test_span_decode", "test_linear", "test_page", "test_benchmark"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and jax.default_backend() != "gpu":
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
