"""Paired timing on a clock that the test turns."""

from collections.abc import Callable

import pytest

from stepengine.bench.measure import Ratio, alternate, machine


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Callable[[], None]:
        """An arm that takes these seconds, one after another."""
        left = iter(seconds)

        def arm() -> None:
            self.now += next(left)

        return arm


def test_arms_alternate_and_warmup_does_not_count() -> None:
    clock, order = Clock(), []
    arms = {"a": clock.takes(100, 1, 2, 3), "b": clock.takes(100, 2, 8, 3)}
    timed = alternate(arms, rounds=3, clock=clock, told=order.append)
    assert order == ["a", "b"] * 4
    assert timed.values == {"a": [1, 2, 3], "b": [2, 8, 3]}
    assert timed.rounds == 3
    assert (timed.median("a"), timed.median("b")) == (2, 3)
    assert timed.ratio("b", "a") == Ratio(median=2.0, low=1.0, high=4.0, rounds=3)


def test_a_drift_cancels_in_the_ratio() -> None:
    clock = Clock()
    slow = [1, 10, 1000, 3, 50]  # the machine, round by round
    arms = {"a": clock.takes(*slow), "b": clock.takes(*[2 * s for s in slow])}
    ratio = alternate(arms, rounds=5, warmup=0, clock=clock).ratio("b", "a")
    assert (ratio.median, ratio.low, ratio.high) == (2, 2, 2)


def test_an_arm_may_bring_its_own_value() -> None:
    timed = alternate({"a": lambda: 7.0, "b": lambda: 3.5}, rounds=2, warmup=0)
    assert timed.values == {"a": [7.0, 7.0], "b": [3.5, 3.5]}


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 1), (9.0, 2), (1000.0, 4)])
def test_no_round_begins_after_the_budget_but_one_is_measured(budget: float, rounds: int) -> None:
    clock = Clock()
    arms = {"a": clock.takes(*[2] * 5), "b": clock.takes(*[2] * 5)}  # a round takes 4
    assert alternate(arms, rounds=4, warmup=1, budget_s=budget, clock=clock).rounds == rounds


def test_machine_is_plain_data() -> None:
    import json

    import torch

    found = machine()
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] >= 1 and found["torch_threads"] == torch.get_num_threads()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
