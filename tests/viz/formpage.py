"""A form's page in a real browser, without a notebook: its messages go to the widget in this process, and back."""

import json
from pathlib import Path
from typing import Any

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><style>%s</style></head>
<body data-jp-theme-light="%s"><main id="form"></main><script type="module">
%s
const traits = %s;
const listeners = {};
const fire = (name) => (listeners[name] || []).forEach((call) => call());
window.gone = false; // set by a test: the kernel no longer answers
window.model = {
  get: (name) => traits[name],
  on: (name, call) => (listeners[name] ||= []).push(call),
  off: (name, call) => (listeners[name] = (listeners[name] || []).filter((other) => other !== call)),
  send: async (message) => {
    if (window.gone) return;
    Object.assign(traits, JSON.parse(await window.kernel(message)));
    fire("change:serial");
  },
  fire,
};
render({ model: window.model, el: document.getElementById("form") });
</script></body></html>"""


def state(widget: Any) -> str:
    """What the page knows: the widget's own synced traits, as JSON."""
    names = [name for name in widget.keys if not name.startswith("_") and name not in ("layout", "tabbable", "tooltip")]
    return json.dumps({name: getattr(widget, name) for name in names})


def show(browser: Any, widget: Any, folder: Path, asked: Any = None, dark: bool = False) -> Any:
    """The open page. `asked` handles a message (the widget's own handler by default)."""
    asked = asked or widget._asked
    page = browser.new_page(viewport={"width": 900, "height": 600})
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else page.faults.append(request.url))

    def kernel(message: Any) -> str:
        asked(widget, message, [])
        return state(widget)

    page.expose_function("kernel", kernel)
    script = widget._esm.replace("export default { render };", "")
    path = folder / "form.html"
    path.write_text(PAGE % (widget._css, str(not dark).lower(), script, state(widget)), encoding="utf-8")
    page.goto(path.as_uri())
    page.wait_for_selector(".se-form[data-state]")
    return page


def contrasts(page: Any, selectors: list[str]) -> dict[str, float]:
    """Contrast (WCAG) of the text of each selector's first visible element against what lies behind it."""
    found: dict[str, float] = page.evaluate(
        """(selectors) => Object.fromEntries(selectors.map((selector) => {
          const el = [...document.querySelectorAll(selector)].find((e) => e.offsetParent && !e.disabled);
          if (!el) return [selector, 0];
          const parse = (color) => color.match(/[0-9.]+/g).map(Number);
          let behind = el;
          while ((parse(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
          const light = (color) => parse(color).slice(0, 3).map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
          const colors = [getComputedStyle(el).color, getComputedStyle(behind).backgroundColor];
          const pair = colors.map(light).sort((a, b) => b - a);
          return [selector, (pair[0] + 0.05) / (pair[1] + 0.05)];
        }))""",
        selectors,
    )
    return found
