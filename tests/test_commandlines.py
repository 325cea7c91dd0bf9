"""What holds of every command line: options say what they are, wrong ones are one line, any encoding and reader of the output will do."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import decode
import train
from data import __main__ as data_command
from data.examples import unread
from data.tasks import TASKS
from selfspan_jax.config import PRESETS, TunedAttention

ROOT = Path(__file__).parents[1]
CHECKPOINT = "checkpoints/arithmetic-tiny"
COMMANDS = {
    **{("decode.py", name): decode.main for name in decode.COMMANDS},
    **{("train.py", name): train.main for name in (*PRESETS, "custom", "finetune-lora", "finetune-full")},
    **{("data", name): data_command.main for name in TASKS},
}
every_command = pytest.mark.parametrize(("program", "name"), COMMANDS, ids=map(" ".join, COMMANDS))


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command line in this process: its status, and what it printed."""

    def run(program, name, *words, without_name=False):
        monkeypatch.setattr(sys, "argv", [program, *words] if without_name else [program, name, *words])
        monkeypatch.setenv("COLUMNS", "100")
        status = 0
        try:
            COMMANDS[program, name]()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def options(text):
    """Yield the names and the help of each option from the text that `--help` prints."""
    for entry in re.split(r"\n(?=[ │]{1,4}\S)", text):
        if found := re.match(r"[ │]*(--[a-z].*?)(?:  +|\n| (?=\((?:default|required)))(.*)", entry.replace("│", " "), re.DOTALL):
            yield found[1], " ".join(found[2].split())


@every_command
def test_every_option_says_what_it_is(call, program, name):
    """And has a default, or is required; no option hides behind a further sub-command."""
    status, out, err = call(program, name, "--help")
    assert (status, err) == (0, "") and not re.search("COMMAND|subcommands|None|''", out)
    found = dict(options(out))
    assert len(found) >= 8
    form = r"\S.{3,} \((default: .+|required|optional|repeatable)\)"
    assert [option for option, words in found.items() if not re.fullmatch(form, words)] == []
    assert "whatever the model was trained with" in found.get("--rebalance FLOAT", "whatever the model was trained with")


def test_fine_tuning_has_the_defaults_of_its_corpus_and_says_so(call, tmp_path, monkeypatch):
    """Open pieces have no table of contents, which headers that see labels alone would look at."""
    long = "8 rows of 8,192 tokens, --header-view "
    said = " ".join(call("train.py", "finetune-full", "--help")[1].split())
    short = "64 rows of 512 tokens, --header-view span"
    assert f"here arithmetic: {short}. For documents, papers, verdicts, stories, tools: {long}labels; --corpus NAME" in said
    (tmp_path / "own.jsonl").write_text('{"document": "Snow fell. It was deep.", "steps": [{"text": "deep snow"}]}\n')
    words = ["--split", "all", "--vocab-tokens", "300", "--no-closed-pieces", "--out", str(tmp_path / "open")]
    assert call("data", "documents", "--source", str(tmp_path / "own.jsonl"), *words)[0] == 0
    for more, view, line in (([], "all", "span tokens see all"), (["--header-view", "labels"], "labels", "warning: pieces are open")):
        tune = ["train.py", "finetune-lora", "--init", "x", "--run-dir", "y", "--data", str(tmp_path / "open"), *more]
        monkeypatch.setattr(sys, "argv", tune)
        run = train.parse()
        model = run.attention
        (found,) = unread(run.corpus, model)
        assert model.header_view == view and line in found and run.training.sequence_tokens == 8192
        assert [*unread(dataclasses.replace(run.corpus, closed_pieces=True), model)] == []
    assert [*unread(TASKS["news"].Corpus(), TunedAttention(header_view="all"))] == []


@pytest.mark.parametrize("option", ["solve_names", "late_instruction"])
def test_what_a_prompts_end_is_to_know_is_warned_of_where_prompts_are_read_locally(option):
    corpus, local = TASKS["documents"].Corpus(**{option: True}), TunedAttention(header_view="labels", prompt_view="local")
    (found,) = unread(corpus, local)
    assert found.startswith("warning: ") and "last 16 tokens" in found and f"--{option.replace('_', '-')}: --prompt-view causal" in found
    reading = [{"prompt_view": "causal"}, {"mask": "dense"}, {"prompt_window_tokens": corpus.max_prompt_tokens}]
    assert [[*unread(corpus, dataclasses.replace(local, **views))] for views in reading] == [[], [], []]
    assert [*unread(TASKS["documents"].Corpus(), local)] == []


def test_the_check_of_help_finds_what_is_missing():
    text = " --steps INT   Steps. (default: 3)\n --long-name INT\n               (default: 4) \n ─────\n --beta1 FLOAT (default: 0.9)\n"
    assert list(options(text)) == [
        ("--steps INT", "Steps. (default: 3)"),
        ("--long-name INT", "(default: 4)"),
        ("--beta1 FLOAT", "(default: 0.9)"),
    ]


WRONG = {
    "a misspelt command": (
        "decode.py",
        ["genrate"],
        "'genrate' is no command of decode.py; perhaps generate; allowed: generate, eval, bench, serve",
    ),
    "no command": ("data", [], "data takes a command; allowed: arithmetic, news"),
    "a misspelt preset": ("train.py", ["arithmetic-tny", "--run-dir", "x"], "perhaps arithmetic-tiny"),
    "a misspelt option": (
        "train.py",
        ["arithmetic-tiny", "--run-dir", "x", "--stps", "3"],
        "--stps is no option of train.py arithmetic-tiny; perhaps --steps",
    ),
    "more jumps than labels": ("data", ["arithmetic", "--out", "x", "--label-jumps", str(2**62)], "allowed: 0 to 512"),
    "a vocabulary that no memory holds": ("data", ["news", "--out", "x", "--vocab-tokens", str(2**62)], "allowed: 300 to 1048576"),
    "samples that no memory holds": (
        "decode.py",
        ["generate", CHECKPOINT, "1+2", "--temperature", "1", "--num-samples", str(2**62)],
        "allowed: 1 to 1048575, as rows of the cache are counted in 32 bits",
    ),
    "None is no value": ("decode.py", ["eval", CHECKPOINT, "--max-ops", "None"], "'None' is no whole number"),
    "an option with =": (
        "decode.py",
        ["eval", CHECKPOINT, "--num_example=3"],
        "--num_example is no option of decode.py eval; perhaps --num-examples",
    ),
    "an option like no other": (
        "decode.py",
        ["eval", CHECKPOINT, "--zzz"],
        "--zzz is no option of decode.py eval; see decode.py eval --help",
    ),
    "one of another command": ("decode.py", ["bench", "--ops", "3"], "--ops is no option of decode.py bench; see"),
    "one that begins as others": (
        "decode.py",
        ["eval", CHECKPOINT, "--max-new-tokens", "16"],
        "--max-new-tokens is no option of decode.py eval; see decode.py eval --help",
    ),
    "a seed beyond the range": (
        "decode.py",
        ["generate", CHECKPOINT, "1", "--seed", "9223372036854775808"],
        "--seed: '9223372036854775808' is beyond what whole numbers may be, -2**63 to 2**63 - 1",
    ),
    "a long one among several": (
        "train.py",
        ["arithmetic-tiny", "--run-dir", "x", "--gap-scales", "1", "-99999999999999999999"],
        "--gap-scales",
    ),
    "a long one with commas": (
        "decode.py",
        ["eval", CHECKPOINT, "--ops", "1,99999999999999999999"],
        "--ops: '99999999999999999999' is beyond what whole numbers may be",
    ),
    "not a number": ("decode.py", ["generate", CHECKPOINT, "1", "--temperature", "nan"], "--temperature: 'nan' is not finite"),
    "infinite": ("train.py", ["arithmetic-tiny", "--run-dir", "x", "--learning-rate", "1e999"], "--learning-rate: '1e999' is not finite"),
    "infinite, optional": ("train.py", ["arithmetic-tiny", "--run-dir", "x", "--stop-after-seconds", "inf"], "--stop-after-seconds"),
    "negative": ("data", ["arithmetic", "--out", "x", "--workers", "-1"], "workers is -1"),
    "a fraction": ("data", ["arithmetic", "--out", "x", "--seed", "1.5"], "--seed: '1.5' is no whole number"),
    "a corpus that is none": ("train.py", ["finetune-lora", "--corpus", "novels"], "--corpus is 'novels'; allowed: arithmetic, news"),
    "a choice that is none": (
        "decode.py",
        ["serve", CHECKPOINT, "--attention", "nonsense"],
        "--attention is 'nonsense'; allowed: span, dense",
    ),
    "several of which one is none": (
        "decode.py",
        ["bench", "--attention", "span,nonsense"],
        "--attention: 'nonsense' is none of span, dense",
    ),
}


@pytest.mark.parametrize(("program", "words", "expected"), [pytest.param(*case, id=name) for name, case in WRONG.items()])
def test_a_wrong_command_line_is_one_line_with_few_suggestions(call, program, words, expected):
    name = next(name for owner, name in COMMANDS if owner == program)  # of which `main` is called
    status, out, err = call(program, name, *words, without_name=True)
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert expected in err and err.count(" or ") <= 2 and "default:" not in err and "help" not in err.partition("; see ")[0]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["decode.py eval --help", "-m data arithmetic --num-examples 2 --workers 0 --out"])
def test_a_reader_that_leaves_is_no_error(words, tmp_path):
    """`| head -1`: status 141, as of a program that SIGPIPE ends, and nothing on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        words = [sys.executable, *words.split(), *([str(tmp_path / "corpus")] if "--out" in words else [])]
        done = subprocess.run(words, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=300, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "imported"),
    [
        ("decode.py generate x 1+2", "tyro"),
        ("train.py arithmetic-tiny", "tyro"),
        ("-m data arithmetic", "tyro"),
        ("selfspan.py eval x", "tyro"),
        ("selfspan.py eval x", "jax"),
    ],
)
def test_an_interrupt_while_modules_are_imported_has_no_traceback(words, imported, tmp_path):
    """A shell calls that status 130. Where it lets programs ignore Ctrl-C, as in the background, they do."""
    (tmp_path / f"{imported}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(7)\n")
    for handler, expected in ((signal.SIG_DFL, -signal.SIGINT), (signal.SIG_IGN, 7)):
        before = signal.signal(signal.SIGINT, handler)  # which a child inherits
        try:
            environment = os.environ | {"PYTHONPATH": str(tmp_path)}
            process = subprocess.Popen([sys.executable, *words.split()], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        finally:
            signal.signal(signal.SIGINT, before)
        with process:
            _, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (expected, b"")


@pytest.mark.slow
def test_in_a_locale_of_ascii_help_is_escaped():
    """LC_ALL=C without Python's UTF-8 mode: what `print` would take by itself is ASCII. Files: data/news/test_sources.py."""
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "data", "news", "--help"]
    done = subprocess.run(words, cwd=ROOT, env=ascii_only, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.isascii() and b"--source" in done.stdout
