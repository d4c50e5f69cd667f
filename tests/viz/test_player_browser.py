"""The step player in a real browser: skipped by name where Playwright or Chromium is not installed."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepengine.trace import Replay, idle_rows
from stepengine.viz.player import StepPlayer

sys.path.insert(0, str(Path(__file__).parent.parent / "trace"))
from synthetic import Job, simulate, simulate_paged  # noqa: E402

MIXED = [Job(14, 20, n=3), Job(9, 22), Job(16, 16, n=2)]


@pytest.fixture
def open_player(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """open_player(trace, query, viewport, **settings) -> the page; errors on it fail the test."""
    pages, errors = [], []

    def make(trace: Any, query: str = "", viewport: tuple[int, int] = (1100, 720), **settings: Any) -> Any:
        path = StepPlayer(trace, **settings).save_html(tmp_path / f"{len(pages)}.html")
        page = browser.new_page(viewport={"width": viewport[0], "height": viewport[1]})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith("file:") else errors.append(request.url))
        page.goto(f"{path.as_uri()}?{query}")
        page.wait_for_selector(".stepplayer[data-step]")
        pages.append(page)
        return page

    yield make
    for page in pages:
        page.close()
    assert errors == []


def state(page: Any) -> dict[str, str]:
    return dict(page.evaluate("() => ({...document.querySelector('.stepplayer').dataset})"))


def test_stepping_follows_the_trace(open_player: Callable[..., Any]) -> None:
    trace = simulate(stage="1a")
    page = open_player(trace)
    page.focus(".stepplayer")
    for t, (record, idle) in enumerate(zip(trace.steps, idle_rows(trace), strict=True)):
        now = state(page)
        assert int(now["step"]) == t
        assert int(now["tokens"]) == record.plan.num_tokens and int(now["rows"]) == len(record.plan.chunks)
        assert int(now["finished"]) == sum(len(r.finished) for r in trace.steps[: t + 1])
        assert int(now["idle"]) == idle
        used = page.evaluate("() => [...document.querySelectorAll('[data-slot]')].map(e => Number(e.dataset.used))")
        ends = [c.end for c in record.plan.chunks]
        assert set(ends) <= set(used) and len(used) == 3
        page.keyboard.press("ArrowRight")
    assert int(state(page)["step"]) == len(trace.steps) - 1
    page.keyboard.press("Home")
    assert state(page)["step"] == "0"


def test_the_buttons_the_slider_and_next_event(open_player: Callable[..., Any]) -> None:
    page = open_player(simulate(stage="1a"), "step=2")
    page.get_by_role("button", name="To the next event (n)").click()
    assert state(page)["step"] == "4"  # C ends; step 3 is another token for A and C
    page.get_by_role("button", name="One step back (left arrow)").click()
    assert state(page)["step"] == "3"
    page.get_by_role("slider").fill("9")
    assert state(page)["step"] == "9"
    assert page.locator(".sp-say").inner_text().startswith("D, E and F start")
    page.get_by_label("Steps per second").select_option("10")
    page.get_by_role("button", name="Play or pause (space)").click()
    page.wait_for_selector('.stepplayer[data-step="11"]')
    assert state(page)["playing"] == "yes" and page.locator(".sp-say").get_attribute("aria-live") == "off"
    page.get_by_role("button", name="Play or pause (space)").click()
    assert state(page)["playing"] == "no" and page.locator(".sp-say").get_attribute("aria-live") == "polite"


def test_a_request_is_highlighted_in_all_panels_by_pointer_and_keyboard(open_player: Callable[..., Any]) -> None:
    page = open_player(simulate(stage="1b"), "step=4")
    marked = "() => [...new Set([...document.querySelectorAll('[data-hot=\"yes\"]')].map(e => e.closest('[data-panel]').dataset.panel))].sort()"  # noqa: E501
    page.hover(".sp-text[data-r='2']")
    assert state(page)["hot"] == "C"
    assert page.evaluate(marked) == ["kv", "schedule", "texts", "tokens"]
    page.mouse.move(5, 5)
    page.focus(".stepplayer")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert state(page)["hot"] == "B"
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowUp")
    assert state(page)["hot"] == "B A"
    assert page.locator(".sp-label[data-r='1']").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    assert state(page)["step"] == "5"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_keeps_its_contrast(open_player: Callable[..., Any], theme: str) -> None:
    trace = simulate(stage="1a")
    trace.texts = {i: (f"prompt {i}", tuple(f" word{k}" for k in range(12))) for i in trace.requests}
    page = open_player(trace, f"step=2&theme={theme}")
    assert state(page)["theme"] == theme
    colors = page.evaluate(
        """() => ['.sp-say', '.sp-sub', '.sp-note', '.sp-key', '.sp-prompt', '.sp-state', '.sp-chip', 'button', 'mark']
          .flatMap(name => [...document.querySelectorAll('.stepplayer ' + name)].map(element => {
            let back = element;
            while (getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
            return [name, getComputedStyle(element).color, getComputedStyle(back).backgroundColor];
          }))"""
    )
    assert {name for name, _, _ in colors} >= {".sp-say", ".sp-note", ".sp-prompt", ".sp-chip", "mark"}
    for name, ink, paper in colors:
        assert contrast(ink, paper) >= 4.5, (name, ink, paper)


def contrast(a: str, b: str) -> float:
    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def paged() -> Any:
    """Sharing, copies, both preemptions and the host, in one short trace."""
    return simulate_paged(MIXED, num_blocks=20, preemption="swap", host_blocks=9, forks={6: 0}).trace


def test_the_block_map_and_the_tables_follow_the_trace(open_player: Callable[..., Any]) -> None:
    trace = paged()
    page = open_player(trace)
    page.focus(".stepplayer")
    copies = 0
    for now in Replay(trace):
        cells = page.evaluate(
            "() => [...document.querySelectorAll('[data-block]')].map(e => [Number(e.dataset.block), "
            "Number(e.dataset.refs || 0), Number(e.dataset.tokens || 0), e.classList.contains('sp-isnew'), "
            "[...new Set([...e.querySelectorAll('[data-r]')].map(x => Number(x.dataset.r)))]])"
        )
        assert len(cells) == 21 and cells[0][:3] == [0, 0, 0]
        for block, refs, tokens, new, owners in cells[1:]:
            assert refs == now.refs.get(block, 0) and tokens == now.block_tokens.get(block, 0)
            assert new == (block in now.new_blocks)
            assert owners == [r for r, table in now.table.items() if block in table]
        rows = page.evaluate("() => [...document.querySelectorAll('.sp-table')].map(e => ({...e.dataset}))")
        for row in rows:
            assert [int(b) for b in row["blocks"].split()] == list(now.table[int(row["r"])])
            hosted = [int(slot) for slot in row.get("hosted", "").split()]
            assert hosted == list(now.hosted.get(int(row["r"]), ()))
        told = page.evaluate("() => [...document.querySelectorAll('[data-copy]')].map(e => e.dataset.copy)")
        letters = "ABCDEFG"
        assert told == [f"{letters[c.request]} {c.source} {c.destination}" for c in now.record.plan.copies]
        copies += len(told)
        assert page.locator("[data-panel=kv] h4 span").inner_text().startswith(f"{len(now.refs)} of 20 in use")
        page.keyboard.press("ArrowRight")
    assert copies


def test_a_block_fills_from_the_bottom(open_player: Callable[..., Any]) -> None:
    page = open_player(paged(), "step=2")
    shares = page.evaluate(
        "() => [...document.querySelectorAll('[data-block]')].filter(e => e.dataset.tokens > 0).map(e => {"
        " const all = e.querySelector('.sp-ground').getBBox(), full = e.querySelector('.sp-fill').getBBox();"
        " return [Number(e.dataset.tokens), full.height / all.height, full.y + full.height - all.y - all.height]; })"
    )
    assert len({tokens for tokens, _, _ in shares}) >= 3
    for tokens, share, below in shares:
        assert share == pytest.approx(tokens / 4, abs=0.02) and below == pytest.approx(0, abs=0.01)


def test_blocks_are_reached_by_keyboard_and_their_request_is_marked_everywhere(open_player: Callable[..., Any]) -> None:
    trace = paged()
    page = open_player(trace, "step=2")
    page.focus(".sp-map")
    readout = page.locator(".sp-readout")
    assert readout.inner_text() == "block 1: 4 of 4 tokens, 3 references: A, B, C, logical block 0"
    page.keyboard.press("ArrowLeft")
    assert readout.inner_text() == "block 0: padding, never given to a request"
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    free = 20 not in Replay(trace).at(2).refs
    assert readout.inner_text().startswith("block 20: free" if free else "block 20: ") and state(page)["step"] == "2"
    page.focus(".stepplayer")
    page.keyboard.press("ArrowRight")
    assert state(page)["step"] == "3"
    page.hover("[data-block='1'] [data-r='1']")
    marked = "() => [...new Set([...document.querySelectorAll('[data-hot=\"yes\"]')].map(e => e.closest('[data-panel]').dataset.panel))].sort()"  # noqa: E501
    assert state(page)["hot"] == "B" and page.evaluate(marked) == ["kv", "schedule", "tables", "texts", "tokens"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_letters_on_blocks_keep_their_contrast(open_player: Callable[..., Any], theme: str) -> None:
    page = open_player(paged(), f"theme={theme}")
    page.focus(".stepplayer")
    colors = set()
    for _ in range(12):
        colors |= {
            tuple(pair)
            for pair in page.evaluate(
                "() => [...document.querySelectorAll('.sp-map .sp-own, .sp-map [data-r] .sp-id')].map(e => {"
                " const on = !e.classList.contains('sp-out') && (e.classList.contains('sp-own') || e.classList.contains('sp-on'));"  # noqa: E501
                " return [getComputedStyle(e).fill,"
                "  getComputedStyle(e.parentElement.querySelector(on ? '.sp-fill' : '.sp-ground')).fill]; })"
            )
        }
        page.keyboard.press("ArrowRight")
    assert len(colors) > 6
    for ink, paper in colors:
        assert contrast(ink, paper) >= 4.5, (ink, paper)


@pytest.mark.parametrize("width", [420, 700, 1100, 1600])
def test_blocks_and_tables_fit_their_place_and_do_not_move(open_player: Callable[..., Any], width: int) -> None:
    trace = simulate_paged([Job(14, 60, n=3), Job(9, 70), Job(16, 66, n=2)], num_blocks=66).trace
    page = open_player(trace, "", (width, 800))
    page.focus(".stepplayer")
    tops = set()
    for _ in range(0, len(trace.steps), 5):
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
        tops.add(
            page.evaluate(
                "() => [...document.querySelectorAll('.sp-panel')].map(e => e.getBoundingClientRect().top + scrollY).join()"  # noqa: E501
            )
        )
        for _ in range(5):
            page.keyboard.press("ArrowRight")
    assert len(tops) == 1


def test_the_room_shows_twelve_requests_and_ninety_six_blocks_in_large_type(open_player: Callable[..., Any]) -> None:
    jobs = [Job(5 + i % 30, 20 + i % 7, n=1 + 2 * (i == 3)) for i in range(40)]
    trace = simulate_paged(jobs, 24, 4, 140, "swap", 60).trace
    page = open_player(trace, "theme=dark", (1280, 720), size="room", step=8)
    assert state(page)["theme"] == "light" and page.locator(".sp-panel").count() == 2
    page.focus(".stepplayer")
    for _ in range(25):
        size = page.evaluate("() => [document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert size == [1280, 720], page.locator(".sp-say").inner_text()
        least = page.evaluate(
            """() => Math.min(...[...document.querySelectorAll('.stepplayer *')]
              .filter(e => e.childElementCount === 0 && e.textContent.trim() && !e.closest('.sp-count'))
              .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
        )
        assert least >= 18
        page.keyboard.press("ArrowRight")
    assert len([e for e in page.locator(".sp-label").all() if e.is_visible()]) == 12
    assert page.locator("[data-block]").count() == 97
    assert "96 of 140 blocks shown" in page.locator("[data-panel=kv] .sp-fold").inner_text()


@pytest.mark.parametrize("stage", ["0", "1a", "1b"])
def test_the_room_fits_a_projector_in_large_type(open_player: Callable[..., Any], stage: str) -> None:
    trace = simulate([(3 + i % 9, 4 + i % 7) for i in range(40)], stage=stage, slots=16)
    page = open_player(trace, "theme=dark", (1280, 720), size="room", step=6)
    assert state(page)["theme"] == "light"
    assert page.locator(".sp-panel").count() == 2
    assert page.evaluate("() => [document.documentElement.scrollWidth, document.documentElement.scrollHeight]") == [
        1280,
        720,
    ]
    rows = [e for e in page.locator(".sp-label").all() if e.is_visible()]
    assert len(rows) == 12
    assert "12 of 40 requests shown" in page.locator(".sp-fold").first.inner_text()
    least = page.evaluate(
        """() => Math.min(...[...document.querySelectorAll('.stepplayer *')]
          .filter(e => e.childElementCount === 0 && e.textContent.trim() && !e.closest('.sp-count'))
          .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
    )
    assert least >= 18


@pytest.mark.parametrize("width", [420, 700, 1100, 1600])
def test_nothing_is_wider_than_its_place(open_player: Callable[..., Any], width: int) -> None:
    trace = simulate([(3 + i % 30, 4 + i % 9) for i in range(12)], stage="1b", slots=4, max_model_len=2048)
    page = open_player(trace, "step=7", (width, 800))
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    cut = page.evaluate(
        "() => [...document.querySelectorAll('.sp-note')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
    )
    assert cut == []


def test_nothing_moves_below_the_sentence_while_stepping(open_player: Callable[..., Any]) -> None:
    trace = simulate(stage="1b")
    page = open_player(trace)
    page.focus(".stepplayer")
    tops = set()
    for _ in trace.steps:
        tops.add(
            page.evaluate(
                "() => [...document.querySelectorAll('.sp-panel')].map(e => e.getBoundingClientRect().top).join()"
            )
        )
        page.keyboard.press("ArrowRight")
    assert len(tops) == 1


def test_sixty_four_requests_step_faster_than_they_are_read(open_player: Callable[..., Any]) -> None:
    trace = simulate([(5 + i % 40, 30 + (i * 7) % 60) for i in range(64)], stage="1b", slots=9, max_model_len=256)
    page = open_player(trace)
    page.focus(".stepplayer")
    took = page.evaluate(
        """async () => {
          const root = document.querySelector('.stepplayer');
          const begin = performance.now();
          for (let i = 0; i < 50; i++) {
            root.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true }));
            root.getBoundingClientRect();
          }
          return (performance.now() - begin) / 50;
        }"""
    )
    assert state(page)["step"] == "50"
    print(f"{took:.1f} ms a step")
    assert page.evaluate("() => document.querySelectorAll('.stepplayer *').length") < 6000


def test_five_hundred_blocks_step_faster_than_they_are_read(open_player: Callable[..., Any]) -> None:
    jobs = [Job(5 + i % 40, 30 + (i * 7) % 30) for i in range(64)]
    page = open_player(simulate_paged(jobs, 40, 4, 512).trace, "step=10")
    took = page.evaluate(
        """async () => {
          const root = document.querySelector('.stepplayer');
          const begin = performance.now();
          for (let i = 0; i < 40; i++) {
            root.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true }));
            root.getBoundingClientRect();
          }
          return (performance.now() - begin) / 40;
        }"""
    )
    assert state(page)["step"] == "50" and page.locator("[data-block]").count() == 513
    print(f"{took:.1f} ms a step")
    assert page.evaluate("() => document.querySelectorAll('.stepplayer *').length") < 7000
