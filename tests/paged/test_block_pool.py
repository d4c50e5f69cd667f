"""What the pool does with references; its contract is checked in tests/contracts."""

import pytest

from stepengine.errors import StepEngineError
from stepengine.stage2_paged.block_pool import BlockPool


def test_a_block_goes_back_with_its_last_reference():
    pool = BlockPool(3)
    (block,) = pool.alloc(1)
    pool.share([block])
    pool.free([block])
    assert (pool.num_free, pool.refs(block)) == (2, 1)
    pool.free([block])
    assert (pool.num_free, pool.refs(block)) == (3, 0)


def test_too_many_are_refused_whole():
    pool = BlockPool(3)
    assert pool.alloc(4) is None and pool.num_free == 3
    assert sorted(pool.alloc(3)) == [1, 2, 3]
    assert pool.alloc(1) is None and pool.alloc(0) == []


@pytest.mark.parametrize("ids", [[0], [4], [-1], [2], [1, 2], [1, 1]])
def test_what_nobody_holds_cannot_be_freed(ids):
    pool = BlockPool(3)
    assert pool.alloc(1) == [1]
    with pytest.raises(StepEngineError, match="block|Block"):
        pool.free(ids)
    assert (pool.num_free, pool.refs(1)) == (2, 1)


def test_what_nobody_holds_cannot_be_shared():
    pool = BlockPool(3)
    with pytest.raises(StepEngineError, match="Block 2 is free"):
        pool.share([2])
    pool.alloc(1)
    pool.share([1, 1])
    assert pool.refs(1) == 3
