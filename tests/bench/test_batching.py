"""The formulas against brute force, and the engine against the formulas."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepengine.bench import runs
from stepengine.bench.batching import continuous_steps, expected_max_over_mean, static_steps
from stepengine.bench.workloads import Workload

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=14)


def simulate(lengths: list[int], slots: int) -> int:
    """Decode steps, one at a time: a free place is taken at once, who has a place gets a token, who is done leaves."""
    waiting, running, steps = list(lengths), [], 0
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(waiting.pop(0) - 1)  # the prompt's step gave the first token
            running = [left for left in running if left]
        if running:
            steps += 1
            running = [left - 1 for left in running if left > 1]
    return steps


@given(LENGTHS, st.integers(1, 5))
def test_continuous_steps_is_a_simulation(lengths: list[int], slots: int) -> None:
    assert continuous_steps(lengths, slots) == simulate(lengths, slots)


@given(LENGTHS, st.integers(1, 5))
def test_static_steps_is_a_simulation(lengths: list[int], slots: int) -> None:
    batches = [lengths[at : at + slots] for at in range(0, len(lengths), slots)]
    assert static_steps(lengths, slots) == sum(simulate(batch, slots) for batch in batches)  # nobody waits


@pytest.mark.parametrize(("lengths", "slots"), [([1, 2, 5], 2), ([3, 3, 3], 3), ([1, 1, 1, 9], 3)])
def test_bound_is_the_mean_over_all_draws(lengths: list[int], slots: int) -> None:
    draws = [max(draw) for draw in itertools.product(lengths, repeat=slots)]
    assert expected_max_over_mean(lengths, slots) == pytest.approx(np.mean(draws) / np.mean(lengths))


@settings(max_examples=8, deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_traces_take_the_steps_of_the_formulas(engines, lengths: list[int], slots: int) -> None:
    work = Workload("drawn", tuple((1, 2 + n) for n in lengths), tuple(lengths), 0)
    for stage, formula in (("0", static_steps), ("1a", static_steps), ("1b", continuous_steps)):
        done = runs.run(engines(stage, slots), work)
        assert len(done.step_ms[1]) == formula(lengths, slots), stage
        assert [len(tokens) for tokens in done.token_ids] == lengths


@pytest.fixture(scope="module")
def engines(checkpoint):
    made = {}

    def make(stage: str, slots: int):
        if (stage, slots) not in made:
            made[stage, slots] = runs.build(checkpoint(), stage, slots, 16)
        return made[stage, slots]

    return make
