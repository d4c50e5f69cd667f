"""The state of a run at any of its steps, rebuilt from plans and results alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from stepengine.core.plan import Chunk, Copy, StepRecord, Swap
from stepengine.errors import TraceError
from stepengine.trace.record import Trace

NOT_ARRIVED, WAITING, RUNNING, SWAPPED, FINISHED = "not arrived", "waiting", "running", "swapped", "finished"
PREFIX_STAGES = ("4", "4b", "5")
CHECKPOINT_EVERY = 64  # steps between saved states: memory against the cost of a jump


@dataclass(frozen=True)
class Snapshot:
    """One step of a run. Dicts are keyed by request id, but for the two keyed by block id."""

    index: int  # position in trace.steps
    record: StepRecord
    state: dict[int, str]  # "not arrived" | "waiting" | "running" | "swapped" | "finished"
    reason: dict[int, str]  # of the finished ones: "stop" | "length" | "abort"
    table: dict[int, tuple[int, ...]]  # block ids in logical order; () where a request holds none
    computed: dict[int, int]  # tokens whose K/V survive
    outputs: dict[int, tuple[int, ...]]  # token ids sampled so far
    refs: dict[int, int]  # block id -> references, blocks in use only
    block_tokens: dict[int, int]  # block id -> tokens held, blocks in use only
    new_blocks: frozenset[int]  # granted, swapped in or copied to in this step
    hit_blocks: frozenset[int]  # taken over with their contents in this step
    hosted: dict[int, tuple[int, ...]]  # host slots of the swapped ones, in logical order
    holds: dict[int, int]  # block id -> which of `Replay.beginnings` it can be found by, held or not
    kept_blocks: frozenset[int]  # those of `holds` that nobody has a reference on
    evicted_blocks: frozenset[int]  # kept until this step, whose contents were given up for others

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """What the step ran."""
        return self.record.plan.chunks


@dataclass
class _State:
    state: dict[int, str]
    reason: dict[int, str] = field(default_factory=dict)
    table: dict[int, tuple[int, ...]] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)
    outputs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    hosted: dict[int, tuple[int, ...]] = field(default_factory=dict)  # host slots of the swapped ones
    refs: dict[int, int] = field(default_factory=dict)
    new: frozenset[int] = frozenset()
    hits: frozenset[int] = frozenset()
    evicted: frozenset[int] = frozenset()
    just_freed: frozenset[int] = frozenset()  # by requests that ended in the last step
    holds: dict[int, int] = field(default_factory=dict)  # sealed block -> beginning
    found: dict[int, tuple[int, ...]] = field(default_factory=dict)  # beginning -> its blocks
    sealed: dict[int, int] = field(default_factory=dict)  # request -> blocks of its table that are sealed

    def copy(self) -> "_State":
        """Independent of the original: the dicts hold only immutable values."""
        return _State(
            dict(self.state),
            dict(self.reason),
            dict(self.table),
            dict(self.computed),
            dict(self.outputs),
            dict(self.hosted),
            dict(self.refs),
            self.new,
            self.hits,
            self.evicted,
            self.just_freed,
            dict(self.holds),
            dict(self.found),
            dict(self.sealed),
        )


class Replay:
    """Steps through a trace. `at(t)` is step t with its work done; `after(t)` has also let go what ended in it.

    Stepping forward costs one step; a jump costs at most `CHECKPOINT_EVERY` steps once that part has been seen.
    Inconsistencies (a block used that is not free or not held, a table entry out of range, a token skipped) raise
    `TraceError` naming step and request.

    Where prefixes are cached (`meta["prefix_caching"]`, or by default in stages 4 and 4b) it is known which blocks
    can be found again, and by what: `beginnings[i]` is (parent, tokens of one block), where the parent is another
    beginning, or -1 - the number of a cache namespace. Steps are taken to be planned one after the other; where one
    was planned ahead of the one before, a block may be kept or evicted here a step sooner or later than it was.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.num_blocks = int(trace.meta.get("num_blocks") or 0)
        self.block_size = int(trace.meta.get("block_size") or trace.meta.get("max_model_len") or 0)
        named = trace.meta.get("prefix_caching")
        self.prefix_caching = bool(named) if named is not None else str(trace.meta.get("stage")) in PREFIX_STAGES
        self.beginnings: list[tuple[int, tuple[int, ...]]] = []
        self._numbers: dict[tuple[int, tuple[int, ...]], int] = {}
        self._namespaces: dict[str, int] = {}
        # `_checkpoints[t]` is the state before step t
        start = _State({r: NOT_ARRIVED for r in trace.requests})
        self._checkpoints: dict[int, _State] = {0: start}
        self._position, self._current = 0, start.copy()

    def __len__(self) -> int:
        return len(self.trace.steps)

    def __iter__(self) -> Iterator[Snapshot]:
        t = 0
        while t < len(self):  # a trace may still grow
            yield self.at(t)
            t += 1

    def at(self, t: int) -> Snapshot:
        """Step t (negative counts from the end): plan applied, tokens sampled, finished requests still holding."""
        t = self._seek(t)
        state = self._current.copy()
        self._work(state, t)
        return self._snapshot(state, t)

    def after(self, t: int) -> Snapshot:
        """Step t once finished requests have given their blocks back: the engine's state between two steps."""
        t = self._seek(t)
        state = self._current.copy()
        self._work(state, t)
        self._settle(state, t)
        return self._snapshot(state, t)

    def _seek(self, t: int) -> int:
        """Bring the current state to just before step t."""
        steps = len(self)
        if not -steps <= t < steps:
            raise TraceError(f"Step {t} is not in this trace, which has {steps} steps (0 to {steps - 1}).")
        t %= steps
        nearest = max(c for c in self._checkpoints if c <= t)
        if self._position > t or self._position < nearest:
            self._position, self._current = nearest, self._checkpoints[nearest].copy()
        while self._position < t:
            try:
                self._work(self._current, self._position)
                self._settle(self._current, self._position)
            except TraceError:  # leave nothing half applied behind
                self._position, self._current = 0, self._checkpoints[0].copy()
                raise
            self._position += 1
            if self._position % CHECKPOINT_EVERY == 0:
                self._checkpoints.setdefault(self._position, self._current.copy())
        return t

    def _work(self, s: _State, t: int) -> None:
        """Everything of step t up to and including its sampled tokens."""
        record = self.trace.steps[t]
        plan = record.plan
        if len(record.token_ids) != len(plan.chunks):
            raise TraceError(
                f"Step {plan.step} has {len(plan.chunks)} chunks but {len(record.token_ids)} token ids; "
                "one per chunk is needed (-1 for none)."
            )
        s.new = s.hits = s.evicted = frozenset()
        for request in plan.arrived:
            if self._state_of(s, t, request) == NOT_ARRIVED:
                s.state[request] = WAITING
        for parent, child in record.forked:
            self._fork(s, t, parent, child, waits=child in plan.arrived)
        for request, reason in record.aborted:
            if self._state_of(s, t, request) != FINISHED:
                self._end(s, t, request, reason)
        for request in plan.preempted:
            self._expect(s, t, request, RUNNING, "is preempted")
            self._drop(s, request)
            s.state[request] = WAITING
        for swap in plan.swapped_out:
            self._swap_out(s, t, swap)
        for swap in plan.swapped_in:
            self._swap_in(s, t, swap)
        ran = [
            (chunk, token)
            for chunk, token in zip(plan.chunks, record.token_ids, strict=True)
            # one planned before its request was known to have ended is ignored by the engine too
            if token >= 0 or self._state_of(s, t, chunk.request) != FINISHED
        ]
        # Hits, copies, new blocks: a copy's source may be a hit of this step, a new block one that a copy let go.
        hits = [self._check(s, t, chunk, token, plan.copies) for chunk, token in ran]
        for (chunk, _), shared in zip(ran, hits, strict=True):
            self._grant(s, t, chunk.request, chunk.blocks[:shared], shared=True)
        for copy in plan.copies:
            self._copy(s, t, copy)
        for (chunk, _), shared in zip(ran, hits, strict=True):
            self._grant(s, t, chunk.request, chunk.blocks[shared:])
        for chunk, token in ran:
            self._run(s, t, chunk, token)

    def _swap_out(self, s: _State, t: int, swap: Swap) -> None:
        request = swap.request
        self._expect(s, t, request, RUNNING, "is swapped out")
        table = s.table.get(request, ())
        if tuple(block for block, _ in swap.pairs) != table:
            raise self._error(t, request, f"swaps out blocks other than its table {table}")
        slots = tuple(slot for _, slot in swap.pairs)
        taken = {slot for others in s.hosted.values() for slot in others}
        if len(set(slots)) < len(slots) or taken & set(slots):
            raise self._error(t, request, f"is swapped out to host slots {slots}, which are not all free")
        computed = s.computed.get(request, 0)
        self._drop(s, request)
        s.computed[request], s.hosted[request], s.state[request] = computed, slots, SWAPPED

    def _swap_in(self, s: _State, t: int, swap: Swap) -> None:
        request = swap.request
        self._expect(s, t, request, SWAPPED, "is swapped in")
        if tuple(slot for _, slot in swap.pairs) != s.hosted.pop(request):
            raise self._error(t, request, "swaps in other host slots than it was swapped out to")
        self._grant(s, t, request, tuple(block for block, _ in swap.pairs))
        s.state[request] = RUNNING

    def _copy(self, s: _State, t: int, copy: Copy) -> None:
        table = s.table.get(copy.request, ())
        if not 0 <= copy.entry < len(table) or table[copy.entry] != copy.source:
            raise self._error(
                t, copy.request, f"copies block {copy.source}, which is not entry {copy.entry} of its table"
            )
        self._take(s, t, copy.request, copy.destination)
        self._release(s, copy.source)
        s.table[copy.request] = (*table[: copy.entry], copy.destination, *table[copy.entry + 1 :])

    def _check(self, s: _State, t: int, chunk: Chunk, token: int, copies: tuple[Copy, ...]) -> int:
        """Whether the request can run these tokens; how many of the chunk's blocks are shared with others."""
        request = chunk.request
        if self._state_of(s, t, request) not in (WAITING, RUNNING):
            raise self._error(t, request, f"runs although it is {s.state[request]}")
        computed = s.computed.get(request, 0)
        total = len(self.trace.requests[request].prompt_ids) + len(s.outputs.get(request, ()))
        ahead = self._ran_ahead(s, chunk, token)
        if chunk.length < 1 or chunk.start < 0 or chunk.end > total + ahead:
            raise self._error(t, request, f"runs tokens [{chunk.start}, {chunk.end}) of the {total} that it has")
        if not ahead and chunk.start > computed + chunk.cached:
            raise self._error(
                t, request, f"starts at token {chunk.start} although only {computed + chunk.cached} have K/V"
            )
        if not self.block_size:
            return 0
        held = len(s.table.get(request, ()))
        copied = [copy.entry + 1 - held for copy in copies if copy.request == request]
        return min(max(-(-chunk.cached // self.block_size), *copied, 0), len(chunk.blocks))

    def _ran_ahead(self, s: _State, chunk: Chunk, token: int) -> bool:
        """Whether the step was launched on a token that the step before it then failed to give."""
        prompt = self.trace.requests[chunk.request].prompt_ids
        return token < 0 and chunk.end == len(prompt) + len(s.outputs.get(chunk.request, ())) + 1

    def _run(self, s: _State, t: int, chunk: Chunk, token: int) -> None:
        request = chunk.request
        s.state[request] = RUNNING
        if self.num_blocks:
            room = len(s.table.get(request, ())) * self.block_size
            if chunk.end > room:
                raise self._error(t, request, f"writes token {chunk.end - 1} but its blocks hold {room}")
            if not self._ran_ahead(s, chunk, token):
                s.computed[request] = chunk.end
            if self.prefix_caching and self._is_booked(s, t, chunk, token):
                self._seal(s, request, chunk.end)
        if token >= 0:
            s.outputs[request] = (*s.outputs.get(request, ()), token)

    def _is_booked(self, s: _State, t: int, chunk: Chunk, token: int) -> bool:
        """Whether the engine took the chunk's result: not after a failure, or if the request gave way meanwhile."""
        total = len(self.trace.requests[chunk.request].prompt_ids) + len(s.outputs.get(chunk.request, ()))
        if token >= 0 or chunk.end == total:
            return token >= 0
        if t + 1 == len(self) or self.trace.steps[t + 1].t_plan >= self.trace.steps[t].t_done:
            return True
        ahead = self.trace.steps[t + 1].plan
        return chunk.request not in (*ahead.preempted, *(swap.request for swap in ahead.swapped_out))

    def _seal(self, s: _State, request: int, upto: int) -> None:
        """Full blocks of the first `upto` tokens are found again from now on; equal ones all while they are held."""
        size, table, first = self.block_size, s.table[request], s.sealed.get(request, 0)
        if upto // size <= first:
            return
        info = self.trace.requests[request]
        tokens = (*info.prompt_ids, *s.outputs.get(request, ()))
        space = self._namespaces.setdefault(info.cache_salt, len(self._namespaces))
        parent = s.holds[table[first - 1]] if first else -1 - space
        for at in range(first, upto // size):
            block, beginning = table[at], (parent, tokens[at * size : (at + 1) * size])
            if beginning not in self._numbers:
                self._numbers[beginning] = len(self.beginnings)
                self.beginnings.append(beginning)
            parent = self._numbers[beginning]
            if block not in s.holds:
                for other in s.found.get(parent, ()):
                    if not s.refs.get(other):
                        self._forget(s, other)
                s.holds[block] = parent
                s.found[parent] = (*s.found.get(parent, ()), block)
        s.sealed[request] = upto // size

    @staticmethod
    def _forget(s: _State, block: int) -> None:
        beginning = s.holds.pop(block)
        s.found[beginning] = tuple(other for other in s.found[beginning] if other != block)
        if not s.found[beginning]:
            del s.found[beginning]

    def _settle(self, s: _State, t: int) -> None:
        finished = self.trace.steps[t].finished
        s.just_freed = frozenset(block for request, _ in finished for block in s.table.get(request, ()))
        for request, reason in finished:
            if s.state.get(request) == FINISHED:
                raise self._error(t, request, "finishes although it has ended before")
            self._end(s, t, request, reason)

    def _end(self, s: _State, t: int, request: int, reason: str) -> None:
        self._state_of(s, t, request)
        self._drop(s, request)
        s.hosted.pop(request, None)
        s.state[request], s.reason[request] = FINISHED, reason

    def _fork(self, s: _State, t: int, parent: int, child: int, waits: bool) -> None:
        """The child goes on from where the parent is; one that has to wait takes over the outputs only."""
        self._expect(s, t, child, WAITING if waits else NOT_ARRIVED, f"is forked from request {parent}")
        state = self._state_of(s, t, parent)
        s.outputs[child] = s.outputs.get(parent, ())
        if waits:
            return
        if state not in (WAITING, RUNNING):
            raise self._error(t, child, f"is forked from request {parent}, which is {state}")
        table = s.table.get(parent, ())
        for block in table:
            s.refs[block] += 1
        s.table[child], s.computed[child], s.state[child] = table, s.computed.get(parent, 0), state
        s.sealed[child] = s.sealed.get(parent, 0)

    def _grant(self, s: _State, t: int, request: int, blocks: tuple[int, ...], shared: bool = False) -> None:
        """Append to the request's table."""
        if not blocks:
            return
        for block in blocks:
            self._take(s, t, request, block, shared)
        s.table[request] = (*s.table.get(request, ()), *blocks)

    def _take(self, s: _State, t: int, request: int, block: int, shared: bool = False) -> None:
        if not 1 <= block <= self.num_blocks:
            raise self._error(t, request, f"is given block {block}, outside 1 to {self.num_blocks}")
        if s.refs.get(block) and not shared:
            raise self._error(t, request, f"is given block {block}, which is not free")
        there = s.refs.get(block) or block in s.holds or block in s.just_freed  # a step may be planned ahead of that
        if self.prefix_caching and shared and not there:
            raise self._error(t, request, f"takes over block {block}, which nobody holds and which is not cached")
        if not shared and block in s.holds:
            self._forget(s, block)
            s.evicted |= {block}
        s.refs[block] = s.refs.get(block, 0) + 1
        if shared:
            s.hits |= {block}
        else:
            s.new |= {block}

    def _drop(self, s: _State, request: int) -> None:
        for block in s.table.pop(request, ()):
            self._release(s, block)
        s.computed[request] = 0
        s.sealed.pop(request, None)

    def _release(self, s: _State, block: int) -> None:
        s.refs[block] -= 1
        if not s.refs[block]:
            del s.refs[block]
            if block in s.holds and len(s.found[s.holds[block]]) > 1:  # others have the same, and keep it
                self._forget(s, block)

    def _state_of(self, s: _State, t: int, request: int) -> str:
        if request not in self.trace.requests:
            raise self._error(t, request, "is used but never arrived")
        return s.state.setdefault(request, NOT_ARRIVED)

    def _expect(self, s: _State, t: int, request: int, state: str, what: str) -> None:
        actual = self._state_of(s, t, request)
        if actual != state:
            raise self._error(t, request, f"{what} although it is {actual}")

    def _error(self, t: int, request: int, what: str) -> TraceError:
        return TraceError(
            f"The trace contradicts itself: in step {self.trace.steps[t].plan.step}, request {request} {what}."
        )

    def _snapshot(self, s: _State, t: int) -> Snapshot:
        held: dict[int, int] = {}
        for request, table in s.table.items():
            computed = s.computed.get(request, 0)
            for i, block in enumerate(table):
                tokens = min(max(computed - i * self.block_size, 0), self.block_size)
                held[block] = max(held.get(block, 0), tokens)
        ids = self.trace.requests
        return Snapshot(
            index=t,
            record=self.trace.steps[t],
            state={r: s.state.get(r, NOT_ARRIVED) for r in ids},
            reason=s.reason,
            table={r: s.table.get(r, ()) for r in ids},
            computed={r: s.computed.get(r, 0) for r in ids},
            outputs={r: s.outputs.get(r, ()) for r in ids},
            refs=s.refs,
            block_tokens=held,
            new_blocks=s.new,
            hit_blocks=s.hits,
            hosted=s.hosted,
            holds=s.holds,
            kept_blocks=frozenset(block for block in s.holds if not s.refs.get(block)),
            evicted_blocks=s.evicted,
        )
