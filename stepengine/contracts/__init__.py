"""Checks that any implementation of a seam must pass: ours and the reader's. They report, never raise."""

from stepengine.contracts.attention import check_attention
from stepengine.contracts.block_pool import check_block_pool
from stepengine.contracts.kv_cache import check_kv_cache
from stepengine.contracts.prefix_cache import check_prefix_cache
from stepengine.contracts.prefix_pool import check_evictor, check_prefix_pool
from stepengine.contracts.report import Report
from stepengine.contracts.scheduler import check_scheduler

__all__ = [
    "Report",
    "check_attention",
    "check_block_pool",
    "check_evictor",
    "check_kv_cache",
    "check_prefix_cache",
    "check_prefix_pool",
    "check_scheduler",
]
