"""A new task is its folder and a line in data/tasks.py, or a package: every command then takes it, training as `custom`."""

import itertools
import json
import sys

import jax
import pytest

import decode
import train
from data import dataset
from data.__main__ import main as data_main
from data.tasks import TASKS
from selfspan_jax.config import PRESETS
from tests import sums

TOY_OPTIONS = {
    **{"--steps": 3, "--batch-size": 2, "--sequence-tokens": 128, "--log-every-steps": 1, "--eval-examples": 2, "--workers": 0},
    **{"--hidden-size": 32, "--intermediate-size": 32, "--num-layers": 1, "--num-heads": 2, "--num-kv-heads": 1, "--head-size": 16},
}
TOY = [word for option in TOY_OPTIONS.items() for word in option]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command's main in a project that has the task: stdout of a command that ends well."""
    monkeypatch.setitem(TASKS, "sums", sums.SumsTask)

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with jax.numpy_dtype_promotion("standard"):
            main()
        return capsys.readouterr().out

    return run


def test_a_new_task_is_written_trained_on_decoded_and_evaluated(call, tmp_path):
    call(data_main, "sums", "--num-examples", 40, "--max-numbers", 3, "--seed", 1, "--out", tmp_path / "corpus")
    stored = dataset.load(tmp_path / "corpus", TASKS)
    assert stored.task == sums.SumsTask.of(sums.Corpus()) and stored.card["distributions"] == {"max_numbers": 3, "num_labels": 32}
    drawn = itertools.islice(sums.Corpus(max_numbers=3).stream(seed=1), 40)
    for example, expected in zip(stored, drawn, strict=True):
        assert example.prompt == expected.prompt and (example.token_ids == expected.token_ids).all()
    with pytest.raises(SystemExit, match="2"):
        call(data_main, "sums", "--num-labels", 1, "--out", tmp_path / "none")

    out = call(train.main, "custom", "--run-dir", tmp_path / "run", "--data", tmp_path / "corpus", *TOY)
    assert out.splitlines()[-1] == f"finished: {tmp_path / 'run' / 'model'}"
    assert "Scores on fresh sums of 2 to 3 numbers" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["corpus"] == {"max_numbers": 3, "num_labels": 32}
    assert call(decode.main, "generate", tmp_path / "run" / "model", "3 4 5", "--max-new-tokens", 4)
    for where in ([], ["--data", tmp_path / "corpus"]):
        options = ["--num-examples", 2, "--batch-size", 2, "--json", tmp_path / "eval.json", *where]
        assert "answer" in call(decode.main, "eval", tmp_path / "run" / "model", *options)
        assert json.loads((tmp_path / "eval.json").read_text())["answer_accuracy"] == 0


def test_examples_of_a_new_task_are_generated_for_the_model_of_any_preset(call, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["train.py", "custom", "--corpus", "sums", "--max-numbers", "2", "--like", "news-small", "--run-dir", "runs/sums"]
    )
    run = train.parse()
    assert run.task == "sums" and run.corpus == sums.Corpus(max_numbers=2)
    assert run.model == PRESETS["news-small"].model and run.training == PRESETS["news-small"].training
