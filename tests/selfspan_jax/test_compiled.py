"""Programs on disk: where they are kept, that the next process takes them, and that no directory can do harm."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from selfspan_jax import compiled

PROGRAM = """
import jax, jax.numpy as jnp
from selfspan_jax import compiled
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
kept = compiled.keep_programs()
jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
print(kept, len(hits))
"""


def test_the_next_process_takes_small_programs_from_the_directory_of_caches(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_") and name != "XDG_CACHE_HOME"}
    environment |= {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    found = []
    for _ in range(2):
        options = {"env": environment, "cwd": Path(__file__).parents[2], "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, **options)
        assert not done.stderr
        found.append(done.stdout.split())
    directory = tmp_path / ".cache" / "selfspan" / "compiled"
    assert found[0] == [str(directory), "0"] and found[1][0] == str(directory) and int(found[1][1]) > 0
    assert list(directory.iterdir()) and directory.stat().st_mode & 0o077 == 0


@pytest.fixture
def settings(monkeypatch):
    """JAX's settings as they are in a fresh process, and after the test as before."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    with warnings.catch_warnings():
        yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)


ELSEWHERE = {  # what is said -> (environment, where they are kept)
    "the home directory": ({"HOME": "{}", "XDG_CACHE_HOME": ""}, "{}/.cache/selfspan/compiled"),
    "another directory of caches": ({"XDG_CACHE_HOME": "{}/caches"}, "{}/caches/selfspan/compiled"),
    "JAX's own variable": ({"JAX_COMPILATION_CACHE_DIR": "{}/own"}, "{}/own"),
    "a place where nothing can be": ({"XDG_CACHE_HOME": "/dev/null"}, "None"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_programs_are_kept_where_the_environment_says(tmp_path, settings, name):
    environment, expected = ELSEWHERE[name]
    before = jax.config.jax_compilation_cache_dir
    for key, value in environment.items():
        settings.setenv(key, value.format(tmp_path))
    kept = str(compiled.keep_programs())
    assert kept == expected.format(tmp_path)
    assert jax.config.jax_compilation_cache_dir == (before if name.startswith(("JAX", "a place")) else kept)


def test_jax_can_be_told_to_keep_none(tmp_path, settings):
    jax.config.update("jax_enable_compilation_cache", False)
    assert compiled.keep_programs(tmp_path / "new") is None and not list(tmp_path.iterdir())


def test_of_too_many_the_oldest_are_removed(tmp_path, settings):
    for number in range(8):
        (tmp_path / str(number)).write_bytes(bytes(100))
        os.utime(tmp_path / str(number), (number, number))
    settings.setattr(compiled, "MAX_BYTES", 799)
    assert compiled.keep_programs(tmp_path) == tmp_path
    assert sorted(file.name for file in tmp_path.iterdir()) == ["5", "6", "7"]
