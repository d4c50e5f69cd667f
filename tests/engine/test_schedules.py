"""Whatever arrives, waits, is preferred or aborted: each request has the tokens that it has alone in stage 0."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepengine import LLM, SamplingParams
from stepengine.core.request import State
from stepengine.trace import Replay

MAX_LEN = 40


@dataclass(frozen=True)
class Ask:
    """One request of a schedule: it arrives before step `arrives` and may be aborted before step `aborted`."""

    arrives: int
    prompt_tokens: int
    max_tokens: int
    priority: int
    aborted: int | None

    def prompt(self, number: int) -> list[int]:
        draw = random.Random(self.prompt_tokens * 31 + number % 3)
        return [draw.randrange(499) for _ in range(self.prompt_tokens)]


asks = st.builds(
    Ask,
    arrives=st.integers(0, 12),
    prompt_tokens=st.one_of(st.integers(1, MAX_LEN - 1), st.sampled_from([1, MAX_LEN - 1])),
    max_tokens=st.integers(1, 10),
    priority=st.integers(-2, 2),
    aborted=st.one_of(st.none(), st.none(), st.integers(0, 20)),
)


@pytest.fixture(scope="module")
def alone(checkpoint: Callable[..., Path]) -> Callable[[list[int]], list[int]]:
    """alone(prompt) -> ten tokens of stage 0, the request by itself."""
    llm = LLM(checkpoint(), stage="0", max_num_seqs=1, max_model_len=MAX_LEN + 10)
    known: dict[tuple[int, ...], list[int]] = {}

    def run(prompt: list[int]) -> list[int]:
        if tuple(prompt) not in known:
            params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
            known[tuple(prompt)] = llm.generate([prompt], params)[0].outputs[0].token_ids
        return known[tuple(prompt)]

    return run


def check_pool(llm: LLM) -> None:
    """No block belongs to two, and what is not free is held."""
    held = [block for request in llm.engine.requests.values() for block in request.blocks]
    cache = llm.engine.cache
    if shares_prefixes(llm):
        assert all(cache.pool.refs(block) == count for block, count in Counter(held).items())
        held = list(set(held))
    assert len(held) == len(set(held)) and 0 not in held
    assert cache.free_tokens + len(held) * llm.engine.limits.block_size == cache.capacity_tokens
    for request in llm.engine.requests.values():
        assert request.state is State.RUNNING or not request.blocks


def shares_prefixes(llm: LLM) -> bool:
    """Whether requests that begin alike hold the same blocks."""
    return hasattr(getattr(llm.engine.cache, "pool", None), "find")


def play(llm: LLM, schedule: list[Ask]) -> tuple[dict[int, Any], dict[int, int]]:
    """Run a schedule; outputs by request id, and which ask each id was."""
    engine, outputs, numbers = llm.engine, {}, {}
    pending = sorted(range(len(schedule)), key=lambda number: schedule[number].arrives)
    t = 0
    while pending or engine.has_unfinished():
        while pending and (schedule[pending[0]].arrives <= t):
            number = pending.pop(0)
            ask = schedule[number]
            params = SamplingParams(temperature=0, max_tokens=ask.max_tokens, ignore_eos=True)
            numbers[engine.add_request(ask.prompt(number), params, ask.priority)] = number
        for request_id, number in numbers.items():
            if schedule[number].aborted == t:
                engine.abort(request_id)
                check_pool(llm)
        for out in engine.step():
            assert out.request_id not in outputs, "handed out twice"
            outputs[out.request_id] = out
        check_pool(llm)
        t += 1
        assert t < 400, "no end in sight"
    for out in engine.step():  # aborted when nothing else was left
        assert out.request_id not in outputs
        outputs[out.request_id] = out
    return outputs, numbers


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    schedule=st.lists(asks, min_size=1, max_size=8),
    max_num_seqs=st.integers(1, 4),
    budget=st.integers(MAX_LEN, 2 * MAX_LEN),
)
def test_every_survivor_has_the_tokens_it_has_alone(
    schedule: list[Ask],
    max_num_seqs: int,
    budget: int,
    combination: dict[str, Any],
    checkpoint: Callable[..., Path],
    alone: Callable[[list[int]], list[int]],
    judge: Callable[[Path], Any],
):
    budget = combination.get("max_num_batched_tokens", budget)
    limits = {"max_num_seqs": max_num_seqs, "max_model_len": MAX_LEN, "max_num_batched_tokens": budget}
    llm = LLM(checkpoint(), trace=True, **{**combination, **limits})
    outputs, numbers = play(llm, schedule)
    assert outputs.keys() == numbers.keys()
    for request_id, out in outputs.items():
        ask = schedule[numbers[request_id]]
        prompt, sample = ask.prompt(numbers[request_id]), out.outputs[0]
        whole = min(ask.max_tokens, MAX_LEN - ask.prompt_tokens)
        if sample.finish_reason == "abort":
            assert ask.aborted is not None and len(sample.token_ids) < whole
        else:
            assert sample.finish_reason == "length" and len(sample.token_ids) == whole
        if sample.token_ids:
            judge(checkpoint()).check_same(prompt, sample.token_ids, alone(prompt)[: len(sample.token_ids)])
    cache = llm.engine.cache
    assert cache.free_tokens == cache.capacity_tokens and not llm.engine.requests
    check_trace(llm, outputs, budget, max_num_seqs)


def check_trace(llm: LLM, outputs: dict[int, Any], budget: int, max_num_seqs: int) -> None:
    """The trace tells the same story, within the limits, and contradicts itself nowhere."""
    for snapshot in Replay(llm.trace):
        rows = [chunk.request for chunk in snapshot.chunks]
        assert len(rows) == len(set(rows)) <= max_num_seqs
        assert all(chunk.length >= 1 for chunk in snapshot.chunks)
        assert shares_prefixes(llm) or all(count == 1 for count in snapshot.refs.values())
        fresh = [chunk for chunk in snapshot.chunks if chunk.end == len(llm.trace.requests[chunk.request].prompt_ids)]
        if fresh:
            assert sum(chunk.length for chunk in fresh) <= budget
    told = llm.trace.output_ids()
    assert {request_id: list(told[request_id]) for request_id in outputs} == {
        request_id: out.outputs[0].token_ids for request_id, out in outputs.items()
    }
    ended = [pair for record in llm.trace.steps for pair in (*record.finished, *record.aborted)]
    assert sorted(ended) == sorted((i, out.outputs[0].finish_reason) for i, out in outputs.items())


@pytest.mark.parametrize("stage", ["0", "1a", "1b"])
def test_a_lower_priority_number_starts_first_and_ties_go_by_arrival(stage: str, tiny: Callable[..., LLM]):
    llm = tiny(stage=stage, max_num_seqs=1)
    priorities = [3, 0, -1, 0, 3, -1]
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    for priority in priorities:
        llm.engine.add_request([5, 6], params, priority)
    while llm.engine.has_unfinished():
        llm.engine.step()
    firsts = [chunk.request for record in llm.trace.steps for chunk in record.plan.chunks if chunk.end == 2]
    assert firsts == sorted(range(6), key=lambda number: (priorities[number], number))


def test_a_newcomer_of_continuous_batching_runs_in_the_very_next_step(tiny: Callable[..., LLM]):
    llm = tiny(stage="1b", max_num_seqs=2)
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    engine.add_request([5, 6, 7], params)
    for _ in range(3):
        engine.step()
    late = engine.add_request([8] * 5, params)
    engine.step()
    assert [(chunk.request, chunk.start, chunk.length) for chunk in llm.trace.steps[-1].plan.chunks] == [(late, 0, 5)]
    engine.step()
    assert len(llm.trace.steps[-1].plan.chunks) == 2
