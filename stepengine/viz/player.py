"""A trace to step through in a notebook or a browser: read-only, one JSON of data, all drawing on the page."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from stepengine.errors import InvalidSetting, TraceError
from stepengine.trace import Replay, Snapshot, Trace
from stepengine.trace.replay import SWAPPED, WAITING
from stepengine.viz.narrate import Narration, Narrator, Work
from stepengine.viz.template import GREY, HUES, WHITE_INK, readable

STATIC = Path(__file__).parent / "static"
PANELS = ("schedule", "tokens", "kv", "texts")
SIZES = ("page", "room")
PROMPT_TAIL = 400  # characters of a prompt that the page gets: only its end is ever shown


class StepPlayer(anywidget.AnyWidget):
    """Steps through a trace: who ran when and why, this step's tokens, the K/V slots, the texts as they grow.

    `size="room"` is for a projector: two panels, large type, light. `step` is the step shown and follows the
    browser both ways. `panels` picks among "schedule", "tokens", "kv", "texts". Raises TraceError for a trace
    without steps, InvalidSetting for an unknown size, panel or step.
    """

    _esm = STATIC / "player.js"
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
        payload = player_data(trace, size, panels)
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
        script, export = (STATIC / "player.js").read_text(encoding="utf-8"), "export default { render };"
        if export not in script:
            raise InvalidSetting(f"The player's script lacks {export!r}: reinstall the package.")
        traits = json.dumps({"size": self.size, "step": self.step, "data": self.data}, ensure_ascii=False)
        page = (STATIC / "page.html").read_text(encoding="utf-8")
        parts = {
            "{{title}}": repr(self),
            "{{css}}": (STATIC / "player.css").read_text(encoding="utf-8"),
            "{{traits}}": traits.replace("<", "\\u003c"),
            "{{script}}": script.replace(export, ""),
        }
        filled = re.sub(r"\{\{\w+\}\}", lambda mark: parts[mark.group()], page)  # one pass: texts may hold marks too
        target.write_text(filled, encoding="utf-8")
        return target


def player_data(trace: Trace, size: str = "page", panels: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything the page draws, as plain JSON values; requests are named by their position in the list.

    A chunk is [request, start, length, tokens run for the first time, cached, token sampled 1/0, tall 1/0], a K/V
    entry [block, request, tokens held], a span [first step, last step].
    """
    replay = Replay(trace)
    narrator = Narrator(replay)
    place = {request: i for i, request in enumerate(trace.requests)}
    layout = "slots" if narrator.slots else "blocks" if replay.num_blocks else "none"
    steps, waits = [], {request: _Spans() for request in place}
    swaps = {request: _Spans() for request in place}
    for t in range(len(replay)):
        told, now = narrator.explain(t), replay.at(t)
        for request, state in now.state.items():
            if state == WAITING:
                waits[request].add(t)
            elif state == SWAPPED:
                swaps[request].add(t)
        steps.append(_step(told, now, narrator.work[t], place, layout, narrator.idle[t]))
    idle = _idle_spans(trace, narrator)
    sampled: dict[int, list[int]] = {request: [] for request in place}
    arrived = dict.fromkeys(place, 0)
    ended: dict[int, tuple[int, str]] = {}
    for t, record in enumerate(trace.steps):
        arrived.update(dict.fromkeys(record.plan.arrived, t))
        ended.update({request: (t, reason) for request, reason in (*record.aborted, *record.finished)})
        for parent, child in record.forked:
            sampled[child], arrived[child] = list(sampled[parent]), t
        for chunk, token in zip(record.plan.chunks, record.token_ids, strict=True):
            if token >= 0:
                sampled[chunk.request].append(t)
    requests = []
    for request, info in trace.requests.items():
        prompt, pieces = trace.text(request)
        hue = HUES[place[request] % len(HUES)]
        requests.append(
            {
                "id": request,
                "label": narrator.labels[request],
                "color": hue,
                "ink": "#FFFFFF" if hue in WHITE_INK else "#14181C",
                "edge": readable(hue),
                "prompt": len(info.prompt_ids),
                "max": info.max_tokens,
                "text": prompt if len(prompt) <= PROMPT_TAIL else "…" + prompt[-PROMPT_TAIL:],
                "pieces": list(pieces),
                "tokens": sampled[request],
                "arrived": arrived[request],
                "end": ended.get(request, (-1, ""))[0],
                "reason": ended.get(request, (-1, ""))[1],
                "wait": waits[request].spans,
                "swap": swaps[request].spans,
                "idle": idle[request],
            }
        )
    default = ("schedule", "tokens") if layout == "none" else ("schedule", "kv") if layout == "slots" else ("schedule",)
    chosen = _panels(panels, default if size == "room" else PANELS, layout)
    meta = trace.meta
    return {
        "version": 1,
        "title": _title(meta),
        "facts": _facts(trace, layout, replay),
        "grey": GREY,
        "panels": chosen,
        "layout": layout,
        "colored": len(place) <= len(HUES),
        "budget": int(meta.get("max_num_batched_tokens") or 0),
        "slots": replay.num_blocks,
        "slot_tokens": replay.block_size if replay.num_blocks else 0,
        "kv_bytes": int(meta.get("kv_bytes_per_token") or 0),
        "requests": requests,
        "steps": steps,
    }


class _Spans:
    """Steps in ascending order, kept as [first, last]."""

    def __init__(self) -> None:
        self.spans: list[list[int]] = []

    def add(self, t: int) -> None:
        if self.spans and self.spans[-1][1] == t - 1:
            self.spans[-1][1] = t
        else:
            self.spans.append([t, t])


def _step(
    told: Narration, now: Snapshot, work: Sequence[Work], place: dict[int, int], layout: str, idle: int
) -> dict[str, Any]:
    record = now.record
    chunks = []
    for item, token in zip(work, record.token_ids, strict=True):
        chunk = item.chunk
        tall = item.prompt or layout == "none"  # without storage every step runs the prompt
        sampled = int(token >= 0)
        chunks.append([place[chunk.request], chunk.start, chunk.length, item.new, chunk.cached, sampled, int(tall)])
    step: dict[str, Any] = {"say": told.text, "named": [place[r] for r in told.named], "chunks": chunks}
    if told.event:
        step["event"] = 1
    if ended := [place[r] for r, _ in (*record.aborted, *record.finished)]:
        step["finished"] = ended
    if away := [place[r] for r in record.plan.preempted]:
        step["preempted"] = away
    if idle:
        step["idle"] = idle
    if layout == "slots":
        owner = {table[0]: request for request, table in now.table.items() if table}
        step["kv"] = [[block, place[owner[block]], now.block_tokens[block]] for block in sorted(now.refs)]
        if fresh := sorted(now.new_blocks):
            step["fresh"] = fresh
    return step


def _idle_spans(trace: Trace, narrator: Narrator) -> dict[int, list[list[int]]]:
    """For static batches: the idle steps of each place, on the row of the request that had it."""
    spans = {request: _Spans() for request in trace.requests}
    if narrator.static:
        batch: list[int] = []
        for t, record in enumerate(trace.steps):
            rows = [chunk.request for chunk in record.plan.chunks]
            if any(work.first for work in narrator.work[t]) and not set(rows) & set(batch):
                batch = []
            batch += [request for request in rows if request not in batch]
            if narrator.idle[t]:
                for request in set(batch) - set(rows):
                    spans[request].add(t)
    return {request: item.spans for request, item in spans.items()}


def _panels(panels: Sequence[str] | None, default: Sequence[str], layout: str) -> list[str]:
    chosen = list(default) if panels is None else list(panels)
    for name in chosen:
        if name not in PANELS:
            raise InvalidSetting(f"panel {name!r} does not exist: choose among {', '.join(PANELS)}.")
    return [name for name in chosen if not (name == "kv" and layout == "blocks")]  # blocks have panels of their own


def _title(meta: dict[str, Any]) -> str:
    parts = [f"Stage {meta['stage']}"] if "stage" in meta else []
    return " · ".join([*parts, str(meta.get("model") or "")]).strip(" ·") or "Trace"


def _facts(trace: Trace, layout: str, replay: Replay) -> str:
    requests, places = len(trace.requests), trace.meta.get("max_num_seqs")
    facts = [f"{requests} request{'s' if requests != 1 else ''}"]
    if places:
        facts.append(f"{places} place{'s' if places != 1 else ''}")
    if layout == "none":
        facts.append("no K/V kept")
    else:
        noun = "slot" if layout == "slots" else "block"
        count = f"{replay.num_blocks} {noun}{'s' if replay.num_blocks != 1 else ''}"
        facts.append(f"{count} of {replay.block_size} tokens")
    return " · ".join(facts)
