"""What a run did with its K/V memory, step by step, and what the lengths of its requests alone allow."""

from dataclasses import dataclass
from statistics import mean

from stepengine.bench.workloads import Workload
from stepengine.trace import Replay, Trace
from stepengine.trace.replay import RUNNING, SWAPPED, WAITING


@dataclass(frozen=True)
class Usage:
    """K/V memory over the steps of a run; a sequence is a request, or one sample of it.

    `queued` steps are those in which a sequence waits or is swapped out: memory or places are short.
    """

    steps: int
    queued_steps: int
    sequences: float  # that run, mean over the queued steps (over all, where nobody waits)
    peak: int  # most sequences that run at once
    fits: float  # sequences that the pool holds: its tokens / tokens reserved per sequence, over all steps
    utilization: float  # tokens held / tokens reserved, mean over the steps
    waste_tokens: float  # reserved and empty, per running sequence, mean over the steps
    worst_waste: int  # of any sequence in any step
    preemptions: int
    recomputed_tokens: int  # run again after a preemption
    swapped_blocks: int  # out and in


def usage(trace: Trace) -> Usage:
    """Read a run's memory off its trace, every step of it.

    `worst_waste` takes each sequence by itself: the room in its own table less its tokens, shared
    blocks counted with everyone who holds them.
    """
    replay = Replay(trace)
    size = replay.block_size
    crowds, queued, used, waste, total, worst = [], [], [], [], 0, 0
    for step in replay:
        running = [request for request, state in step.state.items() if state == RUNNING]
        if not running:
            continue
        crowds.append(len(running))
        queued.append(any(state in (WAITING, SWAPPED) for state in step.state.values()))
        reserved, held = len(step.refs) * size, sum(step.block_tokens.values())
        total += reserved
        used.append(held / reserved)
        waste.append((reserved - held) / len(running))
        worst = max(worst, *(len(step.table[request]) * size - step.computed[request] for request in running))
    plans = [record.plan for record in trace.steps]
    crowded = [count for count, short in zip(crowds, queued, strict=True) if short]
    return Usage(
        steps=len(plans),
        queued_steps=len(crowded),
        sequences=mean(crowded or crowds),
        peak=max(crowds),
        fits=replay.num_blocks * size * sum(crowds) / total,
        utilization=mean(used),
        waste_tokens=mean(waste),
        worst_waste=worst,
        preemptions=sum(len(plan.preempted) + len(plan.swapped_out) for plan in plans),
        recomputed_tokens=_recomputed(trace),
        swapped_blocks=sum(len(swap.pairs) for plan in plans for swap in plan.swapped_out + plan.swapped_in),
    )


def _recomputed(trace: Trace) -> int:
    """Tokens whose K/V had been there and were computed again."""
    reached: dict[int, int] = {}
    again = 0
    for record in trace.steps:
        for chunk in record.plan.chunks:
            top = reached.get(chunk.request, 0)
            again += max(0, min(chunk.end, top) - chunk.start)
            reached[chunk.request] = max(top, chunk.end)
    return again


def block_tokens_per_sequence(workload: Workload, block_size: int) -> float:
    """Tokens of blocks that a sequence holds, on average over its steps: P + k tokens in its step k of N, rounded up.

    A pool of C tokens therefore runs about C over this many sequences at once, whatever the order.
    """
    blocks = steps = 0
    for prompt, outputs in workload.sequences:
        blocks += sum(-(-(len(prompt) + k) // block_size) for k in range(outputs))
        steps += outputs
    return blocks * block_size / steps
