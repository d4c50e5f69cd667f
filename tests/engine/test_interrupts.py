"""Ctrl-C and errors in the middle of a step: the engine stays usable, and nobody else's tokens change."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from stepengine import LLM, SamplingParams
from stepengine.trace import Replay

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
MINE = [[5, 6, 7], [8] * 9, [10]]
OTHERS = [[20, 21], [22, 23, 24, 25], [26]]


def after(calls: int, method: Callable[..., Any], act: Callable[[], None], late: bool = False) -> Callable[..., Any]:
    """The method, but its call number `calls` acts once: before its work, or `late`, after it."""
    seen = [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        now = seen[0] == calls
        if now and not late:
            act()
        result = method(*args, **kwargs)
        if now and late:
            act()
        return result

    return wrapped


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Broken(Exception):
    pass


def fail() -> None:
    raise Broken("once")


@pytest.fixture
def others(tiny: Callable[..., LLM]) -> list[list[int]]:
    """What `OTHERS` say when nothing happens."""
    return [out.outputs[0].token_ids for out in tiny(stage="0").generate(OTHERS, GREEDY)]


def finish_others(llm: LLM, ids: list[int], want: list[list[int]]) -> None:
    """The requests that were there before go on, are handed out once, and the trace agrees."""
    engine, got = llm.engine, {}
    for _ in range(60):
        for out in engine.step():
            assert out.request_id not in got
            got[out.request_id] = out.outputs[0].token_ids
    assert got == dict(zip(ids, want, strict=True))
    told = llm.trace.output_ids()
    assert [list(told[request_id]) for request_id in ids] == want
    assert len(list(Replay(llm.trace))) == len(llm.trace.steps)


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell starts background jobs with SIGINT ignored, and a test run may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


PLACES = [
    ("attention", "forward", 1),
    ("attention", "forward", 2),
    ("attention", "forward", 5),
    ("attention", "forward", 9),
    ("scheduler", "plan", 1),
    ("scheduler", "plan", 4),
    ("scheduler", "update", 1),
    ("scheduler", "update", 4),
    ("scheduler", "add", 2),
    ("model", "logits", 3),
    ("staging", "lay_out", 2),
    ("cache", "commit", 2),
    ("cache", "release", 1),
]


ENGINES: dict[str, dict[str, Any]] = {
    "0": {"stage": "0"},
    "1a": {"stage": "1a"},
    "1b": {"stage": "1b"},
    "pipelined": {"stage": "3", "pipelined": True},
}


def part(llm: LLM, name: str) -> Any:
    engine = llm.engine
    return getattr(engine if name in ("scheduler", "cache") else engine.runner, name)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "method", "calls"), PLACES)
@pytest.mark.parametrize("engine", list(ENGINES))
def test_ctrl_c_in_generate(
    engine: str,
    owner: str,
    method: str,
    calls: int,
    late: bool,
    tiny: Callable[..., LLM],
    others: list[list[int]],
    usable: Callable[[LLM], None],
    monkeypatch: pytest.MonkeyPatch,
):
    if engine == "0" and owner == "cache" and method == "release":
        pytest.skip("the same place as in stage 1a")
    llm = tiny(**ENGINES[engine], max_num_seqs=8)
    ids = [llm.engine.add_request(prompt, GREEDY) for prompt in OTHERS]
    target = part(llm, owner)
    monkeypatch.setattr(target, method, after(calls, getattr(target, method), ctrl_c, late))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(MINE, GREEDY)
    assert signal.getsignal(signal.SIGINT) is handler
    assert set(llm.engine.requests) <= set(ids), "the interrupted prompts are gone"
    finish_others(llm, ids, others)
    usable(llm)


@pytest.mark.parametrize("engine", ["1b", "pipelined"])
@pytest.mark.parametrize("delay", [0.002, 0.01, 0.03])
def test_ctrl_c_at_any_moment(
    delay: float, engine: str, tiny: Callable[..., LLM], others: list[list[int]], usable: Callable[[LLM], None]
):
    llm = tiny(**ENGINES[engine], max_num_seqs=8)
    ids = [llm.engine.add_request(prompt, GREEDY) for prompt in OTHERS]
    early: list[Any] = []
    timer = threading.Timer(delay, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        for _ in range(2000):  # whichever moment it hits
            llm.generate([[30] * 20] * 8, GREEDY.replace(max_tokens=40))
    early += llm.engine.collect()
    got = {out.request_id: out.outputs[0].token_ids for out in early}
    while llm.engine.has_unfinished():
        got |= {out.request_id: out.outputs[0].token_ids for out in llm.engine.step()}
    assert got == dict(zip(ids, others, strict=True))
    usable(llm)


def test_ctrl_c_while_work_is_handed_over(
    tiny: Callable[..., LLM], others: list[list[int]], usable: Callable[[LLM], None], monkeypatch: pytest.MonkeyPatch
):
    """The thread has the work, and the host has not yet noted so: it must not run beside what comes next."""
    llm, handed = tiny(stage="3", pipelined=True, max_num_seqs=8), []
    ids = [llm.engine.add_request(prompt, GREEDY) for prompt in OTHERS]
    stream, attention = llm.engine.runner.stream, llm.engine.runner.attention
    submit, forward = stream._pool.submit, attention.forward

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return forward(*args)

    def interrupted(*args: Any) -> Any:
        handed.append(submit(*args))
        if len(handed) == 1:
            ctrl_c()
        return handed[-1]

    monkeypatch.setattr(attention, "forward", slow)
    monkeypatch.setattr(stream._pool, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.engine.step()
    assert handed[0].done()
    finish_others(llm, ids, others)
    usable(llm)


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 7, 12])
def test_an_error_in_the_forward_pass_costs_a_step_and_no_tokens(
    calls: int,
    combination: dict[str, Any],
    tiny: Callable[..., LLM],
    others: list[list[int]],
    usable: Callable[[LLM], None],
    monkeypatch: pytest.MonkeyPatch,
):
    llm = tiny(max_num_seqs=2, **combination)
    ids = [llm.engine.add_request(prompt, GREEDY) for prompt in OTHERS]
    target = llm.engine.runner.attention
    monkeypatch.setattr(target, "forward", after(calls, target.forward, fail))
    got: dict[int, list[int]] = {}
    failures = 0
    for _ in range(60):
        try:
            got |= {out.request_id: out.outputs[0].token_ids for out in llm.engine.step()}
        except Broken:
            failures += 1
    assert failures == 1
    assert got == dict(zip(ids, others, strict=True))
    assert len(list(Replay(llm.trace))) == len(llm.trace.steps)
    usable(llm)


def test_an_error_in_generate_leaves_the_other_requests(
    tiny: Callable[..., LLM], others: list[list[int]], usable: Callable[[LLM], None], monkeypatch: pytest.MonkeyPatch
):
    llm = tiny(stage="1b", max_num_seqs=8)
    ids = [llm.engine.add_request(prompt, GREEDY) for prompt in OTHERS]
    target = llm.engine.runner.attention
    monkeypatch.setattr(target, "forward", after(5, target.forward, fail))
    with pytest.raises(Broken):
        llm.generate(MINE, GREEDY)
    finish_others(llm, ids, others)
    usable(llm)


def test_generate_hands_out_its_own_and_leaves_the_rest(tiny: Callable[..., LLM], others: list[list[int]]):
    llm = tiny(stage="1b", max_num_seqs=8)
    short = GREEDY.replace(max_tokens=2)
    ids = [llm.engine.add_request(prompt, short) for prompt in OTHERS]
    mine = llm.generate(MINE, GREEDY)
    assert [out.prompt_token_ids for out in mine] == MINE and not {out.request_id for out in mine} & set(ids)
    handed = llm.engine.step()
    assert {out.request_id: out.outputs[0].token_ids for out in handed} == {
        request_id: tokens[:2] for request_id, tokens in zip(ids, others, strict=True)
    }
    assert llm.engine.step() == [] == llm.engine.collect()


def test_in_another_thread_the_engine_runs_too(tiny: Callable[..., LLM], others: list[list[int]]):
    llm, got = tiny(stage="1b"), []
    thread = threading.Thread(target=lambda: got.extend(llm.generate(OTHERS, GREEDY)))
    thread.start()
    thread.join()
    assert [out.outputs[0].token_ids for out in got] == others
