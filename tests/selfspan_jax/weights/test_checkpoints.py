"""Checkpoints of a run: what is damaged is named and left out, and what has no room is one line."""

import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from selfspan_jax.errors import UserError
from selfspan_jax.weights.checkpoints import TrainingCheckpoints


def cut_data(checkpoint):
    for file in (checkpoint / "state").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(file.read_bytes()[:20])


def largest_file(checkpoint):
    return max((file for file in (checkpoint / "state").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


DAMAGE = {
    "empty": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.mkdir()),
    "no state": lambda checkpoint: shutil.rmtree(checkpoint / "state"),
    "no position in the data": lambda checkpoint: shutil.rmtree(checkpoint / "data"),
    "position cut short": lambda checkpoint: (checkpoint / "data" / "metadata").write_text('{"next_ex'),
    "parameters cut short": cut_data,
    "a large array cut short": lambda checkpoint: os.truncate(largest_file(checkpoint), 1000),
    "a large array missing": lambda checkpoint: largest_file(checkpoint).unlink(),
}
STATE = {"params": jnp.arange(2**16, dtype=jnp.float32).at[::3].multiply(1.7), "step": jnp.zeros((), jnp.int32)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("saved")
    checkpoints = TrainingCheckpoints(run_dir, 2)
    for step in (8, 12):
        checkpoints.save(step, STATE | {"step": jnp.array(step, jnp.int32)}, step + 1)
    checkpoints.close()
    return run_dir


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(saved, tmp_path, capfd, damage):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "12")
    checkpoints = TrainingCheckpoints(tmp_path, 2)
    state, next_example = checkpoints.restore(STATE)
    assert int(state["step"]) == 8 and next_example == 9
    np.testing.assert_array_equal(state["params"], STATE["params"])
    out, err = capfd.readouterr()
    assert out.startswith("warning: the checkpoint of step 12 is damaged and left out: ") and (out.count("\n"), err) == (1, "")
    checkpoints.save(12, state, 13)  # the run comes by again
    checkpoints.close()
    again = TrainingCheckpoints(tmp_path, 2)
    assert again.restore(STATE)[1] == 13
    again.close()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(saved, tmp_path, capfd):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in ("8", "12"):
        DAMAGE["no state"](tmp_path / "checkpoints" / step)
    for _ in range(2):
        checkpoints = TrainingCheckpoints(tmp_path, 2)
        with pytest.raises(UserError, match="no checkpoint can be read; without this directory the run starts anew"):
            checkpoints.restore(STATE)
        checkpoints.close()


def test_a_checkpoint_without_room_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 70, 30))
    checkpoints = TrainingCheckpoints(tmp_path, 2)
    with pytest.raises(UserError, match=r"a checkpoint cannot be written to .*: it takes 0\.3 MB, 0\.0 MB are free"):
        checkpoints.save(4, STATE, 5)
    checkpoints.close()
