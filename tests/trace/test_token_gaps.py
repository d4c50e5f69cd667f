"""Gaps between tokens: against the latencies, by brute force, and E8 by hand."""

import pytest

from stepengine.core.plan import Chunk, RequestInfo, StepPlan, StepRecord
from stepengine.trace import Trace, request_metrics, token_gaps
from tests.trace.synthetic import Job, simulate, simulate_paged


def trace_of(steps: list[list[tuple[int, int, int]]]) -> Trace:
    """A trace from (request, length, token) of each step; step n takes n + 1 ms."""
    trace, start, clock = Trace({"device": "cpu"}), {}, 0.0
    for request in sorted({request for step in steps for request, _, _ in step}):
        trace.add_request(RequestInfo(request, (1,), 9))
    for number, step in enumerate(steps):
        chunks = []
        for request, length, _ in step:
            chunks.append(Chunk(request, start.get(request, 0), length))
            start[request] = chunks[-1].end
        before, clock = clock, clock + (number + 1) / 1e3
        ids = tuple(token for *_, token in step)
        trace.append(StepRecord(StepPlan(number, tuple(chunks)), ids, t_plan=before, t_run=before, t_done=clock))
    return trace


PREFILL_FIRST = [[(0, 16, 5), (1, 24, 5)], [(2, 1000, 5)], [(0, 1, 5), (1, 1, 5), (2, 1, 5)], [(0, 1, 5), (1, 1, 5)]]
CHUNKED = [
    [(0, 16, 5), (1, 24, 5)],
    *([(0, 1, 5), (1, 1, 5), (2, length, -1)] for length in (256, 256, 256)),
    [(0, 1, 5), (1, 1, 5), (2, 232, 5)],
    [(0, 1, 5), (1, 1, 5), (2, 1, 5)],
]


def test_a_prompt_in_one_piece_lies_between_two_tokens_of_the_others():
    gaps = token_gaps(trace_of(PREFILL_FIRST))
    assert [(g.request, g.step, g.steps, g.tokens) for g in gaps] == [
        (0, 2, 2, 1003), (1, 2, 2, 1003), (2, 2, 1, 3), (0, 3, 1, 2), (1, 3, 1, 2),
    ]  # fmt: skip
    assert [round(g.ms, 6) for g in gaps] == [5, 5, 3, 4, 4]


def test_with_chunks_no_gap_exceeds_the_budget():
    gaps = token_gaps(trace_of(CHUNKED))
    assert [g.tokens for g in gaps if g.request == 0] == [258, 258, 258, 234, 3]
    assert {g.steps for g in gaps} == {1}
    assert [g.tokens for g in gaps if g.request == 2] == [3]  # a chunk in mid-prompt brings no token


@pytest.mark.parametrize("stage", ["0", "1a", "1b", "2"])
def test_gaps_are_the_inter_token_latencies_of_every_request(stage: str):
    trace = simulate(stage=stage, num_blocks=7)
    for metrics in request_metrics(trace):
        mine = [g for g in token_gaps(trace) if g.request == metrics.id]
        assert tuple(g.ms for g in mine) == pytest.approx(metrics.itl_ms)
        for gap in mine:
            between = trace.steps[gap.step - gap.steps + 1 : gap.step + 1]
            assert gap.tokens == sum(chunk.length for step in between for chunk in step.plan.chunks)
            ran = [gap.request in {c.request for c in step.plan.chunks} for step in between]
            assert ran[-1] and not any(ran[:-1])  # here every chunk brings a token


def test_preempted_swapped_and_forked_requests_have_gaps_like_their_latencies():
    jobs = [Job(6, 9), Job(5, 8, n=2), Job(4, 7, arrival=2), Job(7, 6, priority=1)]
    for preemption, host in (("recompute", 0), ("swap", 16)):
        trace = simulate_paged(jobs, num_blocks=9, preemption=preemption, host_blocks=host, forks={4: 0}).trace
        gaps = token_gaps(trace)
        assert max(g.steps for g in gaps) > 2
        for metrics in request_metrics(trace):
            assert tuple(g.ms for g in gaps if g.request == metrics.id) == pytest.approx(metrics.itl_ms)


def test_no_steps_no_gaps():
    assert token_gaps(Trace({})) == []
