"""The ninth part, for the visitor to mend: two samples that write into one block."""

from functools import partial

from stepengine.contracts import check_kv_cache
from stepengine.core.plan import Copy
from stepengine.core.request import Request
from stepengine.core.seams import Grant
from stepengine.faults.exhibit import Exhibit
from stepengine.faults.workload import MODEL, Ask, Workload
from stepengine.stage2_paged.cache import PagedCache


class SharesWhatItWrites(PagedCache):
    """Looks for shared blocks from the first block on that the request does not have yet."""

    def grow(self, request: Request, upto: int) -> Grant | None:
        size, pool = self.block_size, self.pool
        other = self._sharing(request) if request.computed else None  # matched, and taken up by the scheduler
        hits = other.blocks[: self._count(len(request.prompt_ids))] if other is not None else []
        pool.share(hits)
        table = [*request.blocks, *hits]
        writes = range(-(-max(request.scheduled, request.computed) // size), len(table))
        shared = [entry for entry in writes if pool.refs(table[entry]) > 1]
        granted = pool.alloc(max(0, self._count(upto) - len(table)) + len(shared))
        if granted is None:
            pool.free(hits)
            return None
        fresh = list(granted)
        copies = tuple(Copy(request.id, entry, table[entry], fresh.pop()) for entry in shared)
        pool.free([copy.source for copy in copies])
        holders = self.samples.setdefault(request.group, [])
        if request not in holders:
            holders.append(request)
        return Grant((*hits, *fresh), copies)


EXHIBIT = Exhibit(
    name="two writers",
    symptom="Asked for two answers to one prompt, the engine gives two that mix; asked for one, it gives a good one.",
    where="the last block of the prompt: how many hold it while both write?",
    choices=("the dice are the same", "both samples write into one block", "the prompt is run twice"),
    answer="both samples write into one block",
    workload=Workload(
        stage=2,
        asks=(
            Ask(
                "The lighthouse keeper climbed the stairs, lit the lamp and looked out over the sea. He said",
                20,
                seed=5,
                n=2,
            ),
        ),
        steps=40,
        settings={"block_size": 16, "num_blocks": 12, "max_num_seqs": 4, "max_model_len": 64},
        model=MODEL,
    ),
    seam="cache",
    healthy=PagedCache,
    broken=SharesWhatItWrites,
    method="grow",
    check=partial(check_kv_cache, block_size=4, num_blocks=8, max_model_len=24),
    promise="samples of one prompt part when they write",
)
