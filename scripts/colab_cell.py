"""Put the Colab cell into the notebooks, or bring it up to date. It stands after the title and does nothing elsewhere.

    python scripts/colab_cell.py [NOTEBOOK ...]      (default: all in notebooks/)

Where the package comes from is written once, as `Repository` in pyproject.toml's [project.urls]. As long as that is
missing, the cell asks for an uploaded wheel. The outputs stay: a cell that does nothing changes none.
"""

import sys
import tomllib
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).resolve().parents[1]
TAG = "colab"
METADATA = {"jupyter": {"source_hidden": True}, "tags": [TAG]}
CELL = """# For Google Colab, untested there; anywhere else this cell does nothing.
import sys

if "google.colab" in sys.modules:
    import subprocess
    from glob import glob

    from google.colab import output

    source = {source}
    assert source, "{remedy}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "anywidget", *source], check=True)
    output.enable_custom_widget_manager()"""
REMEDY = "Upload the wheel that `pip wheel --no-deps .` makes in the project, and run this cell again."


def cell_source(project: dict[str, Any]) -> str:
    """The cell's code for this [project] table of pyproject.toml."""
    url = project.get("urls", {}).get("Repository")
    if url:
        return CELL.format(source=f'["git+{url}"]', remedy=REMEDY)
    return CELL.format(source='sorted(glob("stepengine-*.whl"))[-1:]', remedy=REMEDY)


def current_source() -> str:
    return cell_source(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])


def with_cell(notebook: Any, source: str) -> Any:
    """The notebook with one Colab cell, in front of its first code cell; counts and ids as after a fresh run."""
    notebook.cells = [cell for cell in notebook.cells if TAG not in cell.metadata.get("tags", [])]
    first = next((at for at, cell in enumerate(notebook.cells) if cell.cell_type == "code"), len(notebook.cells))
    notebook.cells.insert(first, new_code_cell(source, metadata=dict(METADATA)))
    count = 0
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        if cell.cell_type == "code" and cell.source.strip():
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
    return notebook


def main(names: list[str]) -> int:
    source = current_source()
    for path in map(Path, names or sorted((ROOT / "notebooks").glob("*.ipynb"))):
        before = path.read_text(encoding="utf-8")
        notebook = with_cell(nbformat.reads(before, as_version=4), source)
        nbformat.validate(notebook)
        after = nbformat.writes(notebook) + "\n"
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.name}: Colab cell written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
