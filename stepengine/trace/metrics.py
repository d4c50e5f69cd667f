"""Latencies, throughput and waste of a recorded run. Times are milliseconds unless a name says otherwise."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from stepengine.core.plan import StepRecord
from stepengine.errors import TraceError
from stepengine.trace.record import Trace
from stepengine.trace.replay import WAITING, Replay

STATIC_STAGES = ("0", "1a")


class RequestMetrics(NamedTuple):
    """One request's latencies. A value is None where the request did not get that far."""

    id: int
    queue_ms: float | None  # arrival -> planning of the step with its first chunk began
    ttft_ms: float | None  # time to first token: arrival -> that token was on the host
    itl_ms: tuple[float, ...]  # inter-token latencies: gaps between successive tokens
    tpot_ms: float | None  # time per output token after the first: (E2E - TTFT) / (outputs - 1)
    e2e_ms: float | None  # arrival -> last token; of requests that finished by themselves
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int  # tokens run through the model for it, each time counted
    finish_reason: str | None = None  # "stop" | "length" | "abort" | None while unfinished


class KVUse(NamedTuple):
    """K/V storage during one step, in tokens; a block shared by several requests counts once."""

    held: int  # tokens whose K/V are stored
    reserved: int  # tokens that the blocks in use have room for
    capacity: int  # tokens that the whole pool has room for


class Gap(NamedTuple):
    """From one token of a request to its next: what inter-token latency is made of, with and without a clock."""

    request: int
    step: int  # index in the trace's steps of the one that brought the later token
    steps: int  # steps from the earlier token to the later one; 1: no step went by without a token
    tokens: int  # tokens that those steps ran through the model, for whomever
    ms: float  # the inter-token latency: both tokens on the host


class Span(NamedTuple):
    """A stretch of one step's time, in seconds on the engine's clock."""

    kind: str  # on the host "plan" | "launch" | "wait" | "update" | "run", on the device "busy"
    step: int  # the step's number in its plan
    begin: float
    end: float


def request_metrics(trace: Trace) -> list[RequestMetrics]:
    """Latencies of every request, in order of arrival in the trace."""
    planned: dict[int, float] = {}
    done: dict[int, list[float]] = {request: [] for request in trace.requests}
    computed = dict.fromkeys(trace.requests, 0)
    reasons: dict[int, str] = {}
    for record in trace.steps:
        reasons.update(record.aborted)
        for chunk, token in zip(record.plan.chunks, record.token_ids, strict=True):
            if chunk.request not in computed:
                raise TraceError(f"Step {record.plan.step} runs request {chunk.request}, which never arrived.")
            planned.setdefault(chunk.request, record.t_plan)
            computed[chunk.request] += chunk.length
            if token >= 0:
                done[chunk.request].append(record.t_done)
        reasons.update(record.finished)
    result = []
    for request, info in trace.requests.items():
        times, reason = done[request], reasons.get(request)
        ttft = _ms(times[0] - info.t_arrived) if times else None
        e2e = _ms(times[-1] - info.t_arrived) if times and reason not in (None, "abort") else None
        result.append(
            RequestMetrics(
                id=request,
                queue_ms=_ms(planned[request] - info.t_arrived) if request in planned else None,
                ttft_ms=ttft,
                itl_ms=tuple(_ms(b - a) for a, b in zip(times, times[1:], strict=False)),
                tpot_ms=(e2e - ttft) / (len(times) - 1) if e2e is not None and ttft is not None and times[1:] else None,
                e2e_ms=e2e,
                prompt_tokens=len(info.prompt_ids),
                output_tokens=len(times),
                computed_tokens=computed[request],
                finish_reason=reason,
            )
        )
    return result


def token_gaps(trace: Trace) -> list[Gap]:
    """Every gap between two tokens of a request, in order of the later token's step, then of the step's chunks.

    A gap's `tokens` count the work that a request had to sit through, its own included, whatever the machine: with
    prefill first a whole prompt may lie between two tokens of a neighbour, with chunks one step's budget at most.
    """
    ran = [0]  # tokens run before each step
    latest: dict[int, int] = {}  # request -> index of the step that brought its latest token
    gaps = []
    for index, record in enumerate(trace.steps):
        ran.append(ran[-1] + record.plan.num_tokens)
        for chunk, token in zip(record.plan.chunks, record.token_ids, strict=True):
            if token < 0:
                continue
            before = latest.get(chunk.request)
            if before is not None:
                between = ran[index + 1] - ran[before + 1]
                took = _ms(record.t_done - trace.steps[before].t_done)
                gaps.append(Gap(chunk.request, index, index - before, between, took))
            latest[chunk.request] = index
    return gaps


def batching(trace: Trace) -> str:
    """ "static" or "continuous": `meta["batching"]` where it is written, else what the stage does by itself."""
    named = trace.meta.get("batching")
    return str(named) if named else "static" if str(trace.meta.get("stage")) in STATIC_STAGES else "continuous"


def idle_rows(trace: Trace) -> list[int]:
    """Rows of each step that could have worked but did not.

    Only decode steps count: steps that run something, and none of whose chunks is its request's first, counted
    anew after a preemption.
    There it is width - rows. Static batching: width is the number of requests in the batch in flight, where a
    new batch begins with the first newcomer after all members of the last one have ended. Continuous batching:
    width is `max_num_seqs` while any request waits, else the number of rows, so nothing is idle.
    """
    return list(idle_stream(trace))


def idle_stream(trace: Trace) -> Iterator[int]:
    """`idle_rows` one by one; of a trace that still grows, ask only for steps that are there."""
    widths = _static_widths(trace) if batching(trace) == "static" else _continuous_widths(trace)
    seen: set[int] = set()
    for record, width in zip(trace.steps, widths, strict=True):
        rows = {chunk.request for chunk in record.plan.chunks}
        seen -= set(record.plan.preempted)
        seen |= {child for _, child in record.forked}
        yield max(0, width - len(rows)) if rows and rows <= seen else 0
        seen |= rows


def _static_widths(trace: Trace) -> Iterable[int]:
    batch: set[int] = set()
    running: set[int] = set()
    seen: set[int] = set()
    for record in trace.steps:
        running -= {request for request, _ in record.aborted}
        new = {chunk.request for chunk in record.plan.chunks} - seen
        if new and not running:
            batch = set()
        batch |= new
        running |= new
        seen |= new
        yield len(batch)
        running -= {request for request, _ in record.finished}


def _continuous_widths(trace: Trace) -> Iterable[int]:
    limit = int(trace.meta.get("max_num_seqs") or 0)
    for snapshot in Replay(trace):
        waiting = any(state == WAITING for state in snapshot.state.values())
        yield limit if waiting else 0


def kv_use(trace: Trace) -> list[KVUse]:
    """K/V storage during each step, before what ended in the step is given back; zeros where there is no storage."""
    replay = Replay(trace)
    capacity = replay.num_blocks * replay.block_size
    return [
        KVUse(sum(s.block_tokens.values()), len(s.refs) * replay.block_size, capacity) if capacity else KVUse(0, 0, 0)
        for s in replay
    ]


def host_spans(trace: Trace) -> list[Span]:
    """What the host did, in order of time; stretches in which it had no step to work on are left out, empty ones not.

    plan: choosing what runs. launch: laying the step out and giving the device its work. wait: nothing to do
    until a step's ids arrive. update: booking the ids. Where a CPU without pipelining does the device's work
    itself, that part of the launch is a wait, too. run: launch, wait and update in one, in a trace that does
    not tell them apart.
    """
    spans: list[Span] = []
    timed = []
    for record in trace.steps:
        step = record.plan.step
        if not record.plan.chunks:
            continue
        spans.append(Span("plan", step, record.t_plan, record.t_run))
        if not record.t_launched or not record.t_landed:
            spans.append(Span("run", step, record.t_run, record.t_done))
            continue
        timed.append(record)
        spans.append(Span("update", step, record.t_landed, record.t_done))
        if _does_it_itself(trace, record):
            spans.append(Span("launch", step, record.t_run, record.device_began))
            spans.append(Span("launch", step, record.device_ended, record.t_launched))
        else:
            spans.append(Span("launch", step, record.t_run, record.t_launched))
    ends = sorted(span.end for span in spans)
    for record in timed:
        if _does_it_itself(trace, record):
            spans.append(Span("wait", record.plan.step, record.device_began, record.device_ended))
        else:
            free = max(record.t_launched, ends[bisect_right(ends, record.t_landed) - 1])
            spans.append(Span("wait", record.plan.step, free, record.t_landed))
    return sorted(spans, key=lambda span: (span.begin, span.end))


def _does_it_itself(trace: Trace, record: StepRecord) -> bool:
    """True where the launch returned with the work done, by the host's own thread."""
    inside = record.t_run <= record.device_began < record.device_ended <= record.t_launched
    return inside and trace.meta.get("device") == "cpu" and not trace.meta.get("pipelined")


def device_spans(trace: Trace) -> list[Span]:
    """When the device worked on each step, in order of time; steps without device times are left out.

    From a step's first work to its last: what the device idles between two kernels of one step is not seen.
    """
    records = [record for record in trace.steps if record.device_ended > record.device_began]
    spans = [Span("busy", record.plan.step, record.device_began, record.device_ended) for record in records]
    return sorted(spans, key=lambda span: (span.begin, span.end))


def idle_fraction(trace: Trace) -> float | None:
    """The part of the time from the first device work to the last in which no step was on the device, 0 to 1.

    None where no step has device times. As in `device_spans`, gaps inside a step do not count.
    """
    return idle_share(device_spans(trace))


def idle_share(spans: Iterable[Span]) -> float | None:
    """The part of the time from the first beginning to the last end that no span covers; None without spans."""
    ends = [(span.begin, span.end) for span in spans]
    if not ends:
        return None
    whole = max(end for _, end in ends) - min(begin for begin, _ in ends)
    return 1 - _covered(ends) / whole if whole > 0 else 0.0


def host_ms(trace: Trace) -> list[float]:
    """Milliseconds that the host worked on each step (plan, launch, update; no waiting), in order of the steps.

    Steps whose record does not tell waiting from work are left out.
    """
    spans = host_spans(trace)
    unknown = {span.step for span in spans if span.kind == "run"}
    work: dict[int, float] = {}
    for span in spans:
        if span.step not in unknown and span.kind != "wait":
            work[span.step] = work.get(span.step, 0.0) + _ms(span.end - span.begin)
    return [work[step] for step in sorted(work)]


def summarize(trace: Trace) -> dict[str, Any]:
    """A run in numbers; a value is None where the run has nothing to measure it by.

    `wall_s` runs from the first arrival to the last token, `busy_s` is the part of it with a step in progress;
    `tokens_per_s` is generated tokens over `busy_s`. Percentiles interpolate linearly, over requests (TTFT, E2E,
    queue) or over all gaps of all requests (ITL). `kv_utilization` is tokens held / tokens reserved, averaged
    over the steps with anything reserved. `idle_slot_steps` is the sum of `idle_rows`.
    """
    metrics = request_metrics(trace)
    records = trace.steps
    busy = _covered([(r.t_plan, r.t_done) for r in records])
    begin = [info.t_arrived for info in trace.requests.values()] + [r.t_plan for r in records[:1]]
    generated = sum(m.output_tokens for m in metrics)
    used = [use.held / use.reserved for use in kv_use(trace) if use.reserved]
    return {
        "stage": trace.meta.get("stage"),
        "requests": len(metrics),
        "finished": sum(m.finish_reason in ("stop", "length") for m in metrics),
        "aborted": sum(m.finish_reason == "abort" for m in metrics),
        "steps": len(records),
        "tokens_prompt": sum(m.prompt_tokens for m in metrics),
        "tokens_computed": sum(m.computed_tokens for m in metrics),
        "tokens_generated": generated,
        "preemptions": sum(len(r.plan.preempted) + len(r.plan.swapped_out) for r in records),
        "prefix_hit_tokens": sum(chunk.cached for r in records for chunk in r.plan.chunks),
        "idle_slot_steps": sum(idle_rows(trace)),
        "kv_utilization": float(np.mean(used)) if used else None,
        "wall_s": max(r.t_done for r in records) - min(begin) if records else 0.0,
        "busy_s": busy,
        "tokens_per_s": generated / busy if busy > 0 else None,
        "queue_ms": percentiles(m.queue_ms for m in metrics if m.queue_ms is not None),
        "ttft_ms": percentiles(m.ttft_ms for m in metrics if m.ttft_ms is not None),
        "itl_ms": percentiles(gap for m in metrics for gap in m.itl_ms),
        "tpot_ms": percentiles(m.tpot_ms for m in metrics if m.tpot_ms is not None),
        "e2e_ms": percentiles(m.e2e_ms for m in metrics if m.e2e_ms is not None),
    }


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """{"p50", "p99"} of the values, or None where there are none."""
    data = list(values)
    if not data:
        return None
    p50, p99 = np.percentile(data, (50, 99))
    return {"p50": float(p50), "p99": float(p99)}


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of the spans: pipelined steps overlap."""
    total, end = 0.0, float("-inf")
    for begin, stop in sorted(spans):
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total


def _ms(seconds: float) -> float:
    return seconds * 1e3
