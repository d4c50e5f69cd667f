"""What a leak looks like: the blocks that are in somebody's table, and those that the pool could still give."""

from typing import TYPE_CHECKING

from stepengine.faults.workload import Visit
from stepengine.trace import Replay
from stepengine.viz.template import HUES, INK, new_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go


def lost_blocks(visit: Visit) -> list[int]:
    """After each step: blocks that are in no request's table and that the pool does not call free either."""
    replay, total = Replay(visit.trace), visit.llm.engine.limits.num_blocks
    return [total - free - len(replay.after(step).refs) for step, free in enumerate(visit.free)]


def where_blocks_are(visit: Visit) -> "go.Figure":
    """Blocks by step: in a table (from the trace), free (as the pool says), and neither."""
    import plotly.graph_objects as go

    lost, steps = lost_blocks(visit), list(range(len(visit.free)))
    held = [visit.llm.engine.limits.num_blocks - gone - free for gone, free in zip(lost, visit.free, strict=True)]
    figure = new_figure(
        f"After {len(steps)} steps {lost[-1]} of {visit.llm.engine.limits.num_blocks} blocks are neither held nor free",
        "In a table by the trace, free by the pool's own count",
        f"Three lines over {len(steps)} steps: blocks in tables, free blocks, and blocks that are neither.",
        height=320,
    )
    lines = (
        ("in a table", held, HUES[0], "solid"),
        ("free", visit.free, HUES[2], "dash"),
        ("neither", lost, INK, "dot"),
    )
    for name, values, colour, dash in lines:
        figure.add_trace(
            go.Scatter(x=steps, y=values, mode="lines", name=name, line={"color": colour, "dash": dash, "width": 2})
        )
        figure.add_annotation(
            x=steps[-1], y=values[-1], text=name, xanchor="left", xshift=6, showarrow=False, font={"color": INK}
        )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="blocks", rangemode="tozero")
    figure.update_layout(showlegend=False, margin={"r": 90})
    return figure
