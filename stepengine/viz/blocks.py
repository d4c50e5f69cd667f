"""The pool of K/V blocks: who holds which one at which step, and how a block table leads there."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stepengine.errors import TraceError
from stepengine.trace import Replay, Snapshot, Trace
from stepengine.viz.grid import (
    KEY,
    LEFT,
    RIGHT,
    WIDTH,
    Data,
    Grid,
    Palette,
    Square,
    add_free,
    add_note,
    add_numbers,
    add_squares,
    counted,
    fit_axes,
    grid_of,
    listed,
    picture,
    pool,
)
from stepengine.viz.template import GREY, INK, PAPER, QUIET, new_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

FRAMES = 12  # steps shown where none are asked for
SQUARES = 1500  # drawn in all frames together: what keeps a figure small
TOP = 84  # px, for the titles


def block_map(
    trace: Trace, steps: Sequence[int] | None = None, selected: Sequence[int] = (), start: int | None = None
) -> "go.Figure":
    """The physical pool as a grid of squares that fill from the bottom with tokens, and a slider over steps.

    Colour and letter name the holder; a shared block is split between its holders and carries the number of
    references; hatched is reserved, but empty; a dark outline is what was taken in this step. `steps` (negative
    ones count from the end) are the slider's places: by default those where blocks change hands, at most `FRAMES`. The
    figure opens at step `start`, by default the one with most blocks in use. `selected` as in `request_style`.
    """
    replay = Replay(trace)
    grid, palette = grid_of(replay), Palette(trace, selected)
    shown = _places(replay, grid, steps, start)
    pictures = [picture(grid, palette, pool(replay.at(t), grid)) for t in shown]
    rows = [(f"Step {t}: {change(replay, t, palette)}", _use(replay.at(t), grid)) for t in shown]
    opens = shown.index(start % len(replay)) if start is not None else _fullest(replay, shown)
    bottom = 84 if len(shown) > 1 else 40
    figure = new_figure(
        *rows[opens],
        f"The pool of {grid.blocks} blocks of {grid.size} tokens. " + " ".join(f"{a}. {b}." for a, b in rows),
        height=round(TOP + grid.height + bottom),
        width=WIDTH,
        margin={"l": LEFT, "r": RIGHT, "t": TOP, "b": bottom},
    )
    add_free(figure, grid)
    add_squares(figure, grid, palette, pictures[opens])
    add_numbers(figure, grid)
    fit_axes(figure, grid, above=0, below=grid.height)
    add_note(figure, f"pale: free · {KEY}" + (" · slider: step" if len(shown) > 1 else ""), 8)
    if len(shown) > 1:
        _slider(figure, shown, opens, [_frame(*parts) for parts in zip(shown, pictures, rows, strict=True)])
    return figure


def block_arrows(trace: Trace, request: int, step: int | None = None) -> "go.Figure":
    """One request's block table at a step: its logical blocks in a row, each with an arrow to its physical block.

    `step` (negative counts from the end) is by default the last one in which the request holds blocks; what others
    hold is grey. TraceError where it holds none.
    """
    replay = Replay(trace)
    grid, palette = grid_of(replay), Palette(trace, (request,), only=request)
    now = _holding(replay, request, step)
    table, computed = now.table[request], now.computed[request]
    logical = grid._replace(blocks=len(table))
    room = 56.0  # px between the table and the pool, for the arrows
    lift = logical.height + room
    above = [
        Square(
            grid.x(i + 1), logical.base(i + 1) + grid.tokens(lift), block,
            min(max(computed - i * grid.size, 0), grid.size), (request,), 1, block in now.new_blocks,
        )
        for i, block in enumerate(table)
    ]  # fmt: skip
    below = [square._replace(new=square.new and request in square.holders) for square in pool(now, grid)]
    label = palette.styles[request].label
    owner = palette.name([request])
    empty = len(table) * grid.size - computed
    where = f"physical block{'s' * (len(table) > 1)} {listed(table)}" if len(table) <= 8 else "the pool, in any order"
    figure = new_figure(
        f"{owner[0].upper()}{owner[1:]}: {len(table)} logical block{'s' * (len(table) > 1)} in {where}",
        f"step {now.index}: {computed:,} tokens in blocks of {grid.size}; "
        + (f"the last block has room for {empty} more" if empty else "no room is left over"),
        f"Block table of request {label} at step {now.index}, logical to physical: "
        + ", ".join(f"{i} to {block}" for i, block in enumerate(table)) + f". {empty} of "
        f"{len(table) * grid.size} token places are empty.",
        height=round(TOP + 24 + lift + grid.height + 62),
        width=WIDTH,
        margin={"l": LEFT, "r": RIGHT, "t": TOP, "b": 40},
    )  # fmt: skip
    add_free(figure, grid)
    add_squares(figure, grid, palette, picture(grid, palette, above + below))
    add_numbers(figure, grid, below=True)
    _arrows(figure, grid, table, above, palette.styles[request].edge)
    figure.add_annotation(
        text=f"<b>Logical blocks</b> of {owner}, in order; arrows lead to the <b>physical blocks</b>", x=0,
        xref="paper", xanchor="left", y=grid.tokens(lift), yanchor="bottom", showarrow=False,
        font={"size": 13, "color": INK},
    )  # fmt: skip
    fit_axes(figure, grid, above=lift + 24, below=grid.height + 20)
    add_note(figure, f"pale: free · grey: others' · {KEY}", 8)
    return figure


def _arrows(figure: "go.Figure", grid: Grid, table: Sequence[int], above: Sequence[Square], color: str) -> None:
    """From the foot of each logical block to the head of its physical one."""
    x = [value for square in above for value in (square.x, grid.x(square.block), None)]
    y = [value for s in above for value in (s.base, grid.base(s.block) + grid.size * 1.03, None)]
    words = [
        f"logical block {i} is block {block}: tokens {i * grid.size} to {(i + 1) * grid.size - 1} go to slots "
        f"{block * grid.size} to {(block + 1) * grid.size - 1}"
        for i, block in enumerate(table)
    ]
    figure.add_scatter(
        name="block table", x=x, y=y, mode="lines+markers", line={"color": color, "width": 1.5},
        marker={"symbol": "arrow", "angleref": "previous", "size": [0, 11, 0] * len(table), "color": color},
        hovertext=[text for text in words for _ in range(3)], hoverinfo="text", cliponaxis=False,
    )  # fmt: skip
    numbers = [str(i) for i in range(len(table))]
    figure.add_scatter(
        name="logical numbers", x=[s.x for s in above], y=[s.base + grid.size for s in above], text=numbers,
        mode="text", textposition="top center", textfont={"size": 11, "color": QUIET}, hoverinfo="skip",
        cliponaxis=False,
    )  # fmt: skip


def _holding(replay: Replay, request: int, step: int | None) -> Snapshot:
    """The snapshot to draw, in which the request holds blocks."""
    if request not in replay.trace.requests:
        raise TraceError(f"Request {request} is not in this trace, which holds {len(replay.trace.requests)} requests.")
    if step is not None:
        now = replay.at(step)
        if now.table[request]:
            return now
    held = [now.index for now in replay if now.table[request]]
    if not held or step is not None:
        told = f"it does in steps {held[0]} to {held[-1]}" if held else "it never does in this trace"
        raise TraceError(f"Request {request} holds no blocks in step {step if held else 'any'}; {told}.")
    return replay.at(held[-1])


def _places(replay: Replay, grid: Grid, steps: Sequence[int] | None, start: int | None) -> list[int]:
    """The steps to show, in order and without repeats."""
    last = len(replay)
    asked = [*(steps or ()), *([start] if start is not None else [])]
    for t in asked:
        if not -last <= t < last:
            raise TraceError(f"Step {t} is not in this trace, which has {last} steps (0 to {last - 1}).")
    if steps is not None and len(steps):
        return sorted({t % last for t in asked})
    most = min(FRAMES, max(6, SQUARES // grid.blocks))
    if last <= most:
        return list(range(last))
    rare, common = [], []
    for t, record in enumerate(replay.trace.steps):
        plan = record.plan
        if plan.copies or plan.preempted or plan.swapped_in or plan.swapped_out or record.forked or record.aborted:
            rare.append(t)
        elif record.finished or any(chunk.blocks for chunk in plan.chunks):
            common.append(t)
    kept = {0, last - 1, *(t % last for t in asked), _fullest(replay, range(last))}
    for found in (rare, common, list(range(last))):
        found = [t for t in found if t not in kept]
        room = min(most - len(kept), len(found))
        kept |= {found[i * len(found) // room] for i in range(room)} if room > 0 else set()
    return sorted(kept)


def _fullest(replay: Replay, steps: Sequence[int]) -> int:
    """Place among `steps` of the first with the most blocks in use and, of those, the most tokens."""
    use = [(len(now.refs), sum(now.block_tokens.values())) for now in map(replay.at, steps)]
    return use.index(max(use))


def _use(now: Snapshot, grid: Grid) -> str:
    used, held = len(now.refs), sum(now.block_tokens.values())
    filled = f", {100 * held / (used * grid.size):.0f} % of their room filled" if used else ""
    shared = sum(refs > 1 for refs in now.refs.values())
    return f"{used} of {counted(grid.blocks)} in use{filled}" + (f", {shared} shared" if shared else "")


def change(replay: Replay, t: int, palette: Palette, most: int = 2) -> str:
    """What happened to blocks in step t, in few words; `most` parts of it, the rarest first."""
    now, before = replay.at(t), replay.after(t - 1) if t > 0 else None
    plan, parts = now.record.plan, []
    held = before.table if before is not None else {}
    for parent, child in now.record.forked:
        parts.append(f"{palette.name([child])} splits off {palette.name([parent])}")
    for request in plan.preempted:
        parts.append(f"{palette.name([request])} gives back {counted(len(held.get(request, ())))}")
    for swap in plan.swapped_out:
        parts.append(f"{palette.name([swap.request])} moves {counted(len(swap.pairs))} to the host")
    for swap in plan.swapped_in:
        parts.append(f"{palette.name([swap.request])} brings {counted(len(swap.pairs))} back from the host")
    if plan.copies:
        copies = [f"block {copy.source} is copied to {copy.destination}" for copy in plan.copies]
        parts.append(copies[0] if len(copies) == 1 else f"{len(copies)} blocks are copied before a write")
    shares = [(chunk.request, set(chunk.blocks) & now.hit_blocks) for chunk in plan.chunks]
    for request, hits in [(r, hits) for r, hits in shares if hits]:
        parts.append(f"{palette.name([request])} shares {counted(len(hits))}")
    takers = {c.request: [b for b in c.blocks if b in now.new_blocks] for c in plan.chunks}
    takers = {request: blocks for request, blocks in takers.items() if blocks}
    if takers:
        blocks = [block for taken in takers.values() for block in taken]
        who = list(takers)
        name = palette.name(who) if len(who) <= 3 else f"{len(who)} requests"
        what = f"block {blocks[0]}" if len(blocks) == 1 else f"{len(blocks)} blocks"
        parts.append(f"{name} take{'s' if len(who) == 1 else ''} {what}")
    ended = [request for request, _ in now.record.finished]
    if ended:
        name = palette.name(ended) if len(ended) <= 3 else f"{len(ended)} requests"
        parts.append(f"{name} end{'s' if len(ended) == 1 else ''}")
    if not parts:
        return "no block changes hands"
    return "; ".join(parts[:most]) + (f"; and {len(parts) - most} more" if len(parts) > most else "")


def _frame(t: int, data: Data, row: tuple[str, str]) -> dict[str, Any]:
    """Only what differs between steps: the page keeps the rest of each trace."""
    traces = []
    for values in data.values():
        changed: dict[str, Any] = {"type": "scatter" if "text" in values else "bar", **values}
        if "colors" in changed:
            changed["marker"] = {"color": changed.pop("colors")}
        traces.append(changed)
    return {
        "name": str(t),
        "traces": list(range(1, len(traces) + 1)),
        "data": traces,
        "layout": {"title": {"text": row[0], "subtitle": {"text": row[1]}}},
    }


def _slider(figure: "go.Figure", shown: Sequence[int], opens: int, frames: Sequence[dict[str, Any]]) -> None:
    figure.frames = frames
    jump = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    figure.update_layout(
        sliders=[{
            "active": opens, "x": 0, "len": 1, "y": 0, "yanchor": "top", "pad": {"t": 34, "b": 0},
            "currentvalue": {"visible": False}, "bgcolor": PAPER, "activebgcolor": GREY, "bordercolor": GREY,
            "tickcolor": GREY, "font": {"size": 11, "color": QUIET},
            "steps": [{"label": str(t), "method": "animate", "args": [[str(t)], jump]} for t in shown],
        }]
    )  # fmt: skip
