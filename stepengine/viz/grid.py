"""Blocks as squares that fill from the bottom with their tokens, drawn the same way in every figure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stepengine.errors import TraceError
from stepengine.trace import Replay, Snapshot, Trace
from stepengine.viz.template import GREY, INK, KEPT, PAPER, QUIET, RequestStyle, request_style

if TYPE_CHECKING:
    import plotly.graph_objects as go

WIDTH = 760  # px, as every figure of a page
LEFT, RIGHT = 24, 24  # px
CAPTION = 15  # px above a square, for its number

FREE = {"color": KEPT, "line": {"width": 0}}
HATCH = {"shape": "/", "fgcolor": "#B9C1C9", "bgcolor": PAPER, "size": 5, "solidity": 0.18}
RESERVED = {"color": PAPER, "line": {"color": QUIET, "width": 1}, "pattern": HATCH}
OUTLINE = {"color": "rgba(0,0,0,0)", "line": {"color": INK, "width": 2.5}}
KEY = "hatched: reserved, empty · dark outline: taken in this step · circle: references"

Data = dict[str, dict[str, Any]]


class Grid(NamedTuple):
    """Where squares lie. Axes: x in columns, y in tokens (a square is `size` high), so that heights are counts."""

    blocks: int
    size: int  # tokens a block
    columns: int
    cell: float  # px from one column to the next
    side: float  # px of a square
    caption: float  # px above a row

    @property
    def rows(self) -> int:
        return -(-self.blocks // self.columns)

    @property
    def pitch(self) -> float:
        """Tokens from one row to the next."""
        return self.tokens(self.cell + self.caption)

    @property
    def height(self) -> float:
        """px of all rows."""
        return self.rows * (self.cell + self.caption)

    @property
    def width(self) -> float:
        """Of a square, in columns."""
        return self.side / self.cell

    def tokens(self, px: float) -> float:
        """A height in px, on the y axis."""
        return px * self.size / self.side

    def x(self, block: int) -> int:
        """Column of block 1, 2, ..."""
        return (block - 1) % self.columns

    def base(self, block: int) -> float:
        """Lower edge of the square."""
        return -((block - 1) // self.columns + 1) * self.pitch


class Square(NamedTuple):
    """One block to draw, in the grid's units."""

    x: float
    base: float
    block: int
    tokens: int
    holders: tuple[int, ...]  # requests; several split the square between them
    refs: int
    new: bool = False


def grid_of(replay: Replay) -> Grid:
    """A grid that shows the whole pool on a page. TraceError where the run stored no K/V."""
    blocks, size = replay.num_blocks, replay.block_size
    if not blocks or not size:
        raise TraceError(
            f"Stage {replay.trace.meta.get('stage', '?')} kept no K/V in this trace: it has no blocks to draw; "
            "record the run at stage '1a' or later, at stage 2 for paged blocks."
        )
    if not len(replay):
        raise TraceError("The trace has no steps: there is nothing to draw. Generate something first.")
    return grid(blocks, size)


def grid(blocks: int, size: int) -> Grid:
    """At most 16 columns for 64 blocks, 20 for 160, then rows of 32 or more; all rows of about equal length."""
    most = 16 if blocks <= 64 else 20 if blocks <= 160 else max(32, -(-blocks // 24))
    columns = -(-blocks // -(-blocks // most))
    cell = min(46.0, (WIDTH - LEFT - RIGHT) / columns)
    return Grid(blocks, size, columns, cell, cell - (5 if cell > 30 else 3), CAPTION if blocks <= 160 else 0)


def owners(table: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """Block id -> the requests whose tables name it, in order."""
    result: dict[int, list[int]] = {}
    for request, blocks in table.items():
        for block in blocks:
            result.setdefault(block, []).append(request)
    return {block: tuple(result[block]) for block in sorted(result)}


def pool(now: Snapshot, grid: Grid) -> list[Square]:
    """The blocks in use, each at its place in the pool."""
    return [
        Square(
            grid.x(block), grid.base(block), block, now.block_tokens[block], who, now.refs[block],
            block in now.new_blocks,
        )
        for block, who in owners(now.table).items()
    ]  # fmt: skip


class Palette:
    """The requests' fills as numbers, which are shorter than colours where every frame repeats them.

    `only`: all but this request are grey, for figures that are about one.
    """

    def __init__(self, trace: Trace, selected: Sequence[int] = (), only: int | None = None) -> None:
        self.styles: dict[int, RequestStyle] = {r: request_style(trace, r, selected) for r in trace.requests}
        if only is not None:
            self.styles = {
                r: s if r == only else RequestStyle(GREY, INK, QUIET, s.label) for r, s in self.styles.items()
            }
        self.edges = {GREY: QUIET, **{style.color: style.edge for style in self.styles.values()}}
        self.colors = list(self.edges)

    def numbers(self, requests: Iterable[int]) -> np.ndarray:
        return np.array([self.colors.index(self.styles[r].color) for r in requests], dtype=np.uint8)

    def marker(self, numbers: np.ndarray) -> dict[str, Any]:
        """A marker with these fills."""
        return {**_scale(numbers, self.colors), "line": {"width": 0}}

    def line(self, numbers: np.ndarray) -> dict[str, Any]:
        """Edges that go with these fills."""
        return {**_scale(numbers, list(self.edges.values())), "width": 1}

    def name(self, requests: Sequence[int]) -> str:
        """A; A and B; requests 9 and 12; 5 requests."""
        if len(requests) > 4:
            return f"{len(requests)} requests"
        labels = [self.styles[r].label for r in requests]
        said = listed(labels)
        return said if not labels or not labels[0].isdigit() else f"request{'s' * (len(labels) > 1)} {said}"


def _scale(numbers: np.ndarray, colors: Sequence[str]) -> dict[str, Any]:
    count = len(colors)
    steps = [[edge / count, color] for i, color in enumerate(colors) for edge in (i, i + 1)]
    return {"color": numbers, "colorscale": steps, "cmin": -0.5, "cmax": count - 0.5}


def listed(words: Sequence[Any]) -> str:
    """3, 7 and 12."""
    said = [str(word) for word in words]
    return " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)


def counted(blocks: int) -> str:
    """1 block, 2 blocks."""
    return f"{blocks} block{'s' * (blocks != 1)}"


def reals(values: Iterable[float]) -> np.ndarray:
    """Typed: a notebook's file holds such an array as one short line, a list as one line a value."""
    return np.array(list(values), dtype=np.float32)


def wholes(values: Iterable[int]) -> np.ndarray:
    """As `reals`."""
    return np.array(list(values), dtype=np.int32)


def picture(grid: Grid, palette: Palette, squares: Sequence[Square]) -> Data:
    """The data of the traces that `add_squares` adds, by the traces' names."""
    strips = [(square, place, who) for square in squares for place, who in enumerate(square.holders)]
    new, shared = [s for s in squares if s.new], [s for s in squares if s.refs > 1]
    badge = 0.88 if grid.side > 30 else 0.5  # in the corner, or where the letters would not fit
    return {
        "reserved": _whole(grid, squares),
        "tokens": {
            "x": reals(_middle(grid, *strip) for strip in strips),
            "base": reals(square.base for square, *_ in strips),
            "y": wholes(square.tokens for square, *_ in strips),
            "width": reals(grid.width / len(square.holders) for square, *_ in strips),
            "customdata": wholes(square.block for square, *_ in strips),
            "colors": palette.numbers(who for *_, who in strips),
        },
        "new in this step": _whole(grid, new),
        **_letters(grid, palette, strips),
        "references": {
            "x": reals(square.x + grid.width * (badge - 0.5) for square in shared),
            "y": reals(square.base + grid.size * badge for square in shared),
            "text": [str(square.refs) for square in shared],
            "hovertext": [
                "" if _fits(grid, palette, square) else f"shared by {listed(_labels(palette, square))}"
                for square in shared
            ],
        },
    }


def _labels(palette: Palette, square: Square) -> list[str]:
    return [palette.styles[who].label for who in square.holders]


def _fits(grid: Grid, palette: Palette, square: Square) -> bool:
    """Whether the letters of all who share a square can be read on it."""
    return grid.side / len(square.holders) >= 9 * max(len(label) for label in _labels(palette, square))


def _whole(grid: Grid, squares: Sequence[Square]) -> dict[str, Any]:
    return {
        "x": reals(square.x for square in squares),
        "base": reals(square.base for square in squares),
        "y": wholes(grid.size for _ in squares),
    }


def _middle(grid: Grid, square: Square, place: int, _who: int) -> float:
    """Of one holder's strip of a square."""
    return square.x + grid.width * ((place + 0.5) / len(square.holders) - 0.5)


def _letters(grid: Grid, palette: Palette, strips: Sequence[tuple[Square, int, int]]) -> Data:
    """The holders' letters where there is room for them; white where a dark fill lies behind them."""
    found: dict[str, list[tuple[float, float, str]]] = {"letters": [], "letters on dark": []}
    for square, place, who in strips:
        style, covered = palette.styles[who], square.tokens / grid.size > 0.5
        if len(square.holders) > 1 and not _fits(grid, palette, square):
            continue
        white = style.ink == PAPER
        several = len(square.holders) > 1
        level = 0.5 if grid.side <= 30 or (several and not covered) else 0.68 if white and not covered else 0.28
        at = _middle(grid, square, place, who), square.base + level * grid.size
        found["letters on dark" if white and covered else "letters"].append((*at, style.label))
    return {
        name: {"x": reals(x for x, *_ in rows), "y": reals(y for _, y, _ in rows), "text": [row[2] for row in rows]}
        for name, rows in found.items()
    }


def add_squares(figure: "go.Figure", grid: Grid, palette: Palette, data: Data) -> None:
    """Add the squares of `picture`: six traces, in its order."""
    figure.add_bar(name="reserved", **data["reserved"], marker=RESERVED, width=grid.width, hoverinfo="skip")
    tokens = dict(data["tokens"])
    figure.add_bar(
        name="tokens", marker=palette.marker(tokens.pop("colors")), **tokens,
        hovertemplate=f"block %{{customdata}}: %{{y}} of {grid.size} tokens<extra></extra>",
    )  # fmt: skip
    name = "new in this step"
    figure.add_bar(name=name, **data[name], marker=OUTLINE, width=grid.width, hoverinfo="skip")
    for name, ink in (("letters", INK), ("letters on dark", PAPER)):
        figure.add_scatter(
            name=name, **data[name], mode="text", hoverinfo="skip",
            textfont={"size": 13 if grid.side > 30 else 11, "color": ink, "weight": 700},
        )  # fmt: skip
    figure.add_scatter(
        name="references", mode="markers+text", hoverinfo="text", **data["references"], cliponaxis=False,
        marker={"size": 15, "color": PAPER, "line": {"color": INK, "width": 1}}, textfont={"size": 11, "color": INK},
    )  # fmt: skip


def add_free(figure: "go.Figure", grid: Grid) -> None:
    """All squares of the pool, pale: what is drawn on top of them is in use."""
    ids = range(1, grid.blocks + 1)
    figure.add_bar(
        name="free", x=reals(grid.x(b) for b in ids), base=reals(grid.base(b) for b in ids), width=grid.width,
        y=wholes(grid.size for _ in ids), marker=FREE, customdata=wholes(ids),
        hovertemplate="block %{customdata} is free<extra></extra>",
    )  # fmt: skip


def add_numbers(figure: "go.Figure", grid: Grid, below: bool = False) -> None:
    """Every square's number above (or below) it; in a large pool the number of the first one of each row."""
    ids = range(1, grid.blocks + 1, 1 if grid.caption else grid.columns)
    dx, dy = (0.0, 0.0 if below else grid.size) if grid.caption else (-0.5, grid.size / 2)
    place = ("bottom center" if below else "top center") if grid.caption else "middle left"
    figure.add_scatter(
        name="block numbers", x=reals(grid.x(b) + dx for b in ids), y=reals(grid.base(b) + dy for b in ids),
        text=[str(b) for b in ids], mode="text", textposition=place, textfont={"size": 11, "color": QUIET},
        hoverinfo="skip", cliponaxis=False,
    )  # fmt: skip


def fit_axes(figure: "go.Figure", grid: Grid, above: float, below: float, right: float = RIGHT) -> None:
    """Hide both axes; one column is `cell` px wide, and y runs from `below` px under zero to `above` px over it."""
    figure.update_xaxes(visible=False, range=[-0.5, (WIDTH - LEFT - right) / grid.cell - 0.5])
    figure.update_yaxes(visible=False, range=[-grid.tokens(below), grid.tokens(above)])


def add_note(figure: "go.Figure", text: str, px: float) -> None:
    """Quiet words `px` below the drawing, at its left."""
    figure.add_annotation(
        text=text, x=0, xref="paper", xanchor="left", y=0, yref="paper", yanchor="top", yshift=-px, showarrow=False,
        font={"size": 12, "color": QUIET},
    )  # fmt: skip
