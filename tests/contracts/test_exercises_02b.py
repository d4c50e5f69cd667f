"""Notebook 02b's exercise checks: right answers pass, wrong ones fail with an example that shows it."""

import pytest

from stepengine.contracts.exercises import check_copies, check_pick_victim
from stepengine.contracts.played import Memory, Run
from stepengine.contracts.scheduler import tight_cases
from stepengine.stage2_paged.scheduler import PagedScheduler


def right(prompt_len, n, block_size):
    return n - 1 if prompt_len % block_size else 0


def test_the_right_number_of_copies_passes():
    assert right(50, 3, 16) == 2 and right(48, 3, 16) == 0
    report = check_copies(right)
    assert report.ok, report


@pytest.mark.parametrize(
    ("wrong", "example"),
    [
        (lambda prompt_len, n, block_size: n, "copies(50, 1, 16): got 1, the trace of stage 2 has 0"),
        (lambda prompt_len, n, block_size: n - 1, "copies(48, 3, 16): got 2, the trace of stage 2 has 0"),
        (
            lambda prompt_len, n, block_size: (n - 1) * -(-prompt_len // block_size),
            "copies(50, 2, 16): got 4, the trace",
        ),
        (
            lambda prompt_len, n, block_size: min(n - 1, 1) * right(prompt_len, 2, block_size),
            "copies(50, 3, 16): got 1",
        ),
        (lambda prompt_len, n, block_size: (n - 1) * (prompt_len % block_size > 1), "copies(49, 3, 16): got 0, the"),
        (lambda prompt_len, n, block_size: None, "copies(50, 1, 16): got None"),
    ],
)
def test_a_wrong_number_of_copies_fails_where_it_is_wrong(wrong, example: str):
    report = check_copies(wrong)
    assert report.failed[0].example.startswith(example), report
    assert report.failed[0].hint


@pytest.mark.parametrize(
    "victim", [lambda running: running[-1], lambda running: max(running, key=lambda r: (r.priority, r.id))]
)
def test_the_youngest_of_the_lowest_priority_passes(victim):
    report = check_pick_victim(victim)
    assert report.ok, report


@pytest.mark.parametrize(
    ("wrong", "promise", "example"),
    [
        (lambda running: running[0], "the first in line", "[(4, 6), (4, 6)], recompute: step"),
        (lambda running: min(running, key=lambda r: r.num_tokens), "nobody gives way to a lower", "of priority"),
        (lambda running: max(running, key=lambda r: r.num_tokens), "the first in line", "request 0, the first in line"),
        (
            lambda running: max(running, key=lambda r: r.id),
            "the first in line",
            "request 2, the first in line, gave way",
        ),
        (lambda running: running[-1].id, "the victim is one", "running = ['request 0']: got 0, which is none of them"),
        (lambda running: running.pop(), "the victim is one", "'tuple' object has no attribute 'pop'"),
        (lambda running: None, "the victim is one", "got None"),
    ],
)
def test_a_wrong_victim_fails_where_it_is_wrong(wrong, promise: str, example: str):
    report = check_pick_victim(wrong)
    assert any(f.promise.startswith(promise) and example in f.example for f in report.failed), report
    assert report.failed[0].promise.startswith((promise, "the first in line"))


def test_the_cases_make_somebody_give_way():
    for jobs, places, blocks in tight_cases()[:4]:
        assert Run(PagedScheduler, jobs, places, Memory(blocks)).to_end().gave_way
        swapped = Run(PagedScheduler, jobs, places, Memory(blocks, 4 * blocks)).to_end()
        assert swapped.swaps == len(swapped.gave_way) > 0
