"""The Colab cell: in every notebook, harmless elsewhere, and what it would do on Colab (which no test reaches)."""

import subprocess
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.setup.conftest import load_script

ROOT = Path(__file__).resolve().parents[2]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def script() -> ModuleType:
    return load_script("colab_cell")


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_each_notebook_has_the_current_cell(script: ModuleType, path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell for cell in cells if script.TAG in cell.metadata.get("tags", [])]
    assert [cell.source for cell in tagged] == [script.current_source()], "run scripts/colab_cell.py"
    assert tagged[0] is next(cell for cell in cells if cell.cell_type == "code") and cells[0].cell_type == "markdown"
    assert tagged[0].metadata.jupyter.source_hidden and tagged[0].outputs == []


def _book() -> Any:
    result = new_output("execute_result", data={"text/plain": "2"}, execution_count=1)
    cells = [new_markdown_cell("# Title"), new_code_cell("1 + 1", execution_count=1, outputs=[result])]
    return new_notebook(cells=[*cells, new_code_cell("", execution_count=None)])


def test_a_second_run_changes_nothing(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    nbformat.write(_book(), path)
    script.main([str(path)])
    once = path.read_bytes()
    script.main([str(path)])
    assert path.read_bytes() == once
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.get("execution_count") for cell in cells] == [None, 1, 2, None]
    assert cells[2].outputs[0].execution_count == 2 and cells[2].outputs[0].data == {"text/plain": "2"}


def test_an_old_cell_is_replaced(script: ModuleType) -> None:
    book = script.with_cell(_book(), "old = 1")
    book = script.with_cell(book, "new = 1")
    assert [cell.source for cell in book.cells] == ["# Title", "new = 1", "1 + 1", ""]


def test_outside_of_colab_it_does_nothing(script: ModuleType) -> None:
    names: dict[str, Any] = {}
    exec(script.current_source(), names)
    assert set(names) - {"__builtins__"} == {"sys"}


@pytest.mark.parametrize(
    ("project", "wheels", "installed"),
    [
        ({"urls": {"Repository": "https://example.org/x/stepengine"}}, [], "git+https://example.org/x/stepengine"),
        ({}, ["stepengine-0.1-py3-none-any.whl"], "stepengine-0.1-py3-none-any.whl"),
        ({}, [], None),
    ],
)
def test_on_colab_it_installs_or_says_what_to_upload(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    project: dict[str, Any],
    wheels: list[str],
    installed: str | None,
) -> None:
    done: list[Any] = []
    colab = types.ModuleType("google.colab")
    colab.output = types.SimpleNamespace(enable_custom_widget_manager=lambda: done.append("widgets"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setattr(subprocess, "run", lambda command, check: done.append(command[-1]))
    monkeypatch.chdir(tmp_path)
    for name in wheels:
        (tmp_path / name).touch()
    source = script.cell_source(project)
    if installed is None:
        with pytest.raises(AssertionError, match="Upload the wheel"):
            exec(source, {})
        assert done == []
    else:
        exec(source, {})
        assert done == [installed, "widgets"]
