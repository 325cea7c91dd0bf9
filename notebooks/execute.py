"""Run the notebooks and store what they print, cleared of what tells about the machine.

python notebooks/execute.py            all of them, in place
python notebooks/execute.py 1_look     one of them
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(notebook: nbformat.NotebookNode, timeout_seconds: int = 600) -> nbformat.NotebookNode:
    """Run a notebook in a fresh kernel of this Python, from this directory. Raises what a cell raises."""
    resources = {"metadata": {"path": str(HERE)}}
    return NotebookClient(notebook, kernel_name="python3", timeout=timeout_seconds, resources=resources, record_timing=False).execute()


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a notebook without counts, kernels and versions, progress and warnings."""
    notebook.metadata = {"language_info": {"name": "python"}}
    number = 0
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index}", {}
        if cell.cell_type == "code":
            number += 1
            cell.execution_count = number
            printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
            shown = [output for output in cell.outputs if output.output_type != "stream"]
            for output in shown:
                output.metadata = {}
                if output.output_type == "execute_result":
                    output.execution_count = number
            cell.outputs = ([nbformat.v4.new_output("stream", text=printed)] if printed else []) + shown
    return notebook


def main() -> None:
    files = [HERE / f"{Path(name).stem}.ipynb" for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for file in files:
        nbformat.write(clean(execute(nbformat.read(file, as_version=4))), file)
        print(f"{file.name}: {file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
