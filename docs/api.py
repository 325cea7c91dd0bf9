"""Write docs/api.md, the reference of the public names, from their docstrings: `python docs/api.py`."""

import ast
import functools
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What stands on the page, in order. Of a class its public methods and properties follow it, those that it inherits from ours too.
PAGE = {
    "Models and responses": ["selfspan_jax.SpanLM", "selfspan_jax.Output", "selfspan_jax.Step", "selfspan_jax.errors.UserError"],
    "The protocol": ["selfspan_jax.spans.SpanVocab", "selfspan_jax.spans.attention_mask"],
    "Choices in decoding": [
        "selfspan_jax.config.Sampling",
        "selfspan_jax.attention.policies.Dense",
        "selfspan_jax.attention.policies.Window",
        "selfspan_jax.attention.policies.Span",
        "selfspan_jax.decoding.engine.Engine",
    ],
    "Serving": [
        "selfspan_jax.serving.scheduler.Scheduler",
        "selfspan_jax.serving.requests.Request",
        "selfspan_jax.serving.requests.Tokens",
        "selfspan_jax.serving.requests.Stats",
        "selfspan_jax.config.ServingConfig",
    ],
    "Evaluation": ["selfspan_jax.evaluation.evaluate"],
    "Pretrained models": ["selfspan_jax.weights.importing.load", "selfspan_jax.weights.huggingface.export"],
    "The decode kernel": ["pallas_kernels.span_decode_attention"],
    "Corpora and tasks": [
        "data.arithmetic.parse",
        "data.arithmetic.encode",
        "data.arithmetic.verify",
        "data.news.NewsTask",
        "data.documents.DocumentTask",
        "data.dataset.load",
        "data.task.Task",
    ],
}
HEAD = """# API reference

Made by `python docs/api.py` from docstrings; a test compares. The letters of shapes are in [architecture](architecture.md).
"""
_OURS = ("selfspan_jax", "pallas_kernels", "data")


def find(name: str) -> Any:
    """Import what a dotted name leads to."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def definition(thing: Any) -> Any:
    """Parse the source of a class or function."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    return node


def signature(name: str, thing: Any, *, bound: bool = False) -> str:
    """Write a function's signature as its source does, a line for each argument where one line is too long."""
    node = definition(thing)
    arguments = node.args
    every = arguments.posonlyargs + arguments.args
    if bound:
        del (arguments.posonlyargs or arguments.args)[0]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({ast.unparse(arguments)}){returns}"
    if len(line) <= 110 or not every:
        return line
    # A comma outside of brackets ends an argument.
    parts, depth = [""], 0
    for character in ast.unparse(arguments):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return "\n".join([f"{name}(", *(f"    {part.strip()}," for part in parts), f"){returns}"])


def escaped(text: str) -> str:
    """Keep `<seg:k>` and its like from being taken for HTML, but where they stand in code."""
    parts = text.split("`")
    return "`".join(part.replace("<", "&lt;") if index % 2 == 0 else part for index, part in enumerate(parts))


def prose(docstring: str) -> str:
    """Write a docstring as Markdown: its sections ("Args:") as lists, its indented blocks as code."""
    lines: list[str] = []
    inside = False
    for line in inspect.cleandoc(docstring).splitlines():
        if head := re.fullmatch(r"(Args|Returns|Raises|Yields|Attributes|Where):(.*)", line):
            inside = not head[2]
            lines += ["", f"*{head[1]}:*{head[2]}", *([""] if inside else [])]
        elif inside and re.match(r"  \S", line):
            name, colon, rest = line.strip().partition(":")
            lines.append(f"- `{name}`:{rest}" if colon and len(name) < 60 else f"- {line.strip()}")
        elif inside and line.startswith("    "):
            lines[-1] += f" {line.strip()}"
        else:
            inside = inside and not line.strip()
            lines.append(line)
    return escaped(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())


def function_of(member: Any) -> Any:
    """Return the function behind a method or a property; None where a member of a class is something else."""
    function = getattr(member, "__func__", getattr(member, "fget", getattr(member, "func", member)))
    return function if inspect.isfunction(function) else None


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties of a class, those of our base classes too, in the order of their definition."""
    seen: set[str] = set()
    for owner in (base for base in kind.__mro__ if base.__module__.partition(".")[0] in _OURS):
        for name, member in vars(owner).items():
            if not name.startswith("_") and name not in seen and getattr(function_of(member), "__doc__", None):
                seen.add(name)
                yield name, member


def fields(kind: type) -> Iterator[str]:
    """Yield a list entry for each public field of a class, as its source has them."""
    body = definition(kind).body
    for statement, following in zip(body, [*body[1:], None]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and not statement.target.id.startswith("_"):
            is_said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            words = f": {escaped(' '.join(str(following.value.value).split()))}" if is_said else ""
            default = f" = {ast.unparse(statement.value)}" if statement.value and not isinstance(statement.value, ast.Call) else ""
            yield f"- `{statement.target.id}: {ast.unparse(statement.annotation)}{default}`{words}"


def entry(name: str) -> Iterator[str]:
    """Yield the paragraphs about a class or function."""
    thing, short = find(name), name.rpartition(".")[2]
    yield f"### `{name}`"
    if not inspect.isclass(thing):
        yield f"```\n{signature(short, thing)}\n```"
    elif "__init__" in vars(thing) and inspect.isfunction(thing.__init__) and "__dataclass_fields__" not in vars(thing):
        yield f"```\n{signature(short, thing.__init__, bound=True)}\n```"
    yield prose(thing.__doc__ or "")
    if not inspect.isclass(thing):
        return
    if listed := list(fields(thing)):
        yield "\n".join(listed)
    for inner, member in members(thing):
        function = function_of(member)
        if isinstance(member, property | functools.cached_property):
            yield f"```\n{short}.{inner}: {ast.unparse(definition(function).returns)}\n```"
        else:
            yield f"```\n{signature(f'{short}.{inner}', function, bound=not isinstance(member, staticmethod))}\n```"
        yield prose(function.__doc__)


def page() -> str:
    """Write the whole page."""
    sections = [HEAD]
    for title, names in PAGE.items():
        sections.append(f"## {title}")
        for name in names:
            sections += entry(name)
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    (Path(__file__).parent / "api.md").write_text(page(), encoding="utf-8")
