"""ARCHITECTURE.md's table of stages and parts is what the stages' PARTS say."""

import importlib.util
from pathlib import Path

from stepengine.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]


def _script():
    spec = importlib.util.spec_from_file_location("stage_table", ROOT / "scripts" / "stage_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_table_that_the_parts_give():
    script = _script()
    assert script.main(["--check"]) == 0, "run python scripts/stage_table.py"


def test_every_part_of_every_stage_is_named():
    rows = {line.split("|")[1].strip(): line for line in _script().table().splitlines()[2:]}
    for stage in STAGES:
        for part, row in (("scheduler", "`Scheduler`"), ("cache", "`KVCache`"), ("attention", "`AttentionBackend`")):
            assert f"`{getattr(stage.parts, part).__name__}`" in rows[row]


def test_a_stale_table_is_noticed(monkeypatch, tmp_path):
    script = _script()
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    (tmp_path / "ARCHITECTURE.md").write_text(page.replace("`PagedScheduler`", "`OtherScheduler`", 1), encoding="utf-8")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    assert script.main(["--check"]) == 1
    assert script.main([]) == 0
    assert (tmp_path / "ARCHITECTURE.md").read_text(encoding="utf-8") == page
