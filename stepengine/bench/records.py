"""Records of the GPU suite, and the traces that it leaves for notebooks: what there is to draw, or nothing."""

import json
from pathlib import Path
from typing import Any

from stepengine.errors import TraceError
from stepengine.trace import Trace, load
from stepengine.viz.roofline import record_label

ROOT = Path(__file__).resolve().parents[2]


def newest_record(folder: Path | None = None, smoke: bool = False) -> dict[str, Any] | None:
    """The newest record in a folder (by default `bench/records`), or None.

    A smoke run's record, made on a CPU at toy size, counts only with `smoke`. Files that are no records are
    passed over.
    """
    found = []
    for path in sorted((folder or ROOT / "bench" / "records").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("what") == "gpu suite" and (smoke or not record.get("smoke", True)):
            found.append(record)
    return max(found, key=lambda record: str(record.get("time")), default=None)


def recorded_traces(folder: Path | None = None) -> dict[str, Trace]:
    """{file's stem: trace} of runs recorded on a GPU, by default in `notebooks/traces`; toy runs are left out."""
    traces = {}
    for path in sorted((folder or ROOT / "notebooks" / "traces").glob("*.jsonl.gz")):
        try:
            trace = load(path)
        except TraceError:
            continue
        if (trace.meta.get("machine") or {}).get("gpu") and not trace.meta.get("note"):
            traces[path.name.removesuffix(".jsonl.gz")] = trace
    return traces


def idle_lines(record: dict[str, Any]) -> list[str]:
    """What a record says of the device's idle time and the host's work in stage 3's decode steps, with its machine."""
    found = (record.get("parts", {}).get("idle/stage3") or {}).get("results", {})
    lines = [record_label(record)]
    for name, case in found.items():
        if not isinstance(case, dict) or "wall_us" not in case:
            continue
        setting, batch = name.split(", ")
        line = (
            f"{setting}, batch of {batch}: {case['wall_us']:,.0f} µs a step, the host works {case['host_us']:,.0f} µs"
        )
        if case.get("device_us") is not None and case.get("idle") is not None:
            line += f", the device {case['device_us']:,.0f} µs: idle {case['idle']:.1%}"
        lines.append(line)
    return lines
