"""Two or more figures as one, side by side, each under its own title."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stepengine.errors import InvalidSetting
from stepengine.viz.template import INK, dressed

if TYPE_CHECKING:
    import plotly.graph_objects as go

GAP = 0.17  # of the width, between two figures: room for a label on the left one and the axis of the right one


def side_by_side(
    title: str, figures: "Sequence[go.Figure]", headings: Sequence[str], subtitle: str = "", width: int = 800
) -> "go.Figure":
    """One figure that holds `figures`, which must have one x and one y axis each, under one heading each.

    A heading takes the place of a figure's own title. Raises InvalidSetting for fewer than two figures, or for
    another number of headings.
    """
    import plotly.graph_objects as go

    if len(figures) < 2:
        raise InvalidSetting(f"side_by_side got {len(figures)} figures; give at least two, or show the one as it is.")
    if len(headings) != len(figures):
        raise InvalidSetting(
            f"side_by_side got {len(headings)} headings for {len(figures)} figures; give one for each."
        )
    whole = go.Figure()
    alts = [str((figure.layout.meta or {}).get("alt", "")) for figure in figures]
    top = 116 if subtitle else 96
    height = max(figure.layout.height or 360 for figure in figures) + top - 78
    dressed(whole, title, subtitle, " ".join(alts), height, width)
    share = (1 - GAP * (len(figures) - 1)) / len(figures)
    for place, (figure, heading) in enumerate(zip(figures, headings, strict=True)):
        left = place * (share + GAP)
        _add(whole, figure, heading, str(place + 1) if place else "", (left, left + share))
    return whole.update_layout(margin={"t": top, "r": max(figure.layout.margin.r or 0 for figure in figures) + 8})


def _add(whole: "go.Figure", figure: "go.Figure", heading: str, number: str, domain: tuple[float, float]) -> None:
    """Copy one figure into the columns `domain` of the whole; its references get the axes' `number`."""

    def moved(item: Any) -> dict[str, Any]:
        refs = {f"{axis}ref": f"{axis}{number}" + (" domain" if item[f"{axis}ref"] == "paper" else "") for axis in "xy"}
        return item.to_plotly_json() | refs

    for trace in figure.data:
        whole.add_trace(trace.__class__(trace.to_plotly_json() | {"xaxis": f"x{number}", "yaxis": f"y{number}"}))
    x_axis, y_axis = figure.layout.xaxis.to_plotly_json(), figure.layout.yaxis.to_plotly_json()
    whole.update_layout({
        f"xaxis{number}": x_axis | {"domain": domain, "anchor": f"y{number}"},
        f"yaxis{number}": y_axis | {"anchor": f"x{number}"},
    })  # fmt: skip
    for shape in figure.layout.shapes:
        whole.add_shape(moved(shape))
    for annotation in figure.layout.annotations:
        whole.add_annotation(moved(annotation))
    whole.add_annotation(
        text=f"<b>{heading}</b>", x=0, y=1, xref=f"x{number} domain", yref=f"y{number} domain",
        xanchor="left", yanchor="bottom", align="left", showarrow=False, yshift=8, font={"size": 13, "color": INK},
    )  # fmt: skip
