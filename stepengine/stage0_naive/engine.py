"""Stage 0, in one line of parts."""

from stepengine.core.seams import Parts
from stepengine.stage0_naive.attention import RecomputedAttention
from stepengine.stage0_naive.cache import NoCache
from stepengine.stage0_naive.scheduler import StaticScheduler


def stores_nothing(max_model_len: int, block_size: int | None) -> int:
    """Tokens per block of K/V storage: there is no storage."""
    return 0


PARTS = Parts(
    scheduler=StaticScheduler,
    cache=NoCache,
    attention=RecomputedAttention,
    block_size=stores_nothing,
)
