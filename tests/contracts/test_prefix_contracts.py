"""The contracts of stage 4: our parts keep them, and each mutant, wrong in one way, breaks the promise that says so."""

import pytest

from stepengine.contracts import (
    check_attention,
    check_block_pool,
    check_evictor,
    check_kv_cache,
    check_prefix_cache,
    check_prefix_pool,
    check_scheduler,
)
from stepengine.stage2_paged.block_pool import BlockPool
from stepengine.stage2_paged.cache import PagedCache
from stepengine.stage2_paged.scheduler import PagedScheduler, place_in_line
from stepengine.stage3_flash.attention import FlashAttention
from stepengine.stage4_chunked_prefix.block_pool import LeastRecentlyUsed, PrefixBlockPool, prefix_pool
from stepengine.stage4_chunked_prefix.cache import PrefixCache
from stepengine.stage4_chunked_prefix.prefix_index import HashPrefixIndex, Key, RadixPrefixIndex
from stepengine.stage4_chunked_prefix.scheduler import BudgetScheduler


def broken(report, promise: str) -> bool:
    assert all(failure.example and failure.hint for failure in report.failed)
    return any(failure.promise.startswith(promise) for failure in report.failed)


def with_index(make):
    return lambda limits: PrefixCache(limits, PrefixBlockPool(limits.num_blocks, make()))


def test_our_own_parts_keep_their_contracts():
    for report in (
        check_block_pool(PrefixBlockPool),
        check_prefix_pool(PrefixBlockPool),
        check_prefix_pool(prefix_pool("radix")),
        check_evictor(LeastRecentlyUsed),
        check_kv_cache(PrefixCache),
        *(check_prefix_cache(with_index(HashPrefixIndex), size) for size in (1, 3, 4, 16)),
        *(check_prefix_cache(with_index(RadixPrefixIndex), size) for size in (1, 4)),
        check_scheduler(BudgetScheduler, preempts=True, chunks=True),
        check_attention(FlashAttention, (1, 3, 16)),
    ):
        assert report.ok and not report.remarks, report


# -- caches ---------------------------------------------------------------------------------------


class ToTheLastToken(PrefixCache):
    """A prompt that is cached to its last token leaves nothing to run for its logits."""

    def _found(self, request):
        request.token_ids.append(0)
        blocks = super()._found(request)
        request.token_ids.pop()
        return blocks


class BeforeItIsComputed(PrefixCache):
    """Seals in grow: the second of two requests in one step finds what the first one has yet to compute."""

    def grow(self, request, upto):
        grant = super().grow(request, upto)
        if grant is not None:
            table, full = [*request.blocks, *grant.blocks], upto // self.block_size
            for at in range(self.sealed.get(request.id, 0), full):
                self.pool.seal(table[at], self._keys(request, full)[at])
        return grant


class KeyWithoutItsParent(PrefixCache):
    def _keys(self, request, count):
        return [Key(None, key.tokens, key.salt) for key in super()._keys(request, count)]


class NoSalt(PrefixCache):
    def _keys(self, request, count):
        request.cache_salt = ""
        return super()._keys(request, count)


class PointsAtFreedBlocks(PrefixCache):
    """Takes what it found into the table, but no reference."""

    def grow(self, request, upto):
        share, self.pool.share = self.pool.share, lambda ids: None
        try:
            return super().grow(request, upto)
        finally:
            self.pool.share = share


class AllocatesFirst(PrefixCache):
    """What it found may be evicted for its own new blocks."""

    def grow(self, request, upto):
        hits = self._hits(request) if request.computed and not request.blocks else []
        if hits and len(hits) * self.block_size == request.computed:
            fresh = self._alloc(self._count(upto) - len(hits))
            if fresh is None:
                return None
            self.pool.free(fresh)
            self.pool.alloc(0)
        return super().grow(request, upto)


class PromptsOnly(PrefixCache):
    """Generated tokens are not sealed."""

    def commit(self, request, upto):
        super().commit(request, min(upto, len(request.prompt_ids)))
        return upto


class LooksForThePromptOnly(PrefixCache):
    """A request that comes back after it gave way looks for its prompt, not for its outputs."""

    def _found(self, request):
        return super()._found(request)[: (len(request.prompt_ids) - 1) // self.block_size]


class SealsHalfFullBlocks(PrefixCache):
    """A chunk's last block counts as full."""

    def commit(self, request, upto):
        super().commit(request, min(self._count(upto) * self.block_size, len(request.prompt_ids)))
        return upto


class MissesTheBoundary(PrefixCache):
    """A chunk that ends on a block boundary does not count its last block."""

    def commit(self, request, upto):
        super().commit(request, upto - 1)
        return upto


class FindsOthersKV(HashPrefixIndex):
    """Trusts the hash: with a weak one, another prompt's K/V come back."""

    def __init__(self):
        super().__init__(lambda pair: hash(pair) % 5)

    def _look(self, key):
        super()._look(key)
        key.entry = self._table.get(key.digest)
        return key.entry


@pytest.mark.parametrize(
    ("mutant", "promise"),
    [
        (ToTheLastToken, "a prompt that comes again is found"),
        (BeforeItIsComputed, "nothing is found before it is computed"),
        (KeyWithoutItsParent, "a block is found only after its own beginning"),
        (NoSalt, "a cache_salt keeps requests apart"),
        (PointsAtFreedBlocks, "prompts that begin alike share blocks"),
        (PointsAtFreedBlocks, "in any order, each reads its own"),
        (AllocatesFirst, "what is found cannot be evicted"),
        (PromptsOnly, "generated tokens are found"),
        (LooksForThePromptOnly, "who gave way finds its own blocks"),
        (SealsHalfFullBlocks, "a chunk's full blocks are found"),
        (MissesTheBoundary, "a chunk's full blocks are found"),
        (with_index(FindsOthersKV), "in any order, each reads its own"),
        (PagedCache, "a prompt that comes again is found"),
    ],
)
def test_broken_prefix_caches_are_caught(mutant, promise: str):
    report = check_prefix_cache(mutant)
    assert broken(report, promise), report


@pytest.mark.parametrize("digest", [lambda _: 7, lambda pair: hash(pair) % 3])
def test_collisions_cost_hits_and_nothing_else(digest):
    """What is found with a hash that collides all the time is right; only what must be found is missed."""
    report = check_prefix_cache(with_index(lambda: HashPrefixIndex(digest)))
    assert broken(report, "a prompt that comes again is found")
    right = [promise for promise in report.passed if "each reads its own" in promise or "its own beginning" in promise]
    assert len(right) == 3, report
    assert all("match said" in failure.example for failure in report.failed)


# -- pools ----------------------------------------------------------------------------------------


class ForgetsAtOnce(PrefixBlockPool):
    """A block that nobody holds is free and holds nothing."""

    def _let_go(self, block):
        super()._let_go(block)
        if self._kept:
            while self._kept:
                self._evict()


class CountsOnlyEmptyOnes(PrefixBlockPool):
    @property
    def num_free(self):
        return len(self._free)


class EvictsFirst(PrefixBlockPool):
    """Gives up what is kept although empty blocks are there."""

    def alloc(self, n):
        if 0 < n <= self.num_free:
            while self._kept:
                self._evict()
        return super().alloc(n)


class StaysInTheIndex(PrefixBlockPool):
    """An evicted block is still found: a table points at a block that was freed and holds something else."""

    def _evict(self):
        entry = self.evictor.pick()
        self._kept -= 1
        self._forget(entry.block)


class LosesTwins(PrefixBlockPool):
    """The first of two equal blocks is kept by its entry even when it is given away."""

    def _let_go(self, block):
        entry = self._entries[block]
        if entry is not None and entry.twins:
            self._forget(block)
            return
        super()._let_go(block)


class HandsOutWhatIsHeld(PrefixBlockPool):
    """A hit is not taken from those that may be evicted."""

    def share(self, ids):
        for block in ids:
            self._refs[block] += 1


class FreesRootsFirst(PrefixBlockPool):
    def free(self, ids):
        super().free(list(ids)[::-1])


@pytest.mark.parametrize(
    ("mutant", "promise"),
    [
        (BlockPool, "it has what a prefix cache calls"),
        (ForgetsAtOnce, "it stays when nobody holds it"),
        (CountsOnlyEmptyOnes, "it stays when nobody holds it"),
        (EvictsFirst, "kept blocks give way only"),
        (StaysInTheIndex, "in any order, what is found"),
        (LosesTwins, "equal contents side by side"),
        (HandsOutWhatIsHeld, "in any order, what is found"),
        (FreesRootsFirst, "kept blocks give way only"),
        (lambda n: PrefixBlockPool(n, FindsOthersKV()), "in any order, what is found"),
    ],
)
def test_broken_prefix_pools_are_caught(mutant, promise: str):
    report = check_prefix_pool(mutant)
    assert broken(report, promise), report


# -- evictors -------------------------------------------------------------------------------------


class MostRecent(LeastRecentlyUsed):
    def pick(self):
        return self._released.popitem()[0]


class LowestBlock(LeastRecentlyUsed):
    def pick(self):
        entry = min(self._released, key=lambda entry: entry.block)
        del self._released[entry]
        return entry


class Deaf(LeastRecentlyUsed):
    def taken(self, entry):
        pass


class PicksTwice(LeastRecentlyUsed):
    def pick(self):
        return next(iter(self._released))


class Deepest(LeastRecentlyUsed):
    """Another policy that keeps the promise: the longest beginning goes first."""

    def pick(self):
        def depth(entry):
            return 0 if entry.parent is None else 1 + depth(entry.parent)

        entry = max(self._released, key=depth)
        del self._released[entry]
        return entry


@pytest.mark.parametrize(
    ("mutant", "promise"),
    [
        (MostRecent, "no entry is picked before those"),
        (MostRecent, "stage 4's pool runs with it"),
        (LowestBlock, "so it is in any tree"),
        (Deaf, "an entry that is held again"),
        (PicksTwice, "each released entry is picked once"),
        (object, "it has what a pool calls"),
    ],
)
def test_broken_evictors_are_caught(mutant, promise: str):
    report = check_evictor(mutant)
    assert broken(report, promise), report


def test_another_policy_may_be_right():
    assert check_evictor(Deepest).ok, check_evictor(Deepest)


# -- schedulers -----------------------------------------------------------------------------------


class DecodesLast(BudgetScheduler):
    """Prompts take the whole budget; decodes get what is left."""

    def _go_on(self, moves):
        chunks, left = [], self.limits.max_num_batched_tokens
        line = sorted((r for r in self.running.values() if r.due), key=lambda r: (r.due == 1, place_in_line(r)))
        for request in line:
            most = min(request.due, self.longest_chunk, left)
            grant = self.cache.grow(request, request.scheduled + most) if most else None
            if grant is not None:
                chunks.append(moves.schedule(request, grant, most))
                left -= chunks[-1].length
        return chunks


class OneChunkAStep(BudgetScheduler):
    """Starts one prompt a step, however much is left."""

    def _admit(self, moves, left):
        waiting, self.waiting = self.waiting, self.waiting[:1]
        chunks, blocked = super()._admit(moves, min(left, 3))
        self.waiting = [r for r in waiting if r in self.waiting or r not in waiting[:1]]
        return chunks, blocked


class NoLimit(BudgetScheduler):
    """Forgets long_prefill_token_threshold."""

    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.longest_chunk = self.limits.max_num_batched_tokens


class OverTheBudget(BudgetScheduler):
    """Decodes do not count."""

    def _admit(self, moves, left):
        return super()._admit(moves, self.limits.max_num_batched_tokens)


class PromptsGiveWay(BudgetScheduler):
    """A prompt that finds no block gives way itself, even if it is the first in line."""

    def _choose(self, line):
        return line[0] if line[0].due > 1 else super()._choose(line)


@pytest.mark.parametrize(
    ("mutant", "promise"),
    [
        (PagedScheduler, "a 1000-token prompt fills"),
        (DecodesLast, "whoever decodes has a token"),
        (OneChunkAStep, "a 1000-token prompt fills"),
        (NoLimit, "no chunk is above"),
        (OverTheBudget, "prompts in pieces"),
        (PromptsGiveWay, "in mid-prompt too"),
    ],
)
def test_broken_budgets_are_caught(mutant: type, promise: str):
    report = check_scheduler(mutant, preempts=True, chunks=True)
    assert broken(report, promise), report
