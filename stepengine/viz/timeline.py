"""Who ran when, in which slot, and which slots stood idle."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from stepengine.errors import TraceError
from stepengine.trace import Trace, idle_rows
from stepengine.trace.metrics import batching
from stepengine.viz.template import GREY, INK, PAPER, QUIET, dressed, request_style

if TYPE_CHECKING:
    import plotly.graph_objects as go

TALL, LOW = 0.74, 0.28  # heights of prefill and decode, in rows
CELLS = 90  # steps up to which each is drawn as a cell of its own
PLOT_PX = 660  # width left for the steps in a figure of the usual size


class Cell(NamedTuple):
    """One request's stretch of equal steps in one row; `steps` > 1 only where cells are merged."""

    request: int
    row: int
    step: int
    tokens: int  # per step
    prompt: bool  # prompt tokens, or tokens recomputed in bulk after a preemption
    steps: int = 1


class Layout(NamedTuple):
    """A timeline before it is drawn."""

    rows: int
    cells: list[Cell]
    idle: list[tuple[int, int]]  # (row, step), one per idle slot-step
    waits: list[tuple[int, int, int]]  # (request, first step, last step), rows of requests only
    preempted: list[tuple[int, int]]  # (row, step)
    finished: list[tuple[int, int, int, str]]  # (request, row, step, reason)


def scheduler_timeline(
    trace: Trace, rows: str = "slots", name: str | None = None, selected: Sequence[int] = ()
) -> "go.Figure":
    """Rows x steps: prefill tall with its number of tokens, decode low, idle slot-steps hatched.

    `rows` is "slots" (a request keeps the lowest free row while it runs) or "requests". Idle slot-steps are
    those of `stepengine.trace.idle_rows`, drawn with rows="slots" only.
    """
    from plotly.subplots import make_subplots

    laid = lay_out(trace, rows)
    name = name or f"{batching(trace).capitalize()} batching"
    figure = make_subplots(rows=1, cols=1)
    draw(figure, 1, trace, laid, rows, selected, len(trace.steps))
    idle = sum(idle_rows(trace))
    decode = _decode_slot_steps(trace)
    share = f" of {decode + idle:,} ({100 * idle / (decode + idle):.0f} %)" if idle else ""
    title = f"{name}: {idle or 'no'}{share} decode slot-step{'s' * (idle > 1)} idle"
    dressed(figure, title, _key(bool(laid.idle), laid, rows), _alt(trace, name, idle), height=130 + 36 * laid.rows)
    return figure.update_xaxes(title_text="engine step")


def compare_timelines(
    a: Trace, b: Trace, names: tuple[str, str] = ("static", "continuous"), selected: Sequence[int] = ()
) -> "go.Figure":
    """Two runs of the same requests above each other on one axis of steps, rows are slots."""
    from plotly.subplots import make_subplots

    plans = [lay_out(trace, "slots") for trace in (a, b)]
    heights = [max(plan.rows, 1) for plan in plans]
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        row_heights=heights,
        vertical_spacing=40 / (36 * sum(heights) + 40),
        subplot_titles=[
            f"<b>{name}</b>  {len(trace.steps):,} steps, {sum(idle_rows(trace)):,} slot-steps idle"
            for name, trace in zip(names, (a, b), strict=True)
        ],
    )
    steps = max(len(a.steps), len(b.steps))
    for row, (trace, plan) in enumerate(zip((a, b), plans, strict=True), 1):
        draw(figure, row, trace, plan, "slots", selected, steps)
    figure.update_annotations(x=0, xanchor="left", font={"size": 13, "color": INK}, selector={"yanchor": "bottom"})
    first, second = (f"{name} {len(t.steps):,}" for name, t in zip(names, (a, b), strict=True))
    dressed(
        figure,
        f"Same requests: {first} steps, {second}",
        _key(any(plan.idle for plan in plans), plans[0], "slots"),
        " ".join(_alt(t, name, sum(idle_rows(t))) for name, t in zip(names, (a, b), strict=True)),
        height=185 + 36 * sum(heights),
    )
    figure.update_layout(margin={"t": 100})
    return figure.update_xaxes(title_text="engine step", row=2)


def lay_out(trace: Trace, rows: str = "slots") -> Layout:
    """Which request is in which row at which step; in rows of slots also where nothing was."""
    if rows not in ("slots", "requests"):
        raise TraceError(f"rows={rows!r} is not a way to draw a timeline; use 'slots' or 'requests'.")
    if not trace.steps:
        raise TraceError("The trace has no steps: there is nothing to draw. Generate something first.")
    order = {request: place for place, request in enumerate(trace.requests)}
    place: dict[int, int] = {}
    decoding: set[int] = set()  # a token was sampled since the request began or came back
    held: set[int] = set()  # rows that a static batch keeps until all of it has ended
    cells, idle, waits, preempted, finished = [], [], [], [], []
    waiting: dict[int, int] = {}
    static, width = batching(trace) == "static", int(trace.meta.get("max_num_seqs") or 0)
    for t, (record, missing) in enumerate(zip(trace.steps, idle_rows(trace), strict=True)):
        plan = record.plan
        for request in plan.arrived:
            waiting[request] = t
        for parent, child in record.forked:
            decoding |= {child} if parent in decoding else set()
        for request, _ in record.aborted:
            place.pop(request, None)
            waiting.pop(request, None)
        for request in (*plan.preempted, *(swap.request for swap in plan.swapped_out)):
            preempted.append((place.pop(request, order[request]), t))
            waiting[request] = t
        decoding -= set(plan.preempted)
        if not place:
            held = set()
        working = set()
        for chunk, token in zip(plan.chunks, record.token_ids, strict=True):
            request = chunk.request
            if request not in place:
                taken = held | set(place.values())
                free = next(row for row in range(len(taken) + 1) if row not in taken)
                place[request] = free if rows == "slots" else order[request]
                if request in waiting and waiting[request] < t:
                    waits.append((request, waiting[request], t - 1))
                waiting.pop(request, None)
            working.add(place[request])
            cells.append(Cell(request, place[request], t, chunk.length, request not in decoding))
            if token >= 0:
                decoding.add(request)
        if static:
            held |= working
        if missing and rows == "slots":
            candidates = sorted(held) if static else range(max(width, len(working)))
            idle += [(row, t) for row in candidates if row not in working][:missing]
        for request, reason in record.finished:
            if request in place:
                finished.append((request, place.pop(request), t, reason))
    last = len(trace.steps) - 1
    if rows == "requests":
        waits += [(request, since, last) for request, since in waiting.items()]
    else:
        waits = []
    used = [cell.row for cell in cells] + [row for row, _ in idle]
    count = len(order) if rows == "requests" else 1 + max(used, default=0)
    return Layout(count, _merged(cells) if last >= CELLS else cells, idle, waits, preempted, finished)


def _merged(cells: list[Cell]) -> list[Cell]:
    """Neighbouring decode cells of a request in one: long runs stay small."""
    result: list[Cell] = []
    newest: dict[int, int] = {}
    for cell in cells:
        at = newest.get(cell.request)
        before = result[at] if at is not None else None
        if (
            at is not None and before is not None and not cell.prompt and not before.prompt
            and (before.row, before.step + before.steps) == (cell.row, cell.step)
        ):  # fmt: skip
            result[at] = before._replace(steps=before.steps + 1, tokens=max(before.tokens, cell.tokens))
        else:
            newest[cell.request] = len(result)
            result.append(cell)
    return result


def draw(
    figure: "go.Figure", row: int, trace: Trace, laid: Layout, rows: str, selected: Sequence[int], steps: int
) -> None:
    """Add one timeline to subplot `row`."""
    where = {"row": row, "col": 1}
    pixels = PLOT_PX / steps
    gap = 0.14 if pixels >= 6 else 0.0
    if laid.idle:
        figure.add_bar(
            name="idle",
            x=[step for _, step in laid.idle],
            base=[r - LOW / 2 for r, _ in laid.idle],
            y=[LOW] * len(laid.idle),
            width=1 - gap,
            marker={
                "color": PAPER,
                "line": {"color": GREY, "width": 1 if gap else 0},
                "pattern": {"shape": "/", "fgcolor": QUIET, "bgcolor": PAPER, "size": 5, "solidity": 0.3},
            },
            hovertemplate="idle at step %{x}: this slot could have worked<extra></extra>",
            **where,
        )
    digits = max((len(str(cell.tokens)) for cell in laid.cells if cell.prompt), default=1)
    fits = digits * 6.4 <= pixels * (1 - gap)
    for request in trace.requests:
        cells = [cell for cell in laid.cells if cell.request == request]
        if cells:
            _draw_request(figure, trace, request, cells, rows, selected, pixels, gap, fits, where)
    for request, begin, end in laid.waits:
        style = request_style(trace, request, selected)
        y = list(trace.requests).index(request)
        figure.add_scatter(
            name="waiting", x=[begin - 0.4, end + 0.4], y=[y, y], mode="lines",
            line={"color": style.edge, "dash": "dot", "width": 1.5},
            hovertemplate=f"{style.label} waits, steps {begin} to {end}<extra></extra>", **where,
        )  # fmt: skip
    if laid.preempted:
        figure.add_scatter(
            name="preempted", x=[t for _, t in laid.preempted], y=[r for r, _ in laid.preempted], mode="markers",
            marker={"symbol": "x-thin", "size": 9, "line": {"color": INK, "width": 2}},
            hovertemplate="preempted before step %{x}<extra></extra>", **where,
        )  # fmt: skip
    if laid.finished:
        styles = [request_style(trace, request, selected) for request, *_ in laid.finished]
        figure.add_scatter(
            name="finished",
            x=[t + 0.34 for _, _, t, _ in laid.finished],
            y=[r for _, r, _, _ in laid.finished],
            mode="markers",
            marker={"size": 7, "color": PAPER, "line": {"color": [s.edge for s in styles], "width": 2}},
            text=[f"{s.label} ends ({f[3]})" for s, f in zip(styles, laid.finished, strict=True)],
            hovertemplate="%{text}<extra></extra>",
            **where,
        )
    labels = [request_style(trace, r, selected).label for r in trace.requests] if rows == "requests" else None
    figure.update_yaxes(
        range=[laid.rows - 0.45, -0.55],
        tickvals=list(range(laid.rows)),
        ticktext=labels or [f"slot {r + 1}" for r in range(laid.rows)],
        **where,
    )
    figure.update_xaxes(range=[-0.7, steps + 0.3], nticks=12, tickformat="d", **where)


def _draw_request(figure, trace, request, cells, rows, selected, pixels, gap, fits, where) -> None:  # type: ignore[no-untyped-def]
    style = request_style(trace, request, selected)
    heights = [TALL if cell.prompt else LOW for cell in cells]
    figure.add_bar(
        name=f"request {style.label}",
        x=[cell.step + (cell.steps - 1) / 2 for cell in cells],
        base=[cell.row - h / 2 for cell, h in zip(cells, heights, strict=True)],
        y=heights,
        width=[cell.steps - gap for cell in cells],
        marker={"color": style.color, "line": {"color": style.edge, "width": 1}},
        customdata=[[cell.tokens, cell.step, cell.steps] for cell in cells],
        text=[_words(style.label, cell) for cell in cells],
        textposition="none",
        hovertemplate="%{text}<extra></extra>",
        **where,
    )
    prompts = [cell for cell in cells if cell.prompt]
    letter = f"<b>{style.label}</b>" if rows == "slots" else ""
    inside = [f"{letter}<br>{cell.tokens}" if letter else str(cell.tokens) for cell in prompts]
    beside = [""] * len(prompts)
    if not fits:  # the count, or all of it, stands to the right, above the low bars
        wide = len(style.label) * 7 > pixels * (1 - gap)
        inside = [""] * len(prompts) if wide else [letter] * len(prompts)
        beside = [f"{letter if wide else ''} {cell.tokens}".strip() for cell in prompts]
    for texts, color, dx, dy, anchor in (
        (inside, style.ink, 0.0, 0.0, "middle center"),
        (beside, style.edge, 0.5, -0.30, "middle right"),
    ):
        if any(texts):
            figure.add_scatter(
                name=f"label {style.label}",
                x=[cell.step + dx for cell in prompts],
                y=[cell.row + dy for cell in prompts],
                text=texts,
                mode="text",
                textposition=anchor,
                textfont={"size": 10, "color": color},
                hoverinfo="skip",
                cliponaxis=False,
                **where,
            )


def _words(label: str, cell: Cell) -> str:
    if cell.prompt:
        return f"{label}: {cell.tokens} tokens of its prompt, step {cell.step}"
    if cell.steps > 1:
        return f"{label}: one new token at each of steps {cell.step} to {cell.step + cell.steps - 1}"
    ran = "" if cell.tokens == 1 else f", {cell.tokens} tokens computed for it"
    return f"{label}: one new token{ran}, step {cell.step}"


def _decode_slot_steps(trace: Trace) -> int:
    """Rows of the steps in which nobody starts: the part of the slot-steps that was used."""
    seen: set[int] = set()
    total = 0
    for record in trace.steps:
        seen -= set(record.plan.preempted)
        seen |= {child for _, child in record.forked}
        rows = {chunk.request for chunk in record.plan.chunks}
        total += len(rows) if rows <= seen else 0
        seen |= rows
    return total


def _key(idle: bool, laid: Layout, rows: str) -> str:
    tall = "tall: prompt, with its tokens" if rows == "requests" else "tall: prompt (letter, tokens)"
    parts = [tall, "low: one new token", "ring: finished"]
    parts += (
        ["hatched: idle"] * idle + ["cross: preempted"] * bool(laid.preempted) + ["dotted: waiting"] * bool(laid.waits)
    )
    return " · ".join(parts)


def _alt(trace: Trace, name: str, idle: int) -> str:
    return f"{name}: {len(trace.requests)} requests in {len(trace.steps)} steps, {idle} slot-steps idle."
