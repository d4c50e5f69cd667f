"""Each stored notebook is executed, small, free of machine details, and says something that a check can compare."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOOKS = ROOT / "notebooks"
CHAPTERS = sorted(BOOKS.glob("*.ipynb"))
ALL = [*CHAPTERS, *sorted((BOOKS / "solutions").glob("*.ipynb"))]

PROMISED = {
    "00_naive": {"Q36"},
    "01a_kv_cache": {"E1", "E2", "E14", "C1", "C2", "Q95"},
    "01b_continuous_batching": {"E11", "E12", "C4", "C18", "Q98"},
    "02a_paged": {"E3", "E4", "E5", "C3", "C11", "C21", "Q51", "Q96", "Q104", "Q106"},
    "02b_sharing_preemption": {"E5", "E6", "C15", "Q105", "Q108"},
    "03a_flash": {"E7", "C7", "C12", "Q97"},
    "03b_graphs": {"C19", "Q61", "Q80", "Q83", "Q84", "Q103"},
    "04a_chunked_prefill": {"E8", "C5", "C13", "C14", "Q99", "Q122"},
    "04b_prefix_caching": {"E9", "C6", "C15", "Q20", "Q100", "Q107"},
    "05_gptq": {"E10", "E13", "C8", "C9", "C10", "C16", "C17", "C21", "Q101", "Q134"},
    "06_faults": {"Q105", "Q108", "Q111", "Q114"},
    "07_ledger": {*(f"C{number}" for number in range(1, 22)), "Q109"},
}
PLOTLY = "application/vnd.plotly.v1+json"
COMPARED = {"text/plain", "text/markdown", "text/latex"}  # what notebooks/conftest.py and nbval leave to compare
LARGEST = 400_000
WITHOUT_EXERCISES = {"99_sandbox"}

every_notebook = pytest.mark.parametrize("path", ALL, ids=[str(path.relative_to(BOOKS)) for path in ALL])
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=[path.name for path in CHAPTERS])


@cache
def _read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def _code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and _text(cell["source"]).strip()]


def _tags(cell: dict[str, Any]) -> set[str]:
    return set(cell["metadata"].get("tags", []))


def _is_compared(cell: dict[str, Any]) -> bool:
    """True if nbval holds this cell's new outputs against the stored ones, and there is something to hold."""
    if _tags(cell) & {"nbval-skip", "nbval-ignore-output"} or cell["execution_count"] is None:
        return False
    return any(
        output.get("name") == "stdout" or COMPARED & set(output.get("data", {})) for output in cell.get("outputs", [])
    )


def _digest_lines(cell: dict[str, Any]) -> list[str]:
    printed = "".join(_text(output["text"]) for output in cell.get("outputs", []) if output.get("name") == "stdout")
    return [line for line in printed.splitlines() if line.startswith("digest")]


def _strings(value: Any) -> list[str]:
    """Every text in a notebook, but for pictures and the arrays of figures, which are base64."""
    if isinstance(value, dict):
        texts = {key: item for key, item in value.items() if not key.startswith("image/") and key != "bdata"}
        return [text for item in texts.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def absolute_paths(text: str) -> list[str]:
    """Paths from the root, as a traceback or a warning prints them; not URLs, fractions or closing tags."""
    text = re.sub(r"data:[\w/+.;=-]+,\S+", "", text)
    return re.findall(r"(?<![\w.:/~<)\]}*])/(?:[\w.+-]+/)+[\w.+-]+|\b[A-Z]:\\\\?\w+", text)


@every_notebook
def test_is_small_enough_to_review(path: Path) -> None:
    size = path.stat().st_size
    assert size < LARGEST, f"{path.name} has {size} bytes, {LARGEST} is the limit; draw less, or drop widget state"


@every_notebook
def test_holds_no_widget_state(path: Path) -> None:
    assert "widgets" not in _read(path)["metadata"]


@every_notebook
def test_was_run_from_top_to_bottom(path: Path) -> None:
    counts = [cell["execution_count"] for cell in _code(_read(path))]
    assert counts == list(range(1, len(counts) + 1)), "run scripts/execute_notebooks.py on it"


@every_notebook
def test_has_outputs_that_nbval_compares(path: Path) -> None:
    compared = sum(map(_is_compared, _code(_read(path))))
    assert compared >= (3 if path.parent == BOOKS else 1)


@every_notebook
def test_stores_an_error_only_where_one_is_announced(path: Path) -> None:
    for cell in _code(_read(path)):
        errors = [output["ename"] for output in cell["outputs"] if output["output_type"] == "error"]
        assert not errors or "raises-exception" in _tags(cell), f"{errors} after {_text(cell['source'])[:80]!r}"


@every_notebook
def test_names_no_place_on_the_author_s_machine(path: Path) -> None:
    found = [place for text in _strings(_read(path)["cells"]) for place in absolute_paths(text)]
    assert found == []


@every_notebook
def test_each_figure_prints_a_digest_of_its_data(path: Path) -> None:
    cells = _code(_read(path))
    for cell, following in zip(cells, [*cells[1:], {}], strict=True):
        figures = sum(PLOTLY in output.get("data", {}) for output in cell["outputs"])
        digests = len(_digest_lines(cell)) or len(_digest_lines(following))
        assert digests >= figures, f"{figures} figures, {digests} digests after {_text(cell['source'])[:80]!r}"


@pytest.mark.parametrize("name", PROMISED)
def test_promised_tags_are_there(name: str) -> None:
    path = BOOKS / f"{name}.ipynb"
    assert path.is_file(), f"notebooks/{name}.ipynb is promised and missing"
    tags = set().union(*map(_tags, _read(path)["cells"]))
    assert PROMISED[name] <= tags, f"{name} lacks {sorted(PROMISED[name] - tags)}"


@every_chapter
def test_has_worked_solutions(path: Path) -> None:
    has_exercises = any("xercise" in "".join(cell["source"]) for cell in _read(path)["cells"])
    assert has_exercises == (path.stem not in WITHOUT_EXERCISES)
    assert (BOOKS / "solutions" / path.name).is_file() == has_exercises


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/home/me/stepengine/core/engine.py:12: Warning", 1),
        ("File C:\\Users\\me", 1),
        ('"/opt/python/lib"', 1),
        ("see https://example.org/a/b/c and notebooks/traces/run.jsonl", 0),
        ("tokens/s and 3/4/5, </div>, ../learn/00.ipynb, ~/.cache/x", 0),
        ("data:image/png;base64,/9j/4AAQ/abc", 0),
    ],
)
def test_absolute_paths_are_told_from_other_slashes(text: str, found: int) -> None:
    assert len(absolute_paths(text)) == found


def _book(*cells: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {}, "cells": list(cells)}


def _cell(outputs: list[dict[str, Any]], count: int | None = 1, tags: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "source": "draw()",
        "execution_count": count,
        "metadata": {"tags": list(tags)},
        "outputs": outputs,
    }


FIGURE = {"output_type": "display_data", "data": {PLOTLY: {"data": []}}}
DIGEST = {"output_type": "stream", "name": "stdout", "text": ["digest bar 3 points\n"]}
ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (
            test_each_figure_prints_a_digest_of_its_data,
            _book(_cell([FIGURE]), _cell([DIGEST], 2)),
            _book(_cell([FIGURE])),
        ),
        (test_was_run_from_top_to_bottom, _book(_cell([]), _cell([], 2)), _book(_cell([]), _cell([], 3))),
        (
            test_stores_an_error_only_where_one_is_announced,
            _book(_cell([ERROR], tags=("raises-exception",))),
            _book(_cell([ERROR])),
        ),
        (test_has_outputs_that_nbval_compares, _book(_cell([DIGEST])), _book(_cell([DIGEST], None))),
        (test_has_outputs_that_nbval_compares, _book(_cell([DIGEST])), _book(_cell([DIGEST], tags=("nbval-skip",)))),
    ],
)
def test_the_rules_themselves_tell_good_from_bad(tmp_path: Path, rule: Any, good: Any, bad: Any) -> None:
    for name, content in (("good.ipynb", good), ("bad.ipynb", bad)):
        (tmp_path / name).write_text(json.dumps(content))
    rule(tmp_path / "good.ipynb")
    with pytest.raises(AssertionError):
        rule(tmp_path / "bad.ipynb")
