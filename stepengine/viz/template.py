"""One palette, one typeface, one template for everything drawn. Needs Plotly only inside `template()`.

Figures stand on white paper in light and dark surroundings alike: no ink reads at 4.5:1 on both.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stepengine.trace import Trace

if TYPE_CHECKING:
    import plotly.graph_objects as go

PAPER = "#FFFFFF"
INK = "#14181C"  # text
QUIET = "#5F6872"  # second text, axes' labels
RULE = "#E3E7EB"  # grid
GREY = "#8A939C"  # marks without a colour of their own, idle hatching
KEPT = "#EEF1F4"  # what is there and needs no work
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
# Okabe-Ito hues, three lightened for dark ink, and two more for the seventh and eighth request
HUES = ("#0072B2", "#E69F00", "#2FB88D", "#D98EB8", "#56B4E9", "#F0803C", "#8F8A00", "#8C5A3C")
WHITE_INK = ("#0072B2", "#8C5A3C")
LETTERS = "ABCDEFGH"
CONFIG = {"displayModeBar": False, "responsive": True}  # for figure.show(config=CONFIG) and to_html


class RequestStyle(NamedTuple):
    """How one request is drawn everywhere."""

    color: str  # fill
    ink: str  # text on the fill, 4.5:1
    edge: str  # outlines and text in the request's colour on paper, 4.5:1
    label: str  # letter, or number where there are more than eight requests


def request_style(trace: Trace, request: int, selected: Sequence[int] = ()) -> RequestStyle:
    """Colour and label by order of arrival; beyond eight requests all are grey but the selected ones."""
    order = list(trace.requests)
    if len(order) <= len(HUES):
        place = order.index(request)
        return _style(HUES[place], LETTERS[place])
    if request in selected:
        return _style(HUES[list(selected).index(request) % len(HUES)], str(request))
    return RequestStyle(GREY, INK, QUIET, str(request))


def _style(hue: str, label: str) -> RequestStyle:
    return RequestStyle(hue, PAPER if hue in WHITE_INK else INK, readable(hue), label)


def readable(color: str, ratio: float = 4.5) -> str:
    """The colour, darkened until it has this contrast against paper."""
    channels = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    for percent in range(100, 0, -2):
        darker = "#" + "".join(f"{c * percent // 100:02X}" for c in channels)
        if contrast(darker, PAPER) >= ratio:
            return darker
    return INK


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2, relative luminance)."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def template() -> "go.layout.Template":
    """The Plotly template "stepengine". A fresh object each time: Plotly figures may write into theirs."""
    import plotly.graph_objects as go

    axis = {
        "showline": False,
        "zeroline": False,
        "gridcolor": RULE,
        "gridwidth": 1,
        "ticks": "",
        "tickfont": {"color": QUIET, "size": 12},
        "title": {"font": {"color": QUIET, "size": 13}, "standoff": 8},
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "font": {"family": FONT, "color": INK, "size": 13},
            "title": {
                "x": 0,
                "xref": "container",
                "xanchor": "left",
                "pad": {"l": 12},
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "font": {"size": 16, "weight": 600},
                "subtitle": {"font": {"size": 13, "color": QUIET}},
            },
            "colorway": list(HUES),
            "xaxis": {**axis, "showgrid": False},
            "yaxis": axis,
            "margin": {"l": 56, "r": 24, "t": 78, "b": 48},
            "showlegend": False,
            "hoverlabel": {"bgcolor": PAPER, "bordercolor": GREY, "font": {"color": INK, "family": FONT}},
            "barmode": "overlay",
            "bargap": 0.0,
            "hovermode": "closest",
        }
    )


def new_figure(title: str, subtitle: str, alt: str, height: int, width: int = 760, **layout: Any) -> "go.Figure":
    """An empty figure in the template. `alt` says in words what the picture shows, in `layout.meta["alt"]`."""
    import plotly.graph_objects as go

    figure = go.Figure()
    dressed(figure, title, subtitle, alt, height, width)
    return figure.update_layout(**layout)


def dressed(figure: "go.Figure", title: str, subtitle: str, alt: str, height: int, width: int = 760) -> "go.Figure":
    """The figure in the template, with its title (the finding) and its text alternative."""
    return figure.update_layout(
        template=template(),
        title={"text": title, "subtitle": {"text": subtitle}, "pad": {"t": 14, "l": 12}},
        height=height,
        width=width,
        meta={"alt": alt},
    )
