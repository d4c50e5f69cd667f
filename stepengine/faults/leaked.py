"""Exhibit 1: blocks that never come back."""

from functools import partial

from stepengine.contracts import check_kv_cache
from stepengine.core.request import Request
from stepengine.faults.exhibit import Exhibit
from stepengine.faults.workload import Ask, Workload
from stepengine.stage2_paged.cache import PagedCache


class GivesBackFullBlocks(PagedCache):
    """Counts a request's blocks by its tokens, and rounds down."""

    def release(self, request: Request) -> None:
        self.pool.free(request.blocks[: request.computed // self.block_size])
        self._let_go(request)
        self.free_slots.extend(self.hosted.pop(request.id, ()))


def _asks() -> tuple[Ask, ...]:
    prompts = [tuple(1 + (7 * number + at) % 90 for at in range(9 + number % 5)) for number in range(40)]
    return tuple(Ask(prompt, 8 + number % 4, arrives=3 * number) for number, prompt in enumerate(prompts))


EXHIBIT = Exhibit(
    name="leaked block",
    symptom=(
        "After a restart the server is fast. Throughput falls from hour to hour, at the same traffic; in the end it "
        "accepts nothing at all, and a restart makes it fast again. Every answer is right."
    ),
    where="the blocks that the pool calls free, and how many requests run side by side",
    choices=(
        "requests grow longer from hour to hour",
        "some blocks are never given back",
        "the scheduler admits too few requests",
    ),
    answer="some blocks are never given back",
    workload=Workload(
        stage=2,
        asks=_asks(),
        steps=160,
        settings={"block_size": 8, "num_blocks": 32, "max_num_seqs": 6, "max_model_len": 64},
    ),
    seam="cache",
    healthy=PagedCache,
    broken=GivesBackFullBlocks,
    method="release",
    check=partial(check_kv_cache, block_size=4, num_blocks=8, max_model_len=24),
    promise="release gives everything back",
    threads=("kekzl/imp#1115",),
)
