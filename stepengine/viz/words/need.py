"""Why a step had to send somebody away: the blocks that its running requests asked for, and those that were free."""

from typing import NamedTuple

from stepengine.core.plan import StepRecord
from stepengine.trace import Replay, Snapshot
from stepengine.trace.replay import RUNNING


class Need(NamedTuple):
    """What the running requests lacked before anybody gave way."""

    who: tuple[int, ...]  # those that need a block, in line: priority, then arrival
    blocks: int
    free: int
    line: tuple[int, ...]  # all that were running, in line
    table: dict[int, tuple[int, ...]]  # what each of them held


def need(replay: Replay, before: Snapshot, record: StepRecord) -> Need:
    """The need of the step that follows `before`: blocks for one more token each, and for copies of shared ones."""
    plan, size, infos = record.plan, replay.block_size, replay.trace.requests
    table = {request: blocks for request, blocks in before.table.items() if blocks}
    outputs = dict(before.outputs)
    running = {request for request, state in before.state.items() if state == RUNNING}
    for parent, child in record.forked:
        outputs[child] = outputs[parent]
        if child not in plan.arrived:  # it goes on at once, in the parent's blocks
            table[child] = table.get(parent, ())
            running |= {child} if parent in running else set()
    for request, _ in record.aborted:
        table.pop(request, None)
        running.discard(request)
    for swap in plan.swapped_in:
        table[swap.request] = tuple(block for block, _ in swap.pairs)
        running.add(swap.request)
    refs: dict[int, int] = {}
    for blocks in table.values():
        for block in blocks:
            refs[block] = refs.get(block, 0) + 1
    free = replay.num_blocks - len(refs)
    line = sorted(running, key=lambda request: (infos[request].priority, request))
    missing = {}
    for request in line:
        blocks, tokens = table.get(request, ()), len(infos[request].prompt_ids) + len(outputs[request])
        count = max(0, -(-tokens // size) - len(blocks))
        if not count and refs[blocks[(tokens - 1) // size]] > 1:  # it would write into a shared block
            refs[blocks[(tokens - 1) // size]] -= 1
            count = 1
        if count:
            missing[request] = count
    return Need(tuple(missing), sum(missing.values()), free, tuple(line), table)
