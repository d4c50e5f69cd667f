"""Thousands of random operations on pool, cache and scheduler, against a plain account of who holds what.

No model runs. Storage, staging and the moves of blocks are the real ones, but a token's key and value are one number
that stands for the token and everything before it: so each read can be checked for having found the right text.
"""

from collections import Counter

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stepengine.core.batch import Staging
from stepengine.core.kv_pool import KVPool
from stepengine.core.plan import StepPlan
from stepengine.core.request import Request, SamplingParams, State
from stepengine.core.seams import Limits
from stepengine.errors import StepEngineError
from stepengine.model.config import ModelConfig
from stepengine.model.tiny import tiny_config
from stepengine.stage2_paged.block_pool import BlockPool
from stepengine.stage2_paged.cache import PagedCache
from stepengine.stage2_paged.scheduler import PagedScheduler, youngest
from tests.paged.faults import (
    ForgetsThem,
    ForkTakesNoReference,
    KeepsHostSlots,
    QueuesThemLast,
    SwapsInBackwards,
    WritesIntoSharedBlocks,
)

PHASES = [Phase.generate, Phase.shrink]  # explaining a failure takes minutes
CPU = torch.device("cpu")
VICTIMS = {
    "youngest": youngest,
    "itself": lambda candidates: candidates[0],
    "middle": lambda candidates: candidates[len(candidates) // 2],
}


def order(request: Request) -> tuple[int, int]:
    return request.priority, request.id


class Account:
    """What a brute-force reader of the plans knows: tables, host slots, tokens stored."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.table: dict[int, list[int]] = {}
        self.hosted: dict[int, list[int]] = {}
        self.stored: Counter[int] = Counter()

    @property
    def refs(self) -> Counter[int]:
        return Counter(block for table in self.table.values() for block in table)

    def drop(self, request_id: int) -> None:
        self.table.pop(request_id, None)
        self.hosted.pop(request_id, None)
        self.stored.pop(request_id, None)

    def apply(self, plan: StepPlan) -> None:
        """Everything that the plan says of blocks, in the order in which a trace is read."""
        for request_id in plan.preempted:
            self.drop(request_id)
        for swap in plan.swapped_out:
            assert [block for block, _ in swap.pairs] == self.table.pop(swap.request)
            self.hosted[swap.request] = [slot for _, slot in swap.pairs]
        for swap in plan.swapped_in:
            assert [slot for _, slot in swap.pairs] == self.hosted.pop(swap.request)
            for block, _ in swap.pairs:
                assert self.refs[block] == 0, f"block {block} is swapped into while it is held"
                self.table.setdefault(swap.request, []).append(block)
        copied = {copy.request: copy.entry + 1 for copy in plan.copies}
        new: dict[int, tuple[int, ...]] = {}
        for chunk in plan.chunks:  # found blocks: those of cached tokens, and one that is to be copied at once
            table = self.table.setdefault(chunk.request, [])
            hits = max(0, -(-chunk.cached // self.limits.block_size), copied.get(chunk.request, 0) - len(table))
            assert all(self.refs[block] > 0 for block in chunk.blocks[:hits])
            table += chunk.blocks[:hits]
            new[chunk.request] = chunk.blocks[hits:]
            self.stored[chunk.request] = max(self.stored[chunk.request], chunk.cached)
        for copy in plan.copies:
            table, gone = self.table[copy.request], plan.preempted or plan.swapped_out
            assert table[copy.entry] == copy.source
            assert self.refs[copy.source] > 1 or gone, f"block {copy.source} is copied although only one holds it"
            assert self.refs[copy.destination] == 0, f"block {copy.destination} is copied into while it is held"
            table[copy.entry] = copy.destination
        for request_id, blocks in new.items():
            for block in blocks:
                assert 1 <= block <= self.limits.num_blocks
                assert self.refs[block] == 0, f"block {block} is granted while it is held"
                self.table[request_id].append(block)


class PagedEngine(RuleBasedStateMachine):
    Pool: type = BlockPool
    Cache: type = PagedCache
    Scheduler: type = PagedScheduler

    @initialize(
        block_size=st.sampled_from([1, 2, 3, 4, 8]),
        longest=st.integers(4, 24),
        spare=st.sampled_from([0, 1, 2, 5]),
        places=st.sampled_from([4, 6, 3, 2, 1]),
        host=st.sampled_from([None, 40, 40, 6, 0]),
        victim=st.sampled_from(sorted(VICTIMS)),
    )
    def start(self, block_size, longest, spare, places, host, victim):
        num_blocks = -(-longest // block_size) + spare  # the smallest pool holds just the longest request
        swap = {"preemption": "recompute" if host is None else "swap", "num_host_blocks": host or 0}
        self.limits = Limits(places, 2 * longest, longest, block_size, num_blocks, **swap)
        self.pool = self.Pool(num_blocks)
        self.cache = self.Cache(self.limits, self.pool)
        self.scheduler = self.Scheduler(self.limits, self.cache, pick_victim=VICTIMS[victim])
        self.youngest_gives_way = victim == "youngest"
        config = tiny_config("llama", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
        self.device = KVPool(
            ModelConfig.from_dict(config), num_blocks, block_size, CPU, torch.float64, self.limits.num_host_blocks
        )
        self.staging = Staging(CPU, places, 2 * longest, -(-longest // block_size), block_size)
        self.account = Account(self.limits)
        self.requests: dict[int, Request] = {}
        self.labels: dict[tuple[int, int], int] = {}  # (label of what came before, token) -> label
        self.amiss = False
        self.tokens = 0  # every token that is made up is another one

    # -- what a user does -------------------------------------------------------------------------

    @rule(data=st.data(), n=st.sampled_from([1, 1, 2, 3, 4]), priority=st.sampled_from([0, 0, 0, 1, -1]))
    def add(self, data, n, priority):
        prompt = data.draw(st.integers(1, self.limits.max_model_len // 2), label="prompt")
        room = self.limits.max_model_len - prompt
        outputs = room - data.draw(st.integers(0, room - 1), label="outputs left out")
        ids = [self.new_token() for _ in range(prompt)]
        group = len(self.requests)
        for sample in range(n):
            params = SamplingParams(n=n, max_tokens=outputs)
            request = Request(group + sample, list(ids), params, prompt + outputs, frozenset(), priority, group, sample)
            self.requests[request.id] = request
            self.scheduler.add(request)

    @precondition(lambda self: self.unfinished())
    @rule(pick=st.integers(0, 99), state=st.sampled_from([State.SWAPPED, State.WAITING, State.RUNNING]))
    def abort(self, pick, state):
        request = self.pick(pick, state)
        self.scheduler.finish(request.id, "abort")
        assert request.state is State.FINISHED and request.finish_reason == "abort"
        self.account.drop(request.id)

    @precondition(lambda self: any(r.state is State.SWAPPED for r in self.requests.values()))
    @rule(pick=st.integers(0, 99))
    def abort_in_host_memory(self, pick):
        self.abort(pick, State.SWAPPED)

    @rule()
    def abort_nobody(self):
        self.scheduler.finish(10_000, "abort")

    @precondition(lambda self: any(r.state is State.RUNNING for r in self.requests.values()))
    @rule(pick=st.integers(0, 99), state=st.sampled_from([State.RUNNING, State.RUNNING, State.WAITING, State.SWAPPED]))
    def fork(self, pick, state):
        parent = self.pick(pick, state)
        child_id = len(self.requests)
        params = parent.params.replace(n=1)
        child = Request(child_id, parent.prompt_ids, params, parent.max_len, priority=parent.priority, group=child_id)
        child.token_ids = list(parent.token_ids)
        self.requests[child_id] = child
        self.scheduler.fork(parent, child)
        if child.state is State.RUNNING:
            self.account.table[child_id] = list(self.account.table[parent.id])
            self.account.stored[child_id] = self.account.stored[parent.id]

    @precondition(lambda self: self.unfinished())
    @rule()
    def step(self):
        plan = self.plan()
        self.run(plan)
        tokens = [self.new_token() if self.reaches_the_end(chunk) else -1 for chunk in plan.chunks]
        ended = self.scheduler.update(plan, tokens)
        ran = {chunk.request for chunk in plan.chunks}
        for chunk in plan.chunks:
            self.account.stored[chunk.request] = chunk.end
        full = {request.id: "length" for request in self.requests.values() if self.is_full(request)}
        assert dict(ended) == {request_id: full[request_id] for request_id in full if request_id in ran}
        for request_id, reason in ended:
            assert self.requests[request_id].finish_reason == reason
            self.account.drop(request_id)

    @precondition(lambda self: self.unfinished())
    @rule()
    def step_fails(self):
        """The plan was made and its blocks moved, then the forward pass raised: the engine takes the chunks back."""
        for chunk in self.plan().chunks:
            request = self.requests[chunk.request]
            assert request.accepts(chunk)
            request.keep(request.computed)

    @precondition(lambda self: self.unfinished())
    @rule(steps=st.integers(2, 12))
    def steps(self, steps):
        while steps and self.unfinished():
            self.step()
            steps -= 1

    # -- the device -------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        self.amiss = True  # until all checks have passed
        running = {r.id for r in self.requests.values() if r.state is State.RUNNING}
        plan = self.scheduler.plan()
        assert plan.chunks, f"a step without progress: {plan.blocked}"
        self.account.apply(plan)
        self.device.move(plan)
        self.check_order(plan, running)
        self.amiss = False
        return plan

    def run(self, plan: StepPlan) -> None:
        self.amiss, refs, size = True, self.account.refs, self.limits.block_size
        batch = self.staging.fill(plan.chunks, self.requests)
        written = [label for chunk in plan.chunks for label in self.lineage(chunk.request)[chunk.start : chunk.end]]
        labels = torch.tensor(written, dtype=torch.float64)[:, None, None].expand(-1, 1, 2)
        self.device.store(0, labels, -labels, batch)
        for row, chunk in enumerate(plan.chunks):
            request, table = self.requests[chunk.request], self.account.table[chunk.request]
            assert 0 <= chunk.start < chunk.end <= request.num_tokens
            assert chunk.start <= self.account.stored[chunk.request], "a token was skipped"
            assert len(table) == -(-chunk.end // size), "at most block_size - 1 tokens are wasted"
            for position in range(self.account.stored[chunk.request], chunk.end):
                assert refs[table[position // size]] == 1, f"position {position} is written into a shared block"
            blocks = self.device.layers[0][batch.block_table[row, : len(table)]][:, :, 0, :, 0]  # [M, 2, block_size]
            found = blocks.transpose(0, 1).flatten(1)[:, : chunk.end].tolist()
            truth = self.lineage(chunk.request)[: chunk.end]
            assert found == [truth, [-label for label in truth]], f"request {chunk.request} reads other tokens' K/V"
        self.amiss = False

    # -- truth ------------------------------------------------------------------------------------

    def lineage(self, request_id: int) -> list[int]:
        """One number for each token of a request, the same exactly where all tokens up to it are the same."""
        labels, last = [], 0
        for token in self.requests[request_id].token_ids:
            last = self.labels.setdefault((last, token), len(self.labels) + 1)
            labels.append(last)
        return labels

    def new_token(self) -> int:
        self.tokens += 1
        return self.tokens

    def unfinished(self) -> list[Request]:
        return [request for request in self.requests.values() if request.state is not State.FINISHED]

    def pick(self, number: int, state: State) -> Request:
        """One that is in this state, or else any that has not ended."""
        left = self.unfinished()
        wanted = [request for request in left if request.state is state] or left
        return wanted[number % len(wanted)]

    @staticmethod
    def is_full(request: Request) -> bool:
        return request.num_tokens == request.max_len

    def reaches_the_end(self, chunk) -> bool:
        return chunk.end == self.requests[chunk.request].num_tokens

    def check_order(self, plan: StepPlan, running: set[int]) -> None:
        """Nobody is overtaken in the queue, and whoever gives way is the youngest of the lowest priority."""
        victims = {*plan.preempted, *(swap.request for swap in plan.swapped_out)}
        back = {swap.request for swap in plan.swapped_in}
        assert not (victims and back), "a step that brings back sends nobody away"
        started = {chunk.request for chunk in plan.chunks} - running | back
        assert not (victims and started), "who starts pushes nobody out"
        if victims and self.youngest_gives_way:
            kept = [order(self.requests[i]) for i in running - victims]
            assert not kept or max(kept) < min(order(self.requests[i]) for i in victims)
        waiting = [r for r in self.unfinished() if r.state in (State.WAITING, State.SWAPPED)]
        for request in waiting:
            if self.waits_for_its_prompt(request):
                continue
            ahead = [i for i in started if order(self.requests[i]) > order(request)]
            assert not ahead, f"requests {ahead} overtook request {request.id}"

    def waits_for_its_prompt(self, request: Request) -> bool:
        """A sample whose sibling runs the prompt in this very step."""
        siblings = [r for r in self.requests.values() if r.group == request.group and r.state is State.RUNNING]
        return any(sibling.computed < len(sibling.prompt_ids) for sibling in siblings)

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "account"):
            return
        account, limits = self.account, self.limits
        tables = {r.id: r.blocks for r in self.requests.values() if r.blocks}
        assert tables == account.table
        assert {block: self.pool.refs(block) for block in range(1, limits.num_blocks + 1) if self.pool.refs(block)} == (
            account.refs
        )
        assert self.pool.num_free == limits.num_blocks - len(account.refs)
        assert all(len(set(table)) == len(table) for table in tables.values())
        slots = [slot for hosted in account.hosted.values() for slot in hosted]
        assert sorted(slots + self.cache.free_slots) == list(range(limits.num_host_blocks))
        states = Counter(request.state for request in self.requests.values())
        assert states[State.RUNNING] <= limits.max_num_seqs
        for request in self.requests.values():
            assert bool(request.blocks) == (request.state is State.RUNNING)
            assert (request.id in account.hosted) == (request.state is State.SWAPPED)
            assert request.state is State.FINISHED or request.computed == account.stored[request.id]
            assert len(request.blocks) <= -(-request.num_tokens // limits.block_size)
        assert self.scheduler.idle() == (not self.unfinished())

    def teardown(self):
        if not hasattr(self, "account") or self.amiss:
            return
        left = sum(r.max_len - r.num_tokens for r in self.unfinished())
        for _ in range(left):  # every step makes a token
            if self.unfinished():
                self.step()
        self.nothing_is_lost()
        assert not self.unfinished() and self.pool.num_free == self.limits.num_blocks
        assert self.cache.free_tokens == self.cache.capacity_tokens


CI = settings(derandomize=True, deadline=None, max_examples=150, stateful_step_count=50, database=None, phases=PHASES)


def test_thousands_of_operations():
    run_state_machine_as_test(PagedEngine, settings=CI)


class FindsStrangers(PagedCache):
    def _sharing(self, request):
        others = [other for group in self.samples.values() for other in group if other is not request]
        found = [other for other in others if other.blocks and other.computed >= len(request.prompt_ids)]
        return found[0] if found and not request.blocks else None


class HandsOutTwice(BlockPool):
    def free(self, ids):
        super().free(ids)
        self._free.extend(block for block in ids if self.refs(block) == 1)


@pytest.mark.parametrize(
    ("role", "mutant"),
    [
        ("Cache", WritesIntoSharedBlocks),
        ("Cache", ForkTakesNoReference),
        ("Cache", FindsStrangers),
        ("Cache", SwapsInBackwards),
        ("Cache", KeepsHostSlots),
        ("Pool", HandsOutTwice),
        ("Scheduler", ForgetsThem),
        ("Scheduler", QueuesThemLast),
    ],
)
def test_a_fault_is_found(role: str, mutant: type):
    faulty = type(f"{mutant.__name__}Engine", (PagedEngine,), {role: mutant})
    with pytest.raises((AssertionError, StepEngineError, KeyError)):
        run_state_machine_as_test(faulty, settings=settings(CI, phases=[Phase.generate], report_multiple_bugs=False))
