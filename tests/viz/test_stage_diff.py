"""The view of what changed between stages: no part is missed, every line is there once, and marks are true."""

import ast
import html
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stepengine.diff import DUTIES, stage_diff
from stepengine.errors import InvalidSetting
from stepengine.viz.stage_diff import ADDED, CHANGED, REMOVED, SAME, PartDiff, Source, StageDiff

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    ("0", "1a"), ("1a", "1b"), ("1b", "2"), ("2", "3"), ("3", "4a"), ("3", "4b"), ("4a", "4"), ("4b", "4"), ("4", "5")
]  # fmt: skip
every_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


def table() -> dict[str, dict[str, str]]:
    """{stage: {part's title: class}} of ARCHITECTURE.md, where an empty cell means the stage to the left."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    text = text[text.index("<!-- stage x part") : text.index("<!-- end of the table")]
    header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    stages = [name.removeprefix("stage ") for name in cells[0][2:]]
    found: dict[str, dict[str, str]] = {stage: {} for stage in stages}
    assert header[0] == "part" and rows
    for title, duty, *own in cells[2:]:
        assert (title, duty) in DUTIES.values()
        for at, stage in enumerate(stages):
            before = found[stages[at - 1]][title] if at else ""
            found[stage][title] = own[at] or before
    return found


@every_pair
def test_no_part_is_missed(pair: tuple[str, str]) -> None:
    before, after = (table()[stage] for stage in pair)
    wanted = {title for title in before if before[title] != after[title]}
    found = stage_diff(*pair)
    assert {part.title for part in found.parts} == wanted
    assert set(found.unchanged) == {title for title in before if title not in wanted and before[title]}
    for part in found.parts:
        names = before[part.title], after[part.title]
        assert (part.old.name if part.old else "", part.new.name if part.new else "") == names


@every_pair
def test_both_columns_are_the_files_themselves(pair: tuple[str, str]) -> None:
    for part in stage_diff(*pair).parts:
        for side, place in ((part.old, 1), (part.new, 2)):
            shown = [row[place] for row in part.rows if row[place] is not None]
            assert shown == list(range(len(side.lines) if side else 0))
            if side is not None:
                text = (ROOT / "stepengine" / side.where).read_text(encoding="utf-8").splitlines()
                assert list(side.lines) == text[side.first - 1 : side.first - 1 + len(side.lines)]


@every_pair
def test_marks_are_true(pair: tuple[str, str]) -> None:
    for part in stage_diff(*pair).parts:
        old, new = part.old.lines if part.old else (), part.new.lines if part.new else ()
        for sign, left, right in part.rows:
            assert (left is None, right is None) == (sign == ADDED, sign == REMOVED)
            if sign in (SAME, CHANGED):
                assert (old[left] == new[right]) == (sign == SAME)


def patched(part: PartDiff, folder: Path) -> list[str]:
    """The new lines, made by git from the old file and a patch of the rows: another program reads our marks."""
    old, new = part.old.lines if part.old else (), part.new.lines if part.new else ()
    kept = {CHANGED: "-", REMOVED: "-", SAME: " "}
    body = []
    for sign, left, right in part.rows:
        body += [kept[sign] + old[left]] if left is not None else []
        body += ["+" + new[right]] if sign in (CHANGED, ADDED) else []
    before = folder / "part.py"
    before.write_text("".join(line + "\n" for line in old))
    patch = f"--- a/part.py\n+++ b/part.py\n@@ -{bool(old):d},{len(old)} +1,{len(new)} @@\n" + "\n".join(body) + "\n"
    (folder / "p.patch").write_text(patch)
    subprocess.run(["git", "apply", "--unidiff-zero", "p.patch"], cwd=folder, check=True, capture_output=True)
    return before.read_text().splitlines()


@every_pair
def test_git_makes_the_new_file_from_the_marks(pair: tuple[str, str], tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for part in stage_diff(*pair).parts:
        if part.old is not None and part.new is not None:
            assert patched(part, tmp_path) == list(part.new.lines)


def _functions(side: Source) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(textwrap.dedent("\n".join(side.lines)))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@every_pair
def test_what_changed_by_its_syntax_has_a_mark(pair: tuple[str, str]) -> None:
    """A method whose code differs has at least one marked line within it; comments and layout aside."""
    for part in stage_diff(*pair).parts:
        if part.old is None or part.new is None:
            continue
        trees = [_functions(side) for side in (part.old, part.new)]
        marked = {row.new for row in part.rows if row.sign != SAME} | {
            before.new for before, row in zip(part.rows, part.rows[1:], strict=False) if row.sign == REMOVED
        }
        for name, node in trees[1].items():
            other = trees[0].get(name)
            if other is None or ast.dump(other) != ast.dump(node):
                assert marked & set(range(node.lineno - 1, node.end_lineno or 0)), f"{part.title}.{name}"


def test_a_new_part_is_wholly_new() -> None:
    (pool,) = [part for part in stage_diff("1b", 2).parts if part.title == "BlockPool"]
    assert pool.old is None and {row.sign for row in pool.rows} == {ADDED}
    assert pool.size == f"new, {len(pool.rows)} lines"


def test_files_beside_the_parts_are_named() -> None:
    assert [where for where, _ in stage_diff("1b", "2").beside] == ["stage2_paged/gather.py", "stage2_paged/kernels.py"]
    assert stage_diff("0", "1a").beside == ()
    found = {Path(where).name for where, _ in stage_diff(4, 5).beside}
    there = {path.name for path in (ROOT / "stepengine/stage5_gptq").glob("*.py")}
    assert found == there - {"__init__.py", "engine.py"}


def test_text_is_one_line_with_counts() -> None:
    text = repr(stage_diff("1a", "1b"))
    files = (ROOT / f"stepengine/{folder}/scheduler.py" for folder in ("stage0_naive", "stage1_kvcache"))
    old, new = (len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert text.startswith(f"stage 1a -> 1b: 1 part changed: Scheduler ({old} -> {new} lines); unchanged: ")
    assert repr(stage_diff(2, 2)).startswith("stage 2 -> 2: 0 parts changed; unchanged: Scheduler, ")


@pytest.mark.parametrize(("a", "b"), [(0, "1b"), ("1a", "1b"), (1, "2"), (3, "4"), ("4a", "4"), ("4b", "4"), (4, "5")])
def test_without_a_second_stage_it_is_the_next(a: int | str, b: str) -> None:
    assert stage_diff(a).after == b


def test_one_part_and_one_method() -> None:
    found = stage_diff("1b", 2, part="Scheduler", method="plan")
    (part,) = found.parts
    assert part.names == "ContinuousScheduler.plan -> PagedScheduler.plan" and found.unchanged == ()
    assert "def plan" in part.old.lines[0] and part.old.first > 1
    for name in ("cache", "KVCache", "block size", "block_size"):
        assert len(stage_diff("1b", 2, part=name).parts) == 1
    fork = stage_diff("1b", 2, method="fork").parts
    assert all(part.old is None for part in fork) and {part.title for part in fork} == {"Scheduler", "KVCache"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"a": 7}, "stage is 7"),
        ({"a": 5}, "Stage 5 is the last"),
        ({"a": 1, "part": "engine"}, "part is 'engine'; the parts are scheduler"),
        ({"a": 1, "method": "jump"}, "method is 'jump'"),
    ],
)
def test_what_does_not_exist_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidSetting, match=said):
        stage_diff(**given)


def test_lines_pair_with_what_they_became() -> None:
    old = Source("f", "f.py", ("a = first(x, y)", "gone()", "keep"))
    new = Source("f", "f.py", ("new()", "a = first(x, z)", "keep"))
    part = PartDiff("f", "f", "", old, new)
    assert part.rows == [(ADDED, None, 0), (CHANGED, 0, 1), (REMOVED, 1, None), (SAME, 2, 2)]


def test_empty_lines_alone_hold_nothing_together() -> None:
    old = Source("f", "f.py", ("class One:", "", "    x = 1"))
    new = Source("f", "f.py", ("import this", "", "class Two:", "    x = 1"))
    assert (CHANGED, 0, 2) in PartDiff("f", "f", "", old, new).rows


@every_pair
def test_the_page_holds_every_line_and_every_sign(pair: tuple[str, str], tmp_path: Path) -> None:
    found = stage_diff(*pair)
    page = found.save_html(tmp_path / "diff.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|src=|url\(", page.split("</head>")[0])  # nothing is fetched
    cells = re.findall(r"<th>(\d*)</th><td class='(\w*)'><i>(.?)</i>(.*?)</td>", page, re.DOTALL)
    texts = [(number, html.unescape(re.sub(r"</?(?:ins|del)>", "", text))) for number, *_, text in cells]
    for column, side in enumerate(("old", "new")):
        sources = [getattr(part, side) for part in found.parts if getattr(part, side) is not None]
        wanted = [(str(s.first + at), line) for s in sources for at, line in enumerate(s.lines)]
        assert [cell for cell in texts[column::2] if cell[0]] == wanted
        assert all(text == "" for number, text in texts[column::2] if not number)
    for kind, sign in (("a", "+"), ("r", "-"), ("c", "~")):  # never by colour alone
        assert {shown for _, own, shown, _ in cells if own == kind} <= {sign}
    assert page.count("<details") == page.count("</details>") and page.count("<table") == page.count("</table>")


def test_long_unchanged_stretches_fold_and_changes_do_not() -> None:
    old = tuple(f"line {n}" for n in range(40))
    part = PartDiff(
        "f", "f", "", Source("f", "f.py", old), Source("f", "f.py", (*old[:20], "line 20 changed", *old[21:]))
    )
    markup = StageDiff("1", "2", (part,))._repr_html_()
    folds = re.findall(r"class='sd-same'><summary>(\d+) unchanged lines", markup)
    assert folds == ["17", "16"]
    folded = "".join(re.findall(r"<details class='sd-same'>.*?</details>", markup, re.DOTALL))
    assert "<i>~</i>" not in folded and "<i>-</i>" not in folded and "<i>~</i>" in markup


def test_text_of_files_cannot_become_markup() -> None:
    source = Source("<b>", "f.py", ("if a < b and '<script>' > c:",))
    markup = StageDiff("1", "2", (PartDiff("f", "f", "", None, source),))._repr_html_()
    assert "<script>" not in markup and "&lt;script&gt;" in markup


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stepengine", "diff", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_the_command(tmp_path: Path) -> None:
    target = tmp_path / "out.html"
    written = command("1b", "2", "--part", "cache", "-o", str(target))
    assert written.returncode == 0, written.stderr
    assert "SlotCache" in target.read_text(encoding="utf-8")
    printed = command("1a").stdout
    assert printed.startswith("stage 1a -> 1b: 1 part changed") and "+++ stage1_kvcache/scheduler.py" in printed
    bad = command("9")
    assert bad.returncode == 2 and "stage is '9'" in bad.stderr
