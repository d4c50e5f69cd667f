"""Checks of the exercises of notebook 04a, and the scheduler that runs the reader's way to share out a step."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepengine.contracts.played import PAGE, Pages
from stepengine.contracts.report import Promise, Report, called, expect, run_promises, whole_number
from stepengine.core.plan import StepPlan
from stepengine.core.request import Request, SamplingParams, State, settle
from stepengine.core.seams import KVCache, Limits, Scheduler
from stepengine.errors import StepEngineError
from stepengine.trace import Trace, token_gaps

ShareOut = Callable[[Sequence[int], int], Sequence[int]]


class ShareScheduler:
    """A scheduler that leaves one question open: `share_out(due, budget)`, what each request runs in a step.

    due: for every request in the batch, in order of arrival, the tokens that it could run now: 1 for a
    decode, more for what is left of a prompt. The answer has as many entries, 0 for who has to wait.
    For requests with one sample each, and a pool that has room for all: nobody is preempted.
    """

    batching, chunks_prompts = "continuous", True  # noted in traces

    def __init__(self, limits: Limits, cache: KVCache, share_out: ShareOut) -> None:
        self.limits, self.cache, self.share_out = limits, cache, share_out
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.arrived: list[int] = []
        self.steps = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self.arrived.append(request.id)

    def plan(self) -> StepPlan:
        while self.waiting and len(self.running) < self.limits.max_num_seqs:
            self.running.append(self.waiting.pop(0))
            self.running[-1].state = State.RUNNING
        line = [request for request in self.running if request.due]
        shares = self.share_out([request.due for request in line], self.limits.max_num_batched_tokens)
        chunks = []
        for request, tokens in zip(line, shares, strict=True):
            grant = self.cache.grow(request, request.scheduled + tokens) if tokens else None
            if tokens and grant is None:
                raise StepEngineError(f"Request {request.id} finds no block; give this run a larger pool.")
            if grant is not None:
                chunks.append(request.schedule(grant.blocks, 0, tokens))
        arrived, self.arrived = tuple(self.arrived), []
        self.steps += 1
        return StepPlan(self.steps - 1, tuple(chunks), arrived)

    def update(self, plan: StepPlan, token_ids: list[int]) -> list[tuple[int, str]]:
        finished = []
        for chunk, token in zip(plan.chunks, token_ids, strict=True):
            request = next((r for r in self.running if r.id == chunk.request), None)
            if request is None or not request.accepts(chunk):
                continue
            reason = settle(request, chunk, token, self.cache.commit(request, chunk.end))
            if reason is not None:
                self.finish(request.id, reason)
                finished.append((request.id, reason))
        return finished

    def finish(self, request_id: int, reason: str) -> None:
        for line in (self.running, self.waiting):
            for request in [request for request in line if request.id == request_id]:
                line.remove(request)
                self.cache.release(request)
                request.state, request.finish_reason = State.FINISHED, reason

    def idle(self) -> bool:
        return not self.waiting and not self.running


def sharing(share_out: ShareOut) -> type[ShareScheduler]:
    """`ShareScheduler` with this answer, ready for `LLM(scheduler=...)`."""

    class Sharing(ShareScheduler):
        def __init__(self, limits: Limits, cache: KVCache) -> None:
            super().__init__(limits, cache, share_out)

    return Sharing


def _planned(make: Callable[[Limits, Any], Scheduler], budget: int, decodes: int, left: int) -> list[tuple[int, int]]:
    """(decode tokens, prompt tokens) of each step, as the scheduler plans them, to the end of a prompt.

    `decodes` requests decode when a prompt of `left` tokens arrives. One step where nothing is left, or where
    the prompt gets nothing.
    """
    length = left + 200
    limits = Limits(decodes + 1, budget, length, PAGE, 4 * (decodes + 1) * length)
    scheduler = make(limits, Pages(limits))
    params = SamplingParams(temperature=0.0, max_tokens=190, ignore_eos=True)

    def step() -> StepPlan:
        plan = scheduler.plan()
        ended = [chunk.end == len(requests[chunk.request].token_ids) for chunk in plan.chunks]
        scheduler.update(plan, [7 if end else -1 for end in ended])
        return plan

    requests = {number: Request(number, [1], params, length) for number in range(decodes + 1)}
    requests[decodes] = Request(decodes, [1] * max(left, 1), params, length)
    for number in range(decodes):
        scheduler.add(requests[number])
    if decodes:
        step()
    if left:
        scheduler.add(requests[decodes])
    mixes: list[tuple[int, int]] = []
    while not mixes or 0 < sum(prompt for _, prompt in mixes) < left:
        plan = step()
        prompt = sum(chunk.length for chunk in plan.chunks if chunk.request == decodes)
        mixes.append((plan.num_tokens - prompt, prompt))
    return mixes


def check_mix(mix: Callable[[int, int, int], tuple[int, int]]) -> Report:
    """Notebook 04a: `mix(budget, decodes, left)` -> (decode tokens, prompt tokens), against stage 4's own plans.

    budget: tokens a step, at least `decodes`; left: tokens of the prompt that have not run yet.
    """
    from stepengine.llm import LLM

    stage = LLM("tiny-random", stage="4a", max_model_len=16).stage.parts.scheduler

    def compare(*cases: tuple[int, int, int]) -> Callable[[], None]:
        def check() -> None:
            for budget, decodes, left in cases:
                for wanted in _planned(stage, budget, decodes, left):
                    call = f"mix({budget}, {decodes}, {left})"
                    got = called(call, mix, budget, decodes, left)
                    pair = isinstance(got, tuple | list) and len(got) == 2
                    expect(pair, f"{call}: got {got!r}; return two numbers: decode tokens, prompt tokens")
                    numbers = tuple(whole_number(part, call) for part in got)
                    expect(numbers == wanted, f"{call}: got {got!r}, the scheduler plans {wanted}")
                    left -= wanted[1]

        return check

    def many() -> None:
        rng = random.Random(8)
        for _ in range(40):
            decodes = rng.randint(0, 9)
            compare((max(1, decodes + rng.randint(0, 40)), decodes, rng.randint(0, 90)))()

    return run_promises(
        "mix",
        [
            Promise(
                "1000 tokens beside two decodes: a budget of 258 gives chunks of 256, 256, 256, 232",
                compare((258, 2, 1000)),
                "decodes first; the prompt gets what the budget has left, and no more than is left of it",
            ),
            Promise("a budget of 256 gives 254, 254, 254, 238", compare((256, 2, 1000)), "256 - 2 is not 256"),
            Promise("a short prompt runs whole", compare((258, 2, 40), (64, 3, 1)), "never more than `left`"),
            Promise("nothing left: decodes only", compare((258, 2, 0), (16, 5, 0)), "the prompt's part is 0"),
            Promise(
                "a budget that the decodes use up leaves 0 for the prompt",
                compare((2, 2, 30), (5, 5, 1)),
                "0, not a negative number, and not at least 1",
            ),
            Promise("no decodes: the prompt has the whole budget", compare((256, 0, 1000)), "256, 256, 256, 232"),
            Promise("any budget, any number of decodes", many, "which of the promises above does the example touch?"),
        ],
    )


def worst_gap(trace: Trace, requests: Sequence[int]) -> float:
    """P99 of the tokens that the engine ran from one token of these requests to the next."""
    gaps = [gap.tokens for gap in token_gaps(trace) if gap.request in requests]
    return float(np.percentile(gaps, 99)) if gaps else 0.0


def check_decode_last(share_out: ShareOut) -> Report:
    """Notebook 04a: `share_out(due, budget)` that serves prompts before decodes, by itself and in the engine."""
    from stepengine.llm import LLM

    cases = [([1, 1, 1000], 258), ([1, 1, 226], 258), ([1, 1], 258), ([40, 1, 30], 50), ([1, 9, 1, 9], 19), ([7], 3)]
    rng = random.Random(4)
    cases += [
        ([rng.choice((1, 1, rng.randint(2, 30))) for _ in range(rng.randint(1, 6))], rng.randint(1, 50))
        for _ in range(40)
    ]

    def answer(due: Sequence[int], budget: int) -> list[int]:
        """The reader's shares, as far as they are shares at all."""
        call, given = f"decode_last({list(due)}, {budget})", list(due)
        got = called(call, share_out, given, budget)
        expect(given == list(due), f"{call} changed the list `due`")
        listed = isinstance(got, list | tuple) and len(got) == len(due)
        expect(listed, f"{call}: got {got!r}; return a list with one number for each of the {len(due)} requests")
        return [whole_number(given, f"{call}, request {place}") for place, given in enumerate(got)]

    def each(holds: Callable[[list[int], int, list[int]], str]) -> Callable[[], None]:
        def check() -> None:
            for due, budget in cases:
                got = answer(due, budget)
                wrong = holds(due, budget, got)
                expect(not wrong, f"decode_last({due}, {budget}): got {got}; {wrong}")

        return check

    def in_the_engine(due: Sequence[int], budget: int) -> list[int]:
        """What the engine runs: it is asked for nothing that is not due."""
        got = answer(due, budget)
        wrong = possible(list(due), budget, got)
        expect(not wrong, f"decode_last({list(due)}, {budget}): got {got}; {wrong}")
        return got

    def possible(due: list[int], budget: int, got: list[int]) -> str:
        for place, (could, given) in enumerate(zip(due, got, strict=True)):
            if not 0 <= given <= could:
                return f"request {place} could run {could} tokens and is given {given}"
        return f"that is {sum(got)} tokens" if sum(got) > budget else ""

    def full(due: list[int], budget: int, got: list[int]) -> str:
        wanted = min(budget, sum(due))
        return f"{sum(got)} tokens run where {wanted} could" if sum(got) < wanted else ""

    def last(due: list[int], budget: int, got: list[int]) -> str:
        short = [place for place, tokens in enumerate(due) if tokens > 1 and got[place] < tokens]
        early = [place for place, tokens in enumerate(due) if tokens == 1 and got[place]]
        return f"request {early[0]} decodes while prompt {short[0]} still could run" if short and early else ""

    def in_turn(due: list[int], budget: int, got: list[int]) -> str:
        prompts = [(place, tokens) for place, tokens in enumerate(due) if tokens > 1]
        for (place, tokens), (later, _) in zip(prompts, prompts[1:], strict=False):
            if got[place] < tokens and got[later]:
                return f"prompt {later} is served while prompt {place}, which came earlier, still could run"
        return ""

    prompts = [[5, 9, 2, 7, 3], [8, 1, 4], [1 + at % 50 for at in range(60)]]
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in (14, 16, 3)]

    def play(stage: str, **part: Any) -> Any:
        if stage != "0":
            part |= {"max_num_batched_tokens": 18, "block_size": 8, "num_blocks": 32}
        llm = LLM("tiny-random", stage=stage, max_num_seqs=4, max_model_len=64, trace=True, **part)
        ids = [llm.engine.add_request(*pair) for pair in zip(prompts[:2], params[:2], strict=True)]
        for _ in range(3):
            llm.engine.step()
        ids.append(llm.engine.add_request(prompts[2], params[2]))
        for _ in range(120):
            if not llm.engine.has_unfinished():
                break
            llm.engine.step()
        assert llm.trace is not None
        expect(not llm.engine.has_unfinished(), "not all of three requests have ended after 120 steps")
        return llm.trace.output_ids(), worst_gap(llm.trace, ids[:2])

    def tokens() -> None:
        wanted, _ = play("0")
        got, _ = play("4a", scheduler=sharing(in_the_engine))
        for number in wanted:
            expect(got[number] == wanted[number], f"request {number}: {got[number]}, stage 0 gives {wanted[number]}")

    def worse() -> None:
        _, ours = play("4a")
        _, theirs = play("4a", scheduler=sharing(in_the_engine))
        said = f"two decodes beside a prompt of 60, budget 18: 99 of 100 gaps have at most {theirs:.0f} tokens, "
        said += f"with decodes first {ours:.0f}"
        expect(theirs > 1.5 * ours, said)

    return run_promises(
        "decode_last",
        [
            Promise("nobody runs more than is due, nor all more than the budget", each(possible), "take min() twice"),
            Promise("no token of the budget is left unused", each(full), "what prompts leave goes to the decodes"),
            Promise("a decode waits as long as a prompt could run", each(last), "due == 1 is a decode: serve it last"),
            Promise("prompts are served in order of arrival", each(in_turn), "from left to right"),
            Promise("in the engine: stage 0's tokens", tokens, "the order of work must not change the work"),
            Promise(
                "in the engine: the longest gaps between two tokens are far longer than with decodes first",
                worse,
                "are decodes really served last?",
            ),
        ],
    )
