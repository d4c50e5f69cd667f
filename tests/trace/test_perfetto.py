"""The export against the trace-event format: required fields, no overlap within a track, nothing lost."""

import json
from collections import defaultdict

import pytest

from stepengine.trace import Trace, to_perfetto
from tests.trace.synthetic import simulate


@pytest.mark.parametrize("stage", ["0", "1a", "1b", "2"])
def test_structure(stage):
    trace = simulate(stage=stage, num_blocks=7)
    events = json.loads(json.dumps(to_perfetto(trace)))["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    tracks = defaultdict(list)
    for event in events:
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and event["name"]
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            assert (event["pid"], event["tid"]) in named
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
    for (pid, _), spans in tracks.items():
        if pid == 2:  # slices of a request follow each other
            spans.sort()
            assert all(a[1] <= b[0] + 1e-3 for a, b in zip(spans, spans[1:], strict=False))
    slices = [e for e in events if e["ph"] == "X" and e["pid"] == 2 and e["name"] != "waiting"]
    assert sum(e["args"]["length"] for e in slices) == sum(r.plan.num_tokens for r in trace.steps)
    assert len(slices) == sum(len(r.plan.chunks) for r in trace.steps)


def test_names_say_what_a_slice_is():
    names = [e["name"] for e in to_perfetto(simulate(((5, 3),), stage="1b"))["traceEvents"] if e["pid"] == 2]
    assert names == ["process_name", "thread_name", "waiting", "prompt 5 tokens", "token 2", "token 3"]
    naive = [e["name"] for e in to_perfetto(simulate(((5, 2),), stage="0"))["traceEvents"] if e["pid"] == 2]
    assert naive[-1] == "token 2, 6 tokens computed"


def test_an_empty_trace():
    assert to_perfetto(Trace({}))["traceEvents"]
