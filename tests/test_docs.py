"""The pages under docs/ are executed: their Python, in order and in one namespace, what it prints, and their commands at toy size."""

import ast
import contextlib
import dataclasses
import errno
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
from pathlib import Path

import jax
import pytest
from flax import nnx

import decode
import train
from data import arithmetic
from data.__main__ import main as data_main
from selfspan_jax.config import PRESETS
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab
from selfspan_jax.weights.models import save_model
from tests.test_architecture import MODULES
from tests.test_commands import TOY
from tests.test_readme import SMALLER, parse_command, run_command

ROOT = Path(__file__).parents[1]
RAN_ELSEWHERE = [
    "kernel",
    "kernel-figures",
    "linear",
    "linear-figures",
    "decode",
    "decode-figures",
    "training",
]  # pages of figures; their snippets and commands want a GPU
ALL_PAGES = sorted(file.stem for file in (ROOT / "docs").glob("*.md"))
PAGES = [page for page in ALL_PAGES if page not in RAN_ELSEWHERE]  # of "figures" commands are parsed: test_readme.py
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


# Each policy compiles two programs of the shipped model; test_engine.py has the ones that are built in. Each place is read four times.
FEWER = {
    "adding-an-attention-policy": ("(Span(), Dense(), Window(), Blocks(), Blocks(8))", "(Blocks(),)"),
    "arithmetic-figures": ("in (6, 14):", "in (14,):"),
}


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_and_prints_what_the_page_shows(page, workplace):
    names, printed = {}, None
    for language, text in blocks(page):
        if language == "python":
            text = text.replace(*FEWER.get(page, ("", "")))
            with contextlib.redirect_stdout(io.StringIO()) as output, jax.numpy_dtype_promotion("standard"):
                exec(compile(text, f"docs/{page}.md", "exec"), names)
            printed = output.getvalue()
        elif language == "text" and printed is not None:
            lines = printed.splitlines()
            assert text == printed or (page in FEWER and [line for line in text.splitlines() if line in lines] == lines)
            printed = None
    assert not printed  # what is printed is shown


def commands(page, language):
    """(main, arguments, line) of each Python command in a page's blocks of a language; variables before it are left out."""
    for line in (line.partition("  #")[0] for found, text in blocks(page) if found == language for line in text.splitlines()):
        if "python" in (words := shlex.split(line)):
            words = words[words.index("python") + 1 :]
            words = words[1:] if words[0] == "-m" else words
            yield SMALLER[words[0]][0], words[1:], line


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """The shipped models of expressions with one layer, not trained: to compile for them takes a fraction of the time."""
    directory, task = tmp_path_factory.mktemp("shallow"), arithmetic.ArithmeticTask()
    for name in ("arithmetic-tiny", "arithmetic-small"):
        config = dataclasses.replace(PRESETS[name].model, num_layers=1)
        model = Decoder(config, vocab=SpanVocab(**task.vocab.span_ids()), vocab_size=task.vocab.size, rngs=nnx.Rngs(0))
        save_model(directory / name, model, task.to_json(), "")
    return directory


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, workplace, shallow, monkeypatch):
    """Those that generate, write corpora or show help; train.py, evaluations and benchmarks run in test_readme.py and test_commands.py."""
    (workplace / "checkpoints").unlink()
    (workplace / "checkpoints").symlink_to(shallow)
    if page == "multi-gpu" and jax.device_count() < 8:
        pytest.skip("needs 8 devices of one kind")
    for main, arguments, line in commands(page, "sh"):
        if main is data_main:
            run_command(monkeypatch, main, [*arguments, "--num-examples", "30"], line)
        elif main in (train.main, decode.main) and arguments[0] != "generate" and "--help" not in arguments:
            parse_command(monkeypatch, main, arguments, line)
        else:  # a model that is not trained does not end
            few = ["--max-new-tokens", "16"] if main is decode.main and "--help" not in arguments else []
            run_command(monkeypatch, main, [*arguments, *few], line)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices of one kind")
def test_the_launch_lines_of_one_machine_run(workplace, monkeypatch, capsys):
    """The bash lines of multi-gpu.md that want several GPUs of one process; 8 devices are here, as the rehearsal asks for.

    Benchmarks on a mesh run in test_commands.py; those of several processes in parallel/test_distributed.py.
    """
    sizes = [*TOY, "--batch-size", "8", "--num-heads", "2", "--num-kv-heads", "2", "--steps", "4"]
    seen = []
    for main, arguments, line in itertools.chain(*(commands(page, "bash") for page in ("multi-gpu", "multi-gpu-figures"))):
        capsys.readouterr()
        if "--hosts" in arguments:
            seen.append("several")
        elif main is decode.main:
            parse_command(monkeypatch, main, arguments, line)
            seen.append("bench")
        elif "--time-steps" in arguments:
            run_command(monkeypatch, main, [*arguments, *sizes, "--time-steps", "1"], line)
            figures = json.loads(Path(arguments[arguments.index("--run-dir") + 1], "throughput.json").read_text())
            mesh = arguments[arguments.index("--mesh") + 1]
            assert ",".join(f"{axis}={size}" for axis, size in figures["mesh"].items() if size > 1) == mesh
            seen.append("timed")
        else:
            assert line.startswith("JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python")
            run_command(monkeypatch, main, [*arguments, *sizes], line)
            assert "steps on 8 x cpu (data=2,fsdp=2,tensor=2)" in capsys.readouterr().out
            seen.append("rehearsal")
    assert sorted(seen) == ["bench"] * 3 + ["rehearsal"] + ["several"] * 3 + ["timed"] * 2


def headings(file):
    """The anchors of a page's headings."""
    lines = re.findall(r"^#+ (.*)", FENCE.sub("", file.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line).lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", text)):
        file, _, anchor = target.partition("#")
        where = ROOT / "docs" / (file or f"{page}.md")
        assert target.startswith("https://") or where.exists(), target
        assert not anchor or target.startswith("https://") or anchor in headings(where), target
    for name in re.findall(r"`((?:selfspan_jax|pallas_kernels|data|tests|notebooks)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name


def messages():
    """Yield every text of the sources, with a gap in it for each value that is filled in."""
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    said = [message for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for message in re.findall(r"`([^`]+)`", row)]
    known, ours = {os.strerror(number) for number in errno.errorcode}, "\n".join(messages())
    assert len(said) > 20
    for message in said:
        pattern = ".*".join(map(re.escape, message.split("...")))
        assert message in known or re.search(pattern, ours), message


def test_the_reference_is_that_of_the_docstrings():
    spec = importlib.util.spec_from_file_location("write_api", ROOT / "docs" / "api.py")
    assert spec and spec.loader
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == api.page(), "python docs/api.py writes it again"


def test_the_tree_of_the_architecture_is_the_tree():
    """Every module of our packages has its place in the page, and nothing is named that is gone."""
    tree = next(text for language, text in blocks("architecture") if text.startswith("selfspan_jax/"))
    named, inner = set(), ""
    for line in filter(None, tree.splitlines()):
        indent, words = len(line) - len(line.lstrip()), re.match(r" *((?:[\w/]+(?:  ?|$))+)", line)[1].split("  ")
        names = [name.strip() for name in words if re.fullmatch(r"\w+/?", name.strip())]
        if indent == 0:
            package, inner = names[0], ""
            continue
        inner = inner if indent == 4 else ""
        named |= {f"{package}{inner}{name}" for name in names}
        if indent == 2 and names[0].endswith("/"):
            inner = names[0]
    found = set()
    for name in ("selfspan_jax", "data", "pallas_kernels", "benchmarks", "experiments"):
        for file in (ROOT / name).rglob("*.py"):
            inside = file.relative_to(ROOT).with_suffix("")
            if file.stem == "__init__":
                found |= {f"{inside.parent}/"} if inside.parent.name != name else set()
            elif name == "selfspan_jax" or inside.parent.name == name:
                found |= {str(inside)} if file.stem != "__main__" else set()
    assert named == found
