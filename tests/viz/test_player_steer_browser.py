"""Events, findable blocks, a live engine, two runs and speed, in a real browser; skipped where there is none."""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepengine import LLM, SamplingParams
from stepengine.trace import Replay, Trace
from stepengine.viz.compare import Compare
from stepengine.viz.payload import player_data
from stepengine.viz.player import SCRIPTS, StepPlayer
from stepengine.viz.saved import EXPORT, read_static

sys.path.insert(0, str(Path(__file__).parent.parent / "trace"))
from synthetic import Job, simulate, simulate_paged  # noqa: E402

MIXED = [Job(14, 20, n=3), Job(9, 22), Job(16, 16, n=2)]


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """show(widget or HTML, query, viewport) -> the page; errors on it and requests to a host fail the test."""
    pages, errors = [], []

    def make(shown: Any, query: str = "", viewport: tuple[int, int] = (1100, 900), before: Any = None) -> Any:
        path = tmp_path / f"{len(pages)}.html"
        if isinstance(shown, str):
            path.write_text(shown, encoding="utf-8")
        else:
            shown.save_html(path)
        page = browser.new_page(viewport={"width": viewport[0], "height": viewport[1]})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("request", lambda request: None if request.url.startswith("file:") else errors.append(request.url))
        if before is not None:
            before(page)
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


def served() -> Trace:
    llm = LLM("tiny-random", stage=4, trace=True, block_size=4, max_model_len=64, num_blocks=20)
    prompts = [[3 + k for k in range(12)] + [60 + i] * (2 + i) for i in range(4)]
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    llm.generate(prompts[0], params)
    llm.generate(prompts, params)
    assert llm.trace is not None
    return llm.trace


# -- events ---------------------------------------------------------------------------------------


def test_the_next_and_the_last_event_of_a_kind(show: Callable[..., Any]) -> None:
    trace = simulate_paged(MIXED, num_blocks=20, preemption="swap", host_blocks=9).trace
    steps = player_data(trace)["steps"]
    page = show(StepPlayer(trace))
    choice = page.get_by_label("Kind of event")
    offered = choice.evaluate("e => [...e.options].map(o => o.value)")
    assert offered == ["any", *(kind for kind, _ in player_data(trace)["kinds"])] and "fork" not in offered
    for kind in offered[1:]:
        at = [t for t, step in enumerate(steps) if kind in step.get("kinds", ())]
        choice.select_option(kind)
        page.focus(".stepplayer")
        page.keyboard.press("Home")
        seen = [0] if 0 in at else []
        for _ in range(len(at) + 2):
            page.keyboard.press("n")
            seen += [int(state(page)["step"])] if int(state(page)["step"]) not in seen else []
        assert seen == at, kind
        assert page.locator(".sp-told").inner_text() == f"No later {dict(player_data(trace)['kinds'])[kind]}."
        for _ in at[1:]:
            page.keyboard.press("Shift+N")
        assert int(state(page)["step"]) == at[0]
    choice.select_option("any")
    page.get_by_role("button", name="To the next event (n)").click()
    page.get_by_role("button", name="To the event before (p)").click()
    page.focus(".stepplayer")
    page.keyboard.press("End")
    page.keyboard.press("p")
    events = [t for t, step in enumerate(steps) if "event" in step]
    assert int(state(page)["step"]) == [t for t in events if t < len(steps) - 1][-1]


@pytest.mark.parametrize(("size", "viewport"), [("page", (1100, 900)), ("page", (700, 900)), ("room", (1280, 720))])
def test_controls_are_neither_cut_nor_over_each_other(show: Callable[..., Any], size: str, viewport: Any) -> None:
    page = show(StepPlayer(served(), size=size), "step=9", viewport)
    boxes = page.evaluate(
        """() => [...document.querySelectorAll('.sp-controls button, .sp-controls select, .sp-controls input, .sp-at')]
          .map(e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom, e.scrollWidth - e.clientWidth]; })"""  # noqa: E501
    )
    assert len(boxes) == 9
    for i, (left, top, right, bottom, over) in enumerate(boxes):
        assert 0 <= left and right <= viewport[0] and over <= 1
        for other in boxes[:i]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    if size == "room":
        assert page.evaluate("() => document.documentElement.scrollHeight") <= 720


def test_a_keyboard_reaches_every_control_and_sees_where_it_is(show: Callable[..., Any]) -> None:
    page = show(StepPlayer(served()), "step=5")
    names = []
    for _ in range(14):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "() => { const e = document.activeElement;"
            " return [e.getAttribute('aria-label') || e.tagName, getComputedStyle(e).outlineStyle]; }"
        )
        names.append(name)
        assert outline != "none" or name == "BODY", name
    controls = "Step player,One step back,One step on,To the event before,Kind of event,To the next event,Play or pause"
    for label in f"{controls},Steps per second,Step,request A,Block pool".split(","):
        assert any(name.startswith(label) for name in names), (label, names)


# -- findable blocks ------------------------------------------------------------------------------


def test_free_blocks_that_can_be_found_are_dotted_counted_and_said(show: Callable[..., Any]) -> None:
    trace = served()
    page = show(StepPlayer(trace))
    page.focus(".stepplayer")
    for now in Replay(trace):
        dotted = page.evaluate("() => [...document.querySelectorAll('[data-kept=\"yes\"]')].map(e => +e.dataset.block)")
        assert set(dotted) == now.kept_blocks
        assert page.locator(".sp-kept-block").count() == len(dotted)
        title = page.locator("[data-panel='kv'] h4 span").inner_text()
        assert (f"{len(dotted)} free but findable" in title) == bool(dotted)
        page.keyboard.press("ArrowRight")
    t = next(now.index for now in Replay(trace) if now.kept_blocks)
    page.get_by_role("slider").fill(str(t))
    block = min(Replay(trace).at(t).kept_blocks)
    page.hover(f"[data-block='{block}']")
    assert page.locator(".sp-readout").inner_text().startswith(f"block {block}: free, still findable")


# -- live -----------------------------------------------------------------------------------------

MODEL = """
const listeners = {};
let sent = {};
const fire = (name) => (listeners["change:" + name] || []).forEach((call) => call());
const model = {
  get: (name) => traits[name],
  set: (name, value) => { if (traits[name] !== value) { traits[name] = sent[name] = value; fire(name); } },
  save_changes: async () => { // as a kernel does: the values come back together, then the listeners are called
    const out = sent;
    sent = {};
    const back = await window.kernel(JSON.stringify(out));
    const changed = Object.keys(back).filter((name) => traits[name] !== back[name]);
    Object.assign(traits, back);
    changed.forEach(fire);
  },
  on: (name, call) => (listeners[name] ||= []).push(call),
  off: () => {},
};
"""
SYNCED = ("data", "step", "notice", "asked", "answered", "live", "size")


def live_page(show: Callable[..., Any], player: StepPlayer) -> Any:
    """The player's page, its model tied to the widget in this process."""

    def kernel(text: str) -> dict[str, Any]:
        for name, value in json.loads(text).items():
            setattr(player, name, value)
        return {name: getattr(player, name) for name in SYNCED}

    traits = json.dumps({name: getattr(player, name) for name in SYNCED})
    script = read_static(SCRIPTS).replace(EXPORT, "")
    css = read_static(["player.css"])
    page = (
        f"<!doctype html><meta charset='utf-8'><style>{css}</style><body><div id='here'></div><script type='module'>"
        f"{script}\nconst traits = {traits};{MODEL}render({{ model, el: document.getElementById('here') }});</script>"
    )
    return show(page, before=lambda opened: opened.expose_function("kernel", kernel))


def test_step_and_play_run_the_engine_from_the_page(show: Callable[..., Any]) -> None:
    llm = LLM("tiny-random", stage=4, trace=True, block_size=4, max_model_len=64, num_blocks=30)
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    player = StepPlayer(llm)
    page = live_page(show, player)
    assert state(page)["live"] == "yes" and page.locator(".sp-at").inner_text() == "no step yet"
    step = page.get_by_role("button", name="One step on; at the last one, the engine's next (right arrow)")
    step.click()
    page.wait_for_selector(".stepplayer[data-notice='yes']")
    assert page.locator(".sp-notice").inner_text().startswith("No request yet: add one with llm.engine.add_request")
    llm.engine.add_request([3, 4, 5, 6, 7], params)
    step.click()
    page.wait_for_selector(".stepplayer[data-step='0'][data-steps='1'][data-busy='no']")
    assert page.locator(".sp-notice").is_hidden() and len(llm.trace.steps) == 1
    page.focus(".stepplayer")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".stepplayer[data-step='1'][data-busy='no']")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")  # replayed
    page.wait_for_selector(".stepplayer[data-step='1']")
    assert len(llm.trace.steps) == 2
    llm.engine.add_request([9, 8, 7], params)  # from another cell
    page.get_by_label("Steps per second").select_option("10")
    page.keyboard.press(" ")
    page.wait_for_selector(".stepplayer[data-notice='yes'][data-playing='no']")
    assert page.locator(".sp-notice").inner_text().startswith("Every request has ended")
    assert not llm.engine.has_unfinished() and int(state(page)["steps"]) == len(llm.trace.steps)
    assert int(state(page)["step"]) == len(llm.trace.steps) - 1
    assert page.locator(".sp-label").count() == 2


def test_an_error_of_the_engine_shows_on_the_page_and_stops_the_play(show: Callable[..., Any]) -> None:
    llm = LLM("tiny-random", stage=1, trace=True, max_model_len=64)
    llm.engine.add_request([3, 4, 5], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))
    player = StepPlayer(llm)
    player.step_engine()
    page = live_page(show, player)

    def broken(*_: Any) -> Any:
        raise RuntimeError("the reader's own part is at fault")

    llm.engine.scheduler.plan = broken
    page.focus(".stepplayer")
    page.keyboard.press(" ")
    page.wait_for_selector(".stepplayer[data-notice='yes'][data-playing='no']")
    assert (
        page.get_by_role("alert").inner_text() == "The engine stopped. RuntimeError: the reader's own part is at fault"
    )
    assert isinstance(player.error, RuntimeError)


# -- two runs -------------------------------------------------------------------------------------


def sides(page: Any) -> list[dict[str, str]]:
    return list(page.evaluate("() => [...document.querySelectorAll('.sp-side')].map(e => ({...e.dataset}))"))


def test_two_runs_step_together_and_pick_out_the_same_request(show: Callable[..., Any]) -> None:
    a, b = simulate(stage="1a"), simulate(stage="1b")
    compare = Compare(a, b, names=("static", "continuous"))
    page = show(compare)
    assert page.locator(".sp-say").inner_text() == compare.sentence
    page.focus(".stepplayer")
    for t in range(len(a.steps)):
        left, right = sides(page)
        assert (left["step"], right["step"]) == (str(t), str(min(t, len(b.steps) - 1)))
        assert right["over"] == ("yes" if t >= len(b.steps) else "no")
        assert int(left["tokens"]) == a.steps[t].plan.num_tokens
        page.keyboard.press("ArrowRight")
    page.get_by_label("Kind of event").select_option("differs")
    page.get_by_role("button", name="To the event before (p)").click()
    assert int(state(page)["step"]) == compare.difference.step
    page.hover(".sp-side[data-name='static'] .sp-label[data-r='2']")
    hot = page.evaluate(
        "() => [...document.querySelectorAll('.sp-side')].map(side => [...new Set([...side.querySelectorAll('[data-hot=yes]')].map(e => e.dataset.r))])"  # noqa: E501
    )
    assert hot == [["2"], ["2"]]
    fills = page.evaluate(
        "() => [...document.querySelectorAll('.sp-side')].map(side => getComputedStyle(side.querySelector('g[data-r=\"2\"] .sp-work')).fill)"  # noqa: E501
    )
    assert fills[0] == fills[1]
    rows = page.evaluate("() => Object.fromEntries([...document.querySelectorAll('tr[data-metric]')].map(r => [r.dataset.metric, [...r.cells].map(c => c.innerText)]))")  # noqa: E501  # fmt: skip
    assert rows["steps"] == ["steps", "21", "17", "−4"]


@pytest.mark.parametrize("width", [420, 700, 1200])
def test_two_runs_fit_any_width(show: Callable[..., Any], width: int) -> None:
    page = show(Compare(simulate(stage="2"), served()), "step=7", (width, 900))
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    tops = page.evaluate("() => [...document.querySelectorAll('.sp-side')].map(e => e.getBoundingClientRect().top)")
    assert (tops[0] == tops[1]) == (width >= 800)


def test_one_empty_side_is_said_on_the_page(show: Callable[..., Any]) -> None:
    page = show(Compare(simulate(stage="1b"), Trace({"stage": "1b"}), names=("ours", "yours")), "step=3")
    assert "yours has no steps" in page.locator(".sp-say").inner_text()
    assert "nothing to show" in page.locator(".sp-side[data-name='yours']").inner_text()
    assert state(page)["step"] == "3"


# -- speed ----------------------------------------------------------------------------------------

TIMED = """async () => {
  const root = document.querySelector('.stepplayer');
  const script = [], whole = [];
  for (let i = 0; i < 30; i++) {
    const begin = performance.now();
    root.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true }));
    script.push(performance.now() - begin);
    root.getBoundingClientRect(); // and with its layout
    whole.push(performance.now() - begin);
    await new Promise((done) => setTimeout(done));
  }
  return { script, whole };
}"""
PLAYED = """async () => {
  const root = document.querySelector('.stepplayer');
  const rate = root.querySelector('[aria-label="Steps per second"]');
  rate.value = '10';
  const seen = new Set();
  let empty = 0;
  const note = () => {
    seen.add(root.dataset.step);
    const gone = [...root.querySelectorAll('[data-panel]')].some((e) => !e.offsetHeight);
    if (gone || !root.querySelector('.sp-say').textContent) empty += 1;
  };
  const watch = new MutationObserver(note);
  watch.observe(root, { attributes: true, attributeFilter: ['data-step'] });
  root.dispatchEvent(new KeyboardEvent('keydown', { key: ' ', bubbles: true }));
  const begin = performance.now();
  await new Promise((done) => setTimeout(done, 3000));
  root.dispatchEvent(new KeyboardEvent('keydown', { key: ' ', bubbles: true }));
  return { rate: (1000 * seen.size) / (performance.now() - begin), empty };
}"""


def test_sixty_four_requests_over_512_blocks_play_at_speed(show: Callable[..., Any]) -> None:
    """5 steps a second leave 200 ms each: the median step's script must fit with room to spare, whoever else runs."""
    llm = LLM("tiny-random", stage=4, trace=True, max_model_len=256, num_blocks=512, block_size=8, max_num_seqs=64,
              max_num_batched_tokens=256)  # fmt: skip
    prompts = [[3 + k for k in range(8 * (i % 4))] + [50 + i] * (5 + i % 40) for i in range(64)]
    params = [SamplingParams(max_tokens=30 + (i * 7) % 60, temperature=0, ignore_eos=True) for i in range(64)]
    llm.generate(prompts, params)
    page = show(StepPlayer(llm), "step=5", (1100, 1300))
    assert page.locator("[data-block]").count() == 513 and len(llm.trace.requests) == 64
    took = page.evaluate(TIMED)
    played = page.evaluate(PLAYED)
    script, whole = (statistics.median(took[name]) for name in ("script", "whole"))
    print(f"median {script:.1f} ms of script, {whole:.1f} ms with layout; {played['rate']:.1f} steps a second at 10/s")
    assert script < 200 and played["empty"] == 0
