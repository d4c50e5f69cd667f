"""Export to the Chrome trace-event format, which ui.perfetto.dev and chrome://tracing open."""

from typing import Any

from stepengine.core.plan import Chunk
from stepengine.trace.metrics import kv_use
from stepengine.trace.record import Trace

ENGINE, REQUESTS = 1, 2  # process ids: Perfetto groups tracks by process


def to_perfetto(trace: Trace) -> dict[str, Any]:
    """The trace as a JSON object: one track per request, one for the engine's steps, two counters.

    Times are microseconds from the first event, as the format asks. Write it with `json.dump`.
    """
    starts = [info.t_arrived for info in trace.requests.values()] + [record.t_plan for record in trace.steps]
    zero = min(starts, default=0.0)

    def us(seconds: float) -> float:
        return (seconds - zero) * 1e6

    def span(pid: int, tid: int, name: str, begin: float, end: float, **args: Any) -> dict[str, Any]:
        return {
            "ph": "X",
            "pid": pid,
            "tid": tid,
            "name": name,
            "ts": us(begin),
            "dur": max(0.0, us(end) - us(begin)),
            "args": args,
        }

    def counter(name: str, time: float, **values: float) -> dict[str, Any]:
        return {"ph": "C", "pid": ENGINE, "tid": 0, "name": name, "ts": us(time), "args": values}

    events = [_name("process_name", ENGINE, 0, f"engine, stage {trace.meta.get('stage', '?')}")]
    events += [_name("process_name", REQUESTS, 0, "requests"), _name("thread_name", ENGINE, 1, "steps")]
    events += [_name("thread_name", REQUESTS, 1 + i, f"request {r}") for i, r in enumerate(trace.requests)]
    tracks = {request: 1 + i for i, request in enumerate(trace.requests)}
    outputs = dict.fromkeys(trace.requests, 0)
    started: set[int] = set()
    for record, use in zip(trace.steps, kv_use(trace), strict=True):
        plan = record.plan
        events.append(span(ENGINE, 1, f"step {plan.step}", record.t_plan, record.t_done, tokens=plan.num_tokens))
        events.append(span(ENGINE, 1, "plan", record.t_plan, record.t_run, rows=len(plan.chunks)))
        events.append(span(ENGINE, 1, "run", record.t_run, record.t_done, tokens=plan.num_tokens))
        events.append(counter("tokens per step", record.t_plan, tokens=plan.num_tokens))
        if use.capacity:
            events.append(counter("K/V tokens", record.t_plan, held=use.held, wasted=use.reserved - use.held))
        for parent, child in record.forked:
            outputs[child] = outputs[parent]
        for chunk, token in zip(plan.chunks, record.token_ids, strict=True):
            request, track = chunk.request, tracks[chunk.request]
            if request not in started:
                started.add(request)
                arrived = trace.requests[request].t_arrived
                events.append(span(REQUESTS, track, "waiting", arrived, max(arrived, record.t_run)))
            name = _slice_name(chunk, outputs[request], len(trace.requests[request].prompt_ids))
            events.append(
                span(
                    REQUESTS, track, name, record.t_run, record.t_done,
                    step=plan.step, start=chunk.start, length=chunk.length, token_id=token,
                )
            )  # fmt: skip
            outputs[request] += token >= 0
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _slice_name(chunk: Chunk, outputs: int, prompt: int) -> str:
    if not outputs:
        return f"prompt {chunk.length} tokens" if chunk.length > 1 or prompt > 1 else "prompt 1 token"
    return f"token {outputs + 1}" + (f", {chunk.length} tokens computed" if chunk.length > 1 else "")


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}
