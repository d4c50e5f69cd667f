"""The reader's copies: blank, refreshed while untouched, never overwritten once edited."""

from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output


def _notebook(path: Path, source: str = "1 + 1") -> None:
    cell = new_code_cell(source, execution_count=3, outputs=[new_output("stream", text="2\n")])
    cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    cell.metadata["tags"] = ["E1"]
    notebook = new_notebook(cells=[cell], metadata={"widgets": {"state": {}}})
    nbformat.write(notebook, path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    source, target = tmp_path / "notebooks", tmp_path / "learn"
    (source / "solutions").mkdir(parents=True)
    _notebook(source / "00_a.ipynb")
    _notebook(source / "solutions" / "00_a.ipynb", "42")
    return source, target


def test_copies_are_blank_and_solutions_stay_away(learn: ModuleType, folders: tuple[Path, Path]) -> None:
    source, target = folders
    assert learn.copy_notebooks(source, target) == []
    assert sorted(p.name for p in target.iterdir()) == [".manifest.json", "00_a.ipynb"]
    copy = nbformat.read(target / "00_a.ipynb", as_version=4)
    nbformat.validate(copy)
    (cell,) = copy.cells
    assert (cell.source, cell.outputs, cell.execution_count) == ("1 + 1", [], None)
    assert cell.metadata == {"tags": ["E1"]}
    assert "widgets" not in copy.metadata and copy.metadata.kernelspec.name == "stepengine"


def test_a_second_run_writes_nothing_new(learn: ModuleType, folders: tuple[Path, Path]) -> None:
    source, target = folders
    learn.copy_notebooks(source, target)
    before = (target / "00_a.ipynb").stat().st_mtime_ns, (target / "00_a.ipynb").read_bytes()
    assert learn.copy_notebooks(source, target) == []
    assert before == ((target / "00_a.ipynb").stat().st_mtime_ns, (target / "00_a.ipynb").read_bytes())


def test_an_unedited_copy_follows_its_notebook(learn: ModuleType, folders: tuple[Path, Path]) -> None:
    source, target = folders
    learn.copy_notebooks(source, target)
    _notebook(source / "00_a.ipynb", "2 + 2")
    (line,) = learn.copy_notebooks(source, target)
    assert "refreshed" in line
    assert nbformat.read(target / "00_a.ipynb", as_version=4).cells[0].source == "2 + 2"


@pytest.mark.parametrize("source_changes", [False, True])
def test_an_edited_copy_is_never_overwritten(
    learn: ModuleType, folders: tuple[Path, Path], source_changes: bool
) -> None:
    source, target = folders
    learn.copy_notebooks(source, target)
    _notebook(target / "00_a.ipynb", "my answer")
    mine = (target / "00_a.ipynb").read_bytes()
    for turn in range(3):
        if source_changes:
            _notebook(source / "00_a.ipynb", f"changed {turn}")
        (line,) = learn.copy_notebooks(source, target)
        assert "00_a.ipynb" in line and "left as you changed it" in line
        assert (target / "00_a.ipynb").read_bytes() == mine


@pytest.mark.parametrize("manifest", [None, "{broken", "[]"])
def test_a_lost_manifest_counts_copies_as_edited(
    learn: ModuleType, folders: tuple[Path, Path], manifest: str | None
) -> None:
    source, target = folders
    learn.copy_notebooks(source, target)
    mine = (target / "00_a.ipynb").read_bytes()
    if manifest is None:
        (target / ".manifest.json").unlink()
    else:
        (target / ".manifest.json").write_text(manifest)
    _notebook(source / "00_a.ipynb", "changed")
    (line,) = learn.copy_notebooks(source, target)
    assert "left" in line and (target / "00_a.ipynb").read_bytes() == mine


def test_a_reader_s_own_file_of_a_new_notebook_s_name_is_kept(learn: ModuleType, folders: tuple[Path, Path]) -> None:
    source, target = folders
    learn.copy_notebooks(source, target)
    (target / "01_b.ipynb").write_text("mine")
    _notebook(source / "01_b.ipynb")
    (line,) = learn.copy_notebooks(source, target)
    assert "01_b.ipynb" in line and (target / "01_b.ipynb").read_text() == "mine"


def test_a_deleted_copy_comes_back_and_an_unedited_orphan_goes(learn: ModuleType, folders: tuple[Path, Path]) -> None:
    source, target = folders
    _notebook(source / "01_b.ipynb")
    _notebook(source / "01_c.ipynb")
    learn.copy_notebooks(source, target)
    (target / "00_a.ipynb").unlink()
    _notebook(target / "01_c.ipynb", "mine")
    (source / "01_b.ipynb").unlink()
    (source / "01_c.ipynb").unlink()
    learn.copy_notebooks(source, target)
    assert sorted(p.name for p in target.glob("*.ipynb")) == ["00_a.ipynb", "01_c.ipynb"]


def test_what_lies_beside_the_notebooks_is_reached_from_the_copies(
    learn: ModuleType, folders: tuple[Path, Path]
) -> None:
    source, target = folders
    (source / "traces").mkdir()
    (source / "traces" / "run.jsonl").write_text("{}")
    (source / "conftest.py").write_text("")
    learn.copy_notebooks(source, target)
    learn.copy_notebooks(source, target)
    assert (target / "traces" / "run.jsonl").read_text() == "{}"
    assert not (target / "conftest.py").exists() and not (target / "solutions").exists()


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({"DISPLAY": ":0"}, "linux", True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, "linux", True),
        ({}, "linux", False),
        ({}, "darwin", True),
        ({"SSH_CONNECTION": "a b"}, "darwin", False),
        ({"SSH_CONNECTION": "a b", "DISPLAY": "localhost:10"}, "linux", True),
    ],
)
def test_a_browser_is_opened_only_where_there_is_a_display(
    learn: ModuleType, environment: dict[str, str], platform: str, expected: bool
) -> None:
    assert learn.has_display(environment, platform) is expected
    arguments = learn.lab_arguments(Path("learn"), environment, platform, root=False)
    assert ("--no-browser" in arguments) is not expected
