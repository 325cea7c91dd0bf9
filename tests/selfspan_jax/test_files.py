"""Output files: what is regular is replaced whole, what is not is written through, and what cannot be written is said in one line.

Compiled programs: where they are kept, that the next process takes them, and that no directory can do harm.
"""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import jax
import pytest
from matplotlib.figure import Figure

from selfspan_jax import files
from selfspan_jax.errors import UserError

OLD, NEW = b"what was there\n", b"what is new\n"


def plain(directory):
    (directory / "file").write_bytes(OLD)
    return directory / "file"


def link(directory):
    (directory / "link").symlink_to(plain(directory).name)
    return directory / "link"


def links(directory):
    (directory / "sub").mkdir()
    (directory / "sub" / "link").symlink_to("../link")
    link(directory)
    return directory / "sub" / "link"


def dangling(directory):
    (directory / "link").symlink_to("later/file")
    return directory / "link"


def linked_directory(directory):
    (directory / "real").mkdir()
    (directory / "here").symlink_to("real", target_is_directory=True)
    return directory / "here" / "file"


# How a path is made, and the file below the directory that is then written.
REGULAR = {
    "a file": (plain, "file"),
    "no file yet": (lambda directory: directory / "file", "file"),
    "directories missing": (lambda directory: directory / "a" / "b" / "file", "a/b/file"),
    "a link": (link, "file"),
    "a link to a link in another directory": (links, "file"),
    "a link to a file that does not exist yet": (dangling, "later/file"),
    "in a directory that is a link": (linked_directory, "real/file"),
    "the longest name that there is": (lambda directory: directory / ("é" * 127), "é" * 127),
}


@pytest.mark.parametrize("name", REGULAR)
def test_a_regular_file_is_replaced_where_its_links_lead(name, tmp_path):
    make, target = REGULAR[name]
    path = make(tmp_path)
    before = {str(entry): os.readlink(entry) for entry in tmp_path.rglob("*") if entry.is_symlink()}
    there = {str(entry) for entry in tmp_path.rglob("*")}
    with files.outputs(json=path):
        assert {str(entry) for entry in tmp_path.rglob("*")} == there  # a check leaves nothing
        assert not (tmp_path / target).exists() or (tmp_path / target).read_bytes() == OLD
        files.write_bytes(path, NEW)
    assert (tmp_path / target).read_bytes() == NEW and not (tmp_path / target).is_symlink()
    assert {str(entry): os.readlink(entry) for entry in tmp_path.rglob("*") if entry.is_symlink()} == before
    assert not [entry for entry in tmp_path.rglob("*") if entry.name.endswith(".partial")]


def test_a_reader_sees_the_old_file_or_the_new_one_and_its_mode_stays(tmp_path):
    file = plain(tmp_path)
    file.chmod(0o640)
    with file.open("rb") as before:
        files.write_text(file, NEW.decode())
        assert before.read() == OLD and file.read_bytes() == NEW
    assert file.stat().st_mode & 0o777 == 0o640
    (tmp_path / "other").write_bytes(NEW)
    files.write_json(tmp_path / "new", {"a": 1})
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "other").stat().st_mode and json.loads((tmp_path / "new").read_text()) == {
        "a": 1
    }


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES])
def test_a_file_that_can_be_written_but_not_replaced_is_written_in_place(number, tmp_path, monkeypatch):
    """One that is mounted by itself into a container (busy), or that lies in a directory of somebody else."""

    def refuse(source, target):
        raise OSError(number, os.strerror(number))

    file = plain(tmp_path)
    inode = file.stat().st_ino
    monkeypatch.setattr(os, "replace", refuse)
    files.write_bytes(file, NEW)
    assert file.read_bytes() == NEW and file.stat().st_ino == inode and os.listdir(tmp_path) == ["file"]
    with pytest.raises(UserError, match="cannot be written"):  # there is nothing to write in place
        files.write_bytes(tmp_path / "new", NEW)
    assert os.listdir(tmp_path) == ["file"]


@contextlib.contextmanager
def fifo(directory):
    path, got = directory / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()), daemon=True)
    reader.start()
    yield path, lambda: reader.join(10) or got[0]


@contextlib.contextmanager
def linked_fifo(directory):
    with fifo(directory) as (_, read):
        (directory / "link").symlink_to("pipe")
        yield directory / "link", read


@contextlib.contextmanager
def terminal(directory):
    """A character device, which a test that fails cannot replace."""
    ours, theirs = os.openpty()
    yield Path(os.ttyname(theirs)), lambda: os.read(ours, 100).replace(b"\r\n", b"\n")
    os.close(ours)
    os.close(theirs)


@contextlib.contextmanager
def pipe(directory):
    ours, theirs = os.pipe()
    yield Path(f"/dev/fd/{theirs}"), lambda: os.close(theirs) or os.read(ours, 100)
    os.close(ours)


THROUGH = [fifo, linked_fifo, terminal, pipe]


@pytest.mark.parametrize("opened", THROUGH, ids=lambda opened: opened.__name__)
def test_what_is_no_regular_file_is_written_through(opened, tmp_path):
    with opened(tmp_path) as (path, read):
        before = path.lstat().st_mode
        with files.outputs(json=path):
            files.write_rows(path, ["not yet"], complete=False)  # a pipe cannot take it back
            files.write_bytes(path, NEW)
        assert path.lstat().st_mode == before
        assert read() == NEW


# What cannot be written, how it is made, and why not; as root too, whom permissions do not stop.
REFUSED = {
    "a directory": (lambda directory: directory, "Is a directory"),
    "below a file": (lambda directory: plain(directory) / "sub" / "file", "Not a directory"),
    "a circle of links": (lambda directory: (directory / "circle").symlink_to("circle") or directory / "circle", "symbolic links"),
    "a name that is too long": (lambda directory: directory / ("n" * 256), "too long"),
    "where nothing can be made": (lambda directory: Path("/proc/selfspan.json"), "No such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused_before_the_work(name, tmp_path):
    make, reason = REFUSED[name]
    path = make(tmp_path)
    with pytest.raises(UserError, match=f"^json is .*, which cannot be written: .*{reason}") as early, files.outputs(json=path):
        raise AssertionError("the work has begun")
    with pytest.raises(UserError, match=f"cannot be written: .*{reason}") as late:
        files.write_bytes(path, NEW)
    assert "\n" not in f"{early.value}{late.value}"


def test_a_file_protected_against_writing_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda file, mode: False)  # root may write everything
    with pytest.raises(UserError, match=r"json is .*file, which cannot be written: Permission denied"), files.outputs(json=plain(tmp_path)):
        pass
    with pytest.raises(UserError, match="Permission denied"):
        files.write_bytes(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == OLD


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_the_old_file_and_nothing_partial(there, tmp_path):
    file = plain(tmp_path) if there else tmp_path / "file"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="file cannot be written: File too large"):
            files.write_bytes(file, bytes(2000))
        files.write_rows(file, [0] * 2000, complete=False)  # rows so far: the next may fit again
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == (["file"] if there else []) and (not there or file.read_bytes() == OLD)


def test_two_results_need_two_files(tmp_path):
    (tmp_path / "link").symlink_to("page")
    for json_file, html_file in ((tmp_path / "page", tmp_path / "link"), (Path("-"), Path("/dev/stdout"))):
        with pytest.raises(UserError, match=r"html is .*, as is json: give each"), files.outputs(json=json_file, html=html_file):
            pass
    with files.outputs(json=Path(os.devnull), html=Path(os.devnull), plot=None):
        files.write_bytes(Path(os.devnull), NEW)
    assert Path(os.devnull).is_char_device()


FORMATS = {"a.png": b"\x89PNG", "a.PNG": b"\x89PNG", "a.svg": b"<?xml", "a.pdf": b"%PDF"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_picture_has_the_format_of_its_name(name, tmp_path):
    with files.outputs(plot=tmp_path / name):
        files.write_picture(tmp_path / name, Figure(figsize=(1, 1)))
    assert (tmp_path / name).read_bytes().startswith(FORMATS[name])
    with (
        pytest.raises(UserError, match=r"plot is mask.xyz; allowed: names that end in .png, .svg or .pdf"),
        files.outputs(plot=Path("mask.xyz")),
    ):
        pass


PROGRAM = """
import sys, types
from pathlib import Path
sys.modules["selfspan_jax"] = package = types.ModuleType("selfspan_jax")  # without JAX, which takes a second
package.__path__ = [sys.argv.pop()]
from selfspan_jax import files
with files.outputs(json=Path(sys.argv[1])):
    print("a table")
    files.write_rows(Path(sys.argv[1]), ["not yet"], complete=False)
    files.write_json(Path(sys.argv[1]), {"a": 1})
print("afterwards")
"""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("run - 2>table", {"out": '{\n  "a": 1\n}\nafterwards\n', "table": "a table\n"}),
        ("run /dev/stdout 2>table | cat", {"out": '{\n  "a": 1\n}\nafterwards\n', "table": "a table\n"}),
    ],
    ids=["-", "/dev/stdout"],
)
def test_standard_output_has_the_file_alone(command, expected, tmp_path):
    program = f'run() {{ {sys.executable} -c "$CODE" "$1" {Path(files.__file__).parent}; }}'
    environment = os.environ | {"CODE": PROGRAM}
    ran = subprocess.run([program + "; " + command], check=False, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = {"out": ran.stdout} | {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert ran.returncode == 0 and {name: found[name] for name in expected} == expected, ran.stderr


@pytest.mark.parametrize("name", ["in one step", "by two renames", "after a kill between the two renames", "through a link"])
def test_a_directory_is_replaced_whole(tmp_path, monkeypatch, name):
    """In one step: no rename of our own is made, between which there would be none."""
    model = tmp_path / "model[1]"
    model.mkdir()
    (model / "weights").write_text("old")
    target = model
    if name == "in one step":
        monkeypatch.setattr(os, "rename", None)
    elif name == "through a link":
        target = tmp_path / "elsewhere"
        model.rename(target)
        model.symlink_to(target)
    else:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    if name.startswith("after a kill"):
        model.rename(tmp_path / ".model[1].999.old")
    with contextlib.suppress(ZeroDivisionError), files.new_directory(model, replace=True) as partial:
        (partial / "weights").write_text("half of the")
        assert (model / "weights").read_text() == "old"
        raise ZeroDivisionError
    assert (model / "weights").read_text() == "old"
    with files.new_directory(model, replace=True) as partial:
        (partial / "weights").write_text("new")
    assert (model / "weights").read_text() == "new" == (target / "weights").read_text()
    assert sorted(tmp_path.iterdir()) == sorted({model, target})


SHOWN = {  # a path -> what a card says of it
    "runs/mine": "runs/mine",
    "../corpora/mine": "../corpora/mine",
    "{here}/corpora/mine": "corpora/mine",
    "{here}/../mine": ".../mine",
    "/data/corpora/mine/": ".../mine",
}


@pytest.mark.parametrize("path", SHOWN)
def test_a_card_names_no_directory_of_this_machine_and_shows_what_is_left_out(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert files.shown_path(path.format(here=tmp_path)) == SHOWN[path]


KEEPING = """
import jax, jax.numpy as jnp
from selfspan_jax import files
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
kept = files.keep_programs()
jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
print(kept, len(hits))
"""


def test_the_next_process_takes_small_programs_from_the_directory_of_caches(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_") and name != "XDG_CACHE_HOME"}
    environment |= {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    found = []
    for _ in range(2):
        options = {"env": environment, "cwd": Path(__file__).parents[2], "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", KEEPING], check=True, **options)
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
    kept = str(files.keep_programs())
    assert kept == expected.format(tmp_path)
    assert jax.config.jax_compilation_cache_dir == (before if name.startswith(("JAX", "a place")) else kept)


def test_jax_can_be_told_to_keep_none(tmp_path, settings):
    jax.config.update("jax_enable_compilation_cache", False)
    assert files.keep_programs(tmp_path / "new") is None and not list(tmp_path.iterdir())


def test_of_too_many_the_oldest_are_removed(tmp_path, settings):
    for number in range(8):
        (tmp_path / str(number)).write_bytes(bytes(100))
        os.utime(tmp_path / str(number), (number, number))
    settings.setattr(files, "MAX_PROGRAM_BYTES", 799)
    assert files.keep_programs(tmp_path) == tmp_path
    assert sorted(file.name for file in tmp_path.iterdir()) == ["5", "6", "7"]


MODELS = {
    "checkpoints/arithmetic-tiny": "arithmetic-tiny",
    "runs/mine/model": "mine",  # the same model twice
    "runs/mine/adapter": "mine",
    "organisation/model-1b": "model-1b",  # of the Hub
    "model": "here",
    ".": "here",
}


@pytest.mark.parametrize("directory", MODELS)
def test_a_report_names_a_model_by_its_directory_or_its_run(directory, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert files.model_name(Path(directory)) == MODELS[directory]
