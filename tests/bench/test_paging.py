"""`stepengine bench --what paged | preemption | blocksize`: what is counted follows from the lengths; no times."""

import json

import pytest

from stepengine.bench import decoding, paging, run, runs

pytestmark = pytest.mark.filterwarnings("ignore")


def measured(capsys, what: str, model: str) -> dict:
    run.main(["--what", what, "--model", model, "--fast", "--rounds", "1", "--json"])
    return json.loads(capsys.readouterr().out)["results"][0]


def assert_readable(result: dict) -> None:
    assert max(map(len, run.text(result).splitlines())) <= 120


def test_paged(capsys, checkpoint) -> None:
    result = measured(capsys, "paged", str(checkpoint()))
    found = result["capacity"]
    for part in found["sets"].values():
        slots, blocks = part["used"]["1b"], part["used"]["2"]
        assert part["pool_tokens"] == part["slots"] * part["max_model_len"]
        assert slots["sequences"] == slots["peak"] == part["slots"]
        assert slots["fits"] == pytest.approx(part["slots"])
        assert part["fits_ratio"] == pytest.approx(part["lengths_allow"], rel=0.1)  # but for order and preemptions
        assert blocks["worst_waste"] <= found["block_size"] - 1
        assert blocks["utilization"] >= found["utilization_bar"] > slots["utilization"]
        assert part["same_tokens"]
        assert part["met"] == (min(part["ratio"], part["fits_ratio"]) >= part["bar"])
    assert found["met"] == all(part["met"] for part in found["sets"].values())
    assert result["throughput"]["used"]["2"]["fits"] > result["throughput"]["slots"]
    for count, part in result["ample"]["sets"].items():
        assert part["used"]["1b"]["peak"] == part["used"]["2"]["peak"] == int(count)
        assert part["same_tokens"] and part["used"]["2"]["preemptions"] == 0
    speeds = [cell["speed"]["median"] for cell in result["step"]["cells"]]
    assert result["step"]["met"] == (min(speeds) >= paging.STEP_BAR)
    assert_readable(result)
    for met, said in ((True, "met"), (False, "MISSED")):
        result["step"]["met"] = met
        assert f"bar >= {paging.STEP_BAR}x {said}" in run.text(result)


def test_decode_steps_are_timed_at_the_rows_and_contexts_asked_for(checkpoint) -> None:
    engines = {stage: runs.build(checkpoint(), stage, 3, 64) for stage in ("1b", "2")}
    grows = decoding.drift(2, (1, 3))
    seen = []
    for rows, context, timed in decoding.decode_times(engines, (1, 3), (20, 40), 2):
        seen.append((rows, context))
        lengths = {stage: [r.num_tokens for r in llm.engine.requests.values()] for stage, llm in engines.items()}
        assert lengths["1b"] == lengths["2"] and len(lengths["2"]) == rows
        assert all(abs(length - context) <= grows // 2 + 1 for length in lengths["2"])
        assert timed.rounds == 2 and decoding.copy_ms(engines["2"]) > 0
    assert seen == [(3, 20), (1, 20), (3, 40), (1, 40)]
    for llm in engines.values():
        assert not llm.engine.requests and llm.engine.cache.free_tokens == llm.engine.cache.capacity_tokens


def test_preemption(capsys, checkpoint) -> None:
    result = measured(capsys, "preemption", str(checkpoint()))
    assert set(result["sets"]) == {"short", "long", "shared"}
    for part in result["sets"].values():
        recompute, swap, ample = (part["used"][name] for name in ("recompute", "swap", "ample"))
        assert part["same_tokens"]
        assert ample["preemptions"] == ample["recomputed_tokens"] == ample["swapped_blocks"] == 0
        assert recompute["preemptions"] > 0 and recompute["recomputed_tokens"] > 0 == recompute["swapped_blocks"]
        assert swap["preemptions"] > 0 and swap["swapped_blocks"] > 0 == swap["recomputed_tokens"]
        block_bytes = result["block_size"] * result["kv_bytes_per_token"]
        assert part["swapped_bytes"] == swap["swapped_blocks"] * block_bytes
    shared = result["sets"]["shared"]["used"]
    assert shared["swap"]["fits"] < shared["recompute"]["fits"]  # what comes back is no longer shared
    assert_readable(result)


def test_blocksize(capsys, checkpoint) -> None:
    result = measured(capsys, "blocksize", str(checkpoint()))
    for size, used in result["used"].items():
        assert used["num_blocks"] * int(size) == result["pool_tokens"]
        assert used["worst_waste"] <= int(size) - 1
        assert used["fits"] == pytest.approx(used["lengths_allow"], rel=0.15)
    waste = [used["waste_tokens"] for used in result["used"].values()]
    assert waste == sorted(waste) and waste[0] == 0
    assert set(result["speed"]) == set(result["used"]) and result["speed"]["16"]["median"] == 1
    assert_readable(result)
