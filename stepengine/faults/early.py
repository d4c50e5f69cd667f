"""Exhibit 2: a block that is found before all of it was computed."""

from stepengine.contracts import check_prefix_cache
from stepengine.core.request import Request
from stepengine.faults.exhibit import Exhibit
from stepengine.faults.texts import ANNA
from stepengine.faults.workload import MODEL, Ask, Workload
from stepengine.stage4_chunked_prefix.cache import PrefixCache


class SealsWhatIsHeld(PrefixCache):
    """Takes a block for full as soon as the request holds it and has the tokens for it."""

    def commit(self, request: Request, upto: int) -> int:
        """All survive; blocks that are full now can be found from the next step on."""
        first, full = self.sealed.get(request.id, 0), min(len(request.blocks), request.num_tokens // self.block_size)
        if full > first:
            keys, seal = self._keys(request, full), self.pool.seal
            for at in range(first, full):
                if not seal(request.blocks[at], keys[at]):
                    break  # nor may any that continue it
                first = at + 1
            self.sealed[request.id] = first
        return upto


EXHIBIT = Exhibit(
    name="early hit",
    symptom=(
        "Two customers ask about the same text. When the second comes a minute after the first, both are answered "
        "well. When the second comes a moment after the first, it is answered as if it had not sent the text."
    ),
    where="the step in which B starts: how full is the block that it takes over from A?",
    choices=(
        "B takes over a block that A has not finished",
        "A writes into a block that B holds",
        "B's prompt is cut off",
    ),
    answer="B takes over a block that A has not finished",
    workload=Workload(
        stage=4,
        asks=(
            Ask(ANNA + " The name of the dog is", 8),
            Ask(ANNA + " The name of the cat is", 8, arrives=1),
        ),
        steps=40,
        settings={
            "block_size": 32,
            "num_blocks": 8,
            "max_num_seqs": 4,
            "max_model_len": 96,
            "max_num_batched_tokens": 16,
            "long_prefill_token_threshold": 4,
        },
        model=MODEL,
    ),
    seam="cache",
    healthy=PrefixCache,
    broken=SealsWhatIsHeld,
    method="commit",
    check=check_prefix_cache,
    promise="a chunk's full blocks are found, also when it ends on a block",
    threads=("GeeeekExplorer/nano-vllm#209", "vllm-project/vllm#34587"),
)
