"""Two runs in step: where their plans part, in words and counts, against changes made by hand and brute force."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepengine import LLM, SamplingParams
from stepengine.core.plan import Chunk, RequestInfo, StepPlan, StepRecord
from stepengine.errors import InvalidSetting, TraceError
from stepengine.trace import Trace, load, save
from stepengine.viz.compare import Compare

sys.path.insert(0, str(Path(__file__).parent.parent / "trace"))
from synthetic import Job, simulate, simulate_paged  # noqa: E402


def changed(trace: Trace, t: int, change: Callable[[StepRecord], StepRecord]) -> Trace:
    """A copy whose step t is another."""
    copy = Trace(dict(trace.meta))
    copy.requests = dict(trace.requests)
    copy.steps = [change(record) if i == t else record for i, record in enumerate(trace.steps)]
    return copy


def renamed_blocks(trace: Trace) -> Trace:
    """The same run with every block's id turned round."""
    top = trace.meta["num_blocks"] + 1

    def turned(record: StepRecord) -> StepRecord:
        chunks = tuple(c._replace(blocks=tuple(top - b for b in c.blocks)) for c in record.plan.chunks)
        return record._replace(plan=record.plan._replace(chunks=chunks))

    copy = Trace(dict(trace.meta))
    copy.requests, copy.steps = dict(trace.requests), [turned(record) for record in trace.steps]
    return copy


def shifted_ids(trace: Trace, by: int) -> Trace:
    """The same run, its requests numbered from `by` on."""
    copy = Trace(dict(trace.meta))
    for info in trace.requests.values():
        copy.add_request(info._replace(id=info.id + by, group=info.group + by))
    for record in trace.steps:
        plan = record.plan
        chunks = tuple(c._replace(request=c.request + by) for c in plan.chunks)
        moved = plan._replace(chunks=chunks, arrived=tuple(r + by for r in plan.arrived),
                              preempted=tuple(r + by for r in plan.preempted))  # fmt: skip
        copy.append(record._replace(plan=moved, finished=tuple((r + by, why) for r, why in record.finished)))
    return copy


def test_a_run_compared_with_itself_is_identical() -> None:
    trace = simulate(stage="2")
    compare = Compare(trace, trace, names=("mine", "ours"))
    assert repr(compare) == f"Compare(mine: {len(trace.steps)} steps, ours: {len(trace.steps)} steps; same plans; same tokens)"  # noqa: E501  # fmt: skip
    assert compare.sentence == (
        "Identical plans: the same steps, down to the block ids. The output tokens are the same."
    )
    assert compare.difference.step is None and all(metric.a == metric.b for metric in compare.metrics)


def test_other_block_ids_are_no_difference_of_plan() -> None:
    trace = simulate(stage="2")
    compare = Compare(trace, renamed_blocks(trace))
    assert repr(compare).endswith("; same plans, other block ids; same tokens)")
    assert compare.sentence.startswith("Same plans, other block ids")


def test_requests_are_matched_by_position_and_rows_in_any_order() -> None:
    trace = simulate(stage="2")
    compare = Compare(trace, shifted_ids(trace, 40))
    assert repr(compare).endswith("; same plans; same tokens)")
    sides = json.loads(compare.data)["sides"]
    labels = [[(r["label"], r["color"]) for r in side["data"]["requests"]] for side in sides]
    assert labels[0] == labels[1] and labels[0][0][0] == "A"
    assert [s["say"] for s in sides[0]["data"]["steps"]] == [s["say"] for s in sides[1]["data"]["steps"]]
    t = next(i for i, record in enumerate(trace.steps) if len(record.plan.chunks) > 1)

    def turned(record: StepRecord) -> StepRecord:
        plan = record.plan._replace(chunks=record.plan.chunks[::-1])
        return record._replace(plan=plan, token_ids=record.token_ids[::-1])

    assert Compare(trace, changed(trace, t, turned)).difference.step is None


def test_another_token_is_told_and_is_no_difference_of_plan() -> None:
    trace = simulate(stage="1b")
    t = 6
    request = trace.steps[t].plan.chunks[0].request
    other = changed(trace, t, lambda r: r._replace(token_ids=(49, *r.token_ids[1:])))
    assert trace.steps[t].token_ids[0] != 49
    compare = Compare(trace, other)
    assert compare.difference.step is None and compare.difference.tokens == (request,)
    assert repr(compare).endswith("; same plans; other tokens in 1 of 6 requests)")
    assert f"The output tokens of request {'ABCDEF'[request]} differ." in compare.sentence


def small(*steps: StepRecord, requests: int = 2, **meta: Any) -> Trace:
    trace = Trace({"stage": "2", "block_size": 4, "num_blocks": 8, "max_model_len": 32, **meta})
    for i in range(requests):
        trace.add_request(RequestInfo(i, (1, 2, 3, 4, 5, 6), 8, group=i))
    trace.steps = list(steps)
    return trace


FIRST = StepRecord(StepPlan(0, (Chunk(0, 0, 6, (1, 2)), Chunk(1, 0, 6, (3, 4))), (0, 1)), (7, 7))
BOTH = StepRecord(StepPlan(1, (Chunk(0, 6, 1), Chunk(1, 6, 1))), (7, 7))


@pytest.mark.parametrize(
    ("a", "b", "how"),
    [
        (BOTH, StepRecord(StepPlan(1, (Chunk(0, 6, 1),), preempted=(1,)), (7,)),
         "theirs preempts request B, mine does not"),
        (BOTH, StepRecord(StepPlan(1, (Chunk(1, 6, 1),)), (7,)), "mine runs request A, theirs does not"),
        (StepRecord(StepPlan(1, (Chunk(0, 6, 1),)), (7,)), StepRecord(StepPlan(1, (Chunk(1, 6, 1),)), (7,)),
         "mine runs request A, theirs request B"),
        (BOTH, BOTH._replace(finished=((0, "length"), (1, "length"))), "theirs ends requests A and B, mine does not"),
        (BOTH, BOTH._replace(aborted=((1, "abort"),),
                             plan=BOTH.plan._replace(chunks=BOTH.plan.chunks[:1]), token_ids=(7,)),
         "theirs aborts request B, mine does not"),
    ],
)  # fmt: skip
def test_the_first_difference_is_said_in_words(a: StepRecord, b: StepRecord, how: str) -> None:
    compare = Compare(small(FIRST, a), small(FIRST, b), names=("mine", "theirs"))
    assert (compare.difference.step, compare.difference.how) == (1, how)
    assert compare.sentence.startswith(f"First difference in step 1: {how}.")
    assert "; plans differ from step 1;" in repr(compare)


def test_chunks_that_differ_are_said_with_both_counts() -> None:
    whole = StepRecord(StepPlan(0, (Chunk(0, 0, 6, (1, 2)),), (0, 1)), (7,))
    chunked = StepRecord(StepPlan(0, (Chunk(0, 0, 4, (1,)),), (0, 1)), (-1,))
    assert Compare(small(whole), small(chunked)).difference.how == "request A runs 6 tokens in A, 4 in B"
    second = [StepRecord(StepPlan(1, (Chunk(1, 4, 2, (1, 3), 4),)), (7,)), StepRecord(StepPlan(1, (Chunk(1, 0, 6, (3, 4)),)), (7,))]  # noqa: E501  # fmt: skip
    found = [small(whole, step, stage="4") for step in second]
    assert Compare(*found).difference.how == "request B finds 4 tokens in A, 0 in B"


def test_a_longer_run_goes_on_and_a_shorter_one_ends() -> None:
    trace = simulate(stage="2")
    short = Trace(dict(trace.meta))
    short.requests, short.steps = dict(trace.requests), trace.steps[:-3]
    compare = Compare(trace, short)
    n = len(trace.steps)
    assert (compare.difference.step, compare.difference.how) == (n - 3, f"B ends after {n - 3} steps, A goes on")
    compare.step = n - 1  # the slider goes to the longer one's end
    with pytest.raises(InvalidSetting, match=f"use 0 to {n - 1}"):
        compare.step = n


def brute_first_difference(a: Trace, b: Trace) -> int | None:
    """By what each request ran, gave up and ended, as multisets."""

    def seen(record: StepRecord) -> Counter:  # type: ignore[type-arg]
        plan = record.plan
        moved = [("away", r) for r in plan.preempted] + [("end", r) for r, _ in record.finished]
        moved += [("out", s.request) for s in plan.swapped_out] + [("in", s.request) for s in plan.swapped_in]
        return Counter(moved + [(c.request, c.start, c.length, c.cached) for c in plan.chunks])

    for t in range(max(len(a.steps), len(b.steps))):
        pair = [seen(trace.steps[t]) if t < len(trace.steps) else None for trace in (a, b)]
        if pair[0] != pair[1]:
            return t
    return None


@pytest.mark.parametrize("blocks", range(8, 18))
def test_the_first_difference_is_where_brute_force_finds_it(blocks: int) -> None:
    jobs = [Job(6, 12), Job(5, 14), Job(9, 8)]
    a, b = (simulate_paged(jobs, num_blocks=n).trace for n in (blocks, 18))
    compare = Compare(a, b)
    assert compare.difference.step == brute_first_difference(a, b)
    away = [sum(len(r.plan.preempted) for r in trace.steps) for trace in (a, b)]
    value = {m.name: (m.a, m.b) for m in compare.metrics if not m.request}
    assert value["preemptions"] == tuple(away)
    assert value["tokens run"] == tuple(sum(r.plan.num_tokens for r in trace.steps) for trace in (a, b))
    again = []
    for trace in (a, b):
        ran = [(c.request, p) for r in trace.steps for c in r.plan.chunks for p in range(c.start, c.end)]
        again.append(len(ran) - len(set(ran)))
    assert value["of them run again"] == tuple(again)


def test_most_blocks_held_is_what_the_books_say() -> None:
    runs = [simulate_paged([Job(6, 12), Job(5, 14)], num_blocks=n) for n in (7, 14)]
    value = {m.name: (m.a, m.b) for m in Compare(*(run.trace for run in runs)).metrics}
    assert value["most K/V blocks held"] == tuple(max(len(book[2]) for book in run.books) for run in runs)
    first = {m.request: m.a for m in Compare(*(run.trace for run in runs)).metrics if m.name == "last token"}
    for request, at in first.items():
        ends = [t for t, r in enumerate(runs[0].trace.steps) if any("AB"[i] == request for i, _ in r.finished)]
        assert [at] == ends


def test_runs_with_other_requests_are_told_apart() -> None:
    few, many = simulate(((5, 3), (4, 4))), simulate(((5, 3), (4, 4), (3, 2)))
    compare = Compare(few, many)
    assert "A has 2 requests, B has 3." in compare.sentence and "same tokens" in repr(compare)
    assert "first token" in {m.name for m in compare.metrics if m.request == "C" and m.a is None}
    crowd = simulate([(3, 2 + i % 3) for i in range(12)], slots=12)
    sides = json.loads(Compare(few, crowd).data)["sides"]
    assert [side["data"]["requests"][1]["label"] for side in sides] == ["1", "1"]
    assert [side["data"]["colored"] for side in sides] == [False, False]
    other = changed(few, 0, lambda record: record)
    other.requests[0] = few.requests[0]._replace(prompt_ids=(9, 9, 9, 9, 9))
    assert Compare(few, other).sentence.startswith("Not the same requests: the prompts of A differ.")


def test_an_empty_side_is_said_and_two_are_refused(tmp_path: Path) -> None:
    trace = simulate(stage="1b")
    empty = Trace(dict(trace.meta))
    compare = Compare(trace, empty, names=("ours", "yours"))
    assert repr(compare) == "Compare(ours: 17 steps, yours: 0 steps; nothing to compare)"
    assert compare.sentence == "yours has no steps, so there is only ours to see: run it with trace=True."
    assert json.loads(compare.data)["sides"][1]["data"] is None
    with pytest.raises(TraceError, match="Both traces have 0 steps"):
        Compare(empty, empty)


@pytest.mark.parametrize("names", [("A", "A"), ("A",), "AB", ("A", ""), ("A", 3)])
def test_names_must_tell_the_runs_apart(names: Any) -> None:
    trace = simulate()
    with pytest.raises(InvalidSetting, match="two different texts"):
        Compare(trace, trace, names=names)
    with pytest.raises(InvalidSetting, match="size='huge'"):
        Compare(trace, trace, size="huge")


def test_engines_and_saved_traces_are_compared_and_only_clocks_bring_times(tmp_path: Path) -> None:
    llms = [LLM("tiny-random", stage=stage, trace=True, max_model_len=64) for stage in (2, 4)]
    for llm in llms:
        llm.generate([[3, 4, 5, 6], [9, 8]], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    compare = Compare(*llms, names=("stage 2", "stage 4"))
    assert repr(compare) == "Compare(stage 2: 5 steps, stage 4: 5 steps; same plans; same tokens)"
    assert [m.name for m in compare.metrics if m.wall] == ["TTFT, median", "TPOT, median", "E2E, median"]
    assert not any(m.wall for m in Compare(simulate(), simulate()).metrics)
    paths = [save(llm.trace, tmp_path / f"{i}.jsonl") for i, llm in enumerate(llms)]
    assert Compare(*paths, names=("stage 2", "stage 4")).metrics == compare.metrics
    assert load(paths[0]).requests == llms[0].trace.requests


def test_the_widget_is_plain_traits_and_a_page(tmp_path: Path) -> None:
    compare = Compare(simulate(stage="1a"), simulate(stage="1b"), step=-1)
    assert compare.step == 20 and compare._repr_mimebundle_()[0]["text/plain"] == repr(compare)  # type: ignore[index]
    page = compare.save_html(tmp_path / "compare.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2 and "import " not in page.split('<script type="module">')[1]
    assert [url for url in re.findall(r"https?://[^\s\"']+", page) if "www.w3.org" not in url] == []
