"""The check of stored notebooks can fail: one wrong number, or a figure's data off by 0.01 %, fails its cell alone."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "notebooks" / "00_naive.ipynb"
FIRST = 5  # code cells of it: the model, its tokens, attention by hand and the engine's; a few seconds in all

# What the notebooks print and draw, in the same ways, on a run of a tiny model; 1.0 scales the data of one figure.
MADE = {
    "run": "from stepengine import LLM, SamplingParams\n"
    "from stepengine.lesson import show, wall\n"
    "from stepengine.viz.figures import scheduler_timeline\n"
    'llm = LLM("tiny-random", stage="1b", max_model_len=64, max_num_seqs=2, trace=True)\n'
    "params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)\n"
    "outputs = llm.generate([[1, 2, 3], [4, 5, 6, 7], [8, 9]], params)",
    "counts": 'print(f"{len(llm.trace.steps)} steps, {sum(s.plan.num_tokens for s in llm.trace.steps)} tokens")',
    "timeline": "show(scheduler_timeline(llm.trace))",
    "bars": "import plotly.graph_objects as go\n"
    "tokens = [1.0 * step.plan.num_tokens for step in llm.trace.steps]\n"
    "show(go.Figure(go.Bar(x=list(range(len(tokens))), y=tokens)))",
    "clock": 'print("ended after", wall(1e3 * llm.trace.steps[-1].t_done, "ms"))',
    "value": "len(llm.trace.steps)",
}
CLOCK = list(MADE).index("clock")
BARS = list(MADE).index("bars")


def _code(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def _one_more(text: str) -> str:
    """The text with its last whole number one larger, whatever the clock said left as it is."""
    kept = [match.span() for match in re.finditer(r"\[wall [^\]]*\]", text)]
    whole = [match for match in re.finditer(r"(?<![\d.])\d+(?![\d.])", text)]
    free = [match for match in whole if not any(a <= match.start() < b for a, b in kept)]
    if not free:
        return text
    return f"{text[: free[-1].start()]}{int(free[-1].group()) + 1}{text[free[-1].end() :]}"


def _falsify(cell: Any) -> bool:
    """Make one number that the cell stores wrong by 1; False if it stores none that is compared."""
    for output in cell.outputs:
        place, key = (output, "text") if output.get("name") == "stdout" else (output.get("data", {}), "text/plain")
        if "text/markdown" in place or "application/vnd.plotly.v1+json" in place or key not in place:
            continue
        wrong = _one_more(place[key])
        if wrong != place[key]:
            place[key] = wrong
            return True
    return False


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], set[int]]]:
    """Notebook -> (each code cell's verdict under the project's own nbval command, the cells that were falsified)."""
    folder = tmp_path_factory.mktemp("books")
    shutil.copy(ROOT / "notebooks" / "conftest.py", folder)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    real = nbformat.read(REAL, as_version=4)
    last = real.cells.index(_code(real)[FIRST - 1])
    real.cells = real.cells[: last + 1]
    made = new_notebook(cells=[new_code_cell(source) for source in MADE.values()])
    nbformat.write(made, folder / "made.ipynb")
    script = [sys.executable, str(ROOT / "scripts" / "execute_notebooks.py"), "made.ipynb"]
    subprocess.run(script, cwd=folder, env=env, check=True, capture_output=True, stdin=subprocess.DEVNULL)

    falsified: dict[str, set[int]] = {}
    for name, book in (("real", real), ("made", nbformat.read(folder / "made.ipynb", as_version=4))):
        if name == "made":  # the real one, as it is stored, is run whole by scripts/check.py
            falsified[name] = set()
        wrong = falsified[f"{name}_wrong"] = set()
        for at, cell in enumerate(_code(book)):
            if name == "made" and at == BARS:  # stored as it was drawn; what is drawn now is another figure
                cell.source = cell.source.replace("1.0 *", "1.0001 *")
                wrong.add(at)
            elif name == "made" and at == CLOCK:
                cell.outputs[0]["text"] = "ended after [wall 123456 ms]\n"
            elif _falsify(cell):
                wrong.add(at)
        nbformat.write(book, folder / f"{name}_wrong.ipynb")

    report = folder / "report.xml"
    options = runpy.run_path(str(ROOT / "scripts" / "check.py"))["NBVAL"]
    books = [str(folder / f"{name}.ipynb") for name in falsified]
    command = [sys.executable, "-m", "pytest", *options, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-c", str(ROOT / "pyproject.toml"), f"--junitxml={report}", *books],
        **{"cwd": ROOT, "env": env, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL},
    )
    assert done.returncode == 1, f"nbval ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
    verdicts: list[list[str]] = []
    for case in ElementTree.parse(report).iter("testcase"):  # notebook after notebook, each from cell 0 on
        if case.attrib["name"] == "Cell 0":
            verdicts.append([])
        failed = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        verdicts[-1].append(failed[0] if failed else "passed")
    return {name: (seen, falsified[name]) for name, seen in zip(falsified, verdicts, strict=True)}


def test_what_is_stored_as_it_was_run_passes(outcomes: Any) -> None:
    verdicts, _ = outcomes["made"]
    assert verdicts == ["passed"] * len(MADE)


@pytest.mark.parametrize(("name", "least"), [("real", 3), ("made", 3)])
def test_exactly_the_falsified_cells_fail(name: str, least: int, outcomes: Any) -> None:
    verdicts, falsified = outcomes[f"{name}_wrong"]
    assert len(falsified) >= least, "too few numbers were falsified to show anything"
    assert {at for at, verdict in enumerate(verdicts) if verdict == "failure"} == falsified
    assert set(verdicts) == {"passed", "failure"}


def test_a_ten_thousandth_in_a_figure_s_data_is_seen_and_a_clock_value_is_not(outcomes: Any) -> None:
    verdicts, falsified = outcomes["made_wrong"]
    assert verdicts[BARS] == "failure" and BARS in falsified
    assert verdicts[CLOCK] == "passed" and CLOCK not in falsified
