"""A trace to step through in a notebook or a browser: read-only, one JSON of data, all drawing on the page."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from stepengine.errors import InvalidSetting, TraceError
from stepengine.trace import Trace
from stepengine.viz.payload import packed, player_data

STATIC = Path(__file__).parent / "static"
SIZES = ("page", "room")
PARTS = ("blocks.js", "player.js")  # one module on the page
EXPORT = "export default { render };"


def _script() -> str:
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in PARTS)


class StepPlayer(anywidget.AnyWidget):
    """Steps through a trace: who ran when and why, this step's tokens, the K/V memory, the texts as they grow.

    `size="room"` is for a projector: two panels, large type, light. `step` is the step shown and follows the
    browser both ways. `panels` picks among "schedule", "tokens", "kv", "tables" (where K/V are in blocks), "texts".
    Raises TraceError for a trace without steps, InvalidSetting for an unknown size, panel or step.
    """

    _esm = _script()
    _css = STATIC / "player.css"
    step = traitlets.Int(0).tag(sync=True)
    size = traitlets.Enum(SIZES, "page", read_only=True).tag(sync=True)
    data = traitlets.Unicode("{}", read_only=True, help="What is drawn, as JSON.").tag(sync=True)

    def __init__(self, trace: Trace, size: str = "page", step: int = 0, panels: Sequence[str] | None = None) -> None:
        if not trace.steps:
            raise TraceError("The trace has 0 steps, at least 1 is needed: run the engine with trace=True first.")
        if size not in SIZES:
            raise InvalidSetting(f"size={size!r} does not exist: choose 'page' or 'room'.")
        self._steps, self._requests = len(trace.steps), len(trace.requests)
        step = self._checked(step)
        payload = packed(player_data(trace, size, panels))
        super().__init__()
        self.set_trait("size", size)
        self.set_trait("data", json.dumps(payload, ensure_ascii=False, separators=(",", ":")))
        self.step = step

    def _checked(self, step: int) -> int:
        if isinstance(step, bool) or not isinstance(step, int) or not -self._steps <= step < self._steps:
            raise InvalidSetting(
                f"step={step!r} is not in this trace, which has {self._steps} steps: use 0 to {self._steps - 1}."
            )
        return step % self._steps

    @traitlets.validate("step")
    def _valid_step(self, proposal: Any) -> int:
        return self._checked(proposal["value"])

    def __repr__(self) -> str:
        requests = f"{self._requests} request{'s' if self._requests != 1 else ''}"
        return f"StepPlayer({requests}, {self._steps} step{'s' if self._steps != 1 else ''})"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle[0]["text/plain"] = repr(self)  # no memory address: a checked notebook compares it
        return bundle

    def save_html(self, path: str | Path) -> Path:
        """Write the player as one self-contained page; `?step=3&theme=dark` in its address choose a view."""
        target = Path(path)
        script = _script()
        if EXPORT not in script:
            raise InvalidSetting(f"The player's script lacks {EXPORT!r}: reinstall the package.")
        traits = json.dumps({"size": self.size, "step": self.step, "data": self.data}, ensure_ascii=False)
        page = (STATIC / "page.html").read_text(encoding="utf-8")
        parts = {
            "{{title}}": repr(self),
            "{{css}}": (STATIC / "player.css").read_text(encoding="utf-8"),
            "{{traits}}": traits.replace("<", "\\u003c"),
            "{{script}}": script.replace(EXPORT, ""),
        }
        filled = re.sub(r"\{\{\w+\}\}", lambda mark: parts[mark.group()], page)  # one pass: texts may hold marks too
        target.write_text(filled, encoding="utf-8")
        return target
