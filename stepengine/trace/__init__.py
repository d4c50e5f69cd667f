"""Record, save, load, replay and measure what an engine did."""

from stepengine.trace.io import load, save
from stepengine.trace.metrics import (
    Gap,
    KVUse,
    RequestMetrics,
    Span,
    device_spans,
    host_ms,
    host_spans,
    idle_fraction,
    idle_rows,
    kv_use,
    percentiles,
    request_metrics,
    summarize,
    token_gaps,
)
from stepengine.trace.perfetto import to_perfetto
from stepengine.trace.record import Trace
from stepengine.trace.replay import Replay, Snapshot

__all__ = [
    "Gap",
    "KVUse",
    "Replay",
    "RequestMetrics",
    "Snapshot",
    "Span",
    "Trace",
    "device_spans",
    "host_ms",
    "host_spans",
    "idle_fraction",
    "idle_rows",
    "kv_use",
    "load",
    "percentiles",
    "request_metrics",
    "save",
    "summarize",
    "to_perfetto",
    "token_gaps",
]
