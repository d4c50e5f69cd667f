"""Continuous batching over blocks: requests start on what is free now, and give way when nothing is left."""

from bisect import insort
from collections.abc import Callable, Sequence

from stepengine.core.plan import Chunk, Copy, StepPlan, Swap
from stepengine.core.request import Request, State, settle
from stepengine.core.seams import Grant, Limits, PagingCache
from stepengine.errors import StepEngineError

WATERMARK = 0.01  # of the pool is left free when a request starts, or it would soon push another one out


def place_in_line(request: Request) -> tuple[int, int]:
    """Priority first, then arrival."""
    return request.priority, request.id


def youngest(candidates: Sequence[Request]) -> Request:
    """Who gives way: the youngest of the lowest priority, which has the least to lose and no right to go first."""
    return max(candidates, key=place_in_line)


class PagedScheduler:
    """Admits while blocks are free and preempts when they are not (Kwon et al. 2023, section 4.5).

    One queue in order of (priority, arrival) holds those that are new, preempted or swapped out; its
    head is never overtaken, so a preempted request is back before newer ones of its priority. Whole
    prompts run alone, before decodes. Decodes take their blocks in the same order, and a row that
    finds none lets `pick_victim(candidates)` choose among the rows whose turn has not come, its own
    (the first) included. `limits.preemption` says what becomes of the victim's K/V.
    """

    batching = "continuous"  # noted in traces

    def __init__(
        self, limits: Limits, cache: PagingCache, pick_victim: Callable[[Sequence[Request]], Request] = youngest
    ) -> None:
        self.limits = limits
        self.cache = cache
        self.pick_victim = pick_victim
        self.kept_back = max(1, int(WATERMARK * limits.num_blocks)) * limits.block_size  # tokens
        self.waiting: list[Request] = []
        self.running: dict[int, Request] = {}
        self.arrived: list[int] = []
        self.steps = 0

    def add(self, request: Request) -> None:
        insort(self.waiting, request, key=place_in_line)
        self.arrived.append(request.id)

    def fork(self, parent: Request, child: Request) -> None:
        if parent.state is not State.RUNNING or len(self.running) >= self.limits.max_num_seqs:
            self.add(child)
            return
        self.cache.fork(parent, child)
        child.scheduled, child.computed = parent.scheduled, parent.computed
        self._run(child)

    def plan(self) -> StepPlan:
        moves = _Moves()
        chunks, blocked = self._admit(moves)
        if not chunks:
            chunks = self._decode(moves)
        arrived, self.arrived = tuple(self.arrived), []
        plan = StepPlan(
            self.steps,
            tuple(chunks),
            arrived,
            tuple(moves.preempted),
            tuple(moves.swapped_out),
            tuple(moves.swapped_in),
            tuple(moves.copies),
            tuple(moves.evicted),
            blocked,
        )
        self.steps += 1
        return plan

    def _admit(self, moves: "_Moves") -> tuple[list[Chunk], str]:
        """Start, in order, what places, blocks and budget allow; the chunks, and what stopped it."""
        chunks: list[Chunk] = []
        budget, places = self.limits.max_num_batched_tokens, self.limits.max_num_seqs
        for request in list(self.waiting):
            if len(self.running) >= places:
                return chunks, f"all {self.limits.max_num_seqs} places are taken"
            if self._prompt_runs(request):  # the next step finds it cached; until then its place is kept
                places -= 1
                continue
            if request.state is State.SWAPPED:
                blocked = self._no_room(request.num_tokens)
                swap = None if blocked else self.cache.swap_in(request)
                if swap is None:
                    return chunks, blocked or self._needs(request.num_tokens)
                moves.swapped_in.append(swap)
                self._start(request)
                continue
            cached = self.cache.match(request)
            needed = request.num_tokens - min(cached, request.num_tokens - 1)
            if needed > budget:
                return chunks, f"its {needed} tokens do not fit in the {budget} left of this step"
            if blocked := self._no_room(needed):
                return chunks, blocked
            request.keep(cached)  # tells the cache that what it found is wanted
            grant = self.cache.grow(request, request.num_tokens)
            if grant is None:
                request.keep(0)
                return chunks, self._needs(needed)
            self._start(request)
            chunks.append(moves.schedule(request, grant, cached))
            budget -= needed
        return chunks, ""

    def _decode(self, moves: "_Moves") -> list[Chunk]:
        """One more token for every running request, as far as blocks go round."""
        chunks: list[Chunk] = []
        line = sorted((request for request in self.running.values() if request.due), key=place_in_line)
        while line:
            request = line[0]
            grant = self.cache.grow(request, request.num_tokens)
            if grant is not None:
                line.pop(0)
                chunks.append(moves.schedule(request, grant))
            elif moves.swapped_in:  # what has just come back is not sent away in the same step
                line.pop(0)
            else:
                victim = self.pick_victim(tuple(line))
                if not any(victim is candidate for candidate in line):
                    raise StepEngineError(
                        f"pick_victim answered {getattr(victim, 'id', victim)!r}; it must return one of the requests "
                        f"that it was given, here {[candidate.id for candidate in line]}."
                    )
                line.remove(victim)
                self._preempt(victim, moves)
        return chunks

    def _preempt(self, victim: Request, moves: "_Moves") -> None:
        del self.running[victim.id]
        kept = victim.computed
        swap = self.cache.swap_out(victim) if self.limits.preemption == "swap" else None
        if swap is not None:
            victim.give_way(State.SWAPPED, kept)
            moves.swapped_out.append(swap)
        else:
            self.cache.release(victim)
            victim.give_way(State.WAITING)
            moves.preempted.append(victim.id)
        insort(self.waiting, victim, key=place_in_line)

    def _prompt_runs(self, request: Request) -> bool:
        """Whether another sample of the same prompt is just running it."""
        prompt, mates = len(request.prompt_ids), [r for r in self.running.values() if r.group == request.group]
        return bool(mates) and all(mate.computed < prompt for mate in mates)

    def _no_room(self, tokens: int) -> str:
        """Why a request should not start on so many tokens; "" if it may. Alone it always may."""
        if self.running and self.cache.free_tokens < tokens + self.kept_back:
            return self._needs(tokens)
        return ""

    def _needs(self, tokens: int) -> str:
        size, free = self.limits.block_size, self.cache.free_tokens // self.limits.block_size
        needed, kept = -(-tokens // size), self.kept_back // size
        beside = "" if needed > free else f" beside the {kept} kept back for those that run"
        return (
            f"it needs {needed} block{'s' if needed != 1 else ''}{beside}, {free} {'is' if free == 1 else 'are'} free"
        )

    def _start(self, request: Request) -> None:
        self.waiting.remove(request)
        self._run(request)

    def _run(self, request: Request) -> None:
        self.running[request.id] = request
        request.state = State.RUNNING

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


class _Moves:
    """What a plan does to blocks before its tokens run."""

    def __init__(self) -> None:
        self.preempted: list[int] = []
        self.swapped_out: list[Swap] = []
        self.swapped_in: list[Swap] = []
        self.copies: list[Copy] = []
        self.evicted: list[int] = []

    def schedule(self, request: Request, grant: Grant, cached: int = 0) -> Chunk:
        """A chunk whose copies the plan has, and the table already shows."""
        chunk = request.schedule(grant.blocks, cached)
        for copy in grant.copies:
            request.blocks[copy.entry] = copy.destination
        self.copies += grant.copies
        self.evicted += grant.evicted
        return chunk
