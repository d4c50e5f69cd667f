"""The saved player: one file, opened from disk, that asks nobody for anything and plays to its end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepengine.cli import main
from stepengine.trace import load, save
from stepengine.viz.player import StepPlayer
from tests.browser import runs
from tests.browser.watch import Watch

SIZES = {"page": (1280, 900), "room": (1280, 720)}
Pages = Callable[..., tuple[Any, Watch]]


def _state(page: Any) -> dict[str, str]:
    return dict(page.evaluate("() => ({...document.querySelector('.stepplayer').dataset})"))


def _open(pages: Pages, file: Path, size: str, query: str = "") -> tuple[Any, Watch]:
    width, height = SIZES[size]
    page, watch = pages(width=width, height=height)
    page.goto(file.as_uri() + query)
    page.wait_for_selector(".stepplayer[data-step]")
    return page, watch


# Notes every step that the player shows, with its sentence.
NOTE = """() => {
  const root = document.querySelector('.stepplayer');
  const note = () => (window.seen ||= []).push([Number(root.dataset.step), root.querySelector('.sp-say').textContent]);
  note();
  new MutationObserver(note).observe(root, { attributes: true, attributeFilter: ['data-step'] });
}"""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", runs.RUNS)
def test_plays_to_the_end_and_asks_nobody(stage: str, size: str, pages: Pages, tmp_path: Path, shots: Path) -> None:
    trace = runs.RUNS[stage]()
    file = StepPlayer(trace, size=size).save_html(tmp_path / "player.html")
    page, watch = _open(pages, file, size)
    page.evaluate(NOTE)
    page.get_by_label("Steps per second").select_option("10")
    page.get_by_role("button", name="Play or pause (space)").click()
    page.wait_for_function(
        "half => document.querySelector('.stepplayer').dataset.step >= half", arg=len(trace.steps) // 2
    )
    page.screenshot(path=shots / f"player_stage{stage}_{size}.png")
    page.wait_for_selector('.stepplayer[data-playing="no"]')  # it stops by itself
    seen = page.evaluate("() => window.seen")
    assert [step for step, _ in seen] == list(range(len(trace.steps)))
    assert all(said for _, said in seen) and len({said for _, said in seen}) > 3
    assert int(_state(page)["finished"]) == len(trace.requests)
    assert watch.requested == [file.as_uri()], "a player file must not ask for anything but itself"


@pytest.mark.parametrize("size", SIZES)
def test_the_command_writes_the_same_file(size: str, pages: Pages, tmp_path: Path) -> None:
    trace_file, out = tmp_path / "run.jsonl", tmp_path / "player.html"
    save(runs.RUNS["2"](), trace_file)
    main_ends(["player", str(trace_file), "-o", str(out), *(["--size", "room"] if size == "room" else [])])
    page, watch = _open(pages, out, size, "?step=2")
    assert _state(page)["size"] == size and _state(page)["step"] == "2"
    assert int(_state(page)["steps"]) == len(load(trace_file).steps)
    page.get_by_role("button", name="One step on (right arrow)").click()
    assert _state(page)["step"] == "3"
    assert watch.requested == [f"{out.as_uri()}?step=2"]


def main_ends(arguments: list[str]) -> None:
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code in (0, None), f"stepengine {' '.join(arguments)} ended with {end.code}"
