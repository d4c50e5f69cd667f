"""What the host and the device did at the same time, step by step."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stepengine.errors import TraceError
from stepengine.trace import Span, Trace, device_spans, host_spans
from stepengine.trace.metrics import idle_share
from stepengine.viz.template import GREY, HUES, INK, PAPER, dressed, readable

if TYPE_CHECKING:
    import plotly.graph_objects as go

KINDS = {"plan": HUES[0], "launch": HUES[1], "update": HUES[2], "run": "#C9CFD5", "wait": PAPER}
BUSY = (HUES[4], "#A9D6F2")  # in turn, so that two steps without a gap between them can be told apart
PLOT_PX = 640  # width left for the lanes
HOST_KINDS = ("plan", "launch", "wait", "update", "run")
WORDS = {
    "plan": "plans",
    "launch": "launches",
    "wait": "waits for",
    "update": "books the ids of",
    "run": "runs",
}


class Lanes(NamedTuple):
    """A run as two lanes; times in seconds. `where`: the machine and the date, for runs of another machine."""

    host: Sequence[Span]
    device: Sequence[Span]
    where: str = ""


def lanes_of(trace: Trace) -> Lanes:
    """The lanes of a recorded run; labelled with its machine where the trace names one."""
    return Lanes(host_spans(trace), device_spans(trace), trace_label(trace))


def trace_label(trace: Trace) -> str:
    """Machine and date of a trace of the GPU suite, the toy run's warning, or "" where the trace names no machine."""
    machine: Mapping[str, Any] = trace.meta.get("machine") or {}
    if trace.meta.get("note"):
        return f"toy run, {trace.meta['note']}"
    name = machine.get("gpu") or machine.get("cpu")
    return f"{name}, {trace.meta.get('date', 'no date')}" if name else ""


def host_device_lanes(
    runs: Mapping[str, Trace | Lanes], first: int = 0, steps: int = 4, unit: str = "ms"
) -> "go.Figure":
    """Host above device for `steps` steps of each run, from its `first`-th on; all runs on one axis of time.

    The host's lane tells planning, launching, waiting and updating apart; the device's shows when it worked,
    with the step's number where it fits. `unit` "ms" or "us" is that of the axis. What is drawn begins when
    the first step is planned and ends when the step after the last one is; the idle shares are those of that time.
    """
    from plotly.subplots import make_subplots

    if unit not in ("ms", "us"):
        raise TraceError(f"unit={unit!r} is not one of the axis's units; use 'ms' or 'us'.")
    if not runs:
        raise TraceError("There is no run to draw: give at least one, such as {'eager': llm.trace}.")
    scale = {"ms": 1e3, "us": 1e6}[unit]
    drawn = {name: _window(name, run, first, steps) for name, run in runs.items()}
    width = max(window.end - window.begin for window in drawn.values()) * scale
    figure = make_subplots(rows=1, cols=1)
    shares: dict[str, float | None] = {}
    for place, (name, window) in enumerate(drawn.items()):
        _draw(figure, 3 * place, window, scale, width, unit)
        lanes, shares[name] = window.lanes, window.idle
        idle = "device times were not recorded" if shares[name] is None else f"device idle {_percent(shares[name])}"
        where = f", {lanes.where}" if lanes.where else ""
        figure.add_annotation(
            x=0, xref="paper", y=3 * place, yref="y", text=f"<b>{name}</b>  {idle}{where}", showarrow=False,
            xanchor="left", yanchor="middle", font={"size": 13, "color": INK},
        )  # fmt: skip
    rows = 3 * len(drawn)
    ticks = [(3 * place + 1, "host") for place in range(len(drawn))]
    ticks += [(3 * place + 2, "device") for place in range(len(drawn))]
    figure.update_yaxes(
        range=[rows - 0.35, -0.6], tickvals=[y for y, _ in ticks], ticktext=[text for _, text in ticks], showgrid=False
    )
    figure.update_xaxes(title_text=f"time ({'µs' if unit == 'us' else 'ms'})", range=[-0.01 * width, 1.02 * width])
    dressed(
        figure,
        _title(shares, steps),
        _key([window.lanes for window in drawn.values()]),
        _alt(shares, steps),
        height=150 + 26 * rows,
    )
    return figure.update_layout(margin={"t": 84})


class _Window(NamedTuple):
    """What is drawn of a run: from the planning of one step to that of another; spans are cut off at its edges."""

    lanes: Lanes
    begin: float
    end: float
    idle: float | None


def _window(name: str, run: Trace | Lanes, first: int, steps: int) -> _Window:
    lanes = lanes_of(run) if isinstance(run, Trace) else run
    numbers = sorted({span.step for span in lanes.host})
    wanted = numbers[first : first + steps] if first >= 0 and steps > 0 else []
    if len(wanted) < steps or not wanted:
        raise TraceError(
            f"The run {name!r} has {len(numbers)} steps and cannot show {steps} from number {first} on; ask for fewer, "
            f"or start earlier."
        )
    begins = {step: min(span.begin for span in lanes.host if span.step == step) for step in numbers}
    begin, after = begins[wanted[0]], numbers[first + steps : first + steps + 1]
    last = [span.end for span in (*lanes.host, *lanes.device) if span.step in wanted]
    end = begins[after[0]] if after else max(last)
    # Pipelined steps reach into their neighbours' time.
    near = {*wanted, *numbers[max(0, first - 1) : first], *after}
    host, device = (
        [
            span._replace(begin=min(max(span.begin, begin), end), end=min(max(span.end, begin), end))
            for span in spans
            if span.step in near
        ]
        for spans in (lanes.host, lanes.device)
    )
    edges = [Span("edge", -1, begin, begin), Span("edge", -1, end, end)]
    return _Window(Lanes(host, device, lanes.where), begin, end, idle_share([*device, *edges]) if device else None)


def _draw(figure: "go.Figure", top: int, window: _Window, scale: float, width: float, unit: str) -> None:
    lanes, zero = window.lanes, window.begin
    for kind in HOST_KINDS:
        spans = [span for span in lanes.host if span.kind == kind]
        if not spans:
            continue
        color = KINDS[kind]
        marker: dict[str, Any] = {
            "color": color,
            "line": _outline(spans, GREY if kind == "wait" else readable(color, 3)),
        }
        if kind == "wait":
            marker["pattern"] = {"shape": "/", "fgcolor": GREY, "bgcolor": PAPER, "size": 6, "solidity": 0.15}
        figure.add_bar(
            name=kind, orientation="h", y=[top + 1] * len(spans), width=0.72, marker=marker,
            base=[scale * (span.begin - zero) for span in spans],
            x=[scale * (span.end - span.begin) for span in spans],
            customdata=[span.step for span in spans],
            hovertemplate=f"the host {WORDS[kind]} step %{{customdata}}: %{{x:.3g}} {unit}<extra></extra>",
        )  # fmt: skip
    if lanes.device:
        _draw_device(figure, top + 2, window, scale, width, unit)


def _outline(spans: Sequence[Span], color: str) -> dict[str, Any]:
    """No line around nothing: spans cut off at the window's edges may have no length left."""
    return {"color": color, "width": [1 if span.end > span.begin else 0 for span in spans]}


def _draw_device(figure: "go.Figure", y: int, window: _Window, scale: float, width: float, unit: str) -> None:
    lanes, zero = window.lanes, window.begin
    order = {step: place for place, step in enumerate(sorted({span.step for span in lanes.device}))}
    figure.add_bar(
        name="busy", orientation="h", y=[y] * len(lanes.device), width=0.72,
        base=[scale * (span.begin - zero) for span in lanes.device],
        x=[scale * (span.end - span.begin) for span in lanes.device],
        marker={
            "color": [BUSY[order[span.step] % 2] for span in lanes.device],
            "line": _outline(lanes.device, readable(BUSY[0], 3)),
        },
        customdata=[span.step for span in lanes.device],
        hovertemplate=f"the device works on step %{{customdata}}: %{{x:.3g}} {unit}<extra></extra>",
    )  # fmt: skip
    alone = len(lanes.device) == len(order)  # else gaps would cross the words
    texts, middles = [], []
    for step in order:
        mine = [span for span in lanes.device if span.step == step]
        begin, end = min(span.begin for span in mine), max(span.end for span in mine)
        text = f"step {step}"
        fits = 8 * len(text) * width / PLOT_PX < scale * (end - begin)
        texts.append(text if alone and fits else "")
        middles.append(scale * ((begin + end) / 2 - zero))
    figure.add_scatter(
        name="labels", mode="text", x=middles, y=[y] * len(middles), text=texts, textfont={"size": 11, "color": INK},
        hoverinfo="skip",
    )  # fmt: skip


def _percent(share: float | None) -> str:
    percent = 100 * (share or 0.0)
    return f"{percent:.1f} %" if 0.05 <= percent < 9.95 else f"{percent:.0f} %"


def _title(shares: Mapping[str, float | None], steps: int) -> str:
    known = [(name, _percent(share)) for name, share in shares.items() if share is not None]
    if not known:
        return f"What the host did in {steps} steps; the device's times were not recorded"
    drawn = "this step" if steps == 1 else f"these {steps} steps"
    if len(known) == 1:
        return f"{known[0][0]}: the device idles {known[0][1]} of {drawn}"
    return f"Device idle in {drawn}: " + ", ".join(f"{share} {name}" for name, share in known)


def _key(drawn: Sequence[Lanes]) -> str:
    there = {span.kind for lanes in drawn for span in lanes.host}
    words = {"run": "launch, wait and update in one", "wait": "hatched: wait"}
    parts = [
        words["wait"]
        if kind == "wait"
        else f"<span style='color:{readable(KINDS[kind])}'>■ {words.get(kind, kind)}</span>"
        for kind in HOST_KINDS
        if kind in there
    ]
    device = any(lanes.device for lanes in drawn)
    return (
        "host: "
        + " · ".join(parts)
        + (f"    device: <span style='color:{readable(BUSY[0])}'>■ busy</span>" if device else "")
    )


def _alt(shares: Mapping[str, float | None], steps: int) -> str:
    each = [
        f"{name}: " + ("device times were not recorded" if share is None else f"the device idles {_percent(share)}")
        for name, share in shares.items()
    ]
    return f"Host and device lanes of {steps} steps. " + "; ".join(each) + "."
