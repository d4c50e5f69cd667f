"""The tree of cached prefixes, what was found in it over a run, and what a find is worth."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from stepengine.errors import TraceError
from stepengine.trace import Replay, Snapshot, Trace, request_metrics
from stepengine.viz.grid import (
    FREE,
    HATCH,
    WIDTH,
    Grid,
    Palette,
    Square,
    add_note,
    add_squares,
    counted,
    grid_of,
    listed,
    owners,
    picture,
    reals,
    wholes,
)
from stepengine.viz.template import GREY, HUES, INK, PAPER, QUIET, dressed, new_figure, readable

if TYPE_CHECKING:
    import plotly.graph_objects as go

LEFT, LABELS, TOP, FOOT = 52, 190, 92, 40  # px: the root; words right of the rows; title and columns' heads; key
ROW = 24  # px between two rows of squares: a number, and room for the eye
NARROW, WIDE, GAP, ROOT = 18.0, 62.0, 17.0, 18.0  # px of a column, at least and at most; between squares; to the root
LONGEST = 12  # columns that are drawn before what does not branch is folded
ROWS = 16  # leaves that fit on a page
COLUMNS = 28  # that fit


class Node(NamedTuple):
    """One block's worth of tokens after one beginning, however many blocks hold it."""

    beginning: int  # in `Replay.beginnings`
    parent: int  # another node's beginning, or -1 - the number of a cache namespace
    depth: int  # blocks before it
    row: int
    blocks: tuple[int, ...]  # that hold it; () where all are gone and something after it is still there
    holders: tuple[int, ...]
    refs: int
    kept: bool  # nobody holds it
    found: bool  # on the request's path, taken over
    new: bool  # on the request's path, computed in this step

    @property
    def looks(self) -> tuple[object, ...]:
        """What its neighbours must share with it to be folded into one."""
        return self.row, self.holders, self.refs, self.kept, self.found, self.new, len(self.blocks)


def prefix_tree(trace: Trace, step: int = -1, request: int | None = None) -> "go.Figure":
    """The tree of blocks that can be found at `step`: who holds them, how many references, what is kept without any.

    A column is one whole block of tokens, a row one way to go on; blocks that are not full are in no tree. With a
    `request` that starts in this step its path is drawn: the blocks it found, and those it adds. TraceError where
    nothing is cached, or the request does not start in the step.
    """
    replay = Replay(trace)
    grid = grid_of(replay)
    if not replay.prefix_caching:
        raise TraceError(
            f"Stage {trace.meta.get('stage', '?')} finds no prefix again: there is no tree to draw; record the run at "
            "stage '4b' or 4."
        )
    now = replay.at(step)
    nodes = tree_of(replay, now, request)
    if not nodes:
        raise TraceError(f"In step {now.index} no whole block is cached yet: there is no tree to draw.")
    columns, folded = _columns(nodes)
    cell = min(WIDE, max(NARROW, (WIDTH - LEFT - LABELS) / len(columns)))
    side = cell - (GAP if cell > 36 else 8)
    grid = grid._replace(columns=len(columns), cell=cell, side=side, caption=0)
    rows = 1 + max(node.row for node in nodes)
    palette = Palette(trace)
    title, subtitle = _tree_words(trace, now, palette, request)
    height = TOP + rows * (side + ROW) + FOOT
    figure = new_figure(
        title, subtitle, _alt(nodes, palette), height=round(height), width=WIDTH,
        margin={"l": 0, "r": 0, "t": TOP, "b": FOOT},
    )  # fmt: skip
    place = {depth: x for x, depths in enumerate(columns) for depth in depths}
    shown = [node for node in nodes if node.depth not in folded]
    _links(figure, grid, nodes, place, palette, request, now)
    _kept(figure, grid, replay, shown, place, palette)
    squares = [
        Square(place[n.depth], _base(grid, n.row), n.blocks[0], grid.size, n.holders, n.refs, n.new)
        for n in shown
        if n.blocks and not n.kept
    ]
    add_squares(figure, grid, palette, picture(grid, palette, squares))
    texts = {n.blocks[0]: _hover(replay, n, palette) for n in shown if n.blocks and not n.kept}
    hover = [texts[square.block] for square in squares for _ in square.holders]
    figure.update_traces(selector={"name": "tokens"}, hovertext=hover, hovertemplate="%{hovertext}<extra></extra>")
    _captions(figure, grid, columns, nodes, place)
    _wedges(figure, grid, shown, place)
    _ends(figure, grid, replay, now, nodes, place, palette, request)
    figure.update_xaxes(visible=False, range=[-(LEFT / cell) - 0.5, (WIDTH - LEFT) / cell - 0.5])
    figure.update_yaxes(visible=False, range=[-grid.tokens(height - TOP - FOOT), 0])
    hidden = len(set(now.holds.values()) - {node.beginning for node in nodes})
    add_note(figure, _key(nodes) + f" · {counted(hidden)} more, not drawn" * bool(hidden), 10)
    figure.layout.annotations[-1].xshift = 12
    return figure


def tree_of(replay: Replay, now: Snapshot, request: int | None = None) -> list[Node]:
    """The nodes of the tree at one moment, a parent before its children, rows from the top."""
    found, new = _path(replay, now, request)
    blocks: dict[int, list[int]] = {}
    for block, beginning in sorted(now.holds.items()):
        blocks.setdefault(beginning, []).append(block)
    for beginning in list(blocks):
        while beginning >= 0:
            blocks.setdefault(beginning, [])
            beginning = replay.beginnings[beginning][0]
    below: dict[int, list[int]] = {}
    for beginning in sorted(blocks):
        below.setdefault(replay.beginnings[beginning][0], []).append(beginning)
    below = _pruned(below, now, blocks, found | new)
    held = owners(now.table)
    nodes: list[Node] = []
    row = -1

    def visit(beginning: int, depth: int) -> None:
        mine = tuple(blocks[beginning])
        holders = tuple(dict.fromkeys(r for block in mine for r in held.get(block, ())))
        refs = sum(now.refs.get(block, 0) for block in mine)
        nodes.append(
            Node(
                beginning, replay.beginnings[beginning][0], depth, row, mine, holders, refs, not refs,
                beginning in found, beginning in new,
            )
        )  # fmt: skip

    stack = [(b, 0, True) for root in sorted(k for k in below if k < 0) for b in reversed(below[root])]
    while stack:
        beginning, depth, turns = stack.pop()
        row += turns
        visit(beginning, depth)
        children = below.get(beginning, [])
        stack += [(child, depth + 1, place > 0) for place, child in reversed(list(enumerate(children)))]
    return nodes


def _pruned(
    below: dict[int, list[int]], now: Snapshot, blocks: Mapping[int, Sequence[int]], path: set[int]
) -> dict[int, list[int]]:
    """At most `ROWS` leaves with all before them: those of the path first, then held ones, then the oldest."""
    parents = {child: parent for parent, children in below.items() for child in children}
    leaves = [beginning for beginning in parents if beginning not in below]
    if len(leaves) <= ROWS:
        return below
    wanted: set[int] = set()
    for leaf in sorted(
        leaves, key=lambda b: (b not in path, not any(now.refs.get(block) for block in blocks[b]), b)
    )[:ROWS]:  # fmt: skip
        while leaf >= 0:
            wanted.add(leaf)
            leaf = parents[leaf]
    return {
        parent: mine for parent, children in below.items() if (mine := [child for child in children if child in wanted])
    }


def _path(replay: Replay, now: Snapshot, request: int | None) -> tuple[set[int], set[int]]:
    """The beginnings that a request took over in this step, and those that it added."""
    if request is None:
        return set(), set()
    chunk = next((chunk for chunk in now.chunks if chunk.request == request), None)
    if chunk is None or not chunk.blocks:
        starts = [
            t
            for t, record in enumerate(replay.trace.steps)
            if any(chunk.request == request and chunk.blocks for chunk in record.plan.chunks)
        ]
        said = f"it starts in step {starts[0]}" if starts else "it never starts"
        raise TraceError(f"Request {request} takes no blocks in step {now.index}, so it has no path there; {said}.")
    size, table = replay.block_size, now.table[request]
    taken, filled = table[: chunk.cached // size], table[max(chunk.start, chunk.cached) // size : chunk.end // size]
    return (
        {now.holds[block] for block in taken if block in now.holds},
        {now.holds[block] for block in filled if block in now.holds},
    )


def _columns(nodes: Sequence[Node]) -> tuple[list[list[int]], set[int]]:
    """Which depths stand in which column, and which of them are folded into a few dots."""
    deepest = 1 + max(node.depth for node in nodes)
    if deepest <= LONGEST:
        return [[depth] for depth in range(deepest)], set()
    columns = _folded(_dull(nodes, deepest), deepest)
    if len(columns) > COLUMNS:
        columns = _folded(_straight(nodes, deepest), deepest)
    if len(columns) > COLUMNS:
        raise TraceError(
            f"The tree branches at so many depths that it needs {len(columns)} columns, and {COLUMNS} fit on a page; "
            "draw an earlier step, or a run with larger blocks."
        )
    return columns, {depth for depths in columns if len(depths) > 1 for depth in depths}


def _dull(nodes: Sequence[Node], deepest: int) -> set[int]:
    """Depths at which every block looks like the one before it and the one after it."""
    by_beginning = {node.beginning: node for node in nodes}
    dull = set(range(1, deepest - 1))
    for node in nodes:
        above = by_beginning.get(node.parent)
        if above is None or above.looks != node.looks:
            dull -= {node.depth, node.depth - 1}
    rows = [{node.row for node in nodes if node.depth == depth} for depth in range(deepest)]
    return {depth for depth in dull if rows[depth] == rows[depth + 1]}  # where a row ends, its last block is seen


def _straight(nodes: Sequence[Node], deepest: int) -> set[int]:
    """Depths at which nothing branches, and no path goes from what is found to what is new."""
    by_beginning = {node.beginning: node for node in nodes}
    straight = set(range(1, deepest - 1))
    for node in nodes:
        above = by_beginning.get(node.parent)
        if above is None or above.row != node.row or above.found != node.found:
            straight -= {node.depth, node.depth - 1}
    return straight


def _folded(dull: set[int], deepest: int) -> list[list[int]]:
    """Columns of depths: neighbours that are dull share one."""
    columns: list[list[int]] = []
    for depth in range(deepest):
        if depth in dull and columns and columns[-1][-1] in dull:
            columns[-1].append(depth)
        else:
            columns.append([depth])
    return columns


def _base(grid: Grid, row: int) -> float:
    """Foot of the squares in a row."""
    return -grid.tokens(row * (grid.side + ROW) + ROW - 4 + grid.side)


def _middle(grid: Grid, row: int) -> float:
    return _base(grid, row) + grid.size / 2


def _links(
    figure: "go.Figure", grid: Grid, nodes: Sequence[Node], place: Mapping[int, int], palette: Palette,
    request: int | None, now: Snapshot,
) -> None:  # fmt: skip
    """Thin lines from each block to those that continue it; a thick one along the request's path."""
    by_beginning = {node.beginning: node for node in nodes}
    half = grid.width / 2

    def line(node: Node) -> tuple[list[float | None], list[float | None]]:
        above = by_beginning.get(node.parent)
        begin = place[above.depth] + half if above is not None else -0.5 - ROOT / grid.cell
        top = _middle(grid, above.row if above is not None else 0)
        bend, end = place[node.depth] - half - 0.5 * (1 - grid.width), place[node.depth] - half
        if above is None:
            bend = begin
        level = _middle(grid, node.row)
        return [begin, bend, bend, end, None], [top, top, level, level, None]

    plain, path = [node for node in nodes], [node for node in nodes if node.found or node.new]
    for name, some, color, width in (
        ("continues", plain, GREY, 1.2),
        ("path", path, palette.styles[request].edge if request is not None else INK, 5),
    ):
        if some:
            pairs = [line(node) for node in some]
            figure.add_scatter(
                name=name, mode="lines", line={"color": color, "width": width}, hoverinfo="skip",
                x=[x for xs, _ in pairs for x in xs], y=[y for _, ys in pairs for y in ys],
            )  # fmt: skip
    figure.add_scatter(
        name="root", x=[-0.5 - ROOT / grid.cell], y=[_middle(grid, 0)], mode="markers", hoverinfo="text",
        marker={"size": 10, "color": PAPER, "line": {"color": INK, "width": 2}}, text=["every prompt begins here"],
        cliponaxis=False,
    )  # fmt: skip


def _hover(replay: Replay, node: Node, palette: Palette) -> str:
    """Who holds a block, and its text where the trace can tell it."""
    tokenizer, tokens = replay.trace.tokenizer, replay.beginnings[node.beginning][1]
    who = f"held by {palette.name(node.holders)}" if node.holders else "nobody holds it, its K/V are kept"
    said = f"block {listed(node.blocks)}: {who}"
    if tokenizer is None:
        return said
    text = escape(tokenizer.decode(list(tokens)).replace("\n", " ⏎ "))
    return f"{said}<br>“{text}”"


def _kept(
    figure: "go.Figure", grid: Grid, replay: Replay, nodes: Sequence[Node], place: Mapping[int, int], palette: Palette
) -> None:
    """Pale squares with a dotted edge: their K/V are there, and nobody holds them."""
    kept = [node for node in nodes if node.kept and node.blocks]
    if not kept:
        return
    figure.add_bar(
        name="kept", x=reals(place[n.depth] for n in kept), base=reals(_base(grid, n.row) for n in kept),
        y=wholes(grid.size for _ in kept), width=grid.width, marker=FREE,
        customdata=wholes(n.blocks[0] for n in kept),
        hovertext=[_hover(replay, n, palette) for n in kept], hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip
    half = grid.width / 2
    x = [v for n in kept for v in (*(place[n.depth] + s * half for s in (-1, 1, 1, -1, -1)), None)]
    y = [v for n in kept for v in (*(_base(grid, n.row) + s * grid.size for s in (0, 0, 1, 1, 0)), None)]
    figure.add_scatter(
        name="kept, outline", x=x, y=y, mode="lines", line={"color": QUIET, "width": 1.6, "dash": "dot"},
        hoverinfo="skip",
    )  # fmt: skip


def _captions(
    figure: "go.Figure", grid: Grid, columns: Sequence[Sequence[int]], nodes: Sequence[Node], place: Mapping[int, int]
) -> None:
    """The blocks' numbers above them, and above each column the tokens that it stands for."""
    wide = grid.side >= 26
    folded = {depth for depths in columns if len(depths) > 1 for depth in depths}
    named = [node for node in nodes if node.blocks and node.depth not in folded]
    figure.add_scatter(
        name="block numbers", x=[place[n.depth] for n in named], y=[_base(grid, n.row) + grid.size for n in named],
        text=[str(n.blocks[0]) + (f" +{len(n.blocks) - 1}" if len(n.blocks) > 1 else "") for n in named],
        mode="text", textposition="top center",
        textfont={"size": 11, "color": QUIET}, hoverinfo="skip", cliponaxis=False,
    )  # fmt: skip
    size = grid.size
    figure.add_annotation(
        x=-LEFT / grid.cell - 0.5, xshift=12, y=1, yref="paper", text="tokens", showarrow=False, yanchor="bottom",
        xanchor="left", font={"size": 11, "color": QUIET},
    )  # fmt: skip
    for x, depths in enumerate(columns):
        if len(depths) > 1:
            text = f"{len(depths)} blocks" if grid.cell > 40 else ""
        elif wide:
            text = f"{depths[0] * size + 1}–{(depths[0] + 1) * size}" if size > 1 else str(depths[0] + 1)
        else:
            text = str((depths[0] + 1) * size) if x % 2 == 0 else ""
        figure.add_annotation(
            x=x, y=1, yref="paper", text=text, showarrow=False, yanchor="bottom", xanchor="center",
            font={"size": 11, "color": QUIET},
        )  # fmt: skip
    for x, depths in enumerate(columns):
        if len(depths) > 1:
            for row in sorted({node.row for node in nodes if node.depth == depths[0]}):
                figure.add_annotation(
                    x=x, y=_middle(grid, row), text="<b>···</b>", showarrow=False, bgcolor=PAPER, font={"color": INK},
                )  # fmt: skip


def _wedges(figure: "go.Figure", grid: Grid, nodes: Sequence[Node], place: Mapping[int, int]) -> None:
    found = [node for node in nodes if node.found]
    if found:
        figure.add_scatter(
            name="found", x=[place[n.depth] - grid.width / 2 - 6 / grid.cell for n in found],
            y=[_middle(grid, n.row) for n in found],
            mode="markers", hoverinfo="skip", cliponaxis=False,
            marker={
                "symbol": "triangle-right", "size": 14, "color": INK, "line": {"color": PAPER, "width": 1},
            },
        )  # fmt: skip


def _ends(
    figure: "go.Figure", grid: Grid, replay: Replay, now: Snapshot, nodes: Sequence[Node], place: Mapping[int, int],
    palette: Palette, request: int | None,
) -> None:  # fmt: skip
    """Right of each row: who goes on from there, with what is in no whole block yet."""
    last: dict[int, Node] = {}
    for node in nodes:
        last[node.row] = node
    ends: dict[int, list[int]] = {}
    by_block = {block: node for node in nodes for block in node.blocks}
    for r, table in now.table.items():
        sealed = [block for block in table if block in by_block]
        if sealed:
            ends.setdefault(by_block[sealed[-1]].beginning, []).append(r)
    for node in nodes:
        words = [_end_words(replay, now, node, r, palette, r == request) for r in ends.get(node.beginning, ())]
        if not words and last[node.row] is node:
            words = [f"<span style='color:{QUIET}'>kept, nobody holds it</span>"]
        if words and last[node.row] is node:
            figure.add_annotation(
                x=place[node.depth] + grid.width / 2, y=_middle(grid, node.row), text="<br>".join(words), xshift=8,
                showarrow=False, xanchor="left", align="left", font={"size": 12, "color": INK},
            )  # fmt: skip


def _end_words(replay: Replay, now: Snapshot, node: Node, r: int, palette: Palette, chosen: bool) -> str:
    style = palette.styles[r]
    rest = now.computed[r] - (node.depth + 1) * replay.block_size
    name = f"<b><span style='color:{style.edge}'>{style.label}</span></b>"
    if rest <= 0:
        return f"{name} ends here"
    return f"{name} + {rest} token{'s' * (rest > 1)}, block not full"


def _tree_words(trace: Trace, now: Snapshot, palette: Palette, request: int | None) -> tuple[str, str]:
    shared = sum(now.refs.get(block, 0) > 1 for block in now.holds)
    kept = len(now.kept_blocks)
    gone = f" · {counted(len(now.evicted_blocks))} given up in this step" if now.evicted_blocks else ""
    state = f"{counted(len(now.holds))} can be found, {shared} shared, {kept} kept without a holder"
    if request is None:
        return f"Step {now.index}: {state}", f"one column is one whole block, one row a way to go on{gone}"
    chunk = next(chunk for chunk in now.chunks if chunk.request == request)
    who = palette.name([request])
    whole = max(chunk.end, len(trace.requests[request].prompt_ids))
    title = f"{who} finds {chunk.cached or 'none'} of its {whole} tokens and computes {chunk.length}"
    title += " in this step" * (chunk.end < whole)
    return title, f"step {now.index}: {state}{gone}"


def _key(nodes: Sequence[Node]) -> str:
    parts = ["circle: references" if any(n.refs > 1 for n in nodes) else ""]
    parts += ["wedge: found" if any(n.found for n in nodes) else ""]
    parts += ["dark outline: computed now" if any(n.new for n in nodes) else ""]
    parts += ["dotted: kept, without a holder" if any(n.kept for n in nodes) else ""]
    parts += ["+1: others hold the same" if any(len(n.blocks) > 1 for n in nodes) else ""]
    return " · ".join(part for part in parts if part)


def _alt(nodes: Sequence[Node], palette: Palette) -> str:
    said = []
    for node in nodes:
        who = palette.name(node.holders) if node.holders else "nobody"
        state = " found now" * node.found + " new" * node.new
        said.append(f"depth {node.depth}: block {', '.join(map(str, node.blocks)) or 'gone'} held by {who}{state}")
    return "Tree of cached blocks. " + "; ".join(said) + "."


class Counts(NamedTuple):
    """What became of the prompt tokens of one request, or of one step."""

    label: str
    found: int  # tokens
    computed: int
    evicted: int  # tokens that could be found, and were given up to make room


def prefix_counts(trace: Trace, by: str = "request") -> list[Counts]:
    """Prompt tokens found, computed, and given up for others; `by` "request" (in order of arrival) or "step".

    A request that comes back after a preemption counts again.
    """
    if by not in ("request", "step"):
        raise TraceError(f"by={by!r} is no way to count; use 'request' or 'step'.")
    replay = Replay(trace)
    size, keys = replay.block_size, list(trace.requests) if by == "request" else list(range(len(replay)))
    found, computed, evicted = (dict.fromkeys(keys, 0) for _ in range(3))
    for now in replay:
        for chunk in now.chunks:
            key = chunk.request if by == "request" else now.index
            prompt = len(trace.requests[chunk.request].prompt_ids)
            found[key] += chunk.cached
            computed[key] += max(0, min(chunk.end, prompt) - chunk.start)
            if by == "request":
                evicted[key] += size * len(now.evicted_blocks & set(chunk.blocks))
        if by == "step":
            evicted[now.index] += size * len(now.evicted_blocks)
    styles = Palette(trace).styles
    return [
        Counts(styles[k].label if by == "request" else str(k), found[k], computed[k], evicted[k]) for k in keys
    ]  # fmt: skip


def prefix_hits(trace: Trace, by: str = "request") -> "go.Figure":
    """Prompt tokens found (solid) and computed (hatched), and below the axis what was given up; per request or step."""
    counts = prefix_counts(trace, by)
    found, computed, evicted = (sum(getattr(c, name) for c in counts) for name in ("found", "computed", "evicted"))
    if not found + computed:
        raise TraceError("No prompt has run in this trace: there is nothing to draw. Generate something first.")
    size = int(trace.meta.get("block_size") or 1)
    gone = f"{counted(evicted // size)} given up" if evicted else "nothing is given up"
    share = 100 * found / (found + computed)
    figure = new_figure(
        f"{found:,} of {found + computed:,} prompt tokens are found ({share:.0f} %); {gone}",
        "solid: found · hatched: computed" + " · below the line: kept, then given up to make room" * bool(evicted),
        "Prompt tokens " + "; ".join(
            f"{by} {c.label}: {c.found} found, {c.computed} computed, {c.evicted} given up" for c in counts[:64]
        ) + ".",
        height=340,
    )  # fmt: skip
    x = list(range(len(counts)))
    name = "request" if by == "request" else "step"
    gap = 0.2 if len(x) <= 80 else 0.0
    solid, lost = HUES[2], HUES[5]
    hatch = {"color": PAPER, "line": {"color": QUIET, "width": 1 if gap else 0}, "pattern": HATCH}
    edge = {"color": readable(solid), "width": 1 if gap else 0}
    for what, base, values, marker, words in (
        ("found", [0] * len(x), [c.found for c in counts], {"color": solid, "line": edge}, "found"),
        ("computed", [c.found for c in counts], [c.computed for c in counts], hatch, "computed"),
        ("given up", [0] * len(x), [-c.evicted for c in counts],
         {"color": lost, "line": {"color": readable(lost), "width": 1}}, "given up"),
    ):  # fmt: skip
        some = [i for i in x if values[i]]
        if some:
            figure.add_bar(
                name=what, x=some, base=[base[i] for i in some], y=[values[i] for i in some], width=1 - gap,
                marker=marker, customdata=[[counts[i].label, abs(values[i])] for i in some],
                hovertemplate=f"{name} %{{customdata[0]}}: %{{customdata[1]}} tokens {words}<extra></extra>",
            )  # fmt: skip
    top = max(c.found + c.computed for c in counts)
    low = max(c.evicted for c in counts)
    figure.add_hline(y=0, line={"color": INK, "width": 1})
    ticks = {"tickvals": x, "ticktext": [c.label for c in counts]} if len(x) <= 40 and by == "request" else {}
    figure.update_xaxes(title_text=name if by == "request" else "engine step", range=[-0.8, len(x) - 0.2], **ticks)
    figure.update_yaxes(title_text="tokens", range=[-1.25 * low if low else 0, 1.06 * top])
    if by == "step":
        figure.update_xaxes(tickformat="d", nticks=12)
    return figure


class Find(NamedTuple):
    """One request: the share of its prompt that was found, and what its first token took."""

    request: int
    prompt: int  # tokens
    found: int
    computed: int
    ttft_ms: float

    @property
    def share(self) -> float:
        return self.found / self.prompt


def finds_of(trace: Trace, requests: Sequence[int] | None = None) -> list[Find]:
    """Requests (all by default) that were not preempted before their first token, by prompt length and share found."""
    wanted = set(trace.requests if requests is None else requests)
    ttft = {m.id: m.ttft_ms for m in request_metrics(trace)}
    found: dict[int, int] = dict.fromkeys(wanted, 0)
    seen: set[int] = set()
    for record in trace.steps:
        for chunk in record.plan.chunks:
            if chunk.request in wanted and chunk.request not in seen:
                found[chunk.request] = chunk.cached
                seen.add(chunk.request)
    finds = [
        Find(r, len(trace.requests[r].prompt_ids), found[r], len(trace.requests[r].prompt_ids) - found[r], ms)
        for r in trace.requests
        if r in seen and (ms := ttft[r]) is not None
    ]
    return sorted(finds, key=lambda find: (find.prompt, find.share, find.ttft_ms))


def ttft_by_hits(trace: Trace, requests: Sequence[int] | None = None) -> "go.Figure":
    """Prompt tokens computed (left) and time to the first token (right) against the share of the prompt found.

    One line per length of prompt; of requests with the same length and share the fastest counts. Meant for requests
    that ran alone.
    """
    from plotly.subplots import make_subplots

    finds = finds_of(trace, requests)
    lines: dict[int, list[Find]] = {}
    for find in finds:
        line = lines.setdefault(find.prompt, [])
        if not line or line[-1].found != find.found:
            line.append(find)
    if not any(len(line) > 1 for line in lines.values()):
        raise TraceError(
            "There are no two requests with prompts of one length and different shares found: there is nothing to "
            "compare."
        )
    drawn = [find for line in lines.values() for find in line]
    longest = max(prompt for prompt, line in lines.items() if len(line) > 1)
    least, most = lines[longest][0], lines[longest][-1]
    figure = make_subplots(
        rows=1, cols=2, horizontal_spacing=0.13,
        subplot_titles=("<b>Prompt tokens computed</b>", "<b>Time to first token</b> (ms)"),
    )  # fmt: skip
    for place, (prompt, line) in enumerate(lines.items()):
        hue = HUES[place % len(HUES)]
        for column, values, unit in (
            (1, [f.computed for f in line], "tokens computed"), (2, [f.ttft_ms for f in line], "ms to the first token"),
        ):  # fmt: skip
            figure.add_scatter(
                name=f"prompt of {prompt}", x=[100 * f.share for f in line], y=values, mode="lines+markers",
                line={"color": readable(hue, 3), "width": 2}, row=1, col=column,
                marker={"size": 9, "color": hue, "line": {"color": readable(hue), "width": 1}},
                hovertemplate=f"prompt of {prompt}, %{{x:.0f}} % found: %{{y:.3g}} {unit}<extra></extra>",
            )  # fmt: skip
            figure.add_annotation(
                x=100 * line[0].share, y=values[0], text=f"{prompt:,} tokens", showarrow=False, xanchor="left",
                yanchor="bottom", xshift=8, yshift=-2, font={"color": readable(hue), "size": 12}, row=1, col=column,
            )  # fmt: skip
    times = least.ttft_ms / most.ttft_ms
    title = f"Prompt of {longest:,}: with {100 * most.share:.0f} % found the first token comes {times:.1f} times sooner"
    alt = "; ".join(
        f"prompt of {f.prompt}, {100 * f.share:.0f} % found: {f.computed} computed, {f.ttft_ms:.3g} ms" for f in drawn
    )
    dressed(figure, title, "each dot is one request, alone in the engine", alt + ".", height=350)
    figure.update_annotations(font={"size": 13, "color": INK}, selector={"yref": "paper"})
    figure.update_xaxes(title_text="of the prompt found (%)", range=[-6, 106], dtick=25)
    figure.update_yaxes(rangemode="tozero")
    for column, top in ((1, max(f.computed for f in drawn)), (2, max(f.ttft_ms for f in drawn))):
        figure.update_yaxes(range=[0, 1.15 * top], row=1, col=column)
    return figure.update_layout(margin={"t": 108})
