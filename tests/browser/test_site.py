"""The static site, served as files: every page quiet, nothing from another host, dark on demand, players that step."""

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.browser.access import pale_texts
from tests.browser.conftest import script
from tests.browser.player import Player, drive
from tests.browser.watch import Watch
from tests.conftest import miss

CELLS = [
    new_markdown_cell("# 00 · A small notebook\n\nWhat the site makes of a figure, a player and a text."),
    new_code_cell(
        "from stepengine import LLM, SamplingParams\n"
        "from stepengine.lesson import show\n"
        "from stepengine.viz.figures import scheduler_timeline\n"
        "from stepengine.viz.player import StepPlayer\n"
        'llm = LLM("tiny-random", stage="1b", max_model_len=64, max_num_seqs=2, trace=True)\n'
        "params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)\n"
        "_ = llm.generate([[1, 2, 3], [4, 5, 6, 7], [8, 9]], params)"
    ),
    new_code_cell("show(scheduler_timeline(llm.trace))"),
    new_code_cell("StepPlayer(llm.trace)"),
]
DARK = "localStorage.setItem('mode', 'dark'); localStorage.setItem('theme', 'dark')"
Pages = Callable[..., tuple[Any, Watch]]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and writes no log."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site of one notebook, built by scripts/site.py."""
    try:
        import myst_nb  # noqa: F401
        import sphinx_book_theme  # noqa: F401
    except ImportError as error:
        miss(f"needs the extra `site` ({error})")
    folder = tmp_path_factory.mktemp("site")
    (folder / "notebooks").mkdir()
    kernel = {"display_name": "stepengine", "language": "python", "name": "python3"}
    book = new_notebook(cells=CELLS, metadata={"kernelspec": kernel})
    nbformat.write(book, folder / "notebooks" / "00_small.ipynb")
    out = folder / "out"
    sys.modules.pop("scripts_site", None)
    status = script("site").main(
        ["--notebooks", str(folder / "notebooks"), "-o", str(out), "--work", str(folder / "work")]
    )
    assert status == 0
    return out


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_every_page_is_quiet_and_asks_no_other_host(site: Path, address: str, pages: Pages) -> None:
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if "_static" not in path.parts)
    assert {"index.html", "search.html", "notebooks/00_small.html"} <= set(found)
    page, watch = pages()
    for name in found:
        answer = page.goto(f"{address}/{name}", wait_until="load")
        assert answer.ok, f"{name}: {answer.status}"
        page.wait_for_load_state("networkidle")
        assert watch.problems() == [], name
        assert page.title().strip(), f"{name} has no title"
    assert all(url.startswith(address) for url in watch.requested)


def test_links_lead_somewhere(site: Path, address: str, pages: Pages) -> None:
    page, _ = pages()
    page.goto(f"{address}/index.html")
    own = page.evaluate("() => [...document.querySelectorAll('a[href]')].map(a => a.href)")
    own = sorted({link.split("#")[0] for link in own if link.startswith(address)})
    assert any(link.endswith("00_small.html") for link in own), "the index does not lead to the notebook"
    for link in own:
        assert page.request.get(link).ok, link


def test_a_figure_is_drawn_and_told_in_words(address: str, pages: Pages, shots: Path) -> None:
    page, _ = pages()
    page.goto(f"{address}/notebooks/00_small.html")
    page.wait_for_selector(".se-plot .js-plotly-plot svg.main-svg")
    box = page.locator(".se-plot svg.main-svg").first.bounding_box()
    assert box["width"] > 200 and box["height"] > 100
    assert len(page.locator(".se-plot").first.get_attribute("aria-label")) > 20
    assert pale_texts(page.locator(".se-plot").first) == []
    page.screenshot(path=shots / "site_light.png", full_page=True)


@pytest.mark.parametrize("dark", [False, True])
def test_a_player_in_the_page_steps_and_follows_its_theme(dark: bool, address: str, pages: Pages, shots: Path) -> None:
    page, _ = pages()
    if dark:
        page.add_init_script(DARK)
    page.goto(f"{address}/notebooks/00_small.html")
    frame = page.locator("iframe.se-player")
    frame.scroll_into_view_if_needed()
    assert frame.get_attribute("title").strip()
    player = Player(frame.content_frame.locator(".stepplayer"))
    assert player.state()["theme"] == ("dark" if dark else "light")
    drive(player)
    high = frame.bounding_box()["height"]
    assert high >= player.root.bounding_box()["height"], "the player is cut off by its frame"
    if dark:
        page.screenshot(path=shots / "site_dark.png", full_page=True)


def test_the_switch_turns_page_figure_and_player_dark(address: str, pages: Pages) -> None:
    page, _ = pages()
    page.goto(f"{address}/notebooks/00_small.html")
    page.wait_for_selector(".se-plot .js-plotly-plot svg.main-svg")
    frame = page.locator("iframe.se-player")
    frame.scroll_into_view_if_needed()
    player = Player(frame.content_frame.locator(".stepplayer"))
    assert _theme(page) == "light"
    paper = _paper(page)
    page.locator("button.theme-switch-button:visible").first.click()
    dark = page.locator("[data-mode='dark']:visible")  # a menu in newer themes; older ones turn on at each click
    if dark.count():
        dark.first.click()
    else:
        page.locator("button.theme-switch-button:visible").first.click()
    assert _theme(page) == "dark"
    frame.content_frame.locator('.stepplayer[data-theme="dark"]').wait_for()
    assert player.state()["theme"] == "dark"
    assert _paper(page) != paper
    assert pale_texts(page.locator(".se-plot").first) == []


def _theme(page: Any) -> str:
    return str(page.evaluate("() => document.documentElement.dataset.theme"))


def _paper(page: Any) -> str:
    return str(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
