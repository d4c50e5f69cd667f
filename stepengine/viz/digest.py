"""A figure's data in one line, so that a changed number is noticed where pictures cannot be compared."""

import zlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go

DATA = ("x", "y", "z", "base", "width", "values", "labels", "text", "customdata")
DIGITS = 6  # significant: finer than a change of 0.01 %, coarser than what CPUs disagree on


def digest(figure: "go.Figure", values: bool = True) -> str:
    """One line from the data of all traces and frames: types, shapes, min, max, sum and a checksum.

    Without `values` only types, names and shapes count: for figures of wall-clock times.
    """
    kinds: Counter[str] = Counter()
    numbers: list[float] = []
    parts: list[str] = []
    points = 0
    for trace in _traces(figure):
        kinds[trace.type] += 1
        parts.append(f"{trace.type} {trace.name}")
        for name, data in _data(trace):
            array = np.asarray(data)
            points += array.size if name in ("y", "z") else 0
            parts.append(f"{trace.type}.{name}{array.shape}")
            if values:
                parts += (_rounded(item, numbers if name != "customdata" else []) for item in array.ravel().tolist())
    kind = " ".join(f"{count} {name}" for name, count in sorted(kinds.items())) or "empty"
    check = zlib.crc32("\n".join(parts).encode())
    frames = f", {len(figure.frames)} frames" if figure.frames else ""
    line = f"digest {kind}{frames}, {points} points"
    if values and numbers:
        line += f", min {min(numbers):.{DIGITS}g} max {max(numbers):.{DIGITS}g} sum {sum(numbers):.{DIGITS}g}"
    return f"{line}, {check:08x}"


def _traces(figure: "go.Figure") -> Iterator[Any]:
    yield from figure.data
    for frame in figure.frames:
        yield from frame.data


def _data(trace: Any) -> Iterator[tuple[str, Any]]:
    for name in DATA:
        value = trace[name] if name in trace else None
        if value is not None:
            yield name, value
    for name in ("error_x", "error_y"):
        error = trace[name] if name in trace else None
        if error is not None:
            yield from ((f"{name}.{side}", error[side]) for side in ("array", "arrayminus") if error[side] is not None)


def _rounded(item: Any, numbers: list[float]) -> str:
    if isinstance(item, int | float) and not isinstance(item, bool):
        if item == item:  # not NaN
            numbers.append(float(item))
        return f"{item:.{DIGITS}g}"
    return str(item)
