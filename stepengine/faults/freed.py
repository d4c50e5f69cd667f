"""Exhibit 4: a block that is free although a table still names it."""

from collections.abc import Sequence

from stepengine.contracts import check_block_pool
from stepengine.faults.exhibit import Exhibit
from stepengine.faults.texts import ANNA, TOM
from stepengine.faults.workload import MODEL, Ask, Workload
from stepengine.stage2_paged.block_pool import BlockPool


class FreesForAll(BlockPool):
    """Counts references, and does not look at them when somebody lets go."""

    def free(self, ids: Sequence[int]) -> None:
        """One reference less on each; a block without references is free again."""
        self._check(ids)
        if len(set(ids)) < len(ids):
            self._check_repeated(ids)
        for block in ids:
            self._refs[block] = 0
            self._free.append(block)


EXHIBIT = Exhibit(
    name="freed block",
    symptom=(
        "Where answers branch, as in beam search, a branch that is dropped ruins one that goes on: in mid-sentence the "
        "answer continues with words out of another customer's text."
    ),
    where="the step in which C starts: which blocks is it given, and who has them in its table?",
    choices=(
        "C's prompt was appended to A's",
        "A's blocks were handed out again while A still read them",
        "A was preempted and began again",
    ),
    answer="A's blocks were handed out again while A still read them",
    workload=Workload(
        stage=2,
        asks=(
            Ask(ANNA + " Their names:", 18),
            Ask(forks=0, max_tokens=3, arrives=1),
            Ask(TOM + " Their names:", 8, arrives=3),
        ),
        steps=24,
        settings={"block_size": 8, "num_blocks": 20, "max_num_seqs": 4, "max_model_len": 64},
        model=MODEL,
    ),
    seam="block_pool",
    healthy=BlockPool,
    broken=FreesForAll,
    method="free",
    check=check_block_pool,
    promise="a shared block is free when its last holder lets go",
    threads=("vllm-project/vllm#42273", "vllm-project/vllm#20512"),
)
