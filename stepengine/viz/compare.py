"""Two runs of the same requests, in step: the plans side by side, where they part, and what each cost."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from stepengine.errors import InvalidSetting, TraceError
from stepengine.trace import Trace
from stepengine.viz.differences import Difference, Metric, difference, labels_of, metrics
from stepengine.viz.payload import packed, player_data
from stepengine.viz.player import SIZES, check_size
from stepengine.viz.saved import read_static, write_page
from stepengine.viz.sources import source_of
from stepengine.viz.words.scene import agree, count, listed

SCRIPTS = ("blocks.js", "panels.js", "view.js", "steer.js", "compare.js")
STYLES = ("player.css", "compare.css")


class Compare(anywidget.AnyWidget):
    """Steps through two runs at once: schedule and K/V of each, the same request in the same colour.

    `a` and `b` are traces, paths of saved ones, or LLMs with `trace=True`, as they are now; `names` what they are
    called. Requests are matched by position. `difference` has the first step whose plans differ, and how; `metrics`
    the two runs in counts (times only where both have a clock); `sentence` says it in words. Raises TraceError where
    both are empty, InvalidSetting for bad names, sizes and steps.
    """

    _esm = read_static(SCRIPTS)
    _css = read_static(STYLES)
    step = traitlets.Int(0).tag(sync=True)
    size = traitlets.Enum(SIZES, "page", read_only=True).tag(sync=True)
    data = traitlets.Unicode("{}", read_only=True, help="What is drawn, as JSON.").tag(sync=True)

    def __init__(self, a: Any, b: Any, names: Sequence[str] = ("A", "B"), step: int = 0, size: str = "page") -> None:
        self.names = _checked_names(names)
        self.traces: tuple[Trace, Trace] = (source_of(a).trace, source_of(b).trace)
        check_size(size)
        self._steps = max(len(trace.steps) for trace in self.traces)
        if not self._steps:
            raise TraceError("Both traces have 0 steps, so there is nothing to compare: run the engines first.")
        step = self._checked(step)
        self.difference: Difference = difference(*self.traces, self.names)
        self.metrics: list[Metric] = metrics(*self.traces)
        text = json.dumps(self._data(size), ensure_ascii=False, separators=(",", ":"))
        super().__init__()
        self.set_trait("size", size)
        self.set_trait("data", text)
        self.step = step

    def _data(self, size: str) -> dict[str, Any]:
        labels = labels_of(max(len(trace.requests) for trace in self.traces))
        sides = []
        for name, trace in zip(self.names, self.traces, strict=True):
            own = dict(zip(trace.requests, labels, strict=False))
            drawn = packed(player_data(trace, size, ("schedule", "kv"), own)) if trace.steps else None
            sides.append({"name": name, "steps": len(trace.steps), "data": drawn})
        for side in sides:
            if side["data"]:
                side["data"]["colored"] = all(other["data"]["colored"] for other in sides if other["data"])
        return {
            "version": 1,
            "sides": sides,
            "sentence": self.sentence,
            "differs": self.difference.step,
            "table": [metric._asdict() for metric in self.metrics],
        }

    @property
    def sentence(self) -> str:
        """Where the two runs part, in words."""
        for name, other, trace in zip(self.names, self.names[::-1], self.traces, strict=True):
            if not trace.steps:
                return f"{name} has no steps, so there is only {other} to see: run it with trace=True."
        labels = labels_of(max(len(trace.requests) for trace in self.traces))
        difference = self.difference
        parts = []
        if difference.prompts:
            named = listed([labels[i] for i in difference.prompts[:4]])
            parts.append(f"Not the same requests: the prompts of {named} differ.")
        if difference.step is not None:
            parts.append(f"First difference in step {difference.step}: {difference.how}.")
        elif difference.blocks:
            parts.append(f"Same plans, {difference.blocks}: same steps, same tokens per step.")
        else:
            parts.append("Identical plans: the same steps, down to the block ids.")
        counts = [len(trace.requests) for trace in self.traces]
        if counts[0] != counts[1]:
            parts.append(f"{self.names[0]} has {count(counts[0], 'request')}, {self.names[1]} has {counts[1]}.")
        tokens = difference.tokens
        if not tokens:
            parts.append("The output tokens are the same.")
        else:
            named = listed([labels[i] for i in tokens[:4]] + ([f"{len(tokens) - 4} others"] if tokens[4:] else []))
            parts.append(f"The output tokens of {agree(tokens, 'request', 'requests')} {named} differ.")
        return " ".join(parts)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{n}: {count(len(t.steps), 'step')}" for n, t in zip(self.names, self.traces, strict=True))
        if any(not trace.steps for trace in self.traces):
            return f"Compare({sizes}; nothing to compare)"
        step, tokens = self.difference.step, self.difference.tokens
        plans = f"plans differ from step {step}" if step is not None else "same plans"
        plans += f", {self.difference.blocks}" if self.difference.blocks else ""
        counts = [len(trace.requests) for trace in self.traces]
        told = f"other tokens in {len(tokens)} of {count(min(counts), 'request')}" if tokens else "same tokens"
        return f"Compare({sizes}; {plans}; {told})"

    def _checked(self, step: int) -> int:
        if isinstance(step, bool) or not isinstance(step, int) or not -self._steps <= step < self._steps:
            raise InvalidSetting(
                f"step={step!r} is in neither trace; the longer has {self._steps} steps: use 0 to {self._steps - 1}."
            )
        return step % self._steps

    @traitlets.validate("step")
    def _valid_step(self, proposal: Any) -> int:
        return self._checked(proposal["value"])

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle[0]["text/plain"] = repr(self)  # no memory address: a checked notebook compares it
        return bundle

    def save_html(self, path: str | Path) -> Path:
        """Write the comparison as one self-contained page; InvalidSetting where the file cannot be written."""
        traits = {"size": self.size, "step": self.step, "data": self.data}
        return write_page(path, repr(self), read_static(SCRIPTS), read_static(STYLES), traits)


def _checked_names(names: Sequence[str]) -> tuple[str, str]:
    listed_ = tuple(names) if not isinstance(names, str) else (names,)
    if len(listed_) != 2 or not all(isinstance(name, str) and name for name in listed_) or len(set(listed_)) != 2:
        raise InvalidSetting(f"names={names!r} does not name the two runs: give two different texts.")
    return listed_
