"""Operators and bytes counted in real runs equal what the code says it does."""

import pytest

from stepengine.bench import runs
from stepengine.bench.workloads import Workload

FLOAT = 4


def counted(checkpoint, stage: str, tokens: int, outputs: int = 1, **config):
    llm = runs.build(checkpoint(**config), stage, 1, 64)
    found = runs.run_counted(llm, Workload("one", (tuple(range(3, 3 + tokens)),), (outputs,), 0))
    return llm.config, found.counts


@pytest.mark.parametrize("tokens", [21, 40])
def test_scores_are_a_number_for_each_head_query_and_key(checkpoint, tokens: int) -> None:
    config, found = counted(checkpoint, "2", tokens)
    assert found.score_bytes == config.num_layers * config.num_heads * tokens**2 * FLOAT
    config, found = counted(checkpoint, "3", tokens)
    assert found.score_bytes == 0


def test_scores_are_read_and_written_six_times_more_than_never(checkpoint) -> None:
    """Longer by one token: what grows with the square is scores alone, and in stage 3 nothing does."""

    def second_difference(stage: str) -> tuple[int, int]:
        moved = []
        for tokens in (30, 31, 32):
            config, found = counted(checkpoint, stage, tokens)
            moved.append(found.attention_bytes)
        return moved[2] - 2 * moved[1] + moved[0], config.num_layers * config.num_heads

    grown, heads = second_difference("2")
    # Written by the product, read and written by the scale, the mask and the softmax, read by the last product;
    # the mask of one byte a pair is written, read and written, and read once for all heads of a layer.
    config, _ = counted(checkpoint, "2", 30)
    masks = config.num_layers * (1 + 2 + 1)
    assert grown == 2 * (8 * FLOAT * heads + masks)
    assert second_difference("3")[0] == 0


@pytest.mark.parametrize("stage", ["1a", "2", "3"])
def test_what_is_moved_does_not_depend_on_the_pool(checkpoint, stage: str) -> None:
    """Gathers and scatters touch what they name, not all that there is."""
    work = Workload("one", (tuple(range(3, 30)),), (4,), 0)
    small, large = (runs.run_counted(runs.build(checkpoint(), stage, slots, 64), work).counts for slots in (1, 4))
    assert small.attention_bytes == large.attention_bytes


def test_a_decode_step_gathers_what_it_reads(checkpoint) -> None:
    """Stage 3, one row in whole blocks: its K/V are read and written by the gather, and read by attention."""
    moved = {}
    for tokens in (16, 32, 48):
        config, found = counted(checkpoint, "3", tokens - 1, outputs=2)
        moved[tokens] = found.steps[1].attention_bytes
    block = 16 * 2 * config.num_kv_heads * config.head_dim * FLOAT
    mask = 16 * config.num_kv_heads * FLOAT
    grown = moved[48] - moved[32]
    assert grown == moved[32] - moved[16]
    assert config.num_layers * (3 * block + mask) <= grown <= 1.1 * config.num_layers * (3 * block + mask)


def test_steps_are_told_apart_and_views_are_not_counted(checkpoint) -> None:
    _, found = counted(checkpoint, "3", 20, outputs=4)
    assert [step.max_q for step in found.steps] == [20, 1, 1, 1]
    decodes = [step.operators for step in found.steps[1:]]
    assert found.decode_operators == sum(decodes) / 3 and len(set(decodes)) == 1
    assert all(0 < step.attention_operators < step.operators for step in found.steps)


def test_an_engine_is_left_as_it_was(checkpoint) -> None:
    llm = runs.build(checkpoint(), "3", 1, 64)
    work = Workload("one", ((5, 6, 7),), (3,), 0)
    before = runs.run(llm, work)
    counts = runs.run_counted(llm, work)
    after = runs.run(llm, work)
    assert before.token_ids == counts.token_ids == after.token_ids
    assert "forward" not in vars(llm.engine.runner.model) and "forward" not in vars(llm.engine.runner.attention)
    assert len(counts.counts.steps) == len(after.trace.steps)
