"""Dependencies point one way: the rooms import what architecture allows and nothing else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"selfspan_jax", "pallas_kernels", "data", "train", "decode", "tests"}
MAY_IMPORT = {
    "data": {"data"},
    "pallas_kernels": {"pallas_kernels"},
    "selfspan_jax": {"selfspan_jax", "pallas_kernels"},
    "train": {"selfspan_jax", "data"},
    "decode": {"selfspan_jax", "data"},
}
# Libraries that a room has no business with, whoever else uses them.
MAY_NOT_USE = {
    "data": {"jax", "jaxlib", "flax", "optax", "orbax", "torch"},
    "pallas_kernels": {"flax", "optax", "orbax", "datasets"},
    "selfspan_jax": {"datasets", "torch"},
}


def imported(file):
    """Top-level names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module.partition(".")[0]


def files_of(room):
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_is_below_it(room):
    files = files_of(room)
    assert files
    for file in files:
        names = set(imported(file))
        assert names & OURS <= MAY_IMPORT[room], f"{file.name} imports {sorted(names & OURS - MAY_IMPORT[room])}"
        libraries = MAY_NOT_USE.get(room, set())
        # The benchmark measures PyTorch's kernels beside ours.
        libraries = libraries - {"torch"} if "bench" in file.name else libraries
        assert not names & libraries, f"{file.name} uses {sorted(names & libraries)}"


def test_the_check_sees_imports_inside_functions(tmp_path):
    (tmp_path / "module.py").write_text("def f():\n    from data import vocab\n    import jax.numpy\n")
    assert set(imported(tmp_path / "module.py")) == {"data", "jax"}


@pytest.mark.parametrize("command", ["train.py", "decode.py"])
def test_command_lines_stay_small(command):
    assert len((ROOT / command).read_text().splitlines()) < 200
