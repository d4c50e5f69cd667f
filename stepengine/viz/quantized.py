"""Weights in few bits: one group on its grid, RTN against GPTQ column by column, what a layer's inputs look like.

All figures are drawn from plain data: arrays that `np.asarray` takes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stepengine.errors import InvalidSetting
from stepengine.viz.grid import HATCH, WIDTH, listed, reals, wholes
from stepengine.viz.template import GREY, HUES, INK, PAPER, QUIET, new_figure, readable

if TYPE_CHECKING:
    import plotly.graph_objects as go

BLUE, ORANGE, GREEN, ROSE, SKY, VERMILION = HUES[:6]
LEVEL = "#C9D0D6"  # a level of the grid, darker than the rules of an axis
METHODS = {"RTN": QUIET, "GPTQ": GREEN}  # neither is a colour of the scale below
SIGNED = [[0, "#00395A"], [0.25, BLUE], [0.5, PAPER], [0.75, VERMILION], [1, "#7A2E00"]]
AMOUNT = [[0, PAPER], [0.5, SKY], [1, "#00395A"]]
MOST_WEIGHTS, MOST_CELLS, MOST_FRAMES = 96, 4096, 33  # what a page can show, and what a notebook may store


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
        said += f"{count} beyond the ends, {'off' if count == 1 else 'at worst off'} by {short(error.max())}"
        said += f", {short(error.max() / scale)} steps"
    else:
        said += f"no error above {short(scale / 2)}, half a step"
    rms = math.sqrt(float(np.mean(error**2)))
    every = max(1, (most + 1) // 16)
    subtitle = f"ring: before · dot: after · a step is {short(scale)}, the root mean square error {short(rms)}"
    figure = new_figure(
        said,
        subtitle + (f" · every {every}th level is drawn" if every > 1 else ""),
        f"{said}. Scale {short(scale)}, zero point {zero:g}. Codes: {', '.join(f'{c:.0f}' for c in codes)}.",
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
        title = f"{done[s]} of {width} columns rounded: output error {short(output['RTN'])} with RTN, "
        title += f"{short(output['GPTQ'])} with GPTQ"
        ahead = np.abs(errors["GPTQ"][s][:, done[s] :])
        left = width - done[s]
        said = f"GPTQ has moved the {left} column{'s' * (left > 1)} to come (hatched) by up to {ahead.max():.2f} steps"
        return title, (said + " to make up; RTN none" if done[s] else "both start from the original weights")
    rms = {name: math.sqrt(float(np.mean(array[s] ** 2))) for name, array in errors.items()}
    said = f"from the original at most {most['RTN']:.2f} steps with RTN, {most['GPTQ']:.2f} with GPTQ"
    said += f" · root mean square {rms['RTN']:.2f} and {rms['GPTQ']:.2f}"
    if not output["GPTQ"] < output["RTN"]:
        title = f"GPTQ gains nothing here: output error {short(output['GPTQ'])}, with RTN {short(output['RTN'])}"
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
    for (name, end), shift in zip(ends.items(), spread_out(pixels), strict=True):
        figure.add_annotation(
            text=f"<b>{name}</b> {short(end)}", xref="x3", yref="y3", x=width, y=end, xanchor="left", xshift=12,
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
        f"{title}. Largest diagonal {short(large[0])}, median {short(float(np.median(large)))}. {subtitle}.",
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
        yaxis2={"domain": (0.8, 1), "anchor": "x2", "type": "log", "range": edges, **percent_ticks(*edges),
                "title": {"text": "of the trace"}},
    )  # fmt: skip
    return figure


def short(value: float) -> str:
    """Two digits that count: 0.0041, 1.9, 320."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def spread_out(y: Sequence[float], gap: float = 17) -> list[float]:
    """Pixels upwards that keep names, at heights y (pixels), off each other; the lowest stays."""
    shifts, last = [0.0] * len(y), -math.inf
    for place in sorted(range(len(y)), key=lambda place: y[place]):
        last = max(y[place], last + gap)
        shifts[place] = last - y[place]
    return shifts


def percent_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks of an axis of powers from 10^low to 10^high percent."""
    parts = (1, 2, 5) if high - low < 2.2 else (1, 3) if high - low < 3.5 else (1,)
    values = [part * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for part in parts]
    return {"tickvals": values, "ticktext": [f"{value:,.6g} %" for value in values]}
