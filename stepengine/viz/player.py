"""A run to step through in a notebook or a browser: recorded, or live; one JSON of data, all drawing on the page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from stepengine.errors import InvalidSetting, StepEngineError, TraceError
from stepengine.viz.kernel import main_loop
from stepengine.viz.payload import PlayerData, packed, player_data
from stepengine.viz.saved import STATIC, read_static, write_page
from stepengine.viz.sources import source_of

__all__ = ["SCRIPTS", "SIZES", "StepPlayer", "check_size", "packed", "player_data"]

SIZES = ("page", "room")
SCRIPTS = ("blocks.js", "panels.js", "view.js", "steer.js", "player.js")  # one module on the page


class StepPlayer(anywidget.AnyWidget):
    """Steps through a run: who ran when and why, this step's tokens, the K/V memory, the texts as they grow.

    `source` is a Trace, the path of a saved one, or live: an LLM or an engine that records (`trace=True`). Live, Step
    at the last recorded step runs the engine, and playing goes on until it is idle; other steps are replayed.
    Requests that other cells add appear with the next step.

    `size="room"` is for a projector: two panels, large type, light. `step` is the step shown and follows the
    browser both ways. `panels` picks among "schedule", "tokens", "kv", "tables" (where K/V are in blocks), "texts".
    `notice` says why the engine did not step; an exception that the page has shown is kept as `error`.
    Raises TraceError for a trace without steps, InvalidSetting for an unknown size, panel or step, or for an engine
    that records nothing.
    """

    _esm = read_static(SCRIPTS)
    _css = STATIC / "player.css"
    step = traitlets.Int(0).tag(sync=True)
    size = traitlets.Enum(SIZES, "page", read_only=True).tag(sync=True)
    data = traitlets.Unicode("{}", read_only=True, help="What is drawn, as JSON.").tag(sync=True)
    live = traitlets.Bool(False, read_only=True, help="Whether there is an engine to step.").tag(sync=True)
    asked = traitlets.Int(0, help="How often the page has asked for a step of the engine.").tag(sync=True)
    answered = traitlets.Int(0, read_only=True, help="The value of `asked` that has been dealt with.").tag(sync=True)
    notice = traitlets.Unicode("", read_only=True, help="Why the engine did not step.").tag(sync=True)

    def __init__(self, source: Any, size: str = "page", step: int = 0, panels: Sequence[str] | None = None) -> None:
        self.trace, self._engine, self._name = source_of(source)
        if not self.trace.steps and self._engine is None:
            raise TraceError("The trace has 0 steps, at least 1 is needed: run the engine with trace=True first.")
        check_size(size)
        self.error: Exception | None = None
        self._steps, self._requests = len(self.trace.steps), len(self.trace.requests)
        step = self._checked(step)
        self._player_data = PlayerData(self.trace, size, panels)
        text = self._drawn()
        super().__init__()
        self.set_trait("size", size)
        self.set_trait("live", self._engine is not None)
        self.set_trait("data", text)
        self.step = step

    def _drawn(self) -> str:
        """The data as they are now."""
        self._steps, self._requests = len(self.trace.steps), len(self.trace.requests)
        if self._engine is not None and not self._steps:
            self._player_data.blank = self._nothing_yet()
        return json.dumps(packed(self._player_data.data()), ensure_ascii=False, separators=(",", ":"))

    def _nothing_yet(self) -> str:
        if not self._requests:
            return f"No request yet: add one with {self._name}.add_request(...), then press Step."
        many = self._requests != 1
        return f"Nothing has run yet: {self._requests} request{'s wait' if many else ' waits'}. Step runs the engine."

    # -- live -------------------------------------------------------------------------------------

    def step_engine(self) -> bool:
        """Run the engine until it has recorded a step more, and show that one; False where it is idle.

        What the trace got meanwhile, from other cells, is shown first. Outputs stay in the engine (`collect`). An
        exception of the engine is shown in the player, too. Raises InvalidSetting where there is no engine.
        """
        if self._engine is None:
            raise InvalidSetting(
                "This player shows a recorded trace and has no engine to step; make it with StepPlayer(llm)."
            )
        first, self.error = self._steps, None
        try:
            while len(self.trace.steps) == first and self._engine.has_unfinished():
                self._engine.advance()  # a pipelined engine records a step when it has launched the next
            idle = len(self.trace.steps) == first
            self._show(first, self._idle() if idle else "")
            return not idle
        except Exception as error:
            self.error = error
            told = str(error) if isinstance(error, StepEngineError) else f"{type(error).__name__}: {error}"
            self._show(first, f"The engine stopped. {told}")
            raise

    def _idle(self) -> str:
        if not self.trace.requests:
            return self._nothing_yet()
        return f"Every request has ended: add one with {self._name}.add_request(...), then press Step."

    def _show(self, step: int, notice: str) -> None:
        """Send what is new and go to this step, or to the last one where it does not exist."""
        with self.hold_sync():
            self.set_trait("data", self._drawn())
            self.set_trait("notice", notice)
            self.step = min(step, max(0, self._steps - 1))

    @traitlets.observe("asked")
    def _queue(self, change: Any) -> None:
        """The engine is no place for two threads: a page's wish waits for the cell that is running."""
        loop = main_loop()
        if loop is None:
            self._answer(change["new"])
        else:
            loop.add_callback(self._answer, change["new"])

    def _answer(self, asked: int) -> None:
        try:
            if self._engine is not None:
                self.step_engine()
        except Exception:  # shown by the page, and kept as `error`
            pass
        finally:
            self.set_trait("answered", asked)

    # -- steps ------------------------------------------------------------------------------------

    def _checked(self, step: int) -> int:
        count = max(1, self._steps)
        if isinstance(step, bool) or not isinstance(step, int) or not -count <= step < count:
            remedy = "; step_engine() runs the next one" if self._engine is not None else ""
            raise InvalidSetting(
                f"step={step!r} is not in this trace, which has {self._steps} steps: use 0 to {count - 1}{remedy}."
            )
        return step % count

    @traitlets.validate("step")
    def _valid_step(self, proposal: Any) -> int:
        return self._checked(proposal["value"])

    def __repr__(self) -> str:
        requests = f"{self._requests} request{'s' if self._requests != 1 else ''}"
        live = ", live" if self._engine is not None else ""
        return f"StepPlayer({requests}, {self._steps} step{'s' if self._steps != 1 else ''}{live})"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle[0]["text/plain"] = repr(self)  # no memory address: a checked notebook compares it
        return bundle

    def save_html(self, path: str | Path) -> Path:
        """Write the player as one self-contained page; `?step=3&theme=dark` in its address choose a view.

        A live player writes what is recorded. Raises TraceError where that is nothing, InvalidSetting where the file
        cannot be written.
        """
        if not self.trace.steps:
            raise TraceError("Nothing is recorded yet: run a step before saving the player.")
        text = self._drawn() if self._engine is not None else self.data
        traits = {"size": self.size, "step": self.step, "data": text, "live": False, "notice": ""}
        return write_page(
            path, repr(self).replace(", live", ""), read_static(SCRIPTS), read_static(["player.css"]), traits
        )


def check_size(size: str) -> None:
    """InvalidSetting for a size that does not exist."""
    if size not in SIZES:
        raise InvalidSetting(f"size={size!r} does not exist: choose 'page' or 'room'.")
