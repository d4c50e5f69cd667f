"""A pool that is too small: who gives way, what it costs, and that nobody is forgotten."""

import pytest
import torch

from stepengine.core.request import State
from stepengine.errors import InvalidRequest

PROMPTS = [[token] * 14 for token in (3, 4, 6)]


def preemptions(llm):
    """(step, request, how) of every preemption in the trace."""
    found = []
    for step in llm.trace.steps:
        found += [(step.plan.step, request, "recompute") for request in step.plan.preempted]
        found += [(step.plan.step, swap.request, "swap") for swap in step.plan.swapped_out]
    return found


@pytest.mark.parametrize("how", ["recompute", "swap"])
def test_the_youngest_gives_way_and_comes_back_before_newer_ones(tiny, greedy, drain, naive, how):
    llm = tiny(stage=2, num_blocks=5, preemption=how)
    for prompt in PROMPTS:
        llm.engine.add_request(prompt, greedy(30))
    outputs = drain(llm)
    assert outputs == {i: naive(prompt, greedy(30)) for i, prompt in enumerate(PROMPTS)}
    gone = preemptions(llm)
    assert gone and {entry[2] for entry in gone} == {how}
    victims = [request for _, request, _ in gone]
    assert 0 not in victims  # the oldest never gives way
    for step, victim, _ in gone:
        running = {chunk.request for chunk in llm.trace.steps[step].plan.chunks}
        assert all(request < victim for request in running)
    order = [request for record in llm.trace.steps for request, _ in record.finished]
    assert order == [0, 1, 2]


def test_priority_goes_before_age(tiny, greedy, drain):
    llm = tiny(stage=2, num_blocks=5)
    for prompt, priority in zip(PROMPTS, (2, 0, 1), strict=True):
        llm.engine.add_request(prompt, greedy(30), priority=priority)
    drain(llm)
    assert preemptions(llm)[0][1] == 0  # the oldest, but of the lowest priority
    assert [request for record in llm.trace.steps for request, _ in record.finished] == [1, 2, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_swapped_blocks_come_back_bit_by_bit(tiny, greedy, dtype):
    llm = tiny(stage=2, num_blocks=5, preemption="swap", dtype=dtype)
    for prompt in PROMPTS:
        llm.engine.add_request(prompt, greedy(30))
    engine, storage = llm.engine, llm.engine.runner.pool.storage
    held, compared = {}, 0
    while engine.has_unfinished():
        for request in engine.requests.values():
            if request.state is State.RUNNING and request.blocks:
                kv = storage[:, request.blocks].transpose(1, 3).flatten(3, 4)  # [layers, Hk, 2, tokens, D]
                held[request.id] = kv[..., : request.computed, :].clone()
        engine.step()
        for swap in llm.trace.steps[-1].plan.swapped_in:
            request = engine.requests.get(swap.request)
            if request is not None and request.blocks:
                kv = storage[:, request.blocks].transpose(1, 3).flatten(3, 4)
                before = held[swap.request]
                assert torch.equal(kv[..., : before.shape[-2], :], before)
                compared += 1
    assert compared > 0
    counted = sum(len(s.pairs) for step in llm.trace.steps for s in step.plan.swapped_out + step.plan.swapped_in)
    assert llm.stats()["swapped_bytes"] == counted * engine.runner.pool.block_bytes
    assert len(engine.cache.free_slots) == llm.engine.limits.num_host_blocks


def test_a_full_host_recomputes(tiny, greedy, drain, naive):
    block = tiny(stage=2).engine.runner.pool.block_bytes
    for blocks, expected in ((0, {"recompute"}), (1, {"recompute", "swap"})):
        llm = tiny(stage=2, num_blocks=5, preemption="swap", swap_space=blocks * block)
        for prompt in PROMPTS:
            llm.engine.add_request(prompt, greedy(30))
        assert drain(llm) == {i: naive(prompt, greedy(30)) for i, prompt in enumerate(PROMPTS)}
        assert {how for _, _, how in preemptions(llm)} <= expected
        assert preemptions(llm)


def test_recomputing_costs_tokens_and_swapping_bytes(tiny, greedy, drain):
    found = {}
    for how in ("recompute", "swap"):
        llm = tiny(stage=2, num_blocks=5, preemption=how)
        for prompt in PROMPTS:
            llm.engine.add_request(prompt, greedy(30))
        drain(llm)
        found[how] = llm.stats()
    needed = sum(len(prompt) + 30 - 1 for prompt in PROMPTS)
    assert found["swap"]["tokens_computed"] == needed < found["recompute"]["tokens_computed"]
    assert found["recompute"]["swapped_bytes"] == 0 < found["swap"]["swapped_bytes"]
    assert found["swap"]["preemptions"] == found["recompute"]["preemptions"] > 0


@pytest.mark.parametrize("how", ["recompute", "swap"])
def test_aborts_in_any_state_give_everything_back(tiny, greedy, drain, naive, how):
    for victim in range(3):
        for after in range(12):
            llm = tiny(stage=2, num_blocks=5, preemption=how)
            for prompt in PROMPTS:
                llm.engine.add_request(prompt, greedy(30))
            for _ in range(after):
                llm.engine.step()
            llm.engine.abort(victim)
            outputs = drain(llm)
            for i in {0, 1, 2} - {victim}:
                assert outputs[i] == naive(PROMPTS[i], greedy(30))
            assert len(llm.engine.cache.free_slots) == llm.engine.limits.num_host_blocks


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(tiny, greedy):
    llm = tiny(stage=2, num_blocks=2)
    with pytest.raises(InvalidRequest, match="may grow to 33 tokens and the whole K/V cache holds 32"):
        llm.engine.add_request([3] * 13, greedy(20))
    llm.engine.add_request([3] * 12, greedy(20))


def test_a_step_that_fails_after_its_moves_loses_nothing(tiny, greedy, drain, naive, monkeypatch):
    """The bookkeeping trusts a plan's copies and swaps, so they are carried out even if the tokens never run."""
    llm = tiny(stage=2, num_blocks=5, preemption="swap")
    asked = [(prompt, greedy(12, n=2, temperature=0.8, seed=i)) for i, prompt in enumerate(PROMPTS)]
    for prompt, params in asked:
        llm.engine.add_request(prompt, params)
    run, calls, outputs = llm.engine.runner.run, [0], {}

    def flaky(plan, requests):
        calls[0] += 1
        if calls[0] % 2:
            raise RuntimeError("the device fell over")
        return run(plan, requests)

    monkeypatch.setattr(llm.engine.runner, "run", flaky)
    while llm.engine.has_unfinished():
        try:
            outputs |= {o.request_id: [s.token_ids for s in o.outputs] for o in llm.engine.step()}
        except RuntimeError:
            continue
    assert outputs == {2 * i: naive(*both) for i, both in enumerate(asked)}
    assert llm.engine.cache.free_tokens == llm.engine.cache.capacity_tokens
