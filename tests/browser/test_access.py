"""Keyboard, names and contrast of every widget, as the browser computes them, on light and on dark paper."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from stepengine.viz.compare import Compare
from stepengine.viz.player import StepPlayer
from tests.browser import runs
from tests.browser.access import contrast, pale_marks, pale_texts, unnamed, walk
from tests.browser.lab import Lab
from tests.browser.notebook import Notebook
from tests.browser.watch import Watch

Pages = Callable[..., tuple[Any, Watch]]
PLAYER_MARKS = {
    "0": [".sp-work", ".sp-next", ".sp-cursor", ".sp-again", ".sp-new"],
    "1b": [".sp-work", ".sp-next", ".sp-wait", ".sp-ring", ".sp-cursor", ".sp-new", ".sp-slot"],
    "2": [".sp-work", ".sp-ring", ".sp-swap", ".sp-move", ".sp-cursor", ".sp-new", ".sp-edge", ".sp-no", ".sp-chip"],
    "4": [".sp-work", ".sp-wedge", ".sp-ring", ".sp-new", ".sp-edge", ".sp-no", ".sp-chip"],
}
WIDGETS = """\
from stepengine import LLM, SamplingParams
from stepengine.lesson import Predictions
from stepengine.viz.calculator import Calculator
from stepengine.viz.controls import Controls
def run(prompts, params, block_size):
    sizes = {"max_model_len": 64, "max_num_seqs": 2, "block_size": block_size, "num_blocks": 30}
    llm = LLM("tiny-random", stage=2, trace=True, **sizes)
    llm.generate(prompts, params)
    return llm
guesses = Predictions()"""
CELLS = {
    "setup": WIDGETS,
    "number": 'guesses.ask("n", "How many blocks of 16 do 50 tokens take?")',
    "choice": 'guesses.ask("c", "Do its own tokens come faster?", choices=["faster", "not faster"])',
    "order": 'guesses.ask("o", "Which comes first?", order=["decode", "prefill", "update"])',
    "calculator": 'Calculator("smollm2-135m", "T4", context=2048)',
    "controls": "wish = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)\n"
    'controls = Controls(run, {"block_size": [4, 8]}, [[5, 6, 7], [8, 9], [4] * 6], wish)\ncontrols',
    "reveal": 'guesses.reveal("n", 4)\nguesses.reveal("c", "not faster")\ncontrols.set(block_size=8)\ncontrols.rerun()',
}
ROOTS = {
    "number": ".predict",
    "choice": ".predict",
    "order": ".predict",
    "calculator": ".calculator",
    "controls": ".controls",
}


@pytest.fixture
def saved(pages: Pages, tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """saved(widget, query) -> the page with its saved file, and the widget on it."""

    def make(widget: Any, query: str = "", **view: Any) -> tuple[Any, Any]:
        page, _ = pages(**view)
        page.goto(widget.save_html(tmp_path / "widget.html").as_uri() + query)
        root = page.locator(".stepplayer").first
        root.wait_for()
        return page, root

    return make


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("stage", runs.RUNS)
def test_a_player_keeps_its_contrast_in_every_step(stage: str, theme: str, saved: Any) -> None:
    trace = runs.RUNS[stage]()
    page, root = saved(StepPlayer(trace), f"?theme={theme}")
    assert root.get_attribute("data-theme") == theme
    root.focus()
    pale: set[str] = set()
    for _ in trace.steps:
        pale |= set(pale_texts(root))
        page.keyboard.press("ArrowRight")
    assert sorted(pale) == []
    found: set[str] = set(PLAYER_MARKS[stage])
    for _ in trace.steps:  # a mark need not be there in every step, but in one
        page.keyboard.press("ArrowLeft")
        said = pale_marks(root, PLAYER_MARKS[stage])
        found &= {line.split(":")[0] for line in said if line.endswith("there is none")}
        pale |= {line for line in said if not line.endswith("there is none")}
    assert sorted(pale) == [] and found == set()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_comparison_keeps_its_contrast_to_the_end(theme: str, saved: Any) -> None:
    page, root = saved(Compare(runs.naive(), runs.continuous(), names=("naive", "continuous")), f"?theme={theme}")
    root.focus()
    pale = set(pale_texts(root))
    page.keyboard.press("End")
    pale |= set(pale_texts(root))
    assert sorted(pale) == []


@pytest.mark.parametrize("size", ["page", "room"])
def test_tab_reaches_every_control_of_a_player(size: str, saved: Any) -> None:
    page, root = saved(StepPlayer(runs.swapping(), size=size, step=3))
    missed, bare = walk(page, root)
    assert missed == [] and bare == []
    assert unnamed(root) == []


def test_tab_reaches_every_control_of_a_comparison(saved: Any) -> None:
    page, root = saved(Compare(runs.naive(), runs.continuous(), step=3))
    missed, bare = walk(page, root)
    assert missed == [] and bare == []
    assert unnamed(root) == []


def test_a_request_is_never_told_by_its_colour_alone(saved: Any) -> None:
    """Every coloured thing of a request has its letter: in itself, its row, or the name that a reader hears."""
    page, root = saved(StepPlayer(runs.swapping()))
    root.focus()
    for _ in range(6):
        bare = root.evaluate(
            """root => {
              const letters = [...root.querySelectorAll('.sp-label')].map((e) => e.textContent.trim());
              return [...root.querySelectorAll('[data-panel] [data-r]')]
                .filter((e) => e.checkVisibility() && !e.parentElement.closest('[data-r]') && !e.closest('.sp-budget'))
                .filter((e) => !e.closest('[data-panel="schedule"]')) // its rows begin with the letter, below
                .map((e) => [e, `${e.textContent} ${e.closest('[data-block], .sp-line')?.textContent}`])
                .filter(([e, text]) => !text.includes(letters[e.dataset.r])).map(([e]) => e)
                .map((e) => e.outerHTML.slice(0, 120));
            }"""
        )
        assert bare == []
        page.keyboard.press("ArrowRight")
    rows = root.locator(".sp-label")
    assert rows.all_text_contents() == ["A", "B", "C", "D", "E"]


def test_contrast_is_computed_right() -> None:
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast([119, 119, 119], [255, 255, 255]) == pytest.approx(4.48, abs=0.01)


def test_the_measures_see_what_is_wrong(pages: Pages) -> None:
    page, _ = pages()
    page.set_content(
        "<div id=w style='background: white'><p>one</p><p>two</p><p>three</p><p style='opacity: .4'>pale by opacity</p>"
        "<svg width=60 height=20><rect width=60 height=20 fill='#444'/><text y=12 fill='#333'>dark</text></svg>"
        "<button style='outline: none'></button><button>named</button>"
        "<i class=mark style='border: 1px solid #ddd'>m</i><button tabindex=-1>unreachable</button></div>"
    )
    root = page.locator("#w")
    assert [line.split(":")[1].split("'")[1] for line in pale_texts(root)] == ["pale by opacity", "dark"]
    assert pale_marks(root, [".mark", ".none"]) == [".none: there is none", ".mark has 1.36:1"]
    assert unnamed(root) == ["button"]
    missed, bare = walk(page, root)
    assert missed == [] and len(bare) == 1 and "outline: none" in bare[0]


@pytest.fixture(scope="module")
def widgets(lab: Lab) -> Iterator[str]:
    kernel = {"display_name": "stepengine", "language": "python", "name": "stepengine"}
    book = new_notebook(cells=[new_code_cell(cell) for cell in CELLS.values()], metadata={"kernelspec": kernel})
    nbformat.write(book, lab.root / "widgets.ipynb")
    yield "widgets.ipynb"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_forms_keep_contrast_names_and_keyboard(
    dark: bool, widgets: str, notebook: Callable[..., Notebook], shots: Path
) -> None:
    book = notebook(widgets)
    theme = "JupyterLab Dark" if dark else "JupyterLab Light"
    book.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
    book.page.wait_for_selector(f"body[data-jp-theme-light={str(not dark).lower()!r}]", state="attached")
    places = list(CELLS)
    problems: list[str] = []
    for name in places[:-1]:
        book.run_cell(places.index(name))
    book.check()

    def look(when: str) -> None:
        for name, selector in ROOTS.items():
            root = book.cell(places.index(name)).locator(selector)
            root.wait_for()
            missed, bare = walk(book.page, root) if not dark else ([], [])
            problems.extend(f"{name}, {when}: {line} is pale" for line in pale_texts(root))
            problems.extend(f"{name}, {when}: {line} has no name" for line in unnamed(root))
            problems.extend(f"{name}, {when}: Tab does not reach {line}" for line in missed)
            problems.extend(f"{name}, {when}: no ring on {line}" for line in bare)

    look("open")
    number = book.cell(places.index("number")).locator(".predict")
    number.locator("[data-field]").fill("5")
    number.get_by_role("button", name="Commit").click()
    choice = book.cell(places.index("choice")).locator(".predict")
    choice.get_by_role("radio").nth(1).check()
    choice.get_by_role("button", name="Commit").click()
    choice.and_(book.page.locator('[data-state="committed"]')).wait_for()
    look("committed")
    book.run_cell(places.index("reveal"))
    choice.and_(book.page.locator('[data-verdict="right"]')).wait_for()
    number.and_(book.page.locator('[data-verdict="off"]')).wait_for()
    look("revealed")
    assert problems == []
    book.shots(shots / f"widgets_{'dark' if dark else 'light'}")
