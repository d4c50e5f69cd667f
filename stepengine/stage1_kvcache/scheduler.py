"""Continuous (iteration-level) batching: a place that falls free is taken in the very next step."""

from bisect import insort

from stepengine.core.plan import Chunk, StepPlan
from stepengine.core.request import Request, State, settle
from stepengine.core.seams import KVCache, Limits


class ContinuousScheduler:
    """Admits and retires requests between any two steps (Orca, Yu et al. 2022, section 3).

    The queue is in order of (priority, arrival). Whole prompts run alone, before decodes, as many a
    step as the token budget holds; otherwise every running request gets its next token.
    """

    batching = "continuous"  # noted in traces

    def __init__(self, limits: Limits, cache: KVCache) -> None:
        self.limits = limits
        self.cache = cache
        self.waiting: list[Request] = []
        self.running: dict[int, Request] = {}
        self.arrived: list[int] = []
        self.steps = 0

    def add(self, request: Request) -> None:
        insort(self.waiting, request, key=lambda r: (r.priority, r.id))
        self.arrived.append(request.id)

    def plan(self) -> StepPlan:
        chunks, blocked = self._admit()
        if not chunks:
            for request in self.running.values():
                grant = self.cache.grow(request, request.num_tokens)
                if grant is None:
                    blocked = f"request {request.id} needs room for {request.num_tokens} tokens, none is free"
                    continue
                chunks.append(request.schedule(grant.blocks))
        arrived, self.arrived = tuple(self.arrived), []
        plan = StepPlan(self.steps, tuple(chunks), arrived, blocked=blocked)
        self.steps += 1
        return plan

    def _admit(self) -> tuple[list[Chunk], str]:
        """Start waiting requests while places, K/V and budget last; their prompts, and what stopped it."""
        chunks: list[Chunk] = []
        budget = self.limits.max_num_batched_tokens
        while self.waiting:
            request = self.waiting[0]
            if len(self.running) >= self.limits.max_num_seqs:
                return chunks, f"all {self.limits.max_num_seqs} places are taken"
            if request.num_tokens > budget:
                return chunks, f"its {request.num_tokens} tokens do not fit in the {budget} left of this step"
            grant = self.cache.grow(request, request.num_tokens)
            if grant is None:
                return chunks, f"{request.num_tokens} tokens need room, {self.cache.free_tokens} are free"
            self.waiting.pop(0)
            self.running[request.id] = request
            request.state = State.RUNNING
            chunks.append(request.schedule(grant.blocks))
            budget -= chunks[-1].length
        return chunks, ""

    def update(self, plan: StepPlan, token_ids: list[int]) -> list[tuple[int, str]]:
        finished: list[tuple[int, str]] = []
        for chunk, token in zip(plan.chunks, token_ids, strict=True):
            request = self.running.get(chunk.request)
            if request is None or not request.accepts(chunk):
                continue
            reason = settle(request, chunk, token, self.cache.commit(request, chunk.end))
            if reason is not None:
                self.finish(request.id, reason)
                finished.append((request.id, reason))
        return finished

    def finish(self, request_id: int, reason: str) -> None:
        request = self.running.pop(request_id, None)
        if request is None:
            request = next((r for r in self.waiting if r.id == request_id), None)
            if request is None:
                return
            self.waiting.remove(request)
        self.cache.release(request)
        request.state, request.finish_reason = State.FINISHED, reason

    def idle(self) -> bool:
        return not self.waiting and not self.running
