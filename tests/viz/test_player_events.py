"""Kinds of events and blocks that stay findable, in the player's data; its colours' contrast; the command."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from stepengine import LLM, SamplingParams
from stepengine.cli import main
from stepengine.trace import Replay, Trace, save
from stepengine.viz.payload import player_data
from stepengine.viz.template import HUES, WHITE_INK, contrast, readable

sys.path.insert(0, str(Path(__file__).parent.parent / "trace"))
from synthetic import Job, simulate, simulate_paged  # noqa: E402

CSS = (Path(__file__).parents[2] / "stepengine/viz/static/player.css").read_text(encoding="utf-8")
MIXED = [Job(14, 20, n=3), Job(9, 22), Job(16, 16, n=2)]


def served(stage: Any = 4, **settings: Any) -> Trace:
    llm = LLM("tiny-random", stage=stage, trace=True, block_size=4, max_model_len=64, **settings)
    prompts = [[3 + k for k in range(12)] + [60 + i] * (2 + i) for i in range(4)]
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    for prompt in prompts:
        llm.generate(prompt, params)
    llm.generate(prompts, params)
    assert llm.trace is not None
    return llm.trace


@pytest.mark.parametrize(
    "trace",
    [
        simulate(stage="1b"),
        simulate_paged(MIXED, num_blocks=20, preemption="swap", host_blocks=9).trace,
        simulate_paged([Job(10, 14), Job(7, 9)], num_blocks=30, forks={3: 0}).trace,
        served(num_blocks=20),
    ],
    ids=["slots", "swap", "fork", "prefix"],
)
def test_every_step_says_what_kinds_of_events_it_has(trace: Trace) -> None:
    data = player_data(trace)
    found = set()
    for step, record in zip(data["steps"], trace.steps, strict=True):
        plan = record.plan
        kinds = {
            "arrival": bool(plan.arrived),
            "hit": any(chunk.cached for chunk in plan.chunks),
            "preemption": bool(plan.preempted + tuple(s.request for s in plan.swapped_out)),
            "swap": bool(plan.swapped_in or plan.swapped_out),
            "copy": bool(plan.copies),
            "fork": bool(record.forked),
            "finish": bool(record.finished or record.aborted),
        }
        assert set(step.get("kinds", ())) == {kind for kind, there in kinds.items() if there}
        found |= set(step.get("kinds", ()))
    assert {kind for kind, _ in data["kinds"]} == found >= {"arrival", "finish"}
    if "hit" in found:
        assert dict(data["kinds"])["hit"] == ("cache hit" if trace.meta["stage"] == "4" else "shared start")


def test_findable_blocks_add_up_to_what_the_replay_knows() -> None:
    trace = served(num_blocks=20)
    kept: set[int] = set()
    most = 0
    for step, now in zip(player_data(trace)["steps"], Replay(trace), strict=True):
        assert not kept & set(step.get("kept", ())) and set(step.get("unkept", ())) <= kept
        kept = (kept - set(step.get("unkept", ()))) | set(step.get("kept", ()))
        assert kept == now.kept_blocks and not kept & now.refs.keys()
        most = max(most, len(kept))
    assert most > 5
    assert not any("kept" in step for step in player_data(served(2, num_blocks=40))["steps"])


def test_findable_blocks_are_those_that_the_engine_has() -> None:
    """After the last request has ended, a prompt that is known finds exactly the full blocks that the player dots."""
    llm = LLM("tiny-random", stage=4, trace=True, block_size=4, max_model_len=64, num_blocks=20)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    llm.generate([[3 + k for k in range(13)]], params)
    llm.generate([[90, 91]], params)  # its first step shows what the first request has left
    steps = player_data(llm.trace)["steps"]  # type: ignore[arg-type]
    left = set(steps[4]["kept"])
    assert len(left) == (13 + 4 - 1) // 4  # the last token was never run
    llm.generate([[3 + k for k in range(13)] + [50]], params)
    again = llm.trace.steps[8].plan.chunks[0]  # type: ignore[union-attr]
    assert set(again.blocks[: again.cached // 4]) <= left and again.cached == 12


def palette(theme: str) -> dict[str, str]:
    block = re.search(r"\.stepplayer(\[data-theme=\"dark\"\])? \{(.*?)\}", CSS[CSS.index('.stepplayer[data-theme="dark"]') if theme == "dark" else 0 :], re.S)  # noqa: E501  # fmt: skip
    assert block is not None
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block.group(2)))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_palette_keeps_text_at_4_5_and_marks_at_3(theme: str) -> None:
    colors = palette(theme)
    assert {"paper", "ink", "quiet", "soft", "control", "mark", "greyedge"} <= colors.keys()
    for ground in ("paper", "soft"):
        assert contrast(colors["ink"], colors[ground]) >= 4.5 and contrast(colors["quiet"], colors[ground]) >= 4.5
    for mark in ("control", "mark", "greyedge", "quiet"):
        assert contrast(colors[mark], colors["paper"]) >= 3, mark
    for hue in HUES:
        edge = readable(hue) if theme == "light" else hue
        assert contrast(edge, colors["paper"]) >= 3, hue
        assert contrast("#ffffff" if hue in WHITE_INK else "#14181c", hue) >= 4.5, hue


def end_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.err or said.out


def test_the_command_writes_a_player_and_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (save(simulate(stage=stage), tmp_path / f"run_{stage}.jsonl") for stage in ("1a", "1b"))
    out = tmp_path / "player.html"
    out.write_text("old", encoding="utf-8")
    assert end_of(["player", str(a), "-o", str(out)], capsys) == (0, f"{out}: StepPlayer(6 requests, 21 steps)\n")
    assert '"size": "page", "step": 0' in out.read_text(encoding="utf-8")
    assert end_of(["player", str(a), "-o", str(out), "--size", "room", "--step", "-1"], capsys)[0] == 0
    assert '"size": "room", "step": 20' in out.read_text(encoding="utf-8")
    status, said = end_of(["player", str(a), "-o", str(out), "--compare", str(b)], capsys)
    assert (status, said.split(": ", 1)[1][:42]) == (0, "Compare(run_1a: 21 steps, run_1b: 17 steps")
    assert "sp-compare" in out.read_text(encoding="utf-8")


def test_the_command_ends_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = save(simulate(), tmp_path / "run.jsonl"), tmp_path / "bad.jsonl"
    bad.write_bytes(good.read_bytes()[:-30])
    out = str(tmp_path / "player.html")
    for arguments, words in (
        ([str(tmp_path / "none.jsonl"), "-o", out], "There is no trace file"),
        ([str(bad), "-o", out], "the file is cut"),
        ([str(good), "-o", str(tmp_path / "no" / "player.html")], "There is no folder"),
        ([str(good), "-o", str(tmp_path)], "is a folder"),
        ([str(good), "-o", out, "--step", "17"], "use 0 to 16"),
        ([str(good), "-o", out, "--size", "wall"], "choose 'page' or 'room'"),
        ([str(good), "-o", out, "--compare", str(bad)], "the file is cut"),
    ):
        status, said = end_of(["player", *arguments], capsys)
        assert status == 2 and words in said and said.count("\n") == 1, said
    assert not Path(out).exists()


def test_generate_saves_a_trace_that_plays(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    calls: dict[str, Any] = {}

    class Fake:
        """Stands in for an LLM with a tokenizer, which the tiny model does not have."""

        def __init__(self, model: str, **settings: Any) -> None:
            calls.update(settings)
            self.trace = simulate()

        def stream(self, given: Any, params: Any) -> Any:
            return iter(())

    monkeypatch.setattr("stepengine.LLM", Fake)
    file = tmp_path / "run.jsonl.gz"
    assert end_of(["generate", "any", "text", "--trace", str(file)], capsys)[0] == 0 and calls["trace"] is True
    assert end_of(["player", str(file), "-o", str(tmp_path / "player.html")], capsys)[0] == 0
    calls.clear()
    status, said = end_of(["generate", "any", "text", "--trace", str(tmp_path / "no" / "run.jsonl")], capsys)
    assert status == 2 and "There is no folder" in said and not calls  # before a model is loaded
