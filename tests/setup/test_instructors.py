"""The instructor's plan names what is there: sections, predictions, commands; and its recording code runs."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from stepengine.trace import load

ROOT = Path(__file__).resolve().parents[2]
PLAN = (ROOT / "docs/instructors.md").read_text(encoding="utf-8")
SECTION = re.compile(r"\b(0\d[ab]?) §(\d+)(?: · ([^|\n]+?) \|)?")


@cache
def _cells(short: str) -> list[tuple[str, str]]:
    (path,) = (ROOT / "notebooks").glob(f"{short}_*.ipynb")
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


@cache
def _titles(short: str) -> dict[str, str]:
    text = "\n".join(source for kind, source in _cells(short) if kind == "markdown")
    return dict(re.findall(r"^## (\d+) · (.*)$", text, re.MULTILINE))


@pytest.mark.parametrize(("short", "number", "title"), sorted(set(SECTION.findall(PLAN))))
def test_each_section_is_there_under_its_title(short: str, number: str, title: str) -> None:
    assert number in _titles(short), f"{short} has no section {number}"
    assert title in ("", _titles(short)[number])


@pytest.mark.parametrize(("short", "key"), sorted(set(re.findall(r"`(0\d[ab]?):([^`]+)`", PLAN))))
def test_each_prediction_is_asked(short: str, key: str) -> None:
    code = "\n".join(source for kind, source in _cells(short) if kind == "code")
    assert re.search(rf'\.ask\(\s*"{re.escape(key)}"', code), f"{short} asks no {key!r}"


def test_the_plan_has_six_lessons_of_fifty_minutes() -> None:
    lessons = re.split(r"^## Lesson \d", PLAN, flags=re.MULTILINE)[1:]
    assert len(lessons) == 6
    for lesson in lessons:
        spans = [(int(a), int(b)) for a, b in re.findall(r"^\| (\d+)-(\d+) \|", lesson, re.MULTILINE)]
        assert spans[0][0] == 0 and spans[-1][1] == 50
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False)), "a gap or an overlap"


def test_the_lessons_are_recorded_and_their_pages_made(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts/lesson_players.py"), "-o", str(tmp_path / "lessons")]
    subprocess.run(script, cwd=tmp_path, check=True, env=_environment(), stdout=subprocess.DEVNULL)
    runs = {path.stem: load(path).steps for path in tmp_path.glob("lessons/*.jsonl")}
    lengths = {name: [[chunk.length for chunk in step.plan.chunks] for step in steps] for name, steps in runs.items()}
    assert len(lengths["whole"][2]) == 1 and [1, 1] == lengths["chunks"][2][:2], "A and B wait left, run right"
    assert lengths["naive"][0] == lengths["cached"][0] and lengths["cached"][1] == [1] < lengths["naive"][1]
    assert any(step.plan.swapped_out for step in runs["paged"]), "nobody gives way"
    assert min(sum(step) for step in lengths["prefix"][:1]) > 200 and max(sum(s) for s in lengths["prefix"][2:]) < 50
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("lessons/*.html")}
    assert made == set(re.findall(r"`(lessons/\w+\.html)`", PLAN))


def test_a_folder_that_cannot_be_made_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    script = [sys.executable, str(ROOT / "scripts/lesson_players.py"), "-o", str(tmp_path / "taken")]
    done = subprocess.run(script, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("make lessons stopped: ") and "Traceback" not in done.stderr


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|^)make ([a-z-]+)", PLAN, re.MULTILINE))))
def test_each_make_target_is_there(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
