"""The ladder end to end on a tiny random model."""

import json
from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import torch

from stepengine.bench import ladder, metrics, report, runs, verify, workloads
from stepengine.bench.usage import block_tokens_per_sequence
from stepengine.bench.workloads import Workload
from stepengine.errors import InvalidSetting
from stepengine.model.loader import load_decoder
from stepengine.stage5_gptq.loader import load_quantized
from stepengine.stages import STAGES
from stepengine.viz.ladder import ladder_bars


@pytest.fixture(scope="module", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is quantised here is not kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPENGINE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def climbed(checkpoint, tmp_path_factory, model_cache):
    folder = tmp_path_factory.mktemp("ladder")
    return ladder.run(str(checkpoint()), fast=True, out=folder, progress=False), folder


def test_the_file_holds_the_result(climbed) -> None:
    result, folder = climbed
    assert json.loads((folder / "ladder.json").read_text(encoding="utf-8")) == result
    assert {"model", "dtype", "fast", "workload", "machine", "versions", "time", "seconds", "stages"} <= result.keys()


def test_every_stage_has_every_field(climbed) -> None:
    result, _ = climbed
    assert [row["stage"] for row in result["stages"]] == [stage.name for stage in STAGES]
    for row in result["stages"]:
        assert row["tokens_per_s"] > 0
        for name in ("ttft_ms", "itl_ms"):
            assert 0 < row[name]["p50"] <= row[name]["p99"]
        assert row["same_tokens"] is (None if row["stage"] == "5" else True)
        assert (row["agreement"] is None) == (row["stage"] != "5")
    for row in result["stages"][1:]:
        assert {"name", "unit", "before", "after", "better", "note"} <= row["metric"].keys()


def test_metrics_equal_their_formulas(climbed) -> None:
    result, _ = climbed
    rows = {row["stage"]: row for row in result["stages"]}
    ids = workloads.corpus(None, 499)
    common, uneven = metrics.common_set(ids, True), metrics.uneven_set(ids, True)
    assert common.recomputed_tokens < 5_000
    cached = sum(len(prompt) + n - 1 for prompt, n in zip(common.prompts, common.output_lens, strict=True))
    assert (rows["1a"]["metric"]["before"], rows["1a"]["metric"]["after"]) == (common.recomputed_tokens, cached)
    batches = [uneven.output_lens[at : at + ladder.SLOTS] for at in range(0, 8, ladder.SLOTS)]
    idle = sum(max(batch) - n for batch in batches for n in batch)
    assert (rows["1b"]["metric"]["before"], rows["1b"]["metric"]["after"]) == (idle, 0)
    tailed = metrics.long_tailed_set(ids, True)
    fits = ladder.SLOTS * ladder.MAX_MODEL_LEN / block_tokens_per_sequence(tailed, 16)
    assert rows["2"]["metric"]["before"] == pytest.approx(ladder.SLOTS)
    assert rows["2"]["metric"]["after"] == pytest.approx(fits, rel=0.1)  # but for preemptions and prompts' steps


def test_attention_moves_less_and_launches_less_without_scores(climbed) -> None:
    metric = next(row for row in climbed[0]["stages"] if row["stage"] == "3")["metric"]
    (operators,) = metric["also"]
    assert metric["after"] < metric["before"] and operators["after"] < operators["before"]
    layers = 2
    assert operators["before"] - operators["after"] == 2 * layers  # three operators for scores became one


def test_halves_of_stage_4_are_held_against_stage_3(climbed) -> None:
    rows = {row["stage"]: row["metric"] for row in climbed[0]["stages"]}
    assert [rows[name]["against"] for name in ("4a", "4b", "4")] == ["3"] * 3
    work = metrics.METRICS["4b"].own_set(workloads.corpus(None, 499), True)
    found, _ = rows["4b"]["also"]
    shared = 96 // 16 * 16
    assert (found["before"], found["after"]) == (0, shared * (len(work.prompts) - 1))
    assert rows["4b"]["before"] - rows["4b"]["after"] == found["after"]


@torch.inference_mode()
def test_stage_5_has_other_weights_and_its_own_tokens(climbed, checkpoint) -> None:
    row = climbed[0]["stages"][-1]
    metric, (step,) = row["metric"], row["metric"]["also"]
    weights = load_decoder(checkpoint(), "cpu", torch.float32).parameters()
    packed = load_quantized(checkpoint(), "cpu", torch.float32).parameters()
    assert metric["against"] == "4" and metric["note"].startswith("one request, ")
    assert metric["before"] == sum(weight.nbytes for weight in weights) / 1e6
    assert metric["after"] == sum(weight.nbytes for weight in packed) / 1e6
    assert step["unit"] == "ms" and step["before"] > 0 and step["after"] > 0
    assert 0 < row["agreement"] < verify.OWN <= row["own_agreement"] <= 1
    assert "quantising took" in row["note"]  # the cache was empty
    said = f"stage 0 chooses {row['agreement']:.1%} of them"
    assert said in report.table(climbed[0]) and said in (climbed[1] / "ladder.html").read_text(encoding="utf-8")


def test_an_engine_that_runs_its_own_weights_wrongly_is_found_out(climbed, checkpoint, tmp_path, monkeypatch) -> None:
    """Here every token is one too high."""
    compute = runs.run

    def wrong(llm, workload, *args):
        done = compute(llm, workload, *args)
        if llm.stage.name == "5":
            done.token_ids = [[(token + 1) % 499 for token in tokens] for tokens in done.token_ids]
        return done

    monkeypatch.setattr(runs, "run", wrong)
    result = ladder.run(str(checkpoint()), fast=True, out=tmp_path, stages=["5"], progress=False)
    assert result["stages"][1]["same_tokens"] is False and " NO" in report.table(result)


def test_agreement_is_the_share_of_tokens_that_the_reference_would_choose(checkpoint) -> None:
    llm = runs.build(str(checkpoint()), "0", 2, 32)
    work = Workload("two", ((5, 6, 7), (8, 9)), (6, 4), 0)
    right = runs.run(llm, work)
    assert verify.agreement(llm, right) == 1.0
    other = deepcopy(right.token_ids)
    for tokens in other:  # the last ones: nothing is predicted from them
        tokens[-1] = (tokens[-1] + 1) % 499
    assert verify.agreement(llm, runs.Run(work, other, right.trace)) == 0.8


def test_stages_with_other_weights_share_none(checkpoint) -> None:
    engines = [runs.build(checkpoint(), stage, 1, 32) for stage in ("4", "5")]
    with pytest.raises(InvalidSetting, match="makes its own"):
        runs.share_weights(engines)
    with pytest.raises(InvalidSetting, match="makes its own"):
        runs.share_weights(engines[::-1])


def test_own_tokens_are_no_wrong_ones(climbed) -> None:
    result = deepcopy(climbed[0])
    figure = ladder_bars(result)
    (bars,) = [bars for bars in figure.data if bars.name == "tokens/s"]
    assert not any("other" in text for text in bars.text)
    assert [bool(shape) for shape in bars.marker.pattern.shape] == [False] * (len(STAGES) - 1) + [True]
    assert bars.text[-1].endswith(f"<br>{result['stages'][-1]['agreement']:.0%} same tokens")
    assert "the same tokens, but for 5 (hatched), whose weights are its own" in figure.layout.title.subtitle.text
    assert " own" in report.table(result) and " NO" not in report.table(result)
    result["stages"][3]["same_tokens"] = False
    figure = ladder_bars(result)
    assert "not the same tokens" in figure.layout.title.subtitle.text and " NO" in report.table(result)


@pytest.mark.parametrize("fast", [True, False])
def test_no_set_is_longer_than_the_engines_have_room_for(fast: bool) -> None:
    ids = np.arange(1000)
    assert metrics.common_set(ids, fast).longest <= ladder.MAX_MODEL_LEN
    for name, metric in metrics.METRICS.items():
        if metric.own_set is not None:
            room = metric.settings(name, fast)["max_model_len"] if metric.settings else ladder.MAX_MODEL_LEN
            assert metric.own_set(ids, fast).longest <= room


def test_table_and_page(climbed) -> None:
    result, folder = climbed
    printed = report.table(result)
    assert max(map(len, printed.splitlines())) <= 100
    assert (
        "tokens computed" in printed
        and "idle slot-steps" in printed
        and "sequences that fit" in printed
        and " yes" in printed
    )
    page = (folder / "ladder.html").read_text(encoding="utf-8")
    assert "idle slot-steps" in page and "Plotly.newPlot" in page
    assert "<script src=" not in page and 'rel="stylesheet"' not in page


def test_other_tokens_are_reported(climbed) -> None:
    result = deepcopy(climbed[0])
    result["stages"][2]["same_tokens"] = False
    assert " NO" in report.table(result)


def test_a_wrong_token_is_no_near_tie(checkpoint) -> None:
    llm = runs.build(str(checkpoint()), "0", 2, 32)
    work = Workload("two", ((5, 6, 7), (8, 9)), (6, 4), 0)
    right = runs.run(llm, work)
    assert verify.differences(llm, right, right) == (0, 0)
    assert verify.shortfall(llm, [5, 6, 7], right.token_ids[0]).abs().max() == 0
    wrong = deepcopy(right.token_ids)
    wrong[1][2] = (wrong[1][2] + 1) % 499
    assert verify.differences(llm, right, runs.Run(work, wrong, right.trace)) == (0, 1)
    short = [right.token_ids[0][:-1], right.token_ids[1]]
    assert verify.differences(llm, right, runs.Run(work, short, right.trace)) == (0, 1)


@torch.inference_mode()
def test_an_exact_tie_is_near(checkpoint) -> None:
    llm = runs.build(str(checkpoint()), "0", 1, 32)
    work = Workload("one", ((5, 6, 7),), (1,), 0)
    right = runs.run(llm, work)
    best = right.token_ids[0][0]
    twin = (best + 1) % 499
    llm.engine.runner.model.head.weight[twin] = llm.engine.runner.model.head.weight[best]
    assert verify.differences(llm, right, runs.Run(work, [[twin]], right.trace)) == (1, 0)


@pytest.mark.parametrize(("name", "before"), [("1b", "1a"), ("2", "1b"), ("3", "2"), ("4", "3"), ("5", "4")])
def test_stages_may_be_left_out(name: str, before: str, checkpoint, tmp_path) -> None:
    """The one that a stage is held against runs all the same; a number may mean nothing for stage 0."""
    result = ladder.run(str(checkpoint()), fast=True, out=tmp_path, stages=[name], progress=False)
    assert [row["stage"] for row in result["stages"]] == ["0", name]
    metric = result["stages"][1]["metric"]
    assert metric["against"] == before and metric["note"].startswith(f"against stage {before}: ")


def test_speed_that_stands_still_is_explained_by_the_steps(checkpoint) -> None:
    llm = runs.build(str(checkpoint()), "1b", 2, 32)
    work = Workload("three", ((5, 6, 7), (8, 9), (3,)), (6, 4, 3), 0)
    done = runs.run(llm, work)
    prompts, decodes = done.step_ms
    said = report.why(done, done)
    assert f"tokens/s 1.00x: {len(decodes)} decode steps" in said and f"became {len(decodes)} of" in said
    assert said.endswith(f"s in {len(prompts)}.")


def test_speed_that_moved_needs_no_reason(checkpoint) -> None:
    llm = runs.build(str(checkpoint()), "1b", 2, 32)
    done = runs.run(llm, Workload("one", ((5, 6, 7),), (6,), 0))
    slow = runs.Run(done.workload, done.token_ids, deepcopy(done.trace))
    slow.trace.steps[-1] = slow.trace.steps[-1]._replace(t_done=slow.trace.steps[-1].t_done + 10)
    assert report.why(slow, done) == ""
    assert report.why(done, slow) != ""
