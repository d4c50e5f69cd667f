"""The pipelined engine: it really runs ahead, drops what came too late, and waits where it must."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from stepengine import LLM, SamplingParams
from stepengine.core.plan import StepRecord
from stepengine.trace import Replay

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8] * 19, [9, 10] * 6, [11], [3, 1, 4, 1, 5]]


def both(tiny: Callable[..., LLM], params: Any, **settings: Any) -> tuple[LLM, list[Any], list[Any]]:
    """A pipelined engine that has run the prompts, what it said, and what an engine that waits says."""
    waits, ahead = tiny(stage=3, **settings), tiny(stage=3, pipelined=True, **settings)
    want = [out.outputs for out in waits.generate(PROMPTS, params)]
    return ahead, [out.outputs for out in ahead.generate(PROMPTS, params)], want


def test_a_step_is_launched_before_the_one_before_it_has_landed(tiny: Callable[..., LLM]):
    llm, got, want = both(tiny, GREEDY)
    assert [o[0].token_ids for o in got] == [o[0].token_ids for o in want]
    steps = [record for record in llm.trace.steps if record.plan.chunks]
    overlaps = [later.t_launched <= earlier.t_landed for earlier, later in zip(steps, steps[1:], strict=False)]
    assert sum(overlaps) >= len(steps) - 3, "all but the last steps, when nobody is left to run"
    for record in steps:
        assert record.t_plan <= record.t_run <= record.t_launched <= record.t_landed <= record.t_done
        assert record.t_run <= record.device_began <= record.device_ended <= record.t_landed
    ends = [(record.device_began, record.device_ended) for record in steps]
    assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False)), "one after the other on the device"


def test_the_host_plans_while_the_device_works(tiny: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch):
    """The first step stays on the device until the second has been planned: an engine that waits would hang."""
    llm = tiny(stage=3, pipelined=True)
    planned, plan, forward = threading.Event(), llm.engine.scheduler.plan, llm.engine.runner.attention.forward
    calls: list[int] = []

    def noted() -> Any:
        made = plan()
        calls.append(made.step)
        if len(calls) == 2:
            planned.set()
        return made

    def slow(*args: Any) -> Any:
        assert planned.wait(20), "the second step was not planned while the first one ran"
        return forward(*args)

    monkeypatch.setattr(llm.engine.scheduler, "plan", noted)
    monkeypatch.setattr(llm.engine.runner.attention, "forward", slow)
    assert len(llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids) == 12


@pytest.mark.parametrize("stop", ["token", "max_tokens"])
def test_a_token_that_came_too_late_is_dropped(stop: str, tiny: Callable[..., LLM]):
    waits = tiny(stage=3)
    said = waits.generate([PROMPTS[0]], GREEDY)[0].outputs[0].token_ids
    at = next(i for i, token in enumerate(said) if i >= 3 and token not in said[:i])
    params = GREEDY.replace(stop_token_ids=(said[at],)) if stop == "token" else GREEDY.replace(max_tokens=at + 1)
    llm = tiny(stage=3, pipelined=True)
    output = llm.generate([PROMPTS[0]], params)[0].outputs[0]
    assert output.token_ids == said[: at + 1] == list(llm.trace.output_ids()[0])
    late = [record for record in llm.trace.steps if record.plan.chunks and record.token_ids == (-1,)]
    assert len(late) == (1 if stop == "token" else 0), "an end by length is known in advance"
    assert llm.stats()["tokens_generated"] == at + 1
    assert llm.engine.cache.free_tokens == llm.engine.cache.capacity_tokens


SAMPLED = SamplingParams(temperature=0.9, max_tokens=10, seed=5)


@pytest.mark.parametrize(
    "params",
    [
        SAMPLED,
        SAMPLED.replace(n=3),
        SAMPLED.replace(top_k=4, top_p=0.9, min_p=0.01),
        SAMPLED.replace(repetition_penalty=1.5, frequency_penalty=0.3),
        SAMPLED.replace(min_tokens=6, ignore_eos=False),
        SAMPLED.replace(logprobs=2),
    ],
    ids=lambda params: f"{params.n} {params.top_k} {params.repetition_penalty} {params.min_tokens} {params.logprobs}",
)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_every_setting_draws_the_same(params: SamplingParams, preemption: str, tiny: Callable[..., LLM]):
    llm, got, want = both(tiny, params, preemption=preemption, block_size=4, num_blocks=13)
    assert [[(s.token_ids, s.logprobs and [set(e) for e in s.logprobs]) for s in o] for o in got] == [
        [(s.token_ids, s.logprobs and [set(e) for e in s.logprobs]) for s in o] for o in want
    ]
    assert llm.stats()["preemptions"] > 0
    assert len(list(Replay(llm.trace))) == len(llm.trace.steps)


def test_rows_that_need_the_host_make_the_engine_wait(tiny: Callable[..., LLM]):
    llm = tiny(stage=3, pipelined=True)
    llm.generate([[1, 2, 3]] * 2, [GREEDY, GREEDY.replace(max_tokens=5, repetition_penalty=1.2)])
    steps = llm.trace.steps
    waited = [later.t_plan >= earlier.t_landed for earlier, later in zip(steps, steps[1:], strict=False)]
    assert all(waited[:4]) and not all(waited[5:-1])


def test_fork_and_abort_wait_for_the_step_in_flight(tiny: Callable[..., LLM]):
    llm = tiny(stage=3, pipelined=True)
    engine = llm.engine
    first, second = (engine.add_request(prompt, GREEDY) for prompt in PROMPTS[:2])
    for _ in range(4):
        engine.advance()
    child = engine.fork(first)
    assert engine.output(first).outputs[0].token_ids == engine.output(child).outputs[0].token_ids
    engine.advance()
    engine.abort(second)
    done: dict[int, list[int]] = {}
    while engine.has_unfinished():
        done |= {out.request_id: out.outputs[0].token_ids for out in engine.step()}
    alone = tiny(stage=3).generate([PROMPTS[0]], GREEDY)[0].outputs[0].token_ids
    assert done[first] == done[child] == alone
    assert set(alone) and all(token >= 0 for ids in done.values() for token in ids)
    assert len(list(Replay(llm.trace))) == len(llm.trace.steps)


def test_what_is_shown_while_it_runs_holds_no_placeholder(tiny: Callable[..., LLM]):
    llm = tiny(stage=3, pipelined=True)
    engine, seen = llm.engine, []
    request = engine.add_request(PROMPTS[0], GREEDY)
    engine.claimed.add(request)
    while engine.has_unfinished():
        engine.advance()
        seen.append(list(engine.output(request).outputs[0].token_ids))
    assert all(token >= 0 for ids in seen for token in ids)
    assert all(later[: len(earlier)] == earlier for earlier, later in zip(seen, seen[1:], strict=False))
    pieces = [token for out in llm.stream(PROMPTS[0], GREEDY) for token in out.outputs[0].token_ids]
    assert pieces == seen[-1]


def test_when_all_places_wait_for_their_last_token_nothing_is_lost(tiny: Callable[..., LLM]):
    llm, got, want = both(tiny, [GREEDY.replace(max_tokens=n) for n in (3, 3, 1, 2, 4)], max_num_seqs=2)
    assert [o[0].token_ids for o in got] == [o[0].token_ids for o in want]
    empty: list[StepRecord] = [record for record in llm.trace.steps if not record.plan.chunks]
    assert all(record.token_ids == () for record in empty)
    assert len(list(Replay(llm.trace))) == len(llm.trace.steps)
