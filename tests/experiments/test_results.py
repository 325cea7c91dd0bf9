"""What all reports share: variants against the command line that trains them, and what of their runs may be pooled."""

import dataclasses
import json
import shlex
import sys

import jax
import pytest

import train
from data.__main__ import main as data_main
from experiments import arithmetic, documents, news, pages, results
from selfspan_jax.model import Decoder
from selfspan_jax.training import Stopped
from selfspan_jax.weights import importing
from tests.selfspan_jax.models import TINY
from tests.selfspan_jax.weights.test_lora import directory

pytestmark = pytest.mark.filterwarnings("ignore")  # `transformers` warns about itself
EXPERIMENTS = {"arithmetic": arithmetic.EXPERIMENT, "news": news.EXPERIMENT}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Stands for the file that variants are fine-tuned from."""
    return directory(tmp_path_factory.mktemp("base") / "base", max_context_tokens=1024)


@pytest.fixture
def claimed(monkeypatch, base):
    """A function that gives train.py a command line and returns the run.json that it writes before it trains."""
    load = importing.load
    monkeypatch.setattr(train, "Decoder", lambda config, **rest: Decoder(dataclasses.replace(config, **TINY), **rest))
    monkeypatch.setattr(importing, "load", lambda path, **options: load(base, **options))

    def stop(*_, **__):
        raise Stopped(0)

    monkeypatch.setattr(train.training, "train", stop)

    def run(run_dir, words):
        before, after = words.index("--run-dir"), words.index("--run-dir") + 2
        monkeypatch.setattr(sys, "argv", ["train.py", *words[:before], "--run-dir", str(run_dir), *words[after:], "--workers", "0"])
        with jax.numpy_dtype_promotion("standard"):
            train.main()
        return json.loads((run_dir / "run.json").read_text())

    return run


CHANGED = {
    ("arithmetic", "leaf_jumps"): "--seed 3 --label-jumps 2 --no-names-first-step --remat --gap-scales 0 8 --negative-fraction 0.05",
    ("arithmetic", "jumps"): "--seed 3 --data-parts 2",
    ("arithmetic", "base_untagged"): "--seed 3 --learning-rate 2e-4",
    ("arithmetic", "smollm2_dense"): "--seed 3 --rank 8 --targets qkv_proj o_proj --min-ops 3 --prompt-window-tokens 4 --label-jumps 1",
    ("news", "prompt"): "--seed 3 --max-distractors 2 --max-prompt-tokens 880",
    ("news", "smollm2"): "--seed 3 --batch-size 8 --header-view prompt",
}


@pytest.mark.parametrize(("name", "variant"), CHANGED)
def test_the_command_of_a_run_is_the_one_that_trained_it(name, variant, claimed, tmp_path):
    """train.py itself is the oracle: what it writes of a command line must give a command line of which it writes the same."""
    experiment = EXPERIMENTS[name]
    own = experiment.variants[variant]
    there = claimed(tmp_path / "run", [own.preset, "--run-dir", "-", *own.options.split(), *CHANGED[name, variant].split()])
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"{variant}-3.run.json").write_text(json.dumps(there))
    assert results.take(experiment, tmp_path / "raw", tmp_path / "kept", "abc") == [f"{variant}-3.run.json"]
    assert results.take(experiment, tmp_path / "raw", tmp_path / "kept", "abc") == [f"{variant}-3.run.json"]
    (run,) = results.load(experiment, tmp_path / "kept")
    words = shlex.split(own.command(run.settings, f"runs/{variant}-3"))
    assert words[:2] == ["python", "train.py"] and words[words.index("--run-dir") + 1] == f"runs/{variant}-3"
    assert claimed(tmp_path / "again", words[2:]) == there


def test_the_command_of_a_run_on_a_corpus_directory_is_the_one_that_trained_it(claimed, base, tmp_path, monkeypatch):
    """train.py itself is the oracle, on a corpus directory."""
    monkeypatch.chdir(tmp_path)
    experiment = documents.EXPERIMENTS["papers"]
    own = experiment.variants["papers_plain"]
    rows = [{"document": [f"It rained in {town}.", "Snow fell."], "steps": [{"text": town, "sources": [0]}]} for town in ("Ouse", "Exe")]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = ["--max-prompt-tokens", "600", "--max-example-tokens", "1024", "--labelling", "plain", "--tokenizer", str(base)]
    data_main(["documents", *options, "--source", str(tmp_path), "--out", str(tmp_path / "corpora" / "mixture-plain")])
    more = ["--seed", "3", "--sequence-tokens", "1024", "--learning-rate", "5e-4"]
    there = claimed(tmp_path / "run", [own.preset, "--run-dir", "-", *own.options.split(), *more])
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "papers_plain-3.run.json").write_text(json.dumps(there))
    results.take(experiment, tmp_path / "raw", tmp_path / "kept", "abc")
    (run,) = results.load(experiment, tmp_path / "kept")
    words = shlex.split(own.command(run.settings, "runs/here"))
    assert (
        claimed(tmp_path / "again", words[2:]) == there and str(tmp_path) not in (tmp_path / "kept" / "papers_plain-3.run.json").read_text()
    )


@pytest.fixture
def kept(tmp_path):
    """A function that writes the reduced run of a variant, by its own settings and others."""

    def write(name, variant, seed, file_variant=None, without=(), **changes):
        own = EXPERIMENTS[name].variants[variant]
        given = {key: int(value) if value.isdigit() else value for key, value in own.settings.items()} | {"seed": seed, **changes}
        sections = {
            section: {key: given.get(key, value) for key, value in settings.items() if key not in without}
            for section, settings in own.defaults.items()
        }
        if "base" in sections:
            sections["base"] = {"name": changes.get("init", own.settings["init"]), "sha256": "0" * 64}
        file = tmp_path / f"{file_variant or variant}-{seed}.run.json"
        file.write_text(json.dumps({"commit": "abc", **sections}))
        return tmp_path

    return write


REFUSED = {
    "no jumps": (("arithmetic", "span", 0, "jumps"), {}, "label_jumps is 0, but 3 in this variant"),
    "none of them": (("arithmetic", "jumps", 0), {"without": ["label_jumps"]}, "label_jumps is missing, but 3 in this variant"),
    "one jump": (("arithmetic", "jumps", 0), {"label_jumps": 1}, "label_jumps is 1, but 3 in this variant"),
    "another base": (("news", "smollm2", 0), {"init": "Other.gguf"}, "init is Other.gguf, but SmolLM2"),
    "another mask": (("arithmetic", "smollm2", 0, "smollm2_dense"), {}, "mask is span, but dense in this variant"),
    "a new model": (("news", "span", 0, "smollm2"), {}, "has no 'base'; not written by this version"),
}


@pytest.mark.parametrize(("which", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_run_of_another_variant_is_refused(kept, which, changes, message):
    with pytest.raises(ValueError, match=message):
        results.load(EXPERIMENTS[which[0]], kept(*which, **changes))


def test_a_run_on_another_corpus_is_refused(kept, tmp_path):
    kept("arithmetic", "smollm2", 0)
    with pytest.raises(ValueError, match="balanced_weight is no setting of the variant's corpus"):
        results.load(news.EXPERIMENT, tmp_path)


@pytest.mark.parametrize("changes", [{"label_jumps": 2}, {"steps": 6000}, {"prompt_view": "causal"}])
def test_seeds_of_different_settings_are_not_pooled(kept, changes):
    kept("arithmetic", "leaf_jumps", 0, log_every_steps=7)
    path = kept("arithmetic", "leaf_jumps", 1)
    assert len(results.load(arithmetic.EXPERIMENT, path)) == 2
    ((key, value),) = changes.items()
    kept("arithmetic", "leaf_jumps", 1, **changes)
    with pytest.raises(ValueError, match=rf"in the variant 'leaf_jumps' {key} is \w+ with seed 0, but {value} with seed 1"):
        results.load(arithmetic.EXPERIMENT, path)


def test_every_variant_has_one_panel_and_a_colour_of_its_own_there():
    for experiment in EXPERIMENTS.values():
        for variants in experiment.panels.values():
            assert len({pages.color(experiment, variant) for variant in variants}) == len(variants)
        assert sorted(variant for variants in experiment.panels.values() for variant in variants) == sorted(experiment.variants)
