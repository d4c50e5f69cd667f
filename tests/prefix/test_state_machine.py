"""Stage 2's random operations on stage 4's pool, cache and scheduler, with prompts that begin alike.

Keys and values are numbers that stand for a token and everything before it, in the real storage: a hit on the wrong
block, or on one that was written since, reads the wrong numbers.
"""

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from stepengine.core.batch import Staging
from stepengine.core.kv_pool import KVPool
from stepengine.core.request import Request, SamplingParams, State
from stepengine.core.seams import Limits
from stepengine.errors import StepEngineError
from stepengine.model.config import ModelConfig
from stepengine.model.tiny import tiny_config
from stepengine.stage2_paged.block_pool import BlockPool
from stepengine.stage2_paged.cache import PagedCache
from stepengine.stage2_paged.scheduler import PagedScheduler
from stepengine.stage4_chunked_prefix.block_pool import PrefixBlockPool
from stepengine.stage4_chunked_prefix.cache import PrefixCache
from stepengine.stage4_chunked_prefix.prefix_index import HashPrefixIndex, RadixPrefixIndex
from stepengine.stage4_chunked_prefix.scheduler import BudgetScheduler
from tests.contracts.test_prefix_contracts import (
    AllocatesFirst,
    BeforeItIsComputed,
    FindsOthersKV,
    HandsOutWhatIsHeld,
    KeyWithoutItsParent,
    LosesTwins,
    PointsAtFreedBlocks,
    SealsHalfFullBlocks,
    StaysInTheIndex,
)
from tests.paged.test_state_machine import CPU, PHASES, VICTIMS, Account, PagedEngine

INDEXES = {"hash": HashPrefixIndex, "radix": RadixPrefixIndex, "colliding": lambda: HashPrefixIndex(lambda p: p[0] % 7)}


class Books(Account):
    """Hits may also be blocks that nobody holds any more."""

    def apply(self, plan):
        hits = {block for chunk in plan.chunks for block in chunk.blocks[: -(-chunk.cached // self.limits.block_size)]}
        hits -= {block for swap in plan.swapped_in for block, _ in swap.pairs}  # which samples may share at once
        self.table[-1] = [block for block in hits if not self.refs[block]]
        super().apply(plan)
        del self.table[-1]


class PrefixEngine(PagedEngine):
    Pool: type = PrefixBlockPool
    Cache: type = PrefixCache
    Scheduler: type = BudgetScheduler
    prefixes = True

    @initialize(
        block_size=st.sampled_from([1, 2, 3, 4, 8]),
        longest=st.integers(4, 24),
        spare=st.sampled_from([0, 1, 2, 5, 12]),
        places=st.sampled_from([4, 6, 3, 2, 1]),
        host=st.sampled_from([None, 40, 40, 6, 0]),
        victim=st.sampled_from(sorted(VICTIMS)),
        budget=st.sampled_from([0, 1, 2, 5, 9, 60]),
        most=st.sampled_from([0, 0, 1, 3]),
        index=st.sampled_from(sorted(INDEXES)),
    )
    def start(self, block_size, longest, spare, places, host, victim, budget, most, index):
        num_blocks = -(-longest // block_size) + spare
        swap = {"preemption": "recompute" if host is None else "swap", "num_host_blocks": host or 0}
        whole = self.Scheduler is PagedScheduler
        tokens = 2 * longest if whole else places + budget
        more = {"long_prefill_token_threshold": 0 if whole else most}
        self.limits = Limits(places, tokens, longest, block_size, num_blocks, **swap, **more)
        self.pool = self.Pool(num_blocks, INDEXES[index]()) if self.prefixes else self.Pool(num_blocks)
        self.cache = self.Cache(self.limits, self.pool)
        self.scheduler = self.Scheduler(self.limits, self.cache, pick_victim=VICTIMS[victim])
        self.youngest_gives_way = victim == "youngest"
        config = tiny_config("llama", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
        host_blocks = self.limits.num_host_blocks
        self.device = KVPool(ModelConfig.from_dict(config), num_blocks, block_size, CPU, torch.float64, host_blocks)
        self.staging = Staging(CPU, places, tokens, -(-longest // block_size), block_size)
        self.account = Books(self.limits)
        self.requests: dict[int, Request] = {}
        self.labels: dict[tuple[int, int], int] = {}
        self.amiss = False
        self.tokens = 1000  # those below begin prompts that are alike
        self.ended: list[list[int]] = []  # what requests were, whose next round may come

    @rule(data=st.data(), n=st.sampled_from([1, 1, 2, 3]), priority=st.sampled_from([0, 0, 0, 1, -1]))
    def add(self, data, n, priority):
        most = self.limits.max_model_len - 1
        head = data.draw(st.sampled_from([0, 100, 200]), label="beginning")  # equal blocks come after different ones
        ids = [head if at < 2 else at % 2 for at in range(data.draw(st.integers(0, most - 1), label="tokens of it"))]
        if self.ended and data.draw(st.booleans(), label="next round"):
            ids = list(self.ended[data.draw(st.integers(0, len(self.ended) - 1), label="of which")])
        own = data.draw(st.integers(0 if ids else 1, 3), label="own tokens")
        ids = [*ids, *(self.new_token() for _ in range(own))][:most]
        outputs = data.draw(st.integers(1, min(8, most + 1 - len(ids))), label="outputs")
        salt = data.draw(st.sampled_from(["", "", "red"]), label="salt")
        group = len(self.requests)
        for sample in range(n):
            params = SamplingParams(n=n, max_tokens=outputs)
            request = Request(
                group + sample, list(ids), params, len(ids) + outputs, frozenset(), priority, group, sample,
                cache_salt=salt,
            )  # fmt: skip
            self.requests[request.id] = request
            self.scheduler.add(request)

    @precondition(lambda self: self.unfinished())
    @rule()
    def step(self):
        before = {request.id: request for request in self.unfinished()}
        super().step()
        self.ended += [r.token_ids for r in before.values() if r.state is State.FINISHED]
        self.ended = self.ended[-4:]

    def plan(self):
        plan = super().plan()
        if self.Scheduler is not PagedScheduler:  # which runs the prompts of a failed step again, all at once
            self.amiss = plan.num_tokens > self.limits.max_num_batched_tokens
            assert not self.amiss, f"{plan.num_tokens} tokens in one step"
        return plan

    def run(self, plan):
        self.amiss, refs, size = True, self.account.refs, self.limits.block_size
        batch = self.staging.fill(plan.chunks, self.requests)
        lines = [self.lineage(chunk.request) for chunk in plan.chunks]
        written = [
            label for chunk, line in zip(plan.chunks, lines, strict=True) for label in line[chunk.start : chunk.end]
        ]
        labels = torch.tensor(written, dtype=torch.float64)[:, None, None].expand(-1, 1, 2)
        self.device.store(0, labels, -labels, batch)
        for row, (chunk, line) in enumerate(zip(plan.chunks, lines, strict=True)):
            request, table = self.requests[chunk.request], self.account.table[chunk.request]
            assert 0 <= chunk.start < chunk.end <= request.num_tokens
            assert chunk.start <= self.account.stored[chunk.request], "a token was skipped"
            assert -(-chunk.end // size) <= len(table) <= -(-request.num_tokens // size)
            for position in range(self.account.stored[chunk.request], chunk.end):
                block = table[position // size]
                assert refs[block] == 1, f"position {position} is written into a shared block"
                assert not self.prefixes or self.pool._entries[block] is None, f"block {block} is found, and written"
            blocks = self.device.layers[0][batch.block_table[row, : len(table)]][:, :, 0, :, 0]  # [M, 2, block_size]
            found = blocks.transpose(0, 1).flatten(1)[:, : chunk.end].tolist()
            truth = line[: chunk.end]
            assert found == [truth, [-label for label in truth]], f"request {chunk.request} reads other tokens' K/V"
        self.amiss = False

    def teardown(self):
        if not hasattr(self, "account") or self.amiss:
            return
        for _ in range(sum(2 * request.max_len for request in self.requests.values())):
            if self.unfinished():
                self.step()
        self.nothing_is_lost()
        assert not self.unfinished() and self.pool.num_free == self.limits.num_blocks
        assert self.cache.free_tokens == self.cache.capacity_tokens
        assert self.pool.alloc(self.limits.num_blocks) is not None  # every one of them can be had


class Chunked(PrefixEngine):
    Pool, Cache, prefixes = BlockPool, PagedCache, False


class Found(PrefixEngine):
    Scheduler = PagedScheduler


CI = settings(derandomize=True, deadline=None, max_examples=100, stateful_step_count=50, database=None, phases=PHASES)


@pytest.mark.parametrize("machine", [PrefixEngine, Chunked, Found])
def test_thousands_of_operations(machine: type):
    run_state_machine_as_test(machine, settings=CI)


class GivesUpTheFirstInLine(BudgetScheduler):
    def _preempt(self, victim, moves):
        super()._preempt(victim, moves)
        self.waiting.remove(victim)
        self.waiting.append(victim)


class TrustsTheHash(PrefixBlockPool):
    def __init__(self, num_blocks, index):
        super().__init__(num_blocks, FindsOthersKV())


@pytest.mark.parametrize(
    ("role", "mutant"),
    [
        ("Cache", BeforeItIsComputed),
        ("Cache", KeyWithoutItsParent),
        ("Cache", PointsAtFreedBlocks),
        ("Cache", AllocatesFirst),
        ("Cache", SealsHalfFullBlocks),
        ("Pool", LosesTwins),
        ("Pool", HandsOutWhatIsHeld),
        ("Pool", StaysInTheIndex),
        ("Pool", TrustsTheHash),
        ("Scheduler", GivesUpTheFirstInLine),
    ],
)
def test_a_fault_is_found(role: str, mutant: type):
    faulty = type(f"{mutant.__name__}Engine", (PrefixEngine,), {role: mutant})
    once = settings(CI, max_examples=1000, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises((AssertionError, StepEngineError, KeyError, IndexError, RuntimeError)):
        run_state_machine_as_test(faulty, settings=once)
