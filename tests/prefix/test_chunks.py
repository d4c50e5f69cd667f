"""Chunked prefill in the engine: what each step runs while long prompts arrive, give way, fork and are sampled."""

import pytest

from stepengine.core.request import State
from stepengine.errors import StepEngineError
from stepengine.stage2_paged.scheduler import PagedScheduler
from stepengine.stage4_chunked_prefix.scheduler import BudgetScheduler


def lengths(llm, request):
    """Tokens that each step ran of one request; 0 where it ran none."""
    return [
        next((chunk.length for chunk in step.plan.chunks if chunk.request == request), 0) for step in llm.trace.steps
    ]


@pytest.mark.parametrize(
    ("budget", "chunks"), [(258, [256, 256, 256, 232]), (256, [254, 254, 254, 238]), (2000, [1000])]
)
def test_a_long_prompt_beside_two_decodes(tiny, checkpoint, greedy, naive, drain, budget, chunks):
    llm = tiny(
        stage="4a", model=checkpoint(max_position_embeddings=2048), max_model_len=1024, max_num_batched_tokens=budget
    )
    for _ in range(2):
        llm.engine.add_request([5, 6, 7], greedy(12))
    llm.engine.step()
    long = llm.engine.add_request([at % 400 for at in range(1000)], greedy(3))
    outputs = drain(llm)
    assert lengths(llm, long)[1 : len(chunks) + 3] == [*chunks, 1, 1]
    assert lengths(llm, 0) == lengths(llm, 1) == [3] + [1] * 11  # a token in every step
    assert outputs[0] == outputs[1] == naive([5, 6, 7], greedy(12))
    plan = llm.trace.steps[1].plan
    assert [chunk.request for chunk in plan.chunks] == [0, 1, long]  # decodes first, all in one step


def test_stage_3_makes_decodes_wait_and_stage_4_does_not(tiny, greedy, drain):
    waits = {}
    for stage, more in (("3", {}), ("4a", {"max_num_batched_tokens": 10})):
        llm = tiny(stage=stage, **more)
        llm.engine.add_request([3] * 4, greedy(10))
        llm.engine.step()
        llm.engine.add_request([4] * 40, greedy(2))
        drain(llm)
        ran = lengths(llm, 0)
        waits[stage] = ran[: len(ran) - ran[::-1].index(1)].count(0)
        assert max(step.plan.num_tokens for step in llm.trace.steps) == (40 if stage == "3" else 10)
    assert waits == {"3": 1, "4a": 0}


def test_the_threshold_lets_others_in(tiny, greedy, drain):
    llm = tiny(stage="4a", max_num_batched_tokens=40, long_prefill_token_threshold=16)
    long = llm.engine.add_request([3] * 50, greedy(2))
    short = llm.engine.add_request([4] * 9, greedy(2))
    drain(llm)
    assert lengths(llm, long)[:4] == [16, 16, 16, 2] and lengths(llm, short)[0] == 9


@pytest.mark.parametrize("stage", ["4a", "4"])
@pytest.mark.parametrize("size", [1, 4, 5, 16])
def test_chunks_that_end_on_a_block_and_beside_one(tiny, greedy, drain, naive, stage, size):
    """A full block is sealed at its chunk's end; a boundary off by one would show in the next request's tokens."""
    prompts = [[at % 50 for at in range(length)] for length in (15, 16, 17, 32, 33)]
    for budget in (4, 5, 8, 15, 16, 17):
        llm = tiny(stage=stage, block_size=size, max_num_batched_tokens=budget)
        for prompt in prompts:
            llm.engine.add_request(prompt, greedy(5))
        assert drain(llm) == {i: naive(prompt, greedy(5)) for i, prompt in enumerate(prompts)}
        assert max(step.plan.num_tokens for step in llm.trace.steps) <= budget


@pytest.mark.parametrize("stage", ["4a", "4"])
@pytest.mark.parametrize("how", ["recompute", "swap"])
def test_giving_way_in_mid_prompt(tiny, greedy, drain, naive, how, stage):
    """Two short requests outgrow what a long prompt, admitted beside them, leaves; it gives way half done."""
    llm = tiny(stage=stage, block_size=4, num_blocks=16, preemption=how, max_num_batched_tokens=4)
    asked = [([3] * 4, greedy(26)), ([4] * 4, greedy(26)), ([5] * 28, greedy(4))]
    ids = [llm.engine.add_request(*asked[0]), llm.engine.add_request(*asked[1])]
    for _ in range(6):
        llm.engine.step()
    ids.append(llm.engine.add_request(*asked[2]))
    half_done = []
    while llm.engine.has_unfinished():
        before = {r.id: r.computed for r in llm.engine.requests.values() if r.state is State.RUNNING}
        llm.engine.step()
        plan = llm.trace.steps[-1].plan
        gone = [*plan.preempted, *(swap.request for swap in plan.swapped_out)]
        half_done += [before[r] for r in gone if r == ids[2]]
    assert any(0 < computed < 28 for computed in half_done)
    order = [request for step in llm.trace.steps for request, _ in step.finished]
    assert order == ids
    assert llm.engine.cache.free_tokens == llm.engine.cache.capacity_tokens
    tokens = llm.trace.output_ids()
    assert [[list(tokens[i])] for i in ids] == [naive(*both) for both in asked]


def test_priority_decides_who_gets_the_budget(tiny, greedy, drain):
    llm = tiny(stage="4a", max_num_batched_tokens=8)
    low = llm.engine.add_request([3] * 20, greedy(2), priority=1)
    high = llm.engine.add_request([4] * 20, greedy(2), priority=0)
    drain(llm)
    assert lengths(llm, high)[:4] == [8, 8, 4, 1]
    assert lengths(llm, low)[:5] == [0, 0, 4, 7, 8]  # what is left of the third step, then beside a decode


def test_samples_wait_for_a_prompt_that_takes_several_steps(tiny, greedy, drain, naive):
    for stage in ("4a", "4"):
        params = greedy(6, n=3, temperature=0.8, seed=2)
        llm = tiny(stage=stage, max_num_batched_tokens=8)
        llm.engine.add_request([7] * 35, params)
        assert drain(llm) == {0: naive([7] * 35, params)}
        assert llm.stats()["tokens_computed"] < 35 + 3 * 6 + 3  # the prompt ran once


def test_a_fork_in_mid_prompt(tiny, greedy, drain, naive):
    for stage in ("4a", "4"):
        llm = tiny(stage=stage, max_num_batched_tokens=8, block_size=4)
        parent = llm.engine.add_request([at % 9 for at in range(30)], greedy(5))
        llm.engine.step()
        child = llm.engine.fork(parent)
        outputs = drain(llm)
        assert outputs[child] == outputs[parent] == naive([at % 9 for at in range(30)], greedy(5))


@pytest.mark.parametrize("stage", ["4a", "4"])
def test_a_sample_that_starts_in_the_step_in_which_another_one_copies(tiny, greedy, drain, naive, stage):
    """A step's copies are made all at once, so a block that one of them fills can be nobody's source in that step."""
    params = greedy(9, n=2, temperature=0.9, seed=5)
    llm = tiny(stage=stage)
    other = llm.engine.add_request([9] * 20, greedy(1))  # its block is free again, and holds something
    drain(llm)
    first = llm.engine.add_request([5, 6, 7, 8, 9, 10, 11], params)
    llm.engine.step()
    child = llm.engine.fork(first)  # both hold the prompt's only block, and write to it next
    outputs = drain(llm)
    assert outputs[first] == naive([5, 6, 7, 8, 9, 10, 11], params)
    assert outputs[child][0][:1] == outputs[first][0][:1] and other == 0
    for step in llm.trace.steps:
        assert not {copy.source for copy in step.plan.copies} & {copy.destination for copy in step.plan.copies}
    assert sum(len(step.plan.copies) for step in llm.trace.steps) == 2


@pytest.mark.parametrize("stage", ["4a", "4"])
@pytest.mark.parametrize("how", ["recompute", "swap"])
def test_aborts_in_mid_prompt_and_while_away(tiny, greedy, drain, naive, stage, how):
    prompts = [[token] * 14 for token in (3, 4, 6)]
    for victim in range(3):
        for after in range(0, 16, 3):
            llm = tiny(stage=stage, num_blocks=5, preemption=how, max_num_batched_tokens=6)
            for prompt in prompts:
                llm.engine.add_request(prompt, greedy(30))
            for _ in range(after):
                llm.engine.step()
            llm.engine.abort(victim)
            outputs = drain(llm)
            for i in {0, 1, 2} - {victim}:
                assert outputs[i] == naive(prompts[i], greedy(30))
            assert len(llm.engine.cache.free_slots) == llm.engine.limits.num_host_blocks


def test_a_step_that_fails_in_mid_prompt_loses_nothing(tiny, greedy, naive, monkeypatch):
    llm = tiny(stage="4", max_num_batched_tokens=7, num_blocks=6, preemption="swap")
    asked = [([token] * 20, greedy(12, n=2, temperature=0.8, seed=token)) for token in (3, 4, 3)]
    for prompt, params in asked:
        llm.engine.add_request(prompt, params)
    launch, calls, outputs = llm.engine.runner.launch, [0], {}

    def flaky(plan, requests):
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise RuntimeError("the device fell over")
        return launch(plan, requests)

    monkeypatch.setattr(llm.engine.runner, "launch", flaky)
    while llm.engine.has_unfinished():
        try:
            outputs |= {o.request_id: [s.token_ids for s in o.outputs] for o in llm.engine.step()}
        except RuntimeError:
            continue
    assert calls[0] > 10
    assert outputs == {2 * i: naive(*both) for i, both in enumerate(asked)}
    assert llm.engine.cache.free_tokens == llm.engine.cache.capacity_tokens


def test_a_victim_of_ones_own_making_is_checked(tiny, greedy):
    def make(limits, cache):
        return BudgetScheduler(limits, cache, lambda line: "nobody")

    llm = tiny(stage="4a", scheduler=make, num_blocks=5, block_size=16)
    for token in (3, 4, 6):
        llm.engine.add_request([token] * 14, greedy(30))
    with pytest.raises(StepEngineError, match="pick_victim answered 'nobody'"):
        while llm.engine.has_unfinished():
            llm.engine.step()


def test_each_half_is_what_it_says(tiny):
    parts = {name: tiny(stage=name).stage.parts for name in ("3", "4a", "4b", "4")}
    assert parts["4a"].scheduler is parts["4"].scheduler is BudgetScheduler and parts["4b"].scheduler is PagedScheduler
    assert parts["4b"].cache is parts["4"].cache and parts["4a"].cache is parts["3"].cache
    assert all(entry.attention is parts["3"].attention for entry in parts.values())
