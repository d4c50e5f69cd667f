"""What the engine relies on in a scheduler. No model runs: the check plays the device and the cache."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from stepengine.contracts.played import PAGE, Job, Memory, Pages, Run
from stepengine.contracts.report import Promise, Report, expect, name_of, run_promises
from stepengine.core.request import State
from stepengine.core.seams import Limits, Scheduler


def _cases() -> list[tuple[list[Job], int]]:
    """Small to large, so that the first failure is a small one."""
    cases: list[tuple[list[Job], int]] = [
        ([Job(1, 1)], 1),
        ([Job(3, 2)], 1),
        ([Job(2, 2), Job(2, 2)], 1),
        ([Job(2, 1), Job(2, 3)], 2),
        ([Job(2, 1), Job(2, 4), Job(2, 2)], 2),
        ([Job(4, 3), Job(1, 1, arrives=1), Job(2, 5, arrives=2)], 2),
        ([Job(2, 3, 1), Job(2, 3), Job(2, 3, 2)], 3),  # its rows are not in the order of arrival
    ]
    for size in (5, 9, 20):
        rng = random.Random(size)
        jobs = [Job(rng.randint(1, 12), rng.randint(1, 9), arrives=rng.randint(0, size)) for _ in range(size)]
        cases.append((jobs, rng.randint(2, 5)))
    return cases


def tight_cases() -> list[tuple[list[Job], int, int]]:
    """Jobs, places and blocks of which the last are too few; small to large."""
    cases = [
        ([Job(4, 6), Job(4, 6)], 2, 4),
        ([Job(3, 9), Job(3, 9), Job(3, 9)], 3, 6),
        ([Job(3, 9, 1), Job(3, 9, 0, 1), Job(3, 9, 2, 1)], 3, 6),
        ([Job(3, 9, 1), Job(3, 9, 1), Job(3, 9, 0, 1)], 3, 6),
        ([Job(4, 16), *(Job(2, 6, arrives=step) for step in (1, 3, 5, 7))], 3, 5),
    ]
    for size in (6, 9, 14):
        rng = random.Random(size)
        jobs = [
            Job(rng.randint(1, 9), rng.randint(2, 12), rng.choice((0, 0, 1)), rng.randint(0, 9)) for _ in range(size)
        ]
        largest = max(-(-(job.prompt + job.output) // PAGE) for job in jobs)
        cases.append((jobs, rng.randint(2, 5), largest + rng.randint(0, 3)))
    return cases


def check_scheduler(
    make: Callable[[Limits, Any], Scheduler], continuous: bool = True, preempts: bool = False, chunks: bool = False
) -> Report:
    """Check a scheduler, made by `make(limits, cache)`.

    continuous: also require that a place which falls free is taken in the very next step (static
    batching does not promise that). preempts: it gives its requests small blocks, and makes some give
    way, by recompute or by swap, when the pool is too small for all. chunks: it also cuts prompts into pieces that
    fill up `limits.max_num_batched_tokens` beside the decodes. Never raises; see the report.
    """

    def case(jobs: list[Job], places: int) -> Run:
        if not preempts:
            return Run(make, jobs, places)
        each = -(-max(job.prompt + job.output for job in jobs) // PAGE)
        return Run(make, jobs, places, Memory((places + 1) * each + 1))  # ample

    def ends() -> None:
        for jobs, places in _cases():
            case(jobs, places).to_end()

    def order() -> None:
        for priorities in ([0, 0, 0], [1, 0, 2], [2, 1, 0, 0, 1]):
            jobs = [Job(2, 2, priority) for priority in priorities]
            run = case(jobs, 1).to_end()
            right = sorted(range(len(jobs)), key=lambda number: (jobs[number].priority, number))
            same = run.started == right
            expect(same, f"priorities {priorities}, one place: started in order {run.started}, not {right}")

    def arrivals() -> None:
        run = case([Job(2, 2), Job(2, 2)], 1)
        run.add(0)
        told = list(run.step().arrived)
        run.add(1)
        told += run.step().arrived
        expect(told == [0, 1], f"requests 0 and 1 came one after the other; `arrived` named {told}")

    def aborts() -> None:
        run = case([Job(2, 9), Job(2, 9), Job(2, 2)], 2)
        run.scheduler.finish(99, "abort")
        for number in range(3):
            run.add(number)
        run.step()
        run.scheduler.finish(0, "abort")
        run.scheduler.finish(2, "abort")
        for number in (0, 2):
            request = run.requests[number]
            ended = request.state is State.FINISHED and request.finish_reason == "abort" and not request.blocks
            expect(ended, f"request {number} was aborted and is {request.state.value}, blocks {request.blocks}")
        run.step()
        run.scheduler.finish(1, "abort")
        expect(run.scheduler.idle(), "all three requests were aborted, but idle() is False")

    def stale() -> None:
        run = case([Job(2, 9)], 1)
        run.add(0)
        plan = run.scheduler.plan()
        run.scheduler.finish(0, "abort")
        ended = run.scheduler.update(plan, [7])
        outputs = run.requests[0].num_outputs
        expect(not ended and outputs == 0, f"a result came after the abort; {outputs} token was booked, {ended} ended")

    def prompt_places() -> None:
        for jobs, places in _cases():
            run = case(jobs, places).to_end()
            expect(run.idle_places == 0, f"{run.case}: {run.idle_places} place-steps stood empty while somebody waited")

    promises = [
        Promise(
            "every request runs all its tokens, once, and ends; nothing is left behind",
            ends,
            "what runs must be remembered until it ends, and removed when it has",
        ),
        Promise("the queue is in order of priority, then of arrival", order, "sort by (priority, id)"),
        Promise("the plan names each arrival once", arrivals, "plan.arrived is what came since the last plan"),
        Promise("an abort ends a request in any state; an unknown id is harmless", aborts, "look at finish"),
        Promise("a result that comes after an abort is ignored", stale, "ask request.accepts(chunk) in update"),
    ]
    if continuous:
        promises.append(
            Promise(
                "a place that falls free is taken in the very next step",
                prompt_places,
                "remove what has ended before admitting; admit until the places are full",
            )
        )
    if preempts:
        promises += _tight_promises(make)
    if chunks:
        promises += _chunk_promises(make)
    return run_promises(f"Scheduler {name_of(make)}", promises)


def _tight_promises(make: Callable[[Limits, Any], Scheduler]) -> list[Promise]:
    """Promises of a scheduler whose pool is too small for all that run."""

    def play(host: bool = False) -> Iterator[Run]:
        for jobs, places, blocks in tight_cases():
            yield Run(make, jobs, places, Memory(blocks, 4 * blocks if host else 0)).to_end()

    def ends() -> None:
        runs = list(play())
        expect(bool(runs[0].gave_way), f"{runs[0].case}: nobody gave way, and yet these blocks cannot hold both")

    def needless() -> None:
        for run in play():
            expect(not run.needless, (run.needless or [""])[0])

    def back_first() -> None:
        for run in play():
            expect(not run.unfair, (run.unfair or [""])[0])

    def priorities() -> None:
        for run in play():
            expect(not run.too_good, (run.too_good or [""])[0])

    def head() -> None:
        for run in play():
            expect(not run.heads, (run.heads or [""])[0])

    def swaps() -> None:
        for run in play(host=True):
            recomputed = len(run.gave_way) - run.swaps
            expect(not recomputed, f"{run.case}: {recomputed} gave way by recompute, although the host has room")

    def full_host() -> None:
        for jobs, places, blocks in tight_cases():
            Run(make, jobs, places, Memory(blocks, 1)).to_end()

    def aborted() -> None:
        for host in (0, 40):
            jobs, places, blocks = tight_cases()[1]
            run = Run(make, jobs, places, Memory(blocks, host))
            for number in range(len(jobs)):
                run.add(number)
            while not run.gave_way:
                run.step()
            away = run.gave_way[0][1]
            run.scheduler.finish(away, "abort")
            state = run.requests[away].state
            expect(state is State.FINISHED, f"{run.case}: request {away} gave way, was aborted and is {state.value}")
            while not run.scheduler.idle():
                run.step()
            held = run.limits.num_blocks - len(run.cache.free)
            expect(held == 0, f"{run.case}: {held} blocks are held after the last request")
            slots = sorted(run.cache.free_slots) if isinstance(run.cache, Pages) else []
            expect(slots == list(range(host)), f"{run.case}: host slots {slots} of {host} are free at the end")

    return [
        Promise("with too few blocks all requests still end", ends, "whoever finds no block makes another give way"),
        Promise("nobody gives way while all find blocks", needless, "preempt only when grow answers None"),
        Promise("whoever gave way comes back before newer ones", back_first, "queue it by (priority, id), not last"),
        Promise("nobody gives way to a lower priority", priorities, "choose among the lowest priority"),
        Promise("the first in line never gives way: so each ends in turn", head, "let the youngest give way"),
        Promise("with room on the host, whoever gives way is swapped", swaps, "ask cache.swap_out, then cache.swap_in"),
        Promise("with a full host it is recomputed", full_host, "swap_out answers None when the host is full"),
        Promise("an abort also ends who gave way", aborted, "look for it in the queue, and release what it holds"),
    ]


def _chunk_promises(make: Callable[[Limits, Any], Scheduler]) -> list[Promise]:
    """Promises of a scheduler that gives each step a budget of tokens."""

    def ample(jobs: list[Job], places: int, budget: int, most: int = 0) -> Run:
        each = -(-max(job.prompt + job.output for job in jobs) // PAGE)
        return Run(make, jobs, places, Memory((places + 1) * each + 1, 0, budget, most))

    def cases() -> Iterator[Run]:
        for jobs, places in _cases():
            for budget in (places, places + 1, places + 3):
                yield ample(jobs, places, budget)

    def beside(budget: int, most: int = 0) -> list[int]:
        """Chunks of a prompt of 1000 tokens that arrives while two requests decode."""
        run = ample([Job(1, 12), Job(1, 12), Job(1000, 2, arrives=1)], 3, budget, most)
        run.add(0)
        run.add(1)
        run.step()
        run.add(2)
        plans = [run.step() for _ in range(10)]
        mine = [chunk.length for plan in plans for chunk in plan.chunks if chunk.request == 2]
        return mine[:-1] if mine[-1:] == [1] else mine  # its own decode

    def ends() -> None:
        for run in cases():
            run.to_end()

    def schedule() -> None:
        for budget, wanted in ((258, [256, 256, 256, 232]), (256, [254, 254, 254, 238])):
            got = beside(budget)
            expect(got == wanted, f"1000 tokens beside two decodes, {budget} tokens a step: chunks {got}, not {wanted}")

    def limited() -> None:
        got, wanted = beside(258, 200), [200] * 5
        expect(got == wanted, f"1000 tokens beside two decodes, at most 200 of one prompt: chunks {got}, not {wanted}")
        run = ample([Job(40, 2), Job(40, 2)], 2, 32, 10)
        run.add(0)
        run.add(1)
        lengths = [chunk.length for chunk in run.step().chunks]
        expect(lengths == [10, 10], f"{run.case}, at most 10 of one prompt: chunks {lengths}, not [10, 10]")

    def decodes() -> None:
        for run in cases():
            run.to_end()
            expect(not run.stalled, (run.stalled or [""])[0])

    def filled() -> None:
        for run in cases():
            run.to_end()
            expect(not run.slack, (run.slack or [""])[0])

    def tight() -> None:
        short = Job(1, 16)  # half way through a long prompt, the last or the first in line, blocks run out
        mid_prompt = [([short, short, Job(24, 2, priority, 3)], 3, 11) for priority in (0, -1)]
        for jobs, places, blocks in [*mid_prompt, *tight_cases()]:
            for budget in (places, places + 2):
                for host in (0, 4 * blocks):
                    run = Run(make, jobs, places, Memory(blocks, host, budget)).to_end()
                    expect(not run.unfair, (run.unfair or [""])[0])
                    expect(not run.too_good, (run.too_good or [""])[0])
                    expect(not run.heads, (run.heads or [""])[0])

    return [
        Promise("prompts in pieces: all requests still end", ends, "a prompt goes on where its last chunk ended"),
        Promise("a 1000-token prompt fills what two decodes leave", schedule, "decodes first, then min(due, left)"),
        Promise("no chunk is above long_prefill_token_threshold", limited, "min(due, threshold, left)"),
        Promise("whoever decodes has a token in every step", decodes, "keep one token back for each of them"),
        Promise("no token of a step is left over while a prompt could have it", filled, "go on until the budget is 0"),
        Promise("in mid-prompt too, the right one gives way and all end", tight, "grant blocks in the line's order"),
    ]
