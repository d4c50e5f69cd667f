"""The life of every request: waiting, running, sent away and back, ended."""

from collections import Counter
from collections.abc import Sequence
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

from stepengine.errors import TraceError
from stepengine.trace import Replay, Snapshot, Trace
from stepengine.trace.replay import RUNNING, SWAPPED, WAITING
from stepengine.viz.grid import WIDTH, Palette, counted, reals, wholes
from stepengine.viz.template import INK, PAPER, new_figure
from stepengine.viz.words.need import need
from stepengine.viz.words.work import Work, work_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

PREFILL, DECODE, PAUSED = "prefill", "decode", "paused"  # of the running ones
HEIGHTS = {PREFILL: 0.74, DECODE: 0.28, SWAPPED: 0.5}  # in rows
LEFT, RIGHT = 44, 24  # px


class Span(NamedTuple):
    """Neighbouring steps in which a request was in the same state."""

    request: int
    kind: str  # "waiting" | "prefill" | "decode" | "paused" (running, but not in this step) | "swapped"
    begin: int  # step
    end: int  # step, included
    tokens: int = 0  # run in these steps
    cause: str = ""  # why it had to wait, in the scheduler's words


class Mark(NamedTuple):
    """Something that happens to a request in a step."""

    request: int
    kind: str  # "preempted" | "swapped out" | "swapped in" | "finished" | "aborted"
    step: int
    words: str


class States(NamedTuple):
    """A run as lives of requests."""

    spans: list[Span]
    marks: list[Mark]
    again: int  # tokens that ran once more, because their K/V had been given up


def states_of(trace: Trace, palette: Palette | None = None) -> States:
    """Which request was in which state when, and what sent it there."""
    replay, palette = Replay(trace), palette or Palette(trace)
    spans: list[Span] = []
    newest: dict[int, int] = {}
    marks: list[Mark] = []
    again = 0
    before: Snapshot | None = None
    for now, works in zip(replay, work_of(replay), strict=True):
        again += sum(work.chunk.length - work.new for work in works)
        ran = {work.chunk.request: work for work in works}
        for span in _present(now, ran):
            at = newest.get(span.request)
            last = spans[at] if at is not None else None
            if at is not None and last is not None and last.end == now.index - 1 and _same(last, span):
                spans[at] = last._replace(
                    end=now.index, tokens=last.tokens + span.tokens, cause=last.cause or span.cause
                )
            else:
                newest[span.request] = len(spans)
                spans.append(span)
        marks += _marks(replay, palette, before, now)
        before = replay.after(now.index)
    return States(spans, marks, again)


def _same(last: Span, span: Span) -> bool:
    return last.kind == span.kind != PREFILL


def _present(now: Snapshot, ran: dict[int, Work]) -> list[Span]:
    t, spans = now.index, []
    away = [r for r, state in now.state.items() if state in (WAITING, SWAPPED)]
    infos = now.record.plan.blocked
    for request, state in now.state.items():
        work = ran.get(request)
        if work is not None:
            kind = PREFILL if work.prompt or work.first else DECODE
            spans.append(Span(request, kind, t, t, work.chunk.length))
        elif state == RUNNING:
            spans.append(Span(request, PAUSED, t, t))
        elif request in away:
            spans.append(Span(request, state, t, t, 0, infos))
    return spans


def _marks(replay: Replay, palette: Palette, before: Snapshot | None, now: Snapshot) -> list[Mark]:
    t, record, marks = now.index, now.record, []
    plan = record.plan
    if before is not None and (plan.preempted or plan.swapped_out):
        lack = need(replay, before, record)
        cause = f"{palette.name(lack.who)} needed {counted(lack.blocks)}, {lack.free} free"
        for request in plan.preempted:
            words = f"preempted, {counted(len(lack.table.get(request, ())))} given back: {cause}"
            marks.append(Mark(request, "preempted", t, words))
        for swap in plan.swapped_out:
            marks.append(
                Mark(swap.request, "swapped out", t, f"swapped out, {counted(len(swap.pairs))} to the host: {cause}")
            )
    for swap in plan.swapped_in:
        marks.append(Mark(swap.request, "swapped in", t, f"back from the host with {counted(len(swap.pairs))}"))
    for request, _ in record.aborted:
        marks.append(Mark(request, "aborted", t, "aborted"))
    for request, reason in record.finished:
        marks.append(Mark(request, "finished", t, f"ends after {len(now.outputs[request])} tokens ({reason})"))
    return marks


def request_states(trace: Trace, selected: Sequence[int] = ()) -> "go.Figure":
    """One line per request over steps: waiting, prefill, decode, preempted, swapped out and in, ended.

    The causes stand in the hover words. `selected` as in `request_style`.
    """
    if not trace.steps:
        raise TraceError("The trace has no steps: there is nothing to draw. Generate something first.")
    palette = Palette(trace, selected)
    found = states_of(trace, palette)
    rows = {request: row for row, request in enumerate(trace.requests)}
    height = 34 if len(rows) <= 12 else max(13, 420 // len(rows))
    title = _title(found, palette, trace)
    figure = new_figure(
        title, _key(found), f"States of {len(rows)} requests over {len(trace.steps)} steps. {title}. "
        + " ".join(f"Step {m.step}: {palette.styles[m.request].label} {m.words}." for m in found.marks[:40]),
        height=round(84 + height * len(rows) + 52), width=WIDTH, margin={"l": LEFT, "r": RIGHT, "t": 84, "b": 52},
    )  # fmt: skip
    pixels = (WIDTH - LEFT - RIGHT) / (len(trace.steps) + 1)
    _lines(figure, found, palette, rows)
    for kind in (SWAPPED, DECODE, PREFILL):
        _bars(figure, kind, [span for span in found.spans if span.kind == kind], palette, rows, pixels, height)
    _draw_marks(figure, found.marks, palette, rows, height)
    figure.update_yaxes(
        range=[len(rows) - 0.45, -0.55], tickvals=list(rows.values()), showgrid=False,
        ticktext=[palette.styles[r].label for r in rows],
    )  # fmt: skip
    if len(rows) > 32:  # numbers of 11 px need 13 px each
        every = -(-14 // height) if height < 14 else 1
        figure.update_yaxes(tickvals=list(rows.values())[::every], tickfont={"size": 11})
        figure.update_yaxes(ticktext=[palette.styles[r].label for r in list(rows)[::every]])
    return figure.update_xaxes(
        title_text="engine step", range=[-0.7, len(trace.steps) - 0.1], nticks=12, tickformat="d"
    )


def _lines(figure: "go.Figure", found: States, palette: Palette, rows: dict[int, int]) -> None:
    """Dotted where a request waits, thin where it runs but sits a step out."""
    groups: dict[tuple[str, str], list[Span]] = {}
    for span in found.spans:
        if span.kind in (WAITING, PAUSED):
            groups.setdefault((span.kind, palette.styles[span.request].edge), []).append(span)
    for (kind, color), spans in groups.items():
        figure.add_scatter(
            name=kind, mode="lines", line={"color": color, "width": 1.8, "dash": "dot" if kind == WAITING else "solid"},
            x=reals(x for s in spans for x in (s.begin - 0.45, (s.begin + s.end) / 2, s.end + 0.45, nan)),
            y=reals(y for s in spans for y in (*(rows[s.request],) * 3, nan)),
            **({"hoverinfo": "skip"} if kind == PAUSED else
               {"hoverinfo": "text", "hovertext": [text for s in spans for text in ("", _hover(s, palette), "", "")]}),
        )  # fmt: skip


def _bars(
    figure: "go.Figure", kind: str, spans: Sequence[Span], palette: Palette, rows: dict[int, int], pixels: float,
    height: float,
) -> None:  # fmt: skip
    if not spans:
        return
    tall, gap = HEIGHTS[kind], 0.14 if pixels >= 6 else 0.0
    numbers = palette.numbers(span.request for span in spans)
    marker = {**palette.marker(numbers), "line": palette.line(numbers)}
    words: dict[str, Any] = {"hovertemplate": "one new token a step, %{customdata} in all<extra></extra>"}
    if kind != DECODE:
        words = {"hovertemplate": "%{text}<extra></extra>", "text": [_hover(span, palette) for span in spans]}
    if kind == SWAPPED:
        edges = [palette.styles[span.request].edge for span in spans]
        pattern = {"shape": "\\", "fgcolor": edges, "bgcolor": PAPER, "size": 6, "solidity": 0.25}
        marker = {"color": PAPER, "line": palette.line(numbers), "pattern": pattern}
    figure.add_bar(
        name=kind, x=reals((span.begin + span.end) / 2 for span in spans),
        width=reals(span.end - span.begin + 1 - gap for span in spans),
        base=reals(rows[span.request] - tall / 2 for span in spans), y=reals(tall for _ in spans), marker=marker,
        customdata=wholes(span.tokens for span in spans), textposition="none", **words,
    )  # fmt: skip
    digits = max(len(str(span.tokens)) for span in spans)
    if kind == PREFILL and height >= 24 and digits * 6.6 <= pixels * (1 - gap):
        inks = {span.request: palette.styles[span.request].ink for span in spans}
        for ink in dict.fromkeys(inks.values()):
            mine = [span for span in spans if inks[span.request] == ink]
            figure.add_scatter(
                name="prompt tokens", x=[span.begin for span in mine], y=[rows[span.request] for span in mine],
                text=[str(span.tokens) for span in mine], mode="text", textfont={"size": 11, "color": ink},
                hoverinfo="skip",
            )  # fmt: skip


SYMBOLS: dict[str, tuple[str, float]] = {  # symbol, and where in the step it stands
    "preempted": ("x-thin", -0.5),
    "swapped out": ("triangle-down", -0.5),
    "swapped in": ("triangle-up", -0.5),
    "finished": ("circle", 0.4),
    "aborted": ("circle-x-open", -0.5),
}


def _draw_marks(
    figure: "go.Figure", marks: Sequence[Mark], palette: Palette, rows: dict[int, int], height: float
) -> None:
    for kind, (symbol, shift) in SYMBOLS.items():
        mine = [mark for mark in marks if mark.kind == kind]
        if not mine:
            continue
        styles = [palette.styles[mark.request] for mark in mine]
        ring = kind in ("finished", "aborted")
        figure.add_scatter(
            name=kind, x=[mark.step + shift for mark in mine], y=[rows[mark.request] for mark in mine], mode="markers",
            marker={
                "symbol": symbol, "size": 8 if ring else 10 if height >= 20 else 8, "color": PAPER if ring else INK,
                "line": {"color": [s.edge for s in styles] if ring else INK, "width": 2 if symbol != "triangle" else 0},
            },
            text=[f"{palette.styles[m.request].label}, step {m.step}: {m.words}" for m in mine],
            hovertemplate="%{text}<extra></extra>", cliponaxis=False,
        )  # fmt: skip


def _hover(span: Span, palette: Palette) -> str:
    label = palette.styles[span.request].label
    when = f"step {span.begin}" if span.begin == span.end else f"steps {span.begin} to {span.end}"
    if span.kind == PREFILL:
        return f"{label}, {when}: {span.tokens} tokens run in bulk"
    if span.kind == DECODE:
        return f"{label}, {when}: one new token each" if span.begin < span.end else f"{label}, {when}: one new token"
    said = {WAITING: "waits", SWAPPED: "on the host", PAUSED: "sits out while prompts run"}[span.kind]
    return f"{label}, {when}: {said}" + (f"; the queue's head: {span.cause}" if span.cause else "")


def _title(found: States, palette: Palette, trace: Trace) -> str:
    """The finding: who was sent away how often, and what it cost."""
    dropped = Counter(m.request for m in found.marks if m.kind == "preempted")
    moved = Counter(m.request for m in found.marks if m.kind == "swapped out")
    parts = []
    if dropped:
        cost = f"{found.again:,} tokens computed again" if found.again else "nothing computed again yet"
        parts.append(f"{_times(dropped, 'preemption', palette)}; {cost}")
    if moved:
        blocks = sum(len(s.pairs) for record in trace.steps for s in record.plan.swapped_out)
        parts.append(f"{_times(moved, 'swap', palette)}; {counted(blocks)} moved to the host")
    if parts:
        return ". ".join(parts)
    longest = max((s for s in found.spans if s.kind == WAITING), key=lambda s: s.end - s.begin, default=None)
    if longest is None:
        return f"Nobody waits and nobody is preempted in {len(trace.steps)} steps"
    steps = longest.end - longest.begin + 1
    who = palette.name([longest.request])
    return f"Nobody is preempted; {who} waits longest, {steps} step{'s' * (steps > 1)}"


def _times(counts: Counter[int], noun: str, palette: Palette) -> str:
    total = sum(counts.values())
    often = {1: "once", 2: "twice"}
    said = f"{total} {noun}{'s' * (total > 1)}"
    if len(counts) > 4:
        return f"{said} of {len(counts)} requests"
    each = [f"{palette.name([r])} {often.get(n, f'{n} times')}" for r, n in sorted(counts.items(), key=lambda c: -c[1])]
    return f"{said}: {', '.join(each)}"


def _key(found: States) -> str:
    kinds = {span.kind for span in found.spans} | {mark.kind for mark in found.marks}
    words = {
        PREFILL: "tall: prompt or recomputed", DECODE: "low: decode", WAITING: "dotted: waiting",
        PAUSED: "line: sits out", "preempted": "cross: preempted", SWAPPED: "hatched: on the host",
        "finished": "ring: ends", "aborted": "crossed ring: aborted",
    }  # fmt: skip
    return " · ".join(text for kind, text in words.items() if kind in kinds)
