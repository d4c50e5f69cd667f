"""Stage 2: small blocks in place of slots. Scheduler, cache, pool and attention change, the rest stays."""

from dataclasses import replace

from stepengine.stage1_kvcache import engine as stage1
from stepengine.stage2_paged.attention import PagedAttention
from stepengine.stage2_paged.block_pool import BlockPool
from stepengine.stage2_paged.cache import PagedCache
from stepengine.stage2_paged.scheduler import PagedScheduler


def small_blocks(max_model_len: int, block_size: int | None) -> int:
    """Tokens per block of K/V storage: what was asked for, or 16."""
    return block_size or min(16, max_model_len)


PARTS = replace(
    stage1.PARTS,
    scheduler=PagedScheduler,
    cache=PagedCache,
    attention=PagedAttention,
    block_size=small_blocks,
    block_pool=BlockPool,
)
