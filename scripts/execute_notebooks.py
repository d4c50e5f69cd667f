"""Run notebooks in place and store their outputs, without widget state or machine details.

    python scripts/execute_notebooks.py notebooks/00_naive.ipynb ...

The stored notebook then holds what `pytest --nbval` compares with, and what a reader sees on a page.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

KERNEL = {"display_name": "stepengine", "language": "python", "name": "python3"}


def execute(path: Path, timeout: int = 300) -> float:
    """Execute one notebook; seconds it took. Raises at the first cell that fails (unless tagged)."""
    notebook = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return time.perf_counter() - began


if __name__ == "__main__":
    for name in sys.argv[1:]:
        seconds = execute(Path(name))
        print(f"{name}: {seconds:.0f} s, {Path(name).stat().st_size / 1e3:.0f} kB")
