"""What the step player draws, as plain JSON values: everything that needs the trace is worked out here."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepengine.errors import InvalidSetting
from stepengine.trace import Replay, Snapshot, Trace
from stepengine.trace.replay import SWAPPED, WAITING
from stepengine.trace.text import Pieces
from stepengine.viz.narrate import KINDS, Narration, Narrator, Work
from stepengine.viz.template import GREY, HUES, WHITE_INK, readable

PANELS = ("schedule", "tokens", "kv", "tables", "texts")
PROMPT_TAIL = 400  # characters of a prompt that the page gets: only its end is ever shown


def player_data(
    trace: Trace, size: str = "page", panels: Sequence[str] | None = None, labels: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """Everything the page draws, as plain JSON values; requests are named by their position in the list.

    A chunk is [request, start, length, tokens run for the first time, cached, token sampled 1/0, tall 1/0], a span
    [first step, last step]. K/V in slots are `kv`: [slot, request, tokens held]. K/V in blocks come as changes from
    one step to the next: `tables` [request, entries kept, block ids after them], `held` [request, tokens with K/V]
    where that is not the end of its chunk or what it was, `hosted` [request, host slots], `copies` [request, entry,
    source, destination], `kept` and `unkept`: blocks that are from now on, or no longer, free but findable.
    """
    return PlayerData(trace, size, panels, labels).data()


class PlayerData:
    """`player_data` of a trace that may still grow: steps are worked out once, but the last one of the time before.

    `blank` is the sentence that stands in for a step while none is recorded.
    """

    def __init__(
        self,
        trace: Trace,
        size: str = "page",
        panels: Sequence[str] | None = None,
        labels: Mapping[int, str] | None = None,
        blank: str = "",
    ) -> None:
        self.trace, self.size, self.panels, self.given, self.blank = trace, size, panels, labels, blank
        _panels(panels, size, "blocks")  # a wrong name is refused before anything is worked out
        self._begin()

    def _begin(self) -> None:
        self.replay = Replay(self.trace)
        self.narrator = Narrator(self.replay, self.given)
        self.place: dict[int, int] = {}
        self.steps: list[dict[str, Any]] = []
        self.waits: dict[int, _Spans] = {}
        self.swaps: dict[int, _Spans] = {}
        self._changes = _Changes(self.place)
        self._texts: dict[int, tuple[str, Pieces]] = {}
        self._lettered = self._letters()

    def _letters(self) -> bool:
        return len(self.trace.requests) <= len(HUES)

    def data(self) -> dict[str, Any]:
        """Everything up to the last recorded step."""
        if self._lettered and not self._letters():  # numbers from now on, in the sentences too
            self._begin()
        self._grow()
        trace, place, layout = self.trace, self.place, self.narrator.layout
        seen = {kind for step in self.steps for kind in step.get("kinds", ())}
        blank = {"say": self.blank, "named": [], "chunks": []} | ({"kv": []} if layout == "slots" else {})
        data = {
            "version": 3,
            "title": _title(trace.meta),
            "facts": _facts(trace, layout, self.replay),
            "grey": GREY,
            "panels": _panels(self.panels, self.size, layout),
            "layout": layout,
            "colored": len(place) <= len(HUES),
            "budget": int(trace.meta.get("max_num_batched_tokens") or 0),
            "slots": self.replay.num_blocks,
            "slot_tokens": self.replay.block_size if self.replay.num_blocks else 0,
            "kv_bytes": int(trace.meta.get("kv_bytes_per_token") or 0),
            "kinds": [[kind, self._kind(kind)] for kind in KINDS if kind in seen],
            "requests": self._requests(),
            "steps": list(self.steps) or [blank],
        }
        if not self.steps:
            data["blank"] = 1
            for request in data["requests"]:  # they are in the engine's queue
                request.update(arrived=0, wait=[[0, 0]])
        if self.replay.prefix_caching:
            data["caching"] = 1
        if layout == "blocks":
            data["used"] = sorted({block for step in self.steps for block in step.get("fresh", ())})
        return data

    def _kind(self, kind: str) -> str:
        """What the page calls a kind of event."""
        if kind == "hit":
            return "cache hit" if self.replay.prefix_caching else "shared start"
        return {"copy": "copy-on-write"}.get(kind, kind)

    def _grow(self) -> None:
        self.narrator.grow()
        for request in list(self.trace.requests)[len(self.place) :]:
            self.place[request] = len(self.place)
            self.waits[request], self.swaps[request] = _Spans(), _Spans()
        again = bool(self.steps) and len(self.steps) < len(self.replay)
        if again:  # what a step kept findable is certain once the one after it is known
            self.steps.pop()
            self._changes.back()
        for t in range(len(self.steps), len(self.replay)):
            self._add(t)

    def _add(self, t: int) -> None:
        told, now, layout = self.narrator.explain(t), self.replay.at(t), self.narrator.layout
        for request, state in now.state.items():
            if state == WAITING:
                self.waits[request].add(t)
            elif state == SWAPPED:
                self.swaps[request].add(t)
        step = _step(told, now, self.narrator.work[t], self.place, layout, self.narrator.idle[t])
        self.steps.append({**step, **self._changes.of(now)} if layout == "blocks" else step)

    def _requests(self) -> list[dict[str, Any]]:
        trace, place = self.trace, self.place
        idle = _idle_spans(trace, self.narrator)
        sampled: dict[int, list[int]] = {request: [] for request in place}
        ids: dict[int, list[int]] = {request: [] for request in place}
        arrived: dict[int, int] = {}
        ended: dict[int, tuple[int, str]] = {}
        for t, record in enumerate(trace.steps):
            for request in record.plan.arrived:
                arrived[request] = t
            ended.update({request: (t, reason) for request, reason in (*record.aborted, *record.finished)})
            for parent, child in record.forked:
                sampled[child], ids[child], arrived[child] = list(sampled[parent]), list(ids[parent]), t
            for chunk, token in zip(record.plan.chunks, record.token_ids, strict=True):
                arrived.setdefault(chunk.request, t)
                if token >= 0:
                    sampled[chunk.request].append(t)
                    ids[chunk.request].append(token)
        requests = []
        for request, info in trace.requests.items():
            prompt, pieces = self._text(request, ids[request])
            hue = HUES[place[request] % len(HUES)]
            requests.append(
                {
                    "id": request,
                    "label": self.narrator.labels[request],
                    "color": hue,
                    "ink": "#FFFFFF" if hue in WHITE_INK else "#14181C",
                    "edge": readable(hue),
                    "prompt": len(info.prompt_ids),
                    "max": info.max_tokens,
                    "text": prompt if len(prompt) <= PROMPT_TAIL else "…" + prompt[-PROMPT_TAIL:],
                    "pieces": list(pieces),
                    "tokens": sampled[request],
                    "arrived": arrived.get(request, len(trace.steps)),
                    "end": ended.get(request, (-1, ""))[0],
                    "reason": ended.get(request, (-1, ""))[1],
                    "wait": self.waits[request].spans,
                    "swap": self.swaps[request].spans,
                    "idle": idle[request],
                }
            )
        return requests

    def _text(self, request: int, output: Sequence[int]) -> tuple[str, tuple[str, ...]]:
        """As `Trace.text`, decoding only what is new."""
        if self.trace.tokenizer is None:
            return self.trace.text(request)
        if request not in self._texts:
            prompt, decode = list(self.trace.requests[request].prompt_ids), self.trace.tokenizer.decode
            self._texts[request] = decode(prompt), Pieces(decode, prompt)
        prompt_text, pieces = self._texts[request]
        pieces.extend(output[len(pieces) :])
        return prompt_text, pieces.texts


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
        if self.spans and self.spans[-1][1] >= t - 1:
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
        self.kept: frozenset[int] = frozenset()
        self.last = self._books()

    def _books(self) -> tuple[Any, ...]:
        return self.table, self.held, self.hosted, self.kept

    def back(self) -> None:
        """Forget the last step."""
        self.table, self.held, self.hosted, self.kept = self.last

    def of(self, now: Snapshot) -> dict[str, Any]:
        self.last = self._books()
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
        kept, unkept = sorted(now.kept_blocks - self.kept), sorted(self.kept - now.kept_blocks)
        self.kept = now.kept_blocks
        copies = [[self.place[copy.request], *copy[1:]] for copy in now.record.plan.copies]
        fresh = sorted(now.new_blocks)
        changed = {"tables": tables, "held": held, "hosted": hosted, "copies": copies, "fresh": fresh}
        changed |= {"kept": kept, "unkept": unkept}
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
    if told.kinds:
        step["kinds"] = list(told.kinds)
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
