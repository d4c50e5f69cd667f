"""Metrics against values worked out by hand on small traces, and against formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepengine.core.plan import Chunk, RequestInfo, StepPlan, StepRecord
from stepengine.trace import Trace, idle_rows, kv_use, request_metrics, summarize
from stepengine.trace.metrics import batching
from tests.trace.synthetic import EXAMPLE, simulate

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=9)


def three_steps() -> Trace:
    """Request 0 arrives at 1.0 s, request 1 at 1.5 s; tokens are done at 2.0, 2.5 and 3.5 s."""
    trace = Trace({"stage": "1b", "max_num_seqs": 2, "block_size": 8, "num_blocks": 2})
    trace.add_request(RequestInfo(0, (1, 2, 3, 4), 3, t_arrived=1.0))
    trace.add_request(RequestInfo(1, (1, 2), 2, t_arrived=1.5))
    trace.append(StepRecord(StepPlan(0, (Chunk(0, 0, 4, (1,)),), (0,)), (5,), t_plan=1.25, t_run=1.3, t_done=2.0))
    trace.append(StepRecord(StepPlan(1, (Chunk(1, 0, 2, (2,)),), (1,)), (6,), t_plan=2.0, t_run=2.1, t_done=2.5))
    plan = StepPlan(2, (Chunk(0, 4, 1), Chunk(1, 2, 1)))
    trace.append(StepRecord(plan, (7, 8), ((1, "stop"),), t_plan=3.0, t_run=3.1, t_done=3.5))
    return trace


def test_latencies_by_hand():
    first, second = request_metrics(three_steps())
    assert (first.queue_ms, first.ttft_ms, first.itl_ms) == (250.0, 1000.0, (1500.0,))
    assert first.e2e_ms is None and first.tpot_ms is None and first.finish_reason is None  # it has not finished
    assert (first.prompt_tokens, first.output_tokens, first.computed_tokens) == (4, 2, 5)
    assert (second.queue_ms, second.ttft_ms, second.itl_ms) == (500.0, 1000.0, (1000.0,))
    assert (second.e2e_ms, second.tpot_ms, second.finish_reason) == (2000.0, 1000.0, "stop")


def test_summary_by_hand():
    summary = summarize(three_steps())
    assert summary["steps"] == 3 and summary["tokens_computed"] == 8 and summary["tokens_generated"] == 4
    assert summary["wall_s"] == 2.5  # 1.0 to 3.5
    assert summary["busy_s"] == pytest.approx(1.75)  # 1.25 to 2.5, and 3.0 to 3.5
    assert summary["tokens_per_s"] == pytest.approx(4 / 1.75)
    assert summary["itl_ms"] == {"p50": 1250.0, "p99": pytest.approx(1495.0)}
    assert summary["kv_utilization"] == pytest.approx(np.mean([4 / 8, 6 / 16, 8 / 16]))
    assert [use.held for use in kv_use(three_steps())] == [4, 6, 8]


def test_a_request_that_never_ran():
    trace = Trace({"stage": "1b"})
    trace.add_request(RequestInfo(0, (1, 2), 4))
    (metrics,) = request_metrics(trace)
    assert metrics[1:6] == (None, None, (), None, None)
    summary = summarize(trace)
    assert summary["steps"] == 0 and summary["ttft_ms"] is None and summary["tokens_per_s"] is None


@given(LENGTHS)
@settings(max_examples=40, deadline=None)
def test_computed_tokens_follow_the_formulas(lengths):
    naive, cached = (
        {m.id: m.computed_tokens for m in request_metrics(simulate(lengths, stage=s))} for s in ("0", "1a")
    )
    for request, (p, n) in enumerate(lengths):
        assert naive[request] == n * p + n * (n - 1) // 2
        assert cached[request] == p + n - 1


@given(LENGTHS, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_static_idle_steps_are_what_the_longest_makes_the_others_wait(lengths, slots):
    outputs = [n for _, n in lengths]
    batches = [outputs[i : i + slots] for i in range(0, len(outputs), slots)]
    expected = sum(max(batch) - n for batch in batches for n in batch)
    for stage in ("0", "1a"):
        assert sum(idle_rows(simulate(lengths, stage=stage, slots=slots))) == expected


@given(LENGTHS, st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_continuous_batching_idles_only_while_someone_waits(lengths, slots):
    assert sum(idle_rows(simulate(lengths, stage="1b", slots=slots))) == 0


def test_rows_that_a_small_pool_cannot_feed_are_idle():
    trace = simulate(((8, 4), (8, 4), (8, 4)), stage="2", slots=3, num_blocks=3)  # room for one at a time
    # steps: a prefill and 3 decodes, three times over; two rows idle in each decode while someone waits
    assert idle_rows(trace) == [0, 2, 2, 2, 0, 2, 2, 2, 0, 0, 0, 0]


def test_the_way_of_batching():
    assert batching(simulate(stage="1a")) == "static" and batching(simulate(stage="1b")) == "continuous"
    trace = simulate(stage="1a")
    trace.meta["batching"] = "continuous"
    assert batching(trace) == "continuous"


def test_utilization_of_slots_and_blocks():
    slots, blocks = (summarize(simulate(EXAMPLE, stage=s))["kv_utilization"] for s in ("1b", "2"))
    assert slots < 0.5 < blocks <= 1
    assert summarize(simulate(EXAMPLE, stage="0"))["kv_utilization"] is None
