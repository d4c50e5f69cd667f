"""Hand-outs: nothing in them that the reader is to find out, and nothing of the reader's written over."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from stepengine.errors import InvalidSetting
from stepengine.handouts import solved_exercises, strip_solutions, unanswered

ROOT = Path(__file__).resolve().parents[2]
STUB, WORKED = (
    "def slot(t, p, b):\n    return 0  # your code here",
    "def slot(t, p, b):\n    return t[p // b] * b + p % b",
)


def _write(path: Path, *sources: str) -> None:
    cells: list[Any] = [new_markdown_cell("# Title")]
    for count, source in enumerate(sources, 1):
        cells.append(new_code_cell(source, execution_count=count, outputs=[new_output("stream", text="42\n")]))
    nbformat.write(new_notebook(cells=cells, metadata={"widgets": {"state": {}}}), path)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    folder = tmp_path / "notebooks"
    (folder / "solutions").mkdir(parents=True)
    (folder / "traces").mkdir()
    (folder / "traces" / "run.jsonl").write_text("{}")
    (folder / "conftest.py").touch()
    _write(
        folder / "02a.ipynb",
        'guesses.ask("used", "How many?", guess=15.6)',
        'guesses.reveal("used", 15.6)',
        STUB,
        "print(check_slot(slot))",
        'answer = say(en="Blocks.", zh="块")',
    )
    _write(folder / "solutions" / "02a.ipynb", WORKED)
    return folder


def _sources(path: Path) -> list[str]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code")
    assert "widgets" not in notebook.metadata
    return [cell.source for cell in notebook.cells]


def test_nothing_to_be_found_out_is_in_a_hand_out(series: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert strip_solutions(series, out) == []
    assert sorted(p.name for p in out.iterdir()) == [".manifest.json", "02a.ipynb", "traces"]
    title, asked, revealed, stub, check, said = _sources(out / "02a.ipynb")
    assert asked == 'guesses.ask("used", "How many?", guess=None)'
    assert revealed == 'guesses.reveal("used", 15.6)' and stub == STUB and said.startswith("answer")
    assert (out / "traces" / "run.jsonl").read_text() == "{}"


def test_answers_can_be_left_out(series: Path, tmp_path: Path) -> None:
    strip_solutions(series, tmp_path / "out", answers=False)
    assert not any("say(" in source for source in _sources(tmp_path / "out" / "02a.ipynb"))
    assert len(_sources(tmp_path / "out" / "02a.ipynb")) == 5


def test_the_source_folder_is_left_as_it_was(series: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in series.rglob("*") if path.is_file()}
    strip_solutions(series, tmp_path / "out")
    assert {path: path.read_bytes() for path in series.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("out", [".", "out", "solutions/out"])
def test_the_source_folder_is_no_target(series: Path, out: str) -> None:
    names = sorted(series.rglob("*"))
    with pytest.raises(InvalidSetting, match="outside of it"):
        strip_solutions(series, series / out)
    assert sorted(series.rglob("*")) == names


def test_a_changed_copy_stays_unless_forced(series: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    strip_solutions(series, out)
    _write(out / "02a.ipynb", "mine")
    mine = (out / "02a.ipynb").read_bytes()
    (line,) = strip_solutions(series, out)
    assert "left as you changed it (--force" in line and (out / "02a.ipynb").read_bytes() == mine
    (line,) = strip_solutions(series, out, force=True)
    assert "overwritten" in line and "mine" not in _sources(out / "02a.ipynb")


def test_a_solved_exercise_stops_it_before_anything_is_written(series: Path, tmp_path: Path) -> None:
    _write(series / "02a.ipynb", WORKED + "  # by hand", "print(check_slot(slot))")
    assert len(solved_exercises(series / "02a.ipynb", series / "solutions" / "02a.ipynb")) == 1
    with pytest.raises(InvalidSetting, match="02a.ipynb, cell 1, holds the worked solution of slot"):
        strip_solutions(series, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{broken", json.dumps({"cells": 3})])
def test_a_broken_notebook_is_named(series: Path, tmp_path: Path, content: str) -> None:
    (series / "03.ipynb").write_text(content)
    with pytest.raises(InvalidSetting, match="03.ipynb cannot be read"):
        strip_solutions(series, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('g.ask("a", "问题?", 3)', 'g.ask("a", "问题?", None)'),
        ('g.ask("a", "q", ["x",\n "y"], choices)\nx = 1', 'g.ask("a", "q", None, choices)\nx = 1'),
        (
            'g.ask("a", "q", guess="B", choices=c); g.ask("b", "q", 2)',
            'g.ask("a", "q", guess=None, choices=c); g.ask("b", "q", None)',
        ),
        ('g.ask("a", "q", None)', 'g.ask("a", "q", None)'),
        ('g.ask("a", "q")', 'g.ask("a", "q")'),
        ('g.reveal("a", 3)', 'g.reveal("a", 3)'),
        ("%matplotlib inline", "%matplotlib inline"),
    ],
)
def test_guesses_are_taken_out(source: str, expected: str) -> None:
    assert unanswered(source) == expected


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_series_asks_without_answering(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert unanswered(cell.source) == cell.source
    assert solved_exercises(path, path.parent / "solutions" / path.name) == []


def test_the_command_writes_them_and_refuses_in_a_sentence(series: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stepengine", "strip-solutions", str(series), "-o"]
    done = subprocess.run([*command, str(tmp_path / "out"), "--no-answers"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 notebooks to hand out" in done.stdout, done.stderr
    done = subprocess.run([*command, str(series)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("stepengine: ") and "Traceback" not in done.stderr
