"""The step player's data, sentences and traits, against counts made from the trace by hand."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from stepengine.core.plan import Chunk, RequestInfo, StepPlan, StepRecord
from stepengine.errors import InvalidSetting, TraceError
from stepengine.trace import Replay, Trace, idle_rows
from stepengine.viz.narrate import Narrator, narrate
from stepengine.viz.player import StepPlayer, player_data

sys.path.insert(0, str(Path(__file__).parent.parent / "trace"))
from synthetic import EXAMPLE, simulate  # noqa: E402

STAGES = ("0", "1a", "1b", "2")


def brute(trace: Trace) -> list[dict[str, int]]:
    """Per step: tokens run, tokens run again, requests that decode, tokens of theirs that were kept."""
    seen: set[tuple[int, int]] = set()
    counts = []
    for record in trace.steps:
        ran = [(c.request, p) for c in record.plan.chunks for p in range(c.start, c.end)]
        counts.append(
            {"ran": len(ran), "again": len(seen & set(ran)), "read": sum(c.start for c in record.plan.chunks)}
        )
        seen |= set(ran)
    return counts


def told(trace: Trace) -> list[str]:
    replay = Replay(trace)
    return [narrate(replay, t) for t in range(len(trace.steps))]


@pytest.mark.parametrize("stage", STAGES)
def test_chunks_say_how_many_tokens_ran_for_the_first_time(stage: str) -> None:
    trace = simulate(stage=stage, num_blocks=7)
    for step, count in zip(player_data(trace)["steps"], brute(trace), strict=True):
        assert sum(c[2] for c in step["chunks"]) == count["ran"]
        assert sum(c[2] - c[3] for c in step["chunks"]) == count["again"]


def test_without_a_cache_the_sentence_counts_what_is_run_again() -> None:
    trace = simulate(stage="0")
    for text, count in zip(told(trace), brute(trace), strict=True):
        if count["again"]:
            assert f"{count['ran']} tokens run, {count['again']} of them again, because nothing was kept" in text


@pytest.mark.parametrize("stage", ["1a", "1b"])
def test_with_a_cache_the_sentence_counts_what_is_read(stage: str) -> None:
    trace = simulate(stage=stage)
    decodes = [(t, c) for t, c in zip(told(trace), brute(trace), strict=True) if c["read"]]
    assert decodes
    for text, count in decodes:
        noun = "token runs" if count["ran"] == 1 else "tokens run"
        assert f"{count['ran']} {noun}, the K/V of {count['read']} earlier ones are read from the cache" in text
        assert "again" not in text


@pytest.mark.parametrize("stage", STAGES)
def test_every_start_and_end_is_told_in_its_step(stage: str) -> None:
    trace = simulate(stage=stage)
    texts = told(trace)
    for t, record in enumerate(trace.steps):
        for request, _ in record.finished:
            label, outputs = "ABCDEF"[request], EXAMPLE[request][1]
            assert re.search(rf"\b{label}\b.* ends? after .*\b{outputs}\b.*, as many as asked for", texts[t])
        first = [c for c in record.plan.chunks if not any(
            c.request in {d.request for d in r.plan.chunks} for r in trace.steps[:t])]  # fmt: skip
        for chunk in first:
            assert re.search(
                rf"\b{'ABCDEF'[chunk.request]}\b.* starts?: .*\b{chunk.length}\b.* prompt tokens", texts[t]
            )
    assert texts[-1].endswith("All requests are done.")


def test_a_static_batch_names_its_idle_slots_and_a_continuous_one_has_none() -> None:
    static, continuous = simulate(stage="1a"), simulate(stage="1b")
    idle = idle_rows(static)
    assert sum(idle) > 0
    for text, count in zip(told(static), idle, strict=True):
        assert (f"{count} slot{'s stand' if count > 1 else ' stands'} idle" in text) == (count > 0)
    assert not any("idle" in text for text in told(continuous))


def test_newcomers_make_the_running_ones_wait() -> None:
    assert told(simulate(stage="1b"))[3] == (
        "D starts: its 4 prompt tokens run at once and give its first token. A and C sit this step out."
    )


def test_a_preemption_is_told_with_its_need_and_the_return_with_its_cost() -> None:
    trace = simulate(((6, 12), (6, 12), (6, 12)), stage="2", slots=3, num_blocks=8)
    texts = told(trace)
    steps = [t for t, record in enumerate(trace.steps) if record.plan.preempted]
    assert steps
    for t in steps:
        victim = trace.steps[t].plan.preempted[0]
        label, gone = "ABC"[victim], len(Replay(trace).after(t - 1).table[victim])
        need, free, given = re.search(rf"(\d+) blocks?, (\d+) free: {label}, the youngest(?: running)?, gives back (\d+) block", texts[t]).groups()  # type: ignore[union-attr]  # noqa: E501  # fmt: skip
        assert int(need) > int(free) and int(given) == gone
    returns = [t for t, text in enumerate(texts) if "nothing was kept" in text]
    assert returns
    for t in returns:
        who, ran, again = re.search(r"([A-C and,]+) resumes?: nothing was kept, (\d+) tokens run, (\d+) of them again", texts[t]).groups()  # type: ignore[union-attr]  # noqa: E501  # fmt: skip
        assert (int(ran), int(again)) == (brute(trace)[t]["ran"], brute(trace)[t]["again"])
        assert {"ABC"[chunk.request] for chunk in trace.steps[t].plan.chunks} == set(re.findall("[A-C]", who))


def test_prefix_hits_chunks_and_aborts_have_words() -> None:
    trace = Trace({"stage": "4", "block_size": 4, "num_blocks": 9, "max_model_len": 32})
    for i in range(3):
        trace.add_request(RequestInfo(i, tuple(range(10)), 5, group=i))
    trace.append(StepRecord(StepPlan(0, (Chunk(0, 0, 6, (1, 2)),), (0, 1, 2)), (-1,)))
    trace.append(StepRecord(StepPlan(1, (Chunk(0, 6, 4, (3,)),)), (7,)))
    trace.append(StepRecord(StepPlan(2, (Chunk(0, 10, 1), Chunk(1, 8, 2, (1, 2, 4), cached=8))), (7, 7)))
    trace.append(StepRecord(StepPlan(3, (Chunk(0, 11, 1),)), (7,), finished=((0, "stop"),), aborted=((1, "abort"),)))
    texts = told(trace)
    assert "A starts: tokens 0 to 5 of its 10 run." in texts[0] and "B and C arrive and wait." in texts[0]
    assert texts[1] == "A goes on with its prompt: tokens 6 to 9 of its 10 run."
    assert "B starts late: 8 tokens of its 10 found in the cache (2 blocks reused), 2 to compute." in texts[2]
    assert texts[3].startswith("B is aborted after 1 token.")
    assert "A ends after 3 tokens with a stop token or text and gives back its 3 blocks." in texts[3]


def test_beyond_four_names_the_rest_is_counted_and_numbers_stand_for_letters() -> None:
    trace = simulate([(3, 2 + i % 3) for i in range(12)], slots=12)
    first = Narrator(Replay(trace)).explain(0)
    assert first.text.startswith("Requests 0, 1, 2 and 9 others start: 36 prompt tokens run in one step")
    assert first.named == (0, 1, 2)
    data = player_data(trace)
    assert not data["colored"] and data["requests"][11]["label"] == "11"
    assert data["steps"][1]["say"].startswith("12 requests get one token each: 12 tokens run")


def test_events_are_the_steps_that_are_more_than_another_token() -> None:
    trace = simulate(stage="1b")
    for step, record in zip(player_data(trace)["steps"], trace.steps, strict=True):
        plain = all(c.start > 0 for c in record.plan.chunks) and not record.finished and not record.plan.arrived
        assert ("event" in step) != plain


@pytest.mark.parametrize("stage", ["1a", "1b"])
def test_slots_show_what_is_reserved_and_held(stage: str) -> None:
    trace = simulate(stage=stage)
    data = player_data(trace)
    assert (data["layout"], data["slots"], data["slot_tokens"]) == ("slots", 3, 32)
    held: dict[int, int] = {}
    for step, record in zip(data["steps"], trace.steps, strict=True):
        held.update({chunk.request: chunk.end for chunk in record.plan.chunks})
        assert {r: used for _, r, used in step["kv"]} == held
        assert len({block for block, _, _ in step["kv"]}) == len(step["kv"]) <= 3
        for request, _ in record.finished:
            del held[request]


def test_stage_0_holds_nothing_and_is_drawn_tall() -> None:
    data = player_data(simulate(stage="0"))
    assert data["layout"] == "none" and not any("kv" in step for step in data["steps"])
    assert all(chunk[6] == 1 for step in data["steps"] for chunk in step["chunks"])
    later = player_data(simulate(stage="1a"))
    assert [c[6] for step in later["steps"] for c in step["chunks"] if c[1]] == [0] * sum(n - 1 for _, n in EXAMPLE)


@pytest.mark.parametrize("stage", ["0", "1a"])
def test_idle_spans_add_up_to_the_idle_slot_steps(stage: str) -> None:
    trace = simulate(stage=stage)
    spans = [span for request in player_data(trace)["requests"] for span in request["idle"]]
    assert sum(b - a + 1 for a, b in spans) == sum(idle_rows(trace)) > 0
    for request in player_data(trace)["requests"]:
        assert all(a > request["end"] for a, _ in request["idle"])


def test_texts_and_the_steps_of_their_tokens_go_along() -> None:
    trace = simulate(stage="1b")
    trace.texts = {0: ("hello <b>", tuple("abcdefghi"))}
    request = player_data(trace)["requests"][0]
    assert request["text"] == "hello <b>" and "".join(request["pieces"]) == "abcdefghi"
    assert len(request["tokens"]) == EXAMPLE[0][1]
    steps = [t for t, r in enumerate(trace.steps) if any(c.request == 0 for c in r.plan.chunks)]
    assert request["tokens"] == steps


def test_the_player_is_plain_traits_and_a_stable_repr() -> None:
    player = StepPlayer(simulate(), step=2)
    assert repr(player) == "StepPlayer(6 requests, 17 steps)"
    bundle = player._repr_mimebundle_()
    assert bundle is not None and bundle[0]["text/plain"] == repr(player)
    assert bundle[0]["application/vnd.jupyter.widget-view+json"]["model_id"] == player.model_id
    assert json.loads(player.data)["panels"] == ["schedule", "tokens", "kv", "texts"]
    assert player.step == 2
    player.step = 5
    player.step = -1
    assert player.step == 16
    with pytest.raises(InvalidSetting, match="0 to 16"):
        player.step = 17
    assert player.step == 16


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [({"size": "wall"}, InvalidSetting), ({"step": 99}, InvalidSetting), ({"panels": ["nothing"]}, InvalidSetting)],
)
def test_bad_settings_are_refused_in_a_sentence(kwargs: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^[^\n]{20,200}$"):
        StepPlayer(simulate(), **kwargs)  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="0 steps"):
        StepPlayer(Trace({"stage": "0"}))


def test_room_shows_two_panels() -> None:
    for stage in ("0", "1a", "1b"):
        assert len(json.loads(StepPlayer(simulate(stage=stage), size="room").data)["panels"]) == 2


def test_the_saved_page_is_whole_and_cannot_be_broken_by_a_text(tmp_path: Path) -> None:
    trace = simulate()
    trace.texts = {0: ("</script><script>alert(1)</script>{{script}}", ("<!--",))}
    page = StepPlayer(trace).save_html(tmp_path / "player.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2 and "alert(1)</script>" not in page
    urls = [url for url in re.findall(r"https?://[^\s\"']+", page) if "www.w3.org" not in url]
    assert urls == [] and "import " not in page.split('<script type="module">')[1]
    traits = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S).group(1))  # type: ignore[union-attr]
    assert json.loads(traits["data"])["requests"][0]["text"].startswith("</script>")


def test_sixty_four_requests_over_four_hundred_steps_stay_small() -> None:
    """The data grows with the chunks, not with requests times steps times blocks; and it is not slow to make."""
    trace = simulate([(5 + i % 40, 30 + (i * 7) % 60) for i in range(64)], stage="1b", slots=9, max_model_len=256)
    assert len(trace.steps) > 300
    begin = time.perf_counter()
    small = simulate(stage="1b")
    player_data(small)
    unit = (time.perf_counter() - begin) / sum(len(r.plan.chunks) for r in small.steps)
    begin = time.perf_counter()
    text = json.dumps(player_data(trace))
    chunks = sum(len(r.plan.chunks) for r in trace.steps)
    assert time.perf_counter() - begin < 60 * unit * chunks  # near linear in the chunks
    assert len(text) < 120 * chunks + 400_000
