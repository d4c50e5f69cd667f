"""Checks of the exercises of notebooks 02a and 02b; `exercises` hands them out with the others."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from stepengine.contracts.played import Memory, Run
from stepengine.contracts.report import Promise, Report, called, expect, run_promises, same_number
from stepengine.contracts.scheduler import tight_cases
from stepengine.core.batch import Staging
from stepengine.core.plan import Chunk
from stepengine.core.request import Request, SamplingParams, State
from stepengine.core.seams import Limits, Scheduler


def _stored_at(table: list[int], position: int, block_size: int) -> int:
    """The slot that the engine's staging writes the token at `position` to."""
    request = Request(0, [1] * (position + 1), SamplingParams(), 1 << 30, blocks=list(table), computed=position)
    staging = Staging(torch.device("cpu"), 1, 1, len(table), block_size)
    return int(staging.fill([Chunk(0, position, 1)], {0: request}).slots[0])


def check_slot(slot: Callable[[list[int], int, int], int]) -> Report:
    """Notebook 02a: `slot(table, position, block_size)` against the slots that the engine stores K/V at."""

    def compare(*cases: tuple[list[int], Sequence[int], int]) -> None:
        for table, positions, block_size in cases:
            for position in positions:
                given = list(table)
                call = f"slot({table}, {position}, {block_size})"
                got = called(call, slot, given, position, block_size)
                expect(given == table, f"{call}: the list `table` was changed")
                wanted = _stored_at(table, position, block_size)
                same_number(got, wanted, call, f"the engine stores that token at {wanted}")

    def start() -> None:
        compare(([3], (0, 1, 5, 15), 16))

    def following() -> None:
        compare(([3, 7], (15, 16, 17, 31), 16))

    def far() -> None:
        compare(([3, 7, 12, 25], (49,), 16), ([9, 2, 5], (0, 20, 47), 16))

    def sizes() -> None:
        compare(([4, 2, 6], (0, 1, 2), 1), ([4, 2, 6], range(9), 3), ([2, 1], (31, 32, 63), 32))

    def every() -> None:
        rng = random.Random(2)
        for block_size in (2, 5, 8):
            table = rng.sample(range(1, 50), 12)
            compare((table, range(12 * block_size), block_size))

    return run_promises(
        "slot",
        [
            Promise("a block begins at its id times block_size", start, "where does block 3 begin if blocks hold 16?"),
            Promise("after block_size tokens the next block goes on", following, "which entry of the table is it?"),
            Promise("the table says where, in any order", far, "entry = position // block_size, then look it up"),
            Promise("any block size", sizes, "the offset in the block is position % block_size"),
            Promise("every token of a long table", every, "block id times block_size, plus the offset"),
        ],
    )


def check_copies(copies: Callable[[int, int, int], int]) -> Report:
    """Notebook 02b: `copies(prompt_len, n, block_size)` against the copies in traces of stage 2's engine."""

    def counted(prompt_len: int, n: int, block_size: int) -> int:
        from stepengine.llm import LLM

        longest = prompt_len + 4
        blocks = (n + 1) * -(-longest // block_size)
        sizes = {"max_model_len": longest, "block_size": min(block_size, longest), "num_blocks": blocks}
        llm = LLM("tiny-random", stage=2, max_num_seqs=n, trace=True, **sizes)  # type: ignore[arg-type]
        params = SamplingParams(n=n, max_tokens=4, ignore_eos=True, seed=0)
        llm.generate([[1 + at % 50 for at in range(prompt_len)]], params)
        assert llm.trace is not None
        return sum(len(step.plan.copies) for step in llm.trace.steps)

    def compare(*cases: tuple[int, int, int]) -> Callable[[], None]:
        def check() -> None:
            for prompt_len, n, block_size in cases:
                case = f"copies({prompt_len}, {n}, {block_size})"
                wanted = counted(prompt_len, n, block_size)
                got = called(case, copies, prompt_len, n, block_size)
                same_number(got, wanted, case, f"the trace of stage 2 has {wanted}")

        return check

    return run_promises(
        "copies",
        [
            Promise(
                "one sample has nobody to copy from", compare((50, 1, 16)), "a block with one holder is written to"
            ),
            Promise(
                "two samples part in their last block", compare((50, 2, 16), (5, 2, 16)), "full blocks stay shared"
            ),
            Promise(
                "the last holder of a block writes in place", compare((50, 3, 16), (10, 8, 4)), "how many copy it?"
            ),
            Promise(
                "a full last block is never written to", compare((48, 3, 16), (4, 2, 4)), "prompt_len % block_size"
            ),
            Promise("one token in the last block is enough", compare((49, 3, 16), (9, 2, 8)), "it is not full"),
            Promise("blocks of one token are always full", compare((7, 3, 1)), "any number divides by 1"),
        ],
    )


def check_pick_victim(pick_victim: Callable[[Sequence[Request]], Request]) -> Report:
    """Notebook 02b: `pick_victim(running)` in stage 2's scheduler, with pools too small, and beside stage 0.

    running: requests that may give way, in order of (priority, id); the first is the one that needs a block.
    """
    from stepengine.llm import LLM

    prompts = [[5 + number, 9, 2, 7, 3][: 2 + number % 4] for number in range(6)]
    params = [SamplingParams(temperature=0.0, max_tokens=8 + number, ignore_eos=True) for number in range(6)]
    small = {"block_size": 4, "num_blocks": 8, "max_num_seqs": 4, "max_model_len": 32}
    stage: Any = LLM("tiny-random", stage=2, max_model_len=16).stage.parts.scheduler

    def make(limits: Limits, cache: Any) -> Scheduler:
        scheduler: Scheduler = stage(limits, cache, pick_victim)
        return scheduler

    def runs() -> list[Run]:
        return [
            Run(make, jobs, places, Memory(blocks, host)).to_end()
            for jobs, places, blocks in tight_cases()
            for host in (0, 4 * blocks)
        ]

    def member() -> None:
        for priorities in ([0], [0, 0], [0, 0, 1], [1, 1, 1, 2]):
            running = tuple(
                Request(number, [1] * (3 + number), SamplingParams(), 32, priority=priority, state=State.RUNNING)
                for number, priority in enumerate(priorities)
            )
            said = f"running = {[f'request {r.id}' for r in running]}"
            got = called(said, pick_victim, running)
            expect(any(got is request for request in running), f"{said}: got {got!r}, which is none of them")

    def ends() -> None:
        runs()

    def starves() -> None:
        for run in runs():
            expect(not run.heads, (run.heads or [""])[0])

    def priorities() -> None:
        for run in runs():
            expect(not run.too_good, (run.too_good or [""])[0])

    def tokens() -> None:
        wanted = [out.outputs[0].token_ids for out in LLM("tiny-random", stage=0).generate(prompts, params)]
        for preemption in ("recompute", "swap"):
            how: dict[str, Any] = {"stage": 2, "scheduler": make, "preemption": preemption, **small}
            outs = LLM("tiny-random", **how).generate(prompts, params, priority=[0, 1, 0, 0, 1, 0])
            for number, (out, right) in enumerate(zip(outs, wanted, strict=True)):
                got = out.outputs[0].token_ids
                expect(got == right, f"{preemption}, request {number}: got {got}, stage 0 gives {right}")

    return run_promises(
        "pick_victim",
        [
            Promise("the victim is one of the running requests", member, "return one entry of `running`, a request"),
            Promise("every request ends, in any pool that holds the largest", ends, "solve the promise above first"),
            Promise("the first in line never gives way, so each ends in turn", starves, "which entry came last?"),
            Promise("nobody gives way to a lower priority", priorities, "a lower number goes first, and stays longest"),
            Promise("the tokens are stage 0's, by recompute and by swap", tokens, "giving way costs time, not tokens"),
        ],
    )
