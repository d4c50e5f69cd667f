"""A step player on a page, driven as a reader drives it."""

from typing import Any

HOT = """root => [...new Set([...root.querySelectorAll('[data-hot="yes"]')].filter((e) => e.dataset.r !== undefined)
  .map((e) => e.closest('[data-panel]').dataset.panel))].sort()"""
SHOWING = """root => [...new Set([...root.querySelectorAll('[data-r]')].filter((e) => e.closest('[data-panel]'))
  .filter((e) => e.checkVisibility()).map((e) => `${e.dataset.r} ${e.closest('[data-panel]').dataset.panel}`))]"""


class Player:
    """`root` is the player's own element, `.stepplayer`."""

    def __init__(self, root: Any) -> None:
        self.root = root
        root.wait_for(state="visible")
        root.scroll_into_view_if_needed()

    def state(self) -> dict[str, str]:
        return dict(self.root.evaluate("root => ({...root.dataset})"))

    @property
    def step(self) -> int:
        return int(self.state()["step"])

    @property
    def steps(self) -> int:
        return int(self.state()["steps"])

    def said(self) -> str:
        return str(self.root.locator(".sp-say").inner_text())

    def press(self, label: str) -> None:
        """Click the button that reads `label`."""
        self.root.locator(".sp-controls button", has_text=label).click()

    def drag_to(self, share: float) -> None:
        """Drag the slider's knob with the mouse to a share of its way."""
        slider = self.root.get_by_role("slider")
        box, page = slider.bounding_box(), slider.page
        low, high, now = (float(slider.evaluate(f"e => e.{name}")) for name in ("min", "max", "value"))
        middle, knob = box["y"] + box["height"] / 2, 8
        x = box["x"] + knob + (box["width"] - 2 * knob) * (now - low) / (high - low)
        page.mouse.move(x, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + knob + (box["width"] - 2 * knob) * share, middle, steps=6)
        page.mouse.up()

    def wait_for_step(self, least: int, seconds: float = 10) -> None:
        self.root.page.wait_for_function(
            "([root, least]) => Number(root.dataset.step) >= least",
            arg=[self.root.element_handle(), least],
            timeout=1000 * seconds,
        )

    def panels(self) -> list[str]:
        return list(self.root.evaluate("root => [...root.querySelectorAll('[data-panel]')].map(e => e.dataset.panel)"))

    def hot_panels(self) -> list[str]:
        """The panels in which the selected requests are picked out."""
        return list(self.root.evaluate(HOT))

    def panels_with(self, request: int) -> list[str]:
        """The panels that show something of a request now."""
        shown = [entry.split() for entry in self.root.evaluate(SHOWING)]
        return sorted({panel for number, panel in shown if int(number) == request})


def drive(player: Player) -> None:
    """Step, back, drag, next event, select by click and by keyboard: on any player, whatever it shows."""
    page, last = player.root.page, player.steps - 1
    player.root.focus()
    page.keyboard.press("Home")
    assert player.step == 0
    first = player.said()
    player.press("Step ›")
    assert player.step == 1 and player.said() and player.said() != first, "Step did not go on"
    player.press("‹")
    assert player.step == 0 and player.said() == first, "back did not go back"
    player.drag_to(1.0)
    assert player.step == last, "the slider's end is not the last step"
    player.drag_to(0.5)
    assert 0 < player.step < last or last < 3, "dragging the slider halfway does not lead to the middle"
    player.root.focus()
    page.keyboard.press("Home")
    player.press("Next event")
    assert player.step > 0, "Next event did not go on"

    page.mouse.move(2, 2)
    page.keyboard.press("Home")
    label = player.root.locator(".sp-label").first
    request = int(label.get_attribute("data-r"))
    label.click()
    page.mouse.move(2, 2)
    name = label.text_content()
    assert label.get_attribute("aria-pressed") == "true" and player.state()["hot"] == name
    assert player.hot_panels() == player.panels_with(request), "a selected request is not picked out everywhere"
    label.click()
    page.mouse.move(2, 2)
    player.root.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    player.root.focus()
    assert player.state()["hot"] == name and player.hot_panels() == player.panels_with(request)
    page.keyboard.press("Escape")
    assert player.state()["hot"] == ""
