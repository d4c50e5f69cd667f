"""Traces made by a brute-force simulator, so that readers of traces are tested without an engine.

`simulate` follows the plan conventions of the stages: "0" and "1a" batch statically, "1b" continuously in slots,
"2" continuously in small blocks, preempting the youngest request when a block is missing.
"""

from collections.abc import Sequence

from stepengine.core.plan import Chunk, RequestInfo, StepPlan, StepRecord
from stepengine.trace import Trace

EXAMPLE = ((5, 9), (3, 3), (8, 5), (4, 12), (6, 2), (2, 7))  # (prompt tokens, output tokens) per request


class Live:
    """One request in the simulator."""

    def __init__(self, request: int, prompt: int, output: int, arrival: int) -> None:
        self.id, self.prompt, self.output, self.arrival = request, prompt, output, arrival
        self.done, self.computed, self.blocks = 0, 0, []

    @property
    def length(self) -> int:
        return self.prompt + self.done


def simulate(
    lengths: Sequence[tuple[int, int]] = EXAMPLE,
    stage: str = "1b",
    slots: int = 3,
    arrivals: Sequence[int] | None = None,
    max_model_len: int = 32,
    block_size: int = 4,
    num_blocks: int = 12,
) -> Trace:
    """The trace of requests that arrive before the steps in `arrivals` (default: all before step 0)."""
    static, naive, paged = stage in ("0", "1a"), stage == "0", stage == "2"
    size, total = (block_size, num_blocks) if paged else (0, 0) if naive else (max_model_len, slots)
    trace = Trace(
        {
            "stage": stage, "model": "synthetic", "device": "cpu", "dtype": "float32", "block_size": size,
            "num_blocks": total, "max_num_seqs": slots, "max_model_len": max_model_len, "kv_bytes_per_token": 1024,
        }
    )  # fmt: skip
    arrivals = arrivals or [0] * len(lengths)
    coming = [Live(i, p, n, a) for i, ((p, n), a) in enumerate(zip(lengths, arrivals, strict=True))]
    waiting: list[Live] = []
    running: list[Live] = []
    free, clock, step = list(range(1, total + 1)), 0.0, 0
    while coming or waiting or running:
        arrived = [r for r in coming if r.arrival <= step]
        for r in arrived:
            prompt = tuple((7 * r.id + k) % 50 for k in range(r.prompt))
            trace.add_request(RequestInfo(r.id, prompt, r.output, group=r.id, t_arrived=clock))
        waiting += arrived
        coming = [r for r in coming if r.arrival > step]
        if not waiting and not running:
            step = min(r.arrival for r in coming)
            continue
        new: list[Live] = []
        while waiting and len(running) + len(new) < slots and not (static and running):
            need = -(-(waiting[0].length + 1) // size) if paged else 1
            if size and need > len(free):
                break
            new.append(waiting.pop(0))
            if size:
                new[-1].blocks, free = free[:need], free[need:]
        preempted: list[int] = []
        grown: dict[int, tuple[int, ...]] = {r.id: tuple(r.blocks) for r in new}
        for r in list(running) if paged and not new else ():
            while r in running and r.length > len(r.blocks) * size:
                if not free:  # the youngest, perhaps r itself, gives everything back
                    victim = running.pop()
                    free, victim.blocks, victim.computed = free + victim.blocks, [], 0
                    grown.pop(victim.id, None)
                    waiting.insert(0, victim)
                    preempted.append(victim.id)
                    continue
                grown[r.id] = (free[0],)
                r.blocks.append(free.pop(0))
        rows = new or running
        chunks = tuple(Chunk(r.id, r.computed, r.length - r.computed, grown.get(r.id, ())) for r in rows)
        begin, run = clock, clock + 0.0005
        clock = run + 0.010 + 0.001 * sum(c.length for c in chunks)
        running += new
        for r in rows:
            r.computed, r.done = 0 if naive else r.length, r.done + 1
        ended = [r for r in rows if r.done == r.output]
        running = [r for r in running if r not in ended]
        free += [block for r in ended for block in r.blocks]
        trace.append(
            StepRecord(
                StepPlan(step, chunks, tuple(r.id for r in arrived), tuple(preempted)),
                tuple((11 * r.id + r.done) % 50 for r in rows),
                tuple((r.id, "length") for r in ended),
                t_plan=begin,
                t_run=run,
                t_done=clock,
            )
        )
        step += 1
    return trace
