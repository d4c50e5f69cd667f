"""Exhibit 7: a request that was preempted and comes back to K/V which are no longer its own."""

from stepengine.contracts import Report, check_prefix_cache
from stepengine.core.seams import Limits
from stepengine.faults.exhibit import Exhibit
from stepengine.faults.texts import ANNA, TOM
from stepengine.faults.workload import MODEL, Ask, Workload
from stepengine.stage4_chunked_prefix.block_pool import PrefixBlockPool
from stepengine.stage4_chunked_prefix.cache import PrefixCache
from stepengine.stage4_chunked_prefix.prefix_index import Entry, HashPrefixIndex


class LeavesTheEntry(HashPrefixIndex):
    """Takes an evicted block out of its table, but not out of what requests remember."""

    def remove(self, entry: Entry) -> None:
        del self._table[entry.place]
        if entry.parent is not None:
            entry.parent.children -= 1


def check_index(index: type) -> Report:
    """The contract of a prefix cache, for one that looks its blocks up in such an index."""

    def cache_with(limits: Limits) -> PrefixCache:
        return PrefixCache(limits, PrefixBlockPool(limits.num_blocks, index()))

    cache_with.__name__ = f"with {index.__name__}"
    return check_prefix_cache(cache_with)


EXHIBIT = Exhibit(
    name="stale K/V",
    symptom=(
        "On busy days, and only then, an answer goes on with names out of another customer's text. The same request on "
        "a quiet machine is answered well, every time."
    ),
    where="the step in which the preempted request comes back: which blocks does it find, and who else holds them?",
    choices=(
        "it finds blocks that hold somebody else's text by now",
        "it lost the tokens that it had written before",
        "the two requests wrote into one block at the same time",
    ),
    answer="it finds blocks that hold somebody else's text by now",
    workload=Workload(
        stage="4b",
        asks=(
            Ask("The old man walked along the beach every morning, and the sea was", 6),
            Ask("Tell me how bread is made, from the field to the table:", 9),
            Ask(ANNA + " She calls them by their names:", 12, priority=1),
            Ask(TOM + " He calls them by their names: Bruno, Kiwi and Tiger", 10, arrives=6),
        ),
        steps=40,
        settings={"block_size": 8, "num_blocks": 10, "max_num_seqs": 4, "max_model_len": 64},
        model=MODEL,
    ),
    seam="prefix_index",
    healthy=HashPrefixIndex,
    broken=LeavesTheEntry,
    method="remove",
    check=check_index,
    promise="in any order, each reads its own tokens",
    threads=("ovg-project/kvcached#362", "RBLN-SW/vllm-rbln#676"),
)
