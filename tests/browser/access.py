"""What can be computed about a widget's accessibility: contrast as drawn, focus, names. Own small checks."""

import re
from pathlib import Path
from typing import Any

SCRIPT = (Path(__file__).parent / "access.js").read_text(encoding="utf-8")
NAMED = ("button", "slider", "combobox", "textbox", "spinbutton", "checkbox", "radio", "img")

Colour = list[float]


def _measure(target: Any, call: str, argument: Any = None) -> Any:
    """Run a function of access.js on an element (as `root`) or, `target` being a page, on none."""
    head = "(root, argument)" if hasattr(target, "aria_snapshot") and not hasattr(target, "goto") else "argument"
    return target.evaluate(f"{head} => {{ {SCRIPT}; return {call}; }}", argument)


def contrast(one: Colour, other: Colour) -> float:
    """WCAG 2's ratio of two colours, 1 to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: Colour) -> float:
    parts = [value / 255 for value in colour[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def pale_texts(root: Any, least: float = 4.5) -> list[str]:
    """Texts of the widget `root` (a locator) whose contrast is under `least`; disabled controls do not count."""
    found = _measure(root, "texts(root)")
    assert found, "no text was found to measure"
    ratios = {(text["name"], text["text"], round(contrast(text["ink"], text["paper"]), 2)) for text in found}
    return sorted(f"{name}: {text!r} has {ratio}:1" for name, text, ratio in ratios if ratio < least)


def pale_marks(root: Any, selectors: list[str], least: float = 3.0) -> list[str]:
    """Marks of which neither edge nor fill stands out from the paper, and selectors that find nothing."""
    found = _measure(root, "marks(root, argument)", selectors)
    absent = sorted(set(selectors) - {mark["selector"] for mark in found})
    best = {
        (mark["selector"], round(max((contrast(tint, mark["paper"]) for tint in mark["tints"]), default=1.0), 2))
        for mark in found
    }
    return [f"{name}: there is none" for name in absent] + [f"{n} has {r}:1" for n, r in sorted(best) if r < least]


def unnamed(root: Any) -> list[str]:
    """Controls and pictures without an accessible name, as the browser's own tree tells them."""
    lines = [line.strip(" -") for line in root.aria_snapshot().splitlines()]
    return [line for line in lines if re.fullmatch(rf"({'|'.join(NAMED)})( \[[^]]*\])*:?", line)]


def walk(page: Any, root: Any) -> tuple[list[str], list[str]]:
    """Press Tab through the widget: what the focus never reached, and what shows no ring when it has it."""
    stops: list[str] = _measure(root, "stops(root)")
    root.evaluate(
        "root => { const door = document.createElement('button'); door.id = 'door';"
        " root.parentElement.insertBefore(door, root); door.focus(); }"
    )
    reached: dict[int, bool] = {}
    for _ in range(len(stops) + 2):
        page.keyboard.press("Tab")
        now = _measure(page, "focused()")
        if now["stop"] >= 0:
            reached[now["stop"]] = now["ring"]
    page.evaluate("() => document.getElementById('door').remove()")
    missed = [what for number, what in enumerate(stops) if number not in reached]
    return missed, [stops[number] for number, ring in reached.items() if not ring]
