"""The pages under docs/ are executed: their Python, in order and in one namespace, what it prints, and their commands at toy size."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import jax
import pytest

from tests.test_readme import SMALLER, run_command

ROOT = Path(__file__).parents[1]
PAGES = ["protocol", "architecture", "models", "adding-a-corpus", "adding-an-attention-policy", "measuring", "limits", "arithmetic", "news"]
PAGES += ["multi-gpu"]  # its commands for several processes: test_distributed.py
RAN_ELSEWHERE = ["kernel", "linear", "decode", "training"]  # pages of figures; their snippets and commands want a GPU
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    """(language, text) of every block of a page, in order."""
    return FENCE.findall((ROOT / "docs" / f"{page}.md").read_text())


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory in which a page's relative paths lead somewhere that may be written to."""
    for name in ("checkpoints", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_page_is_run_or_named():
    assert {file.stem for file in (ROOT / "docs").glob("*.md")} <= {*PAGES, *RAN_ELSEWHERE}


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_and_prints_what_the_page_shows(page, workplace):
    names, printed = {}, None
    for language, text in blocks(page):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output, jax.numpy_dtype_promotion("standard"):
                exec(compile(text, f"docs/{page}.md", "exec"), names)
            printed = output.getvalue()
        elif language == "text" and printed is not None:
            assert text == printed
            printed = None
    assert not printed  # what is printed is shown


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, workplace, monkeypatch):
    if page == "multi-gpu" and jax.device_count() < 8:
        pytest.skip("needs 8 devices of one kind")
    for line in (line for language, text in blocks(page) if language == "sh" for line in text.splitlines()):
        words = shlex.split(line.partition("  #")[0])
        main, smaller = SMALLER[words[2] if words[1] == "-m" else words[1]]
        arguments = words[3:] if words[1] == "-m" else words[2:]
        smaller = smaller if "--num-examples" in arguments or words[1] != "decode.py" else []
        run_command(monkeypatch, main, [*arguments, *smaller], line)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", text)):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target
    for name in re.findall(r"`((?:selfspan_jax|pallas_kernels|data|tests|notebooks)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_rooms_of_the_architecture_are_the_modules():
    """Every module of selfspan_jax has its line, and no line is left of one that is gone."""
    (table,) = re.findall(r"\| module of .*?\n\n", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    named = set(re.findall(r"`(\w+\*?)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:] if line)))
    modules = {file.stem for file in (ROOT / "selfspan_jax").glob("*.py")} - {"__init__"}
    starred = {name.removesuffix("*") for name in named if name.endswith("*")}
    assert {module for module in modules if module not in named and not module.startswith(tuple(starred))} == set()
    assert {name for name in named if not name.endswith("*")} <= modules
