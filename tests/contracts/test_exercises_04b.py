"""Notebook 04b's exercise checks: right answers pass, wrong ones fail with an example that shows it."""

import heapq

import pytest

from stepengine.contracts import check_evictor
from stepengine.contracts.exercises import check_hit_tokens


def common(a, b):
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def right(a, b, block_size):
    return min(common(a, b), len(b) - 1) // block_size * block_size


def blockwise(a, b, block_size):
    """The same by another way: block after block, as the engine looks."""
    found = 0
    while found + block_size < len(b) and a[found : found + block_size] == b[found : found + block_size]:
        found += block_size
    return found


@pytest.mark.parametrize("answer", [right, blockwise])
def test_the_right_number_of_tokens_passes(answer):
    head = list(range(100))
    assert answer([*head, 7], [*head, 8, 9], 16) == 96
    assert answer(head[:15] + [500] * 9, head[:15] + [501] * 9, 16) == 0
    assert answer(head, head[1:], 16) == 0
    assert answer(head[:64], head[:64], 16) == 48
    report = check_hit_tokens(answer)
    assert report.ok, report


def anywhere(a, b, block_size):
    """Counts blocks of b that stand somewhere in a, at whatever place."""
    blocks = {tuple(a[at : at + block_size]) for at in range(len(a) - block_size + 1)}
    whole = range(0, len(b) - block_size, block_size)
    return block_size * sum(tuple(b[at : at + block_size]) in blocks for at in whole)


@pytest.mark.parametrize(
    ("wrong", "promise", "example"),
    [
        (lambda a, b, size: common(a, b), "of what both begin with", "the first 100 the same, blocks of 16: got 100,"),
        (lambda a, b, size: min(common(a, b), len(b) - 1) // 16 * 16, "of what both", "blocks of 8: got 16, the"),
        (lambda a, b, size: -(-common(a, b) // size) * size, "of what both begin", "got 112, the engine finds 96"),
        (
            lambda a, b, size: common(a, b) // size * size,
            "the last token of b",
            "a of 64 tokens, b of 64, the first 64 the same, blocks of 16: got 64, the engine finds 48",
        ),
        (anywhere, "after the first difference", "b is a with one token put before it, blocks of 16: got 80"),
        (lambda a, b, size: None, "of what both begin", "got None"),
        (lambda a, b, size: a.pop() and 96, "of what both begin", "a list was changed"),
    ],
)
def test_a_wrong_number_of_tokens_fails_where_it_is_wrong(wrong, promise: str, example: str):
    report = check_hit_tokens(wrong)
    assert any(f.promise.startswith(promise) and example in f.example for f in report.failed), report
    assert report.failed[0].hint


class OldestLeaf:
    """Of the leaves, the one released first; written without the pool's order in mind."""

    def __init__(self):
        self.clock, self.since, self.waiting = 0, {}, {}

    def released(self, entry):
        self.clock += 1
        self.since[entry] = self.clock
        if entry.parent is not None:
            self.waiting[entry.parent] = self.waiting.get(entry.parent, 0) + 1

    def taken(self, entry):
        del self.since[entry]
        if entry.parent is not None:
            self.waiting[entry.parent] -= 1

    def pick(self):
        leaves = [(since, id(entry), entry) for entry, since in self.since.items() if not self.waiting.get(entry)]
        entry = heapq.nsmallest(1, leaves)[0][2]
        self.taken(entry)
        return entry


class Stub:
    def released(self, entry):
        pass

    def taken(self, entry):
        pass

    def pick(self):
        return None


class NewestFirst(OldestLeaf):
    """Takes the block released last, whoever continues it."""

    def pick(self):
        entry = max(self.since, key=lambda entry: self.since[entry])
        self.taken(entry)
        return entry


class NeverTaken(OldestLeaf):
    def taken(self, entry):
        pass


def test_an_evictor_that_goes_leaf_by_leaf_passes():
    report = check_evictor(OldestLeaf)
    assert report.ok, report


@pytest.mark.parametrize(
    ("wrong", "promise"),
    [
        (Stub, "each released entry"),
        (NewestFirst, "no entry is picked before"),
        (NeverTaken, "an entry that is held again"),
    ],
)
def test_a_wrong_evictor_fails_where_it_is_wrong(wrong, promise: str):
    report = check_evictor(wrong)
    assert any(failure.promise.startswith(promise) for failure in report.failed), report
