"""Stage 1: two ideas on top of stage 0, each creditable alone."""

from dataclasses import replace

from stepengine.stage0_naive import engine as stage0
from stepengine.stage1_kvcache.attention import SlotAttention
from stepengine.stage1_kvcache.cache import SlotCache
from stepengine.stage1_kvcache.scheduler import ContinuousScheduler


def one_slot(max_model_len: int, block_size: int | None) -> int:
    """Tokens per block of K/V storage: a whole slot."""
    return max_model_len


PARTS_A = replace(stage0.PARTS, cache=SlotCache, attention=SlotAttention, block_size=one_slot)
PARTS = PARTS_B = replace(PARTS_A, scheduler=ContinuousScheduler)
