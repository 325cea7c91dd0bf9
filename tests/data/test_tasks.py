"""The registry: tasks of installed packages, which `python -m data` takes as it takes this project's."""

import os
import subprocess
import sys
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from data import dataset
from data.arithmetic import ArithmeticTask
from data.tasks import TASKS, with_installed
from tests.sums import SumsTask

ROOT = Path(__file__).parents[2]
OFFERED = {"sums": SumsTask, "more": SumsTask}
NOT_LOADED = {
    "a package that is not there": ("sums", "no_such_package.tasks:Task", "cannot be loaded: No module named 'no_such_package'"),
    "a name that is not there": ("sums", "tests.sums:Other", "cannot be loaded: module 'tests.sums' has no attribute 'Other'"),
    "a name that is taken": (
        "arithmetic",
        "tests.sums:SumsTask",
        "there is a task 'arithmetic' already, data.arithmetic.task.ArithmeticTask",
    ),
}


def entry(name, value):
    return EntryPoint(name, value, "selfspan.tasks")


@pytest.mark.parametrize(("name", "value"), [("sums", "tests.sums:SumsTask"), ("any", "tests.data.test_tasks:OFFERED")])
def test_an_entry_point_is_a_class_or_a_mapping(name, value):
    found = with_installed({"arithmetic": ArithmeticTask}, [entry(name, value)])
    assert found.keys() >= {"arithmetic", "sums"} and found["sums"].__name__ == "SumsTask" and "any" not in found


@pytest.mark.parametrize("case", NOT_LOADED)
def test_what_cannot_be_loaded_is_said_and_the_rest_goes_on(case):
    name, value, message = NOT_LOADED[case]
    with pytest.warns(UserWarning, match=f"entry point {name} = {value} of selfspan.tasks.*") as said:
        found = with_installed(TASKS, [entry(name, value), entry("good", "tests.sums:SumsTask")])
    assert message in str(said[0].message) and found == {**TASKS, "good": found["good"]}


def test_our_own_entry_point_adds_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_installed(TASKS, [entry("builtin", "data.tasks:TASKS")]) == TASKS


@pytest.mark.slow
def test_python_m_data_writes_the_corpus_of_an_installed_task(tmp_path):
    package = tmp_path / "own-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[selfspan.tasks]\nsums = own_sums:SumsTask\n")
    (tmp_path / "own_sums.py").write_text((ROOT / "tests" / "sums.py").read_text())
    command = [sys.executable, "-m", "data", "sums", "--num-examples", "20", "--max-numbers", "3", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'out'}: 20 train\n"
    assert len(dataset.load(tmp_path / "out", OFFERED)) == 20
