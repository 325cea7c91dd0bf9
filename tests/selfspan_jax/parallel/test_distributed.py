"""Train in several processes on loopback: as one process does; when one is killed the others end, and the run goes on."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import train
from selfspan_jax.errors import UserError
from selfspan_jax.parallel import distributed
from selfspan_jax.parallel.mesh import make_mesh, process_parts
from tests.processes import Script
from tests.test_commands import TOY

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "multi-gpu.md").read_text()
# Every process is started by a line of the page, at toy size and with few steps, most of whose time is the two waiting for each other.
OPTIONS = [*TOY, "--batch-size", "4", "--num-kv-heads", "2", "--compute-dtype", "float32"]
OPTIONS += ["--steps", "30", "--checkpoint-every-steps", "5"]
SECONDS = 240  # that a run may take on a busy machine


def arguments(line, run_dir, *options):
    """The words of a `python train.py` of the page with more options, which count, in a directory of the test's."""
    words = shlex.split(line)
    words = words[words.index("train.py") :]
    words[words.index("--run-dir") + 1] = str(run_dir)
    return [*words, *OPTIONS, *map(str, options)]


def start(line, run_dir, *options, **more):
    return Script(arguments(line, run_dir, *options), run_dir.parent, **more)


def run_alone(run_dir):
    """The run of the two without the other, in this process: on one device it packs both parts of the data."""
    (line, _) = re.findall(r"^(python train.py .*) --mesh \S+ --data-parts 2 --hosts 10", PAGE, re.MULTILINE)
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(sys, "argv", arguments(line, run_dir, "--data-parts", 2))
        train.main()
    return losses(run_dir)


def start_two(run_dir, *options, second=(), **more):
    lines = [line.partition("  #")[0] for line in re.findall(r"^python train.py .* --hosts 10.*", PAGE, re.MULTILINE)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    first_line, second_line = (line.replace("10.0.0.1:9876", address) for line in lines)
    return [start(first_line, run_dir, *options, **more), start(second_line, run_dir, *options, *second, **more)]


def finish(*processes, seconds=SECONDS):
    """(status, stdout, stderr) of each; none is left running."""
    try:
        outputs = [process.communicate(seconds) for process in processes]
        return [(process.returncode, *printed) for process, printed in zip(processes, outputs)]
    finally:
        for process in processes:
            process.kill()


def losses(run_dir):
    """What a run has logged so far, of each step: a line is whole when it ends, since a reader, or a kill, may see half of one."""
    file = run_dir / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return [[json.loads(line)[name] for name in ("step", "loss", "gradient_norm")] for line in lines if '"loss"' in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_alone(tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """Pairs of which one process or its data worker is killed in mid-run, all at once because their ends are mostly waiting.

    Named by what is killed: (run directory, what `finish` returns).
    """
    run_dirs = {name: tmp_path_factory.mktemp("lost") / "run" for name in ("second process", "first process", "worker of the second")}
    pairs = {
        "second process": start_two(run_dirs["second process"], "--mesh", "tensor=2"),
        "first process": start_two(run_dirs["first process"], num_devices=2),
        "worker of the second": start_two(run_dirs["worker of the second"], "--mesh", "data=2", "--steps", 100_000, "--workers", 1),
    }
    with contextlib.ExitStack() as stack:
        for process in sum(pairs.values(), []):
            stack.callback(process.kill)
        waiting = dict(pairs)
        while waiting:
            for name, processes in list(waiting.items()):
                if len(losses(run_dirs[name])) >= 11:  # the checkpoint of step 10 has waited for that of step 5
                    pid = processes[name != "first process"].pid
                    if "worker" in name:
                        (pid, *_) = (int(c) for file in Path(f"/proc/{pid}/task").glob("*/children") for c in file.read_text().split())
                    os.kill(pid, signal.SIGKILL)
                    del waiting[name]
                elif any(process.returncode is not None for process in processes):
                    del waiting[name]
            time.sleep(0.002 if any(map(losses, run_dirs.values())) else 0.1)  # processes take seconds to begin
        return {name: (run_dirs[name], finish(*processes)) for name, processes in pairs.items()}


@pytest.mark.slow
def test_two_processes_train_as_one(alone, tmp_path):
    """Two of two devices each, rows and parameters divided over all four, with an evaluation in mid-run."""
    options = ["--mesh", "data=2,fsdp=2", "--eval-examples", 2, "--eval-every-steps", 15]
    (first, second) = finish(*start_two(tmp_path / "run", *options, num_devices=2))
    assert first[0] == second[0] == 0, first[2] + second[2]
    np.testing.assert_allclose(losses(tmp_path / "run"), alone, rtol=1e-4)
    assert "steps on 4 x cpu (data=2,fsdp=2)" in first[1] and first[1].splitlines()[-1] == f"finished: {tmp_path / 'run' / 'model'}"
    assert "finished" not in second[1] and "step 15" in first[1] and "step 15" not in second[1]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_when_the_second_process_is_killed_the_first_ends_and_the_run_goes_on(alone, lost):
    """On another mesh, where a signal to one process stops both, then in one process: neither is part of what a run is.

    The pair is started as two tasks of a cluster, which says who is who: the variables are those that srun sets.
    """
    run_dir, (first, second) = lost["second process"]
    status, out, err = first
    assert second[0] == -signal.SIGKILL and "steps on 2 x cpu (tensor=2)" in out
    assert status == 1 and len(re.findall("^error: another process of this run ended", err, re.MULTILINE)) == 1
    assert "Traceback" not in err and len(err.splitlines()) <= 3, err
    (line,) = re.findall(r"^srun (python train.py .* --hosts auto)$", PAGE, re.MULTILINE)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    line = line.replace("arithmetic-1b", "arithmetic-base")  # as the run began
    tasks = [job | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in range(2)]
    processes = [start(line, run_dir, "--mesh", "fsdp=2", "--data-parts", 2, variables=variables) for variables in tasks]
    while "resuming from step" not in processes[0].printed()[0] and processes[0].returncode is None:
        time.sleep(0.1)
    os.kill(processes[1].pid, signal.SIGTERM)
    (first, second) = finish(*processes)
    assert first[0] == second[0] == 143 and re.search(r"^stopped after step \d+ of 30, a checkpoint is saved", first[1], re.MULTILINE), (
        first
    )
    assert "SIGTERM: saving" in second[2] and "stopped" not in second[1] and 6 <= len(losses(run_dir)) < 30
    np.testing.assert_allclose(run_alone(run_dir), alone, rtol=1e-4)


@pytest.mark.slow
def test_when_the_first_process_is_killed_the_second_ends(alone, lost):
    run_dir, (first, (status, out, err)) = lost["first process"]
    assert first[0] == -signal.SIGKILL and "steps on" not in out and "Traceback" not in err
    # The runtime, whose coordinator is gone, may be faster to end the process with its own words.
    assert status != 0 and ("another process of this run ended" in err or "another task died" in err)
    found = losses(run_dir)
    assert 11 <= len(found) < 30
    np.testing.assert_allclose(found, alone[: len(found)], rtol=1e-4)


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_other(lost):
    """A data worker that dies is an error of one process; the other, which waits for it in a sum, ends too."""
    _, (first, second) = lost["worker of the second"]
    assert first[0] != 0 and second[0] != 0 and "a data worker ended" in second[2]


@pytest.mark.slow
def test_processes_with_different_options_each_say_so_in_one_line(tmp_path):
    """And before anything is written."""
    for status, out, err in finish(*start_two(tmp_path / "run", "--mesh", "data=2", second=["--seed", "1"])):
        waiting, *lines = [line for line in err.splitlines() if "Gloo" not in line]
        assert waiting.startswith("waiting for all processes (127.0.0.1:")
        assert status == 2 and "steps on" not in out and len(lines) == 1, err
        assert lines[0] == "error: hosts: the processes were started with different options; allowed to differ: --hosts and --workers"
    assert not (tmp_path / "run").exists()


def test_several_processes_use_all_devices_and_read_parts_of_their_own(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"takes 1 devices; 2 processes must use all of their 2$"):
        make_mesh("tensor=1", jax.devices()[:1] * 2)
    devices = np.array([SimpleNamespace(process_index=number) for number in (0, 0, 1, 1)]).reshape(4, 1, 1, 1)
    mesh = SimpleNamespace(shape={"data": 4, "fsdp": 1, "tensor": 1, "context": 1}, devices=devices)
    with pytest.raises(UserError, match=r"data_parts is 1: each of 2 hosts reads a part of its own; allowed: multiples of 2$"):
        process_parts(1, mesh)
    assert process_parts(2, mesh) == range(1) and process_parts(8, mesh) == range(4)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert process_parts(2, mesh) == range(1, 2) and process_parts(8, mesh) == range(4, 8)


@pytest.mark.parametrize("text", ["10.0.0.1", "10.0.0.1:9876", "10.0.0.1:9876,2", "10.0.0.1:9876,2,2", ":9876,2,0", "slurm"])
def test_hosts_that_cannot_be_are_refused(text):
    with pytest.raises(ValueError, match=r"allowed: auto, or HOST:PORT,N,I with I from 0 to N - 1"):
        distributed.initialize(text)
