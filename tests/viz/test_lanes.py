"""Host and device lanes: spans and idle shares against brute force and by hand, and the figure's data against them."""

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepengine.core.plan import Chunk, StepPlan, StepRecord
from stepengine.errors import TraceError
from stepengine.trace import Span, Trace, device_spans, host_ms, host_spans, idle_fraction
from stepengine.trace.metrics import idle_share
from stepengine.viz.figures import host_device_lanes
from stepengine.viz.lanes import Lanes, lanes_of
from tests.trace.synthetic import simulate

# per step, in units of 1 ms: t_plan, t_run, t_launched, t_landed, t_done, device_began, device_ended
ONE_BY_ONE = ((0, 1, 3, 8, 9, 2, 7), (9, 10, 12, 17, 18, 11, 16), (18, 19, 21, 26, 27, 20, 25))
AHEAD = ((0, 1, 3, 8, 9, 2, 7), (4, 5, 6, 13, 14, 7, 12), (9, 10, 11, 18, 19, 12, 17))
BY_ITSELF = ((0, 1, 9, 9, 10, 2, 8), (10, 11, 19, 19, 20, 12, 18))


def record(step: int, times=(0,) * 7, chunks: int = 1) -> StepRecord:
    plan, run, launched, landed, done, began, ended = (time / 1e3 for time in times)
    plan_of = StepPlan(step, tuple(Chunk(row, step, 1) for row in range(chunks)))
    return StepRecord(plan_of, (5,) * chunks, (), (), (), plan, run, done, launched, landed, began, ended)


def trace_of(steps, **meta) -> Trace:
    trace = Trace({"device": "cuda", **meta})
    for number, times in enumerate(steps):
        trace.append(record(number, times))
    return trace


def ms(spans, kind: str) -> list[tuple[int, float, float]]:
    return [(s.step, round(1e3 * s.begin, 6), round(1e3 * s.end, 6)) for s in spans if s.kind == kind]


def test_spans_of_steps_one_after_another():
    spans = host_spans(trace_of(ONE_BY_ONE))
    assert ms(spans, "plan") == [(0, 0, 1), (1, 9, 10), (2, 18, 19)]
    assert ms(spans, "launch") == [(0, 1, 3), (1, 10, 12), (2, 19, 21)]
    assert ms(spans, "wait") == [(0, 3, 8), (1, 12, 17), (2, 21, 26)]
    assert ms(spans, "update") == [(0, 8, 9), (1, 17, 18), (2, 26, 27)]
    assert host_ms(trace_of(ONE_BY_ONE)) == pytest.approx([4, 4, 4])


def test_a_pipelined_host_waits_only_after_it_has_launched_the_next_step():
    spans = host_spans(trace_of(AHEAD, pipelined=True))
    assert ms(spans, "wait") == [(0, 6, 8), (1, 11, 13), (2, 14, 18)]
    busy = sorted((s.begin, s.end) for s in spans)
    assert all(first[1] <= second[0] + 1e-12 for first, second in zip(busy, busy[1:], strict=False))  # one thread


def test_a_host_that_does_the_device_s_work_itself_waits_for_itself():
    spans = host_spans(trace_of(BY_ITSELF, device="cpu"))
    assert ms(spans, "launch") == [(0, 1, 2), (0, 8, 9), (1, 11, 12), (1, 18, 19)]
    assert ms(spans, "wait") == [(0, 2, 8), (1, 12, 18)]
    assert host_ms(trace_of(BY_ITSELF, device="cpu")) == pytest.approx([4, 4])
    launching = ms(host_spans(trace_of(BY_ITSELF)), "launch")  # on a GPU, whose work the host cannot do
    assert launching == [(0, 1, 9), (1, 11, 19)]


def test_an_old_trace_has_one_bar_and_no_device():
    trace = simulate(stage="2")
    assert {span.kind for span in host_spans(trace)} == {"plan", "run"}
    assert device_spans(trace) == [] and idle_fraction(trace) is None and host_ms(trace) == []
    figure = host_device_lanes({"old": trace}, 1, 2)
    assert "not recorded" in figure.layout.title.text and "not recorded" in figure.layout.annotations[0].text
    assert {bar.name for bar in figure.data if bar.type == "bar"} == {"plan", "run"}


def test_idle_time_by_hand():
    assert idle_fraction(trace_of(ONE_BY_ONE)) == pytest.approx(8 / 23)  # 7..11 and 16..20 of 2..25
    assert idle_fraction(trace_of(AHEAD)) == pytest.approx(0)
    overlapping = trace_of(((0, 0, 0, 0, 0, 1, 6), (0, 0, 0, 0, 0, 4, 9), (0, 0, 0, 0, 0, 11, 13)))
    overlapping.append(record(3))  # no times
    assert idle_fraction(overlapping) == pytest.approx(2 / 12)
    assert len(device_spans(overlapping)) == 3


def test_a_step_without_tokens_takes_no_time():
    trace = trace_of(ONE_BY_ONE)
    trace.append(record(3, (27, 27, 0, 0, 27, 0, 0), chunks=0))
    assert {span.step for span in host_spans(trace)} == {0, 1, 2}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_idle_share_equals_counting_ticks(pairs):
    spans = [Span("busy", n, begin, begin + length) for n, (begin, length) in enumerate(pairs)]
    first, last = min(s.begin for s in spans), max(s.end for s in spans)
    idle = sum(not any(s.begin <= tick < s.end for s in spans) for tick in range(first, last))
    assert idle_share(spans) == pytest.approx(idle / (last - first) if last > first else 0)


def bars(figure: go.Figure, name: str) -> list[tuple[float, float]]:
    return [(b, b + x) for bar in figure.data if bar.name == name for b, x in zip(bar.base, bar.x, strict=True)]


def test_the_figure_draws_the_spans_of_the_window():
    figure = host_device_lanes({"eager": trace_of(ONE_BY_ONE), "ahead": trace_of(AHEAD)}, 0, 2)
    busy = [bar for bar in figure.data if bar.name == "busy"]
    drawn = [
        (round(b, 6), round(b + x, 6)) for b, x in zip(busy[0].base, busy[0].x, strict=True) if x > 1e-9
    ]  # from 0 to 18, where step 2 is planned
    assert drawn == [(2, 7), (11, 16)]
    assert [text.text for text in figure.layout.annotations] == [
        "<b>eager</b>  device idle 44 %",  # 8 of 18
        "<b>ahead</b>  device idle 22 %",  # the first 2 of 9
    ]
    assert figure.layout.title.text == "Device idle in these 2 steps: 44 % eager, 22 % ahead"
    assert "44 %" in figure.layout.meta["alt"] and figure.layout.xaxis.title.text == "time (ms)"
    assert {round(end, 6) for _, end in bars(figure, "plan")} >= {1, 10}


def test_pipelined_neighbours_reach_into_the_window():
    figure = host_device_lanes({"ahead": trace_of(AHEAD)}, 1, 1)  # from 4 to 9
    busy = sorted((round(b, 6), round(e, 6)) for b, e in bars(figure, "busy") if e - b > 1e-9)
    assert busy == [(0, 3), (3, 5)]
    assert all(
        -1e-9 <= b <= e <= 5 + 1e-9 for bar in ("plan", "launch", "wait", "update") for b, e in bars(figure, bar)
    )


def test_kernels_may_be_given_instead_of_a_trace():
    host = [Span("plan", 0, 0, 1e-6), Span("launch", 0, 1e-6, 4e-6), Span("plan", 1, 8e-6, 9e-6)]
    kernels = [Span("busy", 0, 2e-6, 3e-6), Span("busy", 0, 4e-6, 6e-6)]
    figure = host_device_lanes({"toy": Lanes(host, kernels, "no machine")}, 0, 1, unit="us")
    assert sorted((round(b, 6), round(e, 6)) for b, e in bars(figure, "busy")) == [(2, 3), (4, 6)]
    assert "62 %" in figure.layout.title.text  # 5 of 8
    assert "no machine" in figure.layout.annotations[0].text and "µs" in figure.layout.xaxis.title.text


def test_a_recorded_run_names_its_machine_and_a_toy_run_says_so():
    real = trace_of(ONE_BY_ONE, machine={"gpu": "A GPU", "cpu": "a CPU"}, date="2026-01-02")
    assert lanes_of(real).where == "A GPU, 2026-01-02"
    assert "A GPU, 2026-01-02" in host_device_lanes({"x": real}, 0, 2).layout.annotations[0].text
    toy = trace_of(ONE_BY_ONE, machine={"gpu": None, "cpu": "a CPU"}, note="toy size on a CPU: its times mean nothing")
    assert lanes_of(toy).where.startswith("toy run")


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda: host_device_lanes({}), "no run to draw"),
        (
            lambda: host_device_lanes({"x": trace_of(ONE_BY_ONE)}, 1, 3),
            "'x' has 3 steps and cannot show 3 from number 1",
        ),
        (lambda: host_device_lanes({"x": trace_of(ONE_BY_ONE)}, 0, 0), "cannot show 0"),
        (lambda: host_device_lanes({"x": trace_of(ONE_BY_ONE)}, 0, 2, unit="s"), "unit='s'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, says):
    with pytest.raises(TraceError, match=says):
        draw()
