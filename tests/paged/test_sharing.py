"""Samples and forks share blocks, and whoever writes into a shared one gets a copy."""

from collections import Counter

import pytest

from stepengine import SamplingParams
from stepengine.errors import InvalidRequest


@pytest.mark.parametrize(
    ("prompt", "n", "copies"), [(50, 3, 2), (48, 3, 0), (49, 1, 0), (2, 4, 3), (17, 2, 1), (16, 5, 0)]
)
def test_a_prompt_is_stored_once(tiny, greedy, drain, naive, prompt, n, copies):
    params = greedy(9, n=n, temperature=0.9, seed=3)
    llm = tiny(stage=2, max_num_seqs=8)
    llm.engine.add_request([5] * prompt, params)
    llm.engine.step()
    blocks = -(-prompt // 16)
    assert llm.stats()["blocks_used"] == blocks and llm.stats()["blocks_shared"] == 0
    if n > 1:
        llm.engine.step()
        assert llm.stats()["blocks_used"] == blocks + copies
        assert llm.stats()["blocks_shared"] == (blocks if copies == 0 else blocks - 1)
    assert drain(llm) == {0: naive([5] * prompt, params)}
    plans = [step.plan for step in llm.trace.steps]
    assert sum(len(plan.copies) for plan in plans) == llm.stats()["copied_blocks"] == copies
    ran = Counter({chunk.request: chunk for plan in reversed(plans) for chunk in plan.chunks})  # each one's first chunk
    assert [ran[sample].length for sample in range(n)] == [prompt] + [1] * (n - 1)


def test_samples_start_beside_others_and_none_is_overtaken(tiny, greedy, drain, naive):
    llm = tiny(stage=2, max_num_seqs=4)
    asked = {0: ([3] * 20, greedy(6, n=3)), 3: ([4] * 9, greedy(6)), 4: ([9] * 30, greedy(6, n=2))}
    for prompt, params in asked.values():
        llm.engine.add_request(prompt, params)
    assert drain(llm) == {request: naive(*both) for request, both in asked.items()}
    first = {}
    for step in llm.trace.steps:
        for chunk in step.plan.chunks:
            first.setdefault(chunk.request, step.plan.step)
    assert first[0] == first[3] == 0  # request 3 uses the step in which samples 1 and 2 wait for their prompt
    assert first[1] == first[2] == 1
    assert first[4] > 1  # the four places were taken or kept


def test_a_sample_that_comes_late_shares_with_any_that_lives(tiny, greedy, drain, naive):
    params = greedy(5, n=4, temperature=1.0, seed=1)
    llm = tiny(stage=2, max_num_seqs=2)
    llm.engine.add_request([8] * 40, params)
    assert drain(llm) == {0: naive([8] * 40, params)}
    assert llm.stats()["tokens_computed"] < 2 * (40 + 4 * 5)  # the prompt was not run four times


def test_a_fork_shares_everything_and_goes_its_own_way(tiny, drain):
    llm = tiny(stage=2)
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=7, ignore_eos=True)
    parent = llm.engine.add_request([5] * 21, params)
    for _ in range(4):
        llm.engine.step()
    child = llm.engine.fork(parent)
    assert llm.stats()["blocks_shared"] == llm.stats()["blocks_used"] == 2
    outputs = drain(llm)
    assert outputs[child][0][:4] == outputs[parent][0][:4]
    assert outputs[child][0] != outputs[parent][0]
    assert [len(outputs[request][0]) for request in (parent, child)] == [20, 20]
    alone = tiny(stage=2)
    alone.engine.add_request([5] * 21, params)
    assert drain(alone)[0] == outputs[parent]  # the parent is not disturbed
    assert sum(len(step.plan.copies) for step in llm.trace.steps) == 1


def test_a_greedy_fork_repeats_its_parent_in_any_state(tiny, greedy, drain, naive):
    for settings in ({}, {"preemption": "swap", "num_blocks": 5}, {"num_blocks": 5}, {"max_num_seqs": 2}):
        llm = tiny(stage=2, **settings)
        for token in (3, 4, 6):
            llm.engine.add_request([token] * 14, greedy(20))
        forks = {}
        for step in range(9):
            llm.engine.step()
            if step in (0, 3, 8):
                forks |= {llm.engine.fork(request): request for request in (0, 1, 2)}
        outputs = drain(llm)
        for child, parent in forks.items():
            assert outputs[child] == outputs[parent] == naive([(3, 4, 6)[parent]] * 14, greedy(20)), settings


def test_a_fork_can_have_parameters_of_its_own(tiny, greedy, drain, naive):
    llm = tiny(stage=2)
    parent = llm.engine.add_request([5] * 10, greedy(8))
    for _ in range(3):
        llm.engine.step()
    child = llm.engine.fork(parent, greedy(30, logprobs=1))
    outputs = drain(llm)
    assert len(outputs[child][0]) == 30 and outputs[child][0][:8] == outputs[parent][0]
    assert outputs[child] == naive([5] * 10, greedy(30))


def test_bad_forks_are_refused_and_change_nothing(tiny, greedy, drain):
    llm = tiny(stage=2)
    parent = llm.engine.add_request([5] * 10, greedy(8))
    for _ in range(3):
        llm.engine.step()
    before = llm.stats()
    for request, params, words in (
        (99, None, "no request 99"),
        (parent, greedy(8, n=2), "n is 2"),
        (parent, greedy(3), "has 3 outputs"),
        (parent, "hot", "must be SamplingParams"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            llm.engine.fork(request, params)
    assert llm.stats() == before
    drain(llm)
    with pytest.raises(InvalidRequest, match="no request 0"):
        llm.engine.fork(parent)
    earlier = tiny(stage=1)
    earlier.engine.add_request([5] * 10, greedy(8))
    with pytest.raises(InvalidRequest, match="stage 2"):
        earlier.engine.fork(0)
