"""Chunked prefill: every step has a budget of tokens, decodes take theirs first, prompts fill up what is left."""

from bisect import insort
from collections.abc import Callable, Sequence

from stepengine.core.plan import Chunk, Copy, StepPlan, Swap
from stepengine.core.request import Request, State, settle
from stepengine.core.seams import Grant, Limits, PagingCache
from stepengine.errors import StepEngineError
from stepengine.stage2_paged.scheduler import WATERMARK, place_in_line, youngest


class BudgetScheduler:
    """Prompts run in pieces beside decodes, in one mixed step (Sarathi-Serve, Agrawal et al. 2024).

    A step runs at most `limits.max_num_batched_tokens` tokens: one for each decoding request, then
    running prompts go on, then waiting ones start; a piece is as long as the budget, or
    `limits.long_prefill_token_threshold`, leaves room for. So no prompt, however long, makes a decode
    wait for more than one step of that size.

    One queue in order of (priority, arrival) holds those that are new, preempted or swapped out; its
    head is never overtaken. Blocks are handed out in the same order, whoever decodes and whoever is
    in mid-prompt, and a request that finds none lets `pick_victim(candidates)` choose among those
    whose turn has not come, its own (the first) included. A step in which somebody gave way starts
    nobody.
    """

    batching = "continuous"  # noted in traces
    chunks_prompts = True  # so that a step may be smaller than a prompt

    def __init__(
        self, limits: Limits, cache: PagingCache, pick_victim: Callable[[Sequence[Request]], Request] = youngest
    ) -> None:
        self.limits = limits
        self.cache = cache
        self.pick_victim = pick_victim
        self.longest_chunk = limits.long_prefill_token_threshold or limits.max_num_batched_tokens
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
        chunks = self._go_on(moves)
        started, blocked = self._admit(moves, self.limits.max_num_batched_tokens - sum(c.length for c in chunks))
        arrived, self.arrived = tuple(self.arrived), []
        plan = StepPlan(
            self.steps,
            (*chunks, *started),
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

    def _go_on(self, moves: "_Moves") -> list[Chunk]:
        """One token for every decoding request, then what is left for the prompts that have begun."""
        decodes: list[Chunk] = []
        prompts: list[Chunk] = []
        line = sorted((request for request in self.running.values() if request.due), key=place_in_line)
        left = self.limits.max_num_batched_tokens
        while line and left:
            request = line[0]
            due = request.due
            reserved = sum(other.due == 1 for other in line[1:]) if due > 1 else 0
            most = min(due, self.longest_chunk, left - reserved)
            grant = self.cache.grow(request, request.scheduled + most) if most > 0 else None
            if grant is not None:
                chunk = moves.schedule(request, grant, most)
                left -= chunk.length
                (decodes if due == 1 else prompts).append(chunk)
            elif most > 0:
                victim = self._choose(line)
                line.remove(victim)
                self._preempt(victim, moves)
                continue
            line.pop(0)
        return decodes + prompts

    def _choose(self, line: list[Request]) -> Request:
        victim = self.pick_victim(tuple(line))
        if not any(victim is candidate for candidate in line):
            raise StepEngineError(
                f"pick_victim answered {getattr(victim, 'id', victim)!r}; it must return one of the requests "
                f"that it was given, here {[candidate.id for candidate in line]}."
            )
        return victim

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

    def _admit(self, moves: "_Moves", left: int) -> tuple[list[Chunk], str]:
        """Start, in order, what places, blocks and the `left` tokens allow; the chunks, and what stopped it."""
        chunks: list[Chunk] = []
        places = self.limits.max_num_seqs
        copying = {self.running[copy.request].group for copy in moves.copies if copy.request in self.running}
        owed = sum(request.due for request in self.running.values() if request.due > 1)  # tokens without blocks yet
        for request in list(self.waiting):
            if moves.preempted or moves.swapped_out:
                return chunks, "there are too few blocks for those that run"
            if len(self.running) >= places:
                return chunks, f"all {self.limits.max_num_seqs} places are taken"
            if self._prompt_runs(request):  # later it finds the prompt cached; until then its place is kept
                places -= 1
                continue
            if request.group in copying:  # a block that is filled in this step cannot be copied from in it
                return chunks, "another sample of its prompt is just copying a block"
            if not left:
                return chunks, f"the {self.limits.max_num_batched_tokens} tokens of this step are used up"
            cached, needed = 0, request.num_tokens
            if request.state is State.WAITING:
                cached = self.cache.match(request)
                needed -= min(cached, request.num_tokens - 1)
            if blocked := self._no_room(needed, owed):
                return chunks, blocked
            chunk = self._come_back(request, moves, left) if request.state is State.SWAPPED else None
            if request.state is State.WAITING:
                chunk = self._begin(request, cached, moves, left)
            if request.state is not State.RUNNING:
                return chunks, self._needs(needed)
            if chunk is not None:
                chunks.append(chunk)
                left -= chunk.length
            owed += request.due
        return chunks, ""

    def _begin(self, request: Request, cached: int, moves: "_Moves", left: int) -> Chunk | None:
        """The first chunk of a request, after `cached` tokens that were found; None (and nothing changed) when full."""
        request.keep(cached)  # tells the cache that what it found is wanted
        most = min(request.due, self.longest_chunk, left)
        grant = self.cache.grow(request, request.scheduled + most)
        if grant is None:
            request.keep(0)
            return None
        self._start(request)
        return moves.schedule(request, grant, most, cached)

    def _come_back(self, request: Request, moves: "_Moves", left: int) -> Chunk | None:
        """Its blocks come from the host, and it goes on at once if there is also room for what it runs next."""
        swap = self.cache.swap_in(request)
        if swap is None:
            return None
        moves.swapped_in.append(swap)
        self._start(request)
        most = min(request.due, self.longest_chunk, left)
        grant = self.cache.grow(request, request.scheduled + most)
        return moves.schedule(request, grant, most) if grant is not None else None

    def _prompt_runs(self, request: Request) -> bool:
        """Whether another sample of the same prompt is just running it."""
        prompt, mates = len(request.prompt_ids), [r for r in self.running.values() if r.group == request.group]
        return bool(mates) and all(mate.computed < prompt for mate in mates)

    def _no_room(self, tokens: int, owed: int) -> str:
        """Why a request should not start on so many tokens; "" if it may. Alone it always may."""
        if self.running and self.cache.free_tokens < tokens + owed + self.kept_back:
            return self._needs(tokens, owed)
        return ""

    def _needs(self, tokens: int, owed: int = 0) -> str:
        size, free = self.limits.block_size, self.cache.free_tokens // self.limits.block_size
        needed, kept = -(-tokens // size), (owed + self.kept_back) // size
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

    def schedule(self, request: Request, grant: Grant, most: int, cached: int = 0) -> Chunk:
        """A chunk of at most `most` tokens, whose copies the plan has and the table already shows."""
        chunk = request.schedule(grant.blocks, cached, most)
        for copy in grant.copies:
            request.blocks[copy.entry] = copy.destination
        self.copies += grant.copies
        self.evicted += grant.evicted
        return chunk
