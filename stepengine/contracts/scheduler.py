"""What the engine relies on in a scheduler. No model runs: the check plays the device and the cache."""

import random
from collections.abc import Callable
from typing import NamedTuple

from stepengine.contracts.report import Promise, Report, expect, run_promises
from stepengine.core.plan import StepPlan
from stepengine.core.request import Request, SamplingParams, State
from stepengine.core.seams import Grant, KVCache, Limits, Scheduler


class _Places:
    """The plainest cache: as many places as blocks, each for one request."""

    def __init__(self, limits: Limits) -> None:
        self.free = list(range(limits.num_blocks, 0, -1))
        self.size = limits.block_size
        self.capacity_tokens = limits.num_blocks * limits.block_size

    @property
    def free_tokens(self) -> int:
        return len(self.free) * self.size

    def match(self, request: Request) -> int:
        return 0

    def grow(self, request: Request, upto: int) -> Grant | None:
        if request.blocks:
            return Grant()
        return Grant((self.free.pop(),)) if self.free else None

    def commit(self, request: Request, upto: int) -> int:
        return upto

    def release(self, request: Request) -> None:
        self.free.extend(request.blocks)
        request.blocks.clear()


class Job(NamedTuple):
    """A request of a case: prompt and output lengths, priority, the step before which it arrives."""

    prompt: int
    output: int
    priority: int = 0
    arrives: int = 0


class _Run:
    """One case, run to its end with every plan checked on the way."""

    def __init__(self, make: Callable[[Limits, KVCache], Scheduler], jobs: list[Job], places: int) -> None:
        longest = max(job.prompt + job.output for job in jobs)
        self.limits = Limits(places, max(longest, 64), longest, longest, places)
        self.cache = _Places(self.limits)
        self.scheduler = make(self.limits, self.cache)
        self.jobs = jobs
        self.case = f"{places} places, (prompt, output) = {[(job.prompt, job.output) for job in jobs]}"
        self.requests: dict[int, Request] = {}
        self.started: list[int] = []  # request ids in the order of their first chunk
        self.idle_places = 0  # place-steps that stood empty although somebody waited
        self.steps = 0

    def add(self, number: int) -> None:
        job = self.jobs[number]
        params = SamplingParams(max_tokens=job.output, temperature=0.0)
        request = Request(number, [1] * job.prompt, params, job.prompt + job.output, priority=job.priority)
        self.requests[number] = request
        self.scheduler.add(request)

    def step(self) -> StepPlan:
        before = {number: request.scheduled for number, request in self.requests.items()}
        plan = self.scheduler.plan()
        self.steps += 1
        expect(bool(plan.chunks), f"{self.case}: step {plan.step} plans nothing although requests are there")
        seen: set[int] = set()
        for chunk in plan.chunks:
            where = f"{self.case}: step {plan.step}, request {chunk.request}"
            expect(chunk.request in self.requests, f"{where} was never added")
            request = self.requests[chunk.request]
            expect(chunk.request not in seen, f"{where} has two chunks")
            expect(request.state is State.RUNNING, f"{where} is planned while {request.state.value}")
            expect(chunk.start == before[request.id], f"{where} starts at {chunk.start}, not {before[request.id]}")
            expect(1 <= chunk.length <= request.num_tokens - chunk.start, f"{where} runs {chunk.length} tokens")
            expect(request.scheduled == chunk.end, f"{where}: scheduled is {request.scheduled}, not {chunk.end}")
            expect(bool(request.blocks), f"{where} runs without room for its K/V")
            seen.add(chunk.request)
            if chunk.request not in self.started:
                self.started.append(chunk.request)
        live = [request for request in self.requests.values() if request.state is State.RUNNING]
        many = f"{self.case}: {len(live)} requests run in step {plan.step}"
        expect(len(live) <= self.limits.max_num_seqs, many)
        expect(plan.num_tokens <= self.limits.max_num_batched_tokens, f"{self.case}: {plan.num_tokens} tokens at once")
        waiting = any(request.state is State.WAITING for request in self.requests.values())
        if waiting:
            self.idle_places += self.limits.max_num_seqs - len(live)
        tokens = [7 if chunk.end == self.requests[chunk.request].num_tokens else -1 for chunk in plan.chunks]
        for number, reason in self.scheduler.update(plan, tokens):
            request = self.requests[number]
            said = f"{self.case}: request {number} was reported finished after {request.num_outputs} outputs"
            expect(request.state is State.FINISHED and request.num_outputs == self.jobs[number].output, said)
            expect(reason == "length", f"{said}, for {reason!r}")
        for request in live:
            done = request.num_outputs >= self.jobs[request.id].output
            over = f"{self.case}: request {request.id} has all its outputs but is still {request.state.value}"
            expect(not done or request.state is State.FINISHED, over)
        return plan

    def to_end(self) -> "_Run":
        limit = sum(job.output + 2 for job in self.jobs) + len(self.jobs) + max(job.arrives for job in self.jobs)
        left = sorted(range(len(self.jobs)), key=lambda number: self.jobs[number].arrives)
        while left or not self.scheduler.idle():
            while left and (self.jobs[left[0]].arrives <= self.steps or self.scheduler.idle()):
                self.add(left.pop(0))
            self.step()
            stuck = [number for number, request in self.requests.items() if request.state is not State.FINISHED]
            expect(self.steps <= limit, f"{self.case}: requests {stuck} have not ended after {self.steps} steps")
        short = [number for number, request in self.requests.items() if request.state is not State.FINISHED]
        expect(not short, f"{self.case}: idle() although requests {short} have not ended")
        held = len(self.cache.free) * self.limits.block_size
        expect(held == self.cache.capacity_tokens, f"{self.case}: {held} of {self.cache.capacity_tokens} tokens free")
        return self


def _cases() -> list[tuple[list[Job], int]]:
    """Small to large, so that the first failure is a small one."""
    cases: list[tuple[list[Job], int]] = [
        ([Job(1, 1)], 1),
        ([Job(3, 2)], 1),
        ([Job(2, 2), Job(2, 2)], 1),
        ([Job(2, 1), Job(2, 3)], 2),
        ([Job(2, 1), Job(2, 4), Job(2, 2)], 2),
        ([Job(4, 3), Job(1, 1, arrives=1), Job(2, 5, arrives=2)], 2),
    ]
    for size in (5, 9, 20):
        rng = random.Random(size)
        jobs = [Job(rng.randint(1, 12), rng.randint(1, 9), arrives=rng.randint(0, size)) for _ in range(size)]
        cases.append((jobs, rng.randint(2, 5)))
    return cases


def check_scheduler(make: Callable[[Limits, KVCache], Scheduler], continuous: bool = True) -> Report:
    """Check a scheduler, made by `make(limits, cache)`.

    continuous: also require that a place which falls free is taken in the very next step (static
    batching does not promise that). Never raises; see the report.
    """

    def ends() -> None:
        for jobs, places in _cases():
            _Run(make, jobs, places).to_end()

    def order() -> None:
        for priorities in ([0, 0, 0], [1, 0, 2], [2, 1, 0, 0, 1]):
            jobs = [Job(2, 2, priority) for priority in priorities]
            run = _Run(make, jobs, 1).to_end()
            right = sorted(range(len(jobs)), key=lambda number: (jobs[number].priority, number))
            same = run.started == right
            expect(same, f"priorities {priorities}, one place: started in order {run.started}, not {right}")

    def arrivals() -> None:
        run = _Run(make, [Job(2, 2), Job(2, 2)], 1)
        run.add(0)
        told = list(run.step().arrived)
        run.add(1)
        told += run.step().arrived
        expect(told == [0, 1], f"requests 0 and 1 came one after the other; `arrived` named {told}")

    def aborts() -> None:
        run = _Run(make, [Job(2, 9), Job(2, 9), Job(2, 2)], 2)
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
        run = _Run(make, [Job(2, 9)], 1)
        run.add(0)
        plan = run.scheduler.plan()
        run.scheduler.finish(0, "abort")
        ended = run.scheduler.update(plan, [7])
        outputs = run.requests[0].num_outputs
        expect(not ended and outputs == 0, f"a result came after the abort; {outputs} token was booked, {ended} ended")

    def prompt_places() -> None:
        for jobs, places in _cases():
            run = _Run(make, jobs, places).to_end()
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
    return run_promises(f"Scheduler {getattr(make, '__name__', make)}", promises)
