"""The contracts of blocks: our parts keep them in any size, and each mutant breaks the promise that speaks of it."""

from collections.abc import Callable

import pytest
import torch

from stepengine.contracts import check_attention, check_block_pool, check_kv_cache, check_scheduler
from stepengine.core.request import State
from stepengine.stage0_naive.attention import RecomputedAttention
from stepengine.stage0_naive.cache import NoCache
from stepengine.stage1_kvcache.attention import SlotAttention
from stepengine.stage1_kvcache.cache import SlotCache
from stepengine.stage1_kvcache.scheduler import ContinuousScheduler
from stepengine.stage2_paged.attention import PagedAttention
from stepengine.stage2_paged.block_pool import BlockPool
from stepengine.stage2_paged.cache import PagedCache
from stepengine.stage2_paged.scheduler import PagedScheduler
from tests.paged.faults import (
    ForgetsThem,
    ForkTakesNoReference,
    KeepsHostSlots,
    QueuesThemLast,
    SwapsInBackwards,
    WritesIntoSharedBlocks,
)


def check_paged(cache: Callable, block_size: int = 4):
    return check_kv_cache(cache, block_size=block_size, num_blocks=48 // block_size, max_model_len=32)


def broken(report, promise: str) -> bool:
    assert all(failure.example and failure.hint for failure in report.failed)
    return any(failure.promise.startswith(promise) for failure in report.failed)


def test_our_own_parts_keep_their_contracts():
    for report in (
        check_block_pool(BlockPool),
        check_paged(PagedCache),
        check_paged(PagedCache, 1),
        check_paged(PagedCache, 16),
        check_kv_cache(PagedCache),  # a block may also be a whole slot
        check_scheduler(PagedScheduler, preempts=True),
    ):
        assert report.ok and not report.remarks, report


def test_slots_and_nothing_are_asked_no_more_than_before():
    assert len(check_kv_cache(SlotCache).passed) == len(check_kv_cache(NoCache, block_size=0).passed) == 7
    assert len(check_scheduler(ContinuousScheduler).passed) == 6


@pytest.mark.parametrize(
    ("attention", "block_size"), [(RecomputedAttention, 0), (SlotAttention, 64), (PagedAttention, (1, 3, 16, 48))]
)
def test_attention_of_every_stage_keeps_its_contract(attention: type, block_size):
    report = check_attention(attention, block_size)
    assert report.ok, report


# -- block pools ----------------------------------------------------------------------------------


class HandsOutZero(BlockPool):
    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self._free = list(range(num_blocks - 1, -1, -1))


class NoneForNothing(BlockPool):
    def alloc(self, n):
        return super().alloc(n) or None


class TakesWhatThereIs(BlockPool):
    def alloc(self, n):
        return super().alloc(min(n, self.num_free))


class TakesThenFails(BlockPool):
    def alloc(self, n):
        ids = super().alloc(min(n, self.num_free))
        return ids if ids is not None and len(ids) == n else None


class FirstLetsGo(BlockPool):
    def free(self, ids):
        super().free(ids)
        self._free.extend(block for block in ids if self.refs(block))


class NeverAgain(BlockPool):
    def free(self, ids):
        held = [block for block in ids if self.refs(block) == 1]
        super().free(ids)
        del self._free[len(self._free) - len(held) :]


class StopsHalfWay(BlockPool):
    def free(self, ids):
        for block in ids:
            super().free([block])


class FreesAnything(BlockPool):
    def _check(self, ids):
        pass

    _check_repeated = _check


@pytest.mark.parametrize(
    ("mutant", "promise"),
    [
        (HandsOutZero, "all blocks can be had"),
        (NoneForNothing, "alloc(0)"),
        (TakesWhatThereIs, "too few free"),
        (TakesThenFails, "too few free"),
        (FirstLetsGo, "a shared block is free when"),
        (NeverAgain, "a block that was freed can be had again"),
        (StopsHalfWay, "a block that nobody holds"),
        (FreesAnything, "a block that nobody holds"),
    ],
)
def test_broken_pools_are_caught(mutant: type, promise: str):
    assert broken(check_block_pool(mutant), promise), check_block_pool(mutant)


def test_the_smallest_order_that_fails_is_shown():
    class LosesThird(BlockPool):
        """Right but for a block with three references."""

        def share(self, ids):
            super().share([block for block in ids if self.refs(block) < 2])

    failure = check_block_pool(LosesThird).failed[-1]
    assert failure.promise.startswith("counts stay right in any order")
    assert failure.example == "2 blocks: alloc(1) gave [1]; share([1]); share([1]); refs(1) is 2, not 3"


def test_a_pool_that_searches_is_slow_not_wrong():
    class Searches(BlockPool):
        def alloc(self, n):
            if n > self.num_free:
                return None
            ids = sorted(self._free)[:n]
            self._free = [block for block in self._free if block not in ids]
            for block in ids:
                self._refs[block] = 1
            return ids

    report = check_block_pool(Searches)
    assert report.ok and report.remarks[0].startswith("slow: ")


# -- caches ---------------------------------------------------------------------------------------


class OneBlockAhead(PagedCache):
    def grow(self, request, upto):
        return super().grow(request, upto + self.block_size)


class SharesWithStrangers(PagedCache):
    def match(self, request):
        return min(len(request.prompt_ids) - 1, 1) if self.samples and not request.blocks else 0

    def _sharing(self, request):
        return next((group[0] for group in self.samples.values()), None) if not request.blocks else None


class OverfillsTheHost(PagedCache):
    def swap_out(self, request):
        self.free_slots.extend(range(len(request.blocks)))
        return super().swap_out(request)


@pytest.mark.parametrize(
    ("mutant", "promise"),
    [
        (OneBlockAhead, "a request holds no more blocks"),
        (WritesIntoSharedBlocks, "samples of one prompt part"),
        (WritesIntoSharedBlocks, "a fork shares all blocks"),
        (SharesWithStrangers, "requests that grow side by side"),
        (ForkTakesNoReference, "a fork shares all blocks"),
        (SwapsInBackwards, "what is swapped out comes back"),
        (OverfillsTheHost, "a full host"),
        (KeepsHostSlots, "a full host"),
    ],
)
def test_broken_paged_caches_are_caught(mutant: type, promise: str):
    assert broken(check_paged(mutant), promise), check_paged(mutant)


def test_a_cache_that_shares_nothing_passes_with_a_remark():
    class Alone(PagedCache):
        def match(self, request):
            return 0

        def _sharing(self, request):
            return None

    report = check_paged(Alone)
    assert report.ok and report.remarks == [
        "wasteful: samples of one prompt hold its K/V once each instead of sharing them"
    ]


def test_a_cache_without_forks_and_swaps_is_asked_for_neither():
    class Plain:
        def __init__(self, limits):
            self._cache = PagedCache(limits)

        capacity_tokens = property(lambda self: self._cache.capacity_tokens)
        free_tokens = property(lambda self: self._cache.free_tokens)

        def __getattr__(self, name):
            if name not in ("match", "grow", "commit", "release"):
                raise AttributeError(name)
            return getattr(self._cache, name)

    report = check_paged(Plain)
    assert report.ok and len(report.passed) == len(check_paged(PagedCache).passed) - 3


# -- schedulers -----------------------------------------------------------------------------------


class KeepsWhatIsGone(PagedScheduler):
    """Goes on where it was, though the blocks are lost."""

    def _preempt(self, victim, moves):
        scheduled, computed = victim.scheduled, victim.computed
        super()._preempt(victim, moves)
        victim.scheduled, victim.computed = scheduled, computed


class NeverSwaps(PagedScheduler):
    def _preempt(self, victim, moves):
        self.limits = type(self.limits)(**{**vars(self.limits), "preemption": "recompute"})
        super()._preempt(victim, moves)


class SaysNothing(PagedScheduler):
    def plan(self):
        return super().plan()._replace(preempted=())


class PreemptsEarly(PagedScheduler):
    """Makes room before anybody asks for it."""

    def _decode(self, moves):
        if len(self.running) > 1 and self.cache.free_tokens <= self.limits.block_size and not moves.swapped_in:
            self._preempt(max(self.running.values(), key=lambda r: (r.priority, r.id)), moves)
        return super()._decode(moves)


class LosesTheAborted(PagedScheduler):
    def finish(self, request_id, reason):
        if request_id in self.running:
            super().finish(request_id, reason)
            return
        for request in [r for r in self.waiting if r.id == request_id]:
            self.waiting.remove(request)
            request.state, request.finish_reason = State.FINISHED, reason  # and its host slots?


@pytest.mark.parametrize(
    ("mutant", "promise"),
    [
        (ContinuousScheduler, "with too few blocks"),
        (ForgetsThem, "with too few blocks"),
        (KeepsWhatIsGone, "with too few blocks"),
        (SaysNothing, "with too few blocks"),
        (QueuesThemLast, "whoever gave way comes back"),
        (NeverSwaps, "with room on the host"),
        (PreemptsEarly, "nobody gives way while all find blocks"),
        (LosesTheAborted, "an abort also ends who gave way"),
        (lambda limits, cache: PagedScheduler(limits, cache, lambda line: line[0]), "the first in line"),
        (
            lambda limits, cache: PagedScheduler(limits, cache, lambda line: line[len(line) // 2]),
            "nobody gives way to a",
        ),
    ],
)
def test_broken_preemption_is_caught(mutant: Callable, promise: str):
    report = check_scheduler(mutant, preempts=True)
    assert broken(report, promise), report


# -- attention ------------------------------------------------------------------------------------


class Wrong(PagedAttention):
    """Takes q, k, v, batch through `spoil` first."""

    def forward(self, layer, q, k, v, batch):
        return super().forward(*self.spoil(layer, q, k, v, batch))


class NotScaled(Wrong):
    def spoil(self, layer, q, k, v, batch):
        return layer, q * 2, k, v, batch


class StoresNothing(PagedAttention):
    def _store(self, layer, k, v, batch):
        pass


class OneLayer(Wrong):
    def spoil(self, layer, q, k, v, batch):
        return 0, q, k, v, batch


class InterleavesHeads(Wrong):
    """Takes query head h for K/V head h % Hk."""

    def spoil(self, layer, q, k, v, batch):
        tokens, heads, dim = q.shape
        return layer, q.view(tokens, -1, k.shape[1], dim).transpose(1, 2).reshape(q.shape), k, v, batch


class SeesTheFuture(RecomputedAttention):
    def forward(self, layer, q, k, v, batch):
        group = q.shape[1] // k.shape[1]
        out = []
        for queries, keys, values in zip(q.split(batch.lengths), k.split(batch.lengths), v.split(batch.lengths)):  # noqa: B905
            keys, values = (part.repeat_interleave(group, 1).transpose(0, 1) for part in (keys, values))
            scores = queries.transpose(0, 1) @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
            out.append((scores.softmax(-1) @ values).transpose(0, 1))
        return torch.cat(out)


class FlattensRows(Wrong):
    """Reads q as if its rows lay side by side."""

    def spoil(self, layer, q, k, v, batch):
        return layer, torch.as_strided(q, q.shape, (q[0].numel(), q.shape[2], 1), q.storage_offset()), k, v, batch


class SeesWhatIsLeft(PagedAttention):
    """Reads whole blocks, as if they were full."""

    def _decode(self, layer, q, batch):
        size = self.pool.block_size
        batch.kv_lens.copy_((batch.kv_lens + size - 1) // size * size)
        return super()._decode(layer, q, batch)


@pytest.mark.parametrize(
    ("mutant", "block_size", "promise"),
    [
        (NotScaled, 16, "a prompt attends causally"),
        (StoresNothing, 16, "a decode step reads"),
        (OneLayer, 16, "each layer has K/V of its own"),
        (InterleavesHeads, 16, "query heads share"),
        (SeesTheFuture, 0, "a prompt attends causally"),
        (RecomputedAttention, 16, "a chunk that starts late"),
        (SlotAttention, 16, "requests of different lengths"),
        (FlattensRows, 16, "q, k and v may be slices"),
        (SeesWhatIsLeft, 16, "what others left"),
    ],
)
def test_broken_attention_is_caught(mutant: type, block_size: int, promise: str):
    report = check_attention(mutant, block_size)
    assert broken(report, promise), report
