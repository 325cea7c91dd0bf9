"""Wrong input ends with status 2 and one line; the real command in a process of its own where that matters."""

import contextlib
import dataclasses
import errno
import gc
import io
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import commandline
from data.__main__ import main
from data.errors import UserError

ROOT = Path(__file__).parents[2]


def assert_one_line(capsys, *expected):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert not set("│╭╰─") & set(err)
    for words in expected:
        assert words in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["arithmetic"]),
        (["geometry"], ["geometry", "allowed: arithmetic, news"]),
        (["arithmetic"], ["error: --out is required; --help says what for\n"]),
        (["documents"], ["error: --out and --source are required; --help says what for\n"]),
        (["arithmetic", "--out", "{tmp}/x", "--num-examples", "many"], ["--num-examples", "'many'"]),
        (["arithmetic", "--out", "{tmp}/x", "--num-example", "3"], ["--num-example", "perhaps --num-examples"]),
        (["arithmetic", "--out", "{tmp}/x", "--split", "dev"], ["'dev'", "train", "test"]),
        (["arithmetic", "--out", "{tmp}/x", "--num-examples", "0"], ["--num-examples is 0; allowed: 1 and above"]),
        (["arithmetic", "--out", "{tmp}/x", "--min-ops", "0"], ["--min-ops is 0", "allowed: 1 <= --min-ops <= --max-ops"]),
        (["arithmetic", "--out", "{tmp}/x", "--max-ops", "600"], ["--max-ops is 600", "at most 511"]),
        (["arithmetic", "--out", "{tmp}/x", "--max-value", "5"], ["--max-value is 5"]),
        (["arithmetic", "--out", "{tmp}/x", "--workers", "-1"], ["workers is -1"]),
        (["arithmetic", "--out", "{tmp}"], ["{tmp} exists and is not an empty directory"]),
        (["arithmetic", "--out", "{tmp}/file"], ["{tmp}/file exists and is not an empty directory"]),
        (["arithmetic", "--out", "{tmp}/file/x"], ["{tmp}/file", "directory"]),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, capsys, words, expected):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit) as caught:
        main([word.format(tmp=tmp_path) for word in words])
    assert caught.value.code == 2
    assert_one_line(capsys, *(words.format(tmp=tmp_path) for words in expected))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "kept")]


@pytest.mark.parametrize("words", [["--help"], ["arithmetic", "--help"]])
def test_help_goes_to_stdout_with_status_0(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: ") and err == ""
    if words == ["arithmetic", "--help"]:
        for default in ("--num-examples", "(default: 1000)", "--max-value INT", "(default: 999)", "(required)"):
            assert default in out


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 3

    def __post_init__(self):
        if self.steps < 0:
            raise UserError(f"steps is {self.steps}:\nexpected at least 0")


def test_parse_takes_any_config(capsys):
    assert commandline.parse(Settings, "x", ["--steps", "4"]) == commandline.parse(Settings(4), "x", []) == Settings(4)
    with pytest.raises(SystemExit, match="2"):
        commandline.parse(Settings, "x", ["--steps", "-4"])
    assert_one_line(capsys, "--steps is -4: expected at least 0")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("module", ["data", "experiments.neighbours", "benchmarks.elsewhere"])
def test_a_module_is_named_as_it_is_started(monkeypatch, capsys, module):
    monkeypatch.setattr(sys, "argv", ["x", "--foo"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert re.search(rf" is no (command|option) of python -m {module}; ", capsys.readouterr().err)


def test_similar_names_are_few():
    assert commandline.similar("stps", ["steps", "seed", "zzz"]) == "; perhaps steps"
    assert commandline.similar("num", ["num-a", "num-b", "num-c", "num-d"]).count(" or ") == 2
    assert commandline.similar("qqqq", ["steps"]) == commandline.similar("--host", ["--ops", "--split"]) == ""
    assert commandline.similar("--batch_size", ["--base", "--batch-size"]) == "; perhaps --batch-size"


def test_fail_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        commandline.fail("two\n lines")
    assert capsys.readouterr().err == "error: two lines\n"


def test_a_pipe_of_another_process_that_breaks_is_said(capsys):
    with pytest.raises(SystemExit, match="2"), commandline.exit_on_user_error():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert capsys.readouterr().err == "error: Broken pipe\n"


REFUSED = {
    "read only": OSError(errno.EROFS, "Read-only file system", "/mnt/out"),
    "no space": OSError(errno.ENOSPC, "No space left on device"),
    "a link to itself": OSError(errno.ELOOP, "Too many levels of symbolic links", "/tmp/loop"),
    "a long name": OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300),
    "below a file": NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/below"),
    "renamed over a directory": OSError(errno.EISDIR, "Is a directory", "new", None, "old"),
    "a library's own words": OSError("no file named model.safetensors\nin x"),
}


@pytest.mark.parametrize("error", [pytest.param(error, id=name) for name, error in REFUSED.items()])
def test_what_the_machine_refuses_is_one_line(error, capsys):
    with pytest.raises(SystemExit, match="2"), commandline.exit_on_user_error():
        raise error
    out, err = capsys.readouterr()
    said = [word for word in (error.filename, error.filename2, error.strerror) if word] or ["no file named model.safetensors in x"]
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in said)


def test_a_path_that_the_locale_did_not_decode_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"), commandline.exit_on_user_error():
        "/runs/r\udcc3\udcbcn".encode()
    assert capsys.readouterr().err.startswith("error: '/runs/r\\udcc3\\udcbcn' is not text in the locale's encoding: set LC_ALL=C.UTF-8")


def test_too_little_memory_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"), commandline.exit_on_user_error():
        np.empty(2**62, np.int8)
    assert re.fullmatch(r"error: memory does not suffice: Unable to allocate .*\n", capsys.readouterr().err)


def test_bugs_keep_their_traceback():
    for bug in (lambda: {}["key"], lambda: np.random.default_rng(-1), lambda: int("x" * 3)):
        with pytest.raises((KeyError, ValueError)), contextlib.ExitStack() as stack:
            stack.enter_context(commandline.exit_on_user_error())
            bug()


def test_a_value_error_of_the_project_is_one_line(capsys):
    from data.arithmetic import parse

    with pytest.raises(SystemExit, match="2"), commandline.exit_on_user_error():
        parse("1+")
    assert_one_line(capsys, 'column 3: expected a number or "(", found the end')


def test_an_interrupt_is_status_130(capsys):
    with pytest.raises(SystemExit, match="130"), commandline.exit_on_user_error():
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_callback_of_the_garbage_collector_ends_the_command_too(sent, status):
    """Python drops what such a callback raises."""

    def callback(phase, info):
        gc.callbacks.remove(callback)
        signal.raise_signal(sent)

    with pytest.raises(SystemExit, match=str(status)), commandline.exit_on_user_error(), commandline.exit_on_termination():
        gc.callbacks.append(callback)
        gc.collect()
        for _ in range(2000):
            time.sleep(0.01)
        raise AssertionError("the signal was lost")


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    words = ["arithmetic", "--num-examples", "20", "--out", str(tmp_path / "corpus")]
    done = subprocess.run([sys.executable, "-m", "data", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'corpus'}: 20 train\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_leaves_nothing(tmp_path, sent, status):
    words = ["arithmetic", "--num-examples", "1000000", "--workers", "1", "--out", str(tmp_path / "corpus")]
    before = signal.signal(sent, signal.SIG_DFL)  # what a shell starts in the background inherits that SIGINT is ignored
    process = subprocess.Popen([sys.executable, "-m", "data", *words], cwd=ROOT, stderr=subprocess.PIPE)
    signal.signal(sent, before)
    with process:
        while not os.listdir(tmp_path):
            time.sleep(0.05)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == status
    assert os.listdir(tmp_path) == []
    assert b"Traceback" not in errors and errors.endswith(b"interrupted\n")


def test_what_libraries_log_reads_as_other_warnings(monkeypatch):
    """Also where one of them has set up the log's own form before."""
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with commandline.exit_on_user_error():
        logging.getLogger("of.a.library").warning("stored in float16")
    assert handler.stream.getvalue() == "warning: stored in float16\n"
