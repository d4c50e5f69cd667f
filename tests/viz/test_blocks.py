"""Figures of blocks, against a simulator that keeps its own books and against the formulas of paging."""

import json
import re
from collections import Counter, defaultdict

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepengine.errors import InvalidSetting, TraceError
from stepengine.trace import Replay, Trace, kv_use
from stepengine.viz.figures import (
    block_arrows,
    block_map,
    digest,
    fragmentation,
    kv_memory,
    ref_counts,
    request_states,
)
from stepengine.viz.grid import grid, grid_of
from stepengine.viz.sharing import family_of
from stepengine.viz.states import states_of
from stepengine.viz.template import request_style
from tests.trace.synthetic import Job, Paged, simulate, simulate_paged

JOBS = st.lists(
    st.builds(Job, st.integers(1, 13), st.integers(1, 9), st.integers(1, 4), st.integers(0, 1), st.integers(0, 9)),
    min_size=1,
    max_size=5,
)
HOW = st.sampled_from(["recompute", "swap"])
RUNS = st.builds(simulate_paged, JOBS, st.just(5), st.just(4), st.integers(6, 14), HOW, st.integers(1, 9))
MIXED = (Job(10, 12, 3), Job(20, 20), Job(7, 25, 1, 1), Job(30, 12, 2, 0, 4))


def mixed(preemption: str = "swap", blocks: int = 12, forks: dict[int, int] | None = None) -> Paged:
    return simulate_paged(MIXED, 8, 8, blocks, preemption, 9, {5: 1} if forks is None else forks)


def named(traces, name: str):
    (found,) = [trace for trace in traces if trace.name == name]
    return found


def squares_of(figure: go.Figure, trace: Trace) -> dict[int, dict]:
    """Step -> what each trace shows at it: the first picture, and every frame put into it as the page does."""
    names = [t.name for t in figure.data]
    shown = {}
    for frame in figure.frames:
        merged = {name: dict(trace.to_plotly_json()) for name, trace in zip(names, figure.data, strict=True)}
        for place, data in zip(frame.traces, frame.data, strict=True):
            update = {k: v for k, v in data.to_plotly_json().items() if k != "marker"}
            colors = (data.to_plotly_json().get("marker") or {}).get("color")
            merged[names[place]] |= update
            if colors is not None:
                merged[names[place]]["marker"] = merged[names[place]]["marker"] | {"color": colors}
        shown[int(frame.name)] = merged
    return shown


def at(places, x: float, y: float) -> int:
    """The block whose square holds this point."""
    return min(
        range(1, places.blocks + 1),
        key=lambda b: abs(places.x(b) - x) + abs(places.base(b) + places.size / 2 - y) / places.size,
    )


def held_tokens(run: Paged, step: int) -> dict[int, int]:
    """Block -> tokens in it, counted from the books."""
    state, tables, _, computed, _ = run.books[step]
    tokens: dict[int, set[int]] = defaultdict(set)
    for request, table in tables.items():
        for k in range(computed[request] if state[request] == "running" else 0):
            tokens[table[k // run.size]].add(k % run.size)
        for block in table:
            tokens[block]  # noqa: B018  (a block that holds nothing yet counts too)
    return {block: len(found) for block, found in tokens.items()}


@given(RUNS)
@settings(max_examples=25, deadline=None)
def test_every_square_of_the_map_is_as_the_books_say(run):
    trace = run.trace
    steps = range(len(trace.steps))
    figure = block_map(trace, steps=steps)
    places = grid_of(Replay(trace))
    if len(steps) == 1:
        return
    for t, shown in squares_of(figure, trace).items():
        _, tables, refs, *_ = run.books[t]
        bars = shown["tokens"]
        tokens, holders, colors = {}, Counter(), defaultdict(set)
        scale = bars["marker"]["colorscale"]
        for x, base, y, block, number in zip(
            bars["x"], bars["base"], bars["y"], bars["customdata"], bars["marker"]["color"], strict=True
        ):
            assert block == at(places, x, base + places.size / 2)
            tokens[block] = y
            holders[block] += 1
            colors[block].add(scale[2 * number][1])
        assert tokens == held_tokens(run, t)
        assert holders == refs  # one strip for each reference
        for block, who in colors.items():
            assert who == {request_style(trace, r).color for r, table in tables.items() if block in table}
        reserved = shown["reserved"]
        drawn = {at(places, x, b + 2) for x, b in zip(reserved["x"], reserved["base"], strict=True)}
        assert drawn == set(refs) and set(reserved["y"]) <= {places.size}
        marks = shown["references"]
        counts = {at(places, x, y): int(n) for x, y, n in zip(marks["x"], marks["y"], marks["text"], strict=True)}
        assert counts == {block: n for block, n in refs.items() if n > 1}
        letters = [
            (at(places, x, y), letter)
            for name in ("letters", "letters on dark")
            for x, y, letter in zip(*(shown[name][key] for key in "xy"), shown[name]["text"], strict=True)
        ]
        expected = [(b, request_style(trace, r).label) for r, table in tables.items() for b in table if holders[b] <= 4]
        if len(trace.requests) <= 8:  # where labels are letters, four of them fit
            assert sorted(letters) == sorted(expected)
        new = {at(places, x, b + 2) for x, b in zip(shown["new in this step"]["x"], shown["new in this step"]["base"],
                                                    strict=True)}  # fmt: skip
        plan = trace.steps[t].plan
        given = {b for c in plan.chunks for b in c.blocks} | {c.destination for c in plan.copies}
        given |= {block for swap in plan.swapped_in for block, _ in swap.pairs}
        before = set(run.books[t - 1][2]) if t else set()
        assert set(refs) - before <= new <= given


def test_the_map_opens_at_the_fullest_step_and_says_what_happens():
    trace = mixed().trace
    figure = block_map(trace)
    use = [len(now.refs) for now in Replay(trace)]
    opened = int(figure.layout.sliders[0].steps[figure.layout.sliders[0].active].label)
    assert use[opened] == max(use) and figure.layout.title.text.startswith(f"Step {opened}: ")
    assert f"{max(use)} of 12 blocks in use" in figure.layout.title.subtitle.text
    places = [int(step.label) for step in figure.layout.sliders[0].steps]
    assert places == sorted(set(places)) and len(places) <= 12 and {0, len(use) - 1} <= set(places)
    titles = {int(frame.name): frame.layout.title.text for frame in block_map(trace, range(len(use))).frames}
    for t, record in enumerate(trace.steps):
        for swap in record.plan.swapped_out[:1]:
            blocks = len(swap.pairs)
            label = request_style(trace, swap.request).label
            assert f"{label} moves {blocks} block{'s' * (blocks > 1)} to the host" in titles[t]
    assert block_map(trace, start=3).layout.title.text == titles[3]


def test_steps_that_move_blocks_come_before_those_that_do_not():
    trace = simulate_paged([Job(5, 60), Job(17, 40, 2)], block_size=8, num_blocks=20).trace
    shown = {int(frame.name) for frame in block_map(trace).frames}
    assert len(trace.steps) > 40 and {t for t, r in enumerate(trace.steps) if r.plan.copies} <= shown


def test_one_step_needs_no_slider():
    figure = block_map(mixed().trace, steps=[-1])
    assert not figure.frames and not figure.layout.sliders


@pytest.mark.parametrize("blocks", [1, 3, 16, 17, 40, 64, 65, 160, 161, 512, 1000])
def test_a_pool_of_any_size_fits_the_page(blocks):
    places = grid(blocks, 16)
    assert places.rows * places.columns >= blocks and places.columns * places.cell <= 712.01
    spots = {(places.x(b), places.base(b)) for b in range(1, blocks + 1)}
    assert len(spots) == blocks and places.side > 0 and (blocks > 512 or places.height <= 520)


def test_a_large_run_stays_small():
    jobs = [Job(20 + 7 * i % 90, 10 + i % 17, 1 + (i % 9 == 0)) for i in range(57)]
    trace = simulate_paged(jobs, 64, 16, 512).trace
    assert len(trace.requests) == 64
    for figure in (block_map(trace, selected=(3, 9)), block_arrows(trace, 3), request_states(trace)):
        assert len(figure.to_json()) < 150_000 and figure.layout.width <= 980


def example_e3() -> Trace:
    """Two requests that come and go leave holes; one of 50 tokens fills them."""
    jobs = [Job(32, 30), Job(16, 2), Job(1, 60), Job(50, 1, arrival=2)]
    return simulate_paged(jobs, 8, 16, 16).trace


def test_arrows_lead_from_the_table_to_its_blocks():
    trace = example_e3()
    figure = block_arrows(trace, 3)
    now = next(now for now in reversed(list(Replay(trace))) if now.table[3])
    assert now.computed[3] == 50 and len(now.table[3]) == 4
    table, places = named(figure.data, "block table"), grid_of(Replay(trace))
    for i, block in enumerate(now.table[3]):
        x, y = table.x[3 * i + 1], table.y[3 * i + 1]
        assert at(places, x, y - places.size / 2) == block and table.marker.size[3 * i + 1] > 0
        assert f"logical block {i} is block {block}: tokens {16 * i} to {16 * i + 15}" in table.hovertext[3 * i + 1]
        assert f"slots {16 * block} to {16 * block + 15}" in table.hovertext[3 * i + 1]
        assert table.x[3 * i] == places.x(i + 1) and table.y[3 * i] > 0
    bars = named(figure.data, "tokens")
    above = [y for y, base in zip(bars.y, bars.base, strict=True) if base > 0]
    assert above == [16, 16, 16, 2]
    assert "4 logical blocks" in figure.layout.title.text
    assert "room for 14 more" in figure.layout.title.subtitle.text
    assert sum(block in now.table[3] for block in bars.customdata) == 2 * 4  # each once above and once in the pool


E4 = {
    "contiguous": [(512, 2048), (128, 2048)],
    "paged": [(512, 512), (128, 128)],
    "one token later": [(513, 33 * 16), (129, 9 * 16)],
}


def test_fragmentation_of_the_two_requests_that_reserve_2048_each():
    figure = fragmentation(E4, block_size=16)
    used, reserved = named(figure.data, "used"), named(figure.data, "reserved")
    assert list(used.x) == [512, 128, 512, 128, 513, 129] and sum(reserved.x) == 4096 + 640 + 672
    assert list(used.base) == [0, 2048, 0, 512, 0, 528]
    assert "84.4 % (contiguous)" in figure.layout.title.text and "0 % (paged)" in figure.layout.title.text
    pools = [trace for trace in figure.data if trace.name == "blocks"]
    assert [len(pool.x) for pool in pools] == [4096 // 16, 32 + 8, 33 + 9]
    filled = [trace for trace in figure.data if trace.name == "tokens in blocks"]
    assert [sum(trace.customdata) for trace in filled] == [512, 128, 512, 128, 513, 129]
    assert list(filled[4].customdata[-2:]) == [16, 1]  # the token that took a block of its own
    for pool in pools:
        assert len(set(zip(pool.x.tolist(), pool.base.tolist(), strict=True))) == len(pool.x)
    said = " ".join(note.text for note in figure.layout.annotations)
    assert "640 of 4,096 tokens used" in said and "642 of 672 tokens used, 4.46 % wasted" in said


@given(st.integers(1, 400), st.integers(1, 64))
@settings(max_examples=25, deadline=None)
def test_paging_wastes_less_than_a_block_a_request(tokens, size):
    reserved = -(-tokens // size) * size
    figure = fragmentation({"paged": [(tokens, reserved)]}, block_size=size)
    assert named(figure.data, "reserved").x[0] - named(figure.data, "used").x[0] <= size - 1
    (pool,) = [trace for trace in figure.data if trace.name == "blocks"]
    assert len(pool.x) == reserved // size


@given(RUNS)
@settings(max_examples=15, deadline=None)
def test_fragmentation_of_traces_is_the_books_mean(run):
    figure = fragmentation({"blocks": run.trace, "slots": simulate(stage="1b")})
    held = [sum(held_tokens(run, t).values()) for t in range(len(run.books))]
    rooms = [len(book[2]) * run.size for book in run.books]
    steps = [t for t, room in enumerate(rooms) if room]
    used, reserved = named(figure.data, "used"), named(figure.data, "reserved")
    assert used.x[0] == pytest.approx(np.mean([held[t] for t in steps]))
    assert reserved.x[0] == pytest.approx(np.mean([rooms[t] for t in steps]))
    one = fragmentation({"blocks": run.trace}, step=steps[-1])
    assert named(one.data, "used").x[0] == held[steps[-1]] and named(one.data, "reserved").x[0] == rooms[steps[-1]]


@given(RUNS)
@settings(max_examples=15, deadline=None)
def test_memory_counts_a_shared_block_once(run):
    for t, use in enumerate(kv_use(run.trace)):
        assert use.held == sum(held_tokens(run, t).values())
        assert use.reserved == len(run.books[t][2]) * run.size
        assert use.held <= use.reserved <= use.capacity
    if any(use.reserved for use in kv_use(run.trace)):
        figure = kv_memory(run.trace)
        used, wasted = named(figure.data, "used"), named(figure.data, "wasted")
        assert all(value >= 0 for value in wasted.y)
        np.testing.assert_allclose(np.add(used.y, wasted.y), [len(b[2]) * run.size / 1024 for b in run.books])


def rows_of(figure: go.Figure, panels: int) -> list[dict]:
    """Per panel, left to right: row -> [(block, references, outlined)]."""
    numbers, bars = named(figure.data, "block numbers"), named(figure.data, "tokens")
    marks, new = named(figure.data, "references"), named(figure.data, "new in this step")

    def near(trace, x, y) -> list[int]:
        return [i for i, (a, b) in enumerate(zip(trace.x, trace.y, strict=True)) if abs(a - x) < 0.5 and 0 <= y - b < 4]

    columns = sorted(set(numbers.x))
    gaps = [i for i, (a, b) in enumerate(zip(columns, columns[1:], strict=False), 1) if b - a > 1.5]
    starts = [columns[i] for i in (0, *gaps)]
    assert len(starts) == panels and len(bars.x)
    found: list[dict] = [defaultdict(list) for _ in starts]
    for x, y, text in sorted(zip(numbers.x, numbers.y, numbers.text, strict=True)):
        panel = max(i for i, start in enumerate(starts) if x >= start)
        (badge,) = near(marks, x, y) or [None]
        outlined = any(abs(a - x) < 0.1 and abs(b + 16 - y) < 0.1 for a, b in zip(new.x, new.base, strict=True))
        found[panel][-round(y, 2)].append((int(text), int(marks.text[badge]) if badge is not None else 1, outlined))
    return [dict(sorted(rows.items())) for rows in found]


def test_a_copy_on_write_is_seen_happening():
    run = simulate_paged([Job(50, 6, 3)], 8, 16, 16)
    figure = ref_counts(run.trace, 2)
    before, after = (list(panel.values()) for panel in rows_of(figure, 2))
    assert before == [[(b, 3, False) for b in (1, 2, 3, 4)]] * 3
    shared = [(b, 3, False) for b in (1, 2, 3)]
    assert after == [[*shared, (4, 1, False)], [*shared, (5, 1, True)], [*shared, (6, 1, True)]]
    arrows = named(figure.data, "copies")
    assert (
        len(arrows.x) == 2 * 5
        and [n.text for n in figure.layout.annotations if "copy" in n.text[:4]] == ["copy of 4"] * 2
    )
    assert "block 4 is copied for B and C; its references fall from 3 to 1" in figure.layout.title.text
    bars = named(figure.data, "tokens")
    assert {y for y, b in zip(bars.y, bars.customdata, strict=True) if b >= 4} == {50 - 48}
    two = ref_counts(run.trace, 0, steps=[1, 2])
    assert sum(note.text.startswith("<b>Step") for note in two.layout.annotations) == 3


def test_a_fork_copies_at_its_first_write():
    run = mixed(blocks=24, forks={5: 3})
    forked = max(run.trace.requests)
    figure = ref_counts(run.trace, 3)
    assert family_of(run.trace, 3) == family_of(run.trace, forked) == [3, forked]
    t = next(t for t, r in enumerate(run.trace.steps) if any(c.request in (3, forked) for c in r.plan.copies))
    copy = next(c for c in run.trace.steps[t].plan.copies if c.request in (3, forked))
    before, after = (list(panel.values()) for panel in rows_of(figure, 2))
    assert [[b for b, *_ in row] for row in after] == [list(run.books[t][1][r]) for r in (3, forked)]
    assert [row[copy.entry][0] for row in before] == [copy.source] * 2 and before[0][copy.entry][1] == 2
    assert {row[copy.entry][:2] for row in after} == {(copy.source, 1), (copy.destination, 1)}


@given(RUNS)
@settings(max_examples=20, deadline=None)
def test_states_are_those_of_the_books(run):
    trace = run.trace
    found = states_of(trace)
    drawn: dict[tuple[int, int], str] = {}
    for span in found.spans:
        for t in range(span.begin, span.end + 1):
            assert drawn.setdefault((span.request, t), span.kind) == span.kind
    for t, (state, *_) in enumerate(run.books):
        rows = {chunk.request for chunk in trace.steps[t].plan.chunks}
        for request, name in state.items():
            kind = drawn.pop((request, t), "finished")
            assert kind == name or name == "running" and kind in ("prefill", "decode", "paused")
            assert (kind in ("prefill", "decode")) == (request in rows)
    assert not drawn
    counts = Counter(mark.kind for mark in found.marks)
    assert counts["preempted"] == sum(len(r.plan.preempted) for r in trace.steps)
    assert counts["swapped out"] == sum(len(r.plan.swapped_out) for r in trace.steps)
    assert counts["finished"] == len(trace.requests)
    had: dict[int, int] = defaultdict(int)  # tokens of a request that were computed, by itself or by a sibling
    again = 0
    for chunk in (chunk for record in trace.steps for chunk in record.plan.chunks):
        again += max(0, min(had[chunk.request], chunk.end) - chunk.start)
        had[chunk.request] = max(had[chunk.request], chunk.end)
    assert found.again == again
    figure = request_states(trace)
    drawn_tokens = sum(sum(bar.customdata) for bar in figure.data if bar.name in ("prefill", "decode"))
    assert drawn_tokens == sum(r.plan.num_tokens for r in trace.steps)
    total = counts["preempted"]
    assert (f"{total} preemption" in figure.layout.title.text) == bool(total)


def test_a_preemption_names_its_cause():
    trace = mixed("recompute").trace
    found = states_of(trace)
    t = next(t for t, record in enumerate(trace.steps) if record.plan.preempted)
    mark = next(mark for mark in found.marks if mark.kind == "preempted")
    gone = trace.steps[t].plan.preempted[0]
    blocks = len(Replay(trace).after(t - 1).table[gone])
    assert (mark.step, mark.request) == (t, gone)
    said = re.fullmatch(rf"preempted, {blocks} blocks? given back: .+ needed (\d+) blocks?, (\d+) free", mark.words)
    assert said and int(said[1]) > int(said[2])
    waits = [span for span in found.spans if span.kind == "waiting"]
    assert {span.request for span in waits} >= {gone}


FIGURES = {
    "map": lambda: block_map(mixed().trace),
    "map of slots": lambda: block_map(simulate(stage="1b")),
    "arrows": lambda: block_arrows(example_e3(), 3),
    "bars": lambda: fragmentation({"slots": simulate(stage="1b"), "blocks": mixed().trace}),
    "bars over the pool": lambda: fragmentation(E4, block_size=16),
    "references": lambda: ref_counts(mixed(blocks=24).trace, 0),
    "states": lambda: request_states(mixed("recompute").trace),
    "states with swaps": lambda: request_states(mixed().trace),
}


@pytest.mark.parametrize("name", FIGURES)
def test_conventions(name):
    figure = FIGURES[name]()
    assert figure.layout.title.text and len(figure.layout.meta["alt"]) > 40 and figure.layout.width <= 980
    assert figure.layout.template.layout.paper_bgcolor == "#FFFFFF"
    sizes = [note.font.size for note in figure.layout.annotations] + [
        trace.textfont.size for trace in figure.data if trace.textfont.size
    ]
    assert min(sizes, default=11) >= 11
    for trace in figure.data:  # hover text in words, or none at all
        if trace.hoverinfo != "skip":
            words = trace.hovertemplate or " ".join(trace.hovertext if trace.hovertext is not None else ())
            assert (
                "%{text}" in words
                or re.search(r"[a-z]{3,}", re.sub(r"%\{[^}]*\}|<[^>]*>", "", words))
                or (
                    trace.name == "references"  # named only where letters do not fit
                )
            )
    assert len(figure.to_json()) < 60_000
    assert digest(figure) == digest(FIGURES[name]())
    again = go.Figure(json.loads(figure.to_json()))  # what a notebook's file holds
    assert len(again.data) == len(figure.data) and len(again.frames) == len(figure.frames)


@pytest.mark.parametrize(
    ("draw", "error", "complaint"),
    [
        (lambda: block_map(simulate(stage="0")), TraceError, "Stage 0 kept no K/V"),
        (lambda: block_map(Trace({"num_blocks": 4, "block_size": 4})), TraceError, "no steps"),
        (lambda: block_map(mixed().trace, steps=[0, 999]), TraceError, "Step 999 is not in this trace"),
        (lambda: block_arrows(mixed().trace, 99), TraceError, "Request 99 is not in this trace"),
        (lambda: block_arrows(mixed().trace, 0, -1), TraceError, "Request 0 holds no blocks in step"),
        (lambda: ref_counts(simulate(stage="2"), 0), TraceError, "Request 0 never shares a block"),
        (lambda: ref_counts(mixed().trace, 99), TraceError, "Request 99 is not in this trace"),
        (lambda: request_states(Trace({})), TraceError, "no steps"),
        (lambda: fragmentation({}), InvalidSetting, "got no rows"),
        (lambda: fragmentation({"a": [(3, 2)]}), InvalidSetting, "3 of 2 reserved tokens"),
        (lambda: fragmentation({"a": [(0, 0)]}), InvalidSetting, "reserves nothing"),
        (lambda: fragmentation(E4, block_size=0), InvalidSetting, "block_size is 0"),
        (lambda: fragmentation({"a": simulate(stage="0")}), TraceError, "'a' holds no K/V"),
        (lambda: fragmentation({"a": mixed().trace}, step=999), TraceError, "Step 999 is not in the trace 'a'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, error, complaint):
    with pytest.raises(error, match=complaint):
        draw()
