"""Check the directions of imports and the sizes that are promised. What the wheel contains: test_packaging.py."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY, KERNELS, DATA = "selfspan_jax", "pallas_kernels", "data"
# Which of our packages a package may import, itself included.
MAY_IMPORT = {
    DATA: {DATA},
    KERNELS: {KERNELS},
    LIBRARY: {LIBRARY, KERNELS},
    "benchmarks": {"benchmarks", LIBRARY, KERNELS, DATA},
    "experiments": {"experiments", LIBRARY, DATA},
    "train": {"experiments", "benchmarks", LIBRARY, DATA},
    "decode": {"experiments", "benchmarks", LIBRARY, DATA},
    "selfspan": {"train", "decode", "experiments", "benchmarks", LIBRARY, DATA},
}
OURS = {*MAY_IMPORT, "tests", "notebooks"}
# Libraries that a package may not use.
MAY_NOT_USE = {
    DATA: {"jax", "jaxlib", "flax", "optax", "orbax", "torch"},
    KERNELS: {"flax", "optax", "orbax", "datasets", "torch"},
    LIBRARY: {"datasets", "torch", "pandas"},
}
# Inside the library, lowest first: a module imports modules of its own package and of the levels below, nothing beside it or above.
LEVELS = [
    {"errors", "neighbours.attending", "parallel.compiling", "parallel.context", "parallel.interrupts"},
    {"files"},
    {"spans", "attention.selectors", "neighbours.query_driven"},
    {"config", "task"},
    {"parallel.layout"},
    {"neighbours.memory", "parallel.collectives", "parallel.mesh", "parallel.memory"},
    {"model"},
    {"attention"},
    {"commands", "decoding", "parallel.distributed"},
    {"neighbours", "serving.device_pages", "serving.pages", "tiers"},
    {"serving.host_pages"},
    {"serving.running"},
    {"parallel.engine"},
    {"serving.requests"},
    {"serving.programs"},
    {"serving.scheduler"},
    {"serving.throughput"},
    {"weights", "viewing"},
    {"training"},
    {"lm"},
    {"evaluation", "serving"},
    {""},  # the package itself: the names for users
]
CORE = ["spans.py", "model.py", "attention", "decoding", "training"]  # what one reads to understand the system
MAX_CORE_LINES = 2600
MAX_COMMAND_LINES = 250  # most of them options with their help


def modules_of(root):
    """Every module of the project by its dotted name; a package goes by its own name."""
    files = [root / f"{name}.py" for name in ("selfspan", "train", "decode")]
    files += sorted(file for name in MAY_IMPORT for file in (root / name).rglob("*.py"))
    found = {}
    for file in files:
        if file.exists():
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file, modules):
    """Yield the dotted names that a file imports, wherever in it; of ours, the module that a name comes from."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


MODULES = modules_of(ROOT)
IMPORTS = {name: set(imports(file, MODULES)) for name, file in MODULES.items()}


def package(name):
    return name.partition(".")[0]


def level(name):
    """The index in LEVELS of a module of the library, and which entry it belongs to."""
    inner = name.removeprefix(LIBRARY).removeprefix(".")
    for index, entries in enumerate(LEVELS):
        for entry in entries:
            if inner == entry or (entry and inner.startswith(f"{entry}.")):
                return index, entry
    raise AssertionError(f"{name} has no level")


def edges(graph):
    """(importer, imported) between our own modules, without those of a module to itself."""
    return {(name, found) for name, targets in graph.items() for found in targets if found in graph and found != name}


def against_levels(pairs):
    wrong = set()
    for importer, imported in pairs:
        if package(importer) == package(imported) == LIBRARY and imported != f"{LIBRARY}.parallel":
            (here, own), (there, other) = level(importer), level(imported)
            if there > here or (there == here and own != other):
                wrong.add((importer, imported))
    return wrong


def cycle(graph):
    """One circle of imports, as a list of names, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        found = next(filter(None, map(visit, sorted(t for t in graph[name] if t in graph and t != name))), None)
        path.pop()
        done.add(name)
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_package_imports_only_what_is_below_it(name):
    members = [module for module in MODULES if package(module) == name]
    assert members
    for module in members:
        tops = set(map(package, IMPORTS[module]))
        assert tops & OURS <= MAY_IMPORT[name], f"{module} imports {sorted(tops & OURS - MAY_IMPORT[name])}"
        assert not tops & MAY_NOT_USE.get(name, set()), f"{module} uses {sorted(tops & MAY_NOT_USE[name])}"


def test_modules_of_the_library_import_only_lower_levels():
    assert against_levels(edges(IMPORTS)) == set()


def test_every_level_is_a_module_or_a_package():
    for entry in set().union(*LEVELS):
        assert f"{LIBRARY}.{entry}".rstrip(".") in MODULES, entry


def test_no_module_imports_itself_through_others():
    assert cycle(IMPORTS) is None


def test_the_checks_see_what_they_are_for(tmp_path):
    """Imports inside functions and under TYPE_CHECKING count; an import upwards, one beside, and a circle are found."""
    (tmp_path / "decode.py").write_text(
        "if TYPE_CHECKING:\n    from data import vocab\ndef f():\n    import jax.numpy\n    from data.vocab import NUMBERS\n"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "vocab.py").touch()
    assert set(imports(tmp_path / "decode.py", modules_of(tmp_path))) == {"data.vocab", "jax.numpy"}
    up, beside = (f"{LIBRARY}.spans", f"{LIBRARY}.config"), (f"{LIBRARY}.weights.lora", f"{LIBRARY}.viewing")
    within, down = (f"{LIBRARY}.training.loop", f"{LIBRARY}.training.step"), (f"{LIBRARY}.lm", f"{LIBRARY}.spans")
    assert against_levels({up, beside, within, down}) == {up, beside}
    assert cycle({"a": {"b"}, "b": {"c", "numpy"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def without_encoding(source):
    """Return the lines on which a file or a pipe becomes text in the machine's encoding, since none is named."""
    wrong = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        method, function = getattr(call.func, "attr", None), getattr(call.func, "id", None)
        owner = getattr(getattr(call.func, "value", None), "id", None)
        words = [value.value for value in (*call.args, *(keyword.value for keyword in call.keywords)) if isinstance(value, ast.Constant)]
        named = "utf-8" in words or any(keyword.arg == "encoding" for keyword in call.keywords)
        is_text = not any(isinstance(word, str) and re.fullmatch(r"[rwax+]*b[+]?", word) for word in words)
        if method in ("read_text", "write_text"):
            unnamed = not named and owner != "files"  # ours, in UTF-8
        elif "open" in (method, function):
            unnamed = not named and is_text and owner not in ("os", "Image", "_ADAPTER", "_MODEL")
        else:
            unnamed = any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords) and not named
        wrong += [call.lineno] if unnamed else []
    return sorted(wrong)


def test_text_is_read_and_written_in_an_encoding_that_is_named():
    """Python's default depends on the machine: ASCII under LC_ALL=C, another one on Windows."""
    for file in MODULES.values():
        assert not without_encoding(file.read_text(encoding="utf-8")), file
    bad = 'open(f)\nf.open("w")\nf.read_text()\nPath(f).write_text("b")\nopen(f, mode="r+")\nrun(c, text=True)\n'
    good = 'open(f, "rb")\nfiles.read_text(f)\nf.write_text(x, encoding="utf-8")\nopen(f, encoding="utf-8")\nf.open("ab")\n'
    good += 'f.read_text("utf-8")\n'
    assert without_encoding(bad) == [1, 2, 3, 4, 5, 6] and without_encoding(good) == []


@pytest.mark.parametrize("command", ["selfspan.py", "train.py", "decode.py"])
def test_command_lines_stay_small(command):
    assert len((ROOT / command).read_text().splitlines()) < MAX_COMMAND_LINES


def test_the_core_stays_readable():
    paths = [ROOT / LIBRARY / name for name in CORE]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
    assert all(path.exists() for path in paths)
    assert sum(len(file.read_text().splitlines()) for file in files) <= MAX_CORE_LINES


def test_every_package_is_a_package():
    """A directory without `__init__.py` would be left out of the wheel."""
    for file in (file for name in (LIBRARY, KERNELS, DATA) for file in (ROOT / name).rglob("*.py")):
        assert (file.parent / "__init__.py").exists(), file


def test_tests_mirror_the_packages():
    """tests/A/test_b.py tests A/b.py or the package A/b; every package has a directory of tests."""
    for name in (name for name in MAY_IMPORT if (ROOT / name).is_dir()):
        assert list((ROOT / "tests" / name).rglob("test_*.py")), name
    for file in (ROOT / "tests").glob("*/**/test_*.py"):
        inner = file.relative_to(ROOT / "tests").parent / file.stem.removeprefix("test_")
        assert ".".join(inner.parts) in MODULES, file
