"""Several processes on loopback: they train as one does, end when one of them is killed, and go on; what they refuse."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from selfspan_jax.parallel import distributed
from tests.test_commands import TOY

ROOT = Path(__file__).parents[3]
OPTIONS = [*TOY, "--batch-size", "4", "--compute-dtype", "float32", "--data-parts", "2"]
LONG = [*OPTIONS, "--steps", "60", "--checkpoint-every-steps", "7"]
SECONDS = 240  # that a run may take on a busy machine


def environment(num_devices=1):
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}


def start(run_dir, *options, hosts=None, num_devices=1):
    command = [sys.executable, "train.py", "arithmetic-tiny", "--run-dir", str(run_dir), *map(str, options)]
    command += ["--hosts", hosts] if hosts else []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment(num_devices), **pipes)


def start_two(run_dir, *options, num_devices=1, second=()):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    each = (options, (*options, *second))
    return [start(run_dir, *own, hosts=f"127.0.0.1:{port},2,{number}", num_devices=num_devices) for number, own in enumerate(each)]


def finish(*processes, seconds=SECONDS):
    """(status, stdout, stderr) of each; none is left running."""
    try:
        return [(process.returncode, *outputs) for process in processes for outputs in [process.communicate(timeout=seconds)]]
    finally:
        for process in processes:
            process.kill()


def losses(run_dir):
    file = run_dir / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return [[json.loads(line)[name] for name in ("step", "loss", "gradient_norm")] for line in lines if '"loss"' in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process on one device packs both parts of the data: the oracle."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    [(status, _, err)] = finish(start(run_dir, *LONG))
    assert status == 0, err
    return losses(run_dir)


@pytest.mark.slow
def test_two_processes_train_as_one(alone, tmp_path):
    """Two of two devices each, rows and parameters divided over all four, with an evaluation in mid-run."""
    options = [*OPTIONS, "--steps", 60, "--mesh", "data=2,fsdp=2", "--eval-examples", 2, "--eval-every-steps", 30]
    (first, second) = finish(*start_two(tmp_path / "run", *options, num_devices=2))
    assert first[0] == second[0] == 0, first[2] + second[2]
    np.testing.assert_allclose(losses(tmp_path / "run"), alone, rtol=1e-4)
    assert "steps on 4 x cpu (data=2,fsdp=2)" in first[1] and first[1].splitlines()[-1] == f"finished: {tmp_path / 'run' / 'model'}"
    assert "finished" not in second[1] and "step 30" in first[1] and "step 30" not in second[1]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_stop_in_time_and_go_on_on_another_mesh(tmp_path):
    """Heads divided between the two, then parameters; the position in the data is that of both processes."""
    options, whole, run_dir = [*OPTIONS, "--num-kv-heads", 2], tmp_path / "whole", tmp_path / "run"
    assert finish(start(whole, *options))[0][0] == 0
    (first, second) = finish(*start_two(run_dir, *options, "--mesh", "tensor=2", "--stop-after-seconds", 0))
    assert first[0] == second[0] == 0 and "stopped after step 1 of 12" in first[1], first[2] + second[2]
    (first, second) = finish(*start_two(run_dir, *options, "--mesh", "fsdp=2"))
    assert first[0] == second[0] == 0, first[2] + second[2]
    np.testing.assert_allclose(losses(run_dir), losses(whole), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("killed, goes_on", [(1, "as two"), (0, "alone")])
def test_when_one_process_is_killed_the_other_ends_and_the_run_goes_on(alone, tmp_path, killed, goes_on):
    """The run resumes by the same commands; or in one process, because how many there are is no part of it."""
    run_dir = tmp_path / "run"
    processes = start_two(run_dir, *LONG)
    while len(losses(run_dir)) < 10 and all(process.poll() is None for process in processes):
        time.sleep(0.002)
    processes[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    found = finish(*processes)
    assert time.monotonic() - began < distributed.HEARTBEAT_SECONDS + 15
    assert found[killed][0] == -signal.SIGKILL and 10 <= len(losses(run_dir)) < 60
    status, _, err = found[1 - killed]
    assert "Traceback" not in err
    if killed == 1:
        assert status == 1 and len(re.findall("^error: another process of this run ended", err, re.MULTILINE)) == 1
        assert len(err.splitlines()) <= 3
    else:  # the runtime, whose coordinator is gone, may be faster to end the process with its own words
        assert status != 0 and ("another process of this run ended" in err or "another task died" in err)
    resumed = finish(*(start_two(run_dir, *LONG) if goes_on == "as two" else [start(run_dir, *LONG)]))
    assert all(status == 0 for status, *_ in resumed), resumed
    np.testing.assert_allclose(losses(run_dir), alone, rtol=1e-4)


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_other(tmp_path):
    """A data worker that dies is the trouble of one host; the other, which waits for it in a sum, ends too."""
    processes = start_two(tmp_path / "run", *LONG, "--steps", 100_000, "--workers", 1)
    while len(losses(tmp_path / "run")) < 3 and all(process.poll() is None for process in processes):
        time.sleep(0.01)
    began = time.monotonic()
    (child, *_) = (c for file in Path(f"/proc/{processes[1].pid}/task").glob("*/children") for c in file.read_text().split())
    os.kill(int(child), signal.SIGKILL)
    (first, second) = finish(*processes)
    assert time.monotonic() - began < distributed.SHUTDOWN_SECONDS + 30
    assert first[0] != 0 and second[0] != 0 and "a data worker ended" in second[2]


@pytest.mark.slow
def test_what_the_user_of_several_processes_got_wrong_is_said_by_each_in_one_line(tmp_path):
    """And before anything is written."""
    wrong = {
        "data_parts is 1: each of 2 hosts reads a part of its own; allowed: multiples of 2": ["--data-parts", "1"],
        "takes 1 devices; 2 processes must use all of their 2": ["--mesh", "tensor=1"],
        "the processes were started with different options; allowed to differ: --hosts and --workers": [],
    }
    for message, options in wrong.items():
        second = [] if options else ["--seed", "1"]
        for status, out, err in finish(*start_two(tmp_path / "run", *OPTIONS, *options, second=second)):
            waiting, *lines = [line for line in err.splitlines() if "Gloo" not in line]
            assert waiting.startswith("waiting for all processes (127.0.0.1:")
            assert status == 2 and "steps on" not in out and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["10.0.0.1", "10.0.0.1:9876", "10.0.0.1:9876,2", "10.0.0.1:9876,2,2", ":9876,2,0", "slurm"])
def test_hosts_that_cannot_be_are_refused(text):
    with pytest.raises(ValueError, match=r"allowed: auto, or HOST:PORT,N,I with I from 0 to N - 1"):
        distributed.initialize(text)


# ------------------------------------------------------------------------- the launch lines of docs/multi-gpu.md


def launch_lines():
    """Commands of the page that want processes of their own, by what tells them apart."""
    text = (ROOT / "docs" / "multi-gpu.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0] for block in blocks for line in block.splitlines() if not line.startswith("#")]
    kinds = {"--time-steps": "timed", "bench": "bench", "JAX_NUM_CPU_DEVICES": "rehearsal", "srun": "slurm", "--hosts 10.0.0.1": "told"}
    found = {}
    for line in lines:
        (kind,) = (kind for word, kind in kinds.items() if word in line)
        found.setdefault(kind, []).append(shlex.split(line))
    assert found.keys() == set(kinds.values())
    return found


def toy(words, run_dir, *options):
    """The arguments of a documented `train.py`, at toy size, into a directory that is ours."""
    arguments = words[words.index("train.py") + 1 :]
    arguments[arguments.index("--run-dir") + 1] = str(run_dir)
    sizes = ["--batch-size", 8, "--num-heads", 2, "--num-kv-heads", 2, *options]
    return [sys.executable, "train.py", *arguments, *TOY, *map(str, sizes)]


def run(commands, environments):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    found = finish(*(subprocess.Popen(command, cwd=ROOT, env=env, **pipes) for command, env in zip(commands, environments, strict=True)))
    assert all(status == 0 for status, *_ in found), found
    return found


@pytest.mark.slow
def test_the_launch_lines_of_one_machine_run(tmp_path):
    lines = launch_lines()
    (rehearsal,) = lines["rehearsal"]
    for words, size in zip(lines["timed"], ({"data": 2}, {"fsdp": 2}), strict=True):
        run_dir = tmp_path / "-".join(size)
        run([toy(words, run_dir, "--time-steps", 1)], [environment(2)])
        figures = json.loads((run_dir / "throughput.json").read_text())
        assert figures["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1} | size
    variables = dict(word.split("=") for word in rehearsal[: rehearsal.index("python")])
    [(_, out, _)] = run([toy(rehearsal, tmp_path / "rehearsal")], [os.environ | variables])
    assert "steps on 8 x cpu (data=2,fsdp=2,tensor=2)" in out
    small = ["--context", "96", "--steps", "8", "--batch-size", "2", "--json", str(tmp_path / "bench.json")]
    for words, mesh in zip(lines["bench"], ("tensor=2", "data=2"), strict=True):
        arguments = words[words.index("decode.py") : words.index("--json")]
        arguments[arguments.index("--shape") : arguments.index("--shape") + 2] = ["checkpoints/arithmetic-tiny"]
        [(_, out, _)] = run([[sys.executable, *arguments, *small]], [environment(2)])
        report = json.loads((tmp_path / "bench.json").read_text())
        assert out.startswith(f"2 x cpu ({mesh})") and report["plan"]["mesh"] == mesh
        assert [row["attention"] for row in report["rows"]] == ["dense", "span"]
        assert all(row["floor_ms"] > 0 and row["device_ms_by_kind"] == {} for row in report["rows"])  # a CPU has no such events


@pytest.mark.slow
def test_the_launch_line_of_a_cluster_runs_where_slurm_says_who_is_who(tmp_path):
    """Two tasks of four devices each stand in for eight of one; the variables are those that srun sets."""
    [words] = launch_lines()["slurm"]
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    tasks = [environment(4) | job | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in range(2)]
    (first, second) = run([toy(words, tmp_path / "run")] * 2, tasks)
    assert "steps on 8 x cpu (data=2,fsdp=4)" in first[1] and first[1].endswith(f"finished: {tmp_path / 'run' / 'model'}\n")
    assert "steps on" not in second[1] and len(losses(tmp_path / "run")) == 12


@pytest.mark.slow
def test_the_launch_lines_of_hosts_that_are_told_run(tmp_path):
    lines = launch_lines()["told"]
    assert len(lines) == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [[word.replace("10.0.0.1:9876", f"127.0.0.1:{port}") for word in toy(line, tmp_path / "run")] for line in lines]
    (first, _) = run(commands, [environment(2)] * 2)
    assert "steps on 4 x cpu (data=4)" in first[1] and len(losses(tmp_path / "run")) == 12
