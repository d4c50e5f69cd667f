"""Plays the device and the cache for a scheduler under test, and checks every plan that it makes."""

from collections.abc import Callable
from typing import Any, NamedTuple

from stepengine.contracts.report import Violation, called, expect
from stepengine.core.plan import Chunk, StepPlan, Swap
from stepengine.core.request import Request, SamplingParams, State
from stepengine.core.seams import Grant, Limits, Scheduler


class Places:
    """The plainest cache: as many places as blocks, each for one request."""

    def __init__(self, limits: Limits) -> None:
        self.free = list(range(limits.num_blocks, 0, -1))
        self.size = limits.block_size
        self.capacity_tokens = limits.num_blocks * limits.block_size
        self.refused = False  # whether somebody asked for more than there is

    @property
    def free_tokens(self) -> int:
        return len(self.free) * self.size

    def match(self, request: Request) -> int:
        return 0

    def grow(self, request: Request, upto: int) -> Grant | None:
        if request.blocks:
            return Grant()
        self.refused = not self.free
        return Grant((self.free.pop(),)) if self.free else None

    def commit(self, request: Request, upto: int) -> int:
        return upto

    def release(self, request: Request) -> None:
        self.free.extend(request.blocks)
        request.blocks.clear()


class Pages:
    """The plainest paged cache: a new block whenever the last one is full, nothing shared."""

    def __init__(self, limits: Limits) -> None:
        self.free = list(range(limits.num_blocks, 0, -1))
        self.size = limits.block_size
        self.capacity_tokens = limits.num_blocks * limits.block_size
        self.free_slots = list(range(limits.num_host_blocks))
        self.hosted: dict[int, list[int]] = {}
        self.refused = False  # whether somebody asked for more than there is

    @property
    def free_tokens(self) -> int:
        return len(self.free) * self.size

    def match(self, request: Request) -> int:
        return 0

    def grow(self, request: Request, upto: int) -> Grant | None:
        missing = max(0, -(-upto // self.size) - len(request.blocks))
        if missing > len(self.free):
            self.refused = True
            return None
        return Grant(tuple(self.free.pop() for _ in range(missing)))

    def commit(self, request: Request, upto: int) -> int:
        return upto

    def release(self, request: Request) -> None:
        self.free.extend(request.blocks)
        request.blocks.clear()
        self.free_slots.extend(self.hosted.pop(request.id, ()))

    def fork(self, parent: Request, child: Request) -> None:
        raise NotImplementedError("this check does not fork")

    def swap_out(self, request: Request) -> Swap | None:
        if len(request.blocks) > len(self.free_slots):
            return None
        slots = [self.free_slots.pop() for _ in request.blocks]
        swap = Swap(request.id, tuple(zip(request.blocks, slots, strict=True)))
        self.release(request)
        self.hosted[request.id] = slots
        return swap

    def swap_in(self, request: Request) -> Swap | None:
        slots = self.hosted[request.id]
        if len(slots) > len(self.free):
            return None
        request.blocks.extend(self.free.pop() for _ in slots)
        self.free_slots.extend(self.hosted.pop(request.id))
        return Swap(request.id, tuple(zip(request.blocks, slots, strict=True)))


class Memory(NamedTuple):
    """Blocks of `PAGE` tokens to run a case in, and what becomes of whoever is preempted.

    budget: tokens of one step, and most: of one chunk, for a scheduler that cuts prompts; 0: a prompt fits.
    """

    num_blocks: int
    num_host_blocks: int = 0
    budget: int = 0
    most: int = 0

    @property
    def preemption(self) -> str:
        return "swap" if self.num_host_blocks else "recompute"


PAGE = 4  # tokens per block where a scheduler preempts


class Job(NamedTuple):
    """A request of a case: prompt and output lengths, priority, the step before which it arrives."""

    prompt: int
    output: int
    priority: int = 0
    arrives: int = 0


def own(number: int) -> int:
    """The token that the played device samples for a request, and for no other."""
    return 1000 + number


def line(request: Request) -> tuple[int, int]:
    """A request's place in line: priority first, then arrival."""
    return request.priority, request.id


class Run:
    """One case, run to its end with every plan checked on the way. Without a `memory` a place is a slot."""

    def __init__(
        self, make: Callable[[Limits, Any], Scheduler], jobs: list[Job], places: int, memory: Memory | None = None
    ) -> None:
        longest = max(job.prompt + job.output for job in jobs)
        self.case = f"{places} places, (prompt, output) = {[(job.prompt, job.output) for job in jobs]}"
        self.cache: Places | Pages
        if memory is None:
            self.limits = Limits(places, max(longest, 64), longest, longest, places)
            self.cache = Places(self.limits)
        else:
            swaps = (memory.preemption, memory.num_host_blocks)
            budget = memory.budget or max(longest, 64)
            self.limits = Limits(places, budget, longest, PAGE, memory.num_blocks, *swaps, memory.most)
            self.cache = Pages(self.limits)
            priorities = f", priorities {[job.priority for job in jobs]}" if any(job.priority for job in jobs) else ""
            self.case = f"{memory.num_blocks} blocks of {PAGE} tokens, {self.case}{priorities}, {memory.preemption}"
            self.case += f", {memory.budget} tokens a step" if memory.budget else ""
        self.scheduler = make(self.limits, self.cache)
        self.jobs = jobs
        self.requests: dict[int, Request] = {}
        self.started: list[int] = []  # request ids in the order of their first chunk
        self.idle_places = 0  # place-steps that stood empty although somebody waited
        self.steps = 0
        self.stored: dict[tuple[int, int], tuple[int, int]] = {}  # (block, offset) -> (request, position)
        self.hosted: dict[int, list[tuple[int, int] | None]] = {}  # host slot -> contents of a block
        self.gave_way: list[tuple[int, int]] = []  # (step, request) of every preemption
        self.swaps = 0
        self.unfair: list[str] = []  # who was overtaken in the queue
        self.too_good: list[str] = []  # who gave way to a request of lower priority
        self.heads: list[str] = []  # who gave way although first in line
        self.needless: list[str] = []  # who gave way although everybody found room
        self.stalled: list[str] = []  # who decodes and had to wait
        self.slack: list[str] = []  # steps that left tokens of the budget to nobody while a prompt waited for them

    def add(self, number: int) -> None:
        job = self.jobs[number]
        params = SamplingParams(max_tokens=job.output, temperature=0.0)
        longest = job.prompt + job.output
        request = Request(number, [1] * job.prompt, params, longest, priority=job.priority, group=number)
        self.requests[number] = request
        self.scheduler.add(request)

    def step(self) -> StepPlan:
        before = {number: request.scheduled for number, request in self.requests.items()}
        ran = [request for request in self.requests.values() if request.state is State.RUNNING]
        decoding = [request for request in ran if request.due == 1]
        self.cache.refused = False
        try:
            plan: StepPlan = called(f"{self.case}: plan() of step {self.steps}", self.scheduler.plan)
        except Violation as broken:
            why = "; cache.grow had answered None, because no place is free" if self.cache.refused else ""
            raise Violation(f"{broken}{why}") from None
        self.steps += 1
        if isinstance(self.cache, Pages):
            before |= self.check_moves(plan, ran)
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
            if isinstance(self.cache, Pages):
                self.check_storage(chunk)
            seen.add(chunk.request)
            if chunk.request not in self.started:
                self.started.append(chunk.request)
        live = [request for request in self.requests.values() if request.state is State.RUNNING]
        self.check_shares(plan, decoding, live)
        many = f"{self.case}: {len(live)} requests run in step {plan.step}"
        expect(len(live) <= self.limits.max_num_seqs, many)
        expect(plan.num_tokens <= self.limits.max_num_batched_tokens, f"{self.case}: {plan.num_tokens} tokens at once")
        waiting = any(request.state is State.WAITING for request in self.requests.values())
        if waiting:
            self.idle_places += self.limits.max_num_seqs - len(live)
        tokens = [own(c.request) if c.end == self.requests[c.request].num_tokens else -1 for c in plan.chunks]
        ended = self.scheduler.update(plan, tokens)
        self.check_rows(plan, tokens)
        for number, reason in ended:
            request = self.requests[number]
            said = f"{self.case}: request {number} was reported finished after {request.num_outputs} outputs"
            expect(request.state is State.FINISHED and request.num_outputs == self.jobs[number].output, said)
            expect(reason == "length", f"{said}, for {reason!r}")
        for request in live:
            done = request.num_outputs >= self.jobs[request.id].output
            over = f"{self.case}: request {request.id} has all its outputs but is still {request.state.value}"
            expect(not done or request.state is State.FINISHED, over)
        return plan

    def check_rows(self, plan: StepPlan, tokens: list[int]) -> None:
        """Each request's newest token must be the one that its own row sampled."""
        for chunk, token in zip(plan.chunks, tokens, strict=True):
            outputs = self.requests[chunk.request].output_ids
            got = outputs[-1] if outputs else own(chunk.request)
            whose = next((number for number in self.requests if own(number) == got), None)
            where = f"{self.case}: step {plan.step} ran requests {[c.request for c in plan.chunks]} in this order"
            said = "no token of this step" if whose is None else f"the token that was sampled for request {whose}"
            expect(token < 0 or got == token, f"{where}; request {chunk.request} was given {said}")

    def check_moves(self, plan: StepPlan, ran: list[Request]) -> dict[int, int]:
        """Preemptions and swaps as the plan tells them against the requests' states; where the movers go on."""
        when = f"{self.case}: step {plan.step}"
        out = {swap.request for swap in plan.swapped_out}
        gone = {request.id for request in ran if request.state is not State.RUNNING}
        told = sorted([*plan.preempted, *out])
        expect(told == sorted(gone), f"{when}: requests {sorted(gone)} stopped running, the plan tells of {told}")
        for request in (self.requests[number] for number in gone):
            wanted = State.SWAPPED if request.id in out else State.WAITING
            said = f"{when}, request {request.id} gave way and is {request.state.value}"
            expect(request.state is wanted, f"{said}, not {wanted.value}")
            expect(not request.blocks, f"{said}, but holds blocks {request.blocks}")
            kept = request.id in out or request.computed == request.scheduled == 0
            expect(kept, f"{said}: it lost its blocks, but computed is {request.computed}, not 0")
        if gone and isinstance(self.cache, Pages) and not self.cache.refused:
            self.needless.append(f"{when}: requests {sorted(gone)} gave way, and grow never answered None")
        self.swaps += len(out)
        for swap in plan.swapped_out:
            for block, slot in swap.pairs:
                self.hosted[slot] = [self.stored.get((block, offset)) for offset in range(self.limits.block_size)]
        for swap in plan.swapped_in:
            state = self.requests[swap.request].state
            expect(state is State.RUNNING, f"{when}, request {swap.request} was swapped in and is {state.value}")
            for block, slot in swap.pairs:
                tokens = enumerate(self.hosted[slot])
                self.stored |= {(block, offset): token for offset, token in tokens if token is not None}
        self.check_turns(when, ran, gone)
        return {number: self.requests[number].scheduled for number in gone}

    def check_turns(self, when: str, ran: list[Request], gone: set[int]) -> None:
        """Note who was overtaken in the queue, who gave way to lesser ones, who gave way as the first in line."""
        waiting = [r for r in self.requests.values() if r.state in (State.WAITING, State.SWAPPED)]
        started = [r for r in self.requests.values() if r.state is State.RUNNING and r not in ran]
        for request in waiting:
            ahead = [other.id for other in started if line(other) > line(request)]
            if ahead:
                self.unfair.append(f"{when}: request {ahead[0]} started, request {request.id} still waits")
        stayed = [request for request in ran if request.id not in gone]
        for request in (self.requests[number] for number in sorted(gone)):
            self.gave_way.append((self.steps, request.id))
            lesser = [other.id for other in stayed if other.priority > request.priority]
            if lesser:
                said = f"request {request.id} of priority {request.priority} gave way, request {lesser[0]}"
                self.too_good.append(f"{when}: {said} of priority {self.requests[lesser[0]].priority} ran on")
            if request is min(ran, key=line) and stayed:
                others = sorted(other.id for other in stayed)
                self.heads.append(f"{when}: request {request.id}, the first in line, gave way and {others} ran on")

    def check_shares(self, plan: StepPlan, decoding: list[Request], live: list[Request]) -> None:
        """Note who decodes and got no token, and tokens that a prompt could have had; call it before `update`."""
        lengths = {chunk.request: chunk.length for chunk in plan.chunks}
        when, told = f"{self.case}: step {plan.step}", f"runs {plan.num_tokens} tokens"
        for request in decoding:
            if request.state is State.RUNNING and request.id not in lengths:
                self.stalled.append(f"{when} {told}, and none of request {request.id}, which decodes")
        left = self.limits.max_num_batched_tokens - plan.num_tokens
        most = self.limits.long_prefill_token_threshold or self.limits.max_num_batched_tokens
        behind = [r.id for r in live if r.scheduled < r.num_tokens and lengths.get(r.id, 0) < most]
        if left and behind:
            self.slack.append(f"{when} {told} of {self.limits.max_num_batched_tokens}; request {behind[0]} has more")

    def check_storage(self, chunk: Chunk) -> None:
        """Store the chunk's K/V; everything before them must be where the block table says."""
        request, size = self.requests[chunk.request], self.limits.block_size
        room = len(request.blocks) * size
        where = f"{self.case}: request {request.id} runs [{chunk.start}, {chunk.end})"
        expect(room >= chunk.end, f"{where} and its blocks hold {room} tokens")
        for position in range(chunk.start):
            found = self.stored.get((request.blocks[position // size], position % size))
            expect(found == (request.id, position), f"{where}, but its blocks do not hold the K/V of token {position}")
        for position in range(chunk.start, chunk.end):
            self.stored[request.blocks[position // size], position % size] = (request.id, position)

    def to_end(self) -> "Run":
        limit = sum(job.output + 2 for job in self.jobs) + len(self.jobs) + max(job.arrives for job in self.jobs)
        longest = max(job.prompt + job.output for job in self.jobs)
        if min(self.limits.max_num_batched_tokens, self.limits.long_prefill_token_threshold or longest) < longest:
            limit += sum(job.prompt + job.output for job in self.jobs) * len(self.jobs)  # prompts in pieces
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
