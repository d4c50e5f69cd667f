"""The calculator's page in a real browser, with the real Python behind it: the page asks, Python answers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepengine.viz.calculator import STATIC, Calculator

# A stand-in for the notebook's side of a widget: traits, and `save_changes`, which here waits for Python's answer.
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><style>body {{ margin: 8px }} {css}</style>
<body data-jp-theme-light="{light}"><div id="place"></div><script type="module">
{script}
const traits = {{ data: await window.first(), asked: "{{}}" }}, hear = [];
render({{ el: document.getElementById("place"), model: {{
  get: (name) => traits[name], set: (name, value) => (traits[name] = value), off: () => {{}},
  on: (event, call) => event === "change:data" && hear.push(call),
  save_changes: async () => {{ traits.data = await window.ask(traits.asked); hear.forEach((call) => call()); }},
}} }});
window.ready = true;
</script></body></html>"""


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """open_page(calculator, width, dark) -> the page; errors on it and requests to anywhere fail the test."""
    pages: list[Any] = []
    errors: list[str] = []

    def make(calculator: Calculator, width: int = 1100, dark: bool = False) -> Any:
        script = (STATIC / "calculator.js").read_text(encoding="utf-8").replace("export default { render };", "")
        css = (STATIC / "calculator.css").read_text(encoding="utf-8")
        path = tmp_path / f"{len(pages)}.html"
        path.write_text(PAGE.format(css=css, script=script, light="false" if dark else "true"), encoding="utf-8")

        def ask(asked: str) -> str:
            calculator.asked = asked
            return str(calculator.data)

        page = browser.new_page(viewport={"width": width, "height": 1000})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: None if request.url.startswith("file:") else errors.append(request.url))
        page.expose_function("ask", ask)
        page.expose_function("first", lambda: calculator.data)
        page.goto(path.as_uri())
        page.wait_for_function("window.ready")
        pages.append(page)
        return page

    yield make
    for page in pages:
        page.close()
    assert errors == []


def block(page: Any, name: str) -> str:
    return str(page.locator(f'[data-block="{name}"]').get_attribute("data-value"))


def bytes_of(page: Any) -> dict[str, int]:
    parts = page.locator(".calc-part")
    return {part.get_attribute("data-part"): int(part.get_attribute("data-bytes")) for part in parts.all()}


def test_choosing_and_typing_asks_python(open_page: Callable[..., Any]) -> None:
    calculator = Calculator("Llama-3-8B", "H100")
    page = open_page(calculator)
    assert block(page, "kv").startswith("131,072 bytes a token")
    assert page.locator(".calc-say").get_attribute("aria-live") == "polite"
    page.get_by_role("combobox", name="Model").select_option("SmolLM2-135M")
    page.wait_for_selector('.calculator[data-model="SmolLM2-135M"]')
    assert "2 x 30 layers x 3 K/V heads x 64 x 2 bytes = 23,040 bytes a token" in page.locator("body").inner_text()
    page.get_by_role("combobox", name="GPU").select_option("T4")
    page.wait_for_selector('.calculator[data-gpu="T4"]')
    page.get_by_role("combobox", name="Weights").select_option("int4")
    page.wait_for_selector('[data-block="weights"][data-value$="in int4"]')
    page.get_by_label("Context, tokens", exact=True).fill("1,000")
    page.keyboard.press("Enter")
    page.wait_for_selector('[data-block="fit"][data-value$="of 1,000 tokens"]')
    assert calculator.answer.question.context == 1000 and calculator.answer.question.gpu.name == "T4"
    assert page.get_by_label("Context, tokens", exact=True).input_value() == "1000"
    assert bytes_of(page) == dict(calculator.answer.bar)
    assert int(page.locator(".calculator").get_attribute("data-sequences")) == calculator.answer.sequences


def test_a_wrong_number_gets_a_sentence_and_stays_to_be_corrected(open_page: Callable[..., Any]) -> None:
    calculator = Calculator()
    page = open_page(calculator)
    before = page.locator(".calc-say").inner_text()
    for typed, words in (("many", "context is 'many'; it must be a whole number."), ("0", "context is 0; it must be")):
        page.get_by_label("Context, tokens", exact=True).fill(typed)
        page.keyboard.press("Tab")
        page.wait_for_function(
            "words => document.querySelector('.calc-problem').textContent.includes(words)", arg=words
        )
        assert page.get_by_label("Context, tokens", exact=True).input_value() == typed
        assert page.get_by_label("Context, tokens", exact=True).get_attribute("aria-invalid") == "true"
        assert page.locator(".calc-say").inner_text() == before
    page.get_by_label("Context, tokens", exact=True).fill("512")
    page.keyboard.press("Tab")
    page.wait_for_selector('.calculator[data-problem="no"]')
    assert not page.locator(".calc-problem").is_visible()
    assert page.get_by_label("Context, tokens", exact=True).get_attribute("aria-invalid") == "false"


def test_what_does_not_fit_says_how_much_it_needs(open_page: Callable[..., Any]) -> None:
    page = open_page(Calculator("Llama-2-70B", "H100"))
    assert page.locator(".calculator").get_attribute("data-fits") == "no"
    assert block(page, "fit") == "does not fit: needs 140.30 GB, the GPU has 80.00 GB"
    bar, end = page.locator(".calc-bar").bounding_box(), page.locator('[data-line="memory"]').bounding_box()
    assert (end["x"] - bar["x"]) / bar["width"] == pytest.approx(80 / 140.3, abs=0.01)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 560, 1100])
def test_it_stays_inside_its_width_and_every_part_is_named(
    open_page: Callable[..., Any], width: int, dark: bool
) -> None:
    for settings in ({"model": "GPT-3 175B", "gpu": "T4"}, {"model": "Qwen3-0.6B", "gpu": "T4", "weights": "int4"}):
        page = open_page(Calculator(**settings), width, dark)
        assert page.locator(".calculator").get_attribute("data-theme") == ("dark" if dark else "light")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        inside = page.evaluate(
            "[...document.querySelectorAll('.calc-part')].filter(e => e.firstElementChild.style.visibility"
            " === 'visible').map(e => e.dataset.part)"
        )
        below = page.evaluate("[...document.querySelectorAll('.calc-rest i')].map(e => e.dataset.part)")
        assert sorted(inside + below) == sorted(bytes_of(page))


def test_the_keyboard_reaches_every_control(open_page: Callable[..., Any]) -> None:
    page = open_page(Calculator())
    seen = []
    for _ in range(8):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.dataset.field || document.activeElement.tagName"))
    assert seen == ["model", "gpu", "weights", "kv_bits", "context", "batch", "utilisation", "SUMMARY"]
    page.keyboard.press("Enter")
    for _ in range(3):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.dataset.field"))
    assert seen[8:] == ["group_size", "table_bits", "reserve_gb"]
    page.keyboard.type("x")
    page.keyboard.press("Tab")
    page.wait_for_selector('.calculator[data-problem="yes"]')


def test_text_has_its_contrast_in_both_themes(open_page: Callable[..., Any]) -> None:
    from stepengine.viz.template import contrast

    for dark in (False, True):
        page = open_page(Calculator(), dark=dark)
        colors = page.evaluate(
            "(() => { const s = getComputedStyle(document.querySelector('.calculator'));"
            "return Object.fromEntries(['--paper', '--ink', '--quiet', '--soft', '--wrong', '--control'].map("
            "n => [n.slice(2), s.getPropertyValue(n).trim().toUpperCase()])) })()"
        )
        for ink in ("ink", "quiet", "wrong"):
            assert contrast(colors[ink], colors["paper"]) >= 4.5, (dark, ink)
        assert contrast(colors["ink"], colors["soft"]) >= 4.5 and contrast(colors["control"], colors["paper"]) >= 3
