"""What is read off a trace, against sums over the drawn lengths."""

from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepengine.bench import runs
from stepengine.bench.usage import block_tokens_per_sequence, usage
from stepengine.bench.workloads import Workload

REQUESTS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)
MAX_LEN = 24


def drawn(requests: list[tuple[int, int]], samples: int = 1) -> Workload:
    prompts = tuple(tuple(range(3, 3 + prompt)) for prompt, _ in requests)
    return Workload("drawn", prompts, tuple(outputs for _, outputs in requests), 0, samples)


def held(requests: list[tuple[int, int]]) -> list[list[int]]:
    """Tokens that each request holds in each of its steps: step k has P + k of them."""
    return [[prompt + k for k in range(outputs)] for prompt, outputs in requests]


@pytest.fixture(scope="module")
def engines(checkpoint):
    made = {}

    def make(stage: str, slots: int, **settings: object):
        key = (stage, slots, *settings.items())
        if key not in made:
            made[key] = runs.build(checkpoint(), stage, slots, MAX_LEN, **settings)
        return made[key]

    return make


@settings(max_examples=15, deadline=None)
@given(REQUESTS, st.sampled_from([1, 3, 8]))
def test_blocks_hold_the_tokens_rounded_up(engines, requests: list[tuple[int, int]], size: int) -> None:
    llm = engines("2", 8, block_size=size)  # room for all: they start in one step and each runs in every step
    found = usage(runs.run(llm, drawn(requests)).trace)
    tokens = held(requests)
    room = [[-(-n // size) * size for n in own] for own in tokens]
    steps = max(len(own) for own in tokens)
    at = [[(own[k], kept[k]) for own, kept in zip(tokens, room, strict=True) if k < len(own)] for k in range(steps)]
    assert (found.steps, found.peak, found.queued_steps, found.preemptions) == (steps, len(requests), 0, 0)
    assert found.worst_waste == max(kept - own for step in at for own, kept in step) <= size - 1
    assert found.utilization == pytest.approx(mean(sum(o for o, _ in step) / sum(k for _, k in step) for step in at))
    assert found.waste_tokens == pytest.approx(mean(mean(kept - own for own, kept in step) for step in at))
    assert found.sequences == pytest.approx(mean(len(step) for step in at))
    pool = 8 * -(-MAX_LEN // size) * size
    assert found.fits == pytest.approx(pool / mean(kept for step in at for _, kept in step))
    assert found.fits == pytest.approx(pool / block_tokens_per_sequence(drawn(requests), size))


@settings(max_examples=8, deadline=None)
@given(REQUESTS)
def test_slots_fit_as_many_as_there_are(engines, requests: list[tuple[int, int]]) -> None:
    found = usage(runs.run(engines("1b", 2), drawn(requests)).trace)
    assert found.fits == pytest.approx(2)
    assert found.peak == min(2, len(requests))
    assert found.sequences == 2 or not found.queued_steps
    assert found.worst_waste == MAX_LEN - min(prompt for prompt, _ in requests)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(6, 12)), min_size=3, max_size=8))
def test_what_runs_again_is_what_runs_beyond_once(engines, requests: list[tuple[int, int]]) -> None:
    once = sum(prompt + outputs - 1 for prompt, outputs in requests)
    done = {}
    for policy in ("recompute", "swap"):
        llm = engines("2", 1, block_size=4, places=8, preemption=policy)
        done[policy] = runs.run(llm, drawn(requests))
        found, counted = usage(done[policy].trace), done[policy].summary
        assert found.recomputed_tokens == counted["tokens_computed"] - once
        assert found.preemptions == counted["preemptions"]
        assert found.worst_waste <= 3
        assert (found.swapped_blocks > 0) == (policy == "swap" and found.preemptions > 0)
    assert usage(done["swap"].trace).recomputed_tokens == 0  # the host has room for all
    assert done["swap"].token_ids == done["recompute"].token_ids


def test_samples_share_and_none_counts_as_run_again(engines) -> None:
    work = drawn([(11, 4), (8, 4)], samples=3)
    done = runs.run(engines("2", 8, block_size=4), work)
    assert [len(tokens) for tokens in done.token_ids] == [outputs for _, outputs in work.sequences] == [4] * 6
    found = usage(done.trace)
    assert found.recomputed_tokens == 0
    assert found.fits > 8 * MAX_LEN / block_tokens_per_sequence(work, 4)


def test_the_bytes_are_the_same_in_every_stage(engines) -> None:
    sizes = {
        engines(stage, 2, **blocks).engine.runner.pool.storage[:, 1:].nbytes
        for stage, blocks in (("1a", {}), ("1b", {}), ("2", {"block_size": 8}), ("2", {"block_size": 3}))
    }
    assert len(sizes) == 1 and sizes.pop() > 0
