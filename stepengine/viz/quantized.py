"""Weights in few bits: rounding to a grid, RTN against GPTQ, what it costs in perplexity, bytes and time.

All figures are drawn from plain data: arrays that `np.asarray` takes, and rows (dicts) of names and numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stepengine.errors import InvalidSetting
from stepengine.viz.grid import HATCH, WIDTH, listed, reals, wholes
from stepengine.viz.template import GREY, HUES, INK, KEPT, PAPER, QUIET, WHITE_INK, new_figure, readable

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = Mapping[str, Any]
BLUE, ORANGE, GREEN, ROSE, SKY, VERMILION = HUES[:6]
LEVEL = "#C9D0D6"  # a level of the grid, darker than the rules of an axis
METHODS = {"RTN": QUIET, "GPTQ": GREEN}  # neither is a colour of the scale below
OTHERS = (VERMILION, BLUE, ROSE, ORANGE, SKY)
SIGNED = [[0, "#00395A"], [0.25, BLUE], [0.5, PAPER], [0.75, VERMILION], [1, "#7A2E00"]]
AMOUNT = [[0, PAPER], [0.5, SKY], [1, "#00395A"]]
MOST_WEIGHTS, MOST_CELLS, MOST_FRAMES = 96, 4096, 33  # what a page can show, and what a notebook may store
EXPLODES = 20  # from the smallest to the largest rise of perplexity: beyond it powers are drawn
GPUS = {"L4, 4090": 24, "H100": 80, "H200": 141}  # GB of memory
LINEAR = ("attention", "mlp", "scales and zeros")  # what quantising linear layers changes


# --- one group -----------------------------------------------------------------------------------------------------


def on_grid(weights: Any, scale: float, zero: float, bits: int) -> "go.Figure":
    """The weights of one group, a ring each, and the levels (codes - zero) * scale that they are rounded to, a dot.

    weights [n], n at most 96; codes go from 0 to 2**bits - 1; a weight beyond either end is marked.
    InvalidSetting for anything else than one group and a grid.
    """
    before = np.asarray(weights, dtype=np.float64)
    scale, zero = float(scale), float(zero)
    if before.ndim != 1 or not 1 <= before.size <= MOST_WEIGHTS or not np.isfinite(before).all():
        raise InvalidSetting(
            f"on_grid draws 1 to {MOST_WEIGHTS} finite weights of one group; it got the shape {before.shape}: "
            "give one row's weights of one group."
        )
    if not (scale > 0 and math.isfinite(scale)) or not 1 <= bits <= 8:
        raise InvalidSetting(f"A grid has a scale above 0 and 1 to 8 bits; it got scale {scale:g} and {bits} bits.")
    most = 2**bits - 1
    codes = np.clip(np.rint(before / scale + zero), 0, most)
    after = (codes - zero) * scale
    error = np.abs(after - before)
    outside = error > scale / 2 * (1 + 1e-6)
    said = f"{before.size} weights on {most + 1} levels: "
    if outside.any():
        count = int(outside.sum())
        said += f"{count} beyond the ends, {'off' if count == 1 else 'at worst off'} by {_short(error.max())}"
        said += f", {_short(error.max() / scale)} steps"
    else:
        said += f"no error above {_short(scale / 2)}, half a step"
    rms = math.sqrt(float(np.mean(error**2)))
    every = max(1, (most + 1) // 16)
    subtitle = f"ring: before · dot: after · a step is {_short(scale)}, the root mean square error {_short(rms)}"
    figure = new_figure(
        said,
        subtitle + (f" · every {every}th level is drawn" if every > 1 else ""),
        f"{said}. Scale {_short(scale)}, zero point {zero:g}. Codes: {', '.join(f'{c:.0f}' for c in codes)}.",
        height=540, width=WIDTH, margin={"l": 84, "r": 64, "t": 78, "b": 52},
    )  # fmt: skip
    place = np.arange(before.size)
    gaps = np.full(before.size, np.nan)
    words = [
        f"weight {i}: {old:.4g} becomes {new:.4g}, code {code:.0f}"
        for i, (old, new, code) in enumerate(zip(before, after, codes, strict=True))
    ]
    figure.add_scatter(
        name="after", x=wholes(place), y=reals(after), mode="markers", text=words, hoverinfo="text",
        marker={"size": 6, "color": BLUE, "line": {"width": 0}},
    )  # fmt: skip
    figure.add_scatter(
        name="before", x=wholes(place), y=reals(before), mode="markers", text=words, hoverinfo="text",
        marker={"size": 7, "symbol": "circle-open", "color": INK, "line": {"width": 1.2}},
    )  # fmt: skip
    for name, these, line in (
        ("error", ~outside, {"color": readable(VERMILION, 3), "width": 2}),
        ("error, beyond", outside, {"color": readable(VERMILION), "width": 4}),
    ):
        if these.any():
            figure.add_scatter(
                name=name, mode="lines", line=line, hoverinfo="skip",
                x=reals(np.stack([place, place, gaps], 1)[these].ravel()),
                y=reals(np.stack([before, after, gaps], 1)[these].ravel()),
            )  # fmt: skip
    drawn = np.arange(0, most + 1, every)
    levels = (drawn - zero) * scale
    room = 0.8 * scale * every
    low, high = min(levels[0], before.min()) - room, max(levels[-1], before.max()) + room
    for code, level in zip(drawn, levels, strict=True):
        figure.add_annotation(
            text=f"{code}", x=1, xref="paper", xanchor="left", xshift=8, y=level, showarrow=False,
            font={"size": 12, "color": INK if code == round(zero) else QUIET},
        )  # fmt: skip
    figure.add_annotation(
        text="code", x=1, xref="paper", xanchor="left", xshift=32, y=0.5, yref="paper", textangle=90,
        showarrow=False, font={"size": 13, "color": QUIET},
    )  # fmt: skip
    if 0 <= zero <= most:
        figure.add_hline(y=0, line={"color": GREY, "width": 1.5}, layer="below")
    digits = max(0, 1 - math.floor(math.log10(scale * every)))
    figure.update_yaxes(
        title_text="weight", range=[low, high], tickvals=reals(levels), gridcolor=LEVEL,
        ticktext=[f"{level:.{digits}f}".replace("-", "−") if abs(level) > scale / 2 else "0" for level in levels],
    )  # fmt: skip
    return figure.update_xaxes(
        title_text="place in the group", range=[-1, before.size], tickformat="d", nticks=9, showgrid=False
    )


# --- a layer, column by column ---------------------------------------------------------------------------------------


def error_fill(
    rtn: Any, gptq: Any, rtn_output: Any, gptq_output: Any, columns: Sequence[int], shown: int | None = None
) -> "go.Figure":
    """RTN and GPTQ side by side, column by column: how far each weight is from the original, and what that does.

    rtn, gptq [S, N, K]: (weight now - original weight) / scale after `columns[s]` of K columns are rounded, columns
    in the order of rounding. rtn_output, gptq_output [S]: squared error of the layer's output then. The slider opens
    at snapshot `shown`, by default the last, which must have all columns rounded. InvalidSetting for data of other
    shapes, and for a rounded column that changes later (a snapshot that is no copy).
    """
    errors, outputs, done = _snapshots(rtn, gptq, rtn_output, gptq_output, columns)
    opens = len(done) - 1 if shown is None else shown
    if not 0 <= opens < len(done):
        raise InvalidSetting(f"shown is {shown}; there are snapshots 0 to {len(done) - 1}.")
    _, rows, width = errors["GPTQ"].shape
    words = [_fill_words(errors, outputs, done, s) for s in range(len(done))]
    figure = new_figure(
        *words[opens],
        f"{rows} rows and {width} columns of weights. " + " ".join(f"{a}; {b}." for a, b in (words[0], words[-1])),
        height=600, width=WIDTH, margin={"l": 64, "r": 88, "t": 112, "b": 132},
    )  # fmt: skip
    limit = max(1.0, math.ceil(2 * float(np.percentile(np.abs(errors["GPTQ"][-1]), 99))) / 2)
    figure.update_layout(coloraxis=_signed(limit, max(float(np.abs(e).max()) for e in errors.values()) > limit))
    for method, axes in (("RTN", {}), ("GPTQ", {"xaxis": "x2", "yaxis": "y2"})):
        figure.add_heatmap(
            name=method, z=_thousandths(errors[method][-1]), coloraxis="coloraxis", **axes,
            hovertemplate=f"{method}, row %{{y}}, column %{{x}}: %{{z:.2f}} steps from the original<extra></extra>",
        )  # fmt: skip
    figure.add_heatmap(
        name="GPTQ, to come", coloraxis="coloraxis", xaxis="x2", yaxis="y2",
        hovertemplate="not rounded yet, row %{y}, column %{x}: moved by %{z:.2f} steps<extra></extra>",
    )  # fmt: skip
    sparse = {**HATCH, "fgcolor": GREY, "size": 8, "solidity": 0.12}
    for method, axes, color in (("RTN", {}, PAPER), ("GPTQ", {"xaxis": "x2", "yaxis": "y2"}, "rgba(0,0,0,0)")):
        figure.add_bar(
            name=f"{method}, to come: hatching", orientation="h", width=rows, hoverinfo="skip", **axes,
            marker={"color": color, "line": {"width": 0}, "pattern": {**sparse, "bgcolor": color}},
        )  # fmt: skip
        figure.add_scatter(
            name=f"{method}, frontier", mode="lines", line={"color": INK, "width": 2.5}, hoverinfo="skip",
            cliponaxis=False, **axes,
        )  # fmt: skip
    below = {"xaxis": "x3", "yaxis": "y3"}
    for method, output in outputs.items():
        figure.add_scatter(
            name=f"{method}, all", x=wholes(done), y=reals(output), mode="lines", hoverinfo="skip",
            line={"color": readable(METHODS[method], 3), "width": 1.5, "dash": "dot"}, **below,
        )  # fmt: skip
        figure.add_scatter(
            name=f"{method}, output", mode="lines", line={"color": readable(METHODS[method], 3), "width": 3}, **below,
            hovertemplate=f"{method}, %{{x}} columns rounded: squared error %{{y:.3g}}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        name="now", mode="markers", cliponaxis=False, hoverinfo="skip", **below,
        marker={"size": 10, "color": [METHODS[m] for m in outputs], "line": {"color": INK, "width": 1.5}},
    )  # fmt: skip
    pictures = [_fill(errors, outputs, done, s) for s in range(len(done))]
    for name, data in pictures[opens].items():
        figure.update_traces(data, selector={"name": name})
    _fill_axes(figure, rows, width, outputs)
    _play(figure, pictures, words, done, opens)
    return figure


def _snapshots(
    rtn: Any, gptq: Any, rtn_output: Any, gptq_output: Any, columns: Sequence[int]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[int]]:
    """Errors and outputs by method, and the columns done; checked."""
    errors = {name: np.asarray(given, dtype=np.float64) for name, given in (("RTN", rtn), ("GPTQ", gptq))}
    both = (("RTN", rtn_output), ("GPTQ", gptq_output))
    outputs = {name: np.asarray(given, dtype=np.float64).ravel() for name, given in both}
    done = [int(column) for column in columns]
    shapes = {name: array.shape for name, array in (errors | {f"{n}'s output": a for n, a in outputs.items()}).items()}
    if errors["GPTQ"].ndim != 3 or errors["RTN"].shape != errors["GPTQ"].shape or any(
        shape[0] != len(done) for shape in shapes.values()
    ):  # fmt: skip
        raise InvalidSetting(
            f"error_fill needs [S, N, K] errors of both methods and S outputs and columns; it got {shapes} and "
            f"{len(done)} columns."
        )
    steps, rows, width = errors["GPTQ"].shape
    if not steps or steps > MOST_FRAMES or not 0 < rows * width <= MOST_CELLS:
        raise InvalidSetting(
            f"{steps} snapshots of {rows} x {width} weights; 1 to {MOST_FRAMES} of at most {MOST_CELLS} can be drawn: "
            "take fewer rows, or a snapshot every few columns."
        )
    if sorted(set(done)) != done or done[0] < 0 or done[-1] != width:
        raise InvalidSetting(f"columns must rise from 0 or more to all {width}; they are {listed(done)}.")
    for name, array in (errors | outputs).items():
        if not np.isfinite(array).all():
            raise InvalidSetting(f"{name} holds a value that is not finite; every error must be a number.")
    for s, column in enumerate(done):
        for name, array in errors.items():
            if not np.allclose(array[s][:, :column], array[-1][:, :column], atol=1e-3):
                raise InvalidSetting(
                    f"{name}: a column among the first {column} changes after it was rounded; give the columns in the "
                    "order of rounding, and each snapshot as a copy."
                )
        if np.abs(errors["RTN"][s][:, column:]).max(initial=0.0) > 1e-3:
            raise InvalidSetting(
                f"RTN: after {column} columns one to come has moved already; RTN only changes what it rounds: give "
                "the columns in the order of rounding, and each snapshot as a copy."
            )
    return errors, outputs, done


def _fill_words(
    errors: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], done: Sequence[int], s: int
) -> tuple[str, str]:
    width = errors["GPTQ"].shape[2]
    most = {name: float(np.abs(array[s]).max()) for name, array in errors.items()}
    output = {name: float(array[s]) for name, array in outputs.items()}
    if done[s] < width:
        title = f"{done[s]} of {width} columns rounded: output error {_short(output['RTN'])} with RTN, "
        title += f"{_short(output['GPTQ'])} with GPTQ"
        ahead = np.abs(errors["GPTQ"][s][:, done[s] :])
        left = width - done[s]
        said = f"GPTQ has moved the {left} column{'s' * (left > 1)} to come (hatched) by up to {ahead.max():.2f} steps"
        return title, (said + " to make up; RTN none" if done[s] else "both start from the original weights")
    rms = {name: math.sqrt(float(np.mean(array[s] ** 2))) for name, array in errors.items()}
    said = f"from the original at most {most['RTN']:.2f} steps with RTN, {most['GPTQ']:.2f} with GPTQ"
    said += f" · root mean square {rms['RTN']:.2f} and {rms['GPTQ']:.2f}"
    if not output["GPTQ"] < output["RTN"]:
        title = f"GPTQ gains nothing here: output error {_short(output['GPTQ'])}, with RTN {_short(output['RTN'])}"
    elif output["GPTQ"] == 0:
        title = "GPTQ's output is exact"
    else:
        times = f"its output error is {output['RTN'] / output['GPTQ']:.1f} times smaller"
        further = rms["GPTQ"] > rms["RTN"]
        title = f"GPTQ's weights end further off, yet {times}" if further else f"GPTQ's weights end nearer, and {times}"
    return title, said


def _fill(
    errors: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], done: Sequence[int], s: int
) -> dict[str, dict[str, Any]]:
    """What changes with the slider: of rounded columns nothing, so only those to come are stored again."""
    _, rows, width = errors["GPTQ"].shape
    column, middle = done[s], (rows - 1) / 2
    left = width - column
    ahead = {"z": _thousandths(errors["GPTQ"][s][:, column:])} if left else {"z": np.full((1, 1), np.nan, np.float32)}
    to_come = {"base": reals([column - 0.5]), "x": wholes([left]), "y": reals([middle])}
    frontier = {"x": reals([column - 0.5] * 2), "y": reals([-0.5 - rows / 24, rows - 0.5 + rows / 24])}
    now = [float(output[s]) for output in outputs.values()]
    return {
        "GPTQ, to come": {**ahead, "x0": column if left else 0, "dx": 1},
        "RTN, to come: hatching": to_come,
        "GPTQ, to come: hatching": to_come,
        "RTN, frontier": frontier,
        "GPTQ, frontier": frontier,
        **{
            f"{name}, output": {"x": wholes(done[: s + 1]), "y": reals(output[: s + 1])}
            for name, output in outputs.items()
        },
        "now": {"x": wholes([column] * len(now)), "y": reals(now)},
    }


def _thousandths(values: np.ndarray) -> np.ndarray:
    return np.round(values, 3).astype(np.float32) + np.float32(0)  # + 0: no -0.0


def _signed(limit: float, beyond: bool) -> dict[str, Any]:
    """The scale of errors: in steps of the grid, the same length on both sides of 0."""
    ticks = [-limit, -limit / 2, 0, limit / 2, limit]
    text = [f"{tick:+g}".replace("-", "−") if tick else "0" for tick in ticks]
    if beyond:
        text[0], text[-1] = f"≤ {text[0]}", f"≥ {text[-1]}"
    return {
        "colorscale": SIGNED, "cmin": -limit, "cmax": limit,
        "colorbar": {
            "title": {"text": "steps of the grid", "side": "right", "font": {"size": 12, "color": QUIET}},
            "thickness": 10, "len": 0.55, "y": 1, "yanchor": "top", "x": 1.01, "xanchor": "left",
            "outlinewidth": 0, "tickvals": ticks, "ticktext": text, "tickfont": {"size": 11, "color": QUIET},
        },
    }  # fmt: skip


def _fill_axes(figure: "go.Figure", rows: int, width: int, outputs: Mapping[str, np.ndarray]) -> None:
    top = max(float(output.max()) for output in outputs.values())
    ends = {name: float(output[-1]) for name, output in outputs.items()}
    pixels = [82 * end / (top or 1) for end in ends.values()]
    for (name, end), shift in zip(ends.items(), _shifts(pixels), strict=True):
        figure.add_annotation(
            text=f"<b>{name}</b> {_short(end)}", xref="x3", yref="y3", x=width, y=end, xanchor="left", xshift=12,
            yshift=shift, showarrow=False, font={"size": 13, "color": readable(METHODS[name])},
        )  # fmt: skip
    heads = {
        "": ("<b>RTN</b> rounds, and leaves it at that", (0, 0.485)),
        "2": ("<b>GPTQ</b> moves the columns to come", (0.515, 1)),
    }
    for number, (head, domain) in heads.items():
        figure.update_layout({
            f"xaxis{number}": {
                "domain": domain, "anchor": f"y{number}", "range": [-0.7, width - 0.3], "nticks": 6, "tickformat": "d",
                "title": {"text": "column, in the order of rounding"},
            },
            f"yaxis{number}": {
                "domain": (0.46, 1), "anchor": f"x{number}", "range": [rows - 0.5, -0.5], "showgrid": False,
                "nticks": 5, "tickformat": "d", "showticklabels": not number, "ticklabelstandoff": 5,
                "title": {"text": "" if number else "row"},
            },
        })  # fmt: skip
        figure.add_annotation(
            text=head, x=domain[0], xref="paper", xanchor="left", y=1, yref="paper", yanchor="bottom", yshift=8,
            showarrow=False, font={"size": 13, "color": INK},
        )  # fmt: skip
    figure.update_layout(
        xaxis3={
            "domain": (0, 1), "anchor": "y3", "range": [0, width * 1.01], "nticks": 9, "tickformat": "d",
            "title": {"text": "columns rounded"},
        },
        yaxis3={
            "domain": (0, 0.27), "anchor": "x3", "range": [-0.04 * top, 1.12 * top or 1], "nticks": 4,
            "title": {"text": "squared error<br>of the output"}, "ticklabelstandoff": 5,
        },
    )  # fmt: skip


def _play(
    figure: "go.Figure",
    pictures: Sequence[Mapping[str, Any]],
    words: Sequence[tuple[str, str]],
    done: Sequence[int],
    opens: int,
) -> None:
    """Frames, slider, and a button that plays from the first column on."""
    order = [trace.name for trace in figure.data]
    kinds = {trace.name: trace.type for trace in figure.data}
    figure.frames = [
        {
            "name": str(column),
            "traces": [order.index(name) for name in data],
            "data": [{"type": kinds[name], **values} for name, values in data.items()],
            "layout": {"title": {"text": title, "subtitle": {"text": subtitle}}},
        }
        for column, data, (title, subtitle) in zip(done, pictures, words, strict=True)
    ]
    names = [str(column) for column in done]
    jump = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    run = {**jump, "frame": {"duration": 350, "redraw": True}, "fromcurrent": False}
    figure.update_layout(
        sliders=[{
            "active": opens, "x": 0.13, "len": 0.87, "y": 0, "yanchor": "top", "pad": {"t": 62, "b": 0},
            "currentvalue": {"visible": False}, "bgcolor": PAPER, "activebgcolor": GREY, "bordercolor": GREY,
            "tickcolor": GREY, "font": {"size": 11, "color": QUIET},
            "steps": [{"label": name, "method": "animate", "args": [[name], jump]} for name in names],
        }],
        updatemenus=[{
            "type": "buttons", "direction": "left", "showactive": False, "x": 0, "xanchor": "left", "y": 0,
            "yanchor": "top", "pad": {"t": 60, "l": -40}, "bgcolor": PAPER, "bordercolor": GREY,
            "font": {"size": 12, "color": INK},
            "buttons": [
                {"label": "▶", "method": "animate", "args": [names, run]},
                {"label": "❚❚", "method": "animate", "args": [[None], jump]},
            ],
        }],
    )  # fmt: skip


# --- inputs of a layer -----------------------------------------------------------------------------------------------


def hessian(matrix: Any, keep: int = 64) -> "go.Figure":
    """H = X^T X of a layer's inputs, [K, K]: its diagonal in % of the trace, and |H_ij| / sqrt(H_ii H_jj) below.

    Columns are sorted by the diagonal, and the `keep` largest drawn. The title counts over all K.
    """
    full = np.asarray(matrix, dtype=np.float64)
    if full.ndim != 2 or full.shape[0] != full.shape[1] or full.size == 0 or not np.isfinite(full).all():
        raise InvalidSetting(f"A Hessian is a square matrix of finite numbers, [K, K]; this one is {full.shape}.")
    diagonal = np.diag(full)
    if diagonal.min() < 0 or diagonal.sum() <= 0 or not np.allclose(full, full.T, atol=1e-4 * np.abs(full).max()):
        raise InvalidSetting("H = X^T X is symmetric with a diagonal of 0 or more; this is not: give X^T X itself.")
    if not 2 <= keep <= 128:
        raise InvalidSetting(f"keep is {keep}; 2 to 128 columns can be told apart.")
    order = np.argsort(-diagonal, kind="stable")
    large, count = diagonal[order], diagonal.size
    few = max(1, round(count / 100))
    share = 100 * large[:few].sum() / large.sum()
    kept = order[:keep]
    root = np.sqrt(diagonal[kept])
    norm = np.outer(root, root)
    related = np.abs(full[np.ix_(kept, kept)]) / np.where(norm > 0, norm, 1)
    apart = related[~np.eye(len(kept), dtype=bool)]
    mean = float(apart.mean()) if apart.size else 0.0
    title = f"The {few} largest of {count} columns hold {share:.0f} % of the trace"
    if few == 1:
        title = f"The largest of {count} columns holds {share:.0f} % of the trace"
    dead = int((diagonal == 0).sum())
    subtitle = f"two of the columns drawn correlate by {mean:.2f} on average: what one gets wrong, others can make up"
    figure = new_figure(
        title,
        subtitle + (f" · {dead} never see{'s' * (dead == 1)} an input" if dead else ""),
        f"{title}. Largest diagonal {_short(large[0])}, median {_short(float(np.median(large)))}. {subtitle}.",
        height=640, width=WIDTH, margin={"l": 76, "r": 92, "t": 84, "b": 52},
    )  # fmt: skip
    rank = np.arange(1, len(kept) + 1)
    shares = 100 * large[: len(kept)] / large.sum()
    positive = shares > 0
    figure.add_bar(
        name="diagonal", x=wholes(rank[positive]), y=reals(shares[positive]), width=0.8, xaxis="x2",
        yaxis="y2", customdata=wholes(kept[positive]),
        marker={"color": [VERMILION if r <= few else GREY for r in rank[positive]], "line": {"width": 0}},
        hovertemplate="column %{customdata}, number %{x} in size: %{y:.3g} % of the trace<extra></extra>",
    )  # fmt: skip
    figure.add_heatmap(
        name="correlation", x=wholes(rank), y=wholes(rank), z=_thousandths(related), zmin=0, zmax=1, colorscale=AMOUNT,
        hovertemplate="columns number %{x} and %{y} in size: correlation %{z:.2f}<extra></extra>",
        colorbar={
            "title": {"text": "|H<sub>ij</sub>| / √(H<sub>ii</sub> H<sub>jj</sub>)", "side": "right",
                      "font": {"size": 12, "color": QUIET}},
            "thickness": 10, "len": 0.76, "y": 0, "yanchor": "bottom", "x": 1.01, "outlinewidth": 0,
            "tickfont": {"size": 11, "color": QUIET}, "tickvals": [0, 0.5, 1],
        },
    )  # fmt: skip
    reach = [0.4, len(kept) + 0.6]
    floor, roof = math.log10(shares[positive].min()), math.log10(shares[0])
    edges = [floor - 0.12 * (roof - floor) - 0.1, roof + 0.05 * (roof - floor) + 0.05]
    figure.update_layout(
        xaxis={"domain": (0, 1), "anchor": "y", "range": reach, "title": {"text": "column, the largest first"}},
        yaxis={"domain": (0, 0.76), "anchor": "x", "range": reach[::-1], "showgrid": False,
               "title": {"text": "column, the largest first"}},
        xaxis2={"domain": (0, 1), "anchor": "y2", "range": reach, "showticklabels": False},
        yaxis2={"domain": (0.8, 1), "anchor": "x2", "type": "log", "range": edges, **_percent_ticks(*edges),
                "title": {"text": "of the trace"}},
    )  # fmt: skip
    return figure


# --- what it costs and brings ----------------------------------------------------------------------------------------


def perplexity(rows: Sequence[Row], baseline: float) -> "go.Figure":
    """Rise of perplexity over `baseline` in %, against bits per weight; a line for each method.

    rows: {"method", "bits", "group_size" (-1: whole rows), "bits_per_weight", "perplexity"}. In powers where the
    rises differ by more than a factor of 20; what does not rise then lies on the lower edge as a triangle.
    """
    _need(rows, "perplexity", ("method",), ("bits", "group_size", "bits_per_weight", "perplexity"))
    if not baseline > 0 or not math.isfinite(baseline):
        raise InvalidSetting(f"The baseline's perplexity must be above 0; it is {baseline:g}.")
    lines: dict[str, list[tuple[float, float, Row]]] = {}
    for row in sorted(rows, key=lambda r: (r["bits_per_weight"], r["bits"])):
        rise = 100 * (row["perplexity"] / baseline - 1)
        lines.setdefault(row["method"], []).append((float(row["bits_per_weight"]), rise, row))
    lines = dict(sorted(lines.items(), key=lambda item: (item[0] != "RTN", item[0] != "GPTQ")))
    rises = [rise for line in lines.values() for _, rise, _ in line]
    positive = [rise for rise in rises if rise > 0]
    powers = len(positive) > 1 and max(positive) > EXPLODES * min(positive)
    floor = min(positive) / 1.6 if powers else -math.inf
    title = _perplexity_title(lines)
    figure = new_figure(
        title,
        f"rise over {baseline:.4g}, unquantised · beside a point: bits / group size"
        + (" · ▽ does not rise" if powers and len(positive) < len(rises) else ""),
        f"{title}. " + " ".join(
            f"{method}: " + ", ".join(f"{_config(row)} {rise:+.2f} %" for _, rise, row in line) + "."
            for method, line in lines.items()
        ),
        height=420, width=WIDTH, margin={"l": 76, "r": 76, "t": 84, "b": 52},
    )  # fmt: skip
    others = iter(OTHERS * len(lines))
    bits = [x for line in lines.values() for x, *_ in line]
    pixels = 0.88 * (WIDTH - 152) / (max(bits) - min(bits) or 1)  # of one bit
    if powers:
        edges = [math.log10(floor) - 0.15, math.log10(max(positive)) + 0.25]
    else:
        span = max(0.0, *rises) - min(0.0, *rises) or 1.0
        edges = [min(0.0, *rises) - 0.12 * span, max(0.0, *rises) + 0.14 * span]
    ends = [max(line[-1][1], floor) for line in lines.values()]
    ends = [math.log10(end) for end in ends] if powers else ends
    shifts = dict(zip(lines, _shifts([284 * (end - edges[0]) / (edges[1] - edges[0]) for end in ends]), strict=True))
    for method, line in lines.items():
        hue = METHODS.get(method) or next(others)
        y = [max(rise, floor) for _, rise, _ in line]
        figure.add_scatter(
            name=method, x=reals(x for x, *_ in line), y=reals(y), mode="lines+markers+text", cliponaxis=False,
            line={"color": readable(hue, 3), "width": 2}, textfont={"color": readable(hue), "size": 11},
            marker={
                "size": 9, "color": hue, "line": {"color": readable(hue), "width": 1},
                "symbol": ["circle" if rise >= floor else "triangle-down-open" for _, rise, _ in line],
            },
            text=_apart([x * pixels for x, *_ in line], [_config(row) for *_, row in line]),
            textposition=[_side(lines, method, x, rise, x == max(bits)) for x, rise, _ in line],
            customdata=[f"{_spoken(row)}: perplexity {row['perplexity']:.4g}, {rise:+.2f} %" for _, rise, row in line],
            hovertemplate=f"{method}, %{{customdata}}<extra></extra>",
        )  # fmt: skip
        last = line[-1][0] == max(bits)
        figure.add_annotation(
            text=f"<b>{method}</b>", x=line[-1][0], y=math.log10(y[-1]) if powers else y[-1], showarrow=False,
            xanchor="left" if last else "center", xshift=24 * last, yshift=shifts[method] if last else -30,
            bgcolor=PAPER, borderpad=0, font={"size": 13, "color": readable(hue)},
        )  # fmt: skip
    room = 0.06 * (max(bits) - min(bits)) or 0.5
    figure.update_xaxes(title_text="bits per weight, scales and zero points included",
                        range=[min(bits) - 1.6 * room, max(bits) + room], showgrid=True)  # fmt: skip
    if powers:
        figure.update_yaxes(type="log", range=edges, **_percent_ticks(*edges))
    else:
        figure.update_yaxes(range=edges, ticksuffix=" %")
        figure.add_hline(y=0, line={"color": INK, "width": 1})
    return figure.update_yaxes(title_text="rise of perplexity" + " (powers)" * powers)


def _perplexity_title(lines: Mapping[str, Sequence[tuple[float, float, Row]]]) -> str:
    """Best and worst method at the configuration that most of them have, of several that nearest to 4 bits."""
    held: dict[tuple[float, int], dict[str, tuple[float, float]]] = {}
    for method, line in lines.items():
        for bits, rise, row in line:
            held.setdefault((row["bits"], row["group_size"]), {})[method] = (rise, bits)
    chosen = min(held, key=lambda c: (-len(held[c]), abs(c[0] - 4), min(bits for _, bits in held[c].values())))
    rises = {method: rise for method, (rise, _) in held[chosen].items()}
    best, worst = (pick(rises, key=lambda method: rises[method]) for pick in (min, max))
    said = ", ".join(
        f"{'+−'[rises[m] < 0]}{_short(abs(rises[m]))} % with {m}" for m in dict.fromkeys((best, worst))
    )  # fmt: skip
    return f"{chosen[0]:g} bits{_of_groups(chosen[1])}: perplexity {said}"


def _of_groups(size: int) -> str:
    return f" in groups of {size}" if size > 0 else ", a scale a row"


def _apart(x: Sequence[float], texts: Sequence[str]) -> list[str]:
    """Labels at x (pixels, rising), those left out that would lie on the one before."""
    kept, end = [], -math.inf
    for at, text in zip(x, texts, strict=True):
        half = 3.5 * len(text)
        kept.append(text if at - half >= end else "")
        end = at + half if kept[-1] else end
    return kept


def _config(row: Row) -> str:
    return f"{row['bits']:g}/{row['group_size'] if row['group_size'] > 0 else 'row'}"


def _spoken(row: Row) -> str:
    return f"{row['bits']:g} bits{_of_groups(row['group_size'])}"


def _side(
    lines: Mapping[str, Sequence[tuple[float, float, Row]]], method: str, x: float, rise: float, last: bool
) -> str:
    """A label stands above the highest line and below the others: where falling lines leave room."""
    others = [line for name, line in lines.items() if name != method]
    there = [float(np.interp(x, [bits for bits, *_ in line], [rises for _, rises, _ in line])) for line in others]
    if there and rise < max(there):
        return "bottom center" if last else "bottom left"
    return "top center" if last else "top right"


def _percent_ticks(low: float, high: float) -> dict[str, Any]:
    parts = (1, 2, 5) if high - low < 2.2 else (1, 3) if high - low < 3.5 else (1,)
    values = [part * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for part in parts]
    return {"tickvals": values, "ticktext": [f"{value:,.6g} %" for value in values]}


def weight_bytes(rows: Sequence[Row], linear: Sequence[str] = LINEAR) -> "go.Figure":
    """Bytes of a model's weights by part, a bar for each format; at its end the total, and its ratio to the first's.

    rows: {"name", "parts": {part: bytes}}; `linear`: the parts that belong to the quantised linear layers. The title
    compares the first row with the last.
    """
    _need(rows, "weight_bytes", ("name", "parts"), ())
    names = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    totals = [float(sum(row["parts"].values())) for row in rows]
    if min(totals) <= 0 or any(value < 0 for row in rows for value in row["parts"].values()):
        raise InvalidSetting("weight_bytes needs parts of 0 bytes or more, and more than 0 together; one row has not.")
    first, last = (sum(row["parts"].get(part, 0) for part in linear) for row in (rows[0], rows[-1]))
    if min(first, last) <= 0:
        raise InvalidSetting(
            f"{rows[0]['name']} and {rows[-1]['name']} need bytes in some of {listed(linear)}, the linear layers; they "
            f"have the parts {listed(names)}: name yours in `linear`."
        )
    unit, size = ("GB", 1e9) if max(totals) >= 2e9 else ("MB", 1e6) if max(totals) >= 2e6 else ("kB", 1e3)
    title = f"Linear layers {first / last:.1f}× smaller, the whole model {totals[0] / totals[-1]:.1f}×"
    rest = [part for part in names if part not in linear]
    largest = max(rest, key=lambda part: rows[-1]["parts"].get(part, 0), default="")
    subtitle = f"{rows[-1]['name']} against {rows[0]['name']}"
    if kept := rows[-1]["parts"].get(largest, 0):
        subtitle += f" · {largest}: {100 * kept / totals[-1]:.0f} % of what is left"
    pixels = (WIDTH - 112 - 130) / max(totals)  # a byte's
    colors = dict(zip((part for part in names if part in linear), (BLUE, SKY, ORANGE, GREEN, ROSE), strict=False))
    colors |= dict(zip((part for part in names if part not in linear), (KEPT, GREY, LEVEL), strict=False))
    fits = {
        (row["name"], part): len(part) * 7 + 10 < value * pixels for row in rows for part, value in row["parts"].items()
    }
    missing = [part for part in names if not any(fits.get((row["name"], part)) for row in rows)]
    if missing:
        subtitle += "<br>" + " · ".join(
            f"<span style='color:{readable(colors.get(part, GREY), 3)}'>■</span> {part} "
            + " → ".join(dict.fromkeys(_bytes(row["parts"].get(part, 0)) for row in (rows[0], rows[-1])))
            for part in missing
        )
    figure = new_figure(
        title,
        subtitle,
        f"{title}. " + " ".join(
            f"{row['name']}: {_bytes(total)}, " + ", ".join(f"{p} {_bytes(v)}" for p, v in row["parts"].items()) + "."
            for row, total in zip(rows, totals, strict=True)
        ),
        height=170 + 56 * len(rows) + 18 * bool(missing), width=WIDTH,
        margin={"l": 112, "r": 130, "t": 84 + 18 * bool(missing), "b": 52}, barmode="stack", bargap=0.3,
    )  # fmt: skip
    places = list(range(len(rows)))
    for part in names:
        values = [float(row["parts"].get(part, 0)) for row in rows]
        hue = colors.get(part, GREY)
        figure.add_bar(
            name=part, orientation="h", x=reals(v / size for v in values), y=wholes(places),
            marker={"color": hue, "line": {"color": QUIET if hue == KEPT else readable(hue), "width": 1}},
            text=[part if fits.get((row["name"], part)) else "" for row in rows], textposition="inside",
            insidetextanchor="middle", textangle=0, constraintext="none",
            textfont={"size": 12, "color": PAPER if hue in WHITE_INK else INK},
            customdata=[f"{row['name']}: {_bytes(v)}" for row, v in zip(rows, values, strict=True)],
            hovertemplate=f"{part}, %{{customdata}}<extra></extra>",
        )  # fmt: skip
    for place, total in enumerate(totals):
        smaller = totals[0] / total
        ratio = f"{smaller:.1f}× smaller" if smaller >= 1 else f"{1 / smaller:.1f}× larger"
        figure.add_annotation(
            x=total / size, y=place, text=f"<b>{_bytes(total)}</b>" + f"<br>{ratio}" * bool(place), showarrow=False,
            xanchor="left", xshift=8, align="left", font={"size": 13, "color": INK},
        )  # fmt: skip
    figure.update_xaxes(title_text=f"bytes of weights ({unit}, powers of ten)", range=[0, max(totals) / size],
                        showgrid=True, nticks=7)  # fmt: skip
    return figure.update_yaxes(
        tickvals=places, ticktext=[row["name"] for row in rows], range=[len(rows) - 0.5, -0.5], showgrid=False,
        ticklabelstandoff=6, tickfont={"size": 13, "color": INK},
    )  # fmt: skip


def int4_speed(rows: Sequence[Row], baseline: str = "bf16", where: str = "") -> "go.Figure":
    """Speed of int4 over the baseline against the batch, with its spread; the line 1.0× parts where it helps.

    rows: {"batch", "ratio", and, if known, "low", "high", "path"}; rows of one `path` are one line, and the title
    speaks of the first. "Faster" means that the whole spread lies above 1. `where`: the machine and the date.
    """
    _need(rows, "int4_speed", (), ("batch", "ratio"))
    paths: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r["batch"]):
        low, high = row.get("low", row["ratio"]), row.get("high", row["ratio"])
        if not 0 < low <= row["ratio"] <= high or row["batch"] < 1:
            raise InvalidSetting(
                f"Batch {row['batch']}: {low:g} to {high:g} around {row['ratio']:g} is no spread of a ratio; it needs "
                "0 < low <= ratio <= high, and a batch of 1 or more."
            )
    for row in rows:
        paths.setdefault(str(row.get("path", "int4")), []).append(row)
    paths = {path: sorted(line, key=lambda row: row["batch"]) for path, line in paths.items()}
    path, line = next(iter(paths.items()))
    title = _speed_title(path, line, baseline)
    figure = new_figure(
        title,
        f"speed over {baseline}, the bar is the spread" + (f" · {where}" if where else ""),
        f"{title}. " + " ".join(
            f"{path}: " + ", ".join(f"batch {row['batch']} {row['ratio']:.2f}" for row in line) + "."
            for path, line in paths.items()
        ),
        height=420, width=WIDTH, margin={"l": 64, "r": 70 + 7 * max(map(len, paths)), "t": 84, "b": 52},
    )  # fmt: skip
    batches = sorted({row["batch"] for row in rows})
    lows, highs = [r.get("low", r["ratio"]) for r in rows], [r.get("high", r["ratio"]) for r in rows]
    bottom, top = math.log2(min(0.7, *lows)) - 0.4, math.log2(max(1.4, *highs)) + 0.4
    edges = [math.log10(batches[0]) - 0.12, math.log10(batches[-1]) + 0.12]
    names = [285 * (math.log2(line[-1]["ratio"]) - bottom) / (top - bottom) for line in paths.values()]  # pixels
    shifts = _shifts(names)
    for place, (path, line) in enumerate(paths.items()):
        hue = (GREEN, *OTHERS)[place % (1 + len(OTHERS))]
        x, y = [row["batch"] for row in line], [row["ratio"] for row in line]
        figure.add_scatter(
            name=path, x=wholes(x), y=reals(y), mode="lines+markers", cliponaxis=False,
            line={"color": readable(hue, 3), "width": 2.5, "dash": "solid" if not place else "dash"},
            marker={
                "size": 10, "line": {"color": readable(hue), "width": 2},
                "color": [hue if row.get("low", row["ratio"]) > 1 else PAPER for row in line],
            },
            error_y={
                "type": "data", "symmetric": False, "color": readable(hue, 3), "thickness": 1.5, "width": 4,
                "array": reals(row.get("high", row["ratio"]) - row["ratio"] for row in line),
                "arrayminus": reals(row["ratio"] - row.get("low", row["ratio"]) for row in line),
            },
            hovertemplate=f"{path}, batch %{{x}}: %{{y:.2f}} times the speed of {baseline}<extra></extra>",
        )  # fmt: skip
        figure.add_annotation(
            text=f"<b>{path}</b> {y[-1]:.2g}×", x=math.log10(x[-1]), y=math.log10(y[-1]), xanchor="left", xshift=12,
            yshift=shifts[place], showarrow=False, font={"size": 13, "color": readable(hue)},
        )  # fmt: skip
    figure.add_hline(y=1, line={"color": INK, "width": 1.5})
    for text, at, xanchor, yanchor in (
        (f"↑ <b>faster</b> than {baseline}: fewer bytes to read", 1, "right", "top"),
        (f"↓ <b>slower</b> than {baseline}: unpacking costs more than it saves", 0, "left", "bottom"),
    ):
        figure.add_annotation(
            text=text, x=at, xref="paper", xanchor=xanchor, y=float(yanchor == "top"), yref="paper", yanchor=yanchor,
            showarrow=False, bgcolor=PAPER, font={"size": 12, "color": QUIET},
        )  # fmt: skip
    ticks = [2.0**power for power in range(math.floor(bottom), math.ceil(top) + 1)]
    ticks = sorted(ticks + ([1.5 * t for t in ticks] if top - bottom < 3.5 else []))
    ticks = [tick for tick in ticks if bottom + 0.3 < math.log2(tick) < top - 0.3]  # the words' places
    figure.update_yaxes(
        type="log", title_text=f"speed over {baseline}", tickvals=ticks, ticktext=[f"{t:.4g}×" for t in ticks],
        range=[bottom * math.log10(2), top * math.log10(2)],
    )  # fmt: skip
    return figure.update_xaxes(
        type="log", title_text="batch (sequences decoded in one step)", tickvals=batches,
        ticktext=[str(batch) for batch in batches], range=edges,
    )  # fmt: skip


def _speed_title(path: str, line: Sequence[Row], baseline: str) -> str:
    """Where it is faster, with its whole spread."""
    faster = [row.get("low", row["ratio"]) > 1 for row in line]
    best = max(line, key=lambda row: row["ratio"])
    begin = f"{path} is {line[0]['ratio']:.2g} times as fast at batch {line[0]['batch']}"
    if all(faster):
        return f"{begin}, {line[-1]['ratio']:.2g} times at {line[-1]['batch']}" if len(line) > 1 else begin
    if not any(faster):
        return f"{path} is at no batch faster than {baseline}: at best {best['ratio']:.2g}×, at batch {best['batch']}"
    won = sum(faster)
    if all(faster[:won]):
        return f"{begin}, and no faster from batch {line[won]['batch']} on"
    where = listed([row["batch"] for row, yes in zip(line, faster, strict=True) if yes])
    return f"{path} is faster than {baseline} at batch{'es' * (won > 1)} {where} only: at best {best['ratio']:.2g}×"


def weight_memory(rows: Sequence[Row], gpus: Mapping[str, float] | None = None) -> "go.Figure":
    """GB of weights of each model in each format, a dot each, on a scale of powers, with lines at GPUs' memories.

    rows: {"model", "bytes": {format: bytes}}, from the widest format to the narrowest; gpus: {name: GB}.
    """
    _need(rows, "weight_memory", ("model", "bytes"), ())
    values = [value for row in rows for value in row["bytes"].values()]
    if not values or min(values) <= 0:
        raise InvalidSetting("weight_memory needs bytes above 0 in every format; one row has none, or not above 0.")
    limits = dict(GPUS if gpus is None else gpus)
    if not limits or min(limits.values()) <= 0:
        raise InvalidSetting(f"gpus must name memories above 0 GB; it is {limits}.")
    title = _memory_title(rows, limits)
    figure = new_figure(
        title,
        "weights alone: the K/V cache and activations come on top · filled: fits into the largest GPU here",
        f"{title}. " + " ".join(
            f"{row['model']}: " + ", ".join(f"{name} {_bytes(b)}" for name, b in row["bytes"].items()) + "."
            for row in rows
        ),
        height=180 + 62 * len(rows), width=WIDTH, margin={"l": 72, "r": 40, "t": 112, "b": 52},
    )  # fmt: skip
    formats = list(dict.fromkeys(name for row in rows for name in row["bytes"]))
    hues = dict(zip(formats, (GREY, BLUE, ORANGE, GREEN, ROSE, VERMILION), strict=False))
    most = 1e9 * max(limits.values())
    for place, row in enumerate(rows):
        ends = [min(row["bytes"].values()) / 1e9, max(row["bytes"].values()) / 1e9]
        figure.add_scatter(
            name=f"{row['model']}: span", x=reals(ends), y=wholes([place] * 2), mode="lines", hoverinfo="skip",
            line={"color": LEVEL, "width": 2},
        )  # fmt: skip
    for name in formats:
        held = [(place, row) for place, row in enumerate(rows) if name in row["bytes"]]
        hue = hues.get(name, GREY)
        gb = [row["bytes"][name] / 1e9 for _, row in held]
        figure.add_scatter(
            name=name, x=reals(gb), y=wholes(place for place, _ in held), mode="markers",
            marker={
                "size": 13, "color": [hue if 1e9 * value <= most else PAPER for value in gb],
                "line": {"color": readable(hue), "width": 2},
            },
            customdata=[f"{row['model']} in {name}: {_bytes(row['bytes'][name])}" for _, row in held],
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
        for value, (place, _) in zip(gb, held, strict=True):
            for text, shift, font in (
                (f"<b>{name}</b>", 17, {"size": 12, "color": readable(hue)}),
                (f"{value:.3g}", -17, {"size": 12, "color": QUIET}),
            ):
                figure.add_annotation(
                    text=text, x=math.log10(value), y=place, yshift=shift, showarrow=False, bgcolor=PAPER,
                    borderpad=0, font=font,
                )  # fmt: skip
    for name, size in limits.items():
        figure.add_vline(x=size, line={"color": INK, "width": 1.5, "dash": "dash"}, layer="below")
        figure.add_annotation(
            text=f"<b>{size:g}</b><br>{name}", x=math.log10(size), y=1, yref="paper", yanchor="bottom",
            showarrow=False, font={"size": 12, "color": INK},
        )  # fmt: skip
    low, high = math.log10(min(*values, 1e9 * min(limits.values())) / 1e9), math.log10(max(*values, most) / 1e9)
    ticks = [part * 10.0**power for power in range(-2, 6) for part in (1, 3)]
    figure.update_xaxes(
        type="log", title_text="weights (GB, powers of ten)", range=[low - 0.12, high + 0.12], tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
    )  # fmt: skip
    return figure.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=[row["model"] for row in rows], range=[len(rows) - 0.4, -0.6],
        showgrid=False, tickfont={"size": 13, "color": INK},
    )  # fmt: skip


def _memory_title(rows: Sequence[Row], limits: Mapping[str, float]) -> str:
    """In which formats the largest model fits into the largest GPU."""
    gpu, size = max(limits.items(), key=lambda item: item[1])
    largest = max(rows, key=lambda row: max(row["bytes"].values()))
    held = largest["bytes"]
    fits = [name for name, value in held.items() if value <= 1e9 * size]
    least = min(held, key=lambda name: held[name])
    if not fits:
        return f"{largest['model']} fits into no single {gpu}: {_bytes(held[least])} even in {least}"
    if len(fits) == len(held):
        return f"{largest['model']} fits into one {gpu} in every format: {_bytes(max(held.values()))} at most"
    misses = [name for name in held if name not in fits]
    nearest = min(misses, key=lambda name: held[name])
    return (
        f"{largest['model']} fits into one {gpu} in {listed(fits)} only: {_bytes(held[least])}, where {nearest} takes "
        f"{_bytes(held[nearest])}"
    )


# --- words and checks ------------------------------------------------------------------------------------------------


def _need(rows: Sequence[Row], who: str, words: Sequence[str], numbers: Sequence[str]) -> None:
    """InvalidSetting where a row lacks something, or a number is none."""
    if not rows:
        raise InvalidSetting(f"{who} got no rows; give at least one with {listed([*words, *numbers])}.")
    for place, row in enumerate(rows):
        lacks = [key for key in (*words, *numbers) if key not in row]
        if lacks:
            raise InvalidSetting(f"{who}: row {place} lacks {listed(lacks)}; it holds {listed(sorted(row))}.")
        for key in numbers:
            if not isinstance(row[key], int | float | np.number) or not math.isfinite(row[key]):
                raise InvalidSetting(f"{who}: {key} of row {place} is {row[key]!r}; it must be a finite number.")


def _shifts(y: Sequence[float], gap: float = 17) -> list[float]:
    """Pixels upwards that keep names, at heights y (pixels), off each other; the lowest stays."""
    shifts, last = [0.0] * len(y), -math.inf
    for place in sorted(range(len(y)), key=lambda place: y[place]):
        last = max(y[place], last + gap)
        shifts[place] = last - y[place]
    return shifts


def _short(value: float) -> str:
    """Two digits that count: 0.0041, 1.9, 320."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _bytes(value: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"
