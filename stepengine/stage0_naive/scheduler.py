"""Static batching: take a batch, run it until its last request ends, take the next."""

from bisect import insort

from stepengine.core.plan import Chunk, StepPlan
from stepengine.core.request import Request, State, settle
from stepengine.core.seams import KVCache, Limits


class StaticScheduler:
    """Requests join only when the batch before them has ended, so a short one's place stays idle.

    The queue is in order of (priority, arrival). A batch begins with its prompts, as many a step as the
    token budget holds; then all of it runs in every step.
    """

    batching = "static"  # noted in traces

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
        blocked = ""
        if not self.running:
            batch, self.waiting = self.waiting[: self.limits.max_num_seqs], self.waiting[self.limits.max_num_seqs :]
            for request in batch:
                request.state = State.RUNNING
                self.running[request.id] = request
        elif self.waiting:
            blocked = f"{len(self.running)} of the batch still run, and another is taken when all have ended"
        chunks: list[Chunk] = []
        budget = self.limits.max_num_batched_tokens
        begun = [request for request in self.running.values() if request.num_outputs]
        fresh = [request for request in self.running.values() if not request.num_outputs]
        for request in fresh or begun:
            if fresh and request.num_tokens > budget:
                break
            grant = self.cache.grow(request, request.num_tokens)
            if grant is None:
                blocked = f"request {request.id} needs room for {request.num_tokens} tokens, none is free"
                continue
            chunks.append(request.schedule(grant.blocks))
            budget -= chunks[-1].length
        arrived, self.arrived = tuple(self.arrived), []
        plan = StepPlan(self.steps, tuple(chunks), arrived, blocked=blocked)
        self.steps += 1
        return plan

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
