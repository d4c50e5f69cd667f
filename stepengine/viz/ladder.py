"""The ladder's result as bars: for each stage the metric it exists for, then tokens/s of all."""

from collections.abc import Mapping
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from stepengine.errors import TraceError
from stepengine.viz.template import HUES, INK, PAPER, QUIET, RULE, dressed, readable

if TYPE_CHECKING:
    import plotly.graph_objects as go

BEFORE, AFTER = "#C9CFD5", HUES[0]
COLUMNS = 4


def ladder_bars(result: Mapping[str, Any]) -> "go.Figure":
    """Small multiples, one per stage that has a metric: before and after; then tokens/s of every stage.

    `result["stages"]` is a list of {"stage", "metric": {"name", "unit", "before", "after", "better", "note",
    "against"} or None, "tokens_per_s", "same_tokens", "agreement"}; `better` is "lower" or "higher", `against` the
    stage before. A stage with weights of its own has None for `same_tokens`, and in `agreement` the share of its
    tokens that the first stage would have chosen.
    """
    from plotly.subplots import make_subplots

    stages = list(result.get("stages") or ())
    if not stages:
        raise TraceError("The ladder's result holds no stages: run `make ladder` first.")
    climbing = [stage for stage in stages if stage.get("metric")]
    panels = len(climbing) + 1
    columns, rows = min(panels, COLUMNS), -(-panels // COLUMNS)
    titles = [f"<b>{s['stage']}</b>  " + "<br>".join(wrap(s["metric"]["name"], 24)) for s in climbing]
    titles.append("<b>all</b>  speed")
    free = rows * columns - panels  # cells behind the last panel, which it takes as well
    cells: list[dict[str, int] | None] = [{}] * (panels - 1) + [{"colspan": 1 + free}] + [None] * free
    figure = make_subplots(
        rows=rows,
        cols=columns,
        specs=[cells[row * columns : (row + 1) * columns] for row in range(rows)],
        subplot_titles=titles,
        horizontal_spacing=0.3 / columns,
        vertical_spacing=0.32 / rows if rows > 1 else 0,
    )
    for number, stage in enumerate(climbing):
        metric, at = stage["metric"], {"row": number // COLUMNS + 1, "col": number % COLUMNS + 1}
        values = [metric["before"], metric["after"]]
        figure.add_bar(
            name=f"stage {stage['stage']}", x=_arms(stage), y=values, width=0.62,
            marker={"color": [BEFORE, AFTER], "line": {"color": [QUIET, readable(AFTER)], "width": 1}},
            text=[_number(v) for v in values], textposition="outside", textfont={"color": INK, "size": 12},
            cliponaxis=False,
            hovertemplate="%{x}: %{y:,.4g} " + str(metric["unit"]) + f", {metric['better']} is better<extra></extra>",
            **at,
        )  # fmt: skip
        _axis(figure, at, values, str(metric["unit"]))
    at = {"row": rows, "col": (panels - 1) % COLUMNS + 1}
    speeds = [stage["tokens_per_s"] for stage in stages]
    figure.add_bar(
        name="tokens/s", x=[f"{s['stage']}" for s in stages], y=speeds, width=0.62,
        marker={
            "color": [PAPER if s.get("same_tokens") is False else AFTER for s in stages],
            "line": {"color": readable(AFTER), "width": 1},
            "pattern": {"shape": ["/" if _own(s) else "" for s in stages], "fgcolor": PAPER, "size": 5},
        },
        text=[(f"{v:.0f}" if v >= 10 else _number(v)) + _aside(s) for v, s in zip(speeds, stages, strict=True)],
        textposition="outside", textfont={"color": INK, "size": 12}, constraintext="none", cliponaxis=False,
        hovertemplate="stage %{x}: %{y:,.4g} tokens/s<extra></extra>", **at,
    )  # fmt: skip
    _axis(figure, at, speeds, "tokens/s")
    figure.update_xaxes(type="category")
    figure.update_xaxes(title_text="stage", **at)
    figure.update_annotations(font={"size": 13, "color": INK})
    gains = [f"{s['stage']} {_gain(s['metric'])}" for s in climbing]
    alt = "; ".join(
        f"stage {s['stage']}, {s['metric']['name']}: {_number(s['metric']['before'])} before, "
        f"{_number(s['metric']['after'])} after ({s['metric']['unit']})" for s in climbing
    )  # fmt: skip
    dressed(
        figure,
        _title(gains, stages),
        "each stage against an earlier one, on the metric it exists for; " + _tokens(stages),
        f"{alt}. Tokens/s by stage: " + ", ".join(f"{s['stage']} {_number(s['tokens_per_s'])}" for s in stages) + ".",
        height=100 + 240 * rows,
        width=max(480, 230 * columns),
    )
    return figure.update_layout(margin={"t": 108})


def _own(stage: Mapping[str, Any]) -> bool:
    """Whether it has weights, hence tokens, of its own."""
    return stage.get("same_tokens", True) is None


def _aside(stage: Mapping[str, Any]) -> str:
    if _own(stage):
        return f"<br>{stage['agreement']:.0%} same tokens"
    return "<br>other tokens" if stage.get("same_tokens") is False else ""


def _tokens(stages: list[Mapping[str, Any]]) -> str:
    """Whose tokens are whose."""
    own = ", ".join(str(stage["stage"]) for stage in stages if _own(stage))
    aside = f"{own} (hatched), whose weights are its own" if own else ""
    if any(stage.get("same_tokens") is False for stage in stages):
        return "white bars: not the same tokens as stage 0" + (f"; nor {aside}" if own else "")
    return "all give the same tokens" + (f", but for {aside}" if own else "")


def _arms(stage: Mapping[str, Any]) -> list[str]:
    against = stage["metric"].get("against")
    return [f"stage {against}", f"stage {stage['stage']}"] if against else ["before", "after"]


def _axis(figure: "go.Figure", at: Mapping[str, int], values: list[float], unit: str) -> None:
    figure.update_yaxes(title_text=unit, range=[0, (max(values) or 1) * 1.22], nticks=5, gridcolor=RULE, **at)


def _title(gains: list[str], stages: list[Mapping[str, Any]]) -> str:
    """The gains by name while they fit on a line, else the speed of the last stage against the first."""
    line = "; ".join(gains)
    if gains and len(line) <= 27 * (1 + len(gains)):
        return line
    first, last = stages[0], stages[-1]
    ratio = last["tokens_per_s"] / first["tokens_per_s"] if first["tokens_per_s"] else 0.0
    speed = f"{_number(last['tokens_per_s'])} tokens/s"
    return f"Stage {last['stage']}: {speed}, {ratio:.1f}× stage {first['stage']}" if ratio else speed


def _gain(metric: Mapping[str, Any]) -> str:
    before, after, name = metric["before"], metric["after"], metric["name"]
    if before == after:
        return f"leaves {name} at {_number(after)}"
    if not before or not after:
        return f"{name} {_number(before)} → {_number(after)}"
    ratio = max(before, after) / min(before, after)
    return f"{ratio:.1f}× {'fewer' if after < before else 'more'} {name}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
