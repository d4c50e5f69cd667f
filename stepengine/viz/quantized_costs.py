"""What weights in few bits cost and bring: perplexity, bytes, speed, and what fits into a GPU.

All figures are drawn from rows (dicts) of names and numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stepengine.calculator import GPUS as TABLE
from stepengine.errors import InvalidSetting
from stepengine.viz.grid import WIDTH, listed, reals, wholes
from stepengine.viz.quantized import (
    BLUE,
    LEVEL,
    METHODS,
    ORANGE,
    ROSE,
    SKY,
    VERMILION,
    percent_ticks,
    short,
    spread_out,
)
from stepengine.viz.template import GREY, HUES, INK, KEPT, PAPER, QUIET, WHITE_INK, new_figure, readable

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = Mapping[str, Any]
GREEN = HUES[2]
OTHERS = (VERMILION, BLUE, ROSE, ORANGE, SKY)
EXPLODES = 20  # from the smallest to the largest rise of perplexity: beyond it powers are drawn
GPUS = {"L4, 4090": TABLE["L4"].memory_gb, "H100": TABLE["H100 (SXM)"].memory_gb, "H200": TABLE["H200"].memory_gb}
LINEAR = ("attention", "mlp", "scales and zeros")  # what quantising linear layers changes


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
    shifts = dict(zip(lines, spread_out([284 * (end - edges[0]) / (edges[1] - edges[0]) for end in ends]), strict=True))
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
        figure.update_yaxes(type="log", range=edges, **percent_ticks(*edges))
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
        f"{'+−'[rises[m] < 0]}{short(abs(rises[m]))} % with {m}" for m in dict.fromkeys((best, worst))
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
    figure.update_xaxes(title_text=f"bytes of weights ({unit})", range=[0, max(totals) / size],
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
    shifts = spread_out(names)
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


def _bytes(value: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"
