"""The README is executed: its Python, its commands (at toy size), and the output that it shows."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import decode
import train
from benchmarks import prompt_attention
from benchmarks import span_decode as bench
from data import __main__ as data_command
from tests.test_commands import TOY

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What is appended to a command so that it takes seconds instead of minutes; the last value of an option wins.
SMALLER = {
    "train.py": (train.main, TOY),
    "decode.py": (decode.main, ["--num-examples", "4"]),
    "data": (data_command.main, ["--num-examples", "30"]),
    "benchmarks.span_decode": (bench.main, ["--help"]),  # it wants a GPU, or minutes
    "benchmarks.prompt_attention": (prompt_attention.main, ["--help"]),
}


def run_command(monkeypatch, main, arguments, line):
    """Runs a command's main as a user would, with JAX's own type promotion; `line` is what the documentation says."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    try:
        with jax.numpy_dtype_promotion("standard"):
            main()
    except SystemExit as exit:
        assert not exit.code, line


def parse_command(monkeypatch, main, arguments, line):
    """Parse a command as its main does, with every check of its options, and stop before it does anything."""
    parsed = []

    def keep(command, *_):
        parsed.append(command)

    with monkeypatch.context() as patch:
        for command in (decode.Generate, decode.Eval, decode.Bench, decode.Serve):
            patch.setattr(command, "run", keep)
        patch.setattr(train, "train", keep)
        patch.setattr(data_command, "write", keep)
        run_command(patch, main, arguments, line)
    assert len(parsed) == 1, line


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    """Every command of the README's shell blocks, in order."""
    return [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory in which the README's relative paths lead somewhere that may be written to."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_the_readme_runs(workplace):
    (source,) = blocks("python")
    names = {}
    exec(compile(source, "README.md", "exec"), names)
    assert names["out"].answer == "-159" and (workplace / "mask.png").exists()


def test_the_output_of_the_readme_is_the_output(workplace, monkeypatch, capsys):
    (block,) = blocks("console")
    command, _, expected = block.partition("\n")
    monkeypatch.setattr(sys, "argv", shlex.split(command.removeprefix("$ python ")))
    decode.main()
    assert capsys.readouterr().out == expected


def test_the_commands_of_the_readme_run(workplace, monkeypatch):
    for line in commands():
        words = shlex.split(line)
        if words[0] == "make":
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
            continue
        main, smaller = SMALLER[words[1]]
        if "--ops" in words:  # for which a GPU is wanted
            smaller = [*smaller, "--ops", "3", "--batch-size", "4"]
        run_command(monkeypatch, main, [*words[2:], *smaller], line)
    assert (workplace / "runs" / "tiny" / "model").exists() and (workplace / "runs" / "eval.json").exists()


def test_the_way_from_a_file_to_a_server_is_understood(workplace, monkeypatch):
    """Its corpus is written; what needs a language model is parsed."""
    row = {"document": "Snow fell. It was deep.", "steps": [{"text": "Deep snow."}]}
    rows = [json.dumps(row | {"document": f"{number} {row['document']}"}) for number in range(30)]
    Path("reports.jsonl").write_text("\n".join(rows))
    first, *others = (shlex.split(line) for line in blocks("bash")[0].splitlines())
    run_command(monkeypatch, data_command.main, [*first[3:], "--vocab-tokens", "300"], first)
    for _, program, *arguments in others:
        parse_command(monkeypatch, SMALLER[program][0], arguments, program)
    assert first[-1] == others[0][others[0].index("--data") + 1] == others[1][others[1].index("--data") + 1] and len(others) == 3


@pytest.mark.parametrize("page", ["README.md", "docs/figures.md"])
def test_the_commands_beside_figures_are_understood(page, monkeypatch):
    """They want a GPU or minutes, so their options are parsed, and what they would run is not."""
    lines = re.findall(r"`(python (?:train|decode)\.py [^`]+|python -m (?:data|benchmarks)[^`]+)`", (ROOT / page).read_text())
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line)
        name, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
        if not name.startswith("benchmarks") and not {"DIR", "MODEL"} & {*arguments}:
            parse_command(monkeypatch, SMALLER[name][0], arguments, line)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_files_that_are_named_are_there(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    if page == "CONTRIBUTING.md":
        paths = re.findall(r"`((?:selfspan_jax|pallas_kernels|data|tests|experiments|benchmarks)/[\w/.]*)`", text)
        assert len(paths) > 10 and all((ROOT / path).exists() for path in paths)


def test_the_readme_stays_short_and_its_tree_is_there():
    assert len(README.split()) <= 700
    (tree,) = (block for block in blocks("text") if "selfspan_jax/" in block)
    names = [name for line in tree.splitlines() for name in re.findall(r"^(?:[\w./]+  ?)+", line)[0].split()]
    assert len(names) >= 12 and all((ROOT / name).exists() for name in names)


def test_the_commands_for_contributors_are_there():
    """Every `make` of CONTRIBUTING.md and of the workflow has its target; the hooks are what `make lint types` runs."""
    pages = [ROOT / "CONTRIBUTING.md", ROOT / ".github" / "workflows" / "ci.yml", ROOT / ".ci" / "run"]
    targets = {
        word for page in pages for line in re.findall(r"^.*?\bmake ([a-z -]+)", page.read_text(), re.MULTILINE) for word in line.split()
    }
    assert {"environment", "test", "lint", "types", "check", "test-next", "demo"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    hooks = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(hooks) == 3 and all(f"$(BIN)/{hook}" in makefile for hook in hooks)
    subprocess.run(["make", "--dry-run", "environment", "check", "test", "test-next"], cwd=ROOT, check=True, capture_output=True)
