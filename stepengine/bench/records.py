"""Records of the GPU suite, and the traces that it leaves for notebooks: what there is to draw, or nothing."""

import json
from pathlib import Path
from typing import Any

from stepengine.errors import TraceError
from stepengine.trace import Trace, load

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
