"""Reserved, used, wasted: what two ways to store the same tokens cost."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stepengine.errors import InvalidSetting, TraceError
from stepengine.trace import Trace, kv_use
from stepengine.viz.grid import HATCH, WIDTH, reals
from stepengine.viz.template import GREY, HUES, INK, LETTERS, PAPER, QUIET, new_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

HEADING, BAR, GAP, LINES_GAP = 24, 24, 22, 7  # px
COLUMNS = 64  # blocks to a line
Pairs = Sequence[tuple[int, int]]


class Row(NamedTuple):
    """One bar: (used, reserved) tokens of each request, or of all of them together."""

    name: str
    parts: list[tuple[float, float]]
    mean: bool = False  # over steps

    @property
    def used(self) -> float:
        return sum(used for used, _ in self.parts)

    @property
    def reserved(self) -> float:
        return sum(reserved for _, reserved in self.parts)

    @property
    def wasted(self) -> str:
        """Share of what is reserved, in per cent."""
        return f"{100 * (1 - self.used / self.reserved):.3g} %"


def fragmentation(
    rows: Mapping[str, Trace | Pairs], step: int | None = None, block_size: int | None = None
) -> "go.Figure":
    """A bar for each way to store K/V: the tokens used and, hatched, the room reserved but empty.

    A row is a trace, drawn at `step` or else as the mean over the steps that hold anything, or a list with one
    (used tokens, reserved tokens) pair for each request. With `block_size` the room of such a list is also drawn as
    blocks of so many tokens below its bar. Raises InvalidSetting for rows that nothing can be drawn of.
    """
    bars = [_row(name, source, step) for name, source in rows.items()]
    if not bars:
        raise InvalidSetting("fragmentation got no rows; give it at least one trace or list of (used, reserved) pairs.")
    if block_size is not None and block_size < 1:
        raise InvalidSetting(f"block_size is {block_size}; it must be at least 1 token.")
    widest = max(bar.reserved for bar in bars)
    blocks = [_blocks(bar, block_size) if isinstance(rows[bar.name], Sequence) else [] for bar in bars]
    line = (WIDTH - 48) / COLUMNS
    tops, y = [], 0.0  # px from the top of the plot to each bar's heading
    for cells in blocks:
        tops.append(y)
        y += HEADING + BAR + GAP + (LINES_GAP + line * -(-len(cells) // COLUMNS) if cells else 0)
    y -= GAP - 8
    shown = f" · below each bar its room in blocks of {block_size} tokens" if any(blocks) else ""
    means = ", means over the steps" if any(bar.mean for bar in bars) else f", step {step}" if step is not None else ""
    title = "Wasted: " + ", ".join(f"{bar.wasted} ({bar.name})" for bar in bars)
    figure = new_figure(
        title, f"hatched: reserved, but empty{means}{shown}",
        " ".join(f"{bar.name}: {_n(bar.used)} of {_n(bar.reserved)} reserved tokens are used." for bar in bars),
        height=round(84 + y + 52), width=WIDTH, margin={"l": 24, "r": 24, "t": 84, "b": 52},
    )  # fmt: skip
    _draw_bars(figure, bars, tops)
    for cells, top in zip(blocks, tops, strict=True):
        if cells:
            _draw_blocks(figure, cells, top + HEADING + BAR + LINES_GAP, line, widest, block_size or 1)
    for bar, top in zip(bars, tops, strict=True):
        figure.add_annotation(
            text=f"<b>{bar.name}</b>  {_n(bar.used)} of {_n(bar.reserved)} tokens used, {bar.wasted} wasted", x=0,
            y=-top - HEADING + 2, xanchor="left", yanchor="bottom", showarrow=False, font={"size": 13, "color": INK},
        )  # fmt: skip
    figure.update_xaxes(title_text="room for tokens", range=[0, widest], nticks=9, tickformat=",d")
    return figure.update_yaxes(visible=False, range=[-y, 0])


def _row(name: str, source: Trace | Pairs, step: int | None) -> Row:
    if isinstance(source, Trace):
        use = kv_use(source)
        if step is not None:
            if not -len(use) <= step < len(use):
                raise TraceError(f"Step {step} is not in the trace {name!r}, which has {len(use)} steps.")
            use = [use[step]]
        use = [u for u in use if u.reserved]
        if not use:
            where = f"at step {step}" if step is not None else "at any step"
            raise TraceError(f"The trace {name!r} holds no K/V {where}: there is no room to draw.")
        held, reserved = (float(np.mean([getattr(u, field) for u in use])) for field in ("held", "reserved"))
        return Row(name, [(held, reserved)], mean=step is None)
    parts = list(source)
    for used, reserved in parts:
        if not 0 <= used <= reserved:
            raise InvalidSetting(
                f"The row {name!r} says that {used} of {reserved} reserved tokens are used; "
                "give (used, reserved) pairs with 0 <= used <= reserved."
            )
    if not sum(reserved for _, reserved in parts):
        raise InvalidSetting(f"The row {name!r} reserves nothing; give at least one (used, reserved) pair above 0.")
    return Row(name, [(float(used), float(reserved)) for used, reserved in parts])


def _blocks(bar: Row, block_size: int | None) -> list[tuple[int, float]]:
    """(part, tokens) of every block that the row's parts take up, in order."""
    if block_size is None:
        return []
    return [
        (part, min(max(used - i * block_size, 0.0), block_size))
        for part, (used, reserved) in enumerate(bar.parts)
        for i in range(int(-(-reserved // block_size)))
    ]


def _look(part: int, parts: int) -> tuple[str, str, str]:
    """Fill, ink and letter of one request's part of a bar."""
    if parts == 1 or parts > len(HUES):
        return (HUES[0], PAPER, "") if parts == 1 else (GREY, INK, str(part))
    return HUES[part], PAPER if HUES[part] in (HUES[0], HUES[7]) else INK, LETTERS[part]


def _draw_bars(figure: "go.Figure", bars: Sequence[Row], tops: Sequence[float]) -> None:
    used: list[tuple[float, float, float, str]] = []  # base, tokens, y, colour
    room: list[tuple[float, float, float]] = []
    letters: dict[str, list[tuple[float, float, str]]] = {INK: [], PAPER: []}
    widest = max(bar.reserved for bar in bars)
    for bar, top in zip(bars, tops, strict=True):
        begin, y = 0.0, -top - HEADING - BAR / 2
        for part, (tokens, reserved) in enumerate(bar.parts):
            fill, ink, letter = _look(part, len(bar.parts))
            used.append((begin, tokens, y, fill))
            room.append((begin, reserved, y))
            if letter and tokens / widest * (WIDTH - 48) > 12:
                letters[ink].append((begin + tokens / 2, y, f"<b>{letter}</b>"))
            begin += reserved
    figure.add_bar(
        name="reserved", orientation="h", base=[b for b, *_ in room], x=[r for _, r, _ in room],
        y=[y for *_, y in room], width=BAR, hovertemplate="%{x:,.4~r} tokens reserved<extra></extra>",
        marker={"color": PAPER, "line": {"color": QUIET, "width": 1}, "pattern": {**HATCH, "fgcolor": GREY}},
    )  # fmt: skip
    figure.add_bar(
        name="used", orientation="h", base=[b for b, *_ in used], x=[t for _, t, *_ in used],
        y=[y for _, _, y, _ in used], width=BAR, hovertemplate="%{x:,.4~r} tokens used<extra></extra>",
        marker={"color": [fill for *_, fill in used], "line": {"width": 0}},
    )  # fmt: skip
    for ink, rows in letters.items():
        if rows:
            figure.add_scatter(
                name="letters", x=[x for x, *_ in rows], y=[y for _, y, _ in rows], text=[t for *_, t in rows],
                mode="text", textfont={"size": 13, "color": ink}, hoverinfo="skip",
            )  # fmt: skip


def _draw_blocks(
    figure: "go.Figure", cells: list[tuple[int, float]], top: float, line: float, widest: float, block_size: int
) -> None:
    """One small square for each block, `COLUMNS` to a line, that fills from the bottom."""
    side, parts = line - 2.5, 1 + max(part for part, _ in cells)
    x = reals((i % COLUMNS + 0.5) / COLUMNS * widest for i in range(len(cells)))
    base = reals(-top - (i // COLUMNS + 1) * line for i in range(len(cells)))
    width = widest / COLUMNS * side / line
    figure.add_bar(
        name="blocks", x=x, base=base, y=np.full(len(cells), side, dtype=np.float32), width=width, hoverinfo="skip",
        marker={
            "color": PAPER, "line": {"color": GREY, "width": 1},
            "pattern": {**HATCH, "size": 4, "fgcolor": GREY},
        },
    )  # fmt: skip
    for part in range(parts):
        mine = [i for i, (owner, tokens) in enumerate(cells) if owner == part and tokens]
        figure.add_bar(
            name="tokens in blocks", x=x[mine], base=base[mine], width=width,
            y=reals(cells[i][1] / block_size * side for i in mine), customdata=reals(cells[i][1] for i in mine),
            marker={"color": _look(part, parts)[0], "line": {"width": 0}},
            hovertemplate=f"%{{customdata}} of {block_size} tokens<extra></extra>",
        )  # fmt: skip


def _n(tokens: float) -> str:
    return f"{tokens:,.0f}"
