"""Notebook 01b's exercise checks: right answers pass, wrong ones fail with an example that shows it."""

import heapq
import json
from pathlib import Path

import pytest

from stepengine.contracts import check_scheduler
from stepengine.contracts.exercises import check_continuous_steps, check_static_steps

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def static(lengths, slots):
    return sum(max(lengths[at : at + slots]) - 1 for at in range(0, len(lengths), slots))


def list_scheduling(lengths, slots):
    free_at = [0] * slots
    for length in lengths:
        heapq.heappush(free_at, heapq.heappop(free_at) + length - 1)
    return max(free_at)


def counts_first_tokens(lengths, slots):
    return sum(max(lengths[at : at + slots]) for at in range(0, len(lengths), slots))


def sorts_first(lengths, slots):
    return static(sorted(lengths), slots)


def evenly_shared(lengths, slots):
    return max(-(-sum(length - 1 for length in lengths) // slots), max(lengths) - 1)


def longest_first(lengths, slots):
    return list_scheduling(sorted(lengths, reverse=True), slots)


def eats_its_input(lengths, slots):
    total = static(lengths, slots)
    lengths.clear()
    return total


def test_right_counts_pass():
    for report in (check_static_steps(static), check_continuous_steps(list_scheduling)):
        assert report.ok, report


@pytest.mark.parametrize(
    ("wrong", "promise", "example"),
    [
        (counts_first_tokens, "one request", "lengths=[1], slots=1: got 1, the trace of stage 1a has 0"),
        (sorts_first, "the next batch begins", "lengths=[2, 7, 3, 4, 1], slots=2: got"),
        (list_scheduling, "the next batch begins", "lengths=[2, 7, 3, 4, 1], slots=2: got 6, the trace of stage 1a"),
        (eats_its_input, "one request", "`lengths` was changed"),
        (lambda lengths, slots: 0, "one request", "lengths=[5], slots=1: got 0, the trace of stage 1a has 4"),
    ],
)
def test_wrong_static_counts_fail_where_they_are_wrong(wrong, promise: str, example: str):
    first = check_static_steps(wrong).failed[0]
    assert first.promise.startswith(promise) and example in first.example


@pytest.mark.parametrize(
    ("wrong", "promise"),
    [
        (lambda lengths, slots: list_scheduling([length + 1 for length in lengths], slots), "one request"),
        (static, "who waits takes the first place"),
        (evenly_shared, "the queue keeps its order"),
        (longest_first, "the queue keeps its order"),
        (lambda lengths, slots: 0, "one request"),
    ],
)
def test_wrong_continuous_counts_fail_where_they_are_wrong(wrong, promise: str):
    report = check_continuous_steps(wrong)
    assert not report.ok
    assert "the trace of stage 1b has" in report.failed[0].example, str(report)
    assert report.failed[0].promise.startswith(promise), str(report)


def my_scheduler(notebook: str) -> type:
    """The class of that name as the notebook writes it."""
    cells = json.loads((NOTEBOOKS / notebook).read_text(encoding="utf-8"))["cells"]
    code = "".join(next(cell["source"] for cell in cells if "class MyScheduler:" in "".join(cell["source"])))
    names: dict = {}
    head = "from bisect import insort\nfrom stepengine.core.plan import StepPlan\n"
    exec(head + "from stepengine.core.request import State, settle\n" + code[code.index("class MyScheduler:") :], names)
    return names["MyScheduler"]


def test_the_sketched_loop_fails_on_the_smallest_case():
    sketched = check_scheduler(my_scheduler("01b_continuous_batching.ipynb"))
    assert sketched.failed[0].promise.startswith("every request runs all its tokens")
    assert "[(3, 2)]: idle() although requests [0] have not ended" in sketched.failed[0].example
    assert any(failure.promise.startswith("a place that falls free") for failure in sketched.failed)


def test_mending_one_fault_leaves_the_other_to_be_seen():
    class OnlyRemembers(my_scheduler("01b_continuous_batching.ipynb")):  # type: ignore[misc]
        def plan(self):
            before = list(self.running)
            plan = super().plan()
            new = [self.known[chunk.request] for chunk in plan.chunks]
            self.running = before + [request for request in new if request not in before]
            return plan

    report = check_scheduler(OnlyRemembers)
    assert "plans nothing although requests are there" in report.failed[0].example


def test_the_repaired_loop_passes():
    assert check_scheduler(my_scheduler("solutions/01b_continuous_batching.ipynb")).ok
