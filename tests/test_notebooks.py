"""Run the notebooks from top to bottom in a kernel; what is stored of them is small and says nothing of a machine."""

import importlib.util
import re
from pathlib import Path

import jax
import nbformat
import pytest

HERE = Path(__file__).parents[1] / "notebooks"
FILES = sorted(HERE.glob("*.ipynb"))
spec = importlib.util.spec_from_file_location("execute", HERE / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


def printed(notebook):
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stdout")


def shown(notebook, mime):
    return [output.data[mime] for cell in notebook.cells for output in cell.get("outputs", []) if mime in output.get("data", {})]


# What takes the time at no optimization is made smaller; what the whole takes is stored in the notebooks.
SMALLER = {
    "(6, 6), (12, 12)": "(3, 3), (4, 4)",
    "steps=300": "steps=30",
    '("llama2-7b", "llama3-8b", "smollm2-135m")': '("smollm2-135m",)',
    "Decoder(preset.model,": "Decoder(dataclasses.replace(preset.model, num_layers=1),",
}


@pytest.fixture(scope="module")
def run():
    """All of them in one kernel, which imports JAX and the library once; each begins in an empty namespace."""
    notebooks = {file.stem: nbformat.read(file, as_version=4) for file in FILES}
    merged = nbformat.v4.new_notebook()
    for notebook in notebooks.values():
        merged.cells += [nbformat.v4.new_code_cell("%reset -f"), *notebook.cells]
    for number, cell in enumerate(merged.cells):
        cell.id = f"cell-{number}"
        for large, small in SMALLER.items():
            cell.source = cell.source.replace(large, small)
    execute.execute(merged)
    return notebooks.__getitem__


def test_there_are_four():
    assert [file.stem for file in FILES] == ["1_look", "2_train", "3_your_own_task", "4_speed"]


@pytest.mark.slow
def test_looking(run):
    notebook = run("1_look")
    assert printed(notebook).count("steps and spans are right") == 6
    assert "('1', 1)" in shown(notebook, "text/plain")
    (page,) = shown(notebook, "text/html")
    assert page.startswith('<section class="selfspan"') and page.count('role="option"') == 6
    assert len(shown(notebook, "image/png")) == 2


@pytest.mark.slow
def test_training(run):
    notebook = run("2_train")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+) at step 1, ([\d.]+) at step 20", printed(notebook))[0]]
    assert losses[1] < 0.75 * losses[0]
    assert len(shown(notebook, "text/html")) == 1 and len(shown(notebook, "image/png")) == 1


@pytest.mark.slow
def test_a_task_of_ones_own(run):
    """It learns its task, as what is stored shows, and the task takes less than forty lines."""
    assert "run cat sees owl" in printed(nbformat.read(HERE / "3_your_own_task.ipynb", as_version=4))
    notebook = run("3_your_own_task")
    losses = [float(loss) for loss in re.findall(r"step (?:1|30): loss ([\d.]+)", printed(notebook))]
    assert losses[1] < 0.9 * losses[0] and len(shown(notebook, "text/html")) == len(shown(notebook, "image/png")) == 1
    (task,) = [cell.source for cell in notebook.cells if "class Backwards" in cell.source and cell.cell_type == "code"]
    assert len([line for line in task.splitlines() if line.strip()]) < 40


@pytest.mark.slow
def test_speed_figures(run):
    notebook = run("4_speed")
    text = printed(notebook)
    assert "197 cases" in text and "of the read ceiling" in text and "kv heads" in text
    assert ("skipped: no GPU here" in text) == (jax.default_backend() != "gpu")
    assert len(shown(notebook, "image/png")) == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_stored_is_small_and_tells_no_machine(file):
    notebook = nbformat.read(file, as_version=4)
    assert execute.clean(nbformat.read(file, as_version=4)) == notebook  # as `python notebooks/execute.py` writes it
    assert file.stat().st_size < 300_000
    text = "\n".join([printed(notebook), *shown(notebook, "text/plain"), *shown(notebook, "text/html")])
    assert not re.search(r"(?<![<\w])/(home|root|tmp|work|Users|usr)\b|site-packages|Warning", text)
    assert all(output.output_type != "error" for cell in notebook.cells for output in cell.get("outputs", []))
    assert any(cell.get("outputs") for cell in notebook.cells)


def test_machine_detail_does_not_survive_cleaning():
    cell = nbformat.v4.new_code_cell("1", metadata={"execution": {"start": "now"}}, execution_count=7)
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="a"),
        nbformat.v4.new_output("stream", name="stderr", text="/home/someone/lib.py:3: UserWarning"),
        nbformat.v4.new_output("stream", name="stdout", text="b"),
        nbformat.v4.new_output("execute_result", {"text/plain": "1"}, execution_count=7, metadata={"needs_background": "light"}),
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[cell],
        metadata={"kernelspec": {"name": "mine", "display_name": "Mine"}, "language_info": {"name": "python", "version": "3.11.7"}},
    )
    (cleaned,) = execute.clean(notebook).cells
    assert printed(notebook) == "ab" and [output.output_type for output in cleaned.outputs] == ["stream", "execute_result"]
    assert (cleaned.metadata, cleaned.execution_count, cleaned.outputs[1].execution_count, cleaned.outputs[1].metadata) == ({}, 1, 1, {})
    assert notebook.metadata == {"language_info": {"name": "python"}}
