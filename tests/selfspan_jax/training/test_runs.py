"""Run directories: who may go on with them."""

import json

import pytest

from selfspan_jax.errors import UserError
from selfspan_jax.training import runs

IDENTITY = {"training": {"steps": 12, "seed": 0}, "data": None}


def write(directory, identity):
    directory.mkdir(exist_ok=True)
    (directory / "run.json").write_text(identity if isinstance(identity, str) else json.dumps(identity))


def test_a_run_directory_is_claimed_once_and_again_by_the_same_run(tmp_path):
    for _ in range(2):
        runs.claim(tmp_path / "run", IDENTITY)
        assert [file.name for file in (tmp_path / "run").iterdir()] == ["run.json"]
        assert json.loads((tmp_path / "run" / "run.json").read_text()) == IDENTITY


def test_a_run_of_an_older_version_goes_on_unless_it_exported(tmp_path):
    write(tmp_path, IDENTITY | {"training": IDENTITY["training"] | {"export_every_steps": 0}})
    runs.claim(tmp_path, IDENTITY)
    write(tmp_path, IDENTITY | {"training": IDENTITY["training"] | {"export_every_steps": 5}})
    with pytest.raises(UserError, match="--export-every-steps is 5 there, None here"):
        runs.claim(tmp_path, IDENTITY)


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
        runs.claim(tmp_path, IDENTITY)


def test_a_directory_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a run directory"):
        runs.claim(tmp_path, IDENTITY)
