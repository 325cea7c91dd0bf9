"""Strict JAX for every test, programs compiled once for all processes of a run, and GPU tests only where there is a GPU."""

import gc
import os
import shutil
import sys
import tempfile

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32 on a GPU too, not TF32
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; whatever asks for none sees the first

# Without a GPU: a test's programs run for moments, so compile them fast instead of well. XLA reads the flags when it compiles first.
if not shutil.which("nvidia-smi"):
    flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version_info__ < (0, 11):  # later versions do not know it; half of the time that compiling takes
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()

# Every program is compiled once: workers and the processes that tests start share a directory, which the first process makes
# and removes. A bound on its size would cost more than it saves: JAX then reads the whole directory for each new program.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="selfspan-compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"], os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "-1", "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])  # JAX was imported before they were set
jax.config.update("jax_compilation_cache_max_size", -1)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# The same examples in every run: a test that fails in CI fails here.
hypothesis.settings.register_profile("selfspan", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("selfspan")


def pytest_collection_finish():
    """What is imported stays: the collector, which runs often while JAX traces, need not look at it each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_of_one_file():
    """They go when a file is done: each holds several memory maps, and a process that has kept 65,530 of them crashes in XLA."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def programs_are_timed_once():
    """No test asserts a duration: what benchmarks repeat for a median runs as seldom as it can."""
    with pytest.MonkeyPatch.context() as patch:
        fewest = {"REPETITIONS": 2, "WARM_UPS": 1, "TRACED_STEPS": 1, "LINK_ROWS": 64}
        for module in filter(None, map(sys.modules.get, ("benchmarks.decoding", "benchmarks.tiers", "benchmarks.training"))):
            for name in fewest.keys() & vars(module).keys():
                patch.setattr(module, name, fewest[name])
        yield


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command's `main` in this process: (exit status, stdout, stderr).

    With JAX's own type promotion, as for a user: the gradient of `jax.nn.dot_product_attention` in bfloat16 needs it.
    """

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            with jax.numpy_dtype_promotion("standard"):
                main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return run


# The files that take longest come first: begun last, one would leave the other processors idle. Needs `--no-loadscope-reorder`,
# without which files of few tests come last, and those are the longest.
LONGEST = ["test_commands", "test_distributed", "test_docs", "test_importing", "test_layout", "test_engine", "test_notebooks", "test_lm"]
LONGEST += ["test_lora", "test_decoding", "test_loop", "test_huggingface", "test_packaging", "test_sequence_attention"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and jax.default_backend() != "gpu":
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
