"""Every notebook, as the reader gets it, run from top to bottom in JupyterLab in a real browser."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser.notebook import Notebook
from tests.browser.player import Player, drive

BOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"

# Per cell, one entry for each output, in order: how large it is and what is drawn in it.
DRAWN = """() => [...document.querySelectorAll('.jp-Notebook .jp-Cell')].map((cell) => {
  const size = (element) => { const box = element.getBoundingClientRect(); return Math.min(box.width, box.height); };
  const marks = 'path, rect, circle, line, text, image, canvas, td, p, span, button, input';
  return [...cell.querySelectorAll('.jp-OutputArea-child')].map((output) => {
    const plot = output.querySelector('.js-plotly-plot');
    const player = output.querySelector('.stepplayer');
    return {
      size: size(output), marks: [...output.querySelectorAll(marks)].filter((mark) => size(mark) > 0).length,
      traces: plot ? plot.data.length : 0,
      svg: plot ? Math.min(...[...plot.querySelectorAll('svg.main-svg')].map(size)) : 0,
      player: player ? {...player.dataset} : null };
  });
})"""


@pytest.mark.parametrize("name", [path.name for path in BOOKS])
def test_runs_draws_everything_and_steps(name: str, notebook: Callable[..., Notebook], shots: Path) -> None:
    book = notebook(name)
    book.run_all()
    book.shots(shots / Path(name).stem)
    cells = book.cells()
    book.check()
    for cell in cells:
        assert cell["kind"] != "code" or not cell["source"].strip() or cell["count"] is not None, (
            f"{cell['at']} not run"
        )
    pictures = 0
    for cell, drawn in zip(cells, book.page.evaluate(DRAWN), strict=True):
        for output, look in zip(cell["outputs"], drawn, strict=True):
            where, kinds = (cell["at"], look), output.get("data", {})
            if PLOTLY in kinds:
                assert look["svg"] > 100 and look["traces"] and look["marks"] > 5, where
            elif WIDGET in kinds:
                assert look["size"] > 10 and look["marks"], where
                player = look["player"] or {"live": "yes"}
                assert player.get("live", "yes") == "yes" or int(player["steps"]) > 0 < int(player["rows"]), where
                assert look["player"] or "StepPlayer" not in kinds["text/plain"], where
            pictures += PLOTLY in kinds or WIDGET in kinds
    assert pictures, f"{name} drew nothing"
    assert "Error displaying widget" not in book.page.locator(".jp-Notebook").inner_text()
    players = book.page.locator(".stepplayer:not(.sp-compare, [data-live='yes'])")
    for number in range(players.count()):
        drive(Player(players.nth(number)))
    assert book.watch.problems() == []
