"""Exhibit 5: a block that is found by its own tokens alone, whatever came before them."""

from stepengine.contracts import check_prefix_cache
from stepengine.core.request import Request
from stepengine.faults.exhibit import Exhibit
from stepengine.faults.texts import ANNA
from stepengine.faults.workload import MODEL, Ask, Workload
from stepengine.stage4_chunked_prefix.cache import PrefixCache
from stepengine.stage4_chunked_prefix.prefix_index import Key


class KeysStandAlone(PrefixCache):
    """Makes a block's key of its tokens, without the key of the block before it."""

    def _keys(self, request: Request, count: int) -> list[Key]:
        """The keys of a request's full blocks, at least of its first `count` ones."""
        keys = self.keys.get(request)
        if keys is None:
            keys = self.keys[request] = []
        size, ids, salt = self.block_size, request.token_ids, request.cache_salt
        for start in range(len(keys) * size, count * size, size):
            key = Key(None, tuple(ids[start : start + size]), salt)
            keys.append(key)
        return keys


RULES = "Please read the text with care. Then answer the question at its very end."
STORY = f" {ANNA} Their names:"

EXHIBIT = Exhibit(
    name="orphan hash",
    symptom=(
        "The same text is answered well behind the usual instructions, and with nonsense when it is sent without them. "
        "After a restart, or with prefix caching switched off, the very same request is answered well."
    ),
    where="the blocks that B finds: after which tokens were they computed?",
    choices=(
        "two different texts have the same hash",
        "a block is found by its own tokens, whatever came before them",
        "B wrote into blocks that A held",
    ),
    answer="a block is found by its own tokens, whatever came before them",
    workload=Workload(
        stage="4b",
        asks=(Ask(RULES + STORY, 12), Ask(STORY, 14, arrives=14)),
        steps=40,
        settings={"block_size": 8, "num_blocks": 24, "max_num_seqs": 4, "max_model_len": 96},
        model=MODEL,
    ),
    seam="cache",
    healthy=PrefixCache,
    broken=KeysStandAlone,
    method="_keys",
    check=check_prefix_cache,
    promise="a block is found only after its own beginning",
    threads=("vllm-project/aibrix#2329",),
)
