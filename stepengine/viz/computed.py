"""What a request's tokens cost: which positions were run through the model at each of its steps."""

from typing import TYPE_CHECKING

from stepengine.errors import TraceError
from stepengine.trace import Trace
from stepengine.viz.template import GREY, INK, KEPT, PAPER, QUIET, new_figure, request_style

if TYPE_CHECKING:
    import plotly.graph_objects as go

RULED = 64  # positions beyond which single cells are not told apart any more


def recomputation_triangle(trace: Trace, request: int | None = None) -> "go.Figure":
    """Step x position of one request (default: the first): computed first, computed again, or kept in the cache.

    Each bar is a range of positions at one step; its height is a number of tokens. Axes depend on the request's
    lengths only, so that the pictures of two stages can stand side by side.
    """
    request = next(iter(trace.requests), 0) if request is None else request
    if request not in trace.requests:
        raise TraceError(f"Request {request} is not in this trace, which holds requests {list(trace.requests)[:8]}.")
    steps = [(r, c, token) for r in trace.steps for c, token in zip(r.plan.chunks, r.token_ids, strict=True)
             if c.request == request]  # fmt: skip
    if not steps:
        raise TraceError(f"Request {request} never ran in this trace: there is nothing to draw.")
    style, prompt = request_style(trace, request, (request,)), len(trace.requests[request].prompt_ids)
    bars: dict[str, list[tuple[int, int, int, int]]] = {"kept": [], "again": [], "new": []}
    seen = 0
    for column, (record, chunk, _) in enumerate(steps, 1):
        spans = {
            "kept": (0, chunk.start),
            "again": (chunk.start, min(seen, chunk.end)),
            "new": (max(chunk.start, seen), chunk.end),
        }
        for kind, (start, end) in spans.items():
            if end > start:
                bars[kind].append((column, start, end, record.plan.step))
        seen = max(seen, chunk.end)
    total = sum(chunk.length for _, chunk, _ in steps)
    outputs = sum(token >= 0 for *_, token in steps)
    again = sum(end - start for _, start, end, _ in bars["again"])
    noun = "one" if outputs == 1 else "ones"
    figure = new_figure(
        f"Request {style.label}: {total:,} tokens computed for {outputs} new {noun}",
        f"{again:,} of them for a second time or more (hatched)"
        if again
        else "none of them twice: what is grey is kept in the cache",
        f"Request {style.label}, prompt {prompt} tokens, {len(steps)} steps: {total} tokens computed to generate "
        f"{outputs}; {again} of them had been computed before.",
        height=360,
        width=500,
    )
    words = {
        "kept": "kept in the cache, not computed",
        "again": "computed again",
        "new": "computed for the first time",
    }
    marks = {
        "kept": {"color": KEPT, "line": {"width": 0}},
        "again": {
            "color": PAPER,
            "line": {"width": 0},
            "pattern": {"shape": "/", "fgcolor": style.edge, "bgcolor": PAPER, "size": 5, "solidity": 0.35},
        },
        "new": {"color": style.color, "line": {"width": 0}},
    }
    for kind, spans_of in bars.items():
        if spans_of:
            figure.add_bar(
                name=words[kind],
                x=[column for column, *_ in spans_of],
                base=[start for _, start, *_ in spans_of],
                y=[end - start for _, start, end, _ in spans_of],
                width=0.94,
                customdata=[[start, end - 1, step] for _, start, end, step in spans_of],
                marker=marks[kind],
                hovertemplate="%{y} tokens " + words[kind] + "<br>positions %{customdata[0]} to %{customdata[1]}"
                "<br>step %{x} of this request, engine step %{customdata[2]}<extra></extra>",
            )
    top = prompt + max(outputs - 1, 0)
    if top <= RULED:
        figure.update_layout(
            shapes=[
                {
                    "type": "line",
                    "x0": 0.5,
                    "x1": len(steps) + 0.5,
                    "y0": y,
                    "y1": y,
                    "line": {"color": PAPER, "width": 1},
                }
                for y in range(1, top)
            ]
        )
    figure.update_xaxes(title_text="step of this request", range=[0.4, len(steps) + 0.6], **_ticks(len(steps)))
    figure.update_yaxes(title_text="token position", range=[0, top + max(1, top * 0.2)], showgrid=False)
    formula = prompt * outputs + outputs * (outputs - 1) // 2
    note = f"<b>{total:,} tokens computed</b>"
    if total == formula and outputs > 1:
        note += f"<br>= {outputs} × {prompt} + {outputs} × {outputs - 1} / 2"
    elif total == prompt + outputs - 1 and outputs > 1:
        note += f"<br>= {prompt} + {outputs - 1}"
    figure.add_annotation(
        text=note, xref="paper", yref="paper", x=0.02, y=1, xanchor="left", yanchor="top", align="left",
        showarrow=False, font={"color": INK, "size": 13}, bgcolor=PAPER,
    )  # fmt: skip
    figure.add_shape(
        type="line", x0=0.5, x1=len(steps) + 0.6, y0=prompt, y1=prompt, line={"color": GREY, "width": 1, "dash": "dot"}
    )
    figure.add_annotation(
        text="end of<br>prompt", x=1, xref="paper", y=prompt, xanchor="left", align="left", showarrow=False,
        font={"size": 11, "color": QUIET},
    )  # fmt: skip
    figure.update_layout(margin={"r": 56})
    return figure


def _ticks(steps: int) -> dict[str, object]:
    return {"dtick": 1} if steps <= 12 else {"nticks": 8}
