"""The command lines: what they print, what they write, and what they say when the user is wrong."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import decode
import train
from benchmarks import peers
from data import arithmetic, news
from data.__main__ import main as data_main
from selfspan_jax import SpanLM, files
from selfspan_jax.config import ModelConfig
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import memory
from selfspan_jax.spans import SpanVocab
from selfspan_jax.weights import models
from selfspan_jax.weights.models import save_model
from tests.selfspan_jax.weights import test_importing

ROOT = Path(__file__).parents[1]
CHECKPOINT = "checkpoints/arithmetic-tiny"
TOY_OPTIONS = {
    **{"--steps": 12, "--warmup-steps": 2, "--batch-size": 2, "--sequence-tokens": 128, "--max-ops": 3},
    **{"--hidden-size": 32, "--intermediate-size": 32, "--num-layers": 1, "--num-heads": 2, "--num-kv-heads": 1, "--head-size": 16},
    **{"--checkpoint-every-steps": 4, "--log-every-steps": 1, "--eval-examples": 0, "--workers": 0},
}
TOY = [str(word) for option in TOY_OPTIONS.items() for word in option]

several = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices of one kind")


LOAD, LOADED = SpanLM.load, {}


def load(directory, *tasks, **options):
    """`SpanLM.load`, of the shipped model once with each choice of options: loading is tested in test_lm.py."""
    if str(directory) != CHECKPOINT:
        return LOAD(directory, *tasks, **options)
    if (key := repr(options)) not in LOADED:
        LOADED[key] = LOAD(directory, *tasks, **options)
    return LOADED[key]


@pytest.fixture
def call(call, monkeypatch):
    """Run a command as tests/conftest.py's fixture does, from the repository root."""
    monkeypatch.setattr(SpanLM, "load", load)
    monkeypatch.setattr(arithmetic.Corpus, "chunk_examples", 64)  # a run of few steps takes no more

    def run(main, *arguments):
        monkeypatch.chdir(ROOT)
        return call(main, *arguments)

    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished model of one layer with the words of arithmetic, for what does not depend on what a model knows."""
    task = arithmetic.ArithmeticTask()
    sizes = dict(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_kv_heads=2, head_size=8)
    config = ModelConfig(**sizes, compute_dtype="float32")
    model = Decoder(config, vocab=SpanVocab(**task.vocab.span_ids()), vocab_size=task.vocab.size, rngs=nnx.Rngs(0))
    directory = tmp_path_factory.mktemp("benchmarked") / "small"
    save_model(directory, model, task.to_json(), "")
    return directory


def test_generate_shows_the_steps_and_what_each_one_read(call, tmp_path):
    status, out, err = call(
        decode.main, "generate", CHECKPOINT, "((51+75)-(95*3))", "--stream", "--stop", "<seg:4>", "--max-new-tokens", 64,
        "--json", tmp_path / "out.json", "--plot", tmp_path / "mask.png", "--html", tmp_path / "page.html",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert out.startswith("<seg:1>51+75=126<seg:2>95*3=285<seg:3><ref:1><ref:2>126-285=-159<eos>\n")  # streamed
    assert re.search(r"^<3> +<1> <2> +126-285=-159 +\d+\.\d$", out, re.MULTILINE)
    assert "((51+75)-(95*3)) = -159   (all 3 steps and spans are right)" in out
    assert re.search(r"attended: \d+\.\d tokens, \d+\.\d% of the context   dense decoding: \d+\.\d tokens, 100%", out)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["answer"] == "-159" and written["steps"][2]["refs"] == [1, 2]
    assert len(written["num_attended"]) == len(written["token_ids"]) - written["prompt_tokens"]
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>") and "126-285=-159" in re.sub(r"<[^>]+>", "", page)


@pytest.mark.parametrize("several", [False, True], ids=["one", "a file of prompts"])
def test_generate_warns_before_it_decodes_and_only_once(call, tmp_path, monkeypatch, several):
    """A long prompt takes minutes on a CPU: who asked for another attention than the model learned is told before."""
    (tmp_path / "prompts.txt").write_text("1+2\n3+4\n")
    prompts = ["--prompts", tmp_path / "prompts.txt"] if several else ["1+2"]
    command = ["generate", CHECKPOINT, *prompts, "--attention", "dense", "--max-new-tokens", 32]
    warning = "warning: Decoded with dense attention, trained with span: another computation than it learned.\n"
    status, out, err = call(decode.main, *command)
    assert (status, err, out.count("warning: Decoded")) == (0, "", 1) and out.startswith(warning)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(SpanLM, "generate", interrupted)
    assert call(decode.main, *command)[1] == warning


def test_a_model_of_others_continues_text(call, tmp_path):
    """A Hugging Face directory goes through the same commands; what only makes sense for expressions says so."""
    shutil.copytree(ROOT / "tests/selfspan_jax/recorded/llama", tmp_path / "model")
    test_importing.tokenizer().save_pretrained(tmp_path / "model")
    status, out, err = call(decode.main, "generate", tmp_path / "model", "abc j", "--max-new-tokens", 8, "--weights", "int8")
    assert (status, err) == (0, "") and out.splitlines()[1].startswith("abc j") and "100.0% of the context" in out
    assert out.startswith("warning: The response was stopped before it had ended; tokens written: 8. A higher limit gives more.\n")
    status, _, err = call(decode.main, "eval", tmp_path / "model", "--num-examples", 2)
    assert status == 2 and re.fullmatch(r"error: .*model: its task has no examples, so there is nothing to score\n", err)


def test_generate_takes_a_file_of_prompts(call, tmp_path):
    """Each response has its own warnings and verdict; what is cut short cannot be right; a prompt that is none is told by its line."""
    prompts, written = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("((51+75)-(95*3))\n\n123456*7\n((51+75)-(95*3))+(8*(4+16))\n")
    status, out, err = call(decode.main, "generate", CHECKPOINT, "--prompts", prompts, "--max-new-tokens", 64, "--json", written)
    assert (status, err) == (0, "")
    first, second, third = re.split(r"\n\n\[[23]/3\] .*\n", out)
    assert first.startswith("[1/3] ((51+75)-(95*3))\nstep ") and "warning" not in first and "(all 3 steps and spans are right)" in first
    assert second.startswith("warning: 123456 is beyond what the model was trained on") and "\nWRONG: 123456*7 = " in second
    assert re.match("warning: The response was stopped .* tokens written: 64. A higher limit", third)
    assert "STOPPED: ((51+75)-(95*3))+(8*(4+16)) = (no answer)   (step 6" in third and "are right" not in third
    right, wrong, _ = json.loads(written.read_text())["responses"]
    assert right["verdict"]["answer_right"] and not right["warnings"] and len(wrong["warnings"]) == 2
    assert wrong["verdict"]["answer_right"] is False and wrong["verdict"]["message"] in second
    one = ["((51+75)-(95*3))", "--stop", "<seg:3>", "--max-new-tokens", 64]
    status, out, _ = call(decode.main, "generate", CHECKPOINT, *one, "--json", written)
    assert status == 0 and "\nSTOPPED: ((51+75)-(95*3)) = (no answer)   (step 3: missing)\n" in out  # the value of step 2 is none
    assert json.loads(written.read_text())["answer"] is None and "warning: The response was stopped before its answer, by the stop" in out
    prompts.write_text("1+2\n\n(3+\n")
    status, _, err = call(decode.main, "generate", CHECKPOINT, "--prompts", prompts)
    assert status == 2 and re.fullmatch(r"error: .*prompts\.txt: line 3, '\(3\+': column 4: .*\n", err)


def test_eval_reports_by_number_of_operators(call, tmp_path):
    file = tmp_path / "eval.json"
    status, out, _ = call(decode.main, "eval", CHECKPOINT, "--num-examples", 8, "--min-ops", 2, "--max-ops", 3, "--json", file)
    assert status == 0 and re.search(r"right answers per second of prefill and decoding, [\d.]+ with the reading of .*, batch 8", out)
    scores = json.loads(file.read_text())
    assert scores["num_examples"] == 8 == sum(row["num_examples"] for row in scores["by_ops"].values())
    assert set(scores["by_ops"]) <= {"2", "3"} and scores["step_accuracy"] == 1.0 and scores["first_errors"] == {}
    low, high = scores["by_ops"]["2"]["step_accuracy_interval"]
    assert low < 0.9 and high == pytest.approx(1.0)
    assert scores["checkpoint"] == "arithmetic-tiny" and scores["attention"] == "span" and scores["decode_seconds"] > 0


@pytest.fixture(scope="module")
def expressions(tmp_path_factory):
    """A corpus directory of expressions, among them one of more tokens than the shipped model's context."""
    directory = tmp_path_factory.mktemp("corpora") / "mine"
    data_main(["arithmetic", "--num-examples", "3", "--min-ops", "2", "--max-ops", "2", "--out", str(directory), "--workers", "0"])
    return directory


@contextlib.contextmanager
def descriptor_to(number, file):
    """Let an open descriptor write to a file, as a shell's N>FILE does."""
    before = os.dup(number)
    with file.open("wb") as opened:
        os.dup2(opened.fileno(), number)
    yield
    os.dup2(before, number)
    os.close(before)


def test_eval_of_a_corpus_directory(call, small, tmp_path, expressions):
    """The JSON has what was evaluated and no settings of fresh examples; on standard output it stands alone."""
    with descriptor_to(1, tmp_path / "stdout"):
        status, out, err = call(decode.main, "eval", small, "--data", expressions, "--json", "-")
    found = json.loads((tmp_path / "stdout").read_text())
    assert (status, out) == (0, "") and "\nmine: " in err and "operators  examples" in err and "mine operators" not in err
    assert (found["data"], found["split"], found["num_examples"], list(found["sets"]), list(found["by_ops"])) == (
        "mine",
        "train",
        3,
        ["mine"],
        ["2"],
    )
    assert not {"seed", "ops", "min_ops", "max_ops", "batch_sizes"} & found.keys() and found["not_run"] == []
    (warning,) = found["warnings"]
    assert "is the train split: the model may have been trained on these examples" in warning and f"warning: {warning}\n" in err
    assert err.index(f"warning: {warning}\n") < err.index("decoding 3 examples: prompts of ") < err.rindex(warning)
    assert found["sets"]["mine"]["verdicts"]["all_right"] == found["verdicts"]["all_right"] <= 3
    assert found["task"]["task"] == "arithmetic" and found["max_context_tokens"] == 2048 and "vocab" not in found["task"]

    for option, value in (("--ops", "3"), ("--min-ops", "2"), ("--max-ops", "2"), ("--seed", "1")):  # its own defaults too
        status, out, err = call(decode.main, "eval", CHECKPOINT, "--data", expressions, option, value)
        assert (status, out) == (2, "") and err == f"error: {option} is for fresh examples, not for those of --data {expressions}\n"
    status, _, err = call(decode.main, "eval", CHECKPOINT, "--data", expressions, "--split", "test")
    assert status == 2 and err == f"error: {expressions} has no test split: there is train\n"


def test_results_are_kept_when_nobody_reads_the_table(call, small, tmp_path, expressions, monkeypatch):
    file = tmp_path / "eval.json"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["decode.py", "eval", str(small), "--data", str(expressions), "--json", str(file)])
        patch.setattr(sys, "stdout", stdout)
        with contextlib.suppress(BrokenPipeError, SystemExit), jax.numpy_dtype_promotion("standard"):
            decode.main()
        with contextlib.suppress(BrokenPipeError):
            stdout.close()
    assert json.loads(file.read_text())["num_examples"] == 3


def test_the_table_is_shown_when_its_json_cannot_be_written(call, small, tmp_path, expressions, monkeypatch):
    """A disk that fills up while the model decodes."""
    monkeypatch.setattr(files, "write_json", lambda file, value: files.write_bytes(tmp_path, b""))
    status, out, err = call(decode.main, "eval", small, "--data", expressions, "--json", tmp_path / "eval.json")
    assert status == 2 and "\nmine: " in out and err.endswith(f"\nerror: {tmp_path} cannot be written: Is a directory\n")


def test_eval_at_several_batch_sizes(call, small, tmp_path):
    """Several numbers of operators: test_a_control_trains_and_is_evaluated."""
    file = tmp_path / "eval.json"
    arguments = ["--num-examples", 4, "--ops", "4", "--batch-size", "2,4", "--passes", 2, "--seed", 3, "--json", file]
    status, out, _ = call(decode.main, "eval", small, *arguments)
    assert status == 0 and out.count("right answers per second") == 2
    found = json.loads(file.read_text())
    assert list(found["by_ops"]) == list(found["sets"]) == ["4"]
    own = found["sets"]["4"]
    assert [speed["batch_size"] for speed in own["by_batch_size"]] == [2, 4]
    assert own["problems_per_second"] == max(speed["problems_per_second"] for speed in own["by_batch_size"])
    assert own["num_examples"] == found["num_examples"] == 4 and found["seed"] == 3 and found["passes"] == 2


BENCH = ["--batch-size", "2", "--context", "96", "--steps", "8", "--attention", "dense,span"]


def test_bench_writes_a_row_for_each_configuration(call, small, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "missing_reason", lambda: "torch not installed")
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    status, out, err = call(
        decode.main, "bench", small, *BENCH, "--weights", "bf16,int8", "--peers", "hf-eager", "--json", file, "--plot", picture
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "peers not run: torch not installed" in out and "read ceiling" in out
    report = json.loads(file.read_text())
    assert report["workload"] == "arithmetic" and report["read_ceiling_terabytes_per_second"] > 0
    expected = [(int8, 2, policy) for int8 in (False, True) for policy in ("dense", "span")]
    assert [(row["int8"], row["batch_size"], row["attention"]) for row in report["rows"]] == expected
    promised = {
        "ms_per_step", "tokens_per_second", "attended_tokens", "attended_fraction", "bytes_per_step", "roofline_ms", "percent_of_roofline",
        "speedup_over_dense", "time_to_first_token_ms", "kv_memory_bytes", "program_memory_bytes", "compile_seconds",
    }  # fmt: skip
    assert all(promised <= row.keys() for row in report["rows"])
    table = out.splitlines()[-5:]
    assert table[0].split()[:3] == ["batch", "context", "ms/step"] and table[-1].split()[:4] == ["span", "int8", "2", "96"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_times_prefill(call, small, tmp_path):
    """Each length and policy has a row; prompts longer than the labels last, and options of decode steps, are refused."""
    file, picture = tmp_path / "prefill.json", tmp_path / "prefill.png"
    sizes = ["--batch-size", "2", "--context", "40,90", "--attention", "span,dense"]
    status, out, err = call(decode.main, "bench", small, "--prefill", *sizes, "--json", file, "--plot", picture)
    assert (status, err) == (0, "")
    report = json.loads(file.read_text())
    assert report["workload"] == "arithmetic" and report["plan"]["prefill"] and report["plan"]["seed"] == 0 and report["versions"]["jax"]
    assert [(row["context_tokens"], row["attention"]) for row in report["rows"]] == [
        (n, name) for n in (40, 90) for name in ("dense", "span")
    ]
    promised = {
        "time_to_first_token_ms", "spread_ms", "num_tokens", "tokens_per_second", "allowed_pairs", "allowed_fraction", "model_flops",
        "model_flops_per_second", "percent_of_peak", "kv_memory_bytes", "argument_memory_bytes", "temporary_memory_bytes",
        "program_memory_bytes", "speedup_over_dense", "compile_seconds",
    }  # fmt: skip
    assert all(promised <= row.keys() for row in report["rows"])
    assert out.splitlines()[-5].split()[:4] == ["batch", "context", "first", "token"] and picture.read_bytes().startswith(b"\x89PNG")


def test_bench_skips_what_does_not_fit_and_streams(call, small, monkeypatch):
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: 20 * 2**20)
    arguments = ["--batch-size", "1,500", "--context", "96", "--steps", "8", "--attention", "span", "--stream-check"]
    status, out, err = call(decode.main, "bench", small, *arguments)
    assert (status, err) == (0, "")
    streamed, skipped = out.splitlines()[-2:]
    assert streamed.split()[:4] == ["span", "streamed", "1", "96"] and ("against one loop" in streamed or "ended its response" in streamed)
    assert skipped.split()[:3] == ["span", "500", "96"] and "not run: does not fit: needs" in skipped


@several
def test_decoding_on_a_mesh_says_what_one_device_says(call, small, tmp_path):
    """The same scores, and a benchmark whose bytes are those of one device. Tokens: test_layout.py, `generate`: test_docs.py."""
    found = []
    for mesh in ([], ["--mesh", "data=2,tensor=2"]):
        arguments = ["--num-examples", 5, "--ops", "2", "--batch-size", 4, "--json", tmp_path / "found.json", *mesh]
        status, _, err = call(decode.main, "eval", small, *arguments)
        assert status == 0, err
        found.append(json.loads((tmp_path / "found.json").read_text()))
    same = [name for name in found[0] if name in ("num_examples", "attended_fraction", "attended_tokens") or "accuracy" in name]
    assert len(same) >= 6 and all(found[0][name] == found[1][name] for name in same)
    options = [*BENCH, "--attention", "span", "--mesh", "context=2,tensor=2"]
    status, out, err = call(decode.main, "bench", small, *options, "--json", tmp_path / "bench.json")
    assert (status, err) == (0, "") and out.startswith("4 x cpu (context=2,tensor=2)")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["attention"] for row in rows] == ["span"] and rows[0]["roofline_ms"] > 0


def damaged(tmp_path):
    directory = tmp_path / "damaged"
    directory.mkdir()
    for file in (ROOT / CHECKPOINT).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(255, np.float32)
    save_file(tensors, directory / "model.safetensors")
    return directory


DECODE_ERRORS = {
    "no expression": (["generate", CHECKPOINT, "(1+2"], 'column 1: found "(" that is never closed'),
    "stray character": (["generate", CHECKPOINT, "1+x"], "column 3"),
    "too many operators": (["generate", CHECKPOINT, "+".join("1" * 600)], "labels"),
    "before what is warned of": (["generate", CHECKPOINT, "1+200", "--attention", "memory"], "--attention is 'memory', the model was"),
    "too long": (["generate", CHECKPOINT, "+".join(["11111"] * 300)], "the model's context is 2048"),
    "too many new tokens": (["generate", CHECKPOINT, "1+2", "--max-new-tokens", "5000"], "context of 2048 tokens"),
    "unknown checkpoint": (["generate", "checkpoints/none", "1+2"], "checkpoints/none: no such checkpoint directory"),
    "not a checkpoint": (["generate", "tests", "1+2"], "tests: not a checkpoint, config.json is missing"),
    "unknown attention": (["generate", CHECKPOINT, "1+2", "--attention", "full"], "full"),
    "no such option": (["generate", CHECKPOINT, "1+2", "--atention", "span"], "--atention"),
    "no such picture": (["generate", CHECKPOINT, "1+2", "--plot", "mask.xyz"], "allowed: names that end in .png, .svg or .pdf"),
    "temperature": (["generate", CHECKPOINT, "1+2", "--temperature", "-1"], "--temperature is -1.0"),
    "top-k": (["generate", CHECKPOINT, "1+2", "--top-k", "-1"], "--top-k is -1"),
    "the same samples": (["generate", CHECKPOINT, "1+2", "--num-samples", "2"], "--num-samples is for a temperature above 0"),
    "a page of several": (
        ["generate", CHECKPOINT, "1+2", "--num-samples", "2", "--temperature", "1", "--html", "x.html"],
        "--html is for one response: leave out --num-samples",
    ),
    "a prompt and a file": (["generate", CHECKPOINT, "1+2", "--prompts", "x.txt"], "give exactly one of these: a prompt"),
    "no tokens": (["generate", CHECKPOINT, "1+2", "--max-new-tokens", "0"], "--max-new-tokens is 0; allowed"),
    "a batch of none": (["generate", CHECKPOINT, "1+2", "--batch-size", "0"], "--batch-size is 0"),
    "a seed below the range": (["generate", CHECKPOINT, "1+2", "--seed", "-1"], "--seed is -1; allowed: whole numbers from 0 to 2**63 - 1"),
    "an empty stop string": (["generate", CHECKPOINT, "1+2", "--stop", ""], "--stop is ('',); allowed"),
    "no examples": (["eval", CHECKPOINT, "--num-examples", "0"], "--num-examples is 0"),
    "a split of nothing": (["eval", CHECKPOINT, "--split", "test"], "--split is of a corpus directory: give one with --data"),
    "operators twice": (["eval", CHECKPOINT, "--ops", "3", "--max-ops", "4"], "leave out --min-ops and --max-ops"),
    "a directory for a file": (["eval", CHECKPOINT, "--json", "tests"], "--json is tests, which cannot be written: Is a directory"),
    "a page into a directory": (["generate", CHECKPOINT, "1+2", "--html", "tests"], "--html is tests, which cannot be written"),
    "below a file": (
        ["bench", CHECKPOINT, "--json", "train.py/a.json"],
        "--json is train.py/a.json, which cannot be written: Not a directory",
    ),
    "a picture into a directory": (["bench", CHECKPOINT, "--plot", "/proc/a.png"], "--plot is /proc/a.png, which cannot be written"),
    "one file for two": (["generate", CHECKPOINT, "1+2", "--json", "-", "--html", "-"], "--html is -, as is json: give each"),
    "no operators": (["eval", CHECKPOINT, "--ops", "0"], "--min-ops is 0 and --max-ops 0"),
    "nothing to time": (["bench"], "give either a checkpoint or --shape"),
    "twice the same": (["bench", CHECKPOINT, "--shape", "llama2-7b"], "give either a checkpoint or --shape"),
    "unknown shape": (["bench", "--shape", "llama9"], "llama9"),
    "unknown policy": (["bench", CHECKPOINT, "--attention", "dense,full"], "full"),
    "no number": (["bench", CHECKPOINT, "--batch-size", "1,x"], "batch-size"),
    "no such peer": (["bench", CHECKPOINT, "--peers", "vllm"], "vllm"),
    "one of several numbers": (["bench", CHECKPOINT, "--batch-size", "1,0"], "--batch-size is 0; allowed: 1 and above"),
    "working sets without host memory": (
        ["bench", CHECKPOINT, "--working-set-tokens", "128"],
        "--working-set-tokens is 128, but --kv-memory is 'device', which has no working sets",
    ),
    "keys of host memory": (
        ["bench", CHECKPOINT, "--attention", "dense,quest", "--kv-memory", "device,host"],
        "--attention is 'quest', which looks at all keys: --kv-memory='host' is not for it",
    ),
    "a working set of one token": (
        ["bench", CHECKPOINT, "--kv-memory", "host", "--working-set-tokens", "1"],
        "--working-set-tokens is 1; allowed: 2 and above",
    ),
    "a memory that no layer has": (["bench", CHECKPOINT, "--attention", "span,memory"], "--attention is 'memory', the model was trained"),
    "a share of expressions": (["bench", CHECKPOINT, "--attended-fraction", "0.9"], "--attended-fraction is for --workload segments"),
    "pieces of expressions": (["bench", CHECKPOINT, "--named-again", "2"], "--named-again is for --workload segments"),
    "steps of a prefill": (["bench", CHECKPOINT, "--prefill", "--steps", "8"], "--steps is for decode steps: leave it out with --prefill"),
    "a prefill of a step's peer": (
        ["bench", CHECKPOINT, "--prefill", "--peers", "hf-eager"],
        "--peers has hf-eager; allowed with --prefill",
    ),
    "odd steps": (["bench", CHECKPOINT, "--steps", "7"], "--steps is 7"),
    "context beyond the model's": (["bench", CHECKPOINT, "--context", "4096"], "the model's context is 2048"),
    "no such share": (
        ["bench", CHECKPOINT, "--workload", "segments", "--context", "512", "--attended-fraction", "0.99"],
        "--attended-fraction is 0.99",
    ),
    "no picture of a benchmark": (["bench", CHECKPOINT, "--plot", "bench.txt"], "--plot is bench.txt"),
    "no labels": (["eval", CHECKPOINT, "--ops", "600"], "512 labels allow at most 511"),
}


MESH_ERRORS = {
    "no such mesh": (["generate", CHECKPOINT, "1+2", "--mesh", "heads=2"], "no axis 'heads'"),
    "devices missing": (["eval", CHECKPOINT, "--mesh", "data=64"], "takes 64 devices, here are 8"),
    "sequences do not divide": (["eval", CHECKPOINT, "--batch-size", "3", "--mesh", "data=2"], "data=2 does not divide --batch-size=3"),
    "heads do not divide": (["bench", CHECKPOINT, "--mesh", "tensor=4"], "tensor=4 does not divide num_kv_heads=2"),
    "mesh for training": (["bench", CHECKPOINT, "--mesh", "fsdp=2"], "fsdp is for training"),
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [pytest.param(*case, id=name) for name, case in DECODE_ERRORS.items()]
    + [pytest.param(*case, id=name, marks=several) for name, case in MESH_ERRORS.items()],
)
def test_what_the_user_of_decode_got_wrong_is_said_in_one_line(call, arguments, message):
    status, out, err = call(decode.main, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_checkpoint_whose_tensors_do_not_fit_is_refused(call, tmp_path):
    status, _, err = call(decode.main, "generate", damaged(tmp_path), "1+2")
    assert status == 2 and "model.norm.weight is [255], but the config asks for [256]" in err and err.count("\n") == 1


def test_a_run_stops_in_time_goes_on_by_the_same_command_and_finishes(call, tmp_path):
    first, whole = tmp_path / "first", tmp_path / "whole"
    status, out, _ = call(train.main, "arithmetic-tiny", "--run-dir", first, *TOY, "--stop-after-seconds", 0)
    assert (
        status == 0
        and out.splitlines()[-1] == "stopped after step 1 of 12, a checkpoint is saved: the same command goes on"
        and not (first / "model").exists()
    )
    status, _, err = call(train.main, "arithmetic-tiny", "--run-dir", first, *TOY, "--seed", 4)
    assert status == 2 and "holds a run of another config: --seed is 0 there, 4 here" in err
    for run_dir in (first, whole):
        status, out, _ = call(train.main, "arithmetic-tiny", "--run-dir", run_dir, *TOY)
        assert status == 0 and out.splitlines()[-1] == f"finished: {run_dir / 'model'}"
    models = [(run_dir / "model" / "model.safetensors").read_bytes() for run_dir in (first, whole)]
    assert models[0] == models[1]
    card = (whole / "model" / "README.md").read_text()
    assert "python train.py arithmetic-tiny --run-dir .../whole --steps 12" in card and str(tmp_path) not in card
    status, out, _ = call(train.main, "arithmetic-tiny", "--run-dir", whole, *TOY)
    assert status == 0 and "this run is finished" in out


@several
def test_a_run_on_a_mesh_goes_on_without_one(call, tmp_path):
    """The mesh is how a run is computed, not what it is; the finished model is one file whatever the mesh was."""
    options = [*TOY, "--batch-size", 4, "--num-kv-heads", 2]
    first, second = tmp_path / "first", tmp_path / "second"
    command = [train.main, "arithmetic-tiny", "--run-dir"]
    status, out, err = call(*command, first, *options, "--mesh", "data=2,tensor=2", "--stop-after-seconds", 0)
    assert status == 0 and "steps on 4 x cpu (data=2,tensor=2)" in out and out.splitlines()[-1].startswith("stopped after step 1"), err
    status, out, err = call(*command, first, *options, "--eval-examples", 0)
    assert status == 0 and "steps on cpu" in out, err
    assert call(*command, second, *options, "--mesh", "fsdp=2,data=2")[0] == 0
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (first, second)]
    np.testing.assert_allclose(*losses, rtol=2e-2)  # bfloat16
    shapes = [{name: x.shape for name, x in load_file(run / "model" / "model.safetensors").items()} for run in (first, second)]
    assert shapes[0] == shapes[1]


@several
@pytest.mark.parametrize(
    "mesh, message",
    [
        ("model=2", "no axis 'model'; allowed: data, fsdp, context, tensor"),
        ("data=64", "takes 64 devices, here are 8 (cpu)"),
        ("tensor=2", "tensor=2 does not divide num_kv_heads=1"),
        ("fsdp=3", "fsdp=3 does not divide hidden_size=32"),
        ("data=4", "data=4 does not divide rows of an accumulation step=2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line_before_anything_is_written(call, tmp_path, mesh, message):
    status, _, err = call(train.main, "arithmetic-tiny", "--run-dir", tmp_path / "run", *TOY, "--mesh", mesh)
    assert status == 2 and err.startswith("error: mesh") and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", [["--mask", "dense", "--labelling", "plain"], ["--labelling", "none", "--header-view", "all"]], ids=["plain", "untagged"]
)
def test_a_control_trains_and_is_evaluated(call, tmp_path, options):
    """One command line a variant, from the data to the scores."""
    status, _, err = call(train.main, "arithmetic-small", "--run-dir", tmp_path / "run", *TOY, *options)
    assert status == 0, err
    file = tmp_path / "eval.json"
    arguments = ["--num-examples", 2, "--ops", "2,3", "--batch-size", 2, "--json", file]
    status, out, err = call(decode.main, "eval", tmp_path / "run" / "model", *arguments)
    assert status == 0, err
    found = json.loads(file.read_text())
    assert found["attention"] == ("dense" if "dense" in options else "span") and list(found["sets"]) == ["2", "3"]
    assert "answers" in out and sum(found["first_errors"].values()) == 4 * (1 - found["step_accuracy"])


def test_training_on_a_corpus_directory(call, tmp_path):
    """What is said of it is what its card says; it is known by its content, and the run can be extended."""
    corpus = ["arithmetic", "--num-examples", 30, "--min-ops", 2, "--max-ops", 3, "--out", tmp_path / "corpus", "--seed"]
    assert call(data_main, *corpus, 0)[0] == 0
    command = [train.main, "arithmetic-tiny", "--run-dir", tmp_path / "run", "--data", tmp_path / "corpus", *TOY, "--eval-examples", 2]
    status, out, err = call(*command)
    assert status == 0 and "will be seen" not in out, err
    card = json.loads((tmp_path / "corpus" / "card.json").read_text())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["corpus"] == card["distributions"]
    assert written_task(tmp_path / "run") == card["task"]
    readme = (tmp_path / "run" / "model" / "README.md").read_text()
    texts = [
        "selfspan on the 30 examples of corpus (split train)",
        "Operands had one or two digits",
        "fresh expressions of 2 to 3 operators",
        "step accuracy: 0",
    ]
    assert all(text in readme for text in texts) and str(tmp_path) not in readme

    model = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    status, out, err = call(*command, "--steps", 14)
    assert status == 0 and "resuming from step 12 of 14" in out, err
    assert "--steps was 12 up to step 12: from there on the learning rate follows the schedule of 14 steps" in out
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() != model
    readme = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "14 steps of 2 x 128 tokens" in readme and "From step 12 on the learning rate follows the schedule of 14 steps." in readme
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 15))

    for words, how in (
        (["news-small"], "`custom --data` trains on any"),
        (["finetune-lora", "--corpus", "news"], "leave --corpus news out"),
    ):
        status, _, err = call(train.main, *words, "--run-dir", tmp_path / "new", "--data", tmp_path / "corpus")
        assert status == 2 and err == f"error: --data: {tmp_path / 'corpus'} is a corpus of arithmetic, not of news: {how}\n"

    shutil.rmtree(tmp_path / "corpus")
    assert call(data_main, *corpus, 1)[0] == 0
    status, _, err = call(*command, "--steps", 14)
    assert status == 2 and "the content of --data is " in err and err.count("\n") == 1
    status, _, err = call(*command, "--label-jumps", 0)
    assert status == 2 and "--label-jumps is 0, but 3 in" in err and err.count("\n") == 1


def test_what_the_user_of_train_got_wrong_is_said_in_one_line(call, tmp_path):
    run_dir = tmp_path / "run"
    assert call(train.main, "arithmetic-tiny", "--run-dir", run_dir, *TOY)[0] == 0
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    (tmp_path / "papers").mkdir()
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "run.json").write_text('{"steps": 5}')
    (tmp_path / "papers" / "thesis.tex").write_text("x")
    errors = {
        "unknown preset": (["arithmetic-huge", "--run-dir", tmp_path / "a"], "arithmetic-huge"),
        "no run directory": (["arithmetic-tiny"], "--run-dir"),
        "another config": (["arithmetic-tiny", "--run-dir", run_dir, *TOY, "--seed", 5], "another config: --seed is 0 there, 5 here"),
        "another packing": (["arithmetic-tiny", "--run-dir", run_dir, *TOY, "--data-parts", 2], "--data-parts is 1 there, 2 here"),
        "parts that do not divide": (["arithmetic-tiny", "--run-dir", tmp_path / "a", *TOY, "--data-parts", 3], "divisors of --batch"),
        "no such hosts": (["arithmetic-tiny", "--run-dir", tmp_path / "a", *TOY, "--hosts", "node1"], "allowed: auto, or HOST:PORT,N,I"),
        "another mask": (["arithmetic-tiny", "--run-dir", run_dir, *TOY, "--mask", "dense"], "mask is 'span' there, 'dense' here"),
        "a directory of something else": (["arithmetic-tiny", "--run-dir", tmp_path / "papers", *TOY], "not a run directory"),
        "a run of another version": (["arithmetic-tiny", "--run-dir", tmp_path / "older", *TOY], "not written by this version"),
        "no corpus": (["arithmetic-tiny", "--run-dir", tmp_path / "a", "--data", tmp_path / "none", *TOY], "no such directory"),
        "not a corpus": (["arithmetic-tiny", "--run-dir", tmp_path / "a", "--data", tmp_path / "papers", *TOY], "not a corpus directory"),
        "impossible": (["arithmetic-tiny", "--run-dir", tmp_path / "a", *TOY, "--num-kv-heads", 3], "--num-kv-heads is 3"),
        "rows too short": (["arithmetic-tiny", "--run-dir", tmp_path / "b", *TOY, "--sequence-tokens", 16], "a row only 16"),
    }
    for name, (arguments, message) in errors.items():
        status, _, err = call(train.main, *arguments)
        assert status == 2, name
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err, (name, err)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("main", [train.main, decode.main])
def test_help_is_help(call, main):
    status, out, err = call(main, "--help")
    assert (status, err) == (0, "") and "usage" in out


def test_every_option_of_train_has_a_default_and_its_meaning(call):
    status, out, _ = call(train.main, "arithmetic-small", "--help")
    assert status == 0
    for name in ("mask", "labelling", "prompt-view", "header-view", "gap-scales", "steps", "seed", "data", "learning-rate", "remat"):
        assert f"--{name}" in out
    options = re.findall(r"^\W*(--[a-z][a-z0-9-]+)", out, re.MULTILINE)
    assert len(options) >= len(dataclasses.fields(train.TrainConfig))
    assert len(re.findall("[(]default:|[(]optional", out)) >= len(options) - 1
    plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    without_help = re.findall(r"(--[\w-]+) (?:[{][^}]*[}]\S*|[A-Z]+|\[[^]]*\])* ?\((?:default|optional|required)", plain)
    assert not without_help


@pytest.mark.slow
def test_a_killed_run_ends_bit_identical_to_an_uninterrupted_one(call, tmp_path):
    """A real process, killed without warning in mid-run, and with data workers of its own; it goes on in this one."""
    arguments = ["arithmetic-tiny", *TOY, "--steps", "40", "--workers", "1", "--checkpoint-every-steps", "7", "--run-dir"]

    def steps_of(run_dir):
        file = run_dir / "metrics.jsonl"
        return [json.loads(line)["step"] for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, _, err = call(train.main, *arguments, whole)
    assert status == 0, err
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # as in this process
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments, str(parts)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    while len(there := steps_of(parts)) < 10 and process.poll() is None:
        time.sleep(0.002 if there else 0.1)  # a process takes seconds to begin
    process.send_signal(signal.SIGKILL)
    assert process.wait(300) == -signal.SIGKILL
    assert not (parts / "model").exists() and max(steps_of(parts)) < 40
    status, _, err = call(train.main, *arguments, parts)
    assert status == 0, err
    assert steps_of(parts) == steps_of(whole) == list(range(1, 41))
    assert (parts / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, parts)]
    for expected, found in zip(*logs):
        assert (expected["loss"], expected["gradient_norm"]) == (found["loss"], found["gradient_norm"])


NEWS_OPTIONS = {
    **{name: TOY_OPTIONS[name] for name in TOY_OPTIONS if name not in ("--sequence-tokens", "--max-ops", "--checkpoint-every-steps")},
    **{"--steps": 4, "--max-events": 2, "--max-distractors": 0, "--num-labels": 48, "--vocab-tokens": 400},
}


def test_a_model_of_news_is_trained_scored_and_asked(call, tmp_path):
    """The same commands for another task: from training to the sources of a summary."""
    run, data, page = tmp_path / "run", tmp_path / "corpus", tmp_path / "page.html"
    options = [*(word for option in NEWS_OPTIONS.items() for word in option), "--header-view", "labels", "--closed-pieces"]
    status, out, err = call(train.main, "news-small", "--run-dir", run, *options)
    assert status == 0 and "finished" in out, err
    assert "synthetic articles of 2 to 2 events" in (run / "model" / "README.md").read_text()
    sizes = ["--num-examples", "4", "--max-events", "2", "--max-distractors", "0", "--vocab-tokens", "400", "--num-labels", "48"]
    data_main(["news", *sizes, "--split", "test", "--out", str(data)])
    arguments = ["--num-examples", 2, "--batch-size", 2, "--data", data, "--json", tmp_path / "eval.json"]
    status, out, err = call(decode.main, "eval", run / "model", *arguments)
    assert status == 0 and out.startswith("2 summaries (span attention)") and "\nROUGE " in out, err
    written = json.loads((tmp_path / "eval.json").read_text())
    assert {"rouge1", "rougeL", "fact_accuracy", "span_precision", "attended_fraction_body", "summaries_per_second"} <= written.keys()
    _, fresh, drawn = decode.Eval(checkpoint=run / "model", num_examples=3).examples(news.NewsTask.from_json(written_task(run)))
    assert list(fresh) == ["synthetic"] and len(fresh["synthetic"]) == 3 and drawn == {"seed": 1}
    *_, last, solve = fresh["synthetic"][0].prompt_ids
    assert last == solve + 1 + len(fresh["synthetic"][0].story.article)  # the last `<seg:k>` once more, in ids after `<solve>`

    article = ["--article", "docs/article.txt", "--max-new-tokens", 8, "--html", page]
    status, out, err = call(decode.main, "generate", run / "model", *article)
    (line,) = re.findall(r"^attended: .* of the context \(.*\)$", out, re.MULTILINE)
    assert status == 0 and line in page.read_text() and "Norwick" in page.read_text().replace("</span>", ""), err

    texts = {"bad.txt": b"\xff\xfe", "long.txt": b"It rained. " * 60, "empty.txt": b"\n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    for arguments, message in (
        (["generate", run / "model", "--article", tmp_path / "bad.txt"], "is not text in UTF-8"),
        (["generate", run / "model", "--article", tmp_path / "long.txt"], "the text has 60 sentences, but the model has room for 46: "),
        (["generate", run / "model", "--article", tmp_path / "empty.txt"], "the article has no sentence"),
        (["generate", run / "model", "--article", tmp_path / "none.txt"], "No such file"),
        (["generate", run / "model"], "give exactly one of these: a prompt, --article, --prompts"),
        (["eval", run / "model", "--ops", "2"], "--ops is for fresh expressions, not for news"),
        (["eval", CHECKPOINT, "--data", data], "is a corpus of news; allowed: arithmetic"),
    ):
        status, _, err = call(decode.main, *arguments)
        assert status == 2 and err.startswith("error: ") and message in err and len(err.splitlines()) == 1, err


def written_task(run):
    return files.read_json(models.vocab_file(run / "model"))
