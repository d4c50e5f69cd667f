"""The figures of chunked prefill: their data against the plans, E8 by hand, and what cannot be drawn."""

import re

import numpy as np
import plotly.graph_objects as go
import pytest

from stepengine import LLM, SamplingParams
from stepengine.core.plan import StepRecord
from stepengine.errors import TraceError
from stepengine.trace import Trace, request_metrics, token_gaps
from stepengine.viz.chunked import SweepPoint, knee, slices, sweep_point
from stepengine.viz.figures import budget_and_gaps, budget_sweep, digest, mixed_schedule
from stepengine.viz.template import PAPER, contrast, request_style
from tests.trace.synthetic import simulate
from tests.trace.test_token_gaps import CHUNKED, PREFILL_FIRST, trace_of

POINTS = {
    32: SweepPoint(270, 4000, 4.1),
    64: SweepPoint(390, 3100, 5.6),
    256: SweepPoint(1080, 2400, 7.0),
    512: SweepPoint(1700, 2350, 7.1),
}


def e8() -> dict[str, Trace]:
    first, chunks = trace_of(PREFILL_FIRST), trace_of(CHUNKED)
    first.meta.update(max_num_batched_tokens=2048, chunked=False)
    chunks.meta.update(max_num_batched_tokens=258, chunked=True)
    return {"prefill first": first, "in chunks": chunks}


def bars(figure: go.Figure, axis: str = "y") -> dict[str, go.Bar]:
    return {bar.name: bar for bar in figure.data if bar.type == "bar" and (bar.yaxis or "y") == axis}


def stacked(figure: go.Figure) -> dict[int, int]:
    """The height of each step's stack, after checking that nothing overlaps and nothing floats."""
    pieces: dict[int, list[tuple[float, float]]] = {}
    for bar in bars(figure).values():
        for x, base, y in zip(bar.x, bar.base, bar.y, strict=True):
            pieces.setdefault(int(x), []).append((base, base + y))
    for spans in pieces.values():
        spans.sort()
        assert [low for low, _ in spans] == [0, *(high for _, high in spans[:-1])]
    return {x: int(max(high for _, high in spans)) for x, spans in sorted(pieces.items())}


def words(figure: go.Figure) -> list[str]:
    return [re.sub("<[^>]*>", " ", note.text).split("  ")[-1].strip() for note in figure.layout.annotations]


def test_the_stack_of_each_step_is_its_plan():
    for trace in e8().values():
        totals = {at: step.plan.num_tokens for at, step in enumerate(trace.steps)}
        assert stacked(mixed_schedule(trace)) == totals
        pieces = slices(trace)
        assert {(p.at, p.request): p.tokens for p in pieces} == {
            (at, c.request): c.length for at, step in enumerate(trace.steps) for c in step.plan.chunks
        }
        assert [p.prompt for p in pieces if p.request == 2] == [p.tokens > 1 for p in pieces if p.request == 2]


def test_prompts_have_the_requests_colour_and_decodes_its_darker_shade():
    trace = e8()["in chunks"]
    drawn = bars(mixed_schedule(trace))
    for request, letter in enumerate("ABC"):
        style = request_style(trace, request)
        assert drawn[f"{letter} prompt"].marker.color == style.color
        assert contrast(drawn[f"{letter} decode"].marker.color, PAPER) > contrast(style.color, PAPER) + 1
    assert list(drawn["C prompt"].y) == [256, 256, 256, 232] and list(drawn["C decode"].y) == [1]


def test_the_budget_is_a_line_where_prompts_are_chunked():
    both = e8()
    lines = {name: [t for t in mixed_schedule(trace).data if t.name == "budget"] for name, trace in both.items()}
    assert not lines["prefill first"] and list(lines["in chunks"][0].y) == [258, 258]
    asked = mixed_schedule(both["prefill first"], budget=1000)
    assert list(next(t for t in asked.data if t.name == "budget").y) == [1000, 1000]


def test_titles_say_who_waits():
    both = e8()
    assert (
        mixed_schedule(both["prefill first"]).layout.title.text == "Step 1 runs 1,000 tokens, and A and B get nothing"
    )
    title = mixed_schedule(both["in chunks"], first=1, name="chunks").layout.title.text
    assert title == "chunks: at most 258 tokens a step, and nobody who decodes waits"


def test_marks_show_who_got_a_token_and_who_waited():
    figure = mixed_schedule(e8()["prefill first"])
    marks = {t.name: list(t.x) for t in figure.data if t.type == "scatter" and t.mode == "markers"}
    assert marks == {
        "A gets a token": [0, 2, 3], "A waits": [1], "B gets a token": [0, 2, 3], "B waits": [1],
        "C gets a token": [1, 2],
    }  # fmt: skip


def test_steps_above_gaps_below_on_the_same_scales():
    both = e8()
    figure = budget_and_gaps(both, watched=(0, 1))
    layout = figure.layout
    assert layout.yaxis2.matches == "y" and layout.yaxis4.matches == "y3"
    for axis, trace in (("y3", both["prefill first"]), ("y4", both["in chunks"])):
        below = bars(figure, axis)
        assert set(below) == {"gaps of A", "gaps of B"}
        wanted = [gap for gap in token_gaps(trace) if gap.request == 0]
        assert list(below["gaps of A"].y) == [gap.tokens for gap in wanted]
        assert [round(x) for x in below["gaps of A"].x] == [gap.step for gap in wanted]
    assert layout.title.text == "Longest gap: 1,003 tokens prefill first, 258 tokens in chunks"
    assert {"1,003 tokens", "258 tokens", "budget 258"} <= set(words(figure))


def test_over_time_bars_are_as_wide_as_their_steps_and_gaps_are_latencies():
    trace = e8()["in chunks"]
    figure = budget_and_gaps({"run": trace}, unit="ms")
    c = bars(figure)["C prompt"]
    took = [step.t_done - step.t_plan for step in trace.steps]
    assert list(c.width) == pytest.approx(took[1:5], rel=0.1)
    assert list(c.x) == pytest.approx([(step.t_plan + step.t_done) / 2 for step in trace.steps[1:5]])
    a = bars(figure, "y2")["gaps of A"]
    assert list(a.y) == pytest.approx(request_metrics(trace)[0].itl_ms)
    assert list(a.x) == pytest.approx([step.t_done for step in trace.steps[1:]], abs=0.001)


def test_a_window_shows_only_its_steps():
    trace = e8()["in chunks"]
    assert list(stacked(mixed_schedule(trace, first=2, steps=2))) == [2, 3]
    figure = budget_and_gaps({"run": trace}, first=2, steps=2, watched=(0,))
    assert list(bars(figure, "y2")) == ["gaps of A"] and len(bars(figure, "y2")["gaps of A"].x) == 2


def test_a_real_run_draws_what_its_scheduler_planned():
    llm = LLM("tiny-random", stage="4a", max_num_seqs=4, max_model_len=64, max_num_batched_tokens=16, trace=True)
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (9, 8, 3)]
    llm.generate([[5] * 4, [6] * 5, [7] * 40], params)
    totals = stacked(mixed_schedule(llm.trace))
    assert max(totals.values()) == 16 and sum(totals.values()) == 4 + 5 + 40 + 8 + 7 + 2
    budget_and_gaps({"a": llm.trace, "b": llm.trace}, unit="ms")


def test_a_preempted_request_s_second_prefill_is_a_prompt_again():
    trace = simulate(stage="2", num_blocks=7)
    gone = {request for step in trace.steps for request in step.plan.preempted}
    again = [piece for piece in slices(trace) if piece.request in gone and piece.prompt]
    assert gone and len(again) > len(gone)


def test_a_sweep_point_is_made_of_each_steps_shortest_time():
    slow = e8()["in chunks"]
    fast = Trace(dict(slow.meta))
    for info in slow.requests.values():
        fast.add_request(info)
    clock = 0.0
    for at, step in enumerate(slow.steps):
        took = (step.t_done - step.t_plan) * (2 if at % 2 else 0.5)
        fast.append(StepRecord(step.plan, step.token_ids, t_plan=clock, t_run=clock, t_done=clock + took))
        clock += took
    times = np.array([(step.t_done - step.t_plan) * (1 if at % 2 else 0.5) for at, step in enumerate(slow.steps)])
    point = sweep_point([slow, fast], long=2, watched=(0, 1))
    assert point.gap_ms == pytest.approx(float(np.percentile([*times[1:], *times[1:]], 99)) * 1e3)
    assert point.first_ms == pytest.approx(times[:5].sum() * 1e3)  # C is there from the first step on
    assert point.tokens_per_s == pytest.approx(14 / times.sum())
    alone = sweep_point([slow], long=2, watched=(0, 1))
    gaps = [gap.ms for gap in token_gaps(slow) if gap.request in (0, 1)]
    assert alone.gap_ms == pytest.approx(float(np.percentile(gaps, 99)))
    with pytest.raises(TraceError, match="not of one plan"):
        sweep_point(list(e8().values()), long=2, watched=(0, 1))
    with pytest.raises(TraceError, match="0 recordings"):
        sweep_point([], long=2, watched=(0, 1))
    with pytest.raises(TraceError, match="Request 2 got no token"):
        sweep_point([trace_of(CHUNKED[:3])], long=2, watched=(0, 1))


def test_the_knee_is_the_smallest_budget_near_the_best_throughput():
    assert knee(POINTS) == 256
    assert knee({8: SweepPoint(1, 1, 1.0), 16: SweepPoint(1, 1, 9.0)}) == 16
    assert knee({8: SweepPoint(1, 1, 9.0), 16: SweepPoint(1, 1, 9.1)}) == 8
    with pytest.raises(TraceError, match="no points"):
        knee({})


def test_the_sweep_draws_its_points_and_fills_the_knee():
    figure = budget_sweep(POINTS, SweepPoint(1750, 2300, 7.2))
    lines = {line.name: line for line in figure.data}
    assert list(lines["gap_ms"].y) == [270, 390, 1080, 1700]
    assert list(lines["first_ms"].y) == [4.0, 3.1, 2.4, 2.35]
    assert list(lines["tokens_per_s"].y) == [4.1, 5.6, 7.0, 7.1]
    assert list(lines["gap_ms"].customdata) == [32, 64, 256, 512]
    assert [color != "#FFFFFF" for color in lines["gap_ms"].marker.color] == [False, False, True, False]
    assert set(lines["first_ms in one piece"].y) == {2.3}
    assert "budget of 256" in figure.layout.title.text and "99 %" in figure.layout.title.subtitle.text
    assert len(budget_sweep(POINTS).data) == 3
    rising = {8: SweepPoint(1, 1, 1.0), 16: SweepPoint(1, 1, 9.0)}
    assert "no knee" in budget_sweep(rising).layout.title.text


@pytest.mark.parametrize(
    "draw",
    [
        lambda: mixed_schedule(e8()["in chunks"]),
        lambda: budget_and_gaps(e8()),
        lambda: budget_and_gaps(e8(), unit="ms"),
        lambda: budget_sweep(POINTS, POINTS[512]),
    ],
)
def test_every_figure_is_in_the_template_and_says_what_it_shows(draw):
    figure = draw()
    assert figure.layout.template.layout.font.family and not figure.layout.showlegend
    assert len(figure.layout.meta["alt"]) > 60 and figure.layout.width <= 800
    assert len(figure.layout.title.text) <= 78 and len(figure.layout.title.subtitle.text) <= 110
    assert digest(figure) == digest(draw())
    for axis in figure.select_xaxes():
        assert axis.title.text or axis.matches or not axis.showticklabels


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(TraceError, match="has 0 steps"):
        mixed_schedule(Trace({}))
    with pytest.raises(TraceError, match="none from number 9 on"):
        mixed_schedule(e8()["in chunks"], first=9)
    with pytest.raises(TraceError, match="unit='s'"):
        budget_and_gaps(e8(), unit="s")
    with pytest.raises(TraceError, match="no run to draw"):
        budget_and_gaps({})
    with pytest.raises(TraceError, match="no points"):
        budget_sweep({})
