"""What the step player draws, as plain JSON values: everything that needs the trace is worked out here."""

from collections.abc import Sequence
from typing import Any

from stepengine.errors import InvalidSetting
from stepengine.trace import Replay, Snapshot, Trace
from stepengine.trace.replay import SWAPPED, WAITING
from stepengine.viz.narrate import Narration, Narrator, Work
from stepengine.viz.template import GREY, HUES, WHITE_INK, readable

PANELS = ("schedule", "tokens", "kv", "tables", "texts")
PROMPT_TAIL = 400  # characters of a prompt that the page gets: only its end is ever shown


def player_data(trace: Trace, size: str = "page", panels: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything the page draws, as plain JSON values; requests are named by their position in the list.

    A chunk is [request, start, length, tokens run for the first time, cached, token sampled 1/0, tall 1/0], a span
    [first step, last step]. K/V in slots are `kv`: [slot, request, tokens held]. K/V in blocks come as changes from
    one step to the next: `tables` [request, entries kept, block ids after them], `held` [request, tokens with K/V]
    where that is not the end of its chunk or what it was, `hosted` [request, host slots], `copies` [request, entry,
    source, destination].
    """
    replay = Replay(trace)
    narrator = Narrator(replay)
    place = {request: i for i, request in enumerate(trace.requests)}
    layout = narrator.layout
    steps, waits = [], {request: _Spans() for request in place}
    swaps = {request: _Spans() for request in place}
    changes = _Changes(place)
    for t in range(len(replay)):
        told, now = narrator.explain(t), replay.at(t)
        for request, state in now.state.items():
            if state == WAITING:
                waits[request].add(t)
            elif state == SWAPPED:
                swaps[request].add(t)
        step = _step(told, now, narrator.work[t], place, layout, narrator.idle[t])
        steps.append({**step, **changes.of(now)} if layout == "blocks" else step)
    data = {
        "version": 2,
        "title": _title(trace.meta),
        "facts": _facts(trace, layout, replay),
        "grey": GREY,
        "panels": _panels(panels, size, layout),
        "layout": layout,
        "colored": len(place) <= len(HUES),
        "budget": int(trace.meta.get("max_num_batched_tokens") or 0),
        "slots": replay.num_blocks,
        "slot_tokens": replay.block_size if replay.num_blocks else 0,
        "kv_bytes": int(trace.meta.get("kv_bytes_per_token") or 0),
        "requests": _requests(trace, narrator, place, waits, swaps),
        "steps": steps,
    }
    if layout == "blocks":
        data["used"] = sorted({block for step in steps for block in step.get("fresh", ())})
    return data


def packed(data: dict[str, Any]) -> dict[str, Any]:
    """The same, smaller: what the page can work out again is left out.

    A chunk that runs the one token after its request's last chunk is the request alone; the steps of a request's
    tokens are spans.
    """
    ends: dict[int, int] = {}
    steps = []
    for step in data["steps"]:
        chunks = []
        for chunk in step["chunks"]:
            request, start, length = chunk[:3]
            chunks.append(request if chunk == [request, ends.get(request), 1, 1, 0, 1, 0] else chunk)
            ends[request] = start + length
        steps.append({**step, "chunks": chunks})
    requests = []
    for request in data["requests"]:
        spans = _Spans()
        for t in request["tokens"]:
            spans.add(t)
        requests.append({**request, "tokens": spans.spans})
    return {**data, "steps": steps, "requests": requests}


class _Spans:
    """Steps in ascending order, kept as [first, last]."""

    def __init__(self) -> None:
        self.spans: list[list[int]] = []

    def add(self, t: int) -> None:
        if self.spans and self.spans[-1][1] == t - 1:
            self.spans[-1][1] = t
        else:
            self.spans.append([t, t])


class _Changes:
    """What each step changes in the block tables; called for the steps in order."""

    def __init__(self, place: dict[int, int]) -> None:
        self.place = place
        self.table: dict[int, tuple[int, ...]] = {}
        self.held: dict[int, int] = {}
        self.hosted: dict[int, tuple[int, ...]] = {}

    def of(self, now: Snapshot) -> dict[str, Any]:
        ends = {chunk.request: chunk.end for chunk in now.chunks}
        tables, held, hosted = [], [], []
        for request, i in self.place.items():
            new, old = now.table[request], self.table.get(request, ())
            if new != old:
                keep = next(
                    (k for k, (a, b) in enumerate(zip(new, old, strict=False)) if a != b), min(len(new), len(old))
                )
                tables.append([i, keep, *new[keep:]])
            if now.computed[request] != ends.get(request, self.held.get(request, 0)):
                held.append([i, now.computed[request]])
            if now.hosted.get(request, ()) != self.hosted.get(request, ()):
                hosted.append([i, *now.hosted.get(request, ())])
        self.table, self.held, self.hosted = dict(now.table), dict(now.computed), dict(now.hosted)
        copies = [[self.place[copy.request], *copy[1:]] for copy in now.record.plan.copies]
        fresh = sorted(now.new_blocks)
        changed = {"tables": tables, "held": held, "hosted": hosted, "copies": copies, "fresh": fresh}
        return {name: value for name, value in changed.items() if value}


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


def _requests(
    trace: Trace, narrator: Narrator, place: dict[int, int], waits: dict[int, _Spans], swaps: dict[int, _Spans]
) -> list[dict[str, Any]]:
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
    return requests


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


def _panels(panels: Sequence[str] | None, size: str, layout: str) -> list[str]:
    chosen = (
        (PANELS if size == "page" else PANELS[:2] if layout == "none" else ("schedule", "kv"))
        if panels is None
        else panels
    )
    for name in chosen:
        if name not in PANELS:
            raise InvalidSetting(f"panel {name!r} does not exist: choose among {', '.join(PANELS)}.")
    return [name for name in chosen if not (name == "tables" and layout != "blocks")]  # nothing to look up in


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
