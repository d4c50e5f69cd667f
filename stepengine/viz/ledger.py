"""Claims beside what was measured: a table of cards, and a figure of claimed ranges against our ratios."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stepengine.errors import TraceError
from stepengine.viz.template import HUES, INK, QUIET, RULE, new_figure, readable

if TYPE_CHECKING:
    import plotly.graph_objects as go

STATIC = Path(__file__).parent / "static"
CLOCKED = re.compile(r"\[wall ([^\]]*)\]")
WIDTH = 108


@dataclass(frozen=True, repr=False)
class Cards:
    """Rows of one group: {"key", "says", "verdict", "when", "book", "how", "measured", "gpu"}, the last two lists.

    Shows itself as a table, and as plain lines where there is no page; values of the clock are underlined there, and
    stand in `[wall ...]` here.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]

    def __repr__(self) -> str:
        return "\n\n".join(_plain(row) for row in self.rows)

    def _repr_html_(self) -> str:
        css = (STATIC / "ledger.css").read_text(encoding="utf-8")
        body = "".join(_markup(row) for row in self.rows)
        return (
            f"<style>{css}</style><div class='ledger' tabindex='0' role='region' aria-label='{escape(self.title)}'>"
            f"<table><caption>{escape(self.title)}</caption><thead><tr><th scope='col'>they say</th>"
            f"<th scope='col'>what holds</th><th scope='col'>what we measured</th></tr></thead><tbody>{body}</tbody>"
            f"</table><p><u>Underlined</u>: by this machine's clock, or rounded in its own way.</p></div>"
        )


def _plain(row: Mapping[str, Any]) -> str:
    head = f"{row['key']:4s}{row['says']}"
    what = f"{row['verdict']}: {row['when']}  [{row['book']}]"
    lines = [head, *textwrap.wrap(what, WIDTH, initial_indent="    ", subsequent_indent="    ")]
    lines += [f"    measured ({row['how']})"]
    lines += [f"      {line}" for line in row["measured"]]
    lines += [f"      GPU: {line}" for line in row["gpu"]]
    return "\n".join(lines)


def _markup(row: Mapping[str, Any]) -> str:
    measured = "".join(f"<li>{_clocked(line)}</li>" for line in row["measured"])
    gpu = "".join(f"<li class='gpu'><b>GPU</b> {_clocked(line)}</li>" for line in row["gpu"])
    book = escape(row["book"])
    return (
        f"<tr data-claim='{escape(row['key'])}'><th scope='row'><b>{escape(row['key'])}</b> {escape(row['says'])}</th>"
        f"<td><b>{escape(row['verdict'])}</b> {escape(row['when'])} <a href='{book}.ipynb'>{book}</a></td>"
        f"<td><span>{escape(row['how'])}</span><ul>{measured}{gpu}</ul></td></tr>"
    )


def _clocked(line: str) -> str:
    """`[wall 3 ms]` underlined, without its brackets; the number set apart from its label."""
    label, colon, value = line.partition(": ")
    if not colon:
        return escape(line)
    return f"{escape(label)}: <b>{CLOCKED.sub(lambda found: f'<u>{found[1]}</u>', escape(value))}</b>"


class Range(NamedTuple):
    """A claimed ratio, from low to high, and ours: {what: ratio}."""

    name: str
    low: float
    high: float
    ours: Mapping[str, float]


def claimed_ranges(ranges: Sequence[Range]) -> "go.Figure":
    """A bar for each claimed range, a dot for each ratio of ours, on a logarithmic axis; the title counts the hits.

    Raises TraceError without a range, or for a ratio that is not above 0.
    """
    if not ranges or any(not value > 0 for each in ranges for value in (each.low, *each.ours.values())):
        raise TraceError("Claimed ranges need at least one range, and ratios above 0: measure the claims first.")
    inside = sum(_within(each, value) for each in ranges for value in each.ours.values())
    total = sum(len(each.ours) for each in ranges)
    told = "; ".join(
        f"{each.name}: claimed {_times(each.low)}{f' to {_times(each.high)}' if each.high > each.low else ''}, ours "
        + ", ".join(f"{what} {_times(value)}" for what, value in each.ours.items())
        for each in ranges
    )
    lanes = [(each, what, value) for each in ranges for what, value in each.ours.items()]
    figure = new_figure(
        f"{inside} of our {total} ratios lie where the claim says: it depends on what is compared",
        "bar: the range that is claimed · dot: ours, filled where it lies in the range (a tenth to spare)",
        f"Claimed ranges and our ratios on a logarithmic axis. {told}.",
        height=110 + 21 * len(lanes) + 10 * len(ranges),
        margin={"l": 300, "r": 56, "t": 84, "b": 52},
    )
    place, ticks = 0.0, []
    for each in ranges:
        first = place
        for what, value in each.ours.items():
            within = _within(each, value)
            figure.add_scatter(
                name=each.name, x=[value], y=[place], mode="markers+text", text=[f" {_times(value)}"],
                textposition="middle right", textfont={"color": INK, "size": 12}, cliponaxis=False,
                marker={
                    "size": 11, "color": HUES[0] if within else "#FFFFFF",
                    "line": {"color": readable(HUES[0]), "width": 2},
                },
                hovertemplate=f"{each.name}, {what}: %{{x:.3g}} times<extra></extra>",
            )  # fmt: skip
            ticks.append((place, what))
            place -= 1
        low, high = (each.low, each.high) if each.high > each.low else (each.low / 1.03, each.high * 1.03)
        figure.add_shape(
            type="rect", x0=low, x1=high, y0=first + 0.45, y1=place + 0.55, fillcolor="#C9CFD5", line={"width": 0},
            layer="below",
        )  # fmt: skip
        figure.add_annotation(
            x=0, xref="paper", xanchor="right", xshift=-8, y=first + 0.95, text=f"<b>{each.name}</b>", showarrow=False,
            font={"size": 12, "color": INK},
        )  # fmt: skip
        place -= 1.1
    values = [value for each in ranges for value in (each.low, each.high, *each.ours.values())]
    marks = [0.25, 0.5, 1, 2, 3, 5, 10, 20, 50, 100]
    figure.update_xaxes(
        type="log", title_text="ratio, on a logarithmic axis (1: no difference)", tickvals=marks,
        ticktext=[f"{mark:g}" for mark in marks], showgrid=True, gridcolor=RULE,
        range=[math.log10(min(values) / 1.5), math.log10(max(values) * 1.6)],
    )  # fmt: skip
    figure.add_vline(x=1, line={"color": QUIET, "width": 1, "dash": "dot"})
    return figure.update_yaxes(
        tickvals=[at for at, _ in ticks], ticktext=[_short(what) for _, what in ticks], showgrid=False,
        range=[place + 0.8, 1.7],
    )  # fmt: skip


def _within(each: Range, value: float) -> bool:
    return each.low / 1.1 <= value <= each.high * 1.1


def _times(value: float) -> str:
    return f"{value:.2g}×"


def _short(text: str) -> str:
    return text if len(text) <= 42 else text[:41] + "…"
