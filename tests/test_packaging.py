"""What is installed: the wheel's files, the command `selfspan`, and names that a user's own files may have too."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import decode
import selfspan
from data.tasks import TASKS

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "arithmetic-tiny"
PACKAGES = ("selfspan_jax", "pallas_kernels", "data")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]


def run(*command, **options):
    """Run a program with nothing of this one's path: what it printed, by status."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [*map(str, command)], env=environment | options.pop("env", {}), capture_output=True, text=True, timeout=300, check=False, **options
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is built from, since a build leaves files behind."""
    directory = tmp_path_factory.mktemp("source") / "selfspan"
    names = ("__pycache__", ".*", "build", "*.egg-info", "checkpoints", "docs", "notebooks", "tests", "runs", "corpora")
    return shutil.copytree(ROOT, directory, ignore=shutil.ignore_patterns(*names))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    status, _, errors = run(*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", directory, source)
    assert status == 0, errors
    (file,) = directory.glob("*.whl")
    return file


def environment(directory, *what):
    """Make a virtual environment that sees the packages of this one, install something in it, and return its scripts' directory."""
    venv.create(directory, symlinks=True)
    python = directory / "bin" / "python"
    _, site, _ = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(site.strip(), "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile"]
    status, _, errors = run(*PIP, "--python", python, "install", *options, *what)
    assert status == 0, errors
    return python.parent


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("editable"), "--editable", source)


def test_every_command_is_that_of_its_module():
    """`selfspan --help` imports none of them, so it has their names and a line on each of its own."""
    assert {name for name, (module, _) in selfspan.COMMANDS.items() if module == "decode"} == set(decode.COMMANDS)
    assert {module for module, _ in selfspan.COMMANDS.values()} == {"decode", "train", "data.__main__"}


@pytest.mark.slow
def test_the_wheel_has_all_that_runs_and_nothing_under_a_common_name(wheel):
    """Every file of the packages; the command lines, in a package of their own. `data` is part of the public contract."""
    expected = {file.relative_to(ROOT).as_posix() for name in PACKAGES for file in (ROOT / name).rglob("*") if file.is_file()}
    expected |= {f"selfspan_commands/{name}.py" for name in ("selfspan", "train", "decode")}
    expected |= {f"selfspan_commands/benchmarks/{file.name}" for file in (ROOT / "benchmarks").glob("*.py")}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == {name for name in expected if "__pycache__" not in name}


@pytest.fixture
def crowded(tmp_path):
    """A directory, also on PYTHONPATH, whose modules have the names that ours have."""
    for name in ("train", "decode", "data", "spans", "benchmarks"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the user's own')", encoding="utf-8")
    return {"cwd": tmp_path, "env": {"PYTHONPATH": "."}}


@pytest.mark.slow
def test_the_command_decodes_in_any_directory(installed, crowded):
    status, out, err = run(installed / "selfspan", "generate", CHECKPOINT, "((51+75)-(95*3))", **crowded)
    assert (status, err) == (0, "") and "((51+75)-(95*3)) = -159" in out


@pytest.mark.slow
@pytest.mark.parametrize("where", ["installed", "editable"])
def test_the_command_writes_a_corpus_in_any_directory(where, request, crowded):
    command = request.getfixturevalue(where) / "selfspan"
    assert run(command, "data", "arithmetic", "--num-examples", "20", "--out", "corpus", **crowded) == (0, "corpus: 20 train\n", "")
    assert (crowded["cwd"] / "corpus" / "dataset_info.json").exists()


@pytest.mark.slow
def test_the_command_says_what_there_is_and_what_there_is_not(installed, tmp_path):
    command = installed / "selfspan"
    status, out, err = run(command, "--help", cwd=tmp_path)
    assert (status, err) == (0, "") and all(f"  {name} " in out for name in selfspan.COMMANDS)
    assert run(command, "genrate", cwd=tmp_path) == (
        2, "", "error: 'genrate' is no command of selfspan; perhaps generate; allowed: generate, eval, bench, serve, train, data\n",
    )  # fmt: skip
    status, out, err = run(command, "data", "arithmetic", "--help", cwd=tmp_path)
    assert (status, err) == (0, "") and out.startswith("usage: selfspan data arithmetic [-h]")
    status, out, err = run(installed / "python", "-c", "import selfspan, sys; print(sys.modules)", cwd=tmp_path)
    assert status == 1 and "No module named 'selfspan'" in err


SCRIPT = """
from selfspan_jax import SpanLM, task
try:
    print(*task.installed_tasks())
except ValueError as error:
    print(error)
"""
# Files beside a user's script, and whether models can be loaded then.
BESIDE = {
    "a directory of files, names of our modules": ("installed", ["data/train.csv", "spans.py"], True),
    "a directory of files, editable": ("editable", ["data/train.csv"], True),
    "a module": ("installed", ["data.py"], False),
    "a package": ("editable", ["data/__init__.py"], False),
}


@pytest.mark.slow
@pytest.mark.parametrize(("where", "beside", "loads"), [pytest.param(*case, id=name) for name, case in BESIDE.items()])
def test_a_file_of_the_users_beside_a_script(where, beside, loads, request, tmp_path):
    """It does not keep the library from being imported; where it takes the name of `data`, loading says so in one line."""
    python = request.getfixturevalue(where) / "python"
    for file in beside:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("raise RuntimeError('imported')", encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    status, out, err = run(python, "script.py", cwd=tmp_path)
    own = f"{tmp_path / beside[0]} takes the name of selfspan's package 'data': rename it, or keep its directory off Python's path"
    assert (status, out, err) == (0, f"{' '.join(TASKS) if loads else own}\n", "")
