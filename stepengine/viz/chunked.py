"""Chunked prefill: what fills each step, what the others wait meanwhile, and how large a budget should be."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stepengine.errors import TraceError
from stepengine.trace import Gap, Trace, token_gaps
from stepengine.viz.grid import listed
from stepengine.viz.template import GREY, HUES, INK, PAPER, QUIET, dressed, readable, request_style

if TYPE_CHECKING:
    import plotly.graph_objects as go

KNEE = 0.95  # of the best throughput of a sweep
DARK = 8.0  # contrast against paper of a decode's shade
WIDTH = 760  # px
PLOT_PX = 680  # of it for the steps
ROW_PX = 18  # of a request's row under the bars
UNITS = ("tokens", "ms")


class Slice(NamedTuple):
    """What one request runs in one step."""

    request: int
    at: int  # index of the step in the trace
    tokens: int
    below: int  # tokens under it in the stack: the step's chunks in the plan's order
    prompt: bool  # prompt tokens, or tokens run again in bulk after a preemption
    brought: bool  # the step brought a token for the request


class SweepPoint(NamedTuple):
    """One run of a sweep of the budget."""

    gap_ms: float  # P99 of the gaps between the watched requests' tokens
    first_ms: float  # time to the long request's first token
    tokens_per_s: float  # generated, by all requests


def slices(trace: Trace) -> list[Slice]:
    """Every chunk of a run with its place in its step's stack."""
    decoding: set[int] = set()
    result = []
    for index, record in enumerate(trace.steps):
        decoding -= set(record.plan.preempted)
        decoding |= {child for parent, child in record.forked if parent in decoding}
        below = 0
        for chunk, token in zip(record.plan.chunks, record.token_ids, strict=True):
            request = chunk.request
            result.append(Slice(request, index, chunk.length, below, request not in decoding, token >= 0))
            below += chunk.length
            decoding |= {request} if token >= 0 else set()
    return result


def mixed_schedule(
    trace: Trace,
    first: int = 0,
    steps: int | None = None,
    budget: int | None = None,
    name: str = "",
    selected: Sequence[int] = (),
) -> "go.Figure":
    """Tokens of each step, stacked by request: prompts in its colour, decodes in a darker shade; the budget as a line.

    Under the bars one row per request: a mark where the step brought a token for it, so that a stall is a gap.
    Draws `steps` steps from number `first` on. budget: the run's own where prompts are chunked.
    """
    from plotly.subplots import make_subplots

    window = _window(trace, first, steps)
    shown = _Run(trace, window, _budget(trace, budget), selected)
    rows = ROW_PX * len(shown.requests) + 16
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[230, rows], vertical_spacing=14 / (244 + rows)
    )
    top = 1.14 * max(shown.most, shown.budget or 0)
    _draw_stack(figure, 1, 1, shown, PLOT_PX, top)
    _draw_tokens_out(figure, 2, 1, shown, PLOT_PX)
    figure.update_xaxes(range=[window[0] - 0.7, window[-1] + 0.7], nticks=14, tickformat="d")
    figure.update_xaxes(title_text="engine step", row=2)
    figure.update_yaxes(title_text="tokens in the step", range=[0, top], row=1)
    title = f"{name}: {_finding(shown)}" if name else _upper(_finding(shown))
    dressed(figure, title, _key(shown), f"{title}. Tokens by step: {_counts(shown)}.", height=368 + rows, width=WIDTH)
    return figure


def budget_and_gaps(
    runs: Mapping[str, Trace],
    unit: str = "tokens",
    first: int = 0,
    steps: int | None = None,
    watched: Sequence[int] | None = None,
) -> "go.Figure":
    """Steps above, what they do to the gaps between a request's tokens below; runs side by side, on the same scales.

    unit "tokens": over engine steps, a gap is the number of tokens run from one token to the next. "ms": over time,
    bars as wide as their step took, a gap is the inter-token latency. watched: the requests whose gaps are drawn
    (all). Draws `steps` steps of each run from number `first` on.
    """
    from plotly.subplots import make_subplots

    if unit not in UNITS:
        raise TraceError(f"unit={unit!r} is no way to measure a gap here; use 'tokens' or 'ms'.")
    if not runs:
        raise TraceError("There is no run to draw: give at least one, such as {'chunks': llm.trace}.")
    shown = {
        name: _Run(trace, _window(trace, first, steps), _budget(trace), (), watched) for name, trace in runs.items()
    }
    longest = {name: max((_size(gap, unit) for gap in run.gaps), default=0.0) for name, run in shown.items()}
    headings = [
        f"<b>{name}</b>  longest gap {_amount(longest[name], unit)}" if run.gaps else f"<b>{name}</b>"
        for name, run in shown.items()
    ]
    figure = make_subplots(
        rows=2, cols=len(runs), shared_xaxes=True, shared_yaxes="rows", row_heights=[200, 140], vertical_spacing=0.1,
        horizontal_spacing=0.05, subplot_titles=headings,
    )  # fmt: skip
    pixels = (PLOT_PX - 20 * len(runs)) / len(runs)
    top = 1.16 * max(max(run.most, run.budget or 0) for run in shown.values())
    highest = 1.25 * max([*longest.values(), 1.0])
    spans = [_span(run, unit) for run in shown.values()]
    for column, (run, (begin, end)) in enumerate(zip(shown.values(), spans, strict=True), 1):
        _draw_stack(figure, 1, column, run, pixels, top, unit)
        _draw_gaps(figure, 2, column, run, unit)
        side = 0.7 if unit == "tokens" else 0.02 * (end - begin)
        right = end if unit == "tokens" else begin + max(e - b for b, e in spans)
        figure.update_xaxes(range=[begin - side, right + side], nticks=9, tickformat="d", col=column)
    figure.update_xaxes(title_text="engine step" if unit == "tokens" else "seconds", row=2)
    if unit == "ms":
        figure.update_xaxes(tickformat="", row=2)
    figure.update_yaxes(range=[0, top], row=1)
    figure.update_yaxes(range=[0, highest], row=2)
    figure.update_yaxes(title_text="tokens in the step", row=1, col=1)
    below = "tokens run<br>since its last" if unit == "tokens" else "since its<br>last token (ms)"
    figure.update_yaxes(title_text=below, row=2, col=1)
    figure.update_annotations(font={"size": 13, "color": INK}, selector={"yanchor": "bottom", "yref": "paper"})
    title = "Longest gap: " + ", ".join(f"{_amount(longest[name], unit)} {name}" for name in shown)
    wide = "" if unit == "tokens" else ", each bar as wide as it took"
    subtitle = f"above: the steps{wide} · below: how long each token has let its request wait"
    alt = f"{title}. " + " ".join(f"{name}, tokens by step: {_counts(run)}." for name, run in shown.items())
    dressed(figure, title, subtitle, alt, height=496, width=WIDTH)
    return figure.update_layout(margin={"t": 104})


def sweep_point(runs: Sequence[Trace], long: int, watched: Sequence[int]) -> SweepPoint:
    """What one budget is worth, from one recording or several of the same plan.

    Of several, each step counts with its shortest time, since a busy machine only ever adds to it. `long` and `watched`
    are places in the order of arrival: the request with the long prompt, and those that decode beside it.
    """
    plans = [[tuple(chunk.length for chunk in step.plan.chunks) for step in run.steps] for run in runs]
    if not runs or any(plan != plans[0] for plan in plans):
        raise TraceError(f"These {len(runs)} recordings are not of one plan; give those of the same run, repeated.")
    times = [min(r.t_done - r.t_plan for r in records) for records in zip(*(run.steps for run in runs), strict=True)]
    trace, order = runs[0], list(runs[0].requests)
    wanted = {order[place] for place in watched}
    gaps = [sum(times[gap.step - gap.steps + 1 : gap.step + 1]) for gap in token_gaps(trace) if gap.request in wanted]
    came = next((at for at, step in enumerate(trace.steps) if order[long] in step.plan.arrived), 0)
    brought = [piece for piece in slices(trace) if piece.brought]
    first = next((piece.at for piece in brought if piece.request == order[long]), None)
    if not gaps or first is None:
        raise TraceError(
            f"Request {long} got no token in this run, or none of {list(watched)} got two: run it to its end first."
        )
    return SweepPoint(
        float(np.percentile(gaps, 99)) * 1e3, sum(times[came : first + 1]) * 1e3, len(brought) / sum(times)
    )


def knee(points: Mapping[int, SweepPoint]) -> int:
    """The smallest budget with `KNEE` of the best throughput."""
    if not points:
        raise TraceError("The sweep has no points; give it at least one budget.")
    best = max(point.tokens_per_s for point in points.values())
    return min(budget for budget, point in points.items() if point.tokens_per_s >= KNEE * best)


def budget_sweep(points: Mapping[int, SweepPoint], whole: SweepPoint | None = None) -> "go.Figure":
    """Against the budget: gaps of those that decode, throughput, and the long request's first token, with the knee.

    whole: the same work with the prompt in one piece before the decodes, as dotted lines.
    """
    from plotly.subplots import make_subplots

    at = knee(points)
    budgets = sorted(points)
    panels = (
        ("gaps of the others,<br>P99 (ms)", [points[b].gap_ms for b in budgets], "gap_ms", HUES[0], "{:,.0f} ms"),
        ("throughput<br>(tokens/s)", [points[b].tokens_per_s for b in budgets], "tokens_per_s", HUES[2], "{:.3g}"),
        ("its own first<br>token (s)", [points[b].first_ms / 1e3 for b in budgets], "first_ms", HUES[5], "{:.2f} s"),
    )
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    places = list(range(len(budgets)))
    for row, (axis, values, field, hue, form) in enumerate(panels, 1):
        base = None if whole is None else getattr(whole, field) / (1e3 if field == "first_ms" else 1)
        high = max([*values, base or 0])
        figure.add_scatter(
            name=field, x=places, y=values, mode="lines+markers", row=row, col=1,
            line={"color": readable(hue, 3), "width": 2},
            marker={
                "size": 9, "line": {"color": readable(hue), "width": 2},
                "color": [hue if b == at else PAPER for b in budgets],
            },
            customdata=budgets, hovertemplate=f"budget %{{customdata}}: %{{y:.3g}}<extra>{axis}</extra>",
        )  # fmt: skip
        for place, value in zip(places, values, strict=True):
            figure.add_annotation(
                x=place, y=value, text=form.format(value), showarrow=False, yanchor="bottom", yshift=7, row=row, col=1,
                bgcolor=PAPER, borderpad=0, font={"size": 12, "color": INK if budgets[place] == at else QUIET},
            )  # fmt: skip
        if base is not None:
            figure.add_scatter(
                name=f"{field} in one piece", x=[-0.4, places[-1] + 0.4], y=[base, base], mode="lines", row=row, col=1,
                line={"color": GREY, "width": 1.5, "dash": "dot"},
                hovertemplate="prefill first: %{y:.3g}<extra></extra>",
            )  # fmt: skip
            figure.add_annotation(
                x=places[-1] + 0.45, y=base, text=f"prefill first<br>{form.format(base)}", showarrow=False,
                xanchor="left", align="left", font={"size": 12, "color": QUIET}, row=row, col=1,
            )  # fmt: skip
        figure.update_yaxes(title_text=axis, range=[0, 1.38 * high], nticks=4, row=row, col=1)
    figure.update_xaxes(
        tickvals=places, ticktext=[f"<b>{b:,}</b>" if b == at else f"{b:,}" for b in budgets],
        range=[-0.45, places[-1] + 0.45],
    )  # fmt: skip
    figure.update_xaxes(title_text="token budget of a step", row=3)
    best = max(point.tokens_per_s for point in points.values())
    largest = points[budgets[-1]]
    title = f"From a budget of {at:,} on, more of it buys longer gaps and hardly any throughput"
    if at == budgets[-1]:
        title = f"Throughput still grows at a budget of {at:,}: no knee in this sweep"
    reach = 100 * points[at].tokens_per_s / best
    subtitle = (
        f"knee, the filled dot: the smallest budget with {100 * KNEE:.0f} % of the best throughput (here {reach:.0f} %)"
    )
    alt = f"{title}. " + "; ".join(
        f"budget {b}: gap P99 {p.gap_ms:.0f} ms, {p.tokens_per_s:.3g} tokens/s, first token {p.first_ms:.0f} ms"
        for b, p in sorted(points.items())
    )
    dressed(figure, title, subtitle, f"{alt}. At {budgets[-1]}: gap P99 {largest.gap_ms:.0f} ms.", 520, WIDTH)
    return figure.update_layout(margin={"r": 110 if whole is not None else 24, "l": 84})


# --- one run ---------------------------------------------------------------------------------------------------------


class _Run:
    """What is drawn of a run: its slices and gaps in a window of steps."""

    def __init__(
        self,
        trace: Trace,
        window: range,
        budget: int | None,
        selected: Sequence[int] = (),
        watched: Sequence[int] | None = None,
    ) -> None:
        self.trace, self.window, self.budget = trace, window, budget
        self.slices = [piece for piece in slices(trace) if piece.at in window]
        self.gaps = [
            gap for gap in token_gaps(trace) if gap.step in window and (watched is None or gap.request in watched)
        ]
        there = {piece.request for piece in self.slices}
        self.requests = [request for request in trace.requests if request in there]
        self.styles = {request: request_style(trace, request, selected) for request in self.requests}
        self.totals = {index: trace.steps[index].plan.num_tokens for index in window}
        self.most = max(self.totals.values())

    def begin(self, index: int) -> float:
        """Seconds from the window's first step to this one's beginning."""
        return self.trace.steps[index].t_plan - self.trace.steps[self.window[0]].t_plan

    def end(self, index: int) -> float:
        return self.trace.steps[index].t_done - self.trace.steps[self.window[0]].t_plan


def _window(trace: Trace, first: int, steps: int | None) -> range:
    window = range(first, len(trace.steps) if steps is None else min(len(trace.steps), first + steps))
    if not window or first < 0:
        raise TraceError(
            f"The trace has {len(trace.steps)} steps and none from number {first} on; generate something first, or "
            f"begin earlier."
        )
    return window


def _budget(trace: Trace, asked: int | None = None) -> int | None:
    """The line to draw: a run whose prompts are not chunked has a limit that bounds no step."""
    if asked is not None:
        return asked
    return int(trace.meta["max_num_batched_tokens"]) if trace.meta.get("chunked") else None


def _span(run: _Run, unit: str) -> tuple[float, float]:
    first, last = run.window[0], run.window[-1]
    return (first, last) if unit == "tokens" else (0.0, run.end(last))


def _size(gap: Gap, unit: str) -> float:
    return gap.tokens if unit == "tokens" else gap.ms


def _amount(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}"


# --- drawing ---------------------------------------------------------------------------------------------------------


def _draw_stack(
    figure: "go.Figure", row: int, column: int, run: _Run, pixels: float, top: float, unit: str = "tokens"
) -> None:
    """The steps' tokens as bars, one on another, with the prompts' counts and the budget as a line."""
    where: dict[str, Any] = {"row": row, "col": column}
    begin, end = _span(run, unit)
    span = (end - begin + 1) if unit == "tokens" else (end - begin)

    def middle(index: int) -> float:
        return index if unit == "tokens" else (run.begin(index) + run.end(index)) / 2

    def wide(index: int) -> float:
        return 0.84 if unit == "tokens" else max(run.end(index) - run.begin(index) - 0.004 * span, 0.004 * span)

    for request in run.requests:
        style = run.styles[request]
        for prompt in (True, False):
            mine = [piece for piece in run.slices if piece.request == request and piece.prompt == prompt]
            if not mine:
                continue
            figure.add_bar(
                name=f"{style.label} {'prompt' if prompt else 'decode'}", x=[middle(piece.at) for piece in mine],
                y=[piece.tokens for piece in mine], base=[piece.below for piece in mine],
                width=[wide(piece.at) for piece in mine], customdata=[piece.at for piece in mine],
                marker={
                    "color": style.color if prompt else readable(style.color, DARK),
                    "line": {"color": style.edge if prompt else readable(style.color, DARK), "width": 1},
                },
                hovertemplate=f"step %{{customdata}}: %{{y}} {'prompt tokens' if prompt else 'new'} of {style.label}"
                "<extra></extra>", **where,
            )  # fmt: skip
    for piece in run.slices:
        if not piece.prompt or piece.tokens <= 0.05 * top:
            continue
        style, index = run.styles[piece.request], piece.at
        fits = pixels * wide(index) / span > 7 * len(f"{piece.tokens:,}") + (0 if piece.tokens > 0.12 * top else 16)
        roomy = piece.tokens > 0.12 * top
        over = piece.below + piece.tokens == run.totals[index]
        if not fits and not over:
            continue
        text = f"<b>{style.label}</b>{'<br>' if fits and roomy else ' '}{piece.tokens:,}"
        figure.add_annotation(
            x=middle(index), y=piece.below + piece.tokens / 2 if fits else piece.below + piece.tokens, text=text,
            showarrow=False, yanchor="middle" if fits else "bottom",
            font={"size": 11, "color": style.ink if fits else style.edge}, **where,
        )  # fmt: skip
    if run.budget is not None and run.budget <= top:
        figure.add_scatter(
            name="budget", x=[begin - 0.7, end + 0.7] if unit == "tokens" else [begin, end], y=[run.budget] * 2,
            mode="lines", line={"color": INK, "width": 1.5, "dash": "dash"},
            hovertemplate="the budget: %{y} tokens a step<extra></extra>", **where,
        )  # fmt: skip
        figure.add_annotation(
            x=end + (0.7 if unit == "tokens" else 0), y=run.budget, text=f"budget {run.budget:,}", showarrow=False,
            xanchor="right", yanchor="bottom", font={"size": 12, "color": INK}, **where,
        )  # fmt: skip


def _draw_tokens_out(figure: "go.Figure", row: int, column: int, run: _Run, pixels: float) -> None:
    """One row per request, a mark where a step brought a token for it; crosses where it waited for its next one."""
    where: dict[str, Any] = {"row": row, "col": column}
    side = min(13.0, 0.7 * pixels / len(run.window))
    for place, request in enumerate(run.requests):
        style = run.styles[request]
        out = [piece.at for piece in run.slices if piece.request == request and piece.brought]
        missed = [
            index
            for gap in run.gaps
            if gap.request == request
            for index in range(gap.step - gap.steps + 1, gap.step)
            if index in run.window
        ]
        figure.add_scatter(
            name=f"{style.label} gets a token", x=out, y=[place] * len(out), mode="markers",
            marker={"symbol": "square", "size": side, "color": style.color, "line": {"color": style.edge, "width": 1}},
            hovertemplate=f"step %{{x}} brings {style.label} a token<extra></extra>", **where,
        )  # fmt: skip
        if missed:
            figure.add_scatter(
                name=f"{style.label} waits", x=missed, y=[place] * len(missed), mode="markers",
                marker={"symbol": "x-thin", "size": 9, "line": {"color": style.edge, "width": 2}},
                hovertemplate=f"step %{{x}} brings {style.label} nothing<extra></extra>", **where,
            )  # fmt: skip
    figure.update_yaxes(
        range=[len(run.requests) - 0.4, -0.6], tickvals=list(range(len(run.requests))), showgrid=False,
        ticktext=[f"<b>{run.styles[r].label}</b> gets" for r in run.requests], **where,
    )  # fmt: skip


def _draw_gaps(figure: "go.Figure", row: int, column: int, run: _Run, unit: str) -> None:
    """A stem for each gap, where its second token arrives; the longest one with its size."""
    where: dict[str, Any] = {"row": row, "col": column}
    asked = [request for request in run.requests if any(gap.request == request for gap in run.gaps)]
    begin, end = _span(run, unit)
    step = 0.22 if unit == "tokens" else 0.009 * (end - begin)
    for place, request in enumerate(asked):
        style = run.styles[request]
        gaps = [gap for gap in run.gaps if gap.request == request]
        shift = step * (place - (len(asked) - 1) / 2)
        figure.add_bar(
            name=f"gaps of {style.label}", width=0.8 * step,
            x=[shift + (gap.step if unit == "tokens" else run.end(gap.step)) for gap in gaps],
            y=[_size(gap, unit) for gap in gaps],
            marker={"color": style.color, "line": {"color": style.edge, "width": 1}},
            hovertemplate=f"{style.label}: %{{y:,.0f}} {unit} since its last token<extra></extra>",
            **where,
        )  # fmt: skip
    if run.gaps:
        worst = max(run.gaps, key=lambda gap: _size(gap, unit))
        figure.add_annotation(
            x=worst.step if unit == "tokens" else run.end(worst.step), y=_size(worst, unit), showarrow=False,
            text=f"<b>{_amount(_size(worst, unit), unit)}</b>", yanchor="bottom", font={"size": 12, "color": INK},
            **where,
        )  # fmt: skip


# --- words -----------------------------------------------------------------------------------------------------------


def _finding(run: _Run) -> str:
    largest = max(run.totals, key=lambda index: run.totals[index])
    waiting = [
        run.styles[gap.request].label
        for gap in run.gaps
        if gap.step - gap.steps < largest < gap.step and gap.request in run.styles
    ]
    if waiting:
        return f"step {largest} runs {run.most:,} tokens, and {listed(waiting)} get{'s' * (len(waiting) == 1)} nothing"
    late = sorted({run.styles[gap.request].label for gap in run.gaps if gap.steps > 1})
    if late:
        return f"at most {run.most:,} tokens a step; {listed(late)} sometimes get nothing"
    return f"at most {run.most:,} tokens a step, and nobody who decodes waits"


def _key(run: _Run) -> str:
    parts = ["full colour: prompt", "darker: one new token", "squares: who gets a token"]
    return " · ".join(parts + ["cross: nothing"] * any(gap.steps > 1 for gap in run.gaps))


def _counts(run: _Run) -> str:
    return ", ".join(f"{run.totals[index]:,}" for index in run.window)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
