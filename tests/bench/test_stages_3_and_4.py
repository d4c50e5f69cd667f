"""`stepengine bench --what flash | chunked | prefix` on a tiny model: what is counted follows by formula; no times."""

import json

import pytest

from stepengine.bench import chunked, flash, prefix, run, runs, workloads
from stepengine.bench.workloads import Workload

pytestmark = pytest.mark.filterwarnings("ignore")


def measured(capsys, what: str, model: str) -> dict:
    run.main(["--what", what, "--model", model, "--fast", "--rounds", "1", "--json"])
    return json.loads(capsys.readouterr().out)["results"][0]


def assert_readable(result: dict) -> str:
    text = run.text(result)
    assert max(map(len, text.splitlines())) <= 120
    return text


def test_flash(capsys, checkpoint) -> None:
    result = measured(capsys, "flash", str(checkpoint()))
    for cell in result["prompt"]["cells"]:
        two, three = cell["moved"]["2"], cell["moved"]["3"]
        assert two["score_bytes"] == 2 * 4 * cell["tokens"] ** 2 * 4  # layers, heads, bytes
        assert three["score_bytes"] == 0 and three["attention_bytes"] < two["attention_bytes"]
        assert all(0 < cell["attention_ms"][stage] < cell["ms"][stage] for stage in flash.STAGES)
    speeds = [cell["speed"]["median"] for cell in result["prompt"]["cells"]]
    assert result["prompt"]["met"] == (min(speeds) >= flash.BAR)
    assert {(cell["rows"], cell["context"]) for cell in result["decode"]["cells"]} == {(1, 24), (4, 24)}
    for part in (result["prompt"], result["decode"]):
        part["slowest"], part["met"] = 0.5, False
    assert assert_readable(result).count(f"bar >= {flash.BAR}x MISSED") == 2


def test_chunked(capsys, checkpoint) -> None:
    result = measured(capsys, "chunked", str(checkpoint()))
    assert result["same_tokens"]
    budgets = [point["budget"] for point in result["sweep"]]
    assert result["budget"] in budgets and result["knee"] in budgets
    best = max(point["tokens_per_s"] for point in result["sweep"])
    at_knee = next(point for point in result["sweep"] if point["budget"] == result["knee"])
    assert at_knee["tokens_per_s"] >= chunked.KNEE * best
    for waits in (*result["waits"].values(), *result["sweep"], result["threshold"]):
        assert 0 < waits["running"]["p50"] <= waits["running"]["p99"] and waits["long"]["p50"] > 0
    assert result["itl"]["met"] == (result["itl"]["ratio"] >= chunked.ITL_BAR)
    assert result["speed"]["met"] == (result["speed"]["ratio"]["median"] >= chunked.SPEED_BAR)
    text = assert_readable(result)
    assert "first token comes" in text and "long_prefill_token_threshold" in text


def test_prefill_first_stops_every_decode_for_a_long_prompt_and_chunks_stop_none(checkpoint) -> None:
    """What the gaps come from, in steps: the one that runs a long prompt alone, or none."""
    work = workloads.long_arrivals(workloads.corpus(None, 499), 0, running=3, outputs=16, long=64, count=2)
    stopped = {}
    for stage, budget in ((chunked.FIRST, None), (chunked.CHUNKS, 24)):
        llm = runs.build(checkpoint(), stage, 8, 128, max_num_batched_tokens=budget)
        done = runs.run(llm, work)
        first, stopped[stage] = min(done.trace.requests), 0
        decoding = {first + index for index in work.of("running")}
        for record in done.trace.steps:
            stopped[stage] += (
                record is not done.trace.steps[0]
                and bool(decoding)
                and not (decoding & {chunk.request for chunk in record.plan.chunks})
            )
            decoding -= {request for request, _ in record.finished}
        assert max(record.plan.num_tokens for record in done.trace.steps[1:]) <= (budget or 128)
    assert stopped == {chunked.FIRST: 2, chunked.CHUNKS: 0}


def test_prefix(capsys, checkpoint) -> None:
    result = measured(capsys, "prefix", str(checkpoint(max_position_embeddings=256)))
    for cell in result["ttft"]["cells"]:
        for share, found in cell["found"].items():
            assert found == [int(float(share) * cell["prefix"]) // 16 * 16]
    hits = result["hits"]
    assert hits["same_hits"] and all(part["same_tokens"] for part in hits["sets"].values())
    sets = prefix.sets(workloads.corpus(None, 499), prefix.Options(fast=True))
    few, chats = sets["few-shot"], sets["multi-turn"]
    assert hits["sets"]["few-shot"]["hit_tokens"]["hash"] == 64 * (len(few.prompts) - 1)
    # A turn's last answer token has no K/V; all else of the turn before is there, in whole blocks.
    said, answer, system = 12, chats.answer, len(chats.system)
    kept = [(system + turn * (said + answer) - 1) // 16 * 16 for turn in (1, 2)]
    assert hits["sets"]["multi-turn"]["hit_tokens"]["radix"] == len(chats.said[0]) * sum(kept)
    assert hits["sets"]["random"]["hit_tokens"]["hash"] == 0 == result["misses"]["hit_tokens"]
    for part in hits["sets"].values():
        assert part["saved"] == part["hit_tokens"]  # nothing was preempted
    assert 0 < result["misses"]["looking"] < 1
    assert set(result["host"]["us"]) == {"hash", "radix"}
    assert result["host"]["met"] == (result["host"]["slowest"] <= prefix.HOST_BAR)
    assert_readable(result)


def test_a_run_finds_nothing_of_the_runs_before_it(checkpoint) -> None:
    llm = runs.build(checkpoint(), prefix.WITH, 4, 64)
    work = Workload("one", (tuple(range(3, 43)),), (2,), 0)
    assert [runs.run(llm, work).hit_tokens for _ in range(3)] == [0, 0, 0]
    assert [runs.run(llm, work, salt="same").hit_tokens for _ in range(3)] == [0, 32, 32]
