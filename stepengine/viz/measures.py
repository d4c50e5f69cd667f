"""Memory, step times and latencies of recorded runs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stepengine.errors import TraceError
from stepengine.trace import Trace, kv_use, request_metrics
from stepengine.viz.template import GREY, HUES, INK, PAPER, QUIET, dressed, new_figure, readable

if TYPE_CHECKING:
    import plotly.graph_objects as go

MIB = 2**20
NEARLY_FREE = 1.25  # a step of many rows at most this many times as long as one of the fewest


def kv_memory(trace: Trace) -> "go.Figure":
    """K/V storage over steps in MiB: reserved, used (tokens stored), and what lies between: wasted."""
    use, per_token = kv_use(trace), trace.meta.get("kv_bytes_per_token")
    if not per_token or not any(u.reserved for u in use):
        raise TraceError(
            f"Stage {trace.meta.get('stage', '?')} kept no K/V in this trace: there is no memory to draw; "
            "record the run at stage '1a' or later."
        )
    steps = list(range(len(use)))
    held, reserved = [u.held for u in use], [u.reserved for u in use]
    share = 100 * float(np.mean([u.held / u.reserved for u in use if u.reserved]))

    def mib(tokens: float) -> float:
        return tokens * per_token / MIB

    figure = new_figure(
        f"{share:.0f} % of the reserved K/V memory holds tokens",
        f"at most {mib(max(reserved)):.3g} MiB reserved, {mib(max(held)):.3g} MiB used; hatched: reserved, but empty",
        f"K/V memory over {len(use)} steps: on average {share:.1f} % of what is reserved holds tokens; at most "
        f"{mib(max(reserved)):.3g} MiB of {mib(use[0].capacity):.3g} MiB are reserved.",
        height=320,
    )
    # a bar per step: its height is read at the step itself, whatever the neighbours do
    waste = [r - h for h, r in zip(held, reserved, strict=True)]
    blue = HUES[0]
    figure.add_bar(
        name="used", x=steps, y=[mib(h) for h in held], width=1, customdata=held,
        marker={"color": blue, "line": {"width": 0}},
        hovertemplate="step %{x}: %{customdata:,} tokens stored, %{y:.3g} MiB<extra></extra>",
    )  # fmt: skip
    figure.add_bar(
        name="wasted", x=steps, base=[mib(h) for h in held], y=[mib(w) for w in waste], width=1, customdata=waste,
        marker={
            "color": PAPER, "line": {"width": 0},
            "pattern": {"shape": "/", "fgcolor": QUIET, "bgcolor": PAPER, "size": 6, "solidity": 0.2},
        },
        hovertemplate="step %{x}: room for %{customdata:,} more tokens reserved, %{y:.3g} MiB<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        name="reserved", x=[-0.5, *(t + 0.5 for t in steps)], y=[mib(r) for r in (reserved[0], *reserved)],
        mode="lines", line={"color": INK, "width": 1.5, "shape": "vh"}, customdata=[reserved[0], *reserved],
        hovertemplate="%{customdata:,} tokens reserved, %{y:.3g} MiB<extra></extra>",
    )  # fmt: skip
    top = mib(max(reserved))
    if use[0].capacity <= 2 * max(reserved):
        top = mib(use[0].capacity)
        figure.add_hline(y=top, line={"color": GREY, "width": 1, "dash": "dash"})
    emptiest, fullest = int(np.argmax(waste)), int(np.argmax(held))
    if mib(waste[emptiest]) > 0.15 * top:  # else the word would hide what it names
        figure.add_annotation(
            x=emptiest, y=mib(held[emptiest] + waste[emptiest] / 2), text="<b>wasted</b>", showarrow=False,
            bgcolor=PAPER, font={"color": INK}, xanchor="left" if emptiest < len(use) / 2 else "right",
        )  # fmt: skip
    inside = mib(held[fullest]) > 0.25 * top
    figure.add_annotation(
        x=fullest, y=mib(held[fullest]), text="<b>used</b>", showarrow=False, yanchor="top" if inside else "bottom",
        font={"color": PAPER if inside else readable(blue)}, **({} if inside else {"bgcolor": PAPER}),
        xanchor="left" if fullest < len(use) / 3 else "right",
    )  # fmt: skip
    figure.add_annotation(
        x=1, xref="paper", y=top, text=f"the pool: {mib(use[0].capacity):.3g} MiB" if top >= mib(use[0].capacity) else
        f"reserved (the pool has {mib(use[0].capacity):.3g} MiB)", showarrow=False, xanchor="right", yanchor="bottom",
        font={"color": QUIET, "size": 12},
    )  # fmt: skip
    figure.update_xaxes(title_text="engine step", range=[-0.6, len(use) - 0.4], tickformat="d")
    return figure.update_yaxes(title_text="K/V memory (MiB)", rangemode="tozero", range=[0, top * 1.12])


def decode_step_times(trace: Trace) -> dict[int, list[float]]:
    """Durations in ms (plan to done) of pure decode steps, by number of rows: every chunk one token, no newcomer."""
    seen: set[int] = set()
    times: dict[int, list[float]] = {}
    for record in trace.steps:
        chunks = record.plan.chunks
        if chunks and all(chunk.length == 1 and chunk.request in seen for chunk in chunks):
            times.setdefault(len(chunks), []).append((record.t_done - record.t_plan) * 1e3)
        seen |= {chunk.request for chunk in chunks}
    return dict(sorted(times.items()))


def step_time(traces: Trace | Mapping[str, Trace]) -> "go.Figure":
    """Time of a decode step against its rows: the median per row count, bars from the 10th to the 90th percentile.

    The knee is the largest row count up to which every median is at most `NEARLY_FREE` times the first.
    """
    named = {"": traces} if isinstance(traces, Trace) else dict(traces)
    times = {name: decode_step_times(trace) for name, trace in named.items()}
    if not any(times.values()):
        raise TraceError(
            "No trace here has a pure decode step (one token per row): stage 0 has none, it recomputes every token; "
            "record the run at stage '1a' or later with max_tokens of at least 2."
        )
    times = {name: by_rows for name, by_rows in times.items() if by_rows}
    medians = {name: {n: float(np.median(v)) for n, v in by_rows.items()} for name, by_rows in times.items()}
    name, median = next(iter(medians.items()))
    rows = list(median)
    knee = rows[0]
    for n in rows:
        if median[n] > NEARLY_FREE * median[rows[0]]:
            break
        knee = n
    ratio = median[rows[-1]] / median[rows[0]]
    few = f"{rows[0]} row" + "s" * (rows[0] > 1)
    title = (
        f"A step of {rows[-1]} rows takes {ratio:.1f} times as long as one of {few}"
        if len(rows) > 1
        else f"A decode step of {few} takes {median[rows[0]]:.3g} ms"
    )
    figure = new_figure(
        title,
        (f"{name}: " if name else "") + (f"up to {knee} rows at most {NEARLY_FREE} times" if knee > rows[0] else
        f"already the next row count costs more than {NEARLY_FREE} times") + "; every step reads all weights once",
        f"{title}. Medians in ms by rows: " + ", ".join(f"{n}: {m:.3g}" for n, m in median.items()) + ".",
        height=340,
    )  # fmt: skip
    for hue, (label, by_rows) in zip(HUES * len(times), times.items(), strict=False):
        n = list(by_rows)
        mid = [medians[label][k] for k in n]
        low, high = (np.array([np.percentile(by_rows[k], q) for k in n]) for q in (10, 90))
        figure.add_scatter(
            name=label or "steps", x=n, y=mid, mode="lines+markers", line={"color": readable(hue, 3), "width": 2},
            marker={"size": 7, "color": hue, "line": {"color": readable(hue), "width": 1}},
            error_y={
                "type": "data", "symmetric": False, "array": high - mid, "arrayminus": mid - low,
                "color": readable(hue, 3), "thickness": 1, "width": 3,
            },
            customdata=[len(by_rows[k]) for k in n],
            hovertemplate="%{x} rows: %{y:.3g} ms, the median of %{customdata} steps<extra>" + label + "</extra>",
        )  # fmt: skip
        if label:
            figure.add_annotation(
                x=n[-1],
                y=mid[-1],
                text=label,
                showarrow=False,
                xanchor="left",
                xshift=10,
                font={"color": readable(hue)},
            )
    if len(rows) > 1:
        figure.add_scatter(
            name="proportional", x=[rows[0], rows[-1]], y=[median[rows[0]], median[rows[0]] * rows[-1] / rows[0]],
            mode="lines", line={"color": GREY, "width": 1.5, "dash": "dot"},
            hovertemplate="if every row cost as much as the first<extra></extra>",
        )  # fmt: skip
    ceiling = max(float(np.percentile(v, 90)) for by_rows in times.values() for v in by_rows.values()) * 1.15
    if len(rows) > 1:
        slope = median[rows[0]] / rows[0]
        steep = rows[-1] * slope > ceiling
        at = ceiling / slope if steep else rows[-1] * 0.75
        figure.add_annotation(
            x=at, y=at * slope, text="if every row cost<br>as much as the first", align="left" if steep else "right",
            showarrow=False, xanchor="left" if steep else "right", yanchor="top" if steep else "bottom",
            xshift=6 if steep else -6, font={"color": QUIET, "size": 12},
        )  # fmt: skip
    figure.update_layout(margin={"r": 90 if any(times) else 24})
    figure.update_xaxes(title_text="decoding rows in the step", rangemode="tozero", tickformat="d", **_whole(rows))
    return figure.update_yaxes(title_text="time of a step (ms)", range=[0, ceiling])


def _whole(rows: list[int]) -> dict[str, Any]:
    return {"dtick": 1} if rows[-1] <= 12 else {"nticks": 8}


def latency_percentiles(traces: Trace | Mapping[str, Trace]) -> "go.Figure":
    """Time to first token and inter-token latency of each run: median (dot) to 99th percentile (ring), in ms."""
    from plotly.subplots import make_subplots

    named = {"this run": traces} if isinstance(traces, Trace) else dict(traces)
    spans: dict[str, dict[str, tuple[float, float, int]]] = {"ttft": {}, "itl": {}}
    for name, trace in named.items():
        metrics = request_metrics(trace)
        values = {
            "ttft": [m.ttft_ms for m in metrics if m.ttft_ms is not None],
            "itl": [gap for m in metrics for gap in m.itl_ms],
        }
        for kind, data in values.items():
            if data:
                p50, p99 = np.percentile(data, (50, 99))
                spans[kind][name] = (float(p50), float(p99), len(data))
    if not spans["ttft"]:
        raise TraceError("No request in these traces got a token: there are no latencies to draw.")
    names, ttft = list(named), spans["ttft"]
    best, worst = (pick(ttft, key=lambda n: ttft[n][1]) for pick in (min, max))
    title = f"Slowest first tokens (P99): {_ms(ttft[best][1])} ms with {best}"
    title += f", {_ms(ttft[worst][1])} ms with {worst}" if worst != best else ""
    headings = ("<b>Time to first token</b> (TTFT)", "<b>Between two tokens</b> (ITL)")
    figure = make_subplots(rows=1, cols=2, subplot_titles=headings, shared_yaxes=True, horizontal_spacing=0.1)
    for column, kind in enumerate(("ttft", "itl"), 1):
        high = max((p99 for _, p99, _ in spans[kind].values()), default=1.0)
        for place, name in enumerate(names):
            if name not in spans[kind]:
                continue
            p50, p99, count = spans[kind][name]
            hue = HUES[place % len(HUES)]
            figure.add_scatter(
                name=name, x=[p50, p99], y=[place, place], mode="lines+markers+text", row=1, col=column,
                line={"color": readable(hue, 3), "width": 3},
                marker={"size": 11, "color": [hue, PAPER], "line": {"color": readable(hue), "width": 2}},
                text=[_ms(p50), _ms(p99)],
                textposition=["top left", "top right"] if p99 - p50 < 0.15 * high else ["top center"] * 2,
                textfont={"color": INK, "size": 12}, cliponaxis=False,
                hovertext=[f"{name}: half of {count} within {_ms(p50)} ms", f"{name}: 99 % within {_ms(p99)} ms"],
                hoverinfo="text",
            )  # fmt: skip
        figure.update_xaxes(title_text="ms", range=[-0.08 * high, 1.15 * high], nticks=5, row=1, col=column)
    figure.update_annotations(font={"size": 13, "color": INK})
    figure.update_yaxes(range=[len(names) - 0.5, -0.7], tickvals=list(range(len(names))), showgrid=False)
    figure.update_yaxes(ticktext=names, row=1, col=1)
    alt = "; ".join(
        f"{name}: {kind.upper()} median {_ms(v[0])} ms, P99 {_ms(v[1])} ms"
        for kind, s in spans.items()
        for name, v in s.items()
    )
    dressed(figure, title, "dot: median · ring: 99th percentile", alt + ".", height=190 + 48 * len(names))
    return figure.update_layout(margin={"t": 104})


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
