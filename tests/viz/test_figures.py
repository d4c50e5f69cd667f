"""Figures are tested on their data, against formulas and the trace itself; what cannot be drawn is refused."""

import json
import re
from collections import Counter

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepengine.errors import TraceError
from stepengine.trace import Trace, idle_rows, kv_use, request_metrics, save
from stepengine.trace.io import load
from stepengine.viz.figures import (
    compare_timelines,
    digest,
    kv_memory,
    ladder_bars,
    latency_percentiles,
    recomputation_triangle,
    scheduler_timeline,
    step_time,
)
from stepengine.viz.measures import decode_step_times
from tests.trace.synthetic import EXAMPLE, simulate

WORDLESS = re.compile(r"%\{[^}]*\}|<[^>]*>")  # numbers and markup of a hover template
LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=7)
LADDER = {
    "stages": [
        {"stage": "0", "metric": None, "tokens_per_s": 20.0, "same_tokens": True},
        {
            "stage": "1a",
            "metric": {"name": "tokens computed", "unit": "tokens", "before": 1000, "after": 250, "better": "lower"},
            "tokens_per_s": 50.0,
            "same_tokens": True,
        },
        {
            "stage": "1b",
            "metric": {"name": "idle slot-steps", "unit": "slot-steps", "before": 30, "after": 0, "better": "lower"},
            "tokens_per_s": 80.0,
            "same_tokens": False,
        },
    ]
}


def run(stage: str) -> Trace:
    return simulate(stage=stage, num_blocks=7)


FIGURES = {
    "triangle of stage 0": lambda: recomputation_triangle(run("0"), 0),
    "triangle of stage 1": lambda: recomputation_triangle(run("1a"), 0),
    "slots": lambda: scheduler_timeline(run("1a")),
    "requests": lambda: scheduler_timeline(run("2"), rows="requests"),
    "two timelines": lambda: compare_timelines(run("1a"), run("1b")),
    "memory": lambda: kv_memory(run("1b")),
    "step time": lambda: step_time({"1a": run("1a"), "1b": run("1b")}),
    "latencies": lambda: latency_percentiles({"static": run("1a"), "continuous": run("1b")}),
    "ladder": lambda: ladder_bars(LADDER),
}


def named(figure: go.Figure, name: str) -> list:
    return [trace for trace in figure.data if trace.name == name]


def lit(figure: go.Figure) -> int:
    """Tokens drawn as computed."""
    names = ("computed again", "computed for the first time")
    return int(sum(sum(trace.y) for name in names for trace in named(figure, name)))


@given(st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_the_triangle_holds_the_formulas_cells(prompt, outputs):
    naive, cached = (
        recomputation_triangle(simulate([(prompt, outputs)], stage=s, max_model_len=64)) for s in ("0", "1a")
    )
    computed = outputs * prompt + outputs * (outputs - 1) // 2
    assert lit(naive) == computed and lit(cached) == prompt + outputs - 1
    assert f"{computed:,} tokens computed for {outputs} new" in naive.layout.title.text
    kept = sum(sum(trace.y) for trace in named(cached, "kept in the cache, not computed"))
    assert lit(cached) + kept == computed  # what the cache saves is exactly what the naive run computes again
    assert not named(cached, "computed again")


def test_triangles_of_two_stages_share_axes_and_nothing_overlaps():
    figures = [recomputation_triangle(simulate(stage=s), 3) for s in ("0", "1b")]
    assert figures[0].layout.xaxis.range == figures[1].layout.xaxis.range
    assert figures[0].layout.yaxis.range == figures[1].layout.yaxis.range
    for figure in figures:
        cells = Counter(
            (x, position)
            for trace in figure.data
            for x, base, y in zip(trace.x, trace.base, trace.y, strict=True)
            for position in range(base, base + y)
        )
        prompt, outputs = EXAMPLE[3]
        assert set(cells.values()) == {1}
        assert set(cells) == {(s, p) for s in range(1, outputs + 1) for p in range(prompt + s - 1)}


@pytest.mark.parametrize("stage", ["0", "1a", "1b", "2"])
@given(lengths=LENGTHS, slots=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_the_timeline_shows_every_slot_step_once(stage, lengths, slots):
    trace = simulate(lengths, stage=stage, slots=slots, num_blocks=7)
    figure = scheduler_timeline(trace)
    idle = [(x, round(b + h / 2)) for t in named(figure, "idle") for x, b, h in zip(t.x, t.base, t.y, strict=True)]
    assert len(idle) == sum(idle_rows(trace))
    assert Counter(x for x, _ in idle) == {t: n for t, n in enumerate(idle_rows(trace)) if n}
    ran = []
    for bars in figure.data:
        if bars.type == "bar" and bars.name != "idle":
            ran += [(c[1], round(b + h / 2)) for c, b, h in zip(bars.customdata, bars.base, bars.y, strict=True)]
    assert Counter(step for step, _ in ran) == {t: len(r.plan.chunks) for t, r in enumerate(trace.steps)}
    assert len({*ran, *idle}) == len(ran) + len(idle)  # never two things in one slot at one step
    if sum(idle_rows(trace)):
        assert f"{len(idle)} of " in figure.layout.title.text


def test_prefill_is_tall_and_named_with_its_tokens():
    figure = scheduler_timeline(simulate(((5, 3), (4, 2)), stage="1b", slots=2))
    (bars,) = named(figure, "request A")
    assert [tokens for tokens, *_ in bars.customdata] == [5, 1, 1]
    assert bars.y[0] > 2 * bars.y[1] == 2 * bars.y[2]
    assert named(figure, "label A")[0].text == ("<b>A</b><br>5",)


def test_naive_decodes_are_low_although_they_compute_many_tokens():
    (bars,) = named(scheduler_timeline(simulate(((5, 3),), stage="0")), "request A")
    assert [tokens for tokens, *_ in bars.customdata] == [5, 6, 7] and bars.y[0] > 2 * bars.y[1]


def test_waiting_and_preemption_in_rows_of_requests():
    trace = simulate(stage="2", num_blocks=7)
    figure = scheduler_timeline(trace, rows="requests")
    preempted = [(t, r) for t, record in enumerate(trace.steps) for r in record.plan.preempted]
    (crosses,) = named(figure, "preempted")
    assert list(zip(crosses.x, crosses.y, strict=True)) == preempted != []
    waited = Counter()
    for line in named(figure, "waiting"):
        waited[line.y[0]] += round(line.x[1] - line.x[0] + 0.2)
    for request in trace.requests:  # steps between its arrival (before step 0) and its last, without a chunk
        chunks = [t for t, record in enumerate(trace.steps) if any(c.request == request for c in record.plan.chunks)]
        if not any(request == r for _, r in preempted):
            assert waited[request] == chunks[0]
    (rings,) = named(figure, "finished")
    assert len(rings.x) == len(EXAMPLE)


def test_long_runs_are_merged_but_lose_nothing():
    trace = simulate(((3, 150), (4, 40)), stage="1a", slots=2, max_model_len=200)
    figure = scheduler_timeline(trace)
    for name, outputs in (("request A", 150), ("request B", 40)):
        (bars,) = named(figure, name)
        assert len(bars.x) == 2 and sum(c[2] for c in bars.customdata) == outputs
    assert len(named(figure, "idle")[0].x) == 110


def test_two_timelines_share_their_steps():
    static, continuous = simulate(stage="1a"), simulate(stage="1b")
    figure = compare_timelines(static, continuous)
    assert figure.layout.title.text == "Same requests: static 21 steps, continuous 17"
    assert (len(static.steps), len(continuous.steps)) == (21, 17)
    assert figure.layout.xaxis.range == figure.layout.xaxis2.range
    colours = {(bars.name, bars.marker.color) for bars in figure.data if bars.name.startswith("request")}
    assert len(colours) == len(EXAMPLE)  # one request, one colour, in both


@pytest.mark.parametrize("stage", ["1a", "1b", "2"])
def test_memory_in_mib(stage):
    trace = simulate(stage=stage)
    figure, use = kv_memory(trace), kv_use(trace)
    per_token = trace.meta["kv_bytes_per_token"] / 2**20
    used, wasted, reserved = (named(figure, name)[0] for name in ("used", "wasted", "reserved"))
    np.testing.assert_allclose(used.y, [u.held * per_token for u in use])
    np.testing.assert_allclose(np.add(used.y, wasted.y), [u.reserved * per_token for u in use])
    np.testing.assert_allclose(reserved.y[1:], [u.reserved * per_token for u in use])
    share = np.mean([u.held / u.reserved for u in use])
    assert figure.layout.title.text.startswith(f"{100 * share:.0f} %")


def test_step_time_is_the_median_by_rows():
    trace = simulate(stage="1b", slots=3)
    (line,) = named(step_time(trace), "steps")
    # the simulator's clock: 0.5 ms to plan, 10 ms, and 1 ms a token
    np.testing.assert_allclose(line.y, [11.5, 12.5, 13.5][: len(line.x)])
    assert list(line.x) == [1, 2, 3]
    assert sum(line.customdata) == sum(len(times) for times in decode_step_times(trace).values())
    assert sum(line.customdata) == sum(all(c.length == 1 for c in r.plan.chunks) for r in trace.steps)


def test_latencies_are_the_requests_percentiles():
    traces = {"static": simulate(stage="1a"), "continuous": simulate(stage="1b")}
    figure = latency_percentiles(traces)
    for name, trace in traces.items():
        ttft, itl = named(figure, name)
        metrics = request_metrics(trace)
        np.testing.assert_allclose(ttft.x, np.percentile([m.ttft_ms for m in metrics], (50, 99)))
        np.testing.assert_allclose(itl.x, np.percentile([gap for m in metrics for gap in m.itl_ms], (50, 99)))


def test_the_ladder_names_gains_and_speeds():
    figure = ladder_bars(LADDER)
    assert [list(bars.y) for bars in figure.data] == [[1000, 250], [30, 0], [20.0, 50.0, 80.0]]
    assert figure.layout.title.text == "1a 4.0× fewer tokens computed; 1b idle slot-steps 30 → 0"
    assert "other tokens" in figure.data[2].text[2] and "other tokens" not in figure.data[2].text[1]


@pytest.mark.parametrize("name", FIGURES)
def test_conventions(name):
    figure = FIGURES[name]()
    assert figure.layout.title.text and len(figure.layout.meta["alt"]) > 40
    assert figure.layout.template.layout.paper_bgcolor == "#FFFFFF" and not figure.layout.template.data.bar
    axes = list(figure.select_xaxes()) + list(figure.select_yaxes())
    titles = [axis.title.text for axis in axes if axis.title.text]
    assert titles and all(title.strip() for title in titles)
    for trace in figure.data:  # hover text in words, or none at all
        if trace.hoverinfo == "skip":
            continue
        words = trace.hovertemplate or " ".join(trace.hovertext or ())
        assert words and ("%{text}" in words or len(re.findall(r"[a-z]{3,}", WORDLESS.sub("", words))) >= 1)
    assert len(figure.to_json()) < 40_000


def test_figures_of_a_loaded_trace_are_the_same(tmp_path):
    live = simulate(stage="1a")
    loaded = load(save(live, tmp_path / "run.jsonl.gz"))
    for draw in (recomputation_triangle, scheduler_timeline, kv_memory, step_time, latency_percentiles):
        assert draw(live).to_json() == draw(loaded).to_json()


@pytest.mark.parametrize(
    ("draw", "complaint"),
    [
        (lambda: kv_memory(simulate(stage="0")), "Stage 0 kept no K/V"),
        (lambda: step_time(simulate(((4, 3),), stage="0")), "stage 0 has none"),
        (lambda: recomputation_triangle(simulate(), 99), "Request 99 is not in this trace"),
        (lambda: recomputation_triangle(Trace({})), "is not in this trace"),
        (lambda: scheduler_timeline(Trace({})), "no steps"),
        (lambda: scheduler_timeline(simulate(), rows="columns"), "rows='columns'"),
        (lambda: latency_percentiles(Trace({})), "no latencies"),
        (lambda: ladder_bars({"stages": []}), "no stages"),
    ],
)
def test_what_a_trace_does_not_hold_is_refused(draw, complaint):
    with pytest.raises(TraceError, match=complaint):
        draw()


@pytest.mark.parametrize("name", FIGURES)
def test_the_digest_is_stable_and_notices_a_ten_thousandth(name):
    figure, again = FIGURES[name](), FIGURES[name]()
    line = digest(figure)
    assert line.startswith("digest ") and "\n" not in line and line == digest(again)
    noticed = 0
    for place, trace in enumerate(figure.data):
        values = np.asarray(trace.y, dtype=float) if trace.y is not None else np.array([])
        if trace.type == "bar" and values.size and values[0]:
            for factor, changed in ((1 + 1e-4, True), (1 + 1e-10, False)):
                edited = go.Figure(json.loads(figure.to_json()))
                edited.data[place].y = [values[0] * factor, *values[1:]]
                assert (digest(edited) != line) == changed
                noticed += changed
    assert noticed or not any(trace.type == "bar" for trace in figure.data)


def test_the_digest_without_values_sees_shapes_only():
    times = [go.Figure(go.Scatter(x=[1, 2], y=y)) for y in ([1.0, 2.0], [1.5, 2.5], [1.0, 2.0, 3.0])]
    assert digest(times[0], values=False) == digest(times[1], values=False) != digest(times[2], values=False)
    assert digest(times[0]) != digest(times[1])


def test_the_digest_includes_frames():
    still = go.Figure(go.Bar(y=[1]))
    moving = [go.Figure(go.Bar(y=[1]), frames=[go.Frame(data=[go.Bar(y=[n])])]) for n in (1, 2)]
    assert len({digest(figure) for figure in (still, *moving)}) == 3
    assert "1 frames" in digest(moving[0])
