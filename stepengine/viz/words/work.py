"""What the tokens of each chunk are: run for the first time or again, prompt or output, a beginning or not."""

from collections.abc import Iterator
from typing import NamedTuple

from stepengine.core.plan import Chunk
from stepengine.trace import Replay


class Work(NamedTuple):
    """A chunk and what its tokens are."""

    chunk: Chunk
    new: int  # tokens run for the first time; the other ones are run again
    first: bool  # begins its request, or begins it anew after it gave everything back
    resumed: bool  # begins it anew
    prompt: bool  # runs prompt tokens that had not run (or had been given up): prefill


def work_of(replay: Replay) -> list[tuple[Work, ...]]:
    """Every step's chunks, each with what its tokens are."""
    return list(work_stream(replay))


def work_stream(replay: Replay) -> Iterator[tuple[Work, ...]]:
    """`work_of` one by one; of a trace that still grows, ask only for steps that are there."""
    trace = replay.trace
    high: dict[int, int] = {}  # tokens of a request that have run at least once
    seen: set[int] = set()
    dropped: set[int] = set()
    for record in trace.steps:
        dropped |= set(record.plan.preempted)
        for parent, child in record.forked:
            if child not in record.plan.arrived:  # one that has to wait starts anew
                high[child] = high.get(parent, 0)
                seen |= {child} if parent in seen else set()
        row = []
        for chunk in record.plan.chunks:
            request = chunk.request
            first = request not in seen or request in dropped
            mark = high.get(request, 0)
            prompt = len(trace.requests[request].prompt_ids)
            # without storage a decode runs the prompt too, again: prefill is what had not run
            prefill = mark < prompt or (request in dropped) or (replay.num_blocks > 0 and chunk.start < prompt)
            row.append(
                Work(chunk, max(0, chunk.end - max(mark, chunk.start)), first, first and request in seen, prefill)
            )
            high[request] = max(mark, chunk.end)
            seen.add(request)
            dropped.discard(request)
        yield tuple(row)
