"""Runs the notebooks and stores what they print, cleared of what tells about the machine.

python notebooks/execute.py            all of them, in place
python notebooks/execute.py 1_look     one of them
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(file: Path, timeout_seconds: int = 600) -> nbformat.NotebookNode:
    """The notebook as a fresh kernel of this Python runs it, from its own directory. Raises what a cell raises."""
    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(file.parent)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=timeout_seconds, resources=resources, record_timing=False)
    return client.execute()


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same without counts, kernels and versions, progress and warnings."""
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
        nbformat.write(clean(execute(file)), file)
        print(f"{file.name}: {file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
