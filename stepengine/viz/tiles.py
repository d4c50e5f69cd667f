"""Flash attention at work: the walk over tiles, the bytes it saves, and what a kernel loads and stores."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from stepengine.errors import InvalidSetting
from stepengine.viz.grid import WIDTH, listed, reals, wholes
from stepengine.viz.template import GREY, HUES, INK, KEPT, PAPER, QUIET, new_figure, readable

if TYPE_CHECKING:
    import plotly.graph_objects as go

BLUE, ORANGE, GREEN, ROSE, SKY, VERMILION = HUES[:6]
SETTLED = 5e-5  # an output this near to the final one is drawn as final
MOST_TILES, MOST_ROWS = 40, 32  # what a page can show


class Seen(NamedTuple):
    """What a walk over tiles knows after one tile: a number for each row of queries."""

    queries: tuple[int, int]  # first, and one beyond the last
    keys: tuple[int, int]
    top: Sequence[float]  # largest score so far, in units of log2
    total: Sequence[float]  # sum of exp2(score - top) so far
    error: Sequence[float]  # largest difference of the output, were it taken now, from the final one


class Recorded(Protocol):
    """What `kernel_loads` draws; `stepengine.bench.kernel_loads.Record` is one."""

    @property
    def launches(self) -> Sequence[tuple[str, int]]: ...  # kernel, programs
    @property
    def tensors(self) -> Mapping[str, tuple[int, int]]: ...  # name -> elements, bytes of one
    @property
    def accesses(self) -> Sequence[Any]: ...  # launch, program, store, tensor, runs of elements [begin, end)


# --- the walk ----------------------------------------------------------------------------------------------------


def tile_walk(walk: Sequence[Seen], start: int | None = None) -> "go.Figure":
    """Which tile of scores is being computed, and each row's running maximum, sum and distance from the result.

    A slider goes over the tiles in the order of `walk`; the figure opens at place `start`, by default one past the
    middle at which a maximum rises. Queries are rows; the last of them sees the last key. InvalidSetting for a walk
    of no tiles, or of more than a page can show.
    """
    rows, columns = _checked(walk)
    words = [_words(walk, i) for i in range(len(walk))]
    risen = [i for i in range(len(walk)) if _risen(walk, i)]
    telling = [i for i in risen if max(walk[i].error) >= SETTLED] or risen or [len(walk) - 1]
    opens = start if start is not None else min(telling, key=lambda i: abs(i - 0.6 * len(walk)))
    if not 0 <= opens < len(walk):
        raise InvalidSetting(f"start is {start}; the walk has the places 0 to {len(walk) - 1}.")
    figure = new_figure(
        *words[opens],
        f"Scores of {rows} queries and {columns} keys, {len(walk)} tiles. "
        + " ".join(f"{i}: {a}; {b}." for i, (a, b) in enumerate(words, 1)),
        height=452, width=WIDTH, margin={"l": 52, "r": 20, "t": 104, "b": 104},
    )  # fmt: skip
    pictures = [_picture(walk, i) for i in range(len(walk))]
    marks: dict[str, dict[str, Any]] = {
        "to come": {"color": PAPER, "line": {"color": GREY, "width": 1}},
        "done": {"color": SKY, "line": {"color": PAPER, "width": 1}},
        "now": {"color": BLUE, "line": {"color": INK, "width": 2}},
    }
    for name, marker in marks.items():
        figure.add_bar(
            name=name, orientation="h", marker=marker, **pictures[opens][name],
            hovertemplate=f"keys from %{{base}}, %{{x}} wide: {name}<extra></extra>",
        )  # fmt: skip
    _diagonal(figure, rows, columns)
    panels: dict[str, tuple[str, dict[str, Any], str]] = {
        "maximum": ("x2", {"color": INK, "size": 7}, "row %{y}: largest score so far %{x:.2f}<extra></extra>"),
        "sum": ("x3", {"color": GREEN, "line": {"width": 0}}, "row %{y}: sum so far %{x:.2f}<extra></extra>"),
        "error": ("x4", {"color": VERMILION, "line": {"width": 0}}, "row %{y}: off by %{x:.3f}<extra></extra>"),
        "settled": ("x4", {"color": INK, "size": 8, "symbol": "circle-open"}, "row %{y} is final<extra></extra>"),
    }
    for name, (axis, marker, hover) in panels.items():
        data = {"name": name, "xaxis": axis, "marker": marker, "hovertemplate": hover, **pictures[opens][name]}
        if name in ("sum", "error"):
            figure.add_bar(orientation="h", width=0.7, **data)
        else:
            figure.add_scatter(mode="markers", cliponaxis=False, **data)
    _axes(figure, walk, rows, columns)
    _steps(figure, [(pictures[i], words[i]) for i in range(len(walk))], opens)
    return figure


def _checked(walk: Sequence[Seen]) -> tuple[int, int]:
    """Rows and columns of the scores."""
    if not walk:
        raise InvalidSetting("The walk holds no tiles; give it what a loop over tiles knew after each of them.")
    rows, columns = max(seen.queries[1] for seen in walk), max(seen.keys[1] for seen in walk)
    if len(walk) > MOST_TILES or rows > MOST_ROWS:
        raise InvalidSetting(
            f"The walk has {len(walk)} tiles and {rows} rows; at most {MOST_TILES} and {MOST_ROWS} can be told apart: "
            "walk over fewer queries or keys, or in larger tiles."
        )
    return rows, columns


def _before(walk: Sequence[Seen], i: int) -> Seen | None:
    """The same rows, one tile earlier."""
    return next((seen for seen in reversed(walk[:i]) if seen.queries == walk[i].queries), None)


def _risen(walk: Sequence[Seen], i: int) -> int:
    """Rows whose maximum rises at this tile although they had one."""
    old = _before(walk, i)
    return sum(new > top for new, top in zip(walk[i].top, old.top, strict=True)) if old else 0


def _words(walk: Sequence[Seen], i: int) -> tuple[str, str]:
    seen, count = walk[i], len(walk[i].top)
    (first, last), (begin, end) = seen.queries, seen.keys
    title = f"Tile {i + 1} of {len(walk)}: queries {first} to {last - 1} meet keys {begin} to {end - 1}"
    rising = _risen(walk, i)
    if _before(walk, i) is None:
        said = "their first tile: nothing to correct yet"
    elif rising:
        said = f"a larger score in {rising} of {count} rows: what they had summed shrinks first"
    else:
        said = "no score is larger than before: the weights are just added"
    final = sum(error < SETTLED for error in seen.error)
    return title, f"{said} · {final} of the {count} rows are final"


def _picture(walk: Sequence[Seen], i: int) -> dict[str, dict[str, Any]]:
    """The data of all traces after tile i, by their names."""
    latest = {seen.queries: seen for seen in walk[: i + 1]}
    rows = [
        (first + place, *numbers)
        for (first, _), seen in latest.items()
        for place, numbers in enumerate(zip(seen.top, seen.total, seen.error, strict=True))
    ]
    off = [(row, round(error, 4)) for row, _, _, error in rows if error >= SETTLED]
    return {
        "to come": _bars(walk[i + 1 :]),
        "done": _bars(walk[:i]),
        "now": _bars(walk[i : i + 1]),
        "maximum": {"x": reals(round(top, 4) for _, top, *_ in rows), "y": wholes(row for row, *_ in rows)},
        "sum": {"x": reals(round(total, 4) for _, _, total, _ in rows), "y": wholes(row for row, *_ in rows)},
        "error": {"x": reals(error for _, error in off), "y": wholes(row for row, _ in off)},
        "settled": {
            "x": wholes(0 for *_, error in rows if error < SETTLED),
            "y": wholes(row for row, *_, error in rows if error < SETTLED),
        },
    }


def _bars(tiles: Sequence[Seen]) -> dict[str, Any]:
    return {
        "base": reals(seen.keys[0] - 0.5 for seen in tiles),
        "x": wholes(seen.keys[1] - seen.keys[0] for seen in tiles),
        "y": reals((seen.queries[0] + seen.queries[1] - 1) / 2 for seen in tiles),
        "width": wholes(seen.queries[1] - seen.queries[0] for seen in tiles),
    }


def _diagonal(figure: "go.Figure", rows: int, columns: int) -> None:
    """Stairs: right of them lies each query's future."""
    ahead = columns - rows  # keys that the first query sees besides its own
    x = [value for row in range(rows) for value in (row + ahead + 0.5,) * 2]
    y = [value for row in range(rows) for value in (row - 0.5, row + 0.5)]
    figure.add_scatter(
        name="diagonal", x=reals(x), y=reals(y), mode="lines", hoverinfo="skip",
        line={"color": INK, "width": 1.5, "dash": "dot"},
    )  # fmt: skip
    if ahead <= columns / 3:
        figure.add_annotation(
            text="the future:<br>never computed", x=columns - 1, y=0, xanchor="right", yanchor="top", align="right",
            showarrow=False, font={"size": 12, "color": QUIET},
        )  # fmt: skip


def _axes(figure: "go.Figure", walk: Sequence[Seen], rows: int, columns: int) -> None:
    tops = [top for seen in walk for top in seen.top]
    room = 0.08 * (max(tops) - min(tops)) or 1.0
    heads = {
        "": ("scores, by tiles", (0, 0.42), [-0.8, columns - 0.2]),
        "2": ("largest score", (0.48, 0.62), [min(tops) - room, max(tops) + room]),
        "3": ("sum of weights", (0.67, 0.81), [0, 1.08 * max(total for seen in walk for total in seen.total)]),
        "4": ("error so far", (0.86, 1), [0, 1.08 * max(max(seen.error) for seen in walk) or 1]),
    }
    for number, (head, domain, limits) in heads.items():
        figure.update_layout({f"xaxis{number}": {"domain": domain, "range": limits, "anchor": "y", "nticks": 4}})
        figure.add_annotation(
            text=f"<b>{head}</b>", x=domain[0], xref="paper", xanchor="left", y=1, yref="paper", yanchor="bottom",
            showarrow=False, font={"size": 13, "color": INK},
        )  # fmt: skip
    figure.update_layout(xaxis={"title": {"text": "key"}, "nticks": 6}, xaxis2={"title": {"text": "log2 units"}})
    figure.update_layout(xaxis3={"title": {"text": "Σ exp2(s − largest)"}}, xaxis4={"title": {"text": "○ final"}})
    figure.update_yaxes(title_text="query", range=[rows - 0.4, -0.6], showgrid=False, nticks=9, tickformat="d")


def _steps(
    figure: "go.Figure", places: Sequence[tuple[dict[str, dict[str, Any]], tuple[str, str]]], opens: int
) -> None:
    """The slider; a frame holds only what differs between tiles."""
    order = [trace.name for trace in figure.data]
    figure.frames = [
        {
            "name": str(i),
            "traces": [order.index(name) for name in data],
            "data": [
                {"type": "scatter" if name in ("maximum", "settled") else "bar", **values}
                for name, values in data.items()
            ],
            "layout": {"title": {"text": title, "subtitle": {"text": subtitle}}},
        }
        for i, (data, (title, subtitle)) in enumerate(places, 1)
    ]
    jump = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    figure.update_layout(
        sliders=[{
            "active": opens, "x": 0, "len": 1, "y": 0, "yanchor": "top", "pad": {"t": 44, "b": 0},
            "currentvalue": {"visible": False}, "bgcolor": PAPER, "activebgcolor": GREY, "bordercolor": GREY,
            "tickcolor": GREY, "font": {"size": 11, "color": QUIET},
            "steps": [
                {"label": str(i), "method": "animate", "args": [[str(i)], jump]} for i in range(1, len(places) + 1)
            ],
        }]
    )  # fmt: skip


# --- bytes -------------------------------------------------------------------------------------------------------


def hbm_traffic(
    moved: Mapping[str, Mapping[int, float]], checked: Mapping[str, Mapping[int, float]] | None = None, unit: str = ""
) -> "go.Figure":
    """Bytes to and from HBM over the number of tokens, a line for each way, both axes in powers.

    `moved` and `checked` hold for each name {tokens: bytes}; `checked` is drawn as rings around the same: what an
    independent count found. The first name is compared with the last in the title. `unit` says what is counted.
    """
    if len(moved) < 2 or any(not points for points in moved.values()):
        raise InvalidSetting(f"hbm_traffic compares ways to compute; it got {list(moved)}: give two or more lines.")
    (first, high), (last, low) = list(moved.items())[0], list(moved.items())[-1]
    most = max(set(high) & set(low), default=0)
    if not most:
        raise InvalidSetting(f"{first} and {last} have no number of tokens in common; count both at the same ones.")
    rings = {name: points for name, points in (checked or {}).items() if points}
    note = " · rings: loads and stores of the kernels under Triton's interpreter" if rings else ""
    figure = new_figure(
        f"At {most:,} tokens, {first} moves {high[most] / low[most]:.1f} times the bytes of {last}",
        f"{unit}{note}".removeprefix(" · "),
        " ".join(f"{name}: " + ", ".join(f"{n} tokens {b:,.0f} bytes" for n, b in points.items()) + "."
                 for name, points in moved.items()),
        height=380, width=WIDTH, margin={"l": 72, "r": 120, "t": 84, "b": 52},
    )  # fmt: skip
    for place, (name, points) in enumerate(moved.items()):
        figure.add_scatter(
            name=name, x=wholes(points), y=reals(points.values()), mode="lines+markers",
            line={"color": HUES[place], "width": 2}, marker={"size": 6},
            hovertemplate=f"{name}, %{{x:,}} tokens: %{{y:,}} bytes<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            name=f"{name}: name", x=[max(points)], y=[points[max(points)]], mode="text", text=[f"<b>  {name}</b>"],
            textposition="middle right", textfont={"color": readable(HUES[place])}, cliponaxis=False, hoverinfo="skip",
        )  # fmt: skip
        if name in rings:
            figure.add_scatter(
                name=f"{name}: kernels", x=wholes(rings[name]), y=reals(rings[name].values()), mode="markers",
                marker={"size": 13, "symbol": "circle-open", "color": INK, "line": {"width": 1.5}},
                hovertemplate="%{x:,} tokens: the kernels move %{y:,} bytes<extra></extra>",
            )  # fmt: skip
    figure.add_scatter(
        name="factor", x=[most, most], y=[high[most], low[most]], mode="lines", hoverinfo="skip",
        line={"color": INK, "width": 1.5, "dash": "dot"},
    )  # fmt: skip
    figure.add_annotation(
        text=f"<b>{high[most] / low[most]:.1f}×</b>", x=math.log10(most), xanchor="left", xshift=10, showarrow=False,
        y=math.log10(high[most] * low[most]) / 2, font={"size": 14, "color": INK},
    )  # fmt: skip
    tokens = sorted({n for points in moved.values() for n in points})
    figure.update_xaxes(
        type="log", title_text="tokens (queries and keys)", tickvals=tokens, ticktext=[f"{n:,}" for n in tokens]
    )
    powers = {10**power: f"{10 ** (power % 3)} {'kMGTP'[power // 3 - 1]}B" for power in range(3, 18)}
    return figure.update_yaxes(
        type="log", title_text="bytes to and from HBM", tickvals=list(powers), ticktext=list(powers.values())
    )


# --- loads and stores --------------------------------------------------------------------------------------------

INDEXES = ("block_table", "cu_q", "kv_lens")  # whole numbers that say where things lie
COLORS = {
    "q": BLUE,
    "k": ORANGE,
    "v": ROSE,
    "storage": SKY,
    "scores": VERMILION,
    "weights": HUES[6],
    "workspace": HUES[6],
    "out": GREEN,
}
ORDER = (*COLORS, *INDEXES)


def kernel_loads(record: Recorded, row: int) -> "go.Figure":
    """Every load and store of a kernel's programs, in order, against the place in the tensor that it goes to.

    A bar is one access; its height is what it covers, in rows of `row` numbers (head_dim: then a row is a token's
    vector); the columns between two rules are one program's. A triangle marks a store. `record` as Recorded.
    """
    if not record.accesses:
        raise InvalidSetting("The record holds no loads and no stores; record a kernel that does something.")
    names = sorted({a.tensor for a in record.accesses}, key=lambda n: ORDER.index(n) if n in ORDER else len(ORDER))
    scale, bases, bottom = _places(record, names, row)
    figure = new_figure(
        *_finding(record, names), _alternative(record, names), height=round(84 + 64 + max(290, 40 * len(names))),
        width=WIDTH, margin={"l": 100, "r": 92, "t": 84, "b": 64},
    )  # fmt: skip
    for name in names:
        _band(figure, record, name, bases[name], scale[name] * record.tensors[name][0])
        for store, what in ((False, "loads"), (True, "stores")):
            found = [(at, a) for at, a in enumerate(record.accesses) if a.tensor == name and a.store is store]
            if not found:
                continue
            bars = [(at, begin, end) for at, access in found for begin, end in access.runs]
            figure.add_bar(
                name=f"{name}: {what}", x=wholes(at for at, *_ in bars), width=0.9,
                base=reals(bases[name] + scale[name] * begin for _, begin, _ in bars),
                y=reals(scale[name] * (end - begin) for _, begin, end in bars),
                customdata=wholes(begin for _, begin, _ in bars), marker={"color": _color(name), "line": {"width": 0}},
                hovertemplate=f"access %{{x}} {what} {name} from element %{{customdata}}<extra></extra>",
            )  # fmt: skip
            if store:
                figure.add_scatter(
                    name=f"{name}: marks", x=wholes(at for at, _ in found), mode="markers", hoverinfo="skip",
                    y=reals(bases[name] + scale[name] * access.runs[0][0] for _, access in found), cliponaxis=False,
                    marker={"symbol": "triangle-down", "color": INK, "size": 7, "standoff": 1},
                )  # fmt: skip
    _programs(figure, record, bottom)
    figure.update_xaxes(visible=False, range=[-1, len(record.accesses)])
    return figure.update_yaxes(visible=False, range=[1.02 * bottom, -0.02 * bottom])


def _places(record: Recorded, names: Sequence[str], row: int) -> tuple[dict[str, float], dict[str, float], float]:
    """For each tensor its scale (y units an element) and its first place on the y axis; and where the last one ends."""
    rows = {name: record.tensors[name][0] / row for name in names}
    least, gap = 0.05 * sum(rows.values()), 0.035 * sum(rows.values())
    scale, bases, y = {}, {}, 0.0
    for name in names:
        height = max(rows[name], least)
        scale[name], bases[name] = height / record.tensors[name][0], y
        y += height + gap
    return scale, bases, y - gap


def _color(name: str) -> str:
    return COLORS.get(name, GREY)


def _finding(record: Recorded, names: Sequence[str]) -> tuple[str, str]:
    """Title and subtitle: how often keys and values are read, what is written, and what it comes to."""
    often: Counter[tuple[str, int]] = Counter()
    for access in record.accesses:
        if access.tensor in ("k", "v", "storage") and not access.store:
            often.update((access.tensor, at) for begin, end in access.runs for at in range(begin, end))
    most = max(often.values(), default=0)
    times = {1: "once", 2: "at most twice"}.get(most, f"at most {most} times")
    written = [name for name in names if any(a.store and a.tensor == name for a in record.accesses)]
    said = "no score is written" if written == ["out"] else f"{listed(written)} are written"
    data = sum(_bytes(record, name) for name in names if name not in INDEXES)
    programs = [count for _, count in record.launches]
    several = f"{len(programs)} kernels, {sum(programs)} programs" if len(programs) > 1 else f"{programs[0]} programs"
    return (
        f"Keys and values are read {times}; {said}",
        f"{several} · {data:,} bytes of data · a bar: what one load or store covers · ▾ a store",
    )


def _bytes(record: Recorded, name: str) -> int:
    size = record.tensors[name][1]
    return sum((end - begin) * size for a in record.accesses if a.tensor == name for begin, end in a.runs)


def _alternative(record: Recorded, names: Sequence[str]) -> str:
    said = []
    for name in names:
        for store, what in ((False, "loads"), (True, "stores")):
            if found := sum(a.tensor == name and a.store is store for a in record.accesses):
                said.append(f"{name}: {found} {what}")
    programs = sum(count for _, count in record.launches)
    return f"{len(record.accesses)} loads and stores of {programs} programs. {'; '.join(said)}."


def _band(figure: "go.Figure", record: Recorded, name: str, base: float, height: float) -> None:
    """A tensor's place: a pale strip, its name at the left and its bytes at the right."""
    figure.add_shape(
        type="rect", xref="paper", x0=0, x1=1, y0=base, y1=base + height, fillcolor=KEPT, line={"width": 0},
        layer="below",
    )  # fmt: skip
    for text, x, anchor, shift, font in (
        (f"<b>{name}</b>", 0, "right", -8, {"size": 13, "color": readable(_color(name))}),
        (f"{_bytes(record, name):,} B", 1, "left", 8, {"size": 12, "color": QUIET}),
    ):
        figure.add_annotation(
            text=text, x=x, xref="paper", xanchor=anchor, xshift=shift, y=base + height / 2, showarrow=False, font=font
        )


def _programs(figure: "go.Figure", record: Recorded, bottom: float) -> None:
    """Rules between programs, their numbers, and below them the kernels' names."""
    pixels = (WIDTH - 192) / (len(record.accesses) + 1)
    spans: dict[tuple[int, int], list[int]] = {}
    kernels: dict[int, list[int]] = {}
    for at, access in enumerate(record.accesses):
        spans.setdefault((access.launch, access.program), []).append(at)
        kernels.setdefault(access.launch, []).append(at)
    below = {"y": 0, "yref": "paper", "yanchor": "top", "showarrow": False}
    for (launch, program), places in spans.items():
        if places[0]:
            figure.add_shape(
                type="line", x0=places[0] - 0.5, x1=places[0] - 0.5, y0=0, y1=bottom, layer="below",
                line={"color": QUIET if places[0] == kernels[launch][0] else "#C9D0D6", "width": 1},
            )  # fmt: skip
        if (wide := len(places) * pixels) > 22:
            text = f"program {program}" if wide > 68 else str(program)
            figure.add_annotation(
                text=text, x=(places[0] + places[-1]) / 2, yshift=-2, font={"size": 12, "color": QUIET}, **below
            )
    for launch, places in kernels.items():
        name = record.launches[launch][0].strip("_").removesuffix("_kernel")
        figure.add_annotation(
            text=f"<b>{name}</b>", x=(places[0] + places[-1]) / 2, yshift=-20, font={"size": 12, "color": INK}, **below
        )
    figure.add_annotation(
        text="loads and stores in the order of the interpreter →", x=0, xref="paper", xanchor="left", yshift=-40,
        font={"size": 12, "color": QUIET}, **below,
    )  # fmt: skip
