"""Two runs of the same requests: the first step whose plans differ and how, and what each cost, in counts.

Requests are matched by position: the n-th of one trace and the n-th of the other. Block ids are no difference of plan.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from stepengine.core.plan import StepRecord
from stepengine.trace import Replay, Trace, idle_rows, request_metrics
from stepengine.viz.template import HUES, LETTERS
from stepengine.viz.words.scene import agree, count, listed
from stepengine.viz.words.work import work_of

Names = tuple[str, str]


class Difference(NamedTuple):
    """Where two runs part."""

    step: int | None  # the first one whose plans or endings differ; None: no such step
    how: str  # what differs in it, in words; "" where nothing does
    blocks: str  # "" | "other block ids" | "other blocks" where the plans are the same
    tokens: tuple[int, ...]  # positions of the requests whose output tokens differ
    prompts: tuple[int, ...]  # positions of the requests whose prompts differ: not the same requests at all


class Metric(NamedTuple):
    """One line of the table: a value is None where a run has nothing to count."""

    name: str
    a: float | None
    b: float | None
    unit: str = ""
    wall: bool = False  # from the clock: differs from run to run
    request: str = ""  # whose, where it is not the whole run's


def labels_of(count_: int) -> list[str]:
    """What the requests are called, by position, in both runs."""
    return list(LETTERS[:count_]) if count_ <= len(HUES) else [str(i) for i in range(count_)]


def difference(a: Trace, b: Trace, names: Names) -> Difference:
    """The first step in which the runs differ, and whether their block ids and their tokens do."""
    labels = labels_of(max(len(a.requests), len(b.requests)))
    places = [{request: i for i, request in enumerate(trace.requests)} for trace in (a, b)]
    step, how = None, ""
    for t, (one, other) in enumerate(zip(a.steps, b.steps, strict=False)):
        if how := _apart(_seen(one, places[0]), _seen(other, places[1]), names, labels):
            step = t
            break
    else:
        if len(a.steps) != len(b.steps):
            step = min(len(a.steps), len(b.steps))
            short, long = names if len(a.steps) < len(b.steps) else names[::-1]
            how = f"{short} ends after {count(step, 'step')}, {long} goes on"
    infos = [list(trace.requests.values()) for trace in (a, b)]
    pairs = list(zip(*infos, strict=False))
    outputs = [list(trace.output_ids().values()) for trace in (a, b)]
    tokens = (i for i, (one, other) in enumerate(zip(*outputs, strict=False)) if one != other)
    prompts = (i for i, (one, other) in enumerate(pairs) if one.prompt_ids != other.prompt_ids)
    return Difference(step, how, "" if step is not None else _blocks(a, b), tuple(tokens), tuple(prompts))


def _seen(record: StepRecord, place: Mapping[int, int]) -> dict[str, Any]:
    """A step by the requests' positions, without block ids and without the order of its rows."""
    plan = record.plan
    return {
        "aborted": {place[request] for request, _ in record.aborted},
        "forked": {place[parent] for parent, _ in record.forked},
        "arrived": {place[request] for request in plan.arrived},
        "preempted": {place[request] for request in plan.preempted},
        "swapped_out": {place[swap.request] for swap in plan.swapped_out},
        "swapped_in": {place[swap.request] for swap in plan.swapped_in},
        "chunks": {place[chunk.request]: (chunk.start, chunk.length, chunk.cached) for chunk in plan.chunks},
        "copied": {place[copy.request] for copy in plan.copies},
        "finished": {place[request] for request, _ in record.finished},
    }


VERBS = (
    ("aborted", "aborts", ""),
    ("forked", "forks", ""),
    ("arrived", "takes in", ""),
    ("preempted", "preempts", ""),
    ("swapped_out", "moves", " to the host"),
    ("swapped_in", "brings", " back from the host"),
    ("chunks", "runs", ""),
)
LATER = (("copied", "copies a block of", ""), ("finished", "ends", ""))


def _apart(a: dict[str, Any], b: dict[str, Any], names: Names, labels: Sequence[str]) -> str:
    """How two steps differ, the cause before its effect; "" where they do not."""
    for key, verb, tail in VERBS:
        if said := _only(set(a[key]), set(b[key]), names, labels, verb, tail):
            return said
    for place in sorted(a["chunks"]):
        (start, length, cached), (other_start, other_length, other_cached) = a["chunks"][place], b["chunks"][place]
        who = f"request {labels[place]}"
        if cached != other_cached:
            return f"{who} finds {count(cached, 'token')} in {names[0]}, {other_cached} in {names[1]}"
        if start != other_start:
            run = f"runs tokens {start} to {start + length - 1} in {names[0]}"
            return f"{who} {run}, {other_start} to {other_start + other_length - 1} in {names[1]}"
        if length != other_length:
            return f"{who} runs {count(length, 'token')} in {names[0]}, {other_length} in {names[1]}"
    for key, verb, tail in LATER:
        if said := _only(a[key], b[key], names, labels, verb, tail):
            return said
    return ""


def _only(a: set[int], b: set[int], names: Names, labels: Sequence[str], verb: str, tail: str) -> str:
    if a == b:
        return ""
    mine, other = (_who(sorted(one - two), labels) for one, two in ((a, b), (b, a)))
    if mine and other:
        return f"{names[0]} {verb} {mine}{tail}, {names[1]} {other}"
    doer, rest = names if mine else names[::-1]
    return f"{doer} {verb} {mine or other}{tail}, {rest} does not"


def _who(places: Sequence[int], labels: Sequence[str]) -> str:
    if not places:
        return ""
    shown = [labels[i] for i in places[:4]] + ([f"{len(places) - 4} others"] if len(places) > 4 else [])
    return f"request{agree(places, '', 's')} {listed(shown)}"


def _blocks(a: Trace, b: Trace) -> str:
    def ids(trace: Trace, of: Callable[[Iterable[int]], Any]) -> list[Any]:
        place = {request: i for i, request in enumerate(trace.requests)}
        return [
            (
                sorted((place[chunk.request], of(chunk.blocks)) for chunk in record.plan.chunks),
                sorted((place[copy.request], copy.entry, of(copy[2:])) for copy in record.plan.copies),
            )
            for record in trace.steps
        ]

    if ids(a, tuple) == ids(b, tuple):
        return ""
    return "other block ids" if ids(a, lambda blocks: len(tuple(blocks))) == ids(
        b, lambda blocks: len(tuple(blocks))
    ) else "other blocks"  # fmt: skip


def metrics(a: Trace, b: Trace) -> list[Metric]:
    """What both runs cost, in counts of the traces; times last, and only where both traces have a real clock."""
    left, right = _counts(a), _counts(b)
    rows = [Metric(name, left[name], right[name]) for name in left]
    ends = [_token_steps(trace) for trace in (a, b)]
    for place, label in enumerate(labels_of(max(len(a.requests), len(b.requests)))):
        first, last = ([steps[place][k] if place < len(steps) else None for steps in ends] for k in (0, -1))
        rows.append(Metric("first token", *first, "step", False, label))
        rows.append(Metric("last token", *last, "step", False, label))
    if _has_clock(a) and _has_clock(b):
        rows += [Metric(name, *(_median(trace, of) for trace in (a, b)), "ms", True) for name, of in (
            ("TTFT, median", "ttft_ms"), ("TPOT, median", "tpot_ms"), ("E2E, median", "e2e_ms"))]  # fmt: skip
    return rows


def _counts(trace: Trace) -> dict[str, float | None]:
    replay, records = Replay(trace), trace.steps
    chunks = [chunk for record in records for chunk in record.plan.chunks]
    ran, rows = sum(chunk.length for chunk in chunks), sum(1 for record in records if record.plan.chunks)
    new = sum(work.new for works in work_of(replay) for work in works)
    stores = replay.num_blocks > 0
    return {
        "requests": len(trace.requests),
        "steps": len(records),
        "tokens run": ran,
        "of them run again": ran - new,
        "tokens generated": sum(token >= 0 for record in records for token in record.token_ids),
        "preemptions": sum(len(r.plan.preempted) + len(r.plan.swapped_out) for r in records),
        "tokens found (hits)": sum(chunk.cached for chunk in chunks),
        "most K/V blocks held": max((len(now.refs) for now in replay), default=0) if stores else None,
        "rows a step, mean": round(len(chunks) / rows, 2) if rows else None,
        "idle rows": sum(idle_rows(trace)),
    }


def _token_steps(trace: Trace) -> list[list[int | None]]:
    """By request, the steps that brought it a token; [None] where none did."""
    steps: dict[int, list[int | None]] = {request: [] for request in trace.requests}
    for t, record in enumerate(trace.steps):
        for chunk, token in zip(record.plan.chunks, record.token_ids, strict=True):
            if token >= 0:
                steps[chunk.request].append(t)
    return [found or [None] for found in steps.values()]


def _has_clock(trace: Trace) -> bool:
    """Whether an engine recorded it: a trace made by hand has no times, or none worth comparing."""
    return "versions" in trace.meta and any(record.t_done > 0 for record in trace.steps)


def _median(trace: Trace, name: str) -> float | None:
    values = sorted(value for m in request_metrics(trace) if (value := getattr(m, name)) is not None)
    half = len(values) // 2
    return None if not values else values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2
