"""The contracts pass what is right and catch what is wrong: each mutant breaks one promise."""

from collections.abc import Callable

import pytest

from stepengine.contracts import check_kv_cache, check_scheduler
from stepengine.core.plan import StepPlan
from stepengine.core.request import Request, State
from stepengine.core.seams import Grant
from stepengine.stage0_naive.cache import NoCache
from stepengine.stage0_naive.scheduler import StaticScheduler
from stepengine.stage1_kvcache.cache import SlotCache
from stepengine.stage1_kvcache.scheduler import ContinuousScheduler


def test_our_own_parts_keep_their_contracts():
    assert check_scheduler(ContinuousScheduler).ok
    assert check_scheduler(StaticScheduler, continuous=False).ok
    assert check_kv_cache(SlotCache).ok
    assert check_kv_cache(NoCache, block_size=0).ok


def test_static_batching_leaves_places_idle():
    report = check_scheduler(StaticScheduler)
    assert [failure.promise for failure in report.failed] == ["a place that falls free is taken in the very next step"]
    assert "place-steps stood empty" in report.failed[0].example


class Leaks(SlotCache):
    def release(self, request: Request) -> None:
        request.blocks.clear()


class GrantsTwice(SlotCache):
    def grow(self, request: Request, upto: int) -> Grant | None:
        return Grant() if request.blocks else Grant((1,))


class ClaimsMore(SlotCache):
    def commit(self, request: Request, upto: int) -> int:
        return upto + 1


class TakesThenFails(SlotCache):
    def grow(self, request: Request, upto: int) -> Grant | None:
        slot = self.free_slots.pop() if self.free_slots else 0
        return super().grow(request, upto) if slot == 4 else None


class ForgetsOne(SlotCache):
    def commit(self, request: Request, upto: int) -> int:
        return upto - 1


class Explodes:
    def __init__(self, limits: object) -> None:
        raise RuntimeError("not finished yet")


@pytest.mark.parametrize(
    ("mutant", "word"),
    [
        (Leaks, "release gives everything back"),
        (GrantsTwice, "no block is ever in two tables"),
        (ClaimsMore, "commit never claims"),
        (TakesThenFails, "a full cache answers None"),
        (Explodes, "a new cache is empty"),
    ],
)
def test_broken_caches_are_caught(mutant: type, word: str):
    report = check_kv_cache(mutant)
    assert not report.ok
    assert any(failure.promise.startswith(word) for failure in report.failed), str(report)
    assert all(failure.example and failure.hint for failure in report.failed)


def test_a_wasteful_cache_passes_with_a_remark():
    report = check_kv_cache(ForgetsOne)
    assert report.ok
    assert "wasteful" in str(report)


class RunningIsNeverUpdated(ContinuousScheduler):
    """E12's first fault: what was admitted runs once and is forgotten."""

    def plan(self) -> StepPlan:
        plan = super().plan()
        self.running = {chunk.request: self.running[chunk.request] for chunk in plan.chunks}
        return plan


class AdmitsBeforeItRemoves(ContinuousScheduler):
    """E12's second fault: places of ended requests are counted as taken for one step more."""

    lingering = 0

    def plan(self) -> StepPlan:
        places, self.limits = self.limits, vars(self).get("limits")
        object.__setattr__(self.limits, "max_num_seqs", places.max_num_seqs - self.lingering)
        plan = super().plan()
        object.__setattr__(self.limits, "max_num_seqs", places.max_num_seqs + self.lingering)
        self.lingering = 0
        return plan

    def update(self, plan: StepPlan, token_ids: list[int]) -> list[tuple[int, str]]:
        ended = super().update(plan, token_ids)
        self.lingering = len(ended) if self.running else 0
        return ended


class LastComeFirst(ContinuousScheduler):
    def add(self, request: Request) -> None:
        self.waiting.insert(0, request)
        self.arrived.append(request.id)


class BooksLateResults(ContinuousScheduler):
    def finish(self, request_id: int, reason: str) -> None:
        request = self.running.get(request_id)
        super().finish(request_id, reason)
        if request is not None and reason == "abort":
            self.running[request_id] = request
            request.state = State.RUNNING


class NeverSaysWhoCame(ContinuousScheduler):
    def plan(self) -> StepPlan:
        return super().plan()._replace(arrived=())


class TakesTooMany(ContinuousScheduler):
    def __init__(self, limits, cache) -> None:
        super().__init__(limits, cache)
        self.limits = type(limits)(limits.max_num_seqs + 1, limits.max_num_batched_tokens, limits.max_model_len)
        cache.free.append(limits.num_blocks + 1)


@pytest.mark.parametrize(
    ("mutant", "word"),
    [
        (RunningIsNeverUpdated, "every request runs all its tokens"),
        (AdmitsBeforeItRemoves, "a place that falls free"),
        (LastComeFirst, "the queue is in order"),
        (BooksLateResults, "an abort ends a request"),
        (NeverSaysWhoCame, "the plan names each arrival"),
        (TakesTooMany, "every request runs all its tokens"),
    ],
)
def test_broken_schedulers_are_caught(mutant: Callable, word: str):
    report = check_scheduler(mutant)
    assert any(failure.promise.startswith(word) for failure in report.failed), str(report)
    assert all(failure.example and failure.hint for failure in report.failed)
