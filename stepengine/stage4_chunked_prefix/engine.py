"""Stage 4: two ideas, each changing a part or two of stage 3: how a step is filled, which blocks are found again."""

from dataclasses import replace

from stepengine.stage3_flash import engine as stage3
from stepengine.stage4_chunked_prefix.block_pool import PrefixBlockPool
from stepengine.stage4_chunked_prefix.cache import PrefixCache
from stepengine.stage4_chunked_prefix.scheduler import BudgetScheduler

PARTS_A = replace(stage3.PARTS, scheduler=BudgetScheduler)
PARTS_B = replace(stage3.PARTS, cache=PrefixCache, block_pool=PrefixBlockPool)
PARTS = replace(PARTS_B, scheduler=BudgetScheduler)
