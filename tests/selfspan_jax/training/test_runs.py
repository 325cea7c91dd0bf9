"""Run directories: who may go on with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from selfspan_jax.config import TrainConfig
from selfspan_jax.errors import UserError
from selfspan_jax.training import runs

IDENTITY = {"training": {"steps": 12, "seed": 0}, "data": None}


def claim(run_dir, identity):
    """Do what train.py does: what `check` returned is written."""
    runs.claim(run_dir, found := runs.check(run_dir, identity))
    return found


def write(directory, identity):
    directory.mkdir(exist_ok=True)
    (directory / "run.json").write_text(identity if isinstance(identity, str) else json.dumps(identity))


def test_a_run_directory_is_claimed_once_and_again_by_the_same_run(tmp_path):
    assert runs.check(tmp_path / "run", IDENTITY) == IDENTITY and not (tmp_path / "run").exists()
    for _ in range(2):
        claim(tmp_path / "run", IDENTITY)
        assert [file.name for file in (tmp_path / "run").iterdir()] == ["run.json"]
        assert json.loads((tmp_path / "run" / "run.json").read_text()) == IDENTITY


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"training": {"steps": 12, "seed": 1}, "data": "a"}, "another config: --seed is 1 there, 0 here; --data is 'a' there, None here"),
        ({"training": {"steps": 12, "seed": 0}}, "not written by this version"),
        ({"training": 3, "data": None}, "not written by this version"),
        ("{", "not written by this version"),
    ],
)
def test_another_run_is_refused(tmp_path, there, message):
    write(tmp_path, there)
    with pytest.raises(UserError, match=message):
        claim(tmp_path, IDENTITY)


@pytest.mark.parametrize("name", TrainConfig.CHANGEABLE)
def test_what_decides_no_result_may_change(tmp_path, name):
    """The list of what may change is that of the page; the new value is in run.json."""
    claim(tmp_path, IDENTITY | {"training": {name: 12, "steps": 12, "seed": 0}})
    changed = IDENTITY | {"training": {"steps": 12, "seed": 0, name: 20}}
    assert claim(tmp_path, changed) == changed == json.loads((tmp_path / "run.json").read_text())
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    assert f"`--{name.replace('_', '-')}`" in page


def checkpoint(run_dir, step):
    (run_dir / "checkpoints" / str(step)).mkdir(parents=True)
    (run_dir / "checkpoints" / str(step) / "state").touch()


def with_steps(steps):
    return IDENTITY | {"training": {"steps": steps, "seed": 0}}


def test_changes_of_the_number_of_steps_are_kept_with_where_they_were(tmp_path):
    claim(tmp_path, with_steps(12))
    assert "schedules" not in claim(tmp_path, with_steps(10))  # nothing was trained yet
    checkpoint(tmp_path, 8)
    assert claim(tmp_path, with_steps(20))["schedules"] == [[0, 10], [8, 20]]
    assert claim(tmp_path, with_steps(30))["schedules"] == [[0, 10], [8, 30]]
    checkpoint(tmp_path, 30)
    (tmp_path / "model").mkdir()
    identity = claim(tmp_path, with_steps(40))
    assert identity["schedules"] == [[0, 10], [8, 30], [30, 40]]
    assert "was 30 up to step 30: from there on the learning rate follows the schedule of 40" in runs.schedule_note(identity)
    assert identity["finished_steps"] == 30 and claim(tmp_path, with_steps(40)) == identity
    write(tmp_path, identity | {"finished_steps": 40, "left_out_examples": 3})
    assert runs.check(tmp_path, with_steps(40))["finished_steps"] == runs.check(tmp_path, with_steps(50))["finished_steps"] == 40
    assert claim(tmp_path, with_steps(50))["left_out_examples"] == 3
    (tmp_path / "model").rmdir()
    assert "finished_steps" not in runs.check(tmp_path, with_steps(50))
    with pytest.raises(UserError, match=r"--steps is 29, but .* has taken 30: allowed are 30 and above"):
        claim(tmp_path, with_steps(29))


def test_a_corpus_is_known_by_its_content(tmp_path):
    first = IDENTITY | {"data": "/a/corpus", "data_fingerprint": "ab" * 32}
    claim(tmp_path, first)
    moved = first | {"data": "/b/corpus"}
    assert claim(tmp_path, moved) == moved
    with pytest.raises(UserError, match=r"the content of --data is abababababab\.\.\. there, cdcdcdcdcdcd\.\.\. here$"):
        claim(tmp_path, moved | {"data_fingerprint": "cd" * 32})


def test_a_directory_is_held_by_one_run_at_a_time(tmp_path):
    """Also against another process, and until the end of that process however it ends."""
    command = "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)"
    message = r"--run-dir .* is in use by another run"
    with runs.hold(tmp_path / "run"), pytest.raises(UserError, match=message), runs.hold(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()  # was made for the lock alone
    claim(tmp_path, IDENTITY)
    with subprocess.Popen([sys.executable, "-c", command, tmp_path / "run.lock"], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=message), runs.hold(tmp_path):
                pass
        finally:
            other.kill()
    with runs.hold(tmp_path):
        claim(tmp_path, IDENTITY)
    (tmp_path / "file").touch()
    for path, message in (("file", "is a file: expected a directory"), ("file/below", "cannot be written to: Not a directory")):
        with pytest.raises(UserError, match=f"--run-dir .* {message}"), runs.hold(tmp_path / path):
            pass


def test_a_directory_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="not empty and not a run directory"):
        claim(tmp_path, IDENTITY)
