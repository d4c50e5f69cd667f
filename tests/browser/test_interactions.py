"""What a reader does in a notebook: steps a player, predicts, turns a control, solves an exercise and runs it."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.browser.lab import Lab
from tests.browser.notebook import Notebook
from tests.browser.player import Player, drive

BOOKS = Path(__file__).resolve().parents[2] / "notebooks"
KERNEL = {"display_name": "stepengine", "language": "python", "name": "stepengine"}
Open = Callable[..., Notebook]

TINY = """\
from stepengine import LLM, SamplingParams
from stepengine.viz.player import StepPlayer
llm = LLM("tiny-random", stage=2, max_model_len=64, max_num_seqs=4, block_size=4, num_blocks=14, trace=True)
params = [SamplingParams(temperature=0.0, max_tokens=4 + 3 * i, ignore_eos=True) for i in range(5)]
prompts = [[5 + (7 * i + 3 * k) % 90 for k in range(length)] for i, length in enumerate((9, 14, 6, 11, 8))]"""


@pytest.fixture
def write(lab: Lab, notebook: Open) -> Callable[..., Notebook]:
    """write("a.ipynb", cell, cell, ...) -> a notebook with these cells, open, not yet run."""

    def make(name: str, *cells: str, **view: Any) -> Notebook:
        book = new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata={"kernelspec": KERNEL})
        nbformat.write(book, lab.root / name)
        return notebook(name, **view)

    return make


def _run_where(book: Notebook, *texts: str) -> list[int]:
    """Run the one cell that holds each text, in this order."""
    places = [book.find(text) for text in texts]
    for place in places:
        book.run_cell(place)
    book.check()
    return places


def _player(book: Notebook, at: int) -> Player:
    return Player(book.cell(at).locator(".stepplayer"))


# --- the player ---------------------------------------------------------------------------------------------------


def test_a_player_of_a_pool_that_is_too_small(write: Callable[..., Notebook], shots: Path) -> None:
    book = write(
        "player.ipynb",
        f"{TINY}\n_ = llm.generate(prompts, params)",
        "player = StepPlayer(llm.trace)\nplayer",
        "player.step",
    )
    book.run_all()
    player = _player(book, 1)
    drive(player)
    player.root.get_by_label("Steps per second").select_option("10")
    player.press("Play")
    player.wait_for_step(6)
    player.press("Pause")
    assert player.state()["playing"] == "no"
    player.root.screenshot(path=shots / "player_in_a_notebook.png")

    preempted = [t for t, record in enumerate(_steps(book)) if record]
    assert preempted, "nobody was preempted: the pool is too large"
    player.root.focus()
    book.page.keyboard.press("Home")
    player.root.get_by_label("Kind of event").select_option(label=_option(player, "preempt"))
    player.press("Next event")
    assert player.step == preempted[0]
    book.run_cell(2)
    assert book.printed(2).strip().endswith(str(player.step)), "the kernel does not know which step the page shows"


def _steps(book: Notebook) -> list[int]:
    """How many requests each step preempted, asked of the kernel."""
    found = book.ask("[len(record.plan.preempted) for record in llm.trace.steps]")
    return [int(number) for number in re.findall(r"\d+", found)]


def _option(player: Player, word: str) -> str:
    texts: Sequence[str] = player.root.get_by_label("Kind of event").locator("option").all_text_contents()
    return next(text for text in texts if word in text.lower())


def test_a_live_player_steps_the_engine(write: Callable[..., Notebook]) -> None:
    book = write(
        "live.ipynb",
        f"{TINY}\nfor prompt, wish in zip(prompts[:2], params):\n    llm.engine.add_request(prompt, wish)",
        "player = StepPlayer(llm)\nplayer",
        "llm.engine.add_request(prompts[3], params[3])",
    )
    book.run_cell(0)
    book.run_cell(1)
    player = _player(book, 1)
    assert book.ask("len(llm.trace.steps)") == "0"
    for done in range(1, 4):
        player.press("Step ›")
        player.root.page.wait_for_function(
            "([root, steps]) => Number(root.dataset.steps) === steps && Number(root.dataset.step) === steps - 1",
            arg=[player.root.element_handle(), done],
        )
        assert book.ask("len(llm.trace.steps)") == str(done), "the page shows a step that the engine has not run"
    labels = player.root.locator(".sp-label")
    assert labels.count() == 2
    book.run_cell(2)
    player.press("Step ›")
    player.root.locator(".sp-label").nth(2).wait_for(state="visible")  # of the request that a later cell has added
    assert player.step == 3
    player.root.get_by_label("Steps per second").select_option("10")
    player.press("Play")
    player.root.page.wait_for_function(
        "root => root.dataset.playing === 'no' && Number(root.dataset.finished) === 3", arg=player.root.element_handle()
    )
    assert book.ask("llm.engine.has_unfinished()") == "False"
    assert int(book.ask("len(llm.trace.steps)")) == player.steps
    book.check()


def test_widgets_in_one_notebook_leave_one_another_alone(write: Callable[..., Notebook]) -> None:
    """Each widget runs its own copy of its script, on one page: ids, clip paths and rules of colour must not meet."""
    book = write(
        "two.ipynb",
        f"{TINY}\nfrom stepengine.viz.calculator import Calculator\n"
        "many = LLM('tiny-random', trace=True)\n_ = llm.generate(prompts, params)\n"
        "_ = many.generate(12 * prompts[:1], params[0])",
        "display(StepPlayer(llm.trace), StepPlayer(many.trace), Calculator(), Calculator('Qwen3-0.6B'))",
    )
    book.run_all()
    book.check()
    widgets = book.cell(1).locator(".stepplayer, .calculator")
    assert widgets.count() == 4
    ids = widgets.evaluate_all(
        "all => all.flatMap(root => [root, ...root.querySelectorAll('*')])"
        ".flatMap(e => [e.id, e.dataset.view].filter(Boolean))"
    )
    assert len(ids) > 8 and len(ids) == len(set(ids)), sorted({name for name in ids if ids.count(name) > 1})
    few, many = (Player(widgets.nth(place)) for place in (0, 1))
    paint = "chip => getComputedStyle(chip).backgroundColor"
    tints = [few.root.locator(".sp-text .sp-chip").nth(r).evaluate(paint) for r in range(5)]
    assert len(set(tints)) == 5, "five requests are not in five colours beside a player of twelve"
    many.root.focus()
    book.page.keyboard.press("End")
    assert few.step == 0 and many.step == many.steps - 1


# --- predictions --------------------------------------------------------------------------------------------------

ASK = """\
from stepengine.lesson import Predictions
guesses = Predictions()
guesses.ask("blocks", "How many blocks of 16 do 50 tokens take?")"""


def _box(book: Notebook, at: int) -> Any:
    return book.cell(at).locator(".predict")


def test_a_prediction_is_committed_then_graded_after_the_run(write: Callable[..., Notebook], shots: Path) -> None:
    book = write(
        "predict.ipynb",
        ASK,
        'guesses.ask("one", "Do its own tokens come faster?", choices=["faster", "not faster"])',
        'guesses.ask("order", "Which comes first?", order=["decode", "prefill"])',
        'guesses.reveal("blocks", -(-50 // 16))',
        'guesses.reveal("one", "not faster")\nguesses.reveal("order", ["prefill", "decode"])',
        "guesses.summary()",
    )
    for at in range(3):
        book.run_cell(at)
    number, choice, order = (_box(book, at) for at in range(3))
    number.locator("[data-field]").fill("many")
    number.get_by_role("button", name="Commit").click()
    number.locator("[data-note]", has_text="number").wait_for()
    assert number.get_attribute("data-state") == "open", "what is no number was taken"
    number.locator("[data-field]").fill("5")
    number.locator("[data-field]").press("Enter")
    choice.get_by_role("radio").nth(1).check()
    choice.get_by_role("button", name="Commit").click()
    order.locator("li").nth(1).get_by_role("button").first.click()
    order.get_by_role("button", name="Commit").click()
    for box in (number, choice, order):
        box.and_(book.page.locator('[data-state="committed"]')).wait_for()
    assert "4" not in number.inner_text(), "the answer is shown before the run"

    book.run_cell(3)
    number.and_(book.page.locator('[data-state="revealed"]')).wait_for()
    assert number.get_attribute("data-verdict") == "off"
    assert choice.get_attribute("data-state") == "committed", "another question's answer was shown"
    book.run_cell(4)
    choice.and_(book.page.locator('[data-verdict="right"]')).wait_for()
    order.and_(book.page.locator('[data-verdict="right"]')).wait_for()
    assert "You said 5; it is 4" in book.printed(3) and "You said 5; it is 4" in number.inner_text()
    assert "right" in choice.locator("[data-grade]").inner_text()
    book.run_cell(5)
    assert "3 predictions: 2 right, 1 off" in book.printed(5)
    book.check()
    book.page.screenshot(path=shots / "predictions.png")


# --- controls -----------------------------------------------------------------------------------------------------

CONTROLS = """\
from stepengine.viz.controls import Controls
def run(prompts, params, block_size, num_blocks):
    sizes = {"max_model_len": 64, "max_num_seqs": 4, "block_size": block_size, "num_blocks": num_blocks}
    llm = LLM("tiny-random", stage=2, trace=True, **sizes)
    llm.generate(prompts, params)
    return llm
controls = Controls(run, {"block_size": [4, 8, 16], "num_blocks": (14, 60)}, prompts, params, own=False)
controls"""


def _count(controls: Any, name: str) -> list[str]:
    """A row of the table that compares the runs: before, now, difference."""
    cells: list[str] = controls.locator(f'tr[data-metric="{name}"] td').all_inner_texts()
    return cells


def test_a_control_is_turned_and_the_two_runs_are_compared(write: Callable[..., Notebook], shots: Path) -> None:
    book = write("controls.ipynb", TINY, CONTROLS)
    book.run_all()
    controls = book.cell(1).locator(".controls")
    assert controls.get_attribute("data-runs") == "1"
    first = controls.locator("[data-sentence]").inner_text()
    steps = int(book.ask("len(controls.trace.steps)"))
    assert Player(book.cell(1).locator(".stepplayer")).steps == steps

    pool = controls.locator('[data-control="num_blocks"]')
    pool.fill("60")
    pool.press("Tab")
    controls.locator("[data-pending]", has_text="num_blocks").wait_for()
    assert controls.get_attribute("data-runs") == "1", "a setting that is turned must not run by itself"
    controls.get_by_role("button", name="Run").click()
    controls.and_(book.page.locator('[data-runs="2"][data-state="idle"]')).wait_for()
    now = int(book.ask("len(controls.trace.steps)"))
    assert now < steps, "more blocks, and not fewer steps: this test shows nothing"
    sentence = controls.locator("[data-sentence]").inner_text()
    assert sentence != first and "num_blocks" in sentence
    assert _count(controls, "steps")[:2] == [str(steps), str(now)]
    compare = book.cell(1).locator(".sp-compare")
    compare.wait_for()
    sides = compare.locator(".sp-side")
    assert [side.get_attribute("data-name") for side in sides.all()] == ["before", "now"]
    assert compare.get_attribute("data-steps") == str(steps)
    player = Player(compare)
    player.press("Step ›")
    assert player.step == 1
    player.root.focus()
    book.page.keyboard.press("End")
    assert sides.nth(1).get_attribute("data-over") == "yes" and sides.nth(0).get_attribute("data-over") == "no"
    book.cell(1).screenshot(path=shots / "controls.png")
    book.check()


# --- exercises ----------------------------------------------------------------------------------------------------


def _solution(book: str, head: str) -> str:
    """The worked solution that begins with `head`, from the solutions' notebook, with that one's imports."""
    cells = nbformat.read(BOOKS / "solutions" / book, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    imports = [line for line in code[0].splitlines() if re.match(r"(from|import) ", line) and "stepengine" not in line]
    found = [source for source in code if source.startswith(head)]
    assert found, f"no solution of {book} begins with {head!r}"
    return "\n".join([*imports, "", "", found[0]])


def _solve(book: Notebook, stub: str, check: str, shots: Path) -> int:
    """Run an exercise's check on its stub, type the worked solution over the stub, check again; the check's cell."""
    begin, test = _run_where(book, stub, check)
    failed = book.printed(test)
    assert "FAIL" in failed and "example:" in failed and "hint:" in failed
    passed, total = map(int, re.findall(r"(\d+) of (\d+) promises hold", failed)[0])
    assert passed < total
    book.type_into(begin, _solution(book.name, stub))
    book.run_cell(begin)
    book.run_cell(test)
    solved = book.printed(test)
    assert f"{total} of {total} promises hold" in solved and "FAIL" not in solved
    book.cell(test).screenshot(path=shots / f"exercise_{stub.split()[1]}.png")
    book.check()
    return test


def _own_part(book: Notebook, after: int) -> int:
    """Run the cell that puts the reader's part of the exercise checked in cell `after` to work; its number."""
    own = next(cell["at"] for cell in book.cells() if cell["at"] > after and "in-the-engine" in cell["tags"])
    book.run_cell(own)
    book.check()
    return int(own)


def test_the_exercises_of_00_are_solved_in_the_browser(notebook: Open, shots: Path) -> None:
    book = notebook("00_naive.ipynb")
    _run_where(book, "import torch")
    check = _solve(book, "def greedy_generate", "check_greedy_generate(greedy_generate", shots)
    assert "same tokens: True" in book.printed(_own_part(book, check))
    check = _solve(book, "def tokens_computed", "check_tokens_computed(tokens_computed", shots)
    said, ran = re.findall(r"you say (\d+), the engine counted (\d+)", book.printed(_own_part(book, check)))[0]
    assert said == ran


def test_the_exercises_of_02a_are_solved_and_run_in_the_engine(notebook: Open, shots: Path) -> None:
    book = notebook("02a_paged.ipynb")
    book.run_imports()
    for stub, check in (("def slot", "check_slot(slot)"), ("class MyBlockPool", "check_block_pool(MyBlockPool)")):
        own = _own_part(book, _solve(book, stub, check, shots))
        assert "same tokens: True" in book.printed(own)
        compare = Player(book.cell(own).locator(".sp-compare"))
        names = compare.root.locator(".sp-side").evaluate_all("sides => sides.map(side => side.dataset.name)")
        assert names == ["mine", "ours"] and compare.state()["apart"] == "no"
        compare.press("Step ›")
        assert compare.step == 1
        book.cell(own).screenshot(path=shots / f"own_{stub.split()[1]}.png")


def test_an_unsolved_exercise_says_so_where_the_part_would_run(notebook: Open) -> None:
    book = notebook("02a_paged.ipynb")
    book.run_imports()
    _run_where(book, "def slot")
    (check,) = _run_where(book, "check_slot(slot)")
    assert "Not yet" in book.printed(_own_part(book, check))
