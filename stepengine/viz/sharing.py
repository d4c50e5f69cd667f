"""Tables that share blocks, their reference counts, and a copy-on-write while it happens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from stepengine.core.plan import Copy
from stepengine.errors import TraceError
from stepengine.trace import Replay, Snapshot, Trace
from stepengine.viz.grid import (
    CAPTION,
    KEY,
    LEFT,
    RIGHT,
    WIDTH,
    Grid,
    Palette,
    Square,
    add_note,
    add_squares,
    counted,
    fit_axes,
    grid_of,
    listed,
    owners,
    picture,
)
from stepengine.viz.template import INK, PAPER, QUIET, new_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

ENTRIES = 5  # of a table that fit into a panel; of longer ones the last are shown
TOP, BETWEEN = 84, 26  # px


class Panel(NamedTuple):
    """The tables of a family of requests at one moment of a step."""

    heading: str
    table: dict[int, tuple[int, ...]]
    tokens: dict[int, int]  # block -> tokens held
    refs: dict[int, int]  # block -> references
    new: frozenset[int] = frozenset()
    copies: tuple[Copy, ...] = ()  # made between the panel before and this one


def ref_counts(trace: Trace, request: int, steps: Sequence[int] | None = None) -> "go.Figure":
    """The block tables of a request, its samples and its forks, with the number of references on shared blocks.

    A step that copies a block is drawn as two panels, before the copy and after it, with an arrow from the shared
    block to its copy; other steps as one. `steps` (negative counts from the end) is by default the first step with a
    copy of this family, or, where there is none, the first in which it shares a block. TraceError where it never does.
    """
    replay = Replay(trace)
    grid = grid_of(replay)
    family = family_of(trace, request)
    shown = [replay.at(t).index for t in steps] if steps is not None and len(steps) else [_first(replay, family)]
    lines = [_panels(replay, family, t) for t in shown]
    palette = Palette(trace, family)
    widest = max((len(table) for line in lines for panel in line for table in panel.table.values()), default=1)
    entries = min(max(widest, 1), ENTRIES)
    grid = grid._replace(cell=46.0, side=41.0, caption=CAPTION, columns=16)
    title, subtitle, alt = _words(lines, shown, palette)
    heights = [BETWEEN + max(len(panel.table) for panel in line) * (grid.cell + CAPTION) for line in lines]
    figure = new_figure(
        title, subtitle, alt, height=round(TOP + sum(heights) + 44), width=WIDTH,
        margin={"l": LEFT, "r": RIGHT, "t": TOP, "b": 40},
    )  # fmt: skip
    squares: list[Square] = []
    numbers: list[Square] = []
    arrows: list[tuple[Panel, float, float, int]] = []
    top = 0.0
    for line, height in zip(lines, heights, strict=True):
        skipped = max(max(len(table) for panel in line for table in panel.table.values()) - entries, 0)
        for place, panel in enumerate(line):
            left = place * (entries + 1.8) + 0.9
            found = _squares(grid, panel, left, top, skipped)
            squares += found
            numbers += found
            _labels(figure, grid, palette, panel, left, top, skipped)
            arrows.append((panel, left, top, skipped))
        top += height
    add_squares(figure, grid, palette, picture(grid, palette, squares))
    figure.add_scatter(
        name="block numbers", x=[s.x for s in numbers], y=[s.base + grid.size for s in numbers],
        text=[str(s.block) for s in numbers], mode="text", textposition="top center",
        textfont={"size": 11, "color": QUIET}, hoverinfo="skip", cliponaxis=False,
    )  # fmt: skip
    for panel, left, top, skipped in arrows:
        _arrows(figure, grid, panel, left, top, skipped)
    fit_axes(figure, grid, above=0, below=sum(heights))
    add_note(figure, KEY, 8)
    return figure


def family_of(trace: Trace, request: int) -> list[int]:
    """The request, the samples of its prompt, and everything forked from one of them (or from which it was)."""
    if request not in trace.requests:
        raise TraceError(f"Request {request} is not in this trace, which holds {len(trace.requests)} requests.")
    pairs = [pair for record in trace.steps for pair in record.forked]
    pairs += [(info.group, r) for r, info in trace.requests.items() if info.group in trace.requests]
    family = {request}
    grown = True
    while grown:
        found = {r for pair in pairs if family & set(pair) for r in pair}
        grown = not found <= family
        family |= found
    return [r for r in trace.requests if r in family]


def _first(replay: Replay, family: Sequence[int]) -> int:
    """The first step that copies a block of the family, else the first in which it shares one."""
    for t, record in enumerate(replay.trace.steps):
        if any(copy.request in family for copy in record.plan.copies):
            return t
    for now in replay:
        if any(now.refs[block] > 1 for r in family for block in now.table[r]):
            return now.index
    who = f"Requests {listed(family)} never share" if len(family) > 1 else f"Request {family[0]} never shares"
    raise TraceError(f"{who} a block in this trace; ask for n > 1 samples or fork a request, at stage 2 or later.")


def _panels(replay: Replay, family: Sequence[int], t: int) -> list[Panel]:
    now = replay.at(t)
    copies = tuple(copy for copy in now.record.plan.copies if copy.request in family)
    table = {r: now.table[r] for r in family if now.table[r]}
    after = Panel(f"Step {t}", table, now.block_tokens, now.refs, now.new_blocks, copies)
    if not table:
        raise TraceError(f"In step {t}, none of the requests {listed(family)} holds a block: there is nothing to draw.")
    if not copies:
        return [after]
    return [_before(replay, now, family, copies), after._replace(heading=f"Step {t}, after the copy")]


def _before(replay: Replay, now: Snapshot, family: Sequence[int], copies: Sequence[Copy]) -> Panel:
    """The same step when its blocks were shared, and nothing was copied or written yet."""
    tables = dict(now.table)
    for copy in now.record.plan.copies:
        table = tables[copy.request]
        tables[copy.request] = (*table[: copy.entry], copy.source, *table[copy.entry + 1 :])
    earlier = replay.after(now.index - 1).computed if now.index else dict.fromkeys(tables, 0)
    computed = dict(earlier)
    for parent, child in now.record.forked:
        computed[child] = computed.get(parent, 0)
    for chunk in now.chunks:
        computed[chunk.request] = max(computed.get(chunk.request, 0), chunk.cached)
    tokens: dict[int, int] = {}
    size = replay.block_size
    for r, table in tables.items():
        for i, block in enumerate(table):
            tokens[block] = max(tokens.get(block, 0), min(max(computed.get(r, 0) - i * size, 0), size))
    refs = {block: len(who) for block, who in owners(tables).items()}
    mine = {r: tables[r] for r in family if tables[r]}
    granted = now.new_blocks - {copy.destination for copy in now.record.plan.copies}
    return Panel(f"Step {now.index}, before the copy", mine, tokens, refs, granted)


def _base(grid: Grid, row: int, top: float) -> float:
    """Foot of the squares in one row of a panel that begins `top` px below the first."""
    return -grid.tokens(top + BETWEEN + CAPTION + grid.side + row * (grid.cell + CAPTION))


def _squares(grid: Grid, panel: Panel, left: float, top: float, skipped: int) -> list[Square]:
    held = owners(panel.table)
    return [
        Square(
            left + i, _base(grid, row, top), block, panel.tokens[block], held[block], panel.refs[block],
            block in panel.new,
        )
        for row, table in enumerate(panel.table.values())
        for i, block in enumerate(table[skipped:])
    ]  # fmt: skip


def _labels(
    figure: "go.Figure", grid: Grid, palette: Palette, panel: Panel, left: float, top: float, skipped: int
) -> None:
    """The panel's heading, and each row's request."""
    figure.add_annotation(
        text=f"<b>{panel.heading}</b>", x=left - 0.9 - 0.5, y=-grid.tokens(top), xanchor="left", yanchor="top",
        showarrow=False, font={"size": 13, "color": INK},
    )  # fmt: skip
    for row, request in enumerate(panel.table):
        style = palette.styles[request]
        figure.add_annotation(
            text=f"<b>{style.label}</b>" + (" …" if skipped else ""), x=left - 0.6, xanchor="right",
            y=_base(grid, row, top) + grid.size / 2, showarrow=False, font={"size": 14, "color": style.edge},
        )  # fmt: skip


def _arrows(figure: "go.Figure", grid: Grid, panel: Panel, left: float, top: float, skipped: int) -> None:
    """From the block that was shared, where it still is, to each copy of it."""
    rows = {request: row for row, request in enumerate(panel.table)}
    x: list[float | None] = []
    y: list[float | None] = []
    for copy in (copy for copy in panel.copies if copy.request in rows and copy.entry >= skipped):
        edge = left + copy.entry - skipped + grid.width / 2
        kept = [row for r, row in rows.items() if copy.entry < len(panel.table[r])
                and panel.table[r][copy.entry] == copy.source]  # fmt: skip
        begin, end = (
            _base(grid, row, top) + grid.size * level
            for row, level in ((kept[0] if kept else rows[copy.request], 0.4), (rows[copy.request], 0.5))
        )
        turn = edge + 0.32
        x += [edge, turn, turn, edge + 0.03, None]
        y += [begin, begin, end, end, None]
        figure.add_annotation(
            x=turn + 0.1, y=end, text=f"copy of {copy.source}", showarrow=False, xanchor="left", bgcolor=PAPER,
            font={"size": 12, "color": INK},
        )  # fmt: skip
    if x:
        figure.add_scatter(
            name="copies", x=x, y=y, mode="lines+markers", line={"color": INK, "width": 1.6}, hoverinfo="skip",
            marker={"symbol": "arrow", "angleref": "previous", "size": [0, 0, 0, 12, 0] * (len(x) // 5), "color": INK},
        )  # fmt: skip


def _words(lines: Sequence[Sequence[Panel]], shown: Sequence[int], palette: Palette) -> tuple[str, str, str]:
    """Title, subtitle and text alternative."""
    copying = [(t, line) for t, line in zip(shown, lines, strict=True) if line[-1].copies]
    last = lines[-1][-1]
    shared = sorted({b for table in last.table.values() for b in table if last.refs[b] > 1})
    if copying:
        t, (before, after) = copying[0]
        sources = list(dict.fromkeys(copy.source for copy in after.copies))
        if len(sources) == 1:
            whose = palette.name([copy.request for copy in after.copies])
            fall = f"its references fall from {before.refs[sources[0]]} to {after.refs[sources[0]]}"
            title = f"Step {t}: block {sources[0]} is copied for {whose}; {fall}"
        else:
            title = f"Step {t}: {counted(len(after.copies))} are copied before a write"
    else:
        title = f"Step {shown[-1]}: {palette.name(list(last.table))} share {counted(len(shared))}"
    some = f"block{'s' * (len(shared) > 1)} {listed(shared)}" if len(shared) <= 6 else counted(len(shared))
    stay = f"still shared: {some}" if shared else "nothing is shared any more"
    saved = sum(len(table) for table in last.table.values()) - len({b for t in last.table.values() for b in t})
    stay += f"; {counted(saved)} saved by sharing" if saved else ""
    alt = " ".join(
        f"{panel.heading}: "
        + "; ".join(
            f"{palette.styles[r].label} has " + ", ".join(f"block {b} ({panel.refs[b]})" for b in table)
            for r, table in panel.table.items()
        )
        + "."
        for line in lines
        for panel in line
    )
    return title, stay, f"Block tables with references. {alt}"
