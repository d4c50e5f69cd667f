"""The step player on a running engine, from code and as the page drives it, without a browser."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stepengine import LLM, SamplingParams
from stepengine.errors import InvalidSetting, TraceError
from stepengine.stage2_paged.scheduler import PagedScheduler
from stepengine.trace import save
from stepengine.viz.payload import packed, player_data
from stepengine.viz.player import StepPlayer


def engine(stage: Any = 1, **settings: Any) -> LLM:
    return LLM("tiny-random", stage=stage, trace=True, max_model_len=64, **settings)


def add(llm: LLM, prompt: int = 12, tokens: int = 4, first: int = 3) -> int:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return llm.engine.add_request(list(range(first, first + prompt)), params)


def shown(player: StepPlayer) -> dict[str, Any]:
    return json.loads(player.data)


@pytest.mark.parametrize("stage", [0, "1a", "1b", 2, 3, "4a", "4b", 4])
def test_step_runs_the_engine_and_shows_what_it_recorded(stage: Any) -> None:
    llm = engine(stage)
    for tokens in (3, 5):
        add(llm, tokens=tokens)
    player = StepPlayer(llm)
    assert player.live and repr(player) == "StepPlayer(2 requests, 0 steps, live)"
    assert shown(player)["blank"] == 1
    assert shown(player)["steps"][0]["say"] == "Nothing has run yet: 2 requests wait. Step runs the engine."
    assert all(request["wait"] == [[0, 0]] for request in shown(player)["requests"])
    steps = 0
    while llm.engine.has_unfinished():
        assert player.step_engine() is True
        steps += 1
        assert (player.step, len(llm.trace.steps), llm.stats()["steps"]) == (steps - 1, steps, steps)
        assert len(shown(player)["steps"]) == steps and "blank" not in shown(player)
    assert player.step_engine() is False and llm.stats()["steps"] == steps
    assert player.notice == "Every request has ended: add one with llm.engine.add_request(...), then press Step."
    alone = LLM("tiny-random", stage=stage, max_model_len=64)
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (3, 5)]
    texts = alone.generate([list(range(3, 15))] * 2, params)
    assert [output.outputs[0].token_ids for output in llm.engine.collect()] == [o.outputs[0].token_ids for o in texts]


def test_what_grew_step_by_step_is_what_a_recorded_trace_gives() -> None:
    """Also past eight requests, where letters become numbers, with preemption, sharing and a fork."""
    llm = engine(4, num_blocks=9, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
    player, forked = StepPlayer(llm), False
    for i in range(11):
        add(llm, 6 + i, 3 + i % 7, first=3 + i % 3)
        for _ in range(3):
            player.step_engine()
        if not forked and i == 3:
            llm.engine.fork(next(iter(llm.engine.requests)))
            forked = True
    while player.step_engine():
        pass
    assert any(record.plan.preempted for record in llm.trace.steps) and forked
    assert shown(player) == json.loads(json.dumps(packed(player_data(llm.trace))))
    assert shown(player)["requests"][10]["label"] == "10"


def test_a_pipelined_engine_is_stepped_until_it_has_recorded() -> None:
    llm = engine(4, pipelined=True)
    add(llm, tokens=4)
    add(llm, tokens=6)
    player = StepPlayer(llm.engine)
    for t in range(20):
        if not player.step_engine():
            break
        assert player.step == t < len(llm.trace.steps)
    assert not llm.engine.has_unfinished()
    assert player.notice == "Every request has ended: add one with engine.add_request(...), then press Step."
    assert shown(player) == json.loads(json.dumps(packed(player_data(llm.trace))))


def test_the_page_asks_by_counting_and_python_answers() -> None:
    llm = engine(2)
    player = StepPlayer(llm)
    player.asked += 1
    assert player.answered == 1 and player.notice.startswith("No request yet: add one with llm.engine.add_request")
    add(llm, tokens=3)
    player.asked += 1
    assert (player.answered, player.step, player.notice, len(llm.trace.steps)) == (2, 0, "", 1)
    add(llm, tokens=2)  # from another cell
    player.asked += 1
    assert player.step == 1 and [chunk[0] for chunk in shown(player)["steps"][1]["chunks"]] == [1]
    player.step = 0  # looking back runs nothing
    assert len(llm.trace.steps) == 2


def test_steps_that_other_cells_ran_are_shown_before_new_ones() -> None:
    llm = engine(2)
    add(llm, tokens=9)
    player = StepPlayer(llm)
    player.step_engine()
    llm.engine.advance()
    llm.engine.advance()
    player.step_engine()
    assert len(llm.trace.steps) == 3 and player.step == 1 and len(shown(player)["steps"]) == 3


class Breaks(PagedScheduler):
    """Fails in its third step."""

    def plan(self) -> Any:
        if self.step_number == 2:
            raise ZeroDivisionError("no such thing as half a block")
        return super().plan()

    @property
    def step_number(self) -> int:
        self.calls = getattr(self, "calls", -1) + 1
        return self.calls


def test_an_error_of_the_engine_is_shown_and_kept() -> None:
    llm = engine(2, scheduler=Breaks)
    add(llm, tokens=9)
    player = StepPlayer(llm)
    for _ in range(3):
        player.asked += 1
    assert player.notice == "The engine stopped. ZeroDivisionError: no such thing as half a block"
    assert isinstance(player.error, ZeroDivisionError) and player.answered == 3 and player.step == 1
    player.asked += 1  # the engine stays usable
    assert player.notice == "" and player.error is None and player.step == 2
    llm = engine(2, scheduler=Breaks)
    add(llm, tokens=9)
    player = StepPlayer(llm)
    player.step_engine(), player.step_engine()
    with pytest.raises(ZeroDivisionError):
        player.step_engine()
    assert "half a block" in player.notice


def test_what_cannot_be_played_is_refused_in_a_sentence(tmp_path: Path) -> None:
    plain = LLM("tiny-random", stage=1, max_model_len=64)
    for source in (plain, plain.engine):
        with pytest.raises(InvalidSetting, match=r"records nothing.*LLM\(\.\.\., trace=True\)"):
            StepPlayer(source)
    with pytest.raises(InvalidSetting, match="of type int, which cannot be played"):
        StepPlayer(3)
    with pytest.raises(TraceError, match="no trace file"):
        StepPlayer(tmp_path / "run.jsonl")
    llm = engine(1)
    with pytest.raises(TraceError, match="Nothing is recorded yet"):
        StepPlayer(llm).save_html(tmp_path / "player.html")
    with pytest.raises(InvalidSetting, match="step_engine"):
        StepPlayer(llm, step=4)


def test_a_saved_trace_plays_from_its_path_and_has_no_engine_to_step(tmp_path: Path) -> None:
    llm = engine(2)
    llm.generate([[3, 4, 5]], SamplingParams(max_tokens=4, temperature=0))
    path = save(llm.trace, tmp_path / "run.jsonl.gz")
    for source in (path, str(path)):
        player = StepPlayer(source)
        assert shown(player) == shown(StepPlayer(llm.trace)) and not player.live
        player.asked += 1
        assert player.answered == 1 and player.step == 0
        with pytest.raises(InvalidSetting, match="no engine to step"):
            player.step_engine()


def test_a_live_player_saves_what_is_recorded_as_a_page_without_an_engine(tmp_path: Path) -> None:
    llm = engine(2)
    add(llm, tokens=5)
    player = StepPlayer(llm)
    player.step_engine()
    llm.engine.advance()
    page = player.save_html(tmp_path / "player.html").read_text(encoding="utf-8")
    traits = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S).group(1))  # type: ignore[union-attr]
    assert traits["live"] is False and len(json.loads(traits["data"])["steps"]) == 2
    assert "<title>StepPlayer(1 request, 2 steps)</title>" in page
    with pytest.raises(InvalidSetting, match="There is no folder"):
        player.save_html(tmp_path / "nowhere" / "player.html")


def test_the_step_is_checked_against_what_is_recorded_by_now() -> None:
    llm = engine(1)
    add(llm, tokens=5)
    player = StepPlayer(llm)
    player.step_engine()
    with pytest.raises(InvalidSetting, match=r"use 0 to 0; step_engine\(\) runs the next one"):
        player.step = 1
    player.step_engine()
    player.step = -1
    assert player.step == 1
