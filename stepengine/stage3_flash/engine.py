"""Stage 3: flash attention. One part changes: how K/V are read."""

from dataclasses import replace

from stepengine.stage2_paged import engine as stage2
from stepengine.stage3_flash.attention import FlashAttention

PARTS = replace(stage2.PARTS, attention=FlashAttention)
