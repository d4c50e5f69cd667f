"""What kernels and steps reach against what the machine can do: a roofline, and bars from a record of the GPU suite.

A record is the JSON that `python -m stepengine.bench.gpu` writes. Every figure drawn from one names its machine
and date; a record of a smoke run is called a toy run and is not compared with anything.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stepengine.errors import TraceError
from stepengine.viz.template import HUES, INK, QUIET, dressed, new_figure, readable

if TYPE_CHECKING:
    import plotly.graph_objects as go

Record = Mapping[str, Any]
PLOT = (680, 270)  # pixels of the plot itself, for text along the slope
OURS = {"stage3": HUES[0], "ours": HUES[0], "stage2": HUES[4]}
PEERS = {
    "flash_attention": ("SDPA flash", HUES[1]),
    "cudnn_attention": ("SDPA cuDNN", HUES[2]),
    "math": ("SDPA math", HUES[3]),
    "sdpa": ("SDPA, K/V gathered before", HUES[5]),
    "gather + sdpa": ("gather + SDPA", HUES[6]),
}


class Point(NamedTuple):
    """Something that ran: what it computed, what it had to move, how long it took."""

    name: str
    flops: float
    bytes: float
    seconds: float
    kind: str = ""  # points of one kind share a colour

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.seconds

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.seconds


def record_label(record: Record) -> str:
    """Machine and date; of a smoke run, that it is a toy run."""
    machine, day = record.get("machine") or {}, str(record.get("time", "no date"))[:10]
    if record.get("smoke"):
        return f"TOY RUN on a CPU ({machine.get('cpu', 'unknown')}), {day}: its times mean nothing"
    return f"{machine.get('gpu') or machine.get('cpu') or 'unknown machine'}, {day}"


def roofline(
    points: Sequence[Point], bytes_per_s: float, flops_per_s: float, where: str = "", peaks: tuple[str, str] = (
        "copy bandwidth", "matrix product"
    )
) -> "go.Figure":  # fmt: skip
    """FLOP/s against FLOP per byte, both logarithmic, under the two ceilings, which should come of the same run.

    `peaks` says what the ceilings were measured with, `where` on which machine and when.
    """
    if not points or min(bytes_per_s, flops_per_s) <= 0:
        raise TraceError("A roofline needs at least one point and two ceilings above 0, measured in the same run.")
    ridge = flops_per_s / bytes_per_s
    low, high = (f(points, key=lambda p: p.intensity) for f in (min, max))
    found = max((p for p in points if p.kind == low.kind), key=lambda p: p.bytes_per_s)
    of_bytes, of_flops = 100 * found.bytes_per_s / bytes_per_s, 100 * found.flops_per_s / flops_per_s
    title = f"{found.name}: {_short(of_bytes)} % of the bandwidth, {_short(of_flops)} % of the FLOP/s"
    told = [
        f"{p.name}: {p.intensity:.3g} FLOP/byte, {_flops(p.flops_per_s)}, {100 * p.bytes_per_s / bytes_per_s:.3g} % of "
        f"the bandwidth, {100 * p.flops_per_s / flops_per_s:.3g} % of the FLOP/s"
        for p in points
    ]
    figure = new_figure(
        title,
        f"left of {ridge:.3g} FLOP/byte bytes decide, right of it arithmetic" + (f"<br>{where}" if where else ""),
        f"Roofline: {bytes_per_s / 1e9:.3g} GB/s and {_flops(flops_per_s)}. " + "; ".join(told) + ".",
        height=420,
        margin={"t": 100},
    )
    left = min(low.intensity, ridge) / 4
    right = max(high.intensity, ridge) * 6
    figure.add_scatter(
        name="roof", x=[left, ridge, right], y=[left * bytes_per_s, flops_per_s, flops_per_s], mode="lines",
        line={"color": INK, "width": 2}, hoverinfo="skip",
    )  # fmt: skip
    hues = dict(zip(dict.fromkeys(p.kind for p in points), HUES * len(points), strict=False))
    for kind, hue in hues.items():
        mine = [p for p in points if p.kind == kind]
        figure.add_scatter(
            name=kind or "points", x=[p.intensity for p in mine], y=[p.flops_per_s for p in mine], mode="markers",
            marker={"size": 11, "color": hue, "line": {"color": readable(hue), "width": 1.5}},
            customdata=[[_number(p.bytes_per_s / 1e9), _flops(p.flops_per_s)] for p in mine],
            hovertext=[p.name for p in mine],
            hovertemplate="%{hovertext}: %{x:.3g} FLOP/byte, %{customdata[1]}, %{customdata[0]} GB/s<extra></extra>",
        )  # fmt: skip
    for point in _labelled(points):
        beside = {"xanchor": "left", "xshift": 11} if point.intensity < ridge else {"xanchor": "center", "yshift": -16}
        figure.add_annotation(
            x=np.log10(point.intensity), y=np.log10(point.flops_per_s), text=point.name, showarrow=False,
            font={"size": 12, "color": readable(hues[point.kind])}, **beside,
        )  # fmt: skip
    figure.add_annotation(
        x=np.log10(right), y=np.log10(flops_per_s), text=f"{peaks[1]}: {_flops(flops_per_s)}", showarrow=False,
        xanchor="right", yanchor="bottom", font={"size": 12, "color": QUIET},
    )  # fmt: skip
    lowest = np.log10(min(*(p.flops_per_s for p in points), left * bytes_per_s) / 3)
    highest = np.log10(max(*(p.flops_per_s for p in points), flops_per_s) * 3)
    across, up = PLOT[0] / np.log10(right / left), PLOT[1] / (highest - lowest)  # pixels per decade
    figure.add_annotation(
        x=np.log10(left * ridge) / 2, y=np.log10(left * ridge) / 2 + np.log10(bytes_per_s), showarrow=False,
        text=f"{peaks[0]}: {_number(bytes_per_s / 1e9)} GB/s", textangle=-float(np.degrees(np.arctan2(up, across))),
        xshift=-8, yshift=10, font={"size": 12, "color": QUIET},
    )  # fmt: skip
    figure.update_xaxes(
        type="log", title_text="arithmetic intensity (FLOP per byte)", range=[np.log10(left), np.log10(right)],
        dtick=1, showgrid=True,
    )  # fmt: skip
    powers = range(int(np.ceil(lowest)), int(np.floor(highest)) + 1)
    return figure.update_yaxes(
        type="log", title_text="FLOP/s", range=[lowest, highest], tickvals=[10.0**p for p in powers],
        ticktext=[_flops(10.0**p).replace("FLOP/s", "").strip() for p in powers],
    )  # fmt: skip


def _labelled(points: Sequence[Point]) -> list[Point]:
    """Points whose name is written: the fastest and the slowest of a kind, all of a few, where there is room."""
    written: list[Point] = []
    for kind in dict.fromkeys(p.kind for p in points):
        ordered = sorted((p for p in points if p.kind == kind), key=lambda p: -p.flops_per_s)
        for point in ordered if len(ordered) <= 3 else (ordered[0], ordered[-1]):
            if not any(
                abs(np.log10(point.flops_per_s / p.flops_per_s)) < 0.2
                and abs(np.log10(point.intensity / p.intensity)) < 0.6
                for p in written
            ):
                written.append(point)
    return written


def record_points(record: Record) -> list[Point]:
    """The attention kernels of a record as points: stage 3's prefill, stage 2's and 3's paged decode.

    FLOPs and bytes are the record's own. What it leaves out, the bytes of a prefill (q read, the result written,
    each key and value read once) and the FLOPs of a decode, follows from the sizes that its other cases imply.
    """
    prefill, decode = _cases(record, "prefill"), _cases(record, "decode")
    even = [case for name, case in prefill.items() if name.isdigit()]
    points = []
    if not even or len({case["batch"] / case["tokens"] for case in decode.values()}) < 2:
        return []
    heads = even[0]["flops"] / (4 * _pairs(even[0]))  # Hq x D
    sizes = np.array([[case["tokens"], 2 * case["batch"]] for case in decode.values()], dtype=float)
    moved = np.array([case["bytes"] for case in decode.values()], dtype=float)
    token, row = np.linalg.lstsq(sizes, moved, rcond=None)[0]  # bytes of K and V per token, of a query per row
    for name, case in prefill.items():
        if seconds := _seconds(case.get("ours")):
            keys = case["tokens"] + case["sequences"] * case["before"]
            points.append(
                Point(f"prefill {name}", case["flops"], 2 * case["tokens"] * row + keys * token, seconds, "prefill")
            )
    for name, case in decode.items():
        for stage, kind in (("stage3", "decode, stage 3"), ("stage2", "stage 2")):
            if seconds := _seconds(case.get(stage)):
                called = f"{kind}: {name.replace(' x ', ' × ')}"
                points.append(Point(called, 4 * heads * case["tokens"], case["bytes"], seconds, kind))
    return points


def record_roofline(record: Record) -> "go.Figure":
    """The roofline of a record's kernels under the ceilings measured in the same run; "ragged" and small cases too."""
    points, (copy_gbs, tflops) = record_points(record), _ceilings(record)
    if not points or copy_gbs is None or tflops is None:
        raise TraceError("The record has no ceilings, no prefill or no decode: run the whole GPU suite.")
    figure = roofline(points, 1e9 * copy_gbs, 1e12 * tflops, record_label(record))
    return _as_toy(figure, record)


def kernel_bars(record: Record) -> "go.Figure":
    """Prefill in TFLOP/s and paged decode in GB/s, each against its peers and the ceiling of the same run."""
    from plotly.subplots import make_subplots

    prefill, decode = _cases(record, "prefill"), _cases(record, "decode")
    if not prefill or not decode:
        raise TraceError("The record has no prefill or no decode: run the whole GPU suite.")
    copy_gbs, tflops = _ceilings(record)
    headings = ("<b>Prefill</b> by length, TFLOP/s", "<b>Paged decode</b> by batch (above) and context (below), GB/s")
    figure = make_subplots(rows=2, cols=1, subplot_titles=headings, vertical_spacing=0.2)
    names = {"ours": "stage 3", "stage3": "stage 3", "stage2": "stage 2"} | {k: v for k, (v, _) in PEERS.items()}
    hues = OURS | {key: hue for key, (_, hue) in PEERS.items()}
    keys = (("ours", "flash_attention", "cudnn_attention", "math"), ("stage3", "stage2", "sdpa", "gather + sdpa"))
    for row, (cases, listed, unit, ceiling, what) in enumerate(
        ((prefill, keys[0], "tflops", tflops, "matrix product"), (decode, keys[1], "gbs", copy_gbs, "copy")), 1
    ):
        shown = [key for key in listed if any(unit in (case.get(key) or {}) for case in cases.values())]
        width = 0.84 / max(1, len(shown))
        top = ceiling or 0.0
        spoken = {"tflops": "TFLOP/s", "gbs": "GB/s"}[unit]
        for place, key in enumerate(shown):
            values = [(case.get(key) or {}).get(unit) for case in cases.values()]
            top = max([top, *(v for v in values if v)])
            figure.add_bar(
                name=names[key], x=[at - 0.42 + (place + 0.5) * width for at in range(len(cases))], y=values,
                width=width,
                marker={"color": hues[key], "line": {"color": readable(hues[key]), "width": 1}},
                hovertext=list(cases),
                hovertemplate=f"{names[key]}, %{{hovertext}}: %{{y:,.3g}} {spoken}<extra></extra>",
                row=row, col=1,
            )  # fmt: skip
        if ceiling:
            figure.add_hline(y=ceiling, line={"color": INK, "width": 1.5, "dash": "dash"}, row=row, col=1)
            figure.add_annotation(
                x=len(cases) - 0.5, y=ceiling, text=f"{what}: {_number(ceiling)}", showarrow=False, xanchor="right",
                yanchor="bottom", font={"size": 12, "color": QUIET}, row=row, col=1,
            )  # fmt: skip
        figure.update_xaxes(
            tickvals=list(range(len(cases))),
            ticktext=[_tick(name) for name in cases],
            range=[-0.6, len(cases) - 0.4],
            row=row,
            col=1,
        )
        figure.update_yaxes(title_text=spoken, range=[0, 1.18 * top], nticks=5, row=row, col=1)
    figure.update_annotations(x=0, xanchor="left", font={"size": 13, "color": INK}, selector={"xref": "paper"})
    there = {trace.name: trace.marker.line.color for trace in figure.data}
    key = " · ".join(f"<span style='color:{color}'>■ {name}</span>" for name, color in there.items())
    title = _bars_title(prefill, decode)
    dressed(figure, title, f"{key}<br>{record_label(record)}", f"{title}. {record_label(record)}.", height=560)
    figure.update_layout(margin={"t": 128})
    return _as_toy(figure, record)


def _bars_title(prefill: Mapping[str, Any], decode: Mapping[str, Any]) -> str:
    parts = []
    length = "4096" if "4096" in prefill else next(iter(prefill))
    over = prefill[length].get("speedup_over_flash_attention")
    share = (prefill[length].get("ours") or {}).get("of_matmul")
    if over:
        parts.append(f"Prefill {length}: {over:.2f}× SDPA's flash")
    elif share:
        parts.append(f"Prefill {length}: {100 * share:.0f} % of the matrix product")
    shares = [(case.get("stage3") or {}).get("of_copy") for case in decode.values()]
    if best := max((s for s in shares if s), default=0):
        parts.append(f"decode up to {100 * best:.0f} % of the copy bandwidth")
    return "; ".join(parts) or "Kernels, measured"


def _as_toy(figure: "go.Figure", record: Record) -> "go.Figure":
    """A smoke run's figure shows that drawing works: it states no finding."""
    if record.get("smoke"):
        figure.update_layout(title_text="TOY RUN, not a GPU's result: the figure only shows what would stand here")
    return figure


def _cases(record: Record, part: str) -> dict[str, Any]:
    """The cases of a part that ran; "error" compares results, it times nothing."""
    found = (record.get("parts", {}).get(part) or {}).get("results", {})
    return {name: case for name, case in found.items() if isinstance(case, Mapping) and "tokens" in case}


def _pairs(case: Mapping[str, Any]) -> float:
    """(query, key) pairs that causality leaves, in a case of equal sequences."""
    length = case["tokens"] / case["sequences"]
    return float(case["sequences"] * (length * case["before"] + length * (length + 1) / 2))


def _seconds(timed: Any) -> float | None:
    median = timed.get("median_ms") if isinstance(timed, Mapping) else None
    return median / 1e3 if median else None


def _ceilings(record: Record) -> tuple[float | None, float | None]:
    best = (record.get("parts", {}).get("ceilings") or {}).get("results", {}).get("best", {})
    return best.get("copy_gbs"), best.get("matmul_tflops")


def _tick(name: str) -> str:
    return name.replace(" x ", "<br>").replace(" after ", "<br>after ")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _flops(value: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9999:
            return f"{value / size:.3g} {unit}FLOP/s"
    return f"{value:.3g} FLOP/s"


def _short(percent: float) -> str:
    return f"{percent:.0f}" if percent >= 9.5 else f"{percent:.1f}"
