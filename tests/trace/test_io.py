"""Files: exact round trips, and a sentence for everything that is not a whole trace."""

import gzip
import json

import pytest

from stepengine.core.plan import Chunk, Copy, RequestInfo, StepPlan, StepRecord, Swap
from stepengine.errors import TraceError
from stepengine.trace import Trace, load, save
from tests.trace.synthetic import simulate


def everything() -> Trace:
    """Every field of every record away from its default."""
    trace = Trace({"stage": "4", "versions": {"torch": "2.13"}, "nothing": None, "ratio": 0.1})
    trace.add_request(RequestInfo(3, (1, 2), 4, -1, 3, 2, 1 / 3))
    plan = StepPlan(
        7, (Chunk(3, 1, 2, (4, 5), 1, 2), Chunk(3, 1, 2, (), 0, 1)), (3,), (1,), (Swap(1, ((2, 3),)),),
        (Swap(2, ((4, 0), (5, 1))),), (Copy(1, 0, 2, 3),), (9,), "block is missing: 请求 3",
    )  # fmt: skip
    trace.append(StepRecord(plan, (5, -1), ((3, "stop"),), ((1, "abort"),), ((3, 4),), 0.1, 0.2, 1e-17))
    return trace


@pytest.mark.parametrize("name", ["run.jsonl", "run.jsonl.gz"])
@pytest.mark.parametrize("make", [everything, lambda: simulate(stage="2"), lambda: Trace({})])
def test_round_trip_is_exact(tmp_path, name, make):
    trace = make()
    loaded = load(save(trace, tmp_path / name))
    assert (loaded.meta, loaded.requests, loaded.steps) == (trace.meta, trace.requests, trace.steps)
    assert list(loaded.requests) == list(trace.requests)
    assert all(type(record) is StepRecord and type(record.plan) is StepPlan for record in loaded.steps)
    assert all(type(chunk) is Chunk for record in loaded.steps for chunk in record.plan.chunks)
    again = save(loaded, tmp_path / f"again-{name}")
    assert again.read_bytes() == (tmp_path / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {name, f"again-{name}"}  # nothing left beside them


def test_every_cut_is_noticed(tmp_path):
    whole = save(simulate(((2, 2), (1, 2))), tmp_path / "run.jsonl").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.jsonl").write_bytes(whole[:length])
        with pytest.raises(TraceError, match=r"cut\.jsonl, line \d+"):
            load(tmp_path / "cut.jsonl")


def test_cut_and_damaged_archives(tmp_path):
    whole = save(simulate(), tmp_path / "run.jsonl.gz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for content in (whole[: len(whole) // 2], whole[:-4], bytes(damaged), b"garbage", b""):
        (tmp_path / "bad.jsonl.gz").write_bytes(content)
        with pytest.raises(TraceError, match="line"):
            load(tmp_path / "bad.jsonl.gz")


@pytest.mark.parametrize(
    ("line", "change", "complaint"),
    [
        (1, lambda d: d | {"version": 2}, "line 1: trace format 2, but this version of stepengine reads format 1"),
        (1, lambda d: d | {"format": "other"}, "line 1: not a trace"),
        (1, lambda d: d | {"steps": None}, "line 1: the header lacks"),
        (1, lambda d: d | {"steps": d["steps"] - 1}, "here is one more"),
        (1, lambda d: [], "line 1: not a trace"),
        (2, lambda d: {"request": d["request"] | {"id": 1}}, "line 3"),
        (2, lambda d: {"request": d["request"] | {"prompt_ids": ["x"]}}, "line 2"),
        (2, lambda d: {}, "line 2"),
        (4, lambda d: 3, "line 4"),
        (4, lambda d: {"step": d["step"] | {"token_ids": [1]}}, "line 4: not a line of a trace (2 chunks but 1 token"),
        (4, lambda d: {"step": d["step"] | {"t_done": "now"}}, "line 4"),
        (4, lambda d: {"step": d["step"] | {"colour": 1}}, "unknown field 'colour'"),
        (4, lambda d: {"step": {"plan": d["step"]["plan"]}}, "line 4"),
        (4, lambda d: {"step": d["step"] | {"plan": {"step": 0, "chunks": [[0, 0]]}}}, "line 4"),
        (4, lambda d: {"step": d["step"] | {"plan": {"step": 0, "chunks": [[0, 0, 1, [], 0, 0, 0]]}}}, "line 4"),
    ],
)
def test_garbage_is_refused_naming_the_line(tmp_path, line, change, complaint):
    path = save(simulate(((2, 2), (1, 2))), tmp_path / "run.jsonl")
    lines = path.read_text().splitlines()
    lines[line - 1] = json.dumps(change(json.loads(lines[line - 1])))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(TraceError) as error:
        load(path)
    assert complaint in str(error.value) and str(path) in str(error.value)


def test_what_is_no_trace_at_all(tmp_path):
    with pytest.raises(TraceError, match="There is no trace file"):
        load(tmp_path / "absent.jsonl")
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(TraceError, match="line 1"):
        load(tmp_path / "noise")


def test_unwritable_values_leave_the_old_file(tmp_path):
    path = save(simulate(), tmp_path / "run.jsonl.gz")
    before = gzip.decompress(path.read_bytes())
    for value in (object(), float("nan")):
        with pytest.raises(TraceError, match="cannot be written"):
            save(Trace({"x": value}), path)
    assert gzip.decompress(path.read_bytes()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl.gz"]
