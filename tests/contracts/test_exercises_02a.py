"""Notebook 02a's exercise checks: right answers pass, wrong ones fail with an example that shows it."""

import pytest

from stepengine import LLM, SamplingParams
from stepengine.contracts import check_block_pool
from stepengine.contracts.exercises import check_slot


def right(table, position, block_size):
    return table[position // block_size] * block_size + position % block_size


def test_the_right_slot_passes():
    assert right([3, 7, 12, 25], 49, 16) == 401
    report = check_slot(right)
    assert report.ok, report


@pytest.mark.parametrize(
    ("wrong", "example"),
    [
        (lambda table, position, block_size: position, "slot([3], 0, 16): got 0, the engine stores that token at 48"),
        (
            lambda table, position, block_size: table[0] * block_size + position,  # as if blocks lay in a row
            "slot([3, 7], 16, 16): got 64, the engine stores that token at 112",
        ),
        (
            lambda table, position, block_size: table[position // 16] * 16 + position % 16,
            "slot([4, 2, 6], 0, 1): got 64, the engine stores that token at 4",
        ),
        (lambda table, position, block_size: right(table, position, block_size) + 0.5, "slot([3], 0, 16): got 48.5"),
        (lambda table, position, block_size: table.pop() * 16 + position, "slot([3], 0, 16): the list `table` was"),
        (lambda table, position, block_size: None, "slot([3], 0, 16): got None"),
    ],
)
def test_a_wrong_slot_fails_where_it_is_wrong(wrong, example: str):
    report = check_slot(wrong)
    assert report.failed[0].example.startswith(example), report
    assert report.failed[0].hint


class MyBlockPool:
    """A reader's own: sets and a dict."""

    def __init__(self, num_blocks):
        self.unused = set(range(1, num_blocks + 1))
        self.holders = {}

    @property
    def num_free(self):
        return len(self.unused)

    def alloc(self, n):
        if n > len(self.unused):
            return None
        ids = [self.unused.pop() for _ in range(n)]
        self.holders.update(dict.fromkeys(ids, 1))
        return ids

    def share(self, ids):
        for block in ids:
            if block not in self.holders:
                raise ValueError(f"block {block} is free")
        for block in ids:
            self.holders[block] += 1

    def free(self, ids):
        for block in ids:
            if self.refs(block) < list(ids).count(block):
                raise ValueError(f"block {block} is free")
        for block in ids:
            self.holders[block] -= 1
            if self.holders[block] == 0:
                del self.holders[block]
                self.unused.add(block)

    def refs(self, block):
        return self.holders.get(block, 0)


def test_a_readers_pool_passes_and_then_runs_in_the_engine():
    assert check_block_pool(MyBlockPool).ok, check_block_pool(MyBlockPool)
    tight = {"block_size": 4, "num_blocks": 8, "max_num_seqs": 4, "max_model_len": 32}
    prompts, params = [[1, 2, 3], [4, 5, 6, 7]], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    mine = LLM("tiny-random", stage=2, block_pool=MyBlockPool, **tight)
    right = [output.outputs[0].token_ids for output in LLM("tiny-random", stage=0).generate(prompts, params)]
    assert [output.outputs[0].token_ids for output in mine.generate(prompts, params)] == right
    assert mine.stats()["preemptions"] > 0


class OnlyThree:
    def __init__(self, num_blocks):
        pass

    alloc = share = free = lambda self, ids: None


def test_missing_methods_are_named_at_once():
    report = check_block_pool(OnlyThree)
    assert len(report.failed) == 1
    assert report.failed[0].example == (
        "a OnlyThree has no refs(block), num_free; "
        "it needs alloc(n), share(ids), free(ids), refs(block) and the number num_free"
    )


def test_a_method_in_place_of_a_number_is_named():
    class Calls(MyBlockPool):
        def num_free(self):
            return len(self.unused)

    assert "write @property above it" in check_block_pool(Calls).failed[0].example
